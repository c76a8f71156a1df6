"""Max entropy: predictions on restricted rows are flattened."""

from collections.abc import Mapping
from typing import Any, ClassVar

from durometer.core.optimizers import OptimizerName
from durometer.core.settings import setting
from durometer.safeguards.base import Safeguard, Term, TrainingSettings, safeguard, supervised
from durometer.safeguards.data import DefenceData
from durometer.subjects.base import Subject


class MaxEntropySettings(TrainingSettings):
    """Settings of ``max_entropy``."""

    steps: int = setting(600, "updates", ge=1)
    learning_rate: float = setting(1e-5, "peak learning rate", gt=0)
    optimizer: OptimizerName = setting("schedule_free_adamw", "optimiser")
    warmup_steps: int = setting(100, "updates of linear warm-up", ge=0)
    batch_size: int = setting(64, "rows of each pool an update", ge=1)
    entropy: float = setting(1.0, "coefficient of the entropy on restricted rows", ge=0)


@safeguard("max_entropy")
class MaxEntropy(Safeguard[MaxEntropySettings]):
    """Cross-entropy on retain rows minus the entropy of the predictions on restricted ones."""

    summary = "flatten the predictions on restricted rows"
    cost = "2 passes a step"
    source = "arXiv 2408.00761 (baseline); restricted rows really enter, unlike in released code"
    cannot_show = "resistance to fine-tuning"
    kinds = ("knowledge",)
    settings_class = MaxEntropySettings
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "tiny": {
            "steps": 200,
            "learning_rate": 1e-3,
            "optimizer": "adamw",
            "warmup_steps": 10,
            "batch_size": 32,
        }
    }

    def terms(self, subject: Subject, data: DefenceData) -> list[Term]:
        """Return the cross-entropy on retain rows and the negative entropy on restricted ones."""
        settings = self.settings
        flatten = Term("entropy", settings.entropy, "restricted", lambda p: -p.entropy())
        return [supervised(settings), flatten]
