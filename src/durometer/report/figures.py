"""Figures of a report, both senses: numbers as text, and drawings as inline SVG.

Drawings carry classes, not colours: ``templates/report.css`` gives them theirs, in light, dark and
print. Whatever text goes in is escaped; nothing here loads anything.
"""

import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

from markupsafe import Markup, escape

RateDict = Mapping[str, Any]
"""A rate as ``summary.json`` has it: ``rate``, ``low``, ``high``, ``n``, ``method``."""

Axis = Literal["steps", "strength"]
NOT_MEASURED = "not measured"
MINUS = "\u2212"
_PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")
# They reorder or hide what stands around them, so a response could dress up a page.
_BIDIRECTIONAL = frozenset(
    "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
)


# --- numbers as text ---


def visible(text: str) -> str:
    """Return ``text`` with control and direction characters and lone surrogates written out."""
    return "".join(
        f"\\u{ord(char):04x}" if char in _BIDIRECTIONAL or _is_control(char) else char
        for char in text
    )


def _is_control(char: str) -> bool:
    return char not in "\n\t" and unicodedata.category(char) in ("Cc", "Cs")


def breakable(text: str) -> Markup:
    """Return ``text`` escaped, with places where a narrow column may break it."""
    return Markup("").join(
        escape(char) + Markup("<wbr>") if char in "_=,/" else escape(char) for char in visible(text)
    )


def decimal(value: float, digits: int = 1) -> str:
    """Return a number with fixed digits, a real minus sign and no negative zero."""
    rounded = round(value, digits) + 0.0
    return f"{rounded:,.{digits}f}".replace("-", MINUS)


def signed(value: float) -> str:
    """Return a change with its sign; none where it rounds to 0."""
    return f"{'+' if round(value, 1) > 0 else ''}{decimal(value)}"


def percent(share: float | None) -> str:
    """Return a share in [0, 1] as ``60.4 %``; a missing one as 'not measured'."""
    return NOT_MEASURED if share is None else f"{decimal(100 * share)} %"


def rate_text(rate: RateDict | None) -> str:
    """Return ``60.4 % [34.6, 100.0]``."""
    if rate is None:
        return NOT_MEASURED
    return f"{percent(rate['rate'])} {rate_interval(rate)}"


def rate_interval(rate: RateDict) -> str:
    """Return ``[34.6, 100.0]``, in per cent."""
    return f"[{decimal(100 * rate['low'])}, {decimal(100 * rate['high'])}]"


def rate_title(rate: RateDict | None, split: str, seeds: int | None = None) -> str:
    """Return all there is to say about a rate: value, interval, n, split, seeds and method."""
    if rate is None:
        return f"{NOT_MEASURED} on {split} items"
    over = "" if seeds is None else f", {seeds} seed{'s' * (seeds != 1)}"
    return (
        f"{rate_text(rate)} (95 %), n = {rate['n']} entities, {split} items{over}; {rate['method']}"
    )


def points_text(loss: Mapping[str, Any] | None) -> str:
    """Return a utility loss as ``2.8 [0.0, 6.5]``, in points."""
    if loss is None:
        return NOT_MEASURED
    return f"{decimal(loss['value'])} [{decimal(loss['low'])}, {decimal(loss['high'])}]"


def quantity(value: float | None) -> str:
    """Return a count as ``1,024`` or ``10.5``; a missing one as 'not measured'."""
    if value is None:
        return NOT_MEASURED
    return decimal(value, 0 if float(value).is_integer() else 1)


def flops_text(value: float | None) -> str:
    """Return floating-point operations with three digits and a prefix: ``3.32 GFLOP``."""
    if value is None:
        return NOT_MEASURED
    power = 0
    while round(value, _digits(value)) >= 1000 and power < len(_PREFIXES) - 1:
        value, power = value / 1000, power + 1
    return f"{value:.{_digits(value)}f} {_PREFIXES[power]}FLOP"


def _digits(value: float) -> int:
    """Return the decimals that make three significant digits of a value below 1000."""
    return 2 if value < 9.995 else 1 if value < 99.95 else 0


def seconds_text(value: float | None) -> str:
    """Return ``2.2 s``, ``3 min 20 s`` or ``1 h 05 min``."""
    if value is None:
        return NOT_MEASURED
    if value < 60:
        return f"{decimal(value)} s"
    minutes, seconds = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


