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
    _adapter: Adapter | None = None

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
        self._adapter = adapter
        subject.restoration.on_exit(self._take_off)
        # Dropout draws from the global stream, so each attack starts it at its own seed.
        torch.manual_seed(seeds.initialisation)
        return adapter.trainable()

    def _take_off(self) -> None:
        if self._adapter is not None:
            self._adapter.remove()
            self._adapter = None

    def changes(self, subject: Subject) -> dict[str, float]:
        """Return the Frobenius norm of the change of every linear map with an adapter.

        Where the weights under it were edited as well (a rounded base, an edit before training),
        the norm is that of both together, and weights that were edited alone are listed, too.
        """
        adapter = self._adapter  # none yet where an edit before the training broke the weights
        norms = adapter.change_norms() if adapter else {}
        for name, edited in subject.restoration.changes().items():
            place = name.removesuffix(".weight")
            if adapter is None or place not in norms:
                norms[name] = edited
            elif math.isfinite(norms[place]):
                total = subject.restoration.change(name) + adapter.delta(place)
                norms[place] = float(total.norm())
        return norms

    def facts(self) -> dict[str, Any]:
        """Return how the frozen base was rounded, where it was."""
        return {} if self._base is None else self._base.facts()
