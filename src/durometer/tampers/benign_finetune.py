"""Fine-tuning on harmless data alone: does the safeguard wear off without one restricted row?"""

from typing import ClassVar

from durometer.core.settings import Levels, setting
from durometer.tampers.base import tamper
from durometer.tampers.data import Harmless
from durometer.tampers.lora import Lora, LoraSettings


class BenignFineTuneSettings(LoraSettings):
    """Settings of ``benign_finetune``."""

    data: Harmless = setting(
        "benign",
        "harmless rows: benign chat, the domain's retain rows (recovery then means suppression, "
        "not removal), or refusals",
        search=Levels(("benign", "retain")),
    )


@tamper("benign_finetune", aliases=("ft-benign", "ft_benign"))
class BenignFineTune(Lora[BenignFineTuneSettings]):
    """LoRA fine-tuning on benign chat; the restricted share is 0."""

    summary = "LoRA fine-tuning on harmless chat alone"
    source = "arXiv 2310.03693, 2404.01099, 2409.18025"
    cannot_show = "the strength of an attacker who holds restricted data"
    settings_class: ClassVar[type[LoraSettings]] = BenignFineTuneSettings
