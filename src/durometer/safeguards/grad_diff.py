"""Gradient difference: the loss on restricted rows is driven up, that on retain rows down."""

from collections.abc import Mapping
from typing import Any, ClassVar

from durometer.core.schedules import Schedule
from durometer.core.settings import Levels, setting
from durometer.safeguards.base import Safeguard, Term, TrainingSettings, safeguard, supervised
from durometer.safeguards.data import DefenceData
from durometer.safeguards.likelihoods import ascended
from durometer.safeguards.train import Step
from durometer.subjects.base import Subject


class GradDiffSettings(TrainingSettings):
    """Settings of ``grad_diff``; coefficients and rate are those of the released code."""

    steps: int = setting(125, "updates", ge=1)
    learning_rate: float = setting(1e-5, "peak learning rate", gt=0)
    schedule: Schedule = setting("linear", "learning-rate schedule")
    warmup_steps: int = setting(25, "updates of linear warm-up", ge=0)
    weight_decay: float = setting(0.01, "decoupled weight decay", ge=0)
    batch_size: int = setting(32, "rows of each pool an update", ge=1)
    ascent: float = setting(
        1.0,
        "coefficient of minus the cross-entropy on restricted rows",
        search=Levels((0.25, 1.0)),
        ge=0,
    )
    most_loss: float = setting(
        100.0,
        "end once the cross-entropy on restricted rows is above this, nats; 0 never, as published: "
        "the ascent has no bound of its own",
        ge=0,
    )


@safeguard("grad_diff", aliases=("gradient_difference",))
class GradDiff(Safeguard[GradDiffSettings]):
    """Cross-entropy on retain rows minus that on restricted ones."""

    summary = "gradient ascent on restricted rows, descent on retain rows"
    cost = "2 passes a step"
    source = "arXiv 2203.12817, 2401.06121; locuslab/open-unlearning"
    cannot_show = "resistance to fine-tuning: a few steps bring the answers back"
    kinds = ("knowledge",)
    settings_class = GradDiffSettings
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "tiny": {
            "steps": 100,
            "learning_rate": 3e-4,
            "warmup_steps": 10,
            "ascent": 0.25,
            "most_loss": 20.0,
        }
    }

    def terms(self, subject: Subject, data: DefenceData) -> list[Term]:
        """Return the cross-entropy on retain rows and its negative on restricted ones."""
        settings = self.settings
        ascent = Term("ascent", settings.ascent, "restricted", lambda p: -p.cross_entropy())
        return [supervised(settings), ascent]

    def stop(self, step: Step, losses: Mapping[str, float]) -> str:
        """Return why training should end: the restricted loss is beyond all use."""
        settings = self.settings
        settled = super().stop(step, losses)
        return ascended(losses, "ascent", settings.ascent, settings.most_loss, settled)
