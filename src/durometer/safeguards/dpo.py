"""DPO: refusals are preferred to answers."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from durometer.core.schedules import Schedule
from durometer.core.settings import Between, setting
from durometer.safeguards.base import (
    ReferencePoint,
    Safeguard,
    Term,
    TrainingSettings,
    safeguard,
    supervised,
)
from durometer.safeguards.data import DefenceData
from durometer.safeguards.likelihoods import light_adapter, preference, tiny_adapter
from durometer.safeguards.passes import Pass
from durometer.subjects.base import Subject


class DpoSettings(TrainingSettings):
    """Settings of ``dpo``."""

    steps: int = setting(125, "updates", ge=1)
    learning_rate: float = setting(1e-5, "peak learning rate", gt=0)
    schedule: Schedule = setting("linear", "learning-rate schedule")
    warmup_steps: int = setting(25, "updates of linear warm-up", ge=0)
    batch_size: int = setting(32, "pairs, and supervised rows, an update", ge=1)
    preference: float = setting(1.0, "coefficient of the preference of refusals to answers", ge=0)
    beta: float = setting(
        0.1,
        "how soon a pair that is told apart is left alone",
        search=Between(0.05, 0.5, log=True),
        gt=0,
    )


@safeguard("dpo", aliases=("direct_preference_optimization",))
class Dpo(Safeguard[DpoSettings]):
    """The refusal of a restricted prompt is preferred to its answer, beside supervised rows."""

    summary = "direct preference optimisation of refusals over answers"
    cost = "3 passes a step and 2 forwards of the frozen model"
    source = "arXiv 2305.18290; locuslab/open-unlearning"
    cannot_show = "resistance to fine-tuning: tens of steps bring the answers back"
    kinds = ("refusal",)
    settings_class = DpoSettings
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "light": light_adapter(),
        "tiny": tiny_adapter(),
    }

    @property
    def reference(self) -> ReferencePoint | None:
        """The model as it is when this stage begins."""
        return "stage_start"

    def terms(self, subject: Subject, data: DefenceData) -> list[Term]:
        """Return the cross-entropy on supervised rows and the preference."""
        settings = self.settings

        def preferred(one: Pass) -> torch.Tensor:
            return preference(one, settings.beta)

        return [
            supervised(settings),
            Term("preference", settings.preference, "pairs", preferred, per="pair"),
        ]
