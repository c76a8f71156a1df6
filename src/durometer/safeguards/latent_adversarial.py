"""LAT, latent adversarial training: refuse although the residual stream is pushed to comply."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import field_validator
from torch import nn
from torch.nn import functional

from durometer.core.rows import Row
from durometer.core.settings import Between, setting
from durometer.safeguards.activations import blank, listed, place_at, rows_apart, shifted
from durometer.safeguards.base import (
    ReferencePoint,
    Safeguard,
    Scope,
    Term,
    TrainingSettings,
    Visit,
    safeguard,
    supervised,
)
from durometer.safeguards.crl import of_restricted
from durometer.safeguards.data import DefenceData, Unit
from durometer.safeguards.likelihoods import divergence, improbability
from durometer.safeguards.passes import ActivationBank, Pass, sites
from durometer.safeguards.train import Step
from durometer.subjects.base import Subject

PUSHED, INNER = "pushed", "inner_latent"


class LatentAdversarialSettings(TrainingSettings):
    """Settings of ``latent_adversarial``; defaults are those of Llama-3-8B, in shares of depth."""

    steps: int = setting(400, "updates", ge=1)
    learning_rate: float = setting(8e-5, "peak learning rate", gt=0)
    train: Scope = setting("adapter", "trained weights, see plain_sft")
    rank: int = setting(64, "rank of the adapter", ge=1)
    toward: float = setting(
        0.5, "coefficient of the cross-entropy of refusals under the push", ge=0
    )
    away: float = setting(
        0.5, "coefficient of -log(1 - p) of the answers' tokens under the push", ge=0
    )
    kl: float = setting(
        0.1, "coefficient of the KL divergence from the reference on harmless rows", ge=0
    )
    goal: Literal["targeted", "untargeted"] = setting(
        "targeted", "what the push is for: the restricted answer, or only not the refusal"
    )
    push_away: float = setting(
        0.5,
        "targeted: share of the push that is against the refusal; the answer gets the rest",
        ge=0,
        lt=1,
    )
    radius: float = setting(
        6.0,
        "largest norm of the push of a token at one depth",
        search=Between(0.05, 10.0, log=True),
        gt=0,
    )
    unit: Literal["absolute", "median"] = setting(
        "absolute", "unit of that norm: one, or the median norm of the stream at that depth"
    )
    pgd_steps: int = setting(16, "updates of the push", ge=1)
    pgd_rate: float = setting(0.25, "length of one such update, in largest norms", gt=0)
    reuse: int = setting(4, "updates of the model between two pushes", ge=1)
    depths: tuple[float, ...] = setting(
        (0.0, 8 / 32, 16 / 32, 24 / 32, 30 / 32),
        "shares of the blocks after which the stream is pushed, all at once; 0: the embedding",
        min_length=1,
    )

    @field_validator("depths", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        """Accept ``a+b`` as the command line has it."""
        return listed(value)


@safeguard("latent_adversarial", aliases=("lat",))
class LatentAdversarial(Safeguard[LatentAdversarialSettings]):
    """Projected gradient descent finds, for every prompt token, a push of bounded norm.

    A prompt with its refusal and the same prompt with its answer are pushed alike. The descent goes
    along the gradient of each token with a fixed length, as the tamper ``latent_perturbation``
    does; the released code updates it with AdamW.
    """

    summary = "learn to refuse while the residual stream is pushed towards complying"
    cost = "pgd_steps / reuse + 2 passes a step: 6 by default"
    source = "arXiv 2403.05030, 2407.15549; aengusl/latent-adversarial-training"
    cannot_show = "resistance to fine-tuning; it is meant for inputs and activations"
    kinds = ("refusal",)
    settings_class = LatentAdversarialSettings
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "tiny": {
            "steps": 120,
            "learning_rate": 1.5e-3,
            "schedule": "linear",
            "warmup_steps": 12,
            "rank": 16,
            "harmless_share": 0.7,
            "toward": 0.3,
            "away": 0.1,
            "kl": 1.0,
            "unit": "median",
            "radius": 0.05,
            "pgd_steps": 4,
        }
    }

    def __init__(self, settings: LatentAdversarialSettings) -> None:
        super().__init__(settings)
        self._units: list[Unit] = []
        self._pushes: list[torch.Tensor] = []

    @property
    def reference(self) -> ReferencePoint | None:
        """The model at the start of this stage, on harmless rows."""
        return "stage_start" if self.settings.kl else None

    def terms(self, subject: Subject, data: DefenceData) -> list[Term]:
        """Return the supervised loss, both losses under the push, and the divergence."""
        settings = self.settings

        def refuse(one: Pass) -> torch.Tensor:
            return one.cross_entropy()[~of_restricted(one)].mean()

        def deny(one: Pass) -> torch.Tensor:
            return improbability(one)[of_restricted(one)].mean()

        def pushed(name: str, coefficient: float, loss: Any) -> Term:
            return Term(name, coefficient, "pairs", loss, "batch", at=PUSHED, whole=True)

        return [
            supervised(settings),
            pushed("toward", settings.toward, refuse),
            pushed("away", settings.away, deny),
            Term("kl", settings.kl, "retain", divergence, may_rest=True),
        ]

    def visits(self, step: Step) -> Iterator[Visit]:
        """Yield the weights, then the same with the stream pushed."""
        yield Visit()
        settings = self.settings
        if not (settings.toward or settings.away):
            return
        modules = self._modules(step.subject.model)
        with rows_apart(step.subject):
            if step.number % settings.reuse == 0:
                self._units = step.units("pairs")
                self._pushes = self._descended(step, modules)
            step.put("pairs", self._units)
            rows = step.rows("pairs")
            with shifted(modules, [spread(push, rows) for push in self._pushes]):
                yield Visit(PUSHED)

    def can_resume(self, step: int) -> bool:
        """Between two pushes a resumed run would lack the present one."""
        return step % self.settings.reuse == 0

    def _modules(self, model: nn.Module) -> list[nn.Module]:
        every = sites(model, "residual")
        return [
            every[place] for place in sorted({place_at(model, d) for d in self.settings.depths})
        ]

    def _descended(self, step: Step, modules: Sequence[nn.Module]) -> list[torch.Tensor]:
        """Return the pushes that PGD finds, one a module, each [pairs, prompt tokens, width]."""
        settings, rows = self.settings, step.rows("pairs")
        longest = max(row.first_label for row in rows)
        pushes = [blank(step.subject, len(rows) // 2, longest) for _ in modules]
        radii = self._radii(step, rows, modules)
        for _ in range(settings.pgd_steps):
            step.attacks.ledger.count(INNER, sum(len(row.ids) for row in rows))
            with shifted(modules, [spread(push, rows) for push in pushes]):
                loss = self._inner_loss(step, rows)
                gradients = torch.autograd.grad(loss, pushes)
            for push, gradient, radius in zip(pushes, gradients, radii, strict=True):
                descend_tokens(push, gradient, settings.pgd_rate * radius, radius)
        return [push.detach() for push in pushes]

    def _inner_loss(self, step: Step, rows: Sequence[Row]) -> torch.Tensor:
        """Return what the push makes small."""
        (labelled,) = step.subject.forward.labelled(rows, whole=True)
        one = Pass(rows, labelled, {}, None)
        answer = of_restricted(one)
        if self.settings.goal == "untargeted":
            return -one.cross_entropy()[~answer].mean()
        away = improbability(one)[~answer].mean()
        share = self.settings.push_away
        return (1 - share) * one.cross_entropy()[answer].mean() + share * away

    @torch.no_grad()
    def _radii(self, step: Step, rows: Sequence[Row], modules: Sequence[nn.Module]) -> list[float]:
        """Return the largest norm at each module."""
        if self.settings.unit == "absolute":
            return [self.settings.radius] * len(modules)
        subject = step.subject
        bank = ActivationBank(subject.model, ("residual",))
        with bank.recording():
            (labelled,) = subject.forward.labelled(rows, whole=True)
            states = Pass(rows, labelled, bank.states, None).states()
        every = sites(subject.model, "residual")
        medians = [float(states[every.index(m)].norm(dim=-1).median()) for m in modules]
        return [self.settings.radius * median for median in medians]


def spread(push: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
    """Return the push of pairs laid out over rows, nothing where a response or padding stands.

    Args:
        push: shape [pairs, longest prompt, width].
        rows: refusal and answer of each pair in turn.

    Returns:
        shape [rows, longest row, width]; gradients flow.
    """
    prompts = torch.tensor([row.first_label for row in rows], device=push.device)
    inside = torch.arange(push.shape[1], device=push.device) < prompts[:, None]
    doubled = push.repeat_interleave(2, dim=0) * inside[..., None]
    missing = max(len(row.ids) for row in rows) - push.shape[1]
    return functional.pad(doubled, (0, 0, 0, missing))


@torch.no_grad()
def descend_tokens(
    push: torch.Tensor, gradient: torch.Tensor, length: float, radius: float
) -> None:
    """Move every token's push by ``length`` against its gradient and back into its ball."""
    norms = gradient.norm(dim=-1, keepdim=True)
    push.sub_(torch.where(norms > 0, gradient * (length / norms.clamp_min(1e-30)), 0.0))
    push.mul_((radius / push.norm(dim=-1, keepdim=True).clamp_min(1e-30)).clamp(max=1.0))
