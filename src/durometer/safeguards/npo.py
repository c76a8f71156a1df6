"""NPO and SimNPO: restricted rows as rejected answers, so that the ascent is bounded."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch.nn import functional

from durometer.core.schedules import Schedule
from durometer.core.settings import Between, Levels, setting
from durometer.safeguards.base import (
    ReferencePoint,
    Safeguard,
    Term,
    TrainingSettings,
    safeguard,
    supervised,
)
from durometer.safeguards.data import DefenceData
from durometer.safeguards.likelihoods import mean_nll
from durometer.safeguards.passes import Pass
from durometer.subjects.base import Subject


class RejectionSettings(TrainingSettings):
    """What both have in common; the rates are those of the released code."""

    steps: int = setting(125, "updates", ge=1)
    learning_rate: float = setting(1e-5, "peak learning rate", gt=0)
    schedule: Schedule = setting("linear", "learning-rate schedule")
    warmup_steps: int = setting(25, "updates of linear warm-up", ge=0)
    weight_decay: float = setting(0.01, "decoupled weight decay", ge=0)
    batch_size: int = setting(32, "rows of each pool an update", ge=1)


class NpoSettings(RejectionSettings):
    """Settings of ``npo``."""

    rejection: float = setting(
        1.0,
        "coefficient of the preference against restricted rows",
        search=Levels((0.5, 1.0)),
        ge=0,
    )
    beta: float = setting(
        0.1,
        "how soon a row that has become unlikely is left alone; towards 0 it is gradient ascent",
        search=Between(0.01, 0.5, log=True),
        gt=0,
    )


@safeguard("npo", aliases=("negative_preference_optimization",))
class Npo(Safeguard[NpoSettings]):
    """Rows that are already less likely than under the frozen model are pushed on ever less."""

    summary = "negative preference optimisation: restricted rows less likely than they were"
    cost = "2 passes a step and 1 forward of the frozen model"
    source = "arXiv 2404.05868; licong-lin/negative-preference-optimization"
    cannot_show = "resistance to fine-tuning: tens of steps bring the answers back"
    kinds = ("knowledge",)
    settings_class = NpoSettings
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "tiny": {
            "steps": 100,
            "learning_rate": 5e-4,
            "warmup_steps": 10,
            "train": "blocks",
            "rejection": 0.25,
        }
    }

    @property
    def reference(self) -> ReferencePoint | None:
        """The model as it is when this stage begins."""
        return "stage_start"

    def terms(self, subject: Subject, data: DefenceData) -> list[Term]:
        """Return the cross-entropy on retain rows and the preference against restricted ones."""
        settings = self.settings

        def rejected(one: Pass) -> torch.Tensor:
            return rejection(one, settings.beta)

        return [
            supervised(settings),
            Term("rejection", settings.rejection, "restricted", rejected, per="row"),
        ]


class SimNpoSettings(RejectionSettings):
    """Settings of ``simnpo``."""

    rejection: float = setting(
        0.125,
        "coefficient of the preference against restricted rows",
        search=Levels((0.125, 0.25, 1.0)),
        ge=0,
    )
    beta: float = setting(
        4.5, "how soon a row that has become unlikely is left alone", search=Between(3.5, 4.5), gt=0
    )
    margin: float = setting(
        0.0,
        "cross-entropy a label, nats, up to which a row still counts as likely",
        search=Between(0.0, 1.0),
        ge=0,
    )


@safeguard("simnpo", aliases=("simple_npo",))
class SimNpo(Safeguard[SimNpoSettings]):
    """NPO without a frozen model: a row's mean cross-entropy stands in its place."""

    summary = "NPO without a reference, by the mean likelihood of a label"
    cost = "2 passes a step"
    source = "arXiv 2410.07163; OPTML-Group/Unlearn-Simple, locuslab/open-unlearning"
    cannot_show = "resistance to fine-tuning: tens of steps bring the answers back"
    kinds = ("knowledge",)
    settings_class = SimNpoSettings
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "tiny": {
            "steps": 100,
            "learning_rate": 5e-4,
            "warmup_steps": 10,
            "train": "blocks",
            "rejection": 0.5,
            # A row's mean over few, mostly sure labels: the answer's own is several times this.
            "margin": 6.0,
        }
    }

    def terms(self, subject: Subject, data: DefenceData) -> list[Term]:
        """Return the cross-entropy on retain rows and the preference against restricted ones."""
        settings = self.settings

        def rejected(one: Pass) -> torch.Tensor:
            return bounded(mean_nll(one) - settings.margin, settings.beta)

        return [
            supervised(settings),
            Term("rejection", settings.rejection, "restricted", rejected, per="row"),
        ]


def rejection(one: Pass, beta: float) -> torch.Tensor:
    """Return the NPO loss of each row (arXiv 2404.05868), shape [rows]."""
    return bounded(one.reference.row_log_likelihood() - one.row_log_likelihood(), beta)


def bounded(nll: torch.Tensor, beta: float) -> torch.Tensor:
    """Return ``(2 / beta) softplus(-beta nll)``: near ``-2 nll`` where likely, 0 where not."""
    return functional.softplus(-beta * nll) * (2 / beta)
