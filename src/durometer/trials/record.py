"""What is planned and what is recorded of one trial."""

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from durometer.core.settings import digest_of
from durometer.measures.base import NOT_FINITE

SubjectRole = Literal["subject", "undefended", "reference"]
Purpose = Literal["control", "screen", "matched", "fresh"]
STATUSES = (
    "done",
    "diverged",
    "no_effect",
    "out_of_memory",
    "not_applicable",
    "errored",
    "interrupted",
)
# Statuses whose checkpoints count in rates; a diverged trial is right-censored where it ended.
COUNTED = ("done", "diverged")


@dataclass(frozen=True)
class TrialSpec:
    """One planned trial.

    Attributes:
        role: which subject is attacked.
        tamper: canonical name.
        settings: every setting of the tamper, defaults written out.
        seed: base seed from which the four are derived.
        purpose: ``control``, ``screen`` (select and rank), ``matched`` (the same means with random
            content) or ``fresh`` (re-measure the worst).
        rungs: steps at which the subject is measured, ascending.
    """

    role: SubjectRole
    tamper: str
    settings: dict[str, Any]
    seed: int
    purpose: Purpose
    rungs: tuple[int, ...]

    @property
    def configuration(self) -> str:
        """Hash of tamper and settings, without the seed."""
        return digest_of([self.tamper, self.settings])[:12]

    def key(self, context: dict[str, Any]) -> str:
        """Return the resume key: a hash of the trial and of everything that shapes its result.

        Args:
            context: fingerprints, domain, measuring plan, thresholds, versions.
        """
        return digest_of([asdict(self) | {"rungs": list(self.rungs)}, context])


@dataclass
class CheckpointRecord:
    """One stop of a trial: what was spent so far, and one record an item.

    ``items`` are the fields of ``measures.base.ItemRecord``.
    """

    steps: int
    spent: dict[str, float]
    strength: float | None
    items: list[dict[str, Any]]

    @property
    def finite(self) -> bool:
        """Whether every output measured here was a finite number."""
        return all(item.get("parse_status") != NOT_FINITE for item in self.items)

    def probe(self, name: str, split: str | None = None) -> list[dict[str, Any]]:
        """Return the item records of one measure (and split)."""
        return [
            item
            for item in self.items
            if item["probe"] == name and (split is None or item["split"] == split)
        ]


@dataclass
class TrialRecord:
    """Everything kept of one trial.

    Attributes:
        status: one of ``STATUSES``.
        reason: one line for every status but ``done``.
        seeds: the four seeds.
        realised: fields of ``tampers.base.Realised`` but status, reason.
        control: key of the zero-step trial whose measures stand for this trial's step 0.
        environment: versions, dtype, threads, device.
        seconds: wall-clock time, measuring included.
    """

    key: str
    spec: TrialSpec
    status: str
    reason: str = ""
    checkpoints: list[CheckpointRecord] = field(default_factory=list)
    seeds: dict[str, int] = field(default_factory=dict)
    realised: dict[str, Any] = field(default_factory=dict)
    control: str = ""
    environment: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def valid(self) -> list[CheckpointRecord]:
        """The checkpoints before the first whose outputs are not finite; these are analysed."""
        return list(itertools.takewhile(lambda c: c.finite, self.checkpoints))

    def as_dict(self) -> dict[str, Any]:
        """Return the record as plain JSON types."""
        plain = asdict(self)
        plain["spec"]["rungs"] = list(self.spec.rungs)
        return plain

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> "TrialRecord":
        """Return the record that ``as_dict`` gave."""
        spec = plain["spec"] | {"rungs": tuple(plain["spec"]["rungs"])}
        checkpoints = [CheckpointRecord(**checkpoint) for checkpoint in plain["checkpoints"]]
        return cls(**(plain | {"spec": TrialSpec(**spec), "checkpoints": checkpoints}))

    def item_rows(self) -> Iterator[dict[str, Any]]:
        """Yield one flat row an item record, as written to ``trials.jsonl``."""
        head = {
            "trial": self.key,
            "role": self.spec.role,
            "tamper": self.spec.tamper,
            "configuration": self.spec.configuration,
            "purpose": self.spec.purpose,
            "seed": self.spec.seed,
            "status": self.status,
        }
        for checkpoint in self.checkpoints:
            place = {"steps": checkpoint.steps, "strength": checkpoint.strength}
            for item in checkpoint.items:
                yield head | place | item
