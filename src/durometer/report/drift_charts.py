"""Drawings of a drift run: marks with whiskers on one axis, and a rate against the rank."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from durometer.report import figures
from durometer.report.figures import element, series_mark

Json = Mapping[str, Any]
WIDTH, LEFT, RIGHT = 360.0, 14.0, 14.0
LABEL, LINE, GAP, FOOT = 16.0, 15.0, 7.0, 34.0
MOST_TICKS = 7


@dataclass(frozen=True)
class Mark:
    """One value of a row.

    Attributes:
        series: its colour and shape.
        value, low, high: in the unit of the axis.
        title: what is said on hovering.
    """

    series: int
    value: float
    low: float
    high: float
    title: str


@dataclass(frozen=True)
class Line:
    """A row of a chart: a label over its marks."""

    label: str
    marks: Sequence[Mark]


def interval_chart(
    lines: Sequence[Line], axis: str, about: str, *, span: tuple[float, float] | None = None
) -> Markup:
    """Return marks with whiskers, a row of them under each label; '' without any.

    Args:
        axis: what the axis counts.
        about: what the drawing is of, for readers that see no picture.
        span: ends of the axis; None fits it to the marks and always shows 0.
    """
    kept = [line for line in lines if line.marks]
    if not kept:
        return Markup()
    values = [end for line in kept for m in line.marks for end in (m.low, m.high)]
    ticks = _ticks(*(span or (min(0.0, *values), max(0.0, *values))))
    low, high = ticks[0], ticks[-1]

    def x(value: float) -> float:
        inside = min(max(value, low), high)
        return LEFT + (inside - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    heights = [LABEL + LINE * len(line.marks) + GAP for line in kept]
    base = sum(heights)
    body = [_grid(x(tick), base, tick) for tick in ticks]
    top = 0.0
    for line, height in zip(kept, heights, strict=True):
        body.append(_said(2.0, top + 12, line.label, "row-label"))
        body += [
            _whisker(mark, x, top + LABEL + LINE * (place + 0.5))
            for place, mark in enumerate(line.marks)
        ]
        top += height
    body.append(_said(WIDTH / 2, base + FOOT - 3, axis, "tick middle"))
    return _svg(body, base + FOOT, about)


def _svg(body: Sequence[Markup], height: float, about: str) -> Markup:
    return element(
        "svg",
        *body,
        viewBox=f"0 0 {WIDTH:g} {height:g}",
        class_="drawing drift",
        role="img",
        aria_label=about,
    )


def _said(x: float, y: float, text: str, kind: str) -> Markup:
    return element("text", text, x=float(x), y=float(y), class_=kind)


def _grid(x: float, base: float, tick: float) -> Markup:
    kind = "axis" if abs(tick) < 1e-12 else "grid"
    line = element("line", x1=x, y1=0.0, x2=x, y2=base, class_=kind)
    return element("g", line, _said(x, base + 14, _number(tick), "tick middle"))


def _whisker(mark: Mark, x: Any, y: float) -> Markup:
    line = element("line", x1=x(mark.low), y1=y, x2=x(mark.high), y2=y, class_="reach")
    return element(
        "g",
        line,
        series_mark(mark.series, x(mark.value), y, mark.title),
        class_=f"of s{mark.series}",
    )


def _number(value: float) -> str:
    return f"{value:g}".replace("-", figures.MINUS)


def _ticks(low: float, high: float) -> list[float]:
    """Return round places that span the values."""
    if high - low < 1e-9:
        low, high = low - 1, high + 1
    size = 10.0 ** math.floor(math.log10((high - low) / MOST_TICKS))
    for factor in (1, 2, 5, 10, 20, 50):
        step = size * factor
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        if last - first < MOST_TICKS:
            break
    return [round(place * step, 10) for place in range(first, max(last, first + 1) + 1)]


@dataclass(frozen=True)
class Ranked:
    """A rate at each rank, of one way of training."""

    series: int
    points: Sequence[tuple[int, Json, str]]


def rank_chart(ways: Sequence[Ranked], before: float, about: str) -> Markup:
    """Return a rate against the rank, spaced by doublings, with its level before any training."""
    ranks = sorted({rank for way in ways for rank, _, _ in way.points})
    frame = figures.Frame(360, 236, min(ranks), max(ranks), doubling=True, right=14.0)
    body = frame.axes(ranks, "rank of the adapter", "attack success, %")
    end = frame.width - frame.right
    body.append(frame.line(frame.left, frame.y(before), end, frame.y(before), "level"))
    for way in ways:
        places = [(frame.x(r), frame.y(f["value"]), f, title) for r, f, title in way.points]
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y, _, _ in places)
        inside = [element("path", d=path, class_="join")]
        for x, y, found, title in places:
            low, high = frame.y(found["low"]), frame.y(found["high"])
            inside.append(element("line", x1=x, y1=low, x2=x, y2=high, class_="reach"))
            inside.append(series_mark(way.series, x, y, title))
        body.append(element("g", *inside, class_=f"of s{way.series}"))
    return _svg(body, frame.height, about)
