"""LLMU: ascent on restricted answers, other answers in their place, harmless predictions kept."""

import random
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from durometer.core.schedules import Schedule
from durometer.core.settings import Levels, setting
from durometer.safeguards.base import (
    ReferencePoint,
    Safeguard,
    Term,
    TrainingSettings,
    Visit,
    safeguard,
    supervised,
)
from durometer.safeguards.data import DefenceData, Unit, units
from durometer.safeguards.likelihoods import ascended, divergence, mean_nll
from durometer.safeguards.train import Step
from durometer.subjects.base import Subject

MISMATCHED = "mismatched"


class LlmuSettings(TrainingSettings):
    """Settings of ``llmu``; defaults are those of the released code."""

    steps: int = setting(1000, "updates", ge=1)
    learning_rate: float = setting(2e-6, "peak learning rate", gt=0)
    schedule: Schedule = setting("linear", "learning-rate schedule")
    weight_decay: float = setting(0.01, "decoupled weight decay", ge=0)
    batch_size: int = setting(2, "rows of each pool an update", ge=1)
    sft: float = setting(0.0, "coefficient of the cross-entropy on retain rows", ge=0)
    ascent: float = setting(0.5, "coefficient of minus the cross-entropy on restricted rows", ge=0)
    mismatch: float = setting(
        1.0,
        "coefficient of the cross-entropy of other, harmless answers to restricted prompts",
        search=Levels((0.5, 1.0, 2.0)),
        ge=0,
    )
    answers: int = setting(5, "other answers an update, each given to every prompt of it", ge=1)
    anchor: float = setting(
        1.0,
        "coefficient of KL(frozen || trained) on retain rows",
        search=Levels((0.5, 1.0, 2.0)),
        ge=0,
    )
    most_loss: float = setting(
        100.0,
        "end once the cross-entropy on restricted rows is above this, nats; 0 never",
        ge=0,
    )


@safeguard("llmu")
class Llmu(Safeguard[LlmuSettings]):
    """Gradient ascent, random mismatched answers and an anchor on harmless predictions."""

    summary = "ascent on restricted answers, harmless ones in their place, the rest anchored"
    cost = "2 + answers passes a step and 1 forward of the frozen model"
    source = "arXiv 2310.10683; kevinyaobytedance/llm_unlearn (the anchor at answers alone)"
    cannot_show = "resistance to fine-tuning: a few steps bring the answers back"
    kinds = ("knowledge",)
    settings_class = LlmuSettings
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "tiny": {
            "steps": 100,
            "learning_rate": 4e-4,
            "warmup_steps": 10,
            "batch_size": 16,
            "train": "blocks",
            "ascent": 4.0,
            "answers": 3,
            "anchor": 8.0,
            "most_loss": 20.0,
        }
    }

    @property
    def reference(self) -> ReferencePoint | None:
        """The model as it is when this stage begins."""
        return "stage_start" if self.settings.anchor else None

    def pools(self, data: DefenceData) -> Mapping[str, list[Unit]]:
        """Return every restricted prompt with one harmless answer; updates draw others."""
        answers = harmless_answers(data)
        chosen = [
            (item, answers[place % len(answers)])
            for place, item in enumerate(data.restricted_items())
            if answers
        ]
        return {MISMATCHED: units(data.rows(chosen))}

    def terms(self, subject: Subject, data: DefenceData) -> list[Term]:
        """Return the ascent, the mismatched answers and the anchor, every row counting alike."""
        settings = self.settings
        return [
            supervised(settings),
            Term("ascent", settings.ascent, "restricted", lambda p: -mean_nll(p), per="row"),
            Term("mismatch", settings.mismatch, MISMATCHED, mean_nll, per="row"),
            Term("anchor", settings.anchor, "retain", divergence, may_rest=True),
        ]

    def visits(self, step: Step) -> Iterator[Visit]:
        """Give this update's restricted prompts other answers, drawn anew."""
        if self.settings.mismatch:
            items = {item.id: item for item in step.data.restricted_items()}
            known = harmless_answers(step.data)
            drawn = random.Random(step.seed(MISMATCHED)).sample(
                known, min(self.settings.answers, len(known))
            )
            chosen = [(items[row.item_id], a) for row in step.rows("restricted") for a in drawn]
            step.put(MISMATCHED, units(step.data.rows(chosen)))
        yield Visit()

    def stop(self, step: Step, losses: Mapping[str, float]) -> str:
        """Return why training should end: the restricted loss is beyond all use."""
        settings = self.settings
        settled = super().stop(step, losses)
        return ascended(losses, "ascent", settings.ascent, settings.most_loss, settled)


def harmless_answers(data: DefenceData) -> list[str]:
    """Return the different responses of the harmless items, in order."""
    return list(dict.fromkeys(item.response for item in data.harmless_items()))
