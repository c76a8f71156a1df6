"""Does a printed figure follow, and if not, which hypotheses lead to it?

One step away from the right figure is searched first. Only if nothing is found there, two steps are
searched, and only where the printed digits are enough for a match to mean something.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from durometer.headlines.hypotheses import (
    HYPOTHESES,
    ROUNDING,
    Candidate,
    PrintedRates,
    candidates,
    right_value,
    root,
)
from durometer.headlines.settings import PAIRED_KINDS, Headline
from durometer.headlines.table import Table

__all__ = ["MOST_BY_CHANCE", "Search", "Verdict", "search"]

Verdict = Literal["follows", "rounding", "explained", "unexplained", "undefined"]
MOST_BY_CHANCE = 0.1
"""Two steps are not searched where they would explain more of all figures than this."""


@dataclass(frozen=True)
class Search:
    """What was found about one headline.

    Attributes:
        right: what the rows give, as a share; None where it is undefined.
        explanations: every hypothesis that leads to the printed figure.
        tried: candidates one step away, and two; None where they were not searched.
        by_chance: share of all figures with as many digits that they would explain, likewise.
        too_coarse: two steps were left out because the printed digits are too few.
    """

    verdict: Verdict
    right: Fraction | None
    explanations: tuple[Candidate, ...] = ()
    tried: tuple[int, int | None] = (0, None)
    by_chance: tuple[float, float | None] = (0.0, None)
    too_coarse: bool = False


def search(headline: Headline, table: Table, printed: PrintedRates) -> Search:
    """Return whether a headline follows, and every declared hypothesis that explains it if not."""
    right = right_value(headline, table)
    if right is None:
        return Search("undefined", None)
    if any(_matches(headline, value) for value in _right_ones(headline, table, right)):
        return Search("follows", right)
    made = candidates(headline, table, right, printed)
    near = [candidate for candidate in made if len(candidate.departures) == 1]
    far = [candidate for candidate in made if len(candidate.departures) == 2]
    chance = _by_chance(headline, near)
    found = _found(headline, near)
    if found:
        only_rounding = any(ROUNDING & set(one.departures) for one in found)
        verdict: Verdict = "rounding" if only_rounding else "explained"
        return Search(verdict, right, found, (len(near), None), (chance, None))
    far_chance = _by_chance(headline, far)
    if far_chance > MOST_BY_CHANCE:
        return Search("unexplained", right, (), (len(near), None), (chance, far_chance), True)
    found = _found(headline, far)
    verdict = "explained" if found else "unexplained"
    return Search(verdict, right, found, (len(near), len(far)), (chance, far_chance))


def _right_ones(headline: Headline, table: Table, right: Fraction) -> list[Fraction]:
    """Return the right figure; a deviation may be the population's or the sample's."""
    if headline.kind != "deviation":
        return [right]
    n = table.of(headline.arms[0], headline.scope).n
    return [right, *([root(right * right * n / (n - 1))] if n > 1 else [])]


def _matches(headline: Headline, value: Fraction) -> bool:
    return headline.printed.matches(value, by_size=headline.kind in PAIRED_KINDS)


def _found(headline: Headline, made: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """Return what rounds to the printed figure, in the order of the declared list."""
    order = list(HYPOTHESES)
    matching = [candidate for candidate in made if _matches(headline, candidate.value)]
    return tuple(sorted(matching, key=lambda one: [order.index(name) for name in one.departures]))


def _by_chance(headline: Headline, made: Sequence[Candidate]) -> float:
    """Return the share of all figures with as many digits that some candidate would explain.

    All figures: 0 to 100 % for a rate or deviation, -100 to 100 % for a change, and up to the
    printed one where that lies beyond. Figures near the right one are explained more often.
    """
    printed, signed = headline.printed, headline.kind in PAIRED_KINDS
    by_size = signed and not printed.signed
    low = min(Fraction(-1), printed.value) if signed and not by_size else Fraction()
    high = max(Fraction(1), abs(printed.value))
    covered, end = Fraction(), low
    for value in sorted(abs(c.value) if by_size else c.value for c in made):
        start, stop = value - printed.step / 2, min(value + printed.step / 2, high)
        covered += max(Fraction(), stop - max(start, end))
        end = max(end, stop)
    return float(covered / (high - low))
