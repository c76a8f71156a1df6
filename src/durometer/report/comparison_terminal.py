"""The scoreboard as a terminal shows it: safeguards first, then every attack."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from durometer.report import comparison_text as words
from durometer.report import figures
from durometer.report.comparison_removal import BROKE, NOT_JUDGED
from durometer.report.figures import budget_of, budget_text

Json = Mapping[str, Any]
HALF = 0.5
LEGEND = (
    "Median over seeds; (a, b]: no seed had broken at a, all had at b; > is a lower bound: never "
    "reached. In limit: the model keeps its general ability within the utility limit of its run. "
    "Right at step 0, over-refusals: before any attack, on report items. Points below 0 are "
    "gained. Gain: budget over that of the plain safeguard, the smallest over attacks."
)


def comparison_table(comparison: Json) -> RenderableType:
    """Return the scoreboard for a terminal of 80 columns or more.

    Args:
        comparison: what ``build_comparison`` gave.
    """
    domain = comparison["domain"]
    title = Text.assemble(
        _text("Scoreboard", "bold"), _text(f"  {domain['name']} ({domain['kind']})")
    )
    parts: list[RenderableType] = [title]
    line = words.differences_line(comparison)
    parts += [_text(line, "yellow")] if line else []
    for group, heading in words.TITLES.items():
        if comparison[group]:
            parts += [Text(), _text(heading, "bold"), *_remark(group, comparison)]
            parts.append(_overview(comparison[group]))
    parts += [Text(), *_failed(comparison["failed"])] if comparison["failed"] else []
    everyone = words.everyone(comparison)
    parts += [Text(), _text("Before any attack", "bold"), _outcomes(everyone)]
    attacked = [row for row in everyone if row["removal"]["without"]["state"] != NOT_JUDGED]
    if attacked:
        parts += [Text(), _text("Least that brings half back", "bold"), _removals(attacked)]
    for group in words.TITLES:
        rows = [row for row in comparison[group] if row["cells"]]
        if rows:
            parts += [Text(), _text(f"{words.HEADINGS[group]} by attack", "bold")]
            parts.append(_attacks(comparison["attacks"], rows))
    parts += [Text(), _text("Tested and not tested", "bold"), *_coverage(comparison, everyone)]
    return Group(*parts, Text(), _text(LEGEND, "dim"))


def _failed(failed: Sequence[Json]) -> Iterator[Text]:
    yield _text("Not attacked", "bold")
    for one in failed:
        yield _text(f"{one['subject']}: {one['reason']}", "yellow")


def _outcomes(rows: Sequence[Json]) -> Table:
    """Return the share of every outcome at step 0, with its interval."""
    table = _plain_table()
    table.add_column(
        "answers to re-\nstricted prompts", overflow="fold", min_width=10, max_width=26
    )
    for heading in words.SHORT.values():
        table.add_column(heading, no_wrap=True, justify="right")
    for row in rows:
        cells = [_share(row["outcomes"].get(outcome)) for outcome in words.SHORT]
        table.add_row(Text("\n").join(_stages(row["name"])), *cells)
    return table


def _share(rate: Json | None) -> Text:
    if rate is None:
        return _text("n/a", "dim")
    low, high = (figures.decimal(100 * rate[end], 0) for end in ("low", "high"))
    return _text(f"{words.whole(rate)}\n[{low}, {high}]")


def _removals(rows: Sequence[Json]) -> Table:
    """Return what it takes within the utility limit and without it, and what that costs."""
    table = _plain_table()
    table.add_column("attacked", overflow="fold", min_width=10, max_width=22)
    for heading in ("within the utility limit", "without the limit"):
        table.add_column(heading, overflow="fold", min_width=20, max_width=44)
    for row in rows:
        cells = [_removal(row["removal"][name]) for name in ("within", "without")]
        table.add_row(Text("\n").join(_stages(row["name"])), *cells)
    return table


def _removal(found: Json) -> Text:
    budget, attack = words.removal_text(found)
    lines = [_text(budget, "red" if found["state"] == BROKE else ""), _text(attack)]
    lines += [_text(spent, "dim")] if (spent := words.spent_text(found)) else []
    return Text("\n").join(lines)


def _coverage(comparison: Json, rows: Sequence[Json]) -> Iterator[Text]:
    """Yield what was tested on the models, and what is missing for one of them."""
    for heading, told in words.coverage_lines(comparison):
        yield _text(f"{heading}: {told}")
    for row in rows:
        for gap in row["gaps"]:
            yield _text(f"{row['name']}: {gap}", "yellow")


def _remark(group: str, comparison: Json) -> list[Text]:
    """Return what must be said over a group's table."""
    said = {"safeguards": words.unranked_line(comparison), "unknown": words.WHAT_TO_DO}
    return [_text(said[group], "yellow")] if said.get(group) else []