@dataclass(frozen=True)
class BudgetText:
    """A budget-to-break in words.

    Attributes:
        value: median over seeds, ``10``; right-censored ``> 64``; ``not measured``.
        interval: ``[9, 11]`` or ``[9, > 64]`` over seeds; '' where no seed broke.
        broken: ``2 of 3 seeds``, '' where nothing was measured.
        censored: whether the median was not reached.
    """

    value: str
    interval: str
    broken: str
    censored: bool


def budget_of(
    tamper: Mapping[str, Any], recovery: float, *, within: bool, axis: str
) -> Mapping[str, Any] | None:
    """Return the row of a tamper's budgets, or None."""
    for row in tamper["budgets"]:
        if (row["recovery"], row["within_limit"], row["axis"]) == (recovery, within, axis):
            found: Mapping[str, Any] = row
            return found
    return None


def budget_text(budget: Mapping[str, Any] | None) -> BudgetText:
    """Return a budget in words; a censored one never reads as a number that was reached."""
    if budget is None:
        return BudgetText(NOT_MEASURED, "", "", censored=False)
    written = flops_text if budget["axis"] == "flops" else quantity
    censored = budget["median"] is None
    value = written(budget["largest_tried"] if censored else budget["median"])
    broke = budget["seeds"] - budget["censored"]
    return BudgetText(
        f"> {value}" if censored else value,
        _seed_range(budget, written) if broke else "",
        f"{broke} of {budget['seeds']} seed{'s' * (budget['seeds'] != 1)}",
        censored,
    )


def _seed_range(budget: Mapping[str, Any], written: Any) -> str:
    """Return ``(a, b]``: no seed had broken at ``a``, all had at ``b``.

    Steps between two checkpoints are not measured, so that the grid is part of the interval. A
    seed that never broke opens the upper end.
    """
    low = written(min(low for low, _ in budget["intervals"]))
    most = written(max(low if high is None else high for low, high in budget["intervals"]))
    open_end = any(high is None for _, high in budget["intervals"])
    return f"({low}, > {most})" if open_end else f"({low}, {most}]"


def strength_at(tamper: Mapping[str, Any], budget: Mapping[str, Any] | None) -> str:
    """Return the strength at which a ladder broke, in words; '' for a tamper that makes steps."""
    steps = budget["median"] if budget else None
    for checkpoint in tamper["checkpoints"]:
        if steps and checkpoint["steps"] == steps and checkpoint["strength"] is not None:
            return f"strength {checkpoint['strength']:g}"
    return ""


def unit_of(tamper: Mapping[str, Any]) -> str:
    """Return what is counted as a step: updates or rounds ('steps'), or strengths ('rungs')."""
    later = [c for c in tamper["checkpoints"] if c["steps"]]
    return "rungs" if later and all(c["strength"] is not None for c in later) else "steps"


# --- drawings ---


def element(name: str, *children: str, **attributes: Any) -> Markup:
    """Return one SVG element; text and attribute values are escaped, ``Markup`` is kept.

    Underscores in attribute names become hyphens, one at the end is dropped: ``class_``.
    """
    written = Markup("").join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), _attribute(value))
        for key, value in attributes.items()
    )
    inside = Markup("").join(_child(child) for child in children)
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), written, inside)


def _child(child: str) -> Markup:
    return child if isinstance(child, Markup) else escape(visible(child))


def _attribute(value: Any) -> str:
    return (
        f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else visible(str(value))
    )


def _drawing(width: float, height: float, label: str, body: Iterable[Markup], kind: str) -> Markup:
    return element(
        "svg",
        *body,
        viewBox=f"0 0 {width:g} {height:g}",
        class_=f"drawing {kind}",
        role="img",
        aria_label=label,
    )


