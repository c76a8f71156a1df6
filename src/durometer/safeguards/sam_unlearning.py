"""Sharpness-aware unlearning: forgetting is learnt where relearning would lead."""

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any, ClassVar, Literal

import torch

from durometer.core.settings import Between, setting
from durometer.safeguards.banks import perturbed
from durometer.safeguards.base import (
    ReferencePoint,
    Safeguard,
    Term,
    TrainingSettings,
    Visit,
    safeguard,
    supervised,
)
from durometer.safeguards.data import DefenceData
from durometer.safeguards.npo import rejection
from durometer.safeguards.passes import Pass
from durometer.safeguards.probes import PROBE, applied, norm_of
from durometer.safeguards.train import Step
from durometer.subjects.base import Subject

GUIDE = "ascent"


class SamUnlearningSettings(TrainingSettings):
    """Settings of ``sam_unlearning``; defaults are the published ones."""

    steps: int = setting(125, "updates", ge=1)
    learning_rate: float = setting(5e-6, "learning rate", gt=0)
    batch_size: int = setting(4, "rows of each pool an update", ge=1)
    sft: float = setting(2.25, "coefficient of the cross-entropy on retain rows (gamma)", ge=0)
    forget: float = setting(1.0, "coefficient of forgetting (NPO) on restricted rows", ge=0)
    beta: float = setting(
        0.015,
        "NPO: how soon a row that is forgotten is left alone",
        search=Between(0.01, 0.5),
        gt=0,
    )
    smoothing: Literal["sam", "noise"] = setting(
        "sam",
        "where forgetting is learnt: at the worst place near by, one step up its own loss (SAM), "
        "or at places drawn near by, whose gradients are averaged (randomised smoothing)",
    )
    rho: float = setting(0.01, "SAM: norm of the step, all trained weights together; 0: none", ge=0)
    draws: int = setting(3, "noise: places an update", ge=1)
    sigma: float = setting(1e-4, "noise: standard deviation of each weight's", gt=0)


@safeguard("sam_unlearning", aliases=("sam_npo",))
class SamUnlearning(Safeguard[SamUnlearningSettings]):
    """NPO at ``theta + rho g / |g|``, g its own gradient, and plain training on retain rows.

    The step goes up the loss of forgetting, which is where relearning goes.
    """

    summary = "forget (NPO) at the worst place near by, so that small steps do not bring it back"
    cost = "3 passes a step with SAM, 1 + draws with noise, and forward passes of the reference"
    source = "arXiv 2502.05374; OPTML-Group/Unlearn-Smooth"
    cannot_show = "resistance to relearning that goes further than rho"
    kinds = ("knowledge",)
    settings_class = SamUnlearningSettings
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "tiny": {
            "steps": 150,
            "learning_rate": 1e-3,
            "schedule": "linear",
            "warmup_steps": 10,
            "batch_size": 32,
            "train": "mlp",
            "beta": 0.1,
        }
    }
    separate = True

    @property
    def reference(self) -> ReferencePoint:
        """The model that NPO compares with: the one at the start."""
        return "stage_start"

    def terms(self, subject: Subject, data: DefenceData) -> list[Term]:
        """Return the retain loss, the guide of SAM's step, and NPO where it leads."""
        settings = self.settings

        def forget(one: Pass) -> torch.Tensor:
            return rejection(one, settings.beta)

        guide = settings.forget if settings.smoothing == "sam" and settings.rho else 0.0
        return [
            supervised(settings),
            Term(GUIDE, guide, "restricted", forget, "row"),
            Term("forget", settings.forget, "restricted", forget, "row", PROBE),
        ]

    def visits(self, step: Step) -> Iterator[Visit]:
        """Yield the weights, then the places near by."""
        yield Visit()
        settings = self.settings
        if settings.smoothing == "noise":
            for draw in range(settings.draws):
                with perturbed(step.subject, noise(step, draw, settings.sigma)):
                    yield Visit(PROBE, 1 / settings.draws)
            return
        norm = norm_of(step, GUIDE)
        up = step.bank.combined({GUIDE: settings.rho / norm}) if norm else []
        with perturbed(step.subject, step.by_name(up)) if up else nullcontext():
            yield Visit(PROBE)

    def transform(self, step: Step) -> list[torch.Tensor | None]:
        """Return the gradient without that of the guide."""
        return applied(step, GUIDE)


def noise(step: Step, draw: int, sigma: float) -> dict[str, torch.Tensor]:
    """Return Gaussian noise for every trained weight, drawn on the host in fp32."""
    generator = step.random(f"noise {draw}")
    weights = dict(step.subject.model.named_parameters())
    return {
        name: sigma * torch.randn(weights[name].shape, generator=generator) for name in step.names
    }
