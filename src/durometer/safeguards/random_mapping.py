"""Random mapping: activations on restricted rows are turned towards fixed random vectors."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch.nn import functional

from durometer.core.optimizers import OptimizerName
from durometer.core.settings import setting
from durometer.core.structure import width
from durometer.safeguards.base import Safeguard, Term, TrainingSettings, safeguard, supervised
from durometer.safeguards.data import DefenceData
from durometer.safeguards.passes import Pass
from durometer.subjects.base import Subject


class RandomMappingSettings(TrainingSettings):
    """Settings of ``random_mapping``; defaults are those of the released code."""

    steps: int = setting(1000, "updates", ge=1)
    learning_rate: float = setting(1e-5, "peak learning rate", gt=0)
    optimizer: OptimizerName = setting("schedule_free_adamw", "optimiser")
    warmup_steps: int = setting(100, "updates of linear warm-up", ge=0)
    mapping: float = setting(1.0, "coefficient of the mapping on restricted rows", ge=0)
    target: Literal["token", "shared"] = setting(
        "token", "one random vector a token id, or one for all (the sources disagree)"
    )
    absolute: bool = setting(True, "turn towards the vector or its opposite, whichever is nearer")
    seed: int = setting(42, "draws the vectors")


@safeguard("random_mapping")
class RandomMapping(Safeguard[RandomMappingSettings]):
    """The first stage of TAR for knowledge: a plain safeguard, undone within tens of steps."""

    summary = "turn the activations on restricted rows towards fixed random vectors"
    cost = "2 passes a step"
    source = "arXiv 2408.00761 (stage 1); rishub-tamirisa/tamper-resistance"
    cannot_show = "resistance to fine-tuning; it is what TAR starts from and is compared with"
    kinds = ("knowledge",)
    settings_class = RandomMappingSettings
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "tiny": {
            "steps": 100,
            "learning_rate": 3e-4,
            "optimizer": "adamw",
            "warmup_steps": 10,
            "batch_size": 32,
        },
        # One vector for all: one a token takes hundreds of updates to be learnt at this size.
        "light": {
            "steps": 60,
            "learning_rate": 3e-4,
            "optimizer": "adamw",
            "schedule": "linear",
            "warmup_steps": 6,
            "batch_size": 8,
            "train": "blocks",
            "mapping": 4.0,
            "target": "shared",
        },
    }

    def terms(self, subject: Subject, data: DefenceData) -> list[Term]:
        """Return the cross-entropy on retain rows and the mapping of restricted ones."""
        settings, model = self.settings, subject.model
        table = _vectors(model, settings.seed)

        def turned(one: Pass) -> torch.Tensor:
            ids = one.token_ids if settings.target == "token" else torch.zeros_like(one.token_ids)
            wanted = table[ids]
            cosines = [functional.cosine_similarity(h, wanted, dim=-1) for h in one.states()]
            found = torch.stack([c.abs() if settings.absolute else c for c in cosines])
            return (1 - found).mean(0)

        mapping = Term(
            "mapping", settings.mapping, "restricted", turned, per="token", reads=("residual",)
        )
        return [supervised(settings), mapping]


def _vectors(model: Any, seed: int) -> torch.Tensor:
    """Return one standard normal vector a token id, shape [vocabulary, width]."""
    generator = torch.Generator().manual_seed(seed)
    shape = (int(model.get_input_embeddings().num_embeddings), width(model))
    return torch.randn(shape, generator=generator).to(next(model.parameters()).device)
