"""The states of a run that a section of the report shows, and where each was last looked at."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from durometer.report.further import PLACES
from durometer.trials.record import COUNTED, CheckpointRecord, SubjectRole, TrialRecord

__all__ = ["State", "last_looks", "states_of"]

Look = tuple[TrialRecord, CheckpointRecord]


@dataclass(frozen=True)
class State:
    """A subject as it was, or as an attack left it.

    Attributes:
        name: for a reader.
        role: which subject.
        looks: one a seed, the longest first; a seed without a close look is in none.
    """

    name: str
    role: SubjectRole
    looks: tuple[Look, ...]

    @property
    def checkpoints(self) -> list[CheckpointRecord]:
        """What was measured, one a seed."""
        return [checkpoint for _, checkpoint in self.looks]


def last_looks(
    trials: Sequence[TrialRecord], items: Callable[[CheckpointRecord], Sequence[Any]]
) -> list[Look]:
    """Return every counted trial with the last of its checkpoints that has ``items``.

    Each trial at its own end: one that was stopped because it broke ended sooner than others, and
    must not be left out for it.
    """
    close = [(t, [c for c in t.valid if items(c)]) for t in trials if t.status in COUNTED]
    return [(trial, found[-1]) for trial, found in close if found]


def states_of(
    baselines: Mapping[SubjectRole, TrialRecord],
    attacks: Sequence[Sequence[TrialRecord]],
    label: Callable[[str, dict[str, Any]], str],
    items: Callable[[CheckpointRecord], Sequence[Any]],
) -> list[State]:
    """Return the state of every role before any tamper, and of the subject after every attack.

    Args:
        attacks: trials on the subject, grouped by configuration.
        label: short readable name of a tamper with its settings.
        items: what a close look has.
    """
    found = [
        State(f"{PLACES[role]}, untampered", role, tuple(last_looks([trial], items)))
        for role, trial in baselines.items()
    ]
    for group in attacks:
        looks = sorted(last_looks(group, items), key=lambda look: -look[1].steps)
        spec = group[0].spec
        found.append(State(label(spec.tamper, spec.settings), "subject", tuple(looks)))
    return [state for state in found if state.looks]
