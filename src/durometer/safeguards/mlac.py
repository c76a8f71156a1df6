"""MLAC, meta-learned adversarial censoring: fine-tuning on what is restricted is made to fail."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch

from durometer.core.settings import Levels, setting
from durometer.safeguards.base import Term, Visit, safeguard, supervised
from durometer.safeguards.data import DefenceData
from durometer.safeguards.inner import ATTACKED, AgainstAttacks, OneLossSettings
from durometer.safeguards.passes import Pass
from durometer.safeguards.train import Step
from durometer.subjects.base import Subject


class MlacSettings(OneLossSettings):
    """Settings of ``mlac``."""

    steps: int = setting(500, "outer updates", ge=1)
    learning_rate: float = setting(2e-5, "outer learning rate", gt=0)
    censoring: float = setting(
        1.0,
        "coefficient of the bounded loss of restricted rows under attack (lambda)",
        search=Levels((0.5, 1.0, 2.0, 4.0)),
        ge=0,
    )


@safeguard("mlac", aliases=("mlac_ar",))
class Mlac(AgainstAttacks[MlacSettings]):
    """Cross-entropy on retain rows, minus the bounded one of restricted rows after inner attacks.

    First-order: gradients at the attacked weights are applied to the clean ones, where the original
    back-propagates through the attack. The loss of each label is clamped at the logarithm of the
    vocabulary, chance, without which it diverges.
    """

    summary = "train against simulated fine-tuning so that its loss stays at chance"
    cost = "K + K / stride + 1 passes an outer step"
    source = "arXiv 2211.14946, first-order port with the clamp of arXiv 2408.00761"
    cannot_show = "resistance to attacks that are longer than, or unlike, those it is trained with"
    kinds = ("knowledge",)
    settings_class = MlacSettings
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "tiny": {
            "steps": 100,
            "learning_rate": 1e-3,
            "schedule": "linear",
            "warmup_steps": 5,
            "gradient_clip": 1.0,
            "batch_size": 64,
            "train": "mlp",
            "censoring": 10.0,
            "inner_steps": 8,
            "inner_rates": (1e-3,),
            "inner_batch": 8,
        }
    }

    def terms(self, subject: Subject, data: DefenceData) -> list[Term]:
        """Return the retain loss and, at attacked weights, minus the bounded restricted loss."""
        self.require_fit(subject)
        settings = self.settings
        return [
            supervised(settings),
            Term(
                ATTACKED,
                settings.censoring,
                settings.rows,
                lambda p: -bounded_cross_entropy(p),
                at=ATTACKED,
                may_rest=True,
            ),
        ]

    def visits(self, step: Step) -> Iterator[Visit]:
        """Yield points along inner attacks, then the weights themselves."""
        if self.settings.censoring:
            yield from self.attacked(step)
        yield Visit()


def bounded_cross_entropy(one: Pass) -> torch.Tensor:
    """Return the cross-entropy of each label, at most that of a uniform guess, shape [labels]."""
    return one.cross_entropy().clamp(max=math.log(one.labelled.logits.shape[-1]))
