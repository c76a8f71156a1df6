"""A drift run as a terminal shows it: what changed by way, then mitigation and removal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from durometer.report import drift_text as words
from durometer.report import figures

Json = Mapping[str, Any]
# The rest is in drift.json and on the page.
SHOWN = (
    "success",
    "refused",
    "choices",
    "over_refusal",
    "reasoning_arithmetic",
    "reasoning_word_problems",
    "accuracy_none",
    "accuracy_false",
    "accuracy_random",
    "accuracy_gap",
    "adopted_false",
    "adopted_random",
    "perplexity_none",
    "perplexity_false",
    "entropy_none",
    "entropy_false",
    "probability_none",
    "probability_false",
)
LEGEND = (
    "Changes after minus before, with 95 % intervals over items and seeds; rates in points. Bold: "
    "the interval excludes 0. Everything else is on the page and in drift.json."
)


def drift_table(data: Json) -> RenderableType:
    """Return the result for a terminal of 80 columns or more.

    Args:
        data: the contents of ``drift.json``.
    """
    run = data["run"]
    title = Text.assemble(
        _text("Drift of ", "bold"),
        _text(run["subject"]["name"], "bold"),
        _text(f"  {run['domain']['name']} ({run['domain']['kind']})"),
    )
    parts: list[RenderableType] = [title, _text(f"{words.setup(data)}.", "dim")]
    parts += [_text(line, "yellow") for line in words.alerts(data)]
    parts += [Text(), _text(f"{words.headline(data)}.", "bold")]
    parts += [_text(line) for line in words.findings(data)]
    for rank in run["settings"]["ranks"]:
        parts += [Text(), _text(f"Rank {rank}", "bold"), _changes(data, rank)]
    parts += _not_done(data)
    return Group(*parts, Text(), _text(LEGEND, "dim"))


def _text(text: str, style: str = "") -> Text:
    return Text(figures.visible(text), style=style, overflow="fold")


def _changes(data: Json, rank: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("", overflow="fold", min_width=14)
    table.add_column("before", no_wrap=True, justify="right")
    for way in words.WAYS:
        table.add_column(words.SHORT[way], no_wrap=True, justify="right")
    for key in SHOWN:
        found = words.quantity(data, key)
        if found is not None:
            table.add_row(_text(found["label"]), *_row(found, rank))
    return table


def _row(found: Json, rank: int) -> Sequence[Text]:
    unit = found["unit"]
    cells = [_text(words.level(unit, found["before"]))]
    for way in words.WAYS:
        one = words.arm(found, way, rank)
        change = one["change"] if one else None
        cell = _text(words.shift(unit, change), "bold" if words.clear(change) else "")
        cells.append(
            Text("\n").join([cell, _text(words.shift_interval(unit, change), "dim")])
            if change
            else cell
        )
    return cells


def _not_done(data: Json) -> list[Text]:
    return [
        _text(
            f"{one['way']}, rank {one['rank']}, seed {one['seed']}: "
            f"{one['status'].replace('_', ' ')}{': ' + one['reason'] if one['reason'] else ''}",
            "yellow",
        )
        for one in data["not_done"]
    ]
