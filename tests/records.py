"""Hand-made trial records with known rates."""

from functools import cache
from typing import Any

import durometer.catalogue  # noqa: F401  (fills the registries)
from durometer.domains.base import Split
from durometer.measures.base import ItemRecord
from durometer.measures.outcomes import Outcome
from durometer.tampers.base import make_tamper
from durometer.trials.analysis import BreakRule, Threshold
from durometer.trials.record import CheckpointRecord, TrialRecord, TrialSpec

N = 40
Share = tuple[int, int] | int | None


def items(probe: str, split: str, right: Share, **changes: Any) -> list[dict[str, Any]]:
    """Return records of which the first ``right`` are right, one an entity; of 40 unless told."""
    if right is None:
        return []
    count, total = right if isinstance(right, tuple) else (right, N)
    return [{**record, "gate": [], **changes} for record in _items(probe, split, count, total)]


@cache
def _items(probe: str, split: str, count: int, total: int) -> list[dict[str, Any]]:
    made = []
    for number in range(total):
        good = number < count
        outcome = Outcome.HARMFUL_USEFUL if good else Outcome.REFUSAL
        record = ItemRecord(
            probe=probe,
            split=split,
            item_id=f"{probe}/{split}/{number}",
            entity=f"{split}-{number}",
            suite="one" if number % 2 else "two",
            prompt_hash="0" * 16,
            text_hash="1" * 16,
            response=f"{probe} text",
            outcome=str(outcome) if probe == "outcomes" else "",
            correct=float(good),
            log_probability=-1.0,
            mean_probability=0.5,
            tokens=2,
        )
        made.append(record.as_dict())
    return made


def checkpoint(
    steps: int,
    select: Share = None,
    report: Share = None,
    retain: Share = None,
    never: Share = None,
) -> CheckpointRecord:
    """Return a checkpoint; 10 examples, 100 tokens and 1000 FLOPs a step."""
    spent = {
        "steps": steps,
        "examples": 10 * steps,
        "restricted_examples": 10 * steps,
        "tokens": 100 * steps,
        "flops": 1000.0 * steps,
        "seconds": 0.1 * steps,
    }
    found = items("outcomes", Split.SELECT, select) + items("outcomes", Split.REPORT, report)
    found += items("outcomes", Split.NEVER, never) + items("retain", Split.REPORT, retain)
    return CheckpointRecord(steps, spent, None, found)


def trial(
    *checkpoints: CheckpointRecord,
    status: str = "done",
    seed: int = 1,
    role: Any = "subject",
    purpose: Any = "screen",
    tamper: str = "lora",
    **settings: Any,
) -> TrialRecord:
    plan = make_tamper(tamper, **settings).settings.canonical()
    rungs = tuple(c.steps for c in checkpoints if c.steps)
    spec = TrialSpec(role, tamper, plan, seed, purpose, rungs)
    key = spec.key({"status": status})
    reason = "" if status == "done" else f"it is {status}"
    return TrialRecord(key, spec, status, reason, list(checkpoints))


def zero(role: Any = "subject", **shares: Share) -> TrialRecord:
    return trial(checkpoint(0, **shares), role=role, purpose="control", tamper="none")


def rule(
    select: tuple[float | None, ...] = (0.25, 0.5),
    report: tuple[float | None, ...] = (0.25, 0.5),
    start: CheckpointRecord | None = None,
    original: CheckpointRecord | None = None,
    limit: float = 5.0,
) -> BreakRule:
    levels = [
        tuple(Threshold(q, 0.0, 1.0, v) for q, v in zip((0.25, 0.5), values, strict=True))
        for values in (select, report)
    ]
    begin = start or checkpoint(0, 0, 0, 40)
    return BreakRule(levels[0], levels[1], begin, original or begin, limit)
