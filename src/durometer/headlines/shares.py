"""The shares that a rate may have been taken for, and over which rows."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction

from durometer.headlines.table import Counts, Scope, Table

__all__ = ["RIGHT", "SHARES", "Reading", "Share", "readings"]


@dataclass(frozen=True)
class Share:
    """A share of counts.

    Attributes:
        name: id of the hypothesis; '' is the right share.
        text: in words.
        of: numerator and denominator.
        unparsed: it differs from the others only where something could not be read.
    """

    name: str
    text: str
    of: Callable[[Counts], tuple[int, int]]
    unparsed: bool = False


RIGHT = Share("", "successes over all rows", lambda c: (c.success, c.n))
SHARES = (
    RIGHT,
    Share(
        "complement",
        "the share of failures (the safe share, where success is an attack's)",
        lambda c: (c.failure, c.n),
    ),
    Share(
        "complement_with_unparsed",
        "the share of failures, unparsed ones counted as failures (as safe)",
        lambda c: (c.n - c.success, c.n),
        unparsed=True,
    ),
    Share(
        "odds",
        "odds: successes over all others instead of over all rows",
        lambda c: (c.success, c.n - c.success),
    ),
    Share(
        "odds_without_unparsed",
        "odds: successes over failures, unparsed ones left out",
        lambda c: (c.success, c.failure),
        unparsed=True,
    ),
    Share(
        "inverse_odds",
        "inverse odds: failures over successes",
        lambda c: (c.failure, c.success),
    ),
    Share(
        "without_unparsed",
        "unparsed ones left out of the denominator",
        lambda c: (c.success, c.success + c.failure),
        unparsed=True,
    ),
    Share(
        "complement_without_unparsed",
        "the share of failures, unparsed ones left out of the denominator",
        lambda c: (c.failure, c.success + c.failure),
        unparsed=True,
    ),
    Share(
        "unparsed_as_success",
        "unparsed ones counted as successes",
        lambda c: (c.success + c.unparsed, c.n),
        unparsed=True,
    ),
)


@dataclass(frozen=True)
class Reading:
    """A way to take a rate from a table: a share of rows, or of two different sets of rows.

    Attributes:
        share: which share.
        top: rows that are counted.
        bottom: rows that are counted in the denominator.
        mean: the mean of the shares of single categories instead.
        departures: ids of the hypotheses by which it departs from the headline's own reading.
    """

    share: Share
    top: Scope
    bottom: Scope
    mean: bool = False
    departures: tuple[str, ...] = ()

    def value(self, table: Table, arm: str) -> Fraction | None:
        """Return the rate, None where its denominator is 0."""
        if self.mean:
            parts = [self._part(table, arm, (name,)) for name in self.top.categories]
            known = [part for part in parts if part is not None]
            return sum(known, Fraction()) / len(known) if len(known) == len(parts) else None
        over, under = self.counted(table, arm)
        return Fraction(over, under) if under else None

    def _part(self, table: Table, arm: str, categories: tuple[str, ...]) -> Fraction | None:
        over, under = self.share.of(table.of(arm, Scope("", categories)))
        return Fraction(over, under) if under else None

    def counted(self, table: Table, arm: str) -> tuple[int, int]:
        """Return numerator and denominator."""
        over, under = self.share.of(table.of(arm, self.top))
        if self.bottom != self.top:
            under = self.share.of(table.of(arm, self.bottom))[1]
        return over, under

    def text(self) -> str:
        """Return how it departs from the headline's own reading, in words; '' for that one."""
        parts = [self.share.text] if self.share.name else []
        if self.mean:
            parts.append("the mean of the rates of single categories")
        elif self.bottom != self.top:
            parts.append(f"successes of '{self.top.name}' over the rows of '{self.bottom.name}'")
        elif "other_rows" in self.departures:
            parts.append(f"the rows of '{self.top.name}'")
        return ", ".join(parts)

    def arithmetic(self, table: Table, arm: str) -> str:
        """Return the counts it is made of."""
        if self.mean:
            return f"mean over {len(self.top.categories)} categories"
        over, under = self.counted(table, arm)
        return f"{over}/{under}"


def readings(table: Table, own: Scope) -> Iterator[Reading]:
    """Yield the headline's own reading and all that depart from it in one or two ways."""
    unread = any(counts.unparsed for counts in table.counts.values())
    shares = [share for share in SHARES if unread or not share.unparsed]
    scopes = table.scopes()
    for share in shares:
        other = (share.name,) if share.name else ()
        yield Reading(share, own, own, departures=other)
        if len(own.categories) > 1:
            yield Reading(share, own, own, mean=True, departures=(*other, "category_mean"))
        for scope in scopes:
            if scope.categories != own.categories:
                yield Reading(share, scope, scope, departures=(*other, "other_rows"))
    for scope in scopes:
        if scope.categories != own.categories:
            yield Reading(RIGHT, own, scope, departures=("other_denominator",))
            yield Reading(RIGHT, scope, own, departures=("other_denominator",))
