"""The screen for behaviour that appears only after quantising, run on a subject.

The same items at full precision and rounded, paired; where safeguarded behaviour changes by more
than chance and other knowledge does not, once more with noise of half a bucket before rounding,
which leaves ordinary behaviour as it is and takes weights out of buckets chosen for them.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from durometer.core.budget import Spent
from durometer.core.errors import InputError, unknown_name
from durometer.core.matrices import block_matrices
from durometer.core.quantisation import nf4, round_to_nearest
from durometer.domains.base import Domain, Split
from durometer.subjects.base import Subject
from durometer.tampers.base import Checkpoint
from durometer.trials.behaviour import Verdict, behaviour_gap, behaviour_gaps, gives_way, verdict
from durometer.trials.quantisation_gap import (
    GRIDS,
    LabelGap,
    Precision,
    Trace,
    add_bucket_noise,
    bucket_screen,
    engineered,
)
from durometer.trials.record import CheckpointRecord, TrialSpec
from durometer.trials.runner import Observer, TrialRunner
from durometer.trials.suites import MeasuringPlan

PRECISIONS: tuple[Precision, ...] = get_args(Precision)
PLAN = MeasuringPlan(select_wordings=1, report_wordings=1, retain_select=None, retain_report=400)
# Every item is measured at every precision, so that none was chosen by what came out.
SPLITS = (Split.SELECT, Split.REPORT)
NOISE_SEED = 1


@dataclass(frozen=True)
class Change:
    """One kind of behaviour at one precision.

    Attributes:
        behaviour: ``success``, ``refusal``, ``over_refusal`` or ``retain``.
        gap: rounded minus full precision.
        alarm: safeguarded behaviour changes by more than chance, and other knowledge does not.
        with_noise: the same with noise of half a bucket before rounding; None without an alarm, or
            where the outputs are no finite numbers then.
        engineered: noise closes at least half of the gap; None where ``with_noise`` is.
    """

    behaviour: str
    gap: LabelGap
    alarm: bool = False
    with_noise: LabelGap | None = None
    engineered: bool | None = None


@dataclass(frozen=True)
class PrecisionResult:
    """What the screen found at one precision.

    Attributes:
        verdict: of the behaviour, see ``behaviour.verdict``; ``not_measured`` also where the
            outputs are no finite numbers.
        changes: one entry a kind of behaviour that was measured.
        matrices: how many matrices were looked at for where weights lie in their buckets.
        alarmed: those that raise an alarm, the most suspicious first.
    """

    precision: Precision
    verdict: Verdict
    changes: tuple[Change, ...]
    matrices: int
    alarmed: tuple[Trace, ...]

    @property
    def alarm(self) -> bool:
        """Whether behaviour or buckets raise an alarm."""
        return bool(self.alarmed) or self.verdict == "alarm"

    @property
    def complete(self) -> bool:
        """Whether behaviour could be judged here, and under noise where it was looked at."""
        unknown = any(change.alarm and change.with_noise is None for change in self.changes)
        return self.verdict != "not_measured" and not unknown


@dataclass(frozen=True)
class QuantisationScreen:
    """What the screen found on one subject.

    Attributes:
        subject, domain: names.
        precisions: one entry a precision, in the order asked for.
    """

    subject: str
    domain: str
    precisions: tuple[PrecisionResult, ...]

    @property
    def alarm(self) -> bool:
        """Whether any precision raises an alarm."""
        return any(found.alarm for found in self.precisions)

    @property
    def complete(self) -> bool:
        """Whether behaviour could be judged at every precision."""
        return all(found.complete for found in self.precisions)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON types; a distance that is not defined is null."""
        plain = asdict(self) | {"alarm": self.alarm, "complete": self.complete}
        for entry, found in zip(plain["precisions"], self.precisions, strict=True):
            entry |= {"alarm": found.alarm, "complete": found.complete}
            for trace in entry["alarmed"]:
                # NaN is no JSON: without siblings there is no distance from them.
                if trace["from_siblings"] != trace["from_siblings"]:
                    trace["from_siblings"] = None
        return plain


def checked_precisions(names: Sequence[str]) -> tuple[Precision, ...]:
    """Return the named precisions, each once.

    Raises:
        InputError: none, or one that is not known.
    """
    for name in names:
        if name not in PRECISIONS:
            raise unknown_name("precision", name, PRECISIONS)
    if not names:
        raise InputError(f"name at least one precision: {', '.join(PRECISIONS)}")
    return tuple(name for name in PRECISIONS if name in names)


