"""Inner attacks: the tampers themselves, driven step by step on a model in training.

The code is that of the evaluation's attacks; only the configurations differ, and what they read:
the part of the defence split that is not held out.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from durometer.core.adapters import linear_maps
from durometer.core.budget import Budget
from durometer.core.errors import InputError
from durometer.core.rows import Row
from durometer.core.schedules import depends_on_total
from durometer.core.seeds import Seeds
from durometer.core.settings import digest_of
from durometer.core.structure import blocks
from durometer.core.training import DivergedError, Trainer, Update
from durometer.safeguards.data import DefenceData
from durometer.safeguards.ledger import Ledger
from durometer.subjects.base import Subject
from durometer.subjects.chat import ChatFormat
from durometer.tampers.base import make_tamper
from durometer.tampers.finetune import FineTune, FineTuning
from durometer.tampers.lora import Lora
from durometer.tampers.staged_finetune import StagedFineTune

Adversary = Literal["restricted", "switch", "mix", "retain"]
InnerWeights = Literal["all", "adapter", "slice"]
ALL_ROWS = 1_000_000
INNER = "inner"


@dataclass(frozen=True)
class InnerAttack:
    """One configuration of an inner attack.

    Attributes:
        adversary: trains on restricted rows, on retain rows until ``switch`` and then restricted
            ones, on both in every batch, or on retain rows alone.
        weights: what it trains: all weights, an adapter, or the MLP matrices of the upper half.
        steps: updates.
        switch: share of the updates before the switch.
    """

    adversary: Adversary
    weights: InnerWeights
    optimizer: str
    learning_rate: float
    batch_size: int
    steps: int
    switch: float = 0.66
    rank: int = 16
    weight_decay: float = 0.0

    @property
    def tamper(self) -> tuple[str, dict[str, Any]]:
        """Name and settings of the tamper that it is."""
        settings: dict[str, Any] = {
            "optimizer": self.optimizer,
            "learning_rate": self.learning_rate,
            "batch_size": self.batch_size,
            "steps": self.steps,
            "examples": ALL_ROWS,
            "weight_decay": self.weight_decay,
        }
        adapter = self.weights == "adapter"
        if adapter:
            settings |= {"rank": self.rank, "alpha": 2.0 * self.rank}
        if self.adversary == "switch":
            train = "adapter" if adapter else "all"
            return "staged_finetune", settings | {"switch": self.switch, "train": train}
        if self.adversary == "mix":
            settings["retain_share"] = 0.5
        if self.adversary == "retain":
            settings["data"] = "retain"
        return "lora" if adapter else "finetune", settings

    def make(self) -> FineTuning[Any]:
        """Return the tamper, ready to run."""
        name, values = self.tamper
        made = make_tamper(name, **values)
        if self.weights == "slice":
            made = _SLICED[name](made.settings)
        assert isinstance(made, FineTuning)
        return made

    @property
    def digest(self) -> str:
        """Hash of the kind of attack, comparable with an evaluation's."""
        return attack_digest(*self.tamper, part=self.weights if self.weights == "slice" else "")


# How long an attack goes on, and over how many rows, makes no other attack of it.
LENGTHS = ("examples", "switch", "max_length")


def attack_digest(tamper: str, settings: dict[str, Any], part: str = "") -> str:
    """Return the hash of a kind of attack: all that decides what one of its updates does.

    Optimiser, rate, schedule, batch, what is trained, and on which rows; not its length, unless its
    rates depend on that.

    Args:
        part: which weights, where no setting of the tamper says so.
    """
    made = make_tamper(tamper, **settings)
    told = made.settings.canonical()
    lengths = LENGTHS if depends_on_total(told.get("schedule", "constant")) else (*LENGTHS, "steps")
    told = {name: value for name, value in told.items() if name not in lengths}
    return digest_of([made.name, part, told])


def require_disjoint(
    trained: Sequence[str], evaluated: Sequence[tuple[str, dict[str, Any]]]
) -> None:
    """Refuse an evaluation with a configuration that was trained against.

    Raises:
        InputError: the first such attack.
    """
    for tamper, settings in evaluated:
        if attack_digest(tamper, settings) in trained:
            raise InputError(
                f"attack '{tamper}' {settings}: the safeguard was trained against exactly this; "
                "evaluate with others"
            )


