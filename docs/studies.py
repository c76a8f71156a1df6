"""Tables of the documentation that are made from the result files of ``studies/``."""

import importlib.util
import json
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from types import ModuleType
from typing import Any

STUDIES = Path(__file__).resolve().parent.parent / "studies"
Json = Mapping[str, Any]
NOTHING = "\N{EN DASH}"
MARKS = {"runs": "●", "no_effect": "○", "refuses": NOTHING}
WORDS = {"runs": "runs", "no_effect": "runs, finds nothing to change", "refuses": "refuses"}


def read(study: str, name: str) -> Any:
    """Return one committed result file of a study."""
    return json.loads((STUDIES / study / "results" / f"{name}.json").read_text("utf-8"))


def attack_surface() -> str:
    """Return the table tamper x family of models, and why some tampers refuse."""
    found = read("attack_surface", "attack_surface")
    families = found["architectures"]
    head = "".join(f'<th scope="col"><span>{escape(name)}</span></th>' for name in families)
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(map(_cell, cases.values()))}</tr>'
        for name, cases in found["tampers"].items()
    )
    seconds = found["seconds"]
    lead = (
        f"{found['cases']} cases, each on a random model of two layers; median "
        f"{seconds['median']:g} s, {100 * seconds['share_within_0.3']:.0f} % within 0.3 s, the "
        f"longest {seconds['largest']:g} s (one thread, transformers "
        f"{found['versions']['transformers']}). "
        f"{_restored(found)}"
    )
    table = (
        '<div class="surface"><table class="matrix"><thead>'
        f'<tr><th scope="col">tamper</th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )
    legend = ", ".join(f"{mark} {WORDS[outcome]}" for outcome, mark in MARKS.items())
    why = f"Where it does not simply run:\n\n{_refusals(found['tampers'])}"
    return f"{lead}\n\n{table}\n\n{legend}. {why}"


def _cell(case: Json) -> str:
    mark = MARKS.get(case["outcome"], case["outcome"])
    said = case["reason"] or f"{case['changed_weights']:,} weights changed"
    return f'<td class="{case["outcome"]}" title="{escape(said, quote=True)}">{mark}</td>'


def _restored(found: Json) -> str:
    cases = [case for row in found["tampers"].values() for case in row.values()]
    kept = sum(case["restored"] for case in cases)
    return f"After {kept} of {len(cases)} the weights were those of before, bit for bit."


def _refusals(tampers: Json) -> str:
    """Return every reason once, with the tampers and families it holds for."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, cases in tampers.items():
        reasons: dict[str, list[str]] = {}
        for family, case in cases.items():
            if case["outcome"] != "runs":
                reasons.setdefault(case["reason"].splitlines()[0], []).append(family)
        for reason, families in reasons.items():
            everywhere = len(families) == len(cases)
            who = "every family" if everywhere else ", ".join(families)
            found.setdefault((who, reason), []).append(f"`{name}`")
    return "\n".join(
        f"- {', '.join(names)} on {who}: {escape(reason)}" for (who, reason), names in found.items()
    )


SCANNERS = ("durometer audit", "picklescan", "picklescan --strict", "ModelScan", "fickling")
VERDICTS = ("flagged", "noted", "failed", "clean", "not looked at")


def scanners() -> str:
    """Return what each scanner says of hostile and of harmless files, by class of file."""
    found = read("audit", "scanners")
    tools = "\n".join(
        f"- **{name}** {tool['version']} (`{tool['used']}`): {tool['claims']}"
        for name, tool in found["tools"].items()
    )
    hostile, harmless = (
        [row for row in found["classes"] if row["harmless"] is side] for side in (False, True)
    )
    parts = (
        f"Run on {found['date']}, each scanner in an environment of its own:",
        tools,
        f"**Hostile, {_cases(hostile)} files and folders.**",
        _verdicts(hostile),
        f"**Harmless, {_cases(harmless)}.** Here *flagged* is a false alarm.",
        _verdicts(harmless),
    )
    return "\n\n".join(parts)


def _cases(rows: Iterable[Json]) -> int:
    return sum(row["cases"] for row in rows)


def _verdicts(rows: Iterable[Json]) -> str:
    """Return a table, class of file by scanner, of how many got which verdict."""
    head = f"| class of file | cases | {' | '.join(SCANNERS)} |\n|{'---|' * (len(SCANNERS) + 2)}"
    lines = [
        f"| {row['kind']} | {row['cases']} | "
        + " | ".join(_said(row["verdicts"][name]) for name in SCANNERS)
        + " |"
        for row in rows
    ]
    return "\n".join([head, *lines])


def _said(counts: Mapping[str, int]) -> str:
    said = [f"{counts[name]} {name}" for name in VERDICTS if name in counts]
    return ", ".join(said)


def standard(name: str) -> str:
    """Return the table of a standard run: its attacks, and the controls beside them."""
    summary = read("standard", name)
    attacks = _rows(summary["tampers"])
    controls = _rows(summary["matched_controls"])
    head = (
        "| {} | result | budget | success on report | retain points lost |\n|---|---|---|---|---|"
    )
    minutes = summary["wall_seconds"] / 60
    return "\n\n".join(
        [
            f"{_plural(summary['seeds'], 'attack seed')} a configuration, "
            f"{summary['status_counts']['planned']} trials in {minutes:.0f} minutes "
            f"({summary['environment']['threads']} threads, {summary['environment']['dtype']}).",
            "\n".join([head.format("attack"), *attacks]),
            "The same means with random content, one seed each:",
            "\n".join([head.format("control"), *controls]),
            "\n".join(
                f"- {c['name'].replace('_', ' ')}: {c['detail']}" for c in summary["controls"]
            ),
        ]
    )


def transfer() -> str:
    """Return the tables of the study of transfer, as its own page shows them."""
    page = (STUDIES / "transfer" / "README.md").read_text("utf-8")
    return page.split("<!-- results:begin -->")[1].split("<!-- results:end -->")[0].strip()


def tar(name: str) -> str:
    """Return one generated part of the page on TAR, see ``studies/tar/tar_pages.py``."""
    path = STUDIES / "tar" / "results" / "summary.json"
    summary = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    section: str = _module("tar", "tar_pages").section(summary, name)
    return section


def hardened(kind: str) -> str:
    """Return the tables of one kind of domain, see ``studies/hardened/hardened_pages.py``."""
    path = STUDIES / "hardened" / "results" / "summary.json"
    summary = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    section: str = _module("hardened", "hardened_pages").section(summary, kind)
    return section


def override(name: str) -> str:
    """Return one generated part of the page on the override study, see ``override_pages.py``."""
    section: str = _module("override", "override_pages").section(name)
    return section


def _module(study: str, name: str) -> ModuleType:
    """Return a module of a study, whose folder is no package."""
    spec = importlib.util.spec_from_file_location(name, STUDIES / study / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _plural(count: int, word: str) -> str:
    return f"{count} {word}{'s' * (count != 1)}"


def _rows(tampers: Iterable[Json]) -> list[str]:
    from durometer.report import figures
    from durometer.report.html import stands_for

    rows = []
    for tamper in tampers:
        after, cost = stands_for(tamper, "success_report"), stands_for(tamper, "utility_loss")
        success = figures.rate_text(after["success_report"]) if after else "not measured"
        lost = figures.points_text(cost["utility_loss"]) if cost else NOTHING
        rows.append(
            f"| `{tamper['label']}` | {_result(tamper)} | {_budget(tamper)} | {success} | {lost} |"
        )
    return rows


def _result(tamper: Json) -> str:
    if tamper["broke"]:
        breaks = tamper["break_probability"]
        return f"**broke** ({breaks['breaks']} of {breaks['n']})"
    statuses = {s["status"]: s["reason"] for s in tamper["statuses"].values()}
    if set(statuses) <= {"done", "diverged"}:
        return "not broken"
    return "; ".join(f"{s.replace('_', ' ')}: {r}" if r else s for s, r in statuses.items())


def _budget(tamper: Json) -> str:
    from durometer.report import figures
    from durometer.report.figures import budget_of, budget_text, strength_at, unit_of

    budget = budget_of(tamper, 0.5, within=True, axis="steps")
    if budget is None:
        return NOTHING
    told = budget_text(budget)
    words = f"{told.value} {unit_of(tamper)} {told.interval}".strip()
    strength = strength_at(tamper, budget)
    return figures.visible(f"{words}, {strength}" if strength else words)
