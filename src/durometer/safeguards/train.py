"""The one loop that trains every safeguard: visit, collect gradients, combine, update."""

import functools
import hashlib
import operator
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from durometer.core.adapters import Adapter, Targets, linear_maps
from durometer.core.errors import DurometerError, InputError
from durometer.core.rows import Row
from durometer.core.seeds import Seeds
from durometer.core.structure import blocks, width
from durometer.core.training import DivergedError, OptimisationPlan, Trainer, Update
from durometer.safeguards.attacks import AttackRunner
from durometer.safeguards.banks import GradientBank
from durometer.safeguards.base import Per, Safeguard, Term, TrainingSettings
from durometer.safeguards.bench import Bench
from durometer.safeguards.checkpoint import CheckpointFile
from durometer.safeguards.data import DefenceData, Streams, Unit
from durometer.safeguards.ledger import Ledger
from durometer.safeguards.passes import Pass, Reference, passes
from durometer.subjects.base import Subject

# Updates after which the gradient of every term is looked at by itself: not at once, since an
# anchor's gradient vanishes at its reference; and soon again, for one look proves nothing.
FIRST_LOOK, SECOND_LOOK, LOOK_EVERY = 4, 9, 50
SUM, OWN = "sum", "safeguard."


@dataclass(frozen=True)
class Report:
    """What one update of a safeguard did.

    Attributes:
        update: the optimiser's update; ``loss`` is that of all terms.
        losses: each term's loss times its coefficient, summed over the visits.
        norms: norms of single terms' gradients, at the steps at which they are taken apart.
    """

    update: Update
    losses: dict[str, float]
    norms: dict[str, float]


OnReport = Callable[[Report], None]


@dataclass
class Outcome:
    """How training ended.

    Attributes:
        status: ``done``, ``stopped`` (by the safeguard's own rule) or ``diverged``.
        reason: one line for any status but ``done``.
        learning_rates: the rate of every update.
        losses: what every term added to the loss of every update.
        norms: norms of single terms' gradients, by the number of the update.
        orders: hash of the order of each pool's first epoch.
    """

    status: str = "done"
    reason: str = ""
    steps: int = 0
    ledger: Ledger = field(default_factory=Ledger)
    learning_rates: list[float] = field(default_factory=list)
    losses: list[dict[str, float]] = field(default_factory=list)
    norms: dict[str, dict[str, float]] = field(default_factory=dict)
    orders: dict[str, str] = field(default_factory=dict)


@dataclass
class Step:
    """One update in the making, as the hooks of a safeguard see it.

    Attributes:
        number: from 0.
        steps: planned in all.
        subject: the model in training.
        data: what may be learnt from.
        bank: gradients collected so far.
        attacks: runs inner attacks.
        losses: each term's loss so far, coefficients and weights of visits included.
    """

    number: int
    steps: int
    subject: Subject
    data: DefenceData
    bank: GradientBank
    attacks: AttackRunner
    names: list[str]
    _seeds: Seeds
    _streams: Streams
    losses: dict[str, float] = field(default_factory=dict)
    apart: bool = False
    _rows: dict[str, list[Unit]] = field(default_factory=dict)

    def units(self, pool: str) -> list[Unit]:
        """Return this step's batch of ``pool``, the same however often it is asked for."""
        if pool not in self._rows:
            self._rows[pool] = self._streams.next(pool)
        return self._rows[pool]

    def put(self, pool: str, units: list[Unit]) -> None:
        """Let the terms that read ``pool`` see ``units`` in this step: rows made on the way."""
        self._rows[pool] = units

    def rows(self, pool: str) -> list[Row]:
        """Return the rows of this step's batch of ``pool``."""
        return [row for unit in self.units(pool) for row in unit]

    def seed(self, purpose: str, number: int | None = None) -> int:
        """Return a seed of this step's own, or of ``number`` alone; the same after a resume."""
        return step_seed(self._seeds, purpose, self.number if number is None else number)

    def random(self, purpose: str) -> torch.Generator:
        """Return a generator of this step's own."""
        return torch.Generator().manual_seed(self.seed(purpose))

    def by_name(self, gradients: Sequence[torch.Tensor | None]) -> dict[str, torch.Tensor]:
        """Return gradients by the names of the trained weights."""
        return {
            name: gradient
            for name, gradient in zip(self.names, gradients, strict=True)
            if gradient is not None
        }


def step_seed(seeds: Seeds, purpose: str, number: int) -> int:
    """Return the seed of a purpose in the training step ``number``, 63 bits."""
    text = f"{purpose}:{number}:{seeds.sampling}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


