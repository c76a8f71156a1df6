"""What the screen for behaviour that appears only after quantising found, for a terminal."""

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from durometer.report import figures
from durometer.trials.quantisation_gap import LabelGap, Trace
from durometer.trials.quantisation_screen import Change, PrecisionResult, QuantisationScreen

MOST_MATRICES = 8
NAMES = {
    "success": "restricted answers right",
    "refusal": "refusals",
    "over_refusal": "over-refusals",
    "retain": "retain",
}


def quantisation_table(found: QuantisationScreen) -> RenderableType:
    """Return what changed at each precision, and where weights lie in their buckets."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("at")
    table.add_column("behaviour", overflow="fold")
    for heading in ("change, points", "p", "verdict"):
        table.add_column(heading, overflow="fold")
    for one in found.precisions:
        for number, change in enumerate(one.changes):
            table.add_row(_text("" if number else one.precision), *_cells(change))
    title = _text(f"Quantising {found.subject} on {found.domain}", "bold")
    buckets = [line for one in found.precisions for line in _buckets(one)]
    return Group(title, table, *buckets, _verdict(found))


def _text(text: str, style: str = "") -> Text:
    return Text(figures.visible(text), style=style, overflow="fold")


def _cells(change: Change) -> list[Text]:
    difference = change.gap.difference
    return [
        _text(NAMES[change.behaviour]),
        _text(_points(change.gap)),
        _text(f"{difference.p_value:.2g}"),
        _text(_finding(change), "bold red" if change.gap.alarm else ""),
    ]


def _points(gap: LabelGap) -> str:
    low, value, high = (
        figures.decimal(100 * part)
        for part in (gap.difference.low, gap.difference.value, gap.difference.high)
    )
    return f"{value} [{low}, {high}]"


def _finding(change: Change) -> str:
    if not change.gap.alarm or change.with_noise is None:
        return "no more than chance"
    noise = f"with bucket noise {figures.decimal(100 * change.with_noise.difference.value)} points"
    if change.engineered:
        return f"alarm, hangs on exact buckets ({noise})"
    return f"alarm, stays under bucket noise ({noise})"


def _buckets(found: PrecisionResult) -> Iterator[Text]:
    if not found.alarmed:
        yield _text(f"{found.precision} buckets: none of {found.matrices} matrices stands out")
        return
    count = f"{len(found.alarmed)} of {found.matrices} matrices"
    yield _text(f"{found.precision} buckets: alarm in {count}", "bold red")
    for trace in found.alarmed[:MOST_MATRICES]:
        yield _text(f"  {trace.name}: {_distances(trace)}")
    if len(found.alarmed) > MOST_MATRICES:
        yield _text(f"  and {len(found.alarmed) - MOST_MATRICES} more (--json lists them)")


def _distances(trace: Trace) -> str:
    uniform = f"{trace.from_uniform:.2f} from uniform"
    if trace.from_siblings != trace.from_siblings:  # NaN: no other block has such a matrix
        return uniform
    return f"{trace.from_siblings:.2f} from the other blocks, {uniform}"


def _verdict(found: QuantisationScreen) -> Text:
    if not found.alarm:
        return _text("Clean: rounding changes nothing by more than chance.", "bold")
    changes = [change for one in found.precisions for change in one.changes]
    if any(change.engineered for change in changes):
        said = "Alarm: behaviour appears after rounding and hangs on exact buckets, as planted ones"
        return _text(f"{said} do.", "bold red")
    if any(change.gap.alarm for change in changes):
        said = "Alarm: rounding changes behaviour by more than chance; bucket noise does not close"
        return _text(f"{said} the gap, as with the damage that any coarse rounding does.", "bold")
    said = "Alarm: weights lie in their buckets as no training leaves them, but behaviour stays;"
    return _text(f"{said} weights dequantised from a coarser format do so too.", "bold")
