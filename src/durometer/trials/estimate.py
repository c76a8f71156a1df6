"""What a campaign would take, measured on the real subject before anything is run in earnest."""

import json
import shutil
import tempfile
import time
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch

from durometer.core.budget import Budget
from durometer.core.errors import DurometerError
from durometer.core.seeds import Seeds
from durometer.core.training import Update
from durometer.measures.base import find_measure
from durometer.measures.judged import JUDGED_TOKENS
from durometer.subjects.base import Subject
from durometer.tampers.base import Tamper, make_tamper
from durometer.trials.campaign import Campaign, Request
from durometer.trials.record import SubjectRole, TrialSpec
from durometer.trials.runner import FAILURES, Look, Observer, probes
from durometer.trials.store import Store

UPDATES, ITEMS = 4, 8
# The outputs that do not grow with the trials, above all the report page with its figures.
FIXED_BYTES = 6_000_000
# What says in ``trials.jsonl`` which trial and stop a row belongs to.
HEAD_BYTES = 250


@dataclass(frozen=True)
class Cost:
    """Seconds and bytes."""

    seconds: float = 0.0
    disk: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.seconds + other.seconds, self.disk + other.disk)

    def __mul__(self, factor: float) -> "Cost":
        return Cost(self.seconds * factor, self.disk * factor)


