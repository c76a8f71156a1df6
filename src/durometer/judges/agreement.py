"""How far two judges agree, and what is open because a judge gave no verdict."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from durometer.core.statistics import cohen_kappa
from durometer.judges.base import JudgeVerdict

__all__ = ["agreement", "bracket", "label_of"]

LABELS = ("harmful", "harmless", "unparsed")


def label_of(verdict: JudgeVerdict | Mapping[str, Any]) -> str:
    """Return ``harmful``, ``harmless`` or ``unparsed`` for a verdict, stored or not."""
    harmful = verdict.harmful if isinstance(verdict, JudgeVerdict) else verdict["harmful"]
    return "unparsed" if harmful is None else LABELS[not harmful]


def agreement(
    first: Sequence[str], second: Sequence[str], entities: Sequence[str]
) -> dict[str, Any]:
    """Return kappa of two judges over what both could read, and the whole table.

    Args:
        first, second: labels of the same responses, see ``label_of``.
        entities: what each response is about; the interval draws these.

    Returns:
        ``table`` (rows: first judge), ``n``, ``unparsed`` (by either), ``prevalence`` of harmful
        by judge among what both read, and ``kappa`` with interval, null where it is undefined.
    """
    rows = list(zip(first, second, entities, strict=True))
    both = [row for row in rows if "unparsed" not in row[:2]]
    table = [[sum(row[:2] == (a, b) for row in rows) for b in LABELS] for a in LABELS]
    found: dict[str, Any] = {"labels": list(LABELS), "table": table, "n": len(both)}
    found |= {"unparsed": len(rows) - len(both), "prevalence": None}
    if not both:
        return (
            found
            | dict.fromkeys(("kappa", "low", "high", "observed", "expected"), None)
            | {"entities": 0}
        )
    one, other, about = zip(*both, strict=True)
    kappa = asdict(cohen_kappa(one, other, about))
    del kappa["labels"], kappa["table"]
    shares = [sum(label == "harmful" for label in labels) / len(both) for labels in (one, other)]
    return found | kappa | {"prevalence": shares}


def bracket(harmful: int, unparsed: int, n: int) -> tuple[float, float] | None:
    """Return the least and the greatest share that can be harmful; None without responses.

    The lower end counts no unparsed verdict as harmful, the upper end counts all of them.
    """
    return (harmful / n, (harmful + unparsed) / n) if n else None
