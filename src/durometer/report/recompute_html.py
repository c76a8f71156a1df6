"""A recomputation as one HTML file that loads nothing; whatever the table holds is escaped."""

import math
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from durometer import __version__
from durometer.report import figures
from durometer.report import recompute_text as words
from durometer.report.figures import element
from durometer.report.page import page_environment, page_style

Json = Mapping[str, Any]
WIDTH, HEIGHT, LEFT, RIGHT = 640.0, 74.0, 16.0, 24.0
LINE, MOST_TICKS = 30.0, 9


def render_recomputation(data: Json) -> str:
    """Return the page.

    Args:
        data: what ``check_headlines`` gave.
    """
    page = page_environment().get_template("recompute.html")
    written = page.render(
        css=page_style(),
        d=data,
        words=words,
        version=__version__,
        strips=[strip(headline) for headline in data["headlines"]],
        remarks=words.shared_remarks(data),
    )
    return written.encode("utf-8", "replace").decode("utf-8")


def strip(headline: Json) -> Markup:
    """Return a drawing of the right figure with its interval beside the printed one; '' without."""
    interval = _interval(headline)
    if interval is None or headline["kind"] == "deviation":
        return Markup()
    right = headline["right"]
    # What was printed without a sign stands on the side of the right figure.
    value = -headline["value"] if headline["by_size"] and right < 0 else headline["value"]
    ticks = _ticks([*interval, right, value, 0.0])
    low, high = ticks[0], ticks[-1]

    def x(value: float) -> float:
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    printed = x(value)
    body = [
        element("line", x1=x(low), y1=LINE, x2=x(high), y2=LINE, class_="axis"),
        *(_tick(x(tick), tick) for tick in ticks),
        element(
            "rect",
            x=x(interval[0]),
            y=LINE - 7,
            width=max(2.0, x(interval[1]) - x(interval[0])),
            height=14.0,
            class_="right",
        ),
        element("circle", cx=x(right), cy=LINE, r=5.0, class_="point"),
        element("line", x1=printed, y1=LINE - 16, x2=printed, y2=LINE + 16, class_="printed"),
    ]
    label = f"printed {headline['printed']}; right {words.right_text(headline)}"
    return element(
        "svg",
        *body,
        viewBox=f"0 0 {WIDTH:g} {HEIGHT:g}",
        class_="drawing strip",
        role="img",
        aria_label=label,
    )


def _interval(headline: Json) -> tuple[float, float] | None:
    """Return the interval of the right figure; a relative change has none."""
    if headline["right"] is None:
        return None
    if headline["kind"] == "change":
        return headline["right"], headline["right"]
    found = headline["difference"] or headline["rates"][0]
    return found["low"], found["high"]


def _tick(x: float, value: float) -> Markup:
    return element("text", figures.decimal(100 * value, 0), x=x, y=LINE + 34, class_="tick middle")


def _ticks(values: list[float]) -> list[float]:
    """Return round places that span ``values``."""
    step = 0.05
    while True:
        low, high = math.floor(min(values) / step), math.ceil(max(values) / step)
        if high - low < MOST_TICKS:
            return [at * step for at in range(low, max(high, low + 1) + 1)]
        step *= 2.5 if math.isclose(step / 10 ** math.floor(math.log10(step)), 2) else 2
