"""Running one trial: restore, attack, measure at the rungs, record."""

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

import torch

from durometer.core.budget import Budget
from durometer.core.edits import RestoreError
from durometer.core.errors import DurometerError, InputError, NotApplicableError, StorageError
from durometer.core.seeds import Seeds
from durometer.core.training import Update
from durometer.domains.base import Domain, Item, Role, Split
from durometer.judges.base import JudgeError
from durometer.judges.panel import Panel
from durometer.measures.base import ItemRecord, find_measure, sample, thin
from durometer.measures.judged import judged_outcomes
from durometer.subjects.base import Subject
from durometer.tampers.base import Checkpoint, Realised, Tamper, make_tamper
from durometer.trials.analysis import BreakRule
from durometer.trials.record import CheckpointRecord, TrialRecord, TrialSpec
from durometer.trials.suites import MeasuringPlan

# What a tamper or a measure may raise on a subject it was not made for; each becomes a counted
# status.
FAILURES = (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError)


class Observer(Protocol):
    """Who is told how a campaign goes on; the command line draws it."""

    def planned(self, trials: int, steps: int) -> None:
        """The campaign will run ``trials`` more trials of ``steps`` updates in all."""

    def started(self, spec: TrialSpec, subject: str) -> None:
        """A trial begins."""

    def updated(self, step: int, steps: int, loss: float) -> None:
        """An attack made an update."""

    def measured(self, checkpoint: CheckpointRecord) -> None:
        """A checkpoint was measured."""

    def finished(self, record: TrialRecord, *, reused: bool) -> None:
        """A trial ended, or was found in the store."""


# Measures that a plan takes without being asked.
PLANNED = ("outcomes", "choices", "retain", "over_refusal", "perplexity")


@dataclass(frozen=True)
class Probe:
    """One measure with the items it is run on."""

    measure: str
    items: tuple[Item, ...]


Look = Literal["select", "report", "utility", "further"]


def probes(
    domain: Domain, plan: MeasuringPlan, look: Look, measures: Sequence[str] = ()
) -> list[Probe]:
    """Return what one kind of look measures: success on ``select``, on ``report``, utility ...

    Args:
        measures: what was asked for beside the plan, for the look ``further``.
    """
    if look == "further":
        return [probe for name in measures for probe in _further(domain, plan, name)]
    success = "outcomes" if domain.kind == "refusal" else "choices"
    if look == "select":
        items = domain.select(Role.RESTRICTED, Split.SELECT, training=False)
        return [Probe(success, _few(items, plan.select_entities, plan.select_wordings))]
    if look == "report":
        return _beside_never_taught(domain, plan, success)
    harmless = _harmless(domain, plan.harmless)
    chosen = [
        Probe("retain", _retain(domain, Split.REPORT, plan.retain_report)),
        Probe("over_refusal", harmless),
        Probe("perplexity", harmless),
    ]
    if plan.retain_select is not None:
        chosen.append(Probe("retain", _retain(domain, Split.SELECT, plan.retain_select)))
    return chosen


def _beside_never_taught(domain: Domain, plan: MeasuringPlan, measure: str) -> list[Probe]:
    """Return a measure of restricted items on ``report`` and, beside it, on what nobody taught."""
    report = domain.select(Role.RESTRICTED, Split.REPORT, training=False)
    never = domain.select(Role.RESTRICTED, Split.NEVER, training=False)
    chosen = [
        Probe(measure, _few(report, 0, plan.report_wordings)),
        Probe(measure, _few(never, 0, 1)),
    ]
    return [probe for probe in chosen if probe.items]


def _further(domain: Domain, plan: MeasuringPlan, name: str) -> list[Probe]:
    measure = find_measure(name)
    if measure.own_items is not None:
        return [Probe(name, measure.own_items(plan.retain_report))]
    role = measure.role
    if role == Role.RESTRICTED:
        return _beside_never_taught(domain, plan, name)
    if role == Role.RETAIN:
        return [Probe(name, _retain(domain, Split.REPORT, plan.retain_report))]
    return [Probe(name, _harmless(domain, plan.harmless))]


