"""Low-rank fine-tuning with PEFT; the adapter is never merged, so taking it off is the restore."""

import math
from typing import Any, ClassVar, Literal, TypeVar

import torch
from pydantic import field_validator
from torch import nn

from durometer.core.adapters import Adapter, Targets, linear_maps
from durometer.core.seeds import Seeds
from durometer.core.settings import Between, Levels, setting
from durometer.subjects.base import Subject
from durometer.tampers.base import tamper
from durometer.tampers.base_precision import RoundedBase
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
    base_bits: Literal[0, 4, 8] = setting(
        0, "bits to which the frozen base is rounded (QLoRA); 0 leaves it", search=Levels((0, 4, 8))
    )

    @field_validator("base_bits", mode="before")
    @classmethod
    def _number(cls, value: Any) -> Any:
        """Accept '4' as the command line and a search have it."""
        return int(value) if isinstance(value, str) and value.isdigit() else value


L = TypeVar("L", bound=LoraSettings)


@tamper("lora", aliases=("ft-lora", "ft_lora"))
class Lora(FineTuning[L]):
    """Low-rank adapters on the linear maps, trained on restricted answers."""

    summary = "LoRA fine-tuning on restricted answers"
    cost = "about 4 N T"
    source = "arXiv 2106.09685 (LoRA), 2312.03732 (rsLoRA), 2305.14314 (QLoRA); huggingface/peft"
    cannot_show = "what full fine-tuning of the same length would do"
    settings_class: ClassVar[type[LoraSettings]] = LoraSettings
    full = False
    _base: RoundedBase | None = None

    def prepare(self, subject: Subject, seeds: Seeds) -> list[nn.Parameter]:
        """Put a fresh adapter on the subject's linear maps and return its trained matrices."""
        settings = self.settings
        targets = linear_maps(subject.model, settings.targets)
        self._base = None
        if settings.base_bits:
            self._base = RoundedBase(subject, settings.base_bits)
        adapter = Adapter(
            subject.model,
            targets,
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
        """Return the Frobenius norm of the change of every linear map with an adapter.

        With a rounded base the norm is that of rounding and adapter together, and weights that
        were only rounded are listed, too.
        """
        norms = self._adapter.change_norms()
        if self._base is None:
            return norms
        for name, error in self._base.errors.items():
            place = name.removesuffix(".weight")
            total = error.float()
            if place in norms:
                total = total + self._adapter.delta(place)
            norms[place] = float(total.norm()) if math.isfinite(norms.get(place, 0)) else math.inf
        return norms

    def facts(self) -> dict[str, Any]:
        """Return how the frozen base was rounded, where it was."""
        return {} if self._base is None else self._base.facts()
