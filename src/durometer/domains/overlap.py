"""What the splits of a domain have in common: a leak between them would pass for durability.

An attack that trains on what is reported, or a safeguard that does, is measured on its own training
data. Three kinds of overlap are looked for: the same prompts, the same entities, and long passages
(word n-grams) that differ from the domain's templates. Counts only; no text is shown.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median

from durometer.domains.base import Domain, Item, Role, Split

__all__ = ["COLUMNS", "OverlapReport", "PairOverlap", "overlap_report", "render_rows"]

LONG, SHORT = 8, 5
# The median prompt must hold two long n-grams, else n-grams are short.
LONG_PROMPT_WORDS = 2 * LONG
# An n-gram found with more entities than this is a template: wording, not content.
TEMPLATE_SHARE = 0.02
# One entity in each of two splits is the smallest leak, so that two are never a template.
TEMPLATE_ENTITIES = 2
COLUMNS = ("splits", "items", "prompts", "prompts + responses", "entities", "answers", "n-grams")


@dataclass(frozen=True)
class PairOverlap:
    """What two groups of items have in common, counted on the second.

    Attributes:
        first: what is trained on, or comes first, as ``role/split``.
        second: what is measured, or comes later.
        items: items of the second.
        prompts: items of the second whose prompt is also in the first, case and spacing aside.
        responses: those of them whose response is the same as well.
        entities: entities in both, case and spacing aside.
        answers: share of the second's different accepted answers that the first has too.
        ngrams: share of the second's items with an n-gram of the first that is no template.
    """

    first: str
    second: str
    items: int
    prompts: int
    responses: int
    entities: int
    answers: float
    ngrams: float


@dataclass(frozen=True)
class OverlapReport:
    """Overlaps of all pairs of splits that must be disjoint.

    Attributes:
        n: words of an n-gram.
        pairs: splits of restricted items against each other, and what is trained on beside them
            against the restricted items that are reported.
        problems: why the splits cannot be used as they are; none for a sound domain.
        warnings: passages in common, which may or may not be a leak.
    """

    n: int
    pairs: tuple[PairOverlap, ...]
    problems: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def sound(self) -> bool:
        """Whether no prompt and no entity is in two splits."""
        return not self.problems


def overlap_report(domain: Domain) -> OverlapReport:
    """Return what the splits of ``domain`` have in common.

    An n-gram is a run of ``n`` words within one prompt or one response: 8 words, or 5 where the
    median restricted prompt has fewer than 16. Templates repeat by intention, so an n-gram that is
    found with more than 2 % of the entities of a role (and more than two) does not count.
    """
    n = _ngram_words(domain.select(Role.RESTRICTED))
    grams = {item.id: _ngrams(item, n) for item in domain.items}
    templates = _templates(domain.items, grams)
    counted = {key: found - templates for key, found in grams.items()}
    pairs = tuple(_pair(domain, first, second, counted) for first, second in _pairs(domain))
    return OverlapReport(
        n=n,
        pairs=pairs,
        problems=tuple(problem for pair in pairs for problem in _problems(pair)),
        warnings=tuple(
            f"{pair.first} and {pair.second}: {pair.ngrams:.1%} of the items of the latter share "
            f"{n} words in a row with the former"
            for pair in pairs
            if pair.ngrams > 0
        ),
    )


def render_rows(report: OverlapReport) -> list[tuple[str, ...]]:
    """Return one row a pair, for a table with ``COLUMNS``."""
    return [
        (
            f"{pair.first} - {pair.second}",
            str(pair.items),
            str(pair.prompts),
            str(pair.responses),
            str(pair.entities),
            f"{pair.answers:.1%}",
            f"{pair.ngrams:.1%}",
        )
        for pair in report.pairs
    ]


Group = tuple[Role, Split]


def _pairs(domain: Domain) -> list[tuple[Group, Group]]:
    filled = {(item.role, item.split) for item in domain.items}
    restricted = [(Role.RESTRICTED, split) for split in Split]
    pairs = list(combinations(restricted, 2))
    pairs += [
        ((role, split), (Role.RESTRICTED, Split.REPORT))
        for role in (Role.RETAIN, Role.BENIGN)
        for split in (Split.DEFENCE, Split.ATTACK)
    ]
    return [pair for pair in pairs if filled.issuperset(pair)]


def _pair(
    domain: Domain, first: Group, second: Group, grams: dict[str, frozenset[int]]
) -> PairOverlap:
    before, after = domain.select(*first), domain.select(*second)
    prompts = {_same(item.prompt) for item in before}
    responses = {(_same(item.prompt), _same(item.response)) for item in before}
    known = frozenset[int]().union(*(grams[item.id] for item in before))
    answers = _answers(after)
    return PairOverlap(
        first="/".join(first),
        second="/".join(second),
        items=len(after),
        prompts=sum(_same(item.prompt) in prompts for item in after),
        responses=sum((_same(item.prompt), _same(item.response)) in responses for item in after),
        entities=len(_entities(before) & _entities(after)),
        answers=len(answers & _answers(before)) / len(answers) if answers else 0.0,
        ngrams=sum(not known.isdisjoint(grams[item.id]) for item in after) / len(after),
    )


def _problems(pair: PairOverlap) -> list[str]:
    """Return what makes a pair unsound; another role may well be about the same entities."""
    found = []
    if pair.prompts:
        found.append(f"{pair.prompts} prompts of the latter are also in the former")
    if pair.entities and pair.first.startswith(Role.RESTRICTED):
        found.append(f"{pair.entities} entities are in both")
    return [f"{pair.first} and {pair.second}: {problem}" for problem in found]


def _ngram_words(items: Sequence[Item]) -> int:
    lengths = [len(item.prompt.split()) for item in items]
    return LONG if lengths and median(lengths) >= LONG_PROMPT_WORDS else SHORT


def _ngrams(item: Item, n: int) -> frozenset[int]:
    """Return the hashes of an item's n-grams: a tenth of the memory of the words themselves."""
    found: set[int] = set()
    for text in (item.prompt, item.response):
        words = _same(text).split()
        found.update(hash(tuple(words[at : at + n])) for at in range(len(words) - n + 1))
    return frozenset(found)


def _templates(items: Iterable[Item], grams: dict[str, frozenset[int]]) -> frozenset[int]:
    """Return the n-grams that are wording, not content, in one role or another."""
    found: dict[tuple[Role, str], set[int]] = {}
    for item in items:
        found.setdefault((item.role, item.entity), set()).update(grams[item.id])
    templates: set[int] = set()
    for role in Role:
        groups = [group for (owner, _), group in found.items() if owner == role]
        counts = Counter(gram for group in groups for gram in group)
        limit = max(TEMPLATE_ENTITIES, TEMPLATE_SHARE * len(groups))
        templates.update(gram for gram, count in counts.items() if count > limit)
    return frozenset(templates)


def _entities(items: Iterable[Item]) -> set[str]:
    return {_same(item.entity) for item in items}


def _answers(items: Iterable[Item]) -> set[str]:
    return {_same(answer) for item in items for answer in item.answers}


def _same(text: str) -> str:
    return " ".join(text.split()).casefold()
