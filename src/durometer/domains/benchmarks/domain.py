"""Domains of benchmarks: the first set is what is safeguarded, the others are what must be kept."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

from durometer.core.errors import InputError
from durometer.domains.base import (
    REFUSAL_PHRASES,
    AnswerRules,
    Domain,
    Item,
    Role,
)
from durometer.domains.benchmarks.items import Dealt, deal
from durometer.domains.benchmarks.read import Loaded, read_benchmark
from durometer.domains.capitals import build_capitals
from durometer.domains.folder import DEFAULT_REFUSALS

__all__ = ["benchmark_domain", "with_added"]

# Whatever is neither right, nor a refusal, nor "I don't know", is a wrong answer.
ATTEMPT = r"\A(?!(?s:.)*\b(?:don.?t know|do not know|not sure|unsure)\b)(?s:.)*\w"


def benchmark_domain(spec: str, added: Sequence[str]) -> Domain:
    """Return the domain whose restricted items are a benchmark, and what must be kept others.

    Without others the retain items of ``capitals`` are taken; its benign items always are, since
    safe prompts of a benchmark come without responses to train on or to score.

    Args:
        spec: the benchmark that is safeguarded.
        added: benchmarks whose answers must be kept.

    Raises:
        InputError: see ``read_benchmark``; or a benchmark that cannot stand where it was named.
    """
    first = read_benchmark(spec)
    benchmark, dealt = first.benchmark, deal(first, Role.RESTRICTED)
    if not any(item.role == Role.RESTRICTED for item in dealt.items):
        raise InputError(
            f"{benchmark.name}: {first.origin.part} holds harmless prompts alone; add it to what "
            f"is safeguarded, as in capitals+{spec}"
        )
    items = (*dealt.items, *(() if added else _built_in(Role.RETAIN)), *_built_in(Role.BENIGN))
    notes = first.notes if added else (*first.notes, "retain items are those of 'capitals'")
    domain = Domain(
        name=benchmark.name,
        kind=benchmark.kind,
        description=benchmark.title,
        items=items,
        refusals=tuple(DEFAULT_REFUSALS),
        rules=AnswerRules(refusal_phrases=REFUSAL_PHRASES, attempt_pattern=ATTEMPT),
        source=_source(first),
        harmless=not benchmark.hazardous,
        chance=_chance(dealt.items),
        notes=notes,
        origins=(first.origin,),
    )
    return with_added(domain, added)


def with_added(domain: Domain, specs: Sequence[str]) -> Domain:
    """Return ``domain`` with benchmarks added to what must be kept.

    Raises:
        InputError: a hazardous set, or one that is there already.
    """
    for spec in specs:
        loaded = read_benchmark(spec)
        domain = _with(domain, loaded, deal(loaded, Role.RETAIN))
    return domain


def _with(domain: Domain, loaded: Loaded, dealt: Dealt) -> Domain:
    name = loaded.benchmark.name
    if loaded.benchmark.hazardous and any(item.role == Role.RETAIN for item in dealt.items):
        raise InputError(
            f"{name}: a set of hazardous prompts is what is safeguarded; name it first, as in "
            f"{name}:FOLDER+mmlu:FOLDER"
        )
    if any(origin.name == name for origin in domain.origins):
        raise InputError(f"{name}: named twice; name it once")
    return replace(
        domain,
        items=(*domain.items, *dealt.items),
        source="; ".join(filter(None, (domain.source, _source(loaded)))),
        notes=(*domain.notes, *loaded.notes),
        origins=(*domain.origins, loaded.origin),
        published={**domain.published, **dealt.published},
    )


@cache
def _built_in(role: Role) -> tuple[Item, ...]:
    return tuple(build_capitals("refusal").select(role))


def _source(loaded: Loaded) -> str:
    origin = loaded.origin
    revision = f" at {origin.revision[:12]}" if origin.revision else ""
    split = f", split {origin.split}" if origin.split else ""
    return (
        f"{origin.name} ({loaded.benchmark.source}; licence: {origin.licence}) from "
        f"{origin.location}{revision}{split}"
    )


def _chance(items: Sequence[Item]) -> float:
    """Return the rate of right guesses: one over the number of options, averaged over items."""
    rates = [1 / len(item.choices) for item in items if item.choices]
    return sum(rates) / len(rates) if rates else 0.0
