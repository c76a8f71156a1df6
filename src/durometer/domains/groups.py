"""Groups of the same restricted items: other languages, other framings."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from durometer.core.errors import InputError
from durometer.domains.base import AnswerRules, Domain
from durometer.domains.languages import LANGUAGES, Language

PLAIN = "plain"
ALL = "all"


def with_groups(domain: Domain, languages: Sequence[str], framings: Sequence[str]) -> Domain:
    """Return ``domain`` with the variants of the chosen groups: every language in every framing.

    The domain's own language and the plain framing are always there, and come first: the others
    are compared with that group.

    Args:
        languages, framings: names that the domain has, or ``all``; none of both chooses nothing.

    Raises:
        InputError: a domain without groups, or a name that it does not have.
    """
    if not languages and not framings:
        return domain
    option, first = ("--languages", languages) if languages else ("--framings", framings)
    if domain.kind != "refusal" or domain.needs_judge:
        raise InputError(
            f"{option} {','.join(first)}: groups are read off free answers; domain "
            f"'{domain.name}' must be of kind 'refusal', with accepted answers"
        )
    variants = domain.make_variants()
    if not variants:
        raise InputError(
            f"{option} {','.join(first)}: domain '{domain.name}' has items in one language and "
            "framing only; capitals has several, and so may a folder (docs/languages.md)"
        )
    spoken = _chosen("language", languages, _known(v.language for v in variants))
    framed = _chosen("framing", framings, _known(v.framing for v in variants))
    order = {(a, b): n for n, (a, b) in enumerate((a, b) for a in spoken for b in framed)}
    kept = [v for v in variants if (v.language, v.framing) in order]
    kept.sort(key=lambda v: order[v.language, v.framing])
    return replace(domain, variants=tuple(kept))


def rules_in(domain: Domain, language: str) -> AnswerRules:
    """Return how responses to items in ``language`` are read.

    A model may answer and refuse in English whatever it is asked in: what the domain's own rules
    know counts as well.
    """
    known = LANGUAGES.get(language, Language(language))
    own = domain.rules
    told = (a for v in domain.variants if v.language == language for a in v.item.answers)
    pattern = "|".join(p for p in (own.attempt_pattern, known.attempt_pattern) if p)
    return replace(
        own,
        other_answers=tuple(dict.fromkeys([*own.other_answers, *told])),
        refusal_phrases=(*own.refusal_phrases, *known.refusal_phrases),
        attempt_pattern=pattern,
    )


def _known(names: Iterable[str]) -> list[str]:
    """Return names in the order in which they occur: the domain's own first."""
    return list(dict.fromkeys(names))


def _chosen(kind: str, wanted: Sequence[str], known: Sequence[str]) -> list[str]:
    if ALL in wanted:
        return list(known)
    for name in wanted:
        if name not in known:
            # Few enough to be listed whole, which helps more than the nearest of them.
            listed = ", ".join(known)
            raise InputError(f"unknown {kind} '{_shown(name)}'; this domain has: {listed}")
    return list(dict.fromkeys([known[0], *wanted]))


def _shown(name: str) -> str:
    return name if len(name) <= 40 else f"{name[:40]}..."