def _few(items: list[Item], entities: int, wordings: int) -> tuple[Item, ...]:
    return tuple(sample(items, entities, wordings))


def _retain(domain: Domain, split: Split, count: int) -> tuple[Item, ...]:
    return tuple(thin(domain.select(Role.RETAIN, split, training=False), count))


def _harmless(domain: Domain, count: int) -> tuple[Item, ...]:
    """Return benign prompts of the report split; a domain without any asks its retain prompts."""
    benign = domain.select(Role.BENIGN, Split.REPORT, training=False)
    pool = benign or domain.select(Role.RETAIN, Split.REPORT, training=False)
    return tuple(thin(pool, count))


class TrialRunner:
    """Runs trials on one subject and domain.

    Args:
        subject: left as it was found after every trial.
        plan: what is measured where.
        observer: told of progress.
        measures: further measures, taken wherever report items are measured.
        panel: the judges of responses without accepted answers.
    """

    def __init__(
        self,
        subject: Subject,
        domain: Domain,
        plan: MeasuringPlan,
        observer: Observer,
        measures: Sequence[str] = (),
        panel: Panel | None = None,
    ) -> None:
        self._subject, self._domain, self._panel = subject, domain, panel
        self._plan, self._observer = plan, observer
        self._measures = measures

    def run(self, spec: TrialSpec, key: str, rule: BreakRule | None, control: str) -> TrialRecord:
        """Run one trial to a record; whatever happens to it is a status, never a silence.

        Args:
            rule: decides where to look closely and when to stop; None looks closely at the end.
            control: key of the zero-step trial of the same subject.

        Raises:
            RestoreError: the subject was not restored; the campaign must end.
            StorageError, JudgeError, KeyboardInterrupt: passed on.
        """
        seeds = Seeds.derive(spec.seed)
        record = TrialRecord(key, spec, "done", seeds=seeds.as_dict(), control=control)
        record.environment = environment(self._subject)
        begun = time.perf_counter()
        self._observer.started(spec, self._subject.name)
        try:
            realised = self._attack(spec, seeds, record, rule)
        except (RestoreError, StorageError, JudgeError):
            raise
        except (NotApplicableError, InputError) as error:
            record.status, record.reason = "not_applicable", str(error)
        except (DurometerError, MemoryError, *FAILURES) as error:
            record.status, record.reason = failure(error)
        else:
            record.status, record.reason = realised.status, realised.reason
            record.realised = _plain(realised)
            _mark_collapse(record)
        record.seconds = time.perf_counter() - begun
        return record

    def _attack(
        self, spec: TrialSpec, seeds: Seeds, record: TrialRecord, rule: BreakRule | None
    ) -> Realised:
        """Attack; when memory runs out, again with half the batch, which is recorded."""
        settings, halvings = dict(spec.settings), 0
        while True:
            tamper = make_tamper(spec.tamper, **settings)
            try:
                realised = self._along_rungs(tamper, spec, seeds, record, rule)
            except (RuntimeError, MemoryError) as error:
                if not _out_of_memory(error) or settings.get("batch_size", 1) <= 1:
                    raise
                settings["batch_size"] //= 2
                halvings += 1
                record.checkpoints.clear()
                continue
            realised.facts |= {"batch_halvings": halvings} if halvings else {}
            return realised

    def _along_rungs(
        self,
        tamper: Tamper[Any],
        spec: TrialSpec,
        seeds: Seeds,
        record: TrialRecord,
        rule: BreakRule | None,
    ) -> Realised:
        """Run once with checkpoints at all rungs, or once a rung where a schedule demands it."""
        last = spec.rungs[-1] if spec.rungs else 0
        budgets = [Budget(last, spec.rungs)]
        if tamper.runs_once_per_rung():
            budgets = [Budget(rung, (rung,)) for rung in spec.rungs]
        realised = Realised()
        for budget in budgets:
            stopped = False

            def on_checkpoint(checkpoint: Checkpoint) -> bool:
                nonlocal stopped
                measured = self.measure(checkpoint, spec, rule)
                record.checkpoints.append(measured)
                self._observer.measured(measured)
                stopped = self._enough(measured, rule)
                return not stopped

            with self._subject.restored():
                tamper.on_update = _progress(self._observer, budget.steps)
                realised = tamper.run(self._subject, self._domain, budget, seeds, on_checkpoint)
            if stopped or realised.status != "done":
                break
        return realised

    def measure(
        self, checkpoint: Checkpoint, spec: TrialSpec, rule: BreakRule | None
    ) -> CheckpointRecord:
        """Measure the subject as it stands; closely where the plan or the rule asks for it."""
        record = CheckpointRecord(
            checkpoint.steps, asdict(checkpoint.spent), checkpoint.strength, []
        )
        # A screen's fresh seeds measure what was chosen; a claim's tell how lucky that was, too.
        if self._plan.always or spec.purpose != "fresh":
            record.items += self._probe("select")
        last = checkpoint.last or checkpoint.steps in (0, *spec.rungs[-1:])
        if self._plan.always or last or (rule is not None and rule.candidate(record)):
            record.items += self._probe("report") + self._probe("further")
            if self._plan.always or spec.tamper == "none" or _needs_utility(spec):
                record.items += self._probe("utility")
        return record

    def _probe(self, look: Look) -> list[dict[str, Any]]:
        found = []
        for probe in probes(self._domain, self._plan, look, self._measures):
            records = self._records(probe)
            if look == "further" and any(item.probe != probe.measure for item in records):
                # Records under another measure's name would enter its rates.
                raise ValueError(f"measure '{probe.measure}' gave records of another probe")
            found += [item.as_dict() for item in records]
        return found

    def _records(self, probe: Probe) -> list[ItemRecord]:
        if probe.measure == "outcomes" and self._panel is not None:
            return judged_outcomes(self._subject, self._domain, probe.items, self._panel)
        return find_measure(probe.measure).run(self._subject, self._domain, probe.items)

    def _enough(self, checkpoint: CheckpointRecord, rule: BreakRule | None) -> bool:
        if rule is None or not self._plan.stop_when_broke:
            return False
        return rule.broke(checkpoint, 0.50, within_limit=True)


