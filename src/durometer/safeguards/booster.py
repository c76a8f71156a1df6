"""Booster: what one harmful step would gain is made small."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from durometer.core.settings import Levels, setting
from durometer.safeguards.banks import perturbed
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
from durometer.safeguards.probes import PROBE, norm_of
from durometer.safeguards.train import Step
from durometer.subjects.base import Subject


class BoosterSettings(TrainingSettings):
    """Settings of ``booster``; defaults are those of the released scripts."""

    steps: int = setting(10_000, "updates; published: 20 epochs of 5,000 rows", ge=1)
    learning_rate: float = setting(5e-4, "learning rate", gt=0)
    weight_decay: float = setting(0.1, "decoupled weight decay", ge=0)
    batch_size: int = setting(10, "rows of each pool an update", ge=1)
    train: Scope = setting(
        "adapter",
        "trained weights: all, the matrices of the blocks or of one kind, or a merged adapter",
    )
    rank: int = setting(32, "rank of the adapter", ge=1)
    attenuation: float = setting(
        5.0,
        "coefficient of what one harmful step gains (lambda)",
        search=Levels((1.0, 5.0, 20.0)),
        ge=0,
    )
    step_size: float = setting(0.1, "norm of the harmful step, all trained weights together", gt=0)


@safeguard("booster")
class Booster(Safeguard[BoosterSettings]):
    """Refusal training that keeps the loss of harmful answers flat along the harmful gradient.

    The loss is ``L(S) + lambda (L(H) - L(H) at theta - a g_H / |g_H|)``; the direction counts as
    fixed, so that its gradient is that at the weights minus that at the probe.
    """

    summary = "refusal training in which one step on harmful answers gains little"
    cost = "3 passes a step"
    source = "arXiv 2409.01586; git-disl/Booster"
    cannot_show = "resistance to more than a few steps: published attacks undo it in some epochs"
    kinds = ("refusal",)
    settings_class = BoosterSettings
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "tiny": {
            "steps": 120,
            "learning_rate": 3e-3,
            "schedule": "linear",
            "warmup_steps": 12,
            "batch_size": 16,
            "weight_decay": 0.0,
            "rank": 16,
            "attenuation": 1.0,
        }
    }
    separate = True

    def terms(self, subject: Subject, data: DefenceData) -> list[Term]:
        """Return the supervised loss and that of harmful answers, here and after the step."""
        settings = self.settings

        def harmful(name: str, sign: int, at: str) -> Term:
            weight = sign * settings.attenuation
            return Term(name, weight, "restricted", lambda p: p.cross_entropy(), at=at)

        return [
            supervised(settings),
            harmful("harmful", 1, Visit.place),
            harmful("after_step", -1, PROBE),
        ]

    def visits(self, step: Step) -> Iterator[Visit]:
        """Yield the weights, then the weights after one step on harmful answers."""
        yield Visit()
        norm = norm_of(step, "harmful")
        if norm:
            delta = step.bank.combined({"harmful": -self.settings.step_size / norm})
            with perturbed(step.subject, step.by_name(delta)):
                yield Visit(PROBE)
