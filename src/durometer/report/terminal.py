"""The summary that a terminal shows: what it takes to break the safeguard, first."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from durometer.report import figures
from durometer.report.figures import budget_of, budget_text
from durometer.report.further import further_lines
from durometer.report.groups import groups_lines
from durometer.report.html import hardness, stands_for, undefended_curve
from durometer.report.human import human_lines
from durometer.report.judges import judges_lines
from durometer.report.quantisation import quantisation_line

Json = Mapping[str, Any]
HALF = 0.5
AXES = ("steps", "examples")
NARROW = 13
STYLES = {
    "pass": "green",
    "fail": "bold red",
    "not_run": "yellow",
    "na": "dim",
    "info": "cyan",
}
FILES = "report.html, summary.json, trials.jsonl"


def summary_table(summary: Json, folder: Path | str | None = None) -> RenderableType:
    """Return what a stress test found, for a terminal of 80 columns or more.

    Never holds a prompt or a response, and no markup or control sequence out of a name is obeyed.

    Args:
        summary: what ``build_summary`` gave.
        folder: run folder, printed as the place of the files.
    """
    parts: list[RenderableType] = [_title(summary), _budgets(summary), _legend(summary)]
    parts += [Text(), _verdict(summary), *_states(summary)]
    parts += [Text(), _controls(summary), *_worst(summary), *_further(summary)]
    if folder is not None:
        parts += [Text(), _text(f"Files: {FILES} in {folder}")]
    return Group(*parts)


def _text(text: str, style: str = "") -> Text:
    """Return literal text: no markup, control and direction characters written out."""
    return Text(figures.visible(text), style=style, overflow="fold")


def _title(summary: Json) -> Text:
    subject, domain = summary["subject"] or {}, summary["domain"] or {}
    name = f"{subject.get('name', 'unknown subject')} on {domain.get('name', 'unknown domain')}"
    return Text.assemble(_text("Budget-to-break", "bold"), _text(f"  {name}"))


def _budgets(summary: Json) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("attack", overflow="fold", min_width=9, max_width=30)
    for heading in ("50 % back,\nin limit", "50 % back,\nno limit"):
        table.add_column(heading, no_wrap=True)
    for heading in ("success\nbefore,\nafter", "refu-\nsals\nafter", "retain\npoints\nlost"):
        table.add_column(heading, no_wrap=True, justify="right")
    table.add_column("unde-\nfended\nafter", no_wrap=True, justify="right")
    for tamper in sorted(summary["tampers"], key=hardness):
        table.add_row(*_row(tamper, summary))
    if not summary["tampers"]:
        table.add_row(_text("no attack recorded", "dim"), *[""] * 6)
    return table


def _row(tamper: Json, summary: Json) -> list[Text]:
    after = stands_for(tamper, "success_report") or {}
    cost = (stands_for(tamper, "utility_loss") or {}).get("utility_loss")
    start: Json = next((c for c in tamper["checkpoints"] if not c["steps"]), {})
    control = [
        c["success_report"]
        for c in undefended_curve(summary, tamper["configuration"])
        if c["steps"] and c["success_report"]
    ]
    refusal = after.get("refusal") if after.get("success") else None
    return [
        _name(tamper),
        _budget(tamper, within=True),
        _budget(tamper, within=False),
        _text(f"{_share(start.get('success_report'))}\n{_share(after.get('success_report'))}"),
        _text(_whole(refusal)),
        _text("n/a" if cost is None else figures.decimal(cost["value"])),
        _text(_share(control[-1]) if control else "none"),
    ]


def _name(tamper: Json) -> Text:
    bad = [s["status"] for s in tamper["statuses"].values() if s["status"] != "done"]
    name, _, settings = tamper["label"].partition(" (")
    lines = [_text(name, "bold")]
    # A space instead of "=" lets a narrow column break before a number, never inside it.
    told = settings.removesuffix(")").replace("=", " ").split(", ")
    lines += [_text(one, "dim") for one in told if one]
    lines += [_text(f"{bad.count(status)} {status}", "yellow") for status in sorted(set(bad))]
    return Text("\n", overflow="fold").join(lines)


def _budget(tamper: Json, *, within: bool) -> Text:
    found = {axis: budget_of(tamper, HALF, within=within, axis=axis) for axis in AXES}
    steps, examples = (budget_text(found[axis]) for axis in AXES)
    if not steps.broken:
        return _text("not measured", "dim")
    style = "bold" if steps.censored else "bold red"
    lines = [_text(f"{steps.value} {figures.unit_of(tamper)}", style)]
    told = (figures.strength_at(tamper, found["steps"]), steps.interval and _narrow(steps.interval))
    lines += [_text(line) for line in told if line]
    lines += [_text(f"{examples.value} ex."), _text(steps.broken.replace(" of ", "/"), "dim")]
    return Text("\n").join(lines)


def _narrow(interval: str) -> str:
    """Return an interval in two lines where one would crowd out another column."""
    return interval if len(interval) <= NARROW else interval.replace(", ", ",\n ")


def _share(rate: Json | None) -> str:
    return _whole(None if rate is None else rate["rate"])


def _whole(share: float | None) -> str:
    """Return a share as ``60 %``; the report has the digits and the interval."""
    return "n/a" if share is None else f"{100 * share:.0f} %"


def _legend(summary: Json) -> Text:
    limit = summary["suite"]["plan"]["utility_limit"] if summary["suite"] else None
    points = "" if limit is None else f" (at most {limit:g} points of retain score lost)"
    return _text(
        "Median over seeds; (a, b]: no seed had broken at a, all had at b; > is a lower bound: "
        f"never reached. Limit: utility{points}; points below 0 are gained. "
        "ex. = examples. Success and points on report items, refusals on select items, at the "
        "median break or the last checkpoint; intervals are in the report.",
        "dim",
    )


def _verdict(summary: Json) -> Text:
    broke = any(tamper["broke"] for tamper in summary["tampers"])
    return _text(summary["verdict"], "bold red" if broke else "bold")


def _states(summary: Json) -> Iterator[Text]:
    """Yield what is unusual about the run: kind of suite, missing trials, failed trials."""
    counts = dict(summary["status_counts"])
    planned, missing = counts.pop("planned", 0), counts.get("interrupted", 0)
    told = [f"{n} {name}" for name, n in counts.items() if n and name != "interrupted"]
    grade = "claim-grade" if (summary["suite"] or {}).get("claim_grade") else "screen"
    yield _text(f"Trials: {', '.join(told) or 'none'} ({grade})")
    if not summary["complete"]:
        left = f"{missing} of {planned} planned trials are missing" if missing else "not complete"
        yield _text(f"Interrupted: {left}; go on with: {_again(summary)}", "yellow")


def _again(summary: Json) -> str:
    """Return the command that goes on with the run, whichever command began it."""
    request = summary["request"] or {"subject": "SUBJECT", "domain": "DOMAIN"}
    words = [request["subject"], "--domain", request["domain"]]
    return " ".join(["durometer stress", *words, "... --out DIR --resume"])


def _controls(summary: Json) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for control in summary["controls"]:
        status = control["status"]
        table.add_row(
            _text(control["name"].replace("_", " ")),
            _text(status.replace("_", " "), STYLES.get(status, "")),
            _text(control["detail"]),
        )
    return table


def _worst(summary: Json) -> Iterator[RenderableType]:
    worst = summary["worst"]
    if not worst:
        yield _text("Worst case: not chosen, not every attack was measured", "yellow")
    else:
        again = figures.rate_text(worst["report"])
        yield _text(
            f"Worst case: {worst['label']} at {figures.quantity(worst['steps'])} steps, chosen on "
            f"select ({figures.percent(worst['select'])}); again with "
            f"{len(worst['fresh_seeds'])} fresh seeds on report: {again}"
        )
    gain = summary["durability_gain"] or {}
    if gain.get("value") is not None:
        text = f"Durability gain: {gain['value']:.2f} x the steps of {gain['reference']}"
    else:
        text = f"Durability gain: none, {gain.get('reason') or 'not computed'}"
    yield Padding(_text(text), 0)


def _further(summary: Json) -> Iterator[Text]:
    """Yield what measures beside the plan's found, and what rounding changes."""
    for line in further_lines(summary):
        yield _text(line)
    for line in (*groups_lines(summary), *judges_lines(summary), *human_lines(summary)):
        yield _text(line)
    line = quantisation_line(summary.get("quantisation", []))
    if line:
        yield _text(line, "yellow" if ": alarm" in line else "")
