"""What may have been printed instead of the right figure: a declared list, tried in full.

Every candidate departs from the right figure in one way or in two. Values are exact fractions, so
that a match depends on the printed digits alone.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from decimal import ROUND_DOWN, ROUND_HALF_UP, Context, Decimal
from fractions import Fraction
from math import isqrt

from durometer.headlines.printed import Printed
from durometer.headlines.settings import Headline
from durometer.headlines.shares import RIGHT, SHARES, Reading, readings
from durometer.headlines.table import Table

__all__ = ["HYPOTHESES", "ROUNDING", "Candidate", "candidates", "right_value"]

HYPOTHESES: dict[str, str] = {
    **{share.name: share.text for share in SHARES if share.name},
    "other_rows": "the same figure over other rows: a category, all but one, a scorer's, or all",
    "other_denominator": "successes of some rows over the number of others",
    "category_mean": "the mean of the rates of single categories instead of the pooled rate",
    "other_arm": "the figure of another arm",
    "swapped_arms": "before and after swapped",
    "one_arm_only": "another share in one of the two arms",
    "difference": "a difference in points instead of a relative change",
    "change": "a change relative to the rate before instead of points",
    "change_after": "a change relative to the rate after",
    "ratio": "the ratio of the two rates",
    "printed_rates": "taken from printed rates that do not follow themselves",
    "one_item": "one success more or fewer",
    "scale": "off by a factor of 100: a fraction printed as per cent, or the reverse",
    "truncated": "rounding only: digits were cut off",
    "rounded_twice": "rounding only: rounded twice",
    "rounded_rates": "rounding only: taken from rounded rates",
    "standard_error": "the standard error, deviation over the square root of n",
    "half_width": "half the width of a 95 % interval, 1.96 standard errors",
    "variance": "the variance",
}
"""Every hypothesis by its id, in words."""

ROUNDING = frozenset({"truncated", "rounded_twice", "rounded_rates"})
"""Hypotheses that leave the arithmetic right."""

Z = Fraction(196, 100)
_EXACT = Context(prec=60)
Combine = Callable[[Fraction, Fraction], Fraction | None]
PrintedRates = Mapping[tuple[str, str], Printed]
"""Printed rates by arm and name of the scope."""


@dataclass(frozen=True)
class Candidate:
    """A figure that may have been printed.

    Attributes:
        value: as a share.
        departures: ids of the hypotheses that lead to it, one or two.
        text: in words.
        arithmetic: the counts it is made of.
    """

    value: Fraction
    departures: tuple[str, ...]
    text: str
    arithmetic: str


def _over(first: Fraction, second: Fraction) -> Fraction | None:
    return first / second if second else None


COMBINE: dict[str, Combine] = {
    "difference": lambda before, after: after - before,
    "change": lambda before, after: _over(after - before, before),
    "change_after": lambda before, after: _over(after - before, after),
    "ratio": lambda before, after: _over(after, before),
}


def right_value(headline: Headline, table: Table) -> Fraction | None:
    """Return what the rows give for a headline, as a share; None where it is undefined.

    A deviation is the population's; the sample's counts as right as well.
    """
    own = Reading(RIGHT, headline.scope, headline.scope)
    rates = [own.value(table, arm) for arm in headline.arms]
    if any(rate is None for rate in rates):
        return None
    known = [rate for rate in rates if rate is not None]
    if headline.kind == "rate":
        return known[0]
    if headline.kind == "deviation":
        return root(known[0] * (1 - known[0]))
    return COMBINE[headline.kind](known[0], known[1])


def root(value: Fraction) -> Fraction:
    """Return a square root to 15 digits."""
    return Fraction(isqrt(int(value * 10**30)), 10**15)


def candidates(
    headline: Headline, table: Table, right: Fraction, printed: PrintedRates
) -> list[Candidate]:
    """Return every figure of the declared list that is not the right one itself."""
    if headline.kind == "deviation":
        found = list(_deviations(headline, table))
    elif headline.kind == "rate":
        found = [*_rates(headline, table), *_off_by_one(headline, table)]
    else:
        found = [*_pairs(headline, table), *_off_by_one(headline, table)]
        found += _from_printed(headline, table, printed)
    found += _rounded(headline, table, right)
    found += [
        Candidate(right * factor, ("scale",), HYPOTHESES["scale"], "")
        for factor in (Fraction(1, 100), Fraction(100))
    ]
    unique = {(c.value, c.text): c for c in reversed(found) if c.value != right}
    return list(reversed(unique.values()))


# ---- one arm -------------------------------------------------------------------------------


def _rates(headline: Headline, table: Table) -> Iterator[Candidate]:
    for reading in readings(table, headline.scope):
        for arm in table.arms:
            other = ("other_arm",) if arm != headline.arms[0] else ()
            departures = (*reading.departures, *other)
            value = reading.value(table, arm)
            if value is not None and 1 <= len(departures) <= 2:
                parts = [reading.text(), f"the rate of '{arm}'" if other else ""]
                text = ", ".join(part for part in parts if part)
                yield Candidate(value, departures, text, reading.arithmetic(table, arm))


def _off_by_one(headline: Headline, table: Table) -> Iterator[Candidate]:
    counts = [table.of(arm, headline.scope) for arm in headline.arms]
    rates = [Fraction(c.success, c.n) for c in counts]
    for at, (arm, count) in enumerate(zip(headline.arms, counts, strict=True)):
        for success in {max(0, count.success - 1), min(count.n, count.success + 1)}:
            changed = [*rates]
            changed[at] = Fraction(success, count.n)
            value = changed[0] if headline.kind == "rate" else COMBINE[headline.kind](*changed)
            if value is not None:
                text = f"one success {'more' if success > count.success else 'fewer'} in '{arm}'"
                yield Candidate(value, ("one_item",), text, f"{success}/{count.n}")


def _deviations(headline: Headline, table: Table) -> Iterator[Candidate]:
    count = table.of(headline.arms[0], headline.scope)
    share, n = Fraction(count.success, count.n), count.n
    variances = {"population": share * (1 - share)}
    if n > 1:
        variances["sample"] = variances["population"] * n / (n - 1)
    for name, variance in variances.items():
        error = root(variance / n)
        counted = f"{count.success}/{n}, {name}"
        yield Candidate(error, ("standard_error",), HYPOTHESES["standard_error"], counted)
        yield Candidate(Z * error, ("half_width",), HYPOTHESES["half_width"], counted)
        yield Candidate(variance, ("variance",), HYPOTHESES["variance"], counted)


# ---- two arms ------------------------------------------------------------------------------


def _pairs(headline: Headline, table: Table) -> Iterator[Candidate]:
    for arms, arm_text, arm_departures in _arm_pairs(headline, table):
        for (first, second), share_departures in _reading_pairs(headline, table):
            for name, combine in COMBINE.items():
                other = () if name == headline.kind else (name,)
                departures = (*other, *share_departures, *arm_departures)
                if not 1 <= len(departures) <= 2:
                    continue
                before, after = first.value(table, arms[0]), second.value(table, arms[1])
                value = None if before is None or after is None else combine(before, after)
                if value is not None:
                    said = [HYPOTHESES[name] if other else "", *_both(first, second), arm_text]
                    yield Candidate(
                        value,
                        departures,
                        ", ".join(part for part in said if part),
                        _written(name, first, second, table, arms),
                    )


def _arm_pairs(
    headline: Headline, table: Table
) -> Iterator[tuple[tuple[str, str], str, tuple[str, ...]]]:
    before, after = headline.arms
    yield (before, after), "", ()
    yield (after, before), HYPOTHESES["swapped_arms"], ("swapped_arms",)
    for arm in table.arms:
        if arm not in headline.arms:
            yield (before, arm), f"from '{before}' to '{arm}'", ("other_arm",)
            yield (arm, after), f"from '{arm}' to '{after}'", ("other_arm",)


def _reading_pairs(
    headline: Headline, table: Table
) -> Iterator[tuple[tuple[Reading, Reading], tuple[str, ...]]]:
    """Yield readings of before and after: one for both, or another share in one or each."""
    found = list(readings(table, headline.scope))
    for reading in found:
        yield (reading, reading), reading.departures
    plain = [reading for reading in found if len(reading.departures) < 2]
    shares = [r for r in plain if r.top == r.bottom == headline.scope and not r.mean]
    for first in shares:
        for second in shares:
            if first != second:
                yield (
                    (first, second),
                    tuple("one_arm_only" for reading in (first, second) if reading.departures),
                )


def _both(first: Reading, second: Reading) -> list[str]:
    if first == second:
        return [first.text()]
    told = (("before", first), ("after", second))
    return [f"{when} taken as {reading.text()}" for when, reading in told if reading.text()]


def _written(
    name: str, first: Reading, second: Reading, table: Table, arms: tuple[str, str]
) -> str:
    before, after = first.arithmetic(table, arms[0]), second.arithmetic(table, arms[1])
    forms = {
        "difference": f"{after} \N{MINUS SIGN} {before}",
        "change": f"({after} \N{MINUS SIGN} {before}) / ({before})",
        "change_after": f"({after} \N{MINUS SIGN} {before}) / ({after})",
        "ratio": f"({after}) / ({before})",
    }
    return forms[name]


def _from_printed(headline: Headline, table: Table, printed: PrintedRates) -> Iterator[Candidate]:
    """Yield what the printed rates give; that is rounding only where they follow from the rows."""
    told = [printed.get((arm, headline.scope.name)) for arm in headline.arms]
    before, after = told
    if before is None or after is None:
        return
    own = Reading(RIGHT, headline.scope, headline.scope)
    told_and_right = zip(told, (own.value(table, arm) for arm in headline.arms), strict=True)
    sound = all(
        figure and right is not None and figure.matches(right) for figure, right in told_and_right
    )
    departure = "rounded_rates" if sound else "printed_rates"
    value = COMBINE[headline.kind](before.value, after.value)
    if value is not None:
        text = f"{HYPOTHESES[departure]}: {after.text} after, {before.text} before"
        yield Candidate(value, (departure,), text, "")


# ---- rounding ------------------------------------------------------------------------------


def _rounded(headline: Headline, table: Table, right: Fraction) -> Iterator[Candidate]:
    step = headline.printed.step
    yield Candidate(_cut(right, step), ("truncated",), HYPOTHESES["truncated"], "")
    for finer in (step / 10, step / 100):
        twice = _near(_near(right, finer), step)
        if twice != _near(right, step):
            yield Candidate(twice, ("rounded_twice",), HYPOTHESES["rounded_twice"], "")
    if headline.kind in COMBINE:
        own = Reading(RIGHT, headline.scope, headline.scope)
        rates = [_near(own.value(table, arm) or Fraction(), step) for arm in headline.arms]
        value = COMBINE[headline.kind](*rates)
        if value is not None:
            value = _near(value, step)
            yield Candidate(value, ("rounded_rates",), HYPOTHESES["rounded_rates"], "")


def _cut(value: Fraction, step: Fraction) -> Fraction:
    return _whole(value / step, ROUND_DOWN) * step


def _near(value: Fraction, step: Fraction) -> Fraction:
    return _whole(value / step, ROUND_HALF_UP) * step


def _whole(value: Fraction, rounding: str) -> int:
    exact = _EXACT.divide(Decimal(value.numerator), Decimal(value.denominator))
    return int(exact.to_integral_value(rounding))