class _Slice(FineTuning[Any]):
    """Trains the MLP matrices of the upper half of the blocks: a cheap stand-in for all weights."""

    def prepare(self, subject: Subject, seeds: Seeds) -> list[nn.Parameter]:
        names = [name for name, _ in blocks(subject.model)]
        upper = tuple(f"{name}." for name in names[len(names) // 2 :])
        maps = [name for name in linear_maps(subject.model, "mlp") if name.startswith(upper)]
        # In a model in training the others would gather gradients that nobody clears.
        subject.model.requires_grad_(False)
        parameters = subject.restoration.writable(f"{name}.weight" for name in maps)
        for parameter in parameters:
            parameter.requires_grad_(True)
        return parameters

    def changes(self, subject: Subject) -> dict[str, float]:
        return FineTuning.changes(self, subject)


class _SlicedFineTune(_Slice, FineTune):
    pass


class _SlicedStagedFineTune(_Slice, StagedFineTune):
    pass


_SLICED: dict[str, Any] = {"finetune": _SlicedFineTune, "staged_finetune": _SlicedStagedFineTune}
Delta = dict[str, tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class RememberingChat(ChatFormat):
    """A format that tokenises every example once: thousands of attacks train on the same rows."""

    kept: dict[Any, Row] = field(default_factory=dict, compare=False, repr=False)

    def row(self, prompt: str, response: str, **options: Any) -> Row:
        """Return the example, made once."""
        key = (self, prompt, response, *sorted(options.items()))
        if key not in self.kept:
            self.kept[key] = super().row(prompt, response, **options)
        return self.kept[key]


class AttackRunner:
    """Runs inner attacks on the subject of a training and puts its weights back bit for bit.

    On an accelerator the copy of the weights and what only the trainer's updates read wait in the
    host's memory meanwhile, so that the device holds no second copy.

    Args:
        data: whose attackers' view the attacks train on.
        ledger: counts their updates.
        trainer: the outer one, where there is one.
    """

    def __init__(
        self,
        subject: Subject,
        data: DefenceData,
        ledger: Ledger,
        trainer: Trainer | None = None,
    ) -> None:
        self._subject, self._data = subject, data
        self._ledger, self._trainer = ledger, trainer
        self._current: FineTuning[Any] | None = None
        self._chat = RememberingChat(**vars(subject.chat))

    @property
    def ledger(self) -> Ledger:
        """Counts what attacks cost, searches for inputs included."""
        return self._ledger

    def run(self, attack: InnerAttack, seed: int) -> Iterator[Update]:
        """Yield after every update of ``attack``; the weights are the attacked ones meanwhile.

        A diverging attack ends early, which the ledger counts.

        Raises:
            InputError: it changed nothing, so that there is nothing to learn from.
        """
        subject, ledger = self._subject, self._ledger
        tamper = self._current = attack.make()
        first = not ledger.attacks
        ledger.attacks += 1
        parked = self._trainer.parked() if self._trainer is not None else nullcontext()
        with parked, subject.lent():
            budget, seeds = Budget(attack.steps), Seeds.derive(seed)
            own, subject.chat = subject.chat, self._chat
            subject.restoration.on_exit(lambda: setattr(subject, "chat", own))
            try:
                for update in tamper.steps(subject, self._data.attackers_view, budget, seeds):
                    ledger.count(INNER, update.tokens)
                    yield update
            except DivergedError:
                ledger.diverged_attacks += 1
            if first and not any(tamper.changes(subject).values()):
                raise InputError(
                    f"the inner attack '{attack.adversary}' at rate {attack.learning_rate:g} "
                    "changes no weight, so there is nothing to learn from; raise inner_rates"
                )

    @torch.no_grad()
    def delta(self) -> Delta:
        """Return by how much the running attack has changed each weight so far, on the host.

        One tensor, or two whose product it is.
        """
        tamper, subject = self._current, self._subject
        adapter = tamper._adapter if isinstance(tamper, Lora) else None
        if adapter is not None:
            matrices = {name: p.detach().float().cpu() for name, p in adapter.matrices().items()}
            return {
                f"{name.split('.lora_A')[0]}.weight": (
                    adapter.scale * matrices[name.replace("lora_A", "lora_B")],
                    down,
                )
                for name, down in matrices.items()
                if "lora_A" in name
            }
        changed = subject.restoration.changes()
        return {name: (subject.restoration.change(name).cpu(),) for name in changed}


def whole_delta(delta: Delta, device: torch.device) -> dict[str, torch.Tensor]:
    """Return the change of each weight as one tensor on ``device``."""
    moved = {name: [part.to(device) for part in parts] for name, parts in delta.items()}
    return {name: p[0] if len(p) == 1 else p[0] @ p[1] for name, p in moved.items()}