@dataclass(frozen=True)
class Frame:
    """The plotting area of a chart with a share on its y axis.

    Attributes:
        low, high: ends of the x axis, in its own unit.
        doubling: x is spaced by ``log2(1 + x)``, so that step 0 has a place.
    """

    width: float
    height: float
    low: float
    high: float
    doubling: bool
    left: float = 40.0
    right: float = 66.0
    top: float = 10.0
    bottom: float = 36.0

    def x(self, value: float) -> float:
        """Return where ``value`` lies, in pixels."""
        low, high, here = (self._spaced(v) for v in (self.low, self.high, value))
        return self.left + (here - low) / ((high - low) or 1.0) * self.inner_width

    def y(self, share: float) -> float:
        """Return where a share lies, in pixels."""
        return self.top + (1 - share) * (self.height - self.top - self.bottom)

    @property
    def inner_width(self) -> float:
        """Return the width between the axes."""
        return self.width - self.left - self.right

    def _spaced(self, value: float) -> float:
        return math.log2(1 + max(value, 0.0)) if self.doubling else value

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
        """Return a straight line in pixels."""
        return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=kind)

    def axes(self, ticks: Sequence[float], name: str, y_name: str) -> list[Markup]:
        """Return grid, axes and their names."""
        end, base = self.width - self.right, self.y(0)
        body = []
        for share in (0.0, 0.25, 0.5, 0.75, 1.0):
            y = self.y(share)
            body.append(self.line(self.left, y, end, y, "grid" if share else "axis"))
            body.append(_text(self.left - 6, y + 4, f"{100 * share:.0f}", "tick end"))
        for tick in ticks:
            x = self.x(tick)
            body.append(self.line(x, base, x, base + 4, "axis"))
            body.append(_text(x, base + 16, _tick(tick), "tick middle"))
        middle = self.left + self.inner_width / 2
        body.append(_text(middle, self.height - 4, name, "tick middle"))
        turned = f"rotate(-90 10 {self.y(0.5):.1f})"
        body.append(_text(10, self.y(0.5), y_name, "tick middle", transform=turned))
        return body


def _text(x: float, y: float, text: str, kind: str, **more: Any) -> Markup:
    return element("text", text, x=float(x), y=float(y), class_=kind, **more)


def _tick(value: float) -> str:
    return f"{value:g}".replace("-", MINUS)


def _path(points: Sequence[tuple[float, float]], kind: str, title: str = "") -> Markup:
    data = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return element("path", *_title(title), d=data, class_=kind)


def _title(title: str) -> list[Markup]:
    return [element("title", title)] if title else []


@dataclass(frozen=True)
class Point:
    """One checkpoint of a curve.

    Attributes:
        x: steps or strength.
        partial: some seeds had ended before, so the mean is over fewer of them.
    """

    x: float
    rate: RateDict
    title: str
    partial: bool = False


@dataclass(frozen=True)
class Curve:
    """Success against the budget of one tamper.

    Attributes:
        mean: over seeds, with interval; step 0 first.
        seeds: by seed the (x, share) that were measured.
        undefended: the same tamper on the undefended subject.
        levels: name and share of floor and thresholds.
        broke_at: x of the median budget-to-break, None where it was not reached.
        high: end of the x axis, shared by charts that are compared; None fits this one.
    """

    name: str
    axis: Axis
    mean: Sequence[Point]
    seeds: Mapping[int, Sequence[tuple[float, float]]] = field(default_factory=dict)
    undefended: Sequence[Point] = ()
    levels: Sequence[tuple[str, float]] = ()
    broke_at: float | None = None
    high: float | None = None


def curve_chart(curve: Curve) -> Markup:
    """Return success against steps (spaced by doublings) or against strength."""
    everywhere = [p.x for p in (*curve.mean, *curve.undefended)] or [0.0, 1.0]
    high = max(everywhere) if curve.high is None else curve.high
    low, high = (0.0, max(high, 1.0)) if curve.axis == "steps" else (min(*everywhere, 0.0), high)
    frame = Frame(360, 236, low, high, doubling=curve.axis == "steps")
    body = frame.axes(_ticks(frame), curve.axis, "success, % (select)")
    body += _levels(frame, curve.levels)
    body += _break_mark(frame, curve)
    body += _band(frame, curve.mean)
    body += [
        _path([(frame.x(x), frame.y(y)) for x, y in series], "seed", f"seed {seed}")
        for seed, series in curve.seeds.items()
        if len(series) > 1
    ]
    control = [(frame.x(p.x), frame.y(p.rate["rate"])) for p in curve.undefended]
    body += [_path(control, "undefended", "undefended subject, same attack")] if control else []
    body += _mean(frame, curve.mean)
    body += [_hover(frame, p) for p in curve.undefended]
    body += [_dot(frame, p) for p in curve.mean]
    label = f"Success on select items against {curve.axis} for {curve.name}"
    return _drawing(frame.width, frame.height, label, body, "curve")


def _ticks(frame: Frame) -> list[float]:
    if not frame.doubling:
        return _round_ticks(frame.low, frame.high)
    powers = [0.0, *(2.0**n for n in range(int(math.log2(max(frame.high, 1))) + 1))]
    kept: list[float] = []
    for tick in powers:
        if not kept or frame.x(tick) - frame.x(kept[-1]) >= 22:
            kept.append(tick)
    return kept