class TrainingRun:
    """One safeguard's training on one subject, in place.

    Args:
        data: what may be learnt from.
        reference: the frozen model, where the safeguard wants one.
        checkpoint: where to keep the state, so that a run that was killed goes on.

    Raises:
        InputError: the domain lacks rows that a term reads.
    """

    def __init__(
        self,
        safeguard: Safeguard[Any],
        subject: Subject,
        data: DefenceData,
        seeds: Seeds,
        *,
        reference: Reference | None = None,
        checkpoint: CheckpointFile | None = None,
    ) -> None:
        settings = safeguard.settings
        if not isinstance(settings, TrainingSettings):
            raise TypeError(f"safeguard '{safeguard.name}' has no training settings")
        self.safeguard, self.subject, self.data, self.seeds = safeguard, subject, data, seeds
        self._settings = settings
        self._reference, self._checkpoint = reference, checkpoint
        data.add(safeguard.pools(data))
        self.terms = safeguard.terms(subject, data)
        for term in self.terms:
            if any(term.weight(step, settings.steps) for step in range(settings.steps)):
                data.pool(term.rows)
        self.outcome = Outcome()
        self._counted = reference.forwards if reference is not None else 0
        self._saved = 0

    def run(self, on_report: OnReport | None = None) -> Outcome:
        """Train, and leave the subject with the trained weights, frozen and in evaluation mode.

        A diverging run ends at its last finite weights, and says so.
        """
        settings, begun = self._settings, time.perf_counter()
        found = self._checkpoint.load() if self._checkpoint is not None else None
        self._watch_device()
        # Also before going on: a checkpoint holds what is trained, not all that this may change.
        self.safeguard.begin(self._bench())
        adapter, parameters, names = trained_parameters(self.subject, settings, self.seeds)
        self.trainer = Trainer(self.subject.forward, parameters, plan_of(settings))
        self.bank = GradientBank(parameters)
        self._names = names
        self.streams = Streams(self.data, self.seeds, settings.batch_size, settings.harmless_share)
        self.attacks = AttackRunner(self.subject, self.data, self.outcome.ledger, self.trainer)
        first = self._saved = self._resume(*found) if found is not None else 0
        spent = self.outcome.ledger.seconds
        try:
            with self.safeguard.hooks(self.subject, self.data):
                for number in range(first, settings.steps):
                    report = self._step(number)
                    self.outcome.ledger.seconds = spent + time.perf_counter() - begun
                    if on_report is not None:
                        on_report(report)
                    if self.outcome.reason:
                        break
                    self._save(number + 1)
        except DivergedError as error:
            self.outcome.status = "diverged"
            self.outcome.reason = f"after {self.outcome.steps} updates: {error}"
        self._finish(adapter)
        return self.outcome

    def _bench(self) -> Bench:
        ledger = self.outcome.ledger
        return Bench(self.subject, self.data, self.seeds, self._reference, ledger)

    def _watch_device(self) -> None:
        device = self.subject.forward.device
        if device.type == "cuda":  # the peak that is told is this stage's own
            torch.cuda.reset_peak_memory_stats(device)

    def _count_reference(self) -> None:
        """Add the reference's forwards since the last count; stages may share one reference."""
        if self._reference is not None:
            self.outcome.ledger.reference_forwards += self._reference.forwards - self._counted
            self._counted = self._reference.forwards

    def edit(self) -> None:
        """Carry out the safeguard's edit after training, counted in the same ledger."""
        edited(self.safeguard, self._bench())

    def _finish(self, adapter: Adapter | None) -> None:
        self.trainer.release()
        if adapter is not None:
            adapter.merge()
        self.subject.model.requires_grad_(False).eval()
        for parameter in self.subject.model.parameters():
            parameter.grad = None
        self._count_reference()
        self.outcome.orders = self.streams.order_hashes()
        self.outcome.ledger.close(self.subject.forward.device)

    def _step(self, number: int) -> Report:
        step = Step(
            number,
            self._settings.steps,
            self.subject,
            self.data,
            self.bank,
            self.attacks,
            self._names,
            self.seeds,
            self.streams,
            apart=self.safeguard.separate or looked_at(number, self._settings.steps),
        )
        self.trainer.begin()
        torch.manual_seed(step.seed("dropout"))  # the same after a resume
        self.bank.clear()
        for visit in self.safeguard.visits(step):
            self._evaluate(step, visit.place, visit.weight)
        norms = self._look(step) if step.apart else {}
        gradients = self.safeguard.transform(step)
        supervised = step.rows("sft") if "sft" in step.losses else []
        update = self.trainer.finish(supervised, sum(step.losses.values()), gradients)
        return self._noted(step, update, norms)

    def _noted(self, step: Step, update: Update, norms: dict[str, float]) -> Report:
        outcome = self.outcome
        outcome.steps = outcome.ledger.steps = update.step
        outcome.learning_rates.append(update.learning_rate)
        outcome.losses.append(dict(step.losses))
        if norms:
            outcome.norms[str(update.step)] = norms
        reason = self.safeguard.stop(step, step.losses)
        if reason:
            outcome.status, outcome.reason = "stopped", reason
        return Report(update, dict(step.losses), norms)

    def _evaluate(self, step: Step, place: str, weight: float) -> None:
        """Add to the bank the gradients of the terms of ``place`` at the weights as they are."""
        weighted = {
            term: weight * term.weight(step.number, step.steps)
            for term in self.terms
            if term.at == place
        }
        pools: dict[str, dict[Term, float]] = {}
        for term, factor in weighted.items():
            if factor:
                pools.setdefault(term.rows, {})[term] = factor
        for pool, terms in pools.items():
            rows = step.rows(pool)
            roles = tuple(dict.fromkeys(role for term in terms for role in term.reads))
            self.outcome.ledger.count(place, sum(len(row.ids) for row in rows))
            whole, unit = any(term.whole for term in terms), max(term.unit for term in terms)
            forward, frozen = self.subject.forward, self._reference
            with self.bank.watching():
                for one in passes(forward, rows, roles, frozen, whole=whole, unit=unit):
                    self._backward(step, one, terms, rows)

    def _backward(
        self, step: Step, one: Pass, terms: Mapping[Term, float], rows: Sequence[Row]
    ) -> None:
        parts = {term: reduced(term, one, rows) * factor for term, factor in terms.items()}
        for term, part in parts.items():
            step.losses[term.name] = step.losses.get(term.name, 0.0) + float(part.detach())
        if not step.apart:
            with self.bank.collecting(SUM):
                functools.reduce(operator.add, parts.values()).backward()
            return
        for left, (term, part) in enumerate(parts.items(), 1 - len(parts)):
            with self.bank.collecting(term.name):
                part.backward(retain_graph=left < 0)

    def _look(self, step: Step) -> dict[str, float]:
        """Return the norm of every term's gradient.

        Raises:
            DurometerError: a term has had none twice in a row, and does not say that it may.
        """
        norms = {name: self.bank.norm(name) for name in self.bank.names()}
        resting = {term.name for term in self.terms if term.may_rest}
        for name, norm in norms.items():
            earlier = reversed(self.outcome.norms.values())
            before = next((look[name] for look in earlier if name in look), 1.0)
            if not norm and not before and name not in resting:
                raise DurometerError(
                    f"safeguard '{self.safeguard.name}': the term '{name}' has no gradient at step "
                    f"{step.number}; it would have no effect"
                )
        return norms

    # ---- going on after a kill -----------------------------------------------------------------

    def _save(self, done: int) -> None:
        file = self._checkpoint
        if file is None or not file.due(done - self._saved) or not self.safeguard.can_resume(done):
            return
        self._saved = done
        self._count_reference()
        tensors, plain = self.trainer.state()
        outcome = self.outcome
        state = {
            "trainer": plain,
            "drawn": self.streams.drawn,
            "learning_rates": outcome.learning_rates,
            "losses": outcome.losses,
            "norms": outcome.norms,
            "ledger": {
                name: value
                for name, value in outcome.ledger.as_dict().items()
                if name != "all_passes"
            },
        }
        own = {f"{OWN}{name}": tensor for name, tensor in self.safeguard.state().items()}
        file.save(tensors | own, state)

    def _resume(self, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> int:
        own = {name: tensor for name, tensor in tensors.items() if name.startswith(OWN)}
        self.safeguard.load_state({name.removeprefix(OWN): t for name, t in own.items()})
        rest = {name: tensor for name, tensor in tensors.items() if name not in own}
        self.trainer.load_state(rest, state["trainer"])
        self.streams.skip(state["drawn"])
        outcome = self.outcome
        outcome.learning_rates, outcome.losses = state["learning_rates"], state["losses"]
        outcome.norms = state["norms"]
        for name, value in state["ledger"].items():
            setattr(outcome.ledger, name, value)
        outcome.steps = outcome.ledger.steps
        return outcome.steps


def looked_at(number: int, steps: int) -> bool:
    """Say whether the gradients of single terms are looked at in update ``number`` of ``steps``.

    Twice at least in a training of three updates or more, so that one without any is found.
    """
    looks = {FIRST_LOOK, SECOND_LOOK}
    if steps <= SECOND_LOOK:  # the last update, and the first look or the one just before the last
        looks = {min(FIRST_LOOK, steps - 2), steps - 1}
    return number > 0 and (number in looks or number % LOOK_EVERY == FIRST_LOOK)


def edited(safeguard: Safeguard[Any], bench: Bench) -> Outcome:
    """Carry out the edit of a safeguard, and say what it cost."""
    begun, ledger = time.perf_counter(), bench.ledger
    before = bench.reference.forwards if bench.reference is not None else 0
    safeguard.edit(bench)
    ledger.seconds += time.perf_counter() - begun
    if bench.reference is not None:
        ledger.reference_forwards += bench.reference.forwards - before
    ledger.close(bench.subject.forward.device)
    return Outcome(ledger=ledger)


def reduced(term: Term, one: Pass, rows: Sequence[Row]) -> torch.Tensor:
    """Return this pass's share of the mean of a term over the whole batch ``rows``."""
    value = term.loss(one)
    here, total = _count(term.per, one.rows), _count(term.per, rows)
    if term.per == "batch":
        return value * (here / total)
    if value.shape != (here,):
        raise TypeError(f"term '{term.name}': {tuple(value.shape)} values for {here} {term.per}s")
    return value.sum() / total


def _count(per: Per, rows: Sequence[Row]) -> int:
    if per == "label":
        return sum(len(row.labels) for row in rows)
    if per == "token":
        return sum(len(row.ids) - 1 for row in rows)
    return len(rows) // 2 if per == "pair" else len(rows)


def plan_of(settings: TrainingSettings) -> OptimisationPlan:
    """Return how the settings say that weights are updated."""
    return OptimisationPlan(
        settings.optimizer,
        settings.learning_rate,
        settings.steps,
        settings.schedule,
        settings.warmup_steps,
        weight_decay=settings.weight_decay,
        gradient_clip=settings.gradient_clip,
    )


def trained_parameters(
    subject: Subject, settings: TrainingSettings, seeds: Seeds
) -> tuple[Adapter | None, list[nn.Parameter], list[str]]:
    """Make ready what the settings train: the adapter if any, the parameters, their names.

    Raises:
        InputError: the subject has no such weights.
    """
    model = subject.model
    if settings.train == "all" and (settings.first_block, settings.last_block) == (0.0, 1.0):
        names = [name for name, _ in model.named_parameters()]
    else:
        names = [f"{name}.weight" for name in trained_maps(model, settings)]
    if not names:
        raise InputError(
            f"subject '{subject.name}' has no weights for train={settings.train} in the blocks "
            f"from {settings.first_block:g} to {settings.last_block:g} of all"
        )
    if settings.train == "adapter":
        maps = [name.removesuffix(".weight") for name in names]
        alpha = 2.0 * settings.rank
        adapter = Adapter(model, maps, rank=settings.rank, alpha=alpha, seed=seeds.initialisation)
        return adapter, adapter.trainable(), list(adapter.matrices())
    chosen = dict(model.named_parameters())
    for name in names:
        chosen[name].requires_grad_(True)
    return None, [chosen[name] for name in names], names


def trained_maps(model: nn.Module, settings: TrainingSettings) -> list[str]:
    """Return the names of the linear maps that the settings choose, in order."""
    kinds: dict[str, Targets] = {"attention": "attention", "mlp": "mlp"}
    kinds |= dict.fromkeys(("mlp_in", "mlp_out"), "mlp")
    names = linear_maps(model, kinds.get(settings.train, "all"))
    names = [name for name in names if name.startswith(_prefixes(model, settings))]
    if settings.train in ("mlp_in", "mlp_out"):
        side = "in_features" if settings.train == "mlp_in" else "out_features"
        names = [n for n in names if getattr(model.get_submodule(n), side) == width(model)]
    return names


def _prefixes(model: nn.Module, settings: TrainingSettings) -> tuple[str, ...]:
    found = [name for name, _ in blocks(model)]
    first = int(settings.first_block * len(found))
    last = max(round(settings.last_block * len(found)), first + 1)
    return tuple(f"{name}." for name in found[first:last])