@dataclass(frozen=True)
class Estimate:
    """What a campaign would take.

    Attributes:
        trials: planned trials, controls included.
        updates: optimiser updates at most.
        seconds: wall-clock time at most: every attack to its last step, a close look at every stop.
        seconds_unbroken: the same when no attack comes near a break; a break ends a screen's attack
            sooner still.
        memory, memory_free: peak of this process while it measured, and what the machine has left.
        disk, disk_free: what the run folder would take at most, and what its place has left.
        not_measured: attacks that could not be tried here, with the reason.
    """

    trials: int
    updates: int
    seconds: float
    seconds_unbroken: float
    memory: int
    memory_free: int
    disk: int
    disk_free: int
    not_measured: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON types."""
        return asdict(self)


def estimate(request: Request, folder: Path, observer: Observer) -> Estimate:
    """Return what ``request`` would take; a few updates of each attack are made and undone.

    Args:
        request: what would be run.
        folder: the run folder it would be written to; it is not made.
        observer: as for a campaign.

    Raises:
        InputError: whatever would end the campaign before its first trial.
    """
    with tempfile.TemporaryDirectory() as place:
        store = Store(Path(place))
        try:
            campaign = Campaign.prepare(request, store, observer, judged=False)
            found = _Estimator(campaign).estimate(folder)
        finally:
            store.close()
    if not request.judges:
        return found
    untimed = f"verdicts, and responses of up to {JUDGED_TOKENS} tokens, come on top"
    return replace(found, not_measured={**found.not_measured, "judges": untimed})


class _Estimator:
    """Times the parts of a campaign on its subject."""

    def __init__(self, campaign: Campaign) -> None:
        self._campaign = campaign
        self._subject = campaign.subjects["subject"]
        self._peak = 0
        self._failures: dict[str, str] = {}
        # Fixed seconds of a trial and seconds of an update of batch size 1, by tamper.
        self._attacks: dict[str, tuple[float, float]] = {}

    def estimate(self, folder: Path) -> Estimate:
        """Return the sum over all planned trials."""
        campaign = self._campaign
        looks: dict[Look, Cost] = {
            look: self._look(look) for look in ("select", "report", "utility", "further")
        }
        specs = campaign.specs()
        fresh = [s for s in specs if s.role == "subject" and s.tamper != "none"]
        most, least = Cost(), Cost()
        for spec in specs:
            most += self._trial(spec, looks, always=True)
            least += self._trial(spec, looks, always=campaign.suite.plan.always)
        if fresh:
            again = [self._trial(s, looks, always=False) for s in fresh]
            longest = max(again, key=lambda cost: cost.seconds) * campaign.suite.fresh_seeds
            most, least = most + longest, least + longest
        count = campaign.suite.fresh_seeds if fresh else 0
        return Estimate(
            trials=len(specs) + count,
            updates=sum(_updates(s) for s in specs) + count * max(map(_updates, fresh), default=0),
            seconds=most.seconds,
            seconds_unbroken=least.seconds,
            memory=self._peak + _device_peak(),
            memory_free=psutil.virtual_memory().available,
            disk=round(most.disk) + FIXED_BYTES,
            disk_free=shutil.disk_usage(_existing(folder)).free,
            not_measured=self._failures,
        )

    def _trial(self, spec: TrialSpec, looks: dict[Look, Cost], *, always: bool) -> Cost:
        """Return the cost of one trial to its last step, with close looks always or at the end."""
        stops = max(len(spec.rungs), 1)
        close = looks["report"] + looks["utility"] + looks["further"]
        measuring = looks["select"] * stops + close * (stops if always else 1)
        if spec.tamper == "none":
            return measuring * self._scale(spec.role)
        tamper = make_tamper(spec.tamper, **spec.settings)
        fixed, update = self._attack(tamper)
        batch = spec.settings.get("batch_size", 1)
        runs = stops if tamper.runs_once_per_rung() else 1
        attack = Cost(runs * fixed + _updates(spec) * update * batch)
        return (measuring + attack) * self._scale(spec.role)

    def _scale(self, role: SubjectRole) -> float:
        """Return how much larger another subject is; time is taken to grow with its weights."""
        return self._campaign.subjects[role].parameters / max(self._subject.parameters, 1)

    def _attack(self, tamper: Tamper[Any]) -> tuple[float, float]:
        if tamper.name not in self._attacks:
            try:
                self._attacks[tamper.name] = self._timed(tamper)
            except (DurometerError, MemoryError, *FAILURES) as error:
                self._failures[tamper.name] = f"{type(error).__name__}: {error}"
                self._attacks[tamper.name] = (0.0, 0.0)
        return self._attacks[tamper.name]

    def _timed(self, tamper: Tamper[Any]) -> tuple[float, float]:
        """Attack for a few updates; return the fixed seconds and those of an update a row."""
        marks: list[float] = []
        tamper.on_update = partial(self._mark, marks)
        steps = min(tamper.planned_steps(), UPDATES)
        _ = self._subject.fingerprint  # computed once, not once a trial
        begun = time.perf_counter()
        with self._subject.restored():
            tamper.run(
                self._subject,
                self._campaign.domain,
                Budget(steps, (steps,) if steps else ()),
                Seeds.derive(0),
                lambda checkpoint: True,
            )
        total = time.perf_counter() - begun
        self._note_memory()
        update = max((after - before for before, after in pairwise(marks)), default=0.0)
        batch = getattr(tamper.settings, "batch_size", 1)
        return max(total - update * len(marks), 0.0), update / batch

    def _mark(self, marks: list[float], update: Update) -> None:
        marks.append(time.perf_counter())
        self._note_memory()

    def _look(self, look: Look) -> Cost:
        """Return the cost of one look, from a few of its items, on the slower of the subjects."""
        slowest = Cost()
        for role, subject in self._campaign.subjects.items():
            scaled = self._measured(subject, look)
            scaled = Cost(scaled.seconds / self._scale(role), scaled.disk)
            slowest = max(slowest, scaled, key=lambda cost: cost.seconds)
        return slowest

    def _measured(self, subject: Subject, look: Look) -> Cost:
        campaign, cost = self._campaign, Cost()
        further = campaign.request.measures
        for probe in probes(campaign.domain, campaign.suite.plan, look, further):
            measure, items = find_measure(probe.measure), probe.items[:ITEMS]
            if not items:
                continue
            begun = time.perf_counter()
            records = measure.run(subject, campaign.domain, items)
            seconds = time.perf_counter() - begun
            self._note_memory()
            size = _stored([record.as_dict() for record in records])
            cost += Cost(seconds, size) * (len(probe.items) / len(items))
        return cost

    def _note_memory(self) -> None:
        self._peak = max(self._peak, psutil.Process().memory_info().rss)


def _updates(spec: TrialSpec) -> int:
    """Return the updates of a trial; a decaying schedule needs a run for every stop."""
    if not spec.rungs:
        return 0
    once = make_tamper(spec.tamper, **spec.settings).runs_once_per_rung()
    return sum(spec.rungs) if once else spec.rungs[-1]


def _stored(rows: Sequence[dict[str, Any]]) -> int:
    """Return the bytes of item records in the store and in ``trials.jsonl``."""
    text = json.dumps(rows).encode()
    return len(zlib.compress(text, 6)) + len(text) + HEAD_BYTES * len(rows)


def _device_peak() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def _existing(folder: Path) -> Path:
    """Return the nearest folder that exists."""
    folder = folder.absolute()
    return next(place for place in (folder, *folder.parents) if place.is_dir())