def _text(text: str, style: str = "") -> Text:
    return Text(figures.visible(text), style=style, overflow="fold")


def _plain_table() -> Table:
    return Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)


def _overview(rows: Sequence[Json]) -> Table:
    table = _plain_table()
    table.add_column("model", overflow="fold", min_width=10, max_width=26)
    for heading in ("right at\nstep 0", "retain\npoints\nlost", "over-\nrefu-\nsals"):
        table.add_column(heading, no_wrap=True, justify="right")
    table.add_column("training\npasses,\nseconds", no_wrap=True, justify="right")
    table.add_column("least that\nbrings half back", overflow="fold", min_width=10, max_width=34)
    table.add_column("gain", no_wrap=True, justify="right")
    for row in rows:
        table.add_row(*_overview_row(row))
    return table


def _overview_row(row: Json) -> list[Text]:
    zero, cost = row["zero_step"], row["cost"]
    return [
        Text("\n").join([*_stages(row["name"]), *(_text(n, "dim") for n in words.notes(row))]),
        _text(words.whole(zero["success"])),
        _text(words.points(cost["retain_points"])),
        _text(words.whole(cost["over_refusal"])),
        _text(words.training(cost)),
        _text(
            words.first_text(row), "red" if (row["first_broken"] or {}).get("within_limit") else ""
        ),
        _text(words.gain_text(row["gain"])),
    ]


def _stages(name: str) -> list[Text]:
    """Return a name in as many lines as it has stages, so that a narrow column breaks no word."""
    first, *more = name.replace(" (", "\n(").split("+")
    return [_text(first, "bold"), *(_text(f"+{stage}", "bold") for stage in more)]


def _attacks(attacks: Sequence[Json], rows: Sequence[Json]) -> Table:
    table = _plain_table()
    table.add_column("attack, model", overflow="fold", min_width=10, max_width=34)
    for heading in (
        "50 % back,\nin limit",
        "50 %,\nno limit",
        "25 %,\nin limit",
        "25 %,\nno limit",
    ):
        table.add_column(heading, no_wrap=True)
    table.add_column("gain", no_wrap=True, justify="right")
    for attack in attacks:
        made = [row for row in rows if attack["configuration"] in row["cells"]]
        if not made:
            continue
        unit = "" if attack["unit"] == "steps" else f", in {attack['unit']}"
        table.add_row(_text(f"{words.spaced(attack['label'])}{unit}", "bold"), *[""] * 5)
        for row in made:
            table.add_row(*_attack_row(row, row["cells"][attack["configuration"]]))
    return table


def _attack_row(row: Json, cell: Json) -> list[Text]:
    name = _text("  " + row["name"].replace("+", "\n  +").replace(" (", "\n  ("))
    if not cell["judged"]:
        return [name, _text(words.unjudged(cell), "dim"), *[Text()] * 4]
    budgets = [_budget(cell, recovery, within) for recovery, within in words.LEVELS]
    gain = cell["gain"]
    return [name, *budgets, _text(words.gain_text(gain) if gain else "")]


def _budget(cell: Json, recovery: float, within: bool) -> Text:
    found = budget_text(budget_of(cell, recovery, within=within, axis="steps"))
    if not found.broken:
        return _text("n/a", "dim")
    style = "bold" if found.censored else "bold red"
    lines = [_text(found.value, style)]
    lines += [_text(part) for part in broken_interval(found.interval)]
    return Text("\n").join(lines)


def broken_interval(interval: str) -> Iterator[str]:
    """Yield an interval in two lines where one would crowd out another column."""
    if interval and len(interval) > 11:
        yield from interval.replace(", ", ",\n ").split("\n")
    elif interval:
        yield interval
