"""A recomputation as a terminal shows it: headlines worst first, then the right figures."""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from durometer.report import figures
from durometer.report import recompute_text as words

Json = Mapping[str, Any]
COLOURS = {"bad": "red", "warn": "yellow", "good": "green"}
MOST_ROWS = 60


def recomputation_table(data: Json) -> RenderableType:
    """Return the result for a terminal of 80 columns or more.

    Args:
        data: what ``check_headlines`` gave.
    """
    good = data["all_follow"]
    parts: list[RenderableType] = [
        _text(data["title"], "bold"),
        _text(words.table_line(data), "dim"),
        *([_text(data["about"], "dim")] if data["about"] else []),
        Text(),
        _text(words.verdict_line(data), "bold green" if good else "bold red"),
    ]
    for headline in data["headlines"]:
        parts += [Text(), *_headline(headline)]
    total = len(data["headlines"])
    remarks = words.shared_remarks(data)
    parts += [Text()] if remarks else []
    parts += [_text(f"{count} of {total} headlines: {told}", "yellow") for told, count in remarks]
    parts += [Text(), _text("Right figures", "bold"), _rates(data)]
    if data["differences"]:
        parts += [Text(), _text("Differences, after minus before", "bold"), _differences(data)]
    return Group(*parts, Text(), _text(words.CLOSING, "dim"))


def _text(text: str, style: str = "") -> Text:
    return Text(figures.visible(text), style=style, overflow="fold")


def _headline(headline: Json) -> list[RenderableType]:
    colour = COLOURS[words.STYLES[headline["verdict"]]]
    first = Text.assemble(
        _text(headline["printed"], "bold"),
        _text(f"  {words.subject_of(headline)}: "),
        _text(words.VERDICTS[headline["verdict"]], f"bold {colour}"),
    )
    first.overflow = "fold"
    lines = [_text(headline["note"], "dim")] if headline["note"] else []
    lines.append(_text(f"right: {words.right_text(headline)}"))
    if headline["difference"] is not None:
        lines.append(_text(words.changed_text(headline["difference"]), "dim"))
    lines += [
        _text(f"printed instead: {words.explanation_text(one, headline)}", colour)
        for one in headline["explanations"]
    ]
    searched = words.search_text(headline)
    lines += [_text(searched, "dim")] if searched else []
    return [first, *(Padding(line, (0, 0, 0, 2)) for line in lines)]


def _plain_table(*headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column(headings[0], overflow="fold", min_width=10)
    table.add_column(headings[1], overflow="fold", min_width=10)
    for heading in headings[2:]:
        table.add_column(heading, no_wrap=True, justify="right")
    return table


def _rates(data: Json) -> RenderableType:
    table = _plain_table("arm", "rows", "successes", "rate", "95 %")
    for rate in data["rates"][:MOST_ROWS]:
        table.add_row(
            _text(rate["arm"]),
            _text(words.scope_text(rate["scope"], data)),
            words.counts(rate),
            f"{words.figure(rate['rate'])} %",
            figures.rate_interval(rate),
        )
    return _cut(table, len(data["rates"]))


def _differences(data: Json) -> RenderableType:
    table = _plain_table("arms", "rows", "points", "95 %", "gained, lost", "McNemar p")
    for one in data["differences"][:MOST_ROWS]:
        table.add_row(
            _text(f"{one['before']} \N{RIGHTWARDS ARROW} {one['after']}"),
            _text(words.scope_text(one["scope"], data)),
            words.signed_points(one["value"]),
            figures.rate_interval(one),
            words.changed(one),
            words.probability(one["p_value"]),
        )
    return _cut(table, len(data["differences"]))


def _cut(table: Table, rows: int) -> RenderableType:
    if rows <= MOST_ROWS:
        return table
    return Group(table, _text(f"and {rows - MOST_ROWS} rows more (--json has them)", "dim"))
