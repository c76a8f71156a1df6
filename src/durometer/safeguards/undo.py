"""UNDO: unlearn, shrink the weights and add noise, distil the unlearnt model into what is left."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch

from durometer.core.schedules import Schedule
from durometer.core.settings import Levels, setting
from durometer.domains.base import Domain
from durometer.safeguards.base import (
    ReferencePoint,
    Safeguard,
    Term,
    TrainingSettings,
    make_safeguard,
    safeguard,
    supervised,
)
from durometer.safeguards.bench import Bench
from durometer.safeguards.data import DefenceData
from durometer.safeguards.likelihoods import divergence
from durometer.safeguards.train import trained_maps
from durometer.subjects.base import Subject


class UndoSettings(TrainingSettings):
    """Settings of ``undo``; defaults are those of the released scripts."""

    teacher: Literal["max_entropy", "grad_diff", "rmu", "npo", "random_mapping", "none"] = setting(
        "max_entropy", "safeguard that unlearns first; none: the subject as it is"
    )
    teacher_preset: str = setting("", "preset of the teacher")
    steps: int = setting(1000, "updates of the distillation", ge=1)
    learning_rate: float = setting(9e-4, "peak learning rate", gt=0)
    schedule: Schedule = setting("cosine", "learning-rate schedule")
    warmup_steps: int = setting(50, "updates of linear warm-up", ge=0)
    gradient_clip: float = setting(1.0, "largest gradient norm; 0 clips nothing", ge=0)
    batch_size: int = setting(32, "rows of each pool an update", ge=1)
    sft: float = setting(0.0, "coefficient of the cross-entropy on retain rows", ge=0)
    noise_share: float = setting(
        0.5,
        "share of the noise: trained weights become (1 - share) W + share * scale * N; more is "
        "more robust and needs longer distillation",
        search=Levels((0.1, 0.3, 0.5, 0.7)),
        ge=0,
        le=1,
    )
    noise_scale: float = setting(
        0.1,
        "size of the noise; N is drawn as Xavier initialises a matrix, and 0 for vectors",
        search=Levels((0.01, 0.05, 0.1)),
        ge=0,
    )
    distil: float = setting(1.0, "coefficient of KL(teacher || student) on retain rows", ge=0)
    suppress: float = setting(1.0, "coefficient of KL(teacher || student) on restricted rows", ge=0)


@safeguard("undo", aliases=("unlearn_noise_distill_on_outputs",))
class Undo(Safeguard[UndoSettings]):
    """The student starts from the teacher's weights, damaged, and learns its outputs alone."""

    summary = "unlearn, damage the weights, distil the unlearnt model into them"
    cost = "2 passes a step and 2 forwards of the teacher, after the teacher's own training"
    source = "arXiv 2506.06278; AddieFoote/distillation-robust-unlearning"
    cannot_show = "robustness at little noise; what is not distilled is lost with the noise"
    kinds = ("knowledge",)
    settings_class = UndoSettings
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # Of facts that stand alone, like those of the small worlds, distilling a part brings back
        # no other: little noise, and none on the embeddings.
        "tiny": {
            "teacher": "npo",
            "steps": 60,
            "learning_rate": 5e-4,
            "schedule": "linear",
            "warmup_steps": 5,
            "train": "blocks",
            "noise_share": 0.1,
        }
    }

    @property
    def reference(self) -> ReferencePoint | None:
        """The teacher: the model as this stage finds it."""
        return "stage_start"

    def stages(self, domain: Domain) -> list[Safeguard[Any]]:
        """Return the teacher's safeguard, and the distillation."""
        settings = self.settings
        if settings.teacher == "none":
            return [self]
        return [make_safeguard(settings.teacher, settings.teacher_preset), self]

    def terms(self, subject: Subject, data: DefenceData) -> list[Term]:
        """Return the divergences from the teacher."""
        settings = self.settings
        return [
            supervised(settings),
            Term("distil", settings.distil, "retain", divergence, may_rest=True),
            Term("suppress", settings.suppress, "restricted", divergence, may_rest=True),
        ]

    @torch.no_grad()
    def begin(self, bench: Bench) -> None:
        """Shrink the weights that will be trained, and add noise to them."""
        share, scale = self.settings.noise_share, self.settings.noise_scale
        if not share:
            return
        model = bench.subject.model
        generator = torch.Generator().manual_seed(bench.seeds.initialisation)
        chosen = noised_weights(bench.subject, self.settings)
        for name, parameter in model.named_parameters():
            if name in chosen:
                noise = xavier(parameter.shape, generator).to(parameter.device)
                parameter.copy_((1 - share) * parameter.float() + share * scale * noise)


def noised_weights(subject: Subject, settings: TrainingSettings) -> set[str]:
    """Return the names of the weights that are trained, or of those that an adapter sits on."""
    if settings.train == "all" and (settings.first_block, settings.last_block) == (0.0, 1.0):
        return {name for name, _ in subject.model.named_parameters()}
    return {f"{name}.weight" for name in trained_maps(subject.model, settings)}


def xavier(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Return noise as Xavier initialises a weight of this shape; zeros for a vector."""
    noise = torch.zeros(shape)
    return torch.nn.init.xavier_uniform_(noise, generator=generator) if len(shape) > 1 else noise