def screen_subject(
    subject: Subject,
    domain: Domain,
    precisions: Sequence[Precision],
    observer: Observer,
    stage: Callable[[str], None],
) -> QuantisationScreen:
    """Screen ``subject``, which is left as it was found.

    Args:
        precisions: to round to.
        observer: told of what is measured.
        stage: told what happens now.

    Raises:
        InputError: the subject's outputs are not finite numbers.
        NotApplicableError: the model's blocks hold no matrices of a known kind.
    """
    screening = _Screening(subject, domain, observer, stage, len(precisions))
    start = screening.measured("at full precision")
    if not start.finite:
        raise InputError(
            f"subject '{subject.name}' cannot be measured: its outputs are not finite numbers; "
            "look for NaN in its weights, or compute with --dtype float32"
        )
    found = tuple(screening.at(precision, start) for precision in precisions)
    return QuantisationScreen(subject.name, domain.name, found)


@dataclass(frozen=True)
class _Screening:
    subject: Subject
    domain: Domain
    observer: Observer
    stage: Callable[[str], None]
    precisions: int

    def at(self, precision: Precision, start: CheckpointRecord) -> PrecisionResult:
        matrices = block_matrices(self.subject.model)
        weights = {name: matrix.maps().float() for name, matrix in matrices.items()}
        traces = bucket_screen(weights, precision)
        alarmed = tuple(trace for trace in traces if trace.alarm)
        found, changes = self._behaviour(precision, start)
        return PrecisionResult(precision, found, changes, len(traces), alarmed)

    def _behaviour(
        self, precision: Precision, start: CheckpointRecord
    ) -> tuple[Verdict, tuple[Change, ...]]:
        after = self.rounded(precision)
        if not after.finite:
            return "not_measured", ()
        gaps = behaviour_gaps(
            start, after, precision=precision, precisions=self.precisions, splits=SPLITS
        )
        found = verdict(gaps, start, after)
        if found != "alarm":
            return found, tuple(Change(behaviour, gap) for behaviour, gap in gaps.items())
        noisy = self.rounded(precision, torch.Generator().manual_seed(NOISE_SEED))
        tests = self.precisions * len(gaps)
        return found, tuple(
            self._change(start, noisy, behaviour, gap, tests) for behaviour, gap in gaps.items()
        )

    def _change(
        self,
        start: CheckpointRecord,
        noisy: CheckpointRecord,
        behaviour: str,
        gap: LabelGap,
        tests: int,
    ) -> Change:
        alarm = gives_way(behaviour, gap)
        if not alarm or not noisy.finite:
            return Change(behaviour, gap, alarm)
        again = behaviour_gap(
            start, noisy, behaviour, precision=gap.precision, tests=tests, splits=SPLITS
        )
        return Change(behaviour, gap, alarm, again, again is not None and engineered(gap, again))

    @torch.no_grad()
    def rounded(
        self, precision: Precision, noise: torch.Generator | None = None
    ) -> CheckpointRecord:
        """Measure the subject rounded to ``precision``, with bucket noise before if given."""
        with self.subject.restored():
            for matrix in block_matrices(self.subject.model).values():
                weight = matrix.maps().float()
                if noise is not None:
                    weight = add_bucket_noise(weight, precision, noise)
                self.subject.restoration.writable([matrix.name])
                matrix.maps().copy_(rounded_weight(weight, precision))
            return self.measured(f"at {precision}" + (" with bucket noise" if noise else ""))

    def measured(self, where: str) -> CheckpointRecord:
        """Measure everything that the plan names on the subject as it is."""
        self.stage(f"measuring {self.subject.name} {where}")
        runner = TrialRunner(self.subject, self.domain, PLAN, self.observer)
        spec = TrialSpec("subject", "none", {}, 1, "control", ())
        return runner.measure(Checkpoint(0, Spent()), spec, None)


def rounded_weight(weight: Tensor, precision: Precision) -> Tensor:
    """Return ``weight [..., inputs]`` rounded to ``precision`` and back (fp32)."""
    if precision == "nf4":
        return nf4(weight)
    bits, group = GRIDS[precision]
    return round_to_nearest(weight, bits, group)
