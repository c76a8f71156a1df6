"""Low-rank fine-tuning with PEFT; the adapter is never merged, so taking it off is the restore."""

from typing import ClassVar

import torch
from torch import nn

from durometer.core.adapters import Adapter, Targets, linear_maps
from durometer.core.seeds import Seeds
from durometer.core.settings import Between, Levels, setting
from durometer.subjects.base import Subject
from durometer.tampers.base import tamper
from durometer.tampers.finetune import FineTuneSettings, FineTuning


class LoraSettings(FineTuneSettings):
    """Settings of ``lora``."""

    learning_rate: float = setting(
        1e-4, "peak learning rate", search=Between(1e-5, 5e-3, log=True), gt=0
    )
    rank: int = setting(16, "rank of the adapter", search=Levels((1, 4, 8, 16, 32, 64, 128)), ge=1)
    alpha: float = setting(32.0, "scale: the update is alpha / rank times B A", gt=0)
    dropout: float = setting(0.0, "dropout before A", search=Levels((0.0, 0.05)), ge=0, lt=1)
    targets: Targets = setting(
        "all", "linear maps that get an adapter", search=Levels(("all", "attention", "mlp"))
    )
    rank_stabilised: bool = setting(False, "scale by the square root of the rank (rsLoRA)")
    frozen_a: bool = setting(False, "train B alone, A stays as drawn")


@tamper("lora", aliases=("ft-lora", "ft_lora"))
class Lora(FineTuning[LoraSettings]):
    """Low-rank adapters on the linear maps, trained on restricted answers."""

    summary = "LoRA fine-tuning on restricted answers"
    cost = "about 4 N T"
    source = "arXiv 2106.09685 (LoRA), 2312.03732 (rsLoRA); huggingface/peft"
    cannot_show = "what full fine-tuning of the same length would do"
    settings_class = LoraSettings
    full: ClassVar[bool] = False

    def prepare(self, subject: Subject, seeds: Seeds) -> list[nn.Parameter]:
        """Put a fresh adapter on the subject's linear maps and return its trained matrices."""
        settings = self.settings
        adapter = Adapter(
            subject.model,
            linear_maps(subject.model, settings.targets),
            rank=settings.rank,
            alpha=settings.alpha,
            seed=seeds.initialisation,
            dropout=settings.dropout,
            rank_stabilised=settings.rank_stabilised,
            frozen_a=settings.frozen_a,
        )
        subject.restoration.on_exit(adapter.remove)
        # Dropout draws from the global stream, so each attack starts it at its own seed.
        torch.manual_seed(seeds.initialisation)
        self._adapter = adapter
        return adapter.trainable()

    def changes(self, subject: Subject) -> dict[str, float]:
        """Return the Frobenius norm of the change of every linear map with an adapter."""
        return self._adapter.change_norms()
