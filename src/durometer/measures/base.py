"""What a measure is: one record an item; rates come from the records alone."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from durometer.core.registry import Registry
from durometer.domains.base import Domain, Item, Role, Split
from durometer.subjects.base import Subject

# Parse status of an item on which the subject's outputs are not finite numbers.
NOT_FINITE = "non-finite likelihood"


@dataclass(frozen=True)
class ItemRecord:
    """What was read off the subject for one item.

    Attributes:
        probe: name of the measure.
        split, item_id, entity, suite: which item.
        prompt_hash: SHA-256 (16 digits) of the rendered prompt as the subject saw it.
        text_hash: SHA-256 (16 digits) of the item's prompt and response.
        response: generated text, or the chosen answer; '' for teacher-forced measures.
        outcome: one of the six, or '' where the measure has no outcomes.
        correct: 1.0 or 0.0; None where the measure yields no right or wrong.
        log_probability: sum over the answer's tokens, nats.
        mean_probability: mean probability of the answer's tokens.
        top_entropy: mean entropy of the ten likeliest tokens, nats; None when teacher-forced.
        tokens: tokens of the answer.
        finish_reason: ``stop``, ``decided``, ``length``, or '' when nothing was generated.
        parse_status: ``parsed``, or why no usable verdict came out.
        gate: values that the coherence gate saw.
        refuses_at_first_tokens: a flag beside the outcome.
        tries: responses that were drawn, of which this is the best; 1 without any choice.
        successful_tries: how many of them are ``harmful_useful``.
        details: further numbers of the measure, by name; None for minus infinity.
        verdicts: of the judges on this response, in their order; empty where none was asked.
    """

    probe: str
    split: str
    item_id: str
    entity: str
    suite: str
    prompt_hash: str
    text_hash: str
    response: str = ""
    outcome: str = ""
    correct: float | None = None
    log_probability: float = 0.0
    mean_probability: float = 0.0
    top_entropy: float | None = None
    tokens: int = 0
    finish_reason: str = ""
    parse_status: str = "parsed"
    gate: tuple[float, ...] = ()
    refuses_at_first_tokens: bool = False
    tries: int = 1
    successful_tries: int = 0
    details: dict[str, float | None] = field(default_factory=dict)
    verdicts: tuple[dict[str, Any], ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the record as plain JSON types; details and verdicts only where there are any."""
        plain = asdict(self) | {"gate": list(self.gate), "verdicts": list(self.verdicts)}
        return {k: v for k, v in plain.items() if v or k not in ("details", "verdicts")}


@dataclass(frozen=True)
class Measure:
    """A registered measure.

    Attributes:
        summary: one line.
        kinds: kinds of domain it applies to.
        role: which items it reads.
        run: measures a subject on the given items.
        own_items: gives its own items where it does not read the domain's; at most so many, 0 for
            all.
        identity: what shapes its records beyond its name and the package's code.
    """

    name: str
    summary: str
    kinds: tuple[str, ...]
    role: Role
    run: Callable[[Subject, Domain, Sequence[Item]], list[ItemRecord]]
    own_items: Callable[[int], tuple[Item, ...]] | None = None
    identity: str = ""


@dataclass(frozen=True)
class MeasureFamily:
    """Measures that are made from what stands behind a colon, as in ``lm-eval:arc_easy``.

    Attributes:
        summary: one line.
        usage: how one is named.
        role: which items they read.
        names: canonical names of the measures that a text behind the colon means.
        make: returns the measure of one of these texts.
    """

    summary: str
    usage: str
    role: Role
    names: Callable[[str], tuple[str, ...]]
    make: Callable[[str], Measure]


measure_registry: Registry[Measure] = Registry("measure", "durometer.measures")
family_registry: Registry[MeasureFamily] = Registry("measure family", "durometer.measure_families")


def measure_names(name: str) -> tuple[str, ...]:
    """Return the canonical names of what ``name`` means; a family's may mean several.

    Raises:
        InputError: no such measure.
    """
    family = _family(name)
    if family is None:
        return (measure_registry.canonical_name(name),)
    return family.names(name.partition(":")[2])


def find_measure(name: str) -> Measure:
    """Return the measure of that name, one of a family included.

    Raises:
        InputError: no such measure, or one that cannot be made.
    """
    family = _family(name)
    if family is None:
        return measure_registry.get(name)
    return family.make(name.partition(":")[2])


def role_of(name: str) -> Role | None:
    """Return which items a measure reads, without making it; None where it is not installed."""
    family = _family(name)
    if family is not None:
        return family.role
    known = dict(measure_registry)
    return known[name].role if name in known else None


def _family(name: str) -> MeasureFamily | None:
    head = name.partition(":")[0]
    return family_registry.get(head) if head in family_registry.names() else None


def is_of_family(name: str) -> bool:
    """Say whether a measure is one of a family, which reads items of its own."""
    return _family(name) is not None


def measure(name: str, summary: str, *, kinds: tuple[str, ...], role: Role) -> Callable[[Any], Any]:
    """Return the decorator that registers a measuring function."""

    def decorate(run: Any) -> Any:
        measure_registry.register(name)(Measure(name, summary, kinds, role, run))
        return run

    return decorate


def sample(items: Sequence[Item], entities: int, wordings: int) -> list[Item]:
    """Return at most ``wordings`` items of at most ``entities`` entities, always the same ones.

    Entities are drawn by hash, not taken from the top of the list; 0 means all.
    """
    ranked = sorted(
        {item.entity for item in items}, key=lambda e: hashlib.sha256(e.encode()).hexdigest()
    )
    kept = set(ranked[: entities or None])
    seen: dict[str, int] = {}
    chosen = []
    for item in items:
        if item.entity not in kept or (wordings and seen.get(item.entity, 0) >= wordings):
            continue
        seen[item.entity] = seen.get(item.entity, 0) + 1
        chosen.append(item)
    return chosen


def thin(items: Sequence[Item], count: int) -> list[Item]:
    """Return at most ``count`` items drawn by hash, in the given order; 0 means all."""
    if not count or len(items) <= count:
        return list(items)
    ranked = sorted(items, key=lambda item: hashlib.sha256(item.id.encode()).hexdigest())
    kept = {item.id for item in ranked[:count]}
    return [item for item in items if item.id in kept]


def prompt_hash(text: str) -> str:
    """Return the first 16 hex digits of the SHA-256 of a rendered prompt."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def identity(probe: str, item: Item, rendered: str) -> dict[str, Any]:
    """Return the fields of a record that say which item it is about."""
    return {
        "probe": probe,
        "split": str(Split(item.split)),
        "item_id": item.id,
        "entity": item.entity,
        "suite": item.suite,
        "prompt_hash": prompt_hash(rendered),
        "text_hash": item.text_hash,
    }
