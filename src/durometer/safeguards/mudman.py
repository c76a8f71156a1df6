"""MUDMAN: unlearning at an attacker that relearns, where it does not disturb what is retained."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch

from durometer.core.optimizers import OptimizerName
from durometer.core.settings import Between, Levels, setting
from durometer.safeguards.banks import added, perturbed
from durometer.safeguards.base import (
    Safeguard,
    Scope,
    Term,
    TrainingSettings,
    Visit,
    safeguard,
    supervised,
)
from durometer.safeguards.data import DefenceData
from durometer.safeguards.train import Step
from durometer.subjects.base import Subject

# The attacker's weights before its update of a step, and after it.
FORK, RELEARNT = "fork", "relearnt"
Gradients = list[torch.Tensor | None]


class MudmanSettings(TrainingSettings):
    """Settings of ``mudman``; an update is the learning rate times what the coefficients say."""

    steps: int = setting(100, "updates", ge=1)
    learning_rate: float = setting(1.0, "multiplies every update", gt=0)
    optimizer: OptimizerName = setting("sgd", "optimiser; any other changes the norms below")
    train: Scope = setting(
        "mlp_in",
        "trained weights, the attacker's too; the paper trains the gates alone, which cannot be "
        "told by shape from the other map that reads the residual stream",
    )
    sft: float = setting(1e-3, "coefficient of the cross-entropy on the supervised rows", ge=0)
    retain_momentum: float = setting(
        0.9, "share of the running mean of supervised gradients that a step keeps", ge=0, lt=1
    )
    unlearning: float = setting(
        0.1,
        "norm of the unlearning update, taken before masking; its loss is minus the entropy on "
        "restricted rows at the attacker's weights",
        search=Between(1e-3, 1.0, log=True),
        ge=0,
    )
    relearning: float = setting(
        1e-3, "learning rate of the attacker on restricted rows, one update a step", ge=0
    )
    fork_every: int = setting(
        32, "updates between two new attackers", search=Levels((1, 8, 32)), ge=1
    )
    mask: bool = setting(True, "leave out what the running mean of supervised gradients opposes")


@safeguard("mudman", aliases=("MUDMAN",))
class Mudman(Safeguard[MudmanSettings]):
    """Meta-unlearning with disruption masking and normalisation.

    An attacker forks off the weights and relearns the restricted rows, one update a step. The
    unlearning gradient is taken at its weights, in a forward pass of its own (the released code
    goes back through the pass from before the attacker's update), and only those entries are
    applied to the model that the running mean of the supervised gradients agrees with.
    """

    summary = "unlearn at a relearning attacker's weights, where the retain gradient agrees"
    cost = "3 passes a step; 3 copies of the trained weights"
    source = "arXiv 2506.12484; filyp/MUDMAN (with the forward pass at the fork recomputed)"
    cannot_show = "resistance to attackers that train other weights or know of the mask"
    kinds = ("knowledge",)
    settings_class = MudmanSettings
    separate = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "tiny": {
            "steps": 120,
            "schedule": "linear",
            "batch_size": 32,
            "train": "blocks",
            "sft": 0.1,
            "unlearning": 0.3,
            "relearning": 0.1,
            "fork_every": 8,
        },
    }

    def __init__(self, settings: MudmanSettings) -> None:
        super().__init__(settings)
        self._retained: Gradients = []
        self._fork: list[torch.Tensor] = []

    def terms(self, subject: Subject, data: DefenceData) -> list[Term]:
        """Return the supervised loss, the attacker's own, and minus the entropy behind it."""
        settings = self.settings
        return [
            supervised(settings),
            Term(
                "relearning",
                settings.relearning,
                "restricted",
                lambda p: p.cross_entropy(),
                at=FORK,
            ),
            Term(
                "unlearning",
                settings.unlearning,
                "restricted",
                lambda p: -p.entropy(),
                at=RELEARNT,
            ),
        ]

    def visits(self, step: Step) -> Iterator[Visit]:
        """Yield the weights, then the attacker's before and after its update."""
        yield Visit()
        if not self.settings.unlearning:
            return
        model = step.subject.model
        weights = {name: model.get_parameter(name).detach() for name in step.names}
        if step.number % self.settings.fork_every == 0 or not self._fork:
            self._fork = [weight.float().clone() for weight in weights.values()]
        for place in (FORK, RELEARNT):
            away = {
                name: fork.to(weight.device) - weight.float()
                for (name, weight), fork in zip(weights.items(), self._fork, strict=True)
            }
            with perturbed(step.subject, away):
                yield Visit(place)
            if place == FORK:
                self._relearn(step)

    def _relearn(self, step: Step) -> None:
        """Make the attacker's update; its gradient is already times its learning rate."""
        if "relearning" not in step.bank.names():
            return
        for fork, gradient in zip(self._fork, step.bank.gradients("relearning"), strict=True):
            if gradient is not None:
                fork.sub_(gradient.to(fork.device))

    def transform(self, step: Step) -> Gradients:
        """Return the mean supervised gradient plus the masked unlearning one of the given norm."""
        bank = step.bank
        if "unlearning" not in bank.names():
            return bank.combined({name: 1.0 for name in bank.names() if name != "relearning"})
        retained = self._remember(step)
        norm = bank.norm("unlearning")
        scale = self.settings.unlearning / norm if norm else 0.0
        away = bank.gradients("unlearning")
        return [
            added(kept, None if u is None else scale * self._masked(u, kept))
            for kept, u in zip(retained, away, strict=True)
        ]

    def _remember(self, step: Step) -> Gradients:
        """Fold this step's supervised gradient into the running mean, and return the mean."""
        momentum = self.settings.retain_momentum
        names = step.bank.names()
        fresh = step.bank.gradients("sft") if "sft" in names else [None] * len(step.names)
        before = self._retained or [None] * len(fresh)
        self._retained = [
            added(
                None if old is None else momentum * old.to(step.subject.forward.device),
                None if new is None else (1 - momentum) * new,
            )
            for old, new in zip(before, fresh, strict=True)
        ]
        return self._retained

    def _masked(self, unlearning: torch.Tensor, retained: torch.Tensor | None) -> torch.Tensor:
        if retained is None or not self.settings.mask:
            return unlearning
        return unlearning * (unlearning.sign() == retained.sign())

    def state(self) -> Mapping[str, torch.Tensor]:
        """Return the running mean and the attacker's weights."""
        retained = {f"retained.{i}": t for i, t in enumerate(self._retained) if t is not None}
        return retained | {f"fork.{i}": tensor for i, tensor in enumerate(self._fork)}

    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Go on with the running mean and the attacker."""
        count = sum(name.startswith("fork.") for name in tensors)
        self._fork = [tensors[f"fork.{i}"].clone() for i in range(count)]
        self._retained = [tensors.get(f"retained.{i}") for i in range(count)]
