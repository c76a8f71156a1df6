"""What ``judge-check`` found, for a terminal; holds no prompt, no response and no judge's text."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from durometer.report import figures

Json = Mapping[str, Any]
AXES = {"harmful": "harm", "refusal": "refusals"}
EXPECTED = {
    ("harmful", True): "harmful",
    ("harmful", False): "harmless",
    ("refusal", True): "a refusal",
    ("refusal", False): "no refusal",
}


def weakness_table(found: Json) -> RenderableType:
    """Return what a judge is right about, and what turns it."""
    return Group(
        _text(f"{found['judge']['name']} on {found['items']} benign questions", "bold"),
        *_identity(found["judge"]),
        Text(),
        _text(f"as it is, verdict on {AXES[found['axis']]}"),
        _base(found),
        Text(),
        _text("share of wrong verdicts and its change in points, for the same responses"),
        _changes(found),
        *(_text(f"{one['name']}: {one['meaning']}", "dim") for one in found["changes"]),
        Text(),
        *_verdict(found),
    )


def _text(text: str, style: str = "") -> Text:
    return Text(figures.visible(text), style=style, overflow="fold")


def _identity(judge: Json) -> Iterator[Text]:
    """Yield where the judge came from, and what it says it cannot do."""
    place = judge.get("address") or judge["model"]
    model = f"{judge['model']} at {place}" if judge.get("address") else place
    revision = judge["revision"] or (f"weights {judge['weights']}" if judge.get("weights") else "-")
    yield _text(f"model {model}, revision {revision}, prompt {judge['template_hash']}")
    if judge["pinned"] and not judge["is_pinned"]:
        yield _text(f"not known to be the pinned {judge['pinned']}")
    yield _text(f"cannot judge {judge['cannot_judge']}")


def _table(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def _base(found: Json) -> RenderableType:
    table = _table("response", "known to be", "right, %", "wrong", "unparsed")
    for arm in found["arms"]:
        rate = arm["rate"]
        low, share, high = (100 * rate[name] for name in ("low", "rate", "high"))
        table.add_row(
            _text(arm["meaning"]),
            _text(EXPECTED[found["axis"], arm["expected"]]),
            _text(f"{share:.0f} [{low:.0f}, {high:.0f}]"),
            _text(f"{arm['wrong']} of {arm['n']}"),
            _text(str(arm["unparsed"])),
        )
    return table


def _changes(found: Json) -> RenderableType:
    table = _table("change", "on", "wrong, %", "change", "unparsed", "")
    for change in found["changes"]:
        for number, (name, row) in enumerate(change["arms"].items()):
            table.add_row(
                _text("" if number else change["name"]),
                _text(f"{name}s"),
                _text(f"{100 * row['before']:.0f} to {100 * row['after']:.0f}"),
                _text(_points(row)),
                _text(str(row["unparsed"])),
                _text(_finding(row, control=change["control"]), "bold red" if row["weak"] else ""),
            )
    return table


def _points(row: Json) -> str:
    low, value, high = (figures.decimal(100 * row[name]) for name in ("low", "value", "high"))
    return f"{value} [{low}, {high}]"


def _finding(row: Json, *, control: bool) -> str:
    if not row["weak"]:
        return ""
    return "turned, by a control" if control else "turned"


def _verdict(found: Json) -> Iterator[Text]:
    told = found["told_apart"]
    low, value, high = (figures.decimal(100 * told[name]) for name in ("low", "value", "high"))
    apart = f"answers and refusals are told apart by {value} points [{low}, {high}]"
    if not found["usable"]:
        yield _text(
            f"Nothing to measure: {apart}; a judge that does not tell them apart on this domain "
            "cannot be turned on it.",
            "yellow",
        )
    elif found["weak"]:
        yield _text(f"Turned by {', '.join(found['weak'])}; {apart}.", "bold red")
    else:
        yield _text(f"Not turned by any of {len(found['changes'])} changes; {apart}.")
    yield _text(
        f"Intervals are paired by entity; together, over {found['comparisons']} comparisons, they "
        f"hold at {100 * found['level']:.0f} %. Unparsed verdicts are never right, and not counted "
        "as wrong."
    )
