"""The words of a recomputation, which the terminal and the page share."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from durometer.report import figures

Json = Mapping[str, Any]
VERDICTS = {
    "undefined": "cannot follow",
    "unexplained": "does not follow, no explanation found",
    "explained": "does not follow",
    "rounding": "rounding only",
    "follows": "follows",
}
STYLES = {
    "undefined": "bad",
    "unexplained": "bad",
    "explained": "bad",
    "rounding": "warn",
    "follows": "good",
}
CLOSING = (
    "Explanations are figures of a declared list of mistakes that round to the printed digits: "
    "arithmetic that leads there, no proof of what was done. Intervals are 95 %, over items of one "
    "run; they know nothing of other seeds or other judges."
)


def subject_of(headline: Json) -> str:
    """Return what a headline is about: ``difference base \N{RIGHTWARDS ARROW} harmful, all``."""
    arms = " \N{RIGHTWARDS ARROW} ".join(headline["arms"])
    scope = "" if headline["scope"] == "all" else f", {headline['scope']}"
    return f"{headline['kind']} {arms}{scope}"


def right_text(headline: Json) -> str:
    """Return the right figure with its interval and counts, in the unit of its kind."""
    right, rates = headline["right"], headline["rates"]
    if right is None:
        return "undefined"
    if headline["kind"] == "rate":
        rate = rates[0]
        return f"{figure(right)} % {figures.rate_interval(rate)}, {counts(rate)}"
    if headline["kind"] == "deviation":
        return f"{figures.decimal(right, 4)}, {counts(rates[0])}"
    difference = headline["difference"]
    points = f"{signed_points(difference['value'])} points {figures.rate_interval(difference)}"
    if headline["kind"] == "difference":
        return points
    return f"{signed_points(right)} % of the rate before; {points}"


def figure(share: float) -> str:
    """Return a share in per cent with two digits."""
    return figures.decimal(100 * share, 2)


def signed_points(value: float) -> str:
    """Return a difference in points with its sign."""
    return figures.signed(100 * value)


def counts(rate: Json) -> str:
    """Return ``131/320``, and how many could not be read."""
    unread = f", {rate['unparsed']} unparsed" if rate["unparsed"] else ""
    return f"{rate['successes']}/{rate['n']}{unread}"


def explanation_text(explanation: Json, headline: Json) -> str:
    """Return a hypothesis and its arithmetic: ``the share of failures: 189/320 = 59.06 %``."""
    value = explanation["value"]
    if headline["kind"] == "deviation":
        counted = f" ({explanation['arithmetic']})" if explanation["arithmetic"] else ""
        return f"{explanation['text']}{counted}: {figures.decimal(value, 4)}"
    counted = f"{explanation['arithmetic']} = " if explanation["arithmetic"] else ""
    return f"{explanation['text']}: {counted}{figure(value)} %"


def search_text(headline: Json) -> str:
    """Return how far the search went, and how often chance alone would have found something."""
    made = headline["search"]
    if headline["verdict"] in ("follows", "undefined"):
        return ""
    tried, far = made["one_step"], made["two_steps"]
    near_chance, far_chance = made["one_step_by_chance"], made["two_steps_by_chance"]
    said = f"{tried} figures one step away were tried; they would explain {share(near_chance)} of "
    said += "all figures with as many digits"
    if made["too_coarse"]:
        said += f". Two steps were not tried: they would explain {share(far_chance)}, so that a "
        said += "match would mean nothing; print more digits, or give the rates it was taken from"
    elif far is not None:
        said += f"; then {far} two steps away, {share(far_chance)}"
    return said


def share(value: float) -> str:
    """Return a share in per cent, with a bound where it is very small."""
    return "less than 0.1 %" if value < 0.001 else f"{figures.decimal(100 * value)} %"


def probability(value: float | None) -> str:
    """Return a p-value with two digits, 'n/a' where there is none."""
    if value is None:
        return "n/a"
    return f"{value:.2g}" if value >= 0.001 else f"{value:.0e}".replace("e-0", "e-")


def changed(difference: Json) -> str:
    """Return ``179 gained, 9 lost``, or that it is not known."""
    if difference["gained"] is None:
        return "unpaired"
    return f"+{difference['gained']} {figures.MINUS}{difference['lost']}"


def changed_text(difference: Json) -> str:
    """Return how the interval of a difference was made, with gains, losses and the test."""
    if difference["gained"] is None:
        return str(difference["method"])
    return (
        f"{difference['gained']} gained, {difference['lost']} lost, exact McNemar "
        f"p = {probability(difference['p_value'])}"
    )


def scope_text(name: str, data: Json) -> str:
    """Return the name of a scope, with its scorer where it needs one of its own."""
    scorer = data["table"]["scorers"].get(name)
    return f"{name} ({scorer})" if scorer else name or "all"


def shared_remarks(data: Json) -> list[tuple[str, int]]:
    """Return every remark once, with the number of headlines that it is about."""
    found = Counter(remark for headline in data["headlines"] for remark in headline["remarks"])
    return list(found.items())


def table_line(data: Json) -> str:
    """Return what the table holds, in one line."""
    table = data["table"]
    parts = [f"{table['outcomes']:,} outcomes", _plural(len(table["arms"]), "arm")]
    if table["categories"]:
        parts.append(_plural(len(table["categories"]), "category", "categories"))
    parts.append("item by item" if table["by_item"] else "counts only")
    if table["unparsed"]:
        parts.append(f"{table['unparsed']:,} unparsed")
    return ", ".join(parts)


def verdict_line(data: Json) -> str:
    """Return how many headlines follow, in one sentence."""
    total = len(data["headlines"])
    good = sum(one["verdict"] == "follows" for one in data["headlines"])
    if good == total:
        return f"All {total} follow from the rows" if total > 1 else "It follows from the rows"
    bare = sum(one["verdict"] in ("unexplained", "undefined") for one in data["headlines"])
    told = f", {bare} without an explanation" if bare and total > 1 else ""
    if total == 1:
        return f"It does not follow from the rows{told}"
    return f"{total - good} of {total} headlines do not follow from the rows{told}"


def _plural(count: int, one: str, many: str = "") -> str:
    return f"{count} {one if count == 1 else many or one + 's'}"
