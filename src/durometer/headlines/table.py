"""What was observed: outcomes of arms by category, item by item or as counts."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from durometer.core.errors import unknown_name

__all__ = ["ALL", "Counts", "ItemOutcome", "Scope", "Table"]

ALL = "all"
"""Name of the scope that holds every category."""


@dataclass(frozen=True)
class Counts:
    """Outcomes of one arm: how many were a success, none, or could not be read."""

    success: int = 0
    failure: int = 0
    unparsed: int = 0

    @property
    def n(self) -> int:
        """All outcomes, those that could not be read among them."""
        return self.success + self.failure + self.unparsed

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.success + other.success,
            self.failure + other.failure,
            self.unparsed + other.unparsed,
        )


@dataclass(frozen=True)
class ItemOutcome:
    """The outcome of one item under one arm; an unparsed one is no success."""

    category: str
    success: bool
    entity: str


@dataclass(frozen=True)
class Scope:
    """Categories that are counted together."""

    name: str
    categories: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """Outcomes by arm and category.

    Attributes:
        counts: by arm and category.
        scorers: how a category is scored, for those that need a scorer of their own.
        items: by arm, then item; empty where only counts are known.
        clustered: whether items name an entity that intervals cluster by.
        pairs: items gained and lost by (before, after, category), where they were told.
    """

    counts: Mapping[tuple[str, str], Counts]
    scorers: Mapping[str, str] = field(default_factory=dict)
    items: Mapping[str, Mapping[str, ItemOutcome]] = field(default_factory=dict)
    clustered: bool = False
    pairs: Mapping[tuple[str, str, str], tuple[int, int]] = field(default_factory=dict)
    # A search asks for the same sums many thousand times.
    _sums: dict[tuple[str, tuple[str, ...]], Counts] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @cached_property
    def arms(self) -> list[str]:
        """Arms in the order of the table."""
        return list(dict.fromkeys(arm for arm, _ in self.counts))

    @cached_property
    def categories(self) -> list[str]:
        """Categories in the order of the table."""
        return list(dict.fromkeys(category for _, category in self.counts))

    def of(self, arm: str, scope: Scope) -> Counts:
        """Return an arm's counts over a scope."""
        key = (arm, scope.categories)
        if key not in self._sums:
            cells = (self.counts.get((arm, name), Counts()) for name in scope.categories)
            self._sums[key] = sum(cells, Counts())
        return self._sums[key]

    def scopes(self) -> list[Scope]:
        """Return all categories, each one, each scorer's, and all but each; none twice."""
        names = self.categories
        found = [Scope(ALL, tuple(names)), *(Scope(name, (name,)) for name in names)]
        found += self.scorer_scopes()
        found += [Scope(f"without {name}", _but(names, [name])) for name in names]
        unique = dict[frozenset[str], Scope]()
        for scope in found:
            if scope.categories:
                unique.setdefault(frozenset(scope.categories), scope)
        return list(unique.values())

    def scorer_scopes(self) -> list[Scope]:
        """Return the categories of each scorer; none where one scorer serves all."""
        by_scorer = dict[str, list[str]]()
        for category in self.categories:
            by_scorer.setdefault(self.scorers.get(category, ""), []).append(category)
        if len(by_scorer) < 2:
            return []
        return [Scope(self._scorer_name(s), tuple(held)) for s, held in by_scorer.items()]

    def _scorer_name(self, scorer: str) -> str:
        if scorer:
            return f"scored by {scorer}"
        return f"without {', '.join(c for c in self.categories if self.scorers.get(c))}"

    def scope(self, name: str) -> Scope:
        """Return the scope of that name; '' is all.

        Raises:
            InputError: there is none.
        """
        known = {scope.name: scope for scope in reversed(self.scopes())}
        known |= {category: Scope(category, (category,)) for category in self.categories if name}
        if (name or ALL) not in known:
            raise unknown_name("category", name, known)
        return known[name or ALL]

    def pooled_scorers(self, scope: Scope) -> list[str]:
        """Return the scorers that a scope mixes; empty where it mixes none."""
        used = dict.fromkeys(self.scorers.get(category, "") for category in scope.categories)
        return [scorer or "the rest" for scorer in used] if len(used) > 1 else []

    def gained_and_lost(
        self, before: str, after: str, categories: Iterable[str]
    ) -> tuple[int, int] | None:
        """Return told gains and losses over categories, None unless all of them are known."""
        gained = lost = 0
        for category in categories:
            told = self.pairs.get((before, after, category))
            turned = self.pairs.get((after, before, category))
            if told is None and turned is not None:
                told = turned[::-1]
            if told is None:
                return None
            gained, lost = gained + told[0], lost + told[1]
        return gained, lost


def _but(names: Sequence[str], left_out: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in names if name not in left_out)