def _round_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return at most ``most`` round numbers that lie in [low, high]."""
    span = (high - low) or 1.0
    size = 10.0 ** math.floor(math.log10(span / most))
    step = next((size * f for f in (1, 2, 5) if span / (size * f) <= most), size * 10)
    first = math.ceil(low / step - 1e-9)
    return [n * step + 0.0 for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _levels(frame: Frame, levels: Sequence[tuple[str, float]]) -> list[Markup]:
    """Return horizontal thresholds, named in the right margin, names moved apart."""
    end, body = frame.width - frame.right, []
    above = math.inf
    for name, share in sorted(levels, key=lambda level: level[1]):
        y = frame.y(share)
        line = element(
            "line",
            element("title", f"{name}: {percent(share)} on select items"),
            x1=frame.left,
            y1=y,
            x2=end,
            y2=y,
            class_="level",
        )
        above = min(y + 4, above - 11)
        body += [line, _text(end + 4, above, name, "level-name")]
    return body


def _break_mark(frame: Frame, curve: Curve) -> list[Markup]:
    if curve.broke_at is None:
        return []
    x = frame.x(curve.broke_at)
    title = f"median budget-to-break (50 %): {quantity(curve.broke_at)} {curve.axis}"
    return [
        element(
            "line",
            element("title", title),
            x1=x,
            y1=frame.top,
            x2=x,
            y2=frame.y(0),
            class_="break",
        )
    ]


def _band(frame: Frame, points: Sequence[Point]) -> list[Markup]:
    if len(points) < 2:
        return []
    upper = [(frame.x(p.x), frame.y(p.rate["high"])) for p in points]
    lower = [(frame.x(p.x), frame.y(p.rate["low"])) for p in points]
    return [_path([*upper, *reversed(lower)], "band")]


def _mean(frame: Frame, points: Sequence[Point]) -> list[Markup]:
    """Return the mean, dotted where it is over fewer seeds."""
    return [
        _path(
            [(frame.x(p.x), frame.y(p.rate["rate"])) for p in pair],
            "mean partial" if pair[1].partial else "mean",
        )
        for pair in pairwise(points)
    ]


def _dot(frame: Frame, point: Point) -> Markup:
    kind = "dot partial" if point.partial else "dot"
    return _circle(frame.x(point.x), frame.y(point.rate["rate"]), 2.4, kind, point.title)


def _hover(frame: Frame, point: Point) -> Markup:
    return _circle(frame.x(point.x), frame.y(point.rate["rate"]), 3.5, "hover", point.title)


def _circle(x: float, y: float, radius: float, kind: str, title: str) -> Markup:
    return element("circle", *_title(title), cx=x, cy=y, r=radius, class_=kind)


@dataclass(frozen=True)
class Place:
    """One point of the safety-utility plane.

    Attributes:
        loss: utility loss with its interval, in points.
        rate: success on ``report``.
        series: number of the tamper, None for step 0.
    """

    loss: Mapping[str, Any]
    rate: RateDict
    title: str
    series: int | None


def scatter(places: Sequence[Place], limit: float | None) -> Markup:
    """Return success against utility loss, with the utility limit as a vertical line."""
    ends = [0.0, *(p.loss["value"] for p in places), *([limit] if limit is not None else [])]
    margin = 0.08 * ((max(ends) - min(ends)) or 10.0)
    frame = Frame(
        620, 360, min(ends) - margin, max(ends) + margin, doubling=False, right=14.0, top=14.0
    )
    ticks = _round_ticks(frame.low, frame.high, 8)
    body = [*_beyond(frame, limit)]
    body += frame.axes(ticks, "utility loss, points (report)", "success, % (report)")
    body += _limit_line(frame, limit)
    body += [_whiskers(frame, place) for place in places]
    body += [_mark(frame, place) for place in places]
    return _drawing(frame.width, frame.height, "Success against utility loss", body, "scatter")


def _beyond(frame: Frame, limit: float | None) -> list[Markup]:
    if limit is None:
        return []
    x = frame.x(limit)
    width, height = frame.width - frame.right - x, frame.y(0) - frame.top
    return [element("rect", x=x, y=frame.top, width=width, height=height, class_="beyond")]


def _limit_line(frame: Frame, limit: float | None) -> list[Markup]:
    if limit is None:
        return []
    x = frame.x(limit)
    return [
        frame.line(x, frame.top, x, frame.y(0), "limit"),
        _text(x - 5, frame.top + 12, f"utility limit, {limit:g} points", "level-name end"),
    ]


def _whiskers(frame: Frame, place: Place) -> Markup:
    x, y = frame.x(place.loss["value"]), frame.y(place.rate["rate"])
    edge = frame.width - frame.right
    first, last = (min(max(frame.x(place.loss[end]), frame.left), edge) for end in ("low", "high"))
    return element(
        "g",
        frame.line(first, y, last, y, "whisker"),
        frame.line(x, frame.y(place.rate["low"]), x, frame.y(place.rate["high"]), "whisker"),
    )


def _mark(frame: Frame, place: Place) -> Markup:
    x, y = frame.x(place.loss["value"]), frame.y(place.rate["rate"])
    if place.series is None:
        ring = _circle(x, y, 7.0, "start", place.title)
        return element("g", ring, _text(x + 11, y - 8, "step 0", "level-name"))
    return series_mark(place.series, x, y, place.title)


_SHAPES = (
    "M-4.5 0A4.5 4.5 0 1 0 4.5 0A4.5 4.5 0 1 0 -4.5 0Z",
    "M-4 -4H4V4H-4Z",
    "M0 -5.5L5 4H-5Z",
    "M0 -5.5L5.5 0L0 5.5L-5.5 0Z",
    "M-5 -4H5L0 5.5Z",
)
_COLOURS = 6
NARROW = 0.16  # the least share whose number fits into a bar inside a table


def series_class(number: int) -> str:
    """Return the class that gives a series its colour; shapes change once colours repeat."""
    return f"series s{number % _COLOURS}"


def _shape(number: int) -> Markup:
    # Shape and colour turn together, so that neighbours differ in both.
    kind = (number + number // _COLOURS) % len(_SHAPES)
    return element("path", d=_SHAPES[kind])


def series_mark(number: int, x: float, y: float, title: str = "") -> Markup:
    """Return the mark of a series at a place, in pixels."""
    return element(
        "g",
        *_title(title),
        _shape(number),
        transform=f"translate({x:.1f} {y:.1f})",
        class_=series_class(number),
    )


def series_key(number: int) -> Markup:
    """Return the mark of a series for a legend."""
    mark = element("g", _shape(number), class_=series_class(number))
    return element("svg", mark, viewBox="-8 -8 16 16", class_="key", aria_hidden="true")


def stacked_bar(
    shares: Mapping[str, float], names: Mapping[str, str], label: str, *, written: float = 0.08
) -> Markup:
    """Return one bar of shares that sum to 1, as wide as its place; class ``outcome NAME``.

    Args:
        shares: share by outcome.
        names: readable name by outcome, in the order in which the bar is stacked.
        label: what the bar is of, for readers that see no picture.
        written: the least share whose number has room inside the bar.
    """
    body, start = [], 0.0
    for outcome, name in names.items():
        share = float(shares.get(outcome, 0.0))
        if share <= 0:
            continue
        title = element("title", f"{name}: {percent(share)}")
        place = {"x": f"{100 * start:.3f}%", "width": f"{100 * share:.3f}%"}
        body.append(
            element("rect", title, y="0", height="100%", class_=f"outcome {outcome}", **place)
        )
        if share >= written:
            middle = f"{100 * (start + share / 2):.3f}%"
            text = f"{100 * share:.0f} %"
            body.append(element("text", text, x=middle, y="50%", class_=f"share {outcome}"))
        start += share
    spoken = ", ".join(f"{names[o]} {percent(shares.get(o, 0.0))}" for o in names if shares.get(o))
    return element("svg", *body, class_="stack", role="img", aria_label=f"{label}: {spoken}")


def sparkline(values: Sequence[float | None], title: str) -> Markup:
    """Return a line of losses without axes; values that are not finite are left out."""
    finite = [(n, v) for n, v in enumerate(values) if v is not None and math.isfinite(v)]
    if len(finite) < 2:
        return Markup("")
    width, height = 90.0, 22.0
    low, high = min(v for _, v in finite), max(v for _, v in finite)
    span, last = (high - low) or 1.0, max(n for n, _ in finite)
    points = [(2 + n / last * (width - 4), 2 + (high - v) / span * (height - 4)) for n, v in finite]
    return element(
        "svg",
        *_title(title),
        _path(points, "spark"),
        viewBox=f"0 0 {width:g} {height:g}",
        class_="sparkline",
        role="img",
        aria_label=title,
    )