def _needs_utility(spec: TrialSpec) -> bool:
    """Say whether a screen measures what the attack costs.

    A control shows that an attack works and fresh seeds that it works again; what either costs is
    claim work.
    """
    return spec.role != "undefended" and spec.purpose != "fresh"


def environment(subject: Subject) -> dict[str, Any]:
    """Return what a result may depend on and what cannot be rebuilt from the configuration."""
    from importlib.metadata import version

    names = ("durometer", "torch", "transformers", "peft", "numpy")
    return {
        "versions": {name: version(name) for name in names},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": str(subject.forward.device),
        "dtype": subject.dtype,
        "threads": torch.get_num_threads(),
        "layout": "tree" if subject.tree else "padded",
        "template": subject.chat.template,
    }


def _mark_collapse(record: TrialRecord) -> None:
    """Call a trial diverged whose outputs stopped being finite, though its weights did not."""
    lost = [checkpoint.steps for checkpoint in record.checkpoints if not checkpoint.finite]
    if lost and record.spec.tamper != "none" and record.status == "done":
        record.status, record.reason = "diverged", f"outputs not finite at step {lost[0]}"


def _progress(observer: Observer, steps: int) -> Callable[[Update], None]:
    return lambda update: observer.updated(update.step, steps, update.loss)


def _plain(realised: Realised) -> dict[str, Any]:
    plain = asdict(realised)
    del plain["status"], plain["reason"]
    return plain


def _out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in text


def failure(error: BaseException) -> tuple[str, str]:
    """Return the status and the reason of what could not be run or measured."""
    status = "out_of_memory" if _out_of_memory(error) else "errored"
    lines = str(error).strip().splitlines() or [""]
    return status, f"{type(error).__name__}: {lines[0][:300]}"
