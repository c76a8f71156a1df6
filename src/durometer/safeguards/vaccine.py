"""Vaccine: refusals learnt under the worst small shift of the attention outputs."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from durometer.core.settings import Between, setting
from durometer.safeguards.activations import rows_apart, shifted, steepest
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
from durometer.safeguards.passes import sites
from durometer.safeguards.train import Step
from durometer.subjects.base import Subject

SHIFTED, SEARCH = "shifted", "search"
SMALL: dict[str, Any] = {
    "steps": 120,
    "learning_rate": 3e-3,
    "schedule": "linear",
    "warmup_steps": 12,
    "batch_size": 16,
}


class VaccineSettings(TrainingSettings):
    """Settings of ``vaccine``."""

    steps: int = setting(2000, "updates; published: 20 epochs", ge=1)
    learning_rate: float = setting(1e-3, "peak learning rate", gt=0)
    batch_size: int = setting(10, "rows an update", ge=1)
    train: Scope = setting("adapter", "trained weights, see plain_sft")
    sft: float = setting(0.0, "coefficient of the cross-entropy without any shift", ge=0)
    shifted: float = setting(
        1.0, "coefficient of the cross-entropy on the supervised rows under the shift", ge=0
    )
    radius: float = setting(
        2.0,
        "norm of the shift over all layers, rows and tokens together (rho); 0: none",
        search=Between(0.1, 20.0, log=True),
        ge=0,
    )


@safeguard("vaccine")
class Vaccine(Safeguard[VaccineSettings]):
    """``min over weights, max over |e| <= rho`` of the supervised loss.

    ``e_l = rho g_l / |(g_1 .. g_L)|`` is added to the attention output of layer l, where g is the
    loss's gradient there in a first pass. Rows are laid out one by one, each with a shift of its
    own.
    """

    summary = "learn refusals under the worst small shift of the attention outputs"
    cost = "2 passes a step"
    source = "arXiv 2402.01109; git-disl/Vaccine"
    cannot_show = "resistance to more epochs of fine-tuning, or to rank-1 adapters (2605.05995)"
    kinds = ("refusal",)
    settings_class: ClassVar = VaccineSettings
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"tiny": SMALL}

    def terms(self, subject: Subject, data: DefenceData) -> list[Term]:
        """Return the supervised loss, and the same under the shift."""
        settings = self.settings
        return [
            supervised(settings),
            Term(
                SHIFTED,
                settings.shifted,
                "sft",
                lambda p: p.cross_entropy(),
                at=SHIFTED,
                whole=True,
            ),
        ]

    def visits(self, step: Step) -> Iterator[Visit]:
        """Yield the weights, then the same with the attention outputs shifted."""
        yield Visit()
        if self.settings.shifted:
            modules = self.modules(step)
            with rows_apart(step.subject):
                gradients = steepest(step, SEARCH, step.rows("sft"), modules)
                with shifted(modules, worst_shift(gradients, self.settings.radius)):
                    yield Visit(SHIFTED)

    def modules(self, step: Step) -> list[nn.Module]:
        """Return the modules whose outputs are shifted in this step."""
        return sites(step.subject.model, "attention")


def worst_shift(gradients: Sequence[torch.Tensor], radius: float) -> list[torch.Tensor]:
    """Return the shifts along ``gradients`` whose joint norm is ``radius``."""
    norm = torch.stack([g.norm() for g in gradients]).norm()
    return [g * (radius / (norm + 1e-12)) for g in gradients]
