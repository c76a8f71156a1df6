"""Where every trial of an attack was last looked at closely."""

from collections.abc import Callable, Sequence
from typing import Any

from durometer.trials.record import COUNTED, CheckpointRecord, TrialRecord

__all__ = ["last_looks"]


def last_looks(
    trials: Sequence[TrialRecord], items: Callable[[CheckpointRecord], Sequence[Any]]
) -> list[tuple[TrialRecord, CheckpointRecord]]:
    """Return every counted trial with the last of its checkpoints that has ``items``.

    Each trial at its own end: one that was stopped because it broke ended sooner than others, and
    must not be left out for it.
    """
    close = [(t, [c for c in t.valid if items(c)]) for t in trials if t.status in COUNTED]
    return [(trial, found[-1]) for trial, found in close if found]
