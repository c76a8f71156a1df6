"""CTRAP: a harmful step leads to where the model says one token whatever it is asked."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch

from durometer.core.errors import InputError
from durometer.core.settings import Between, setting
from durometer.safeguards.banks import perturbed
from durometer.safeguards.base import (
    Safeguard,
    Scope,
    Term,
    TrainingSettings,
    Visit,
    safeguard,
    supervised,
)
from durometer.safeguards.data import DefenceData
from durometer.safeguards.passes import Pass
from durometer.safeguards.probes import PROBE, applied, norm_of
from durometer.safeguards.train import Step
from durometer.subjects.base import Subject

GUIDE = "harmful"


class CtrapSettings(TrainingSettings):
    """Settings of ``ctrap``; the optimiser's are Booster's, the method's own are ours."""

    steps: int = setting(10_000, "updates", ge=1)
    learning_rate: float = setting(5e-4, "learning rate", gt=0)
    weight_decay: float = setting(0.1, "decoupled weight decay", ge=0)
    batch_size: int = setting(10, "rows of each pool an update", ge=1)
    train: Scope = setting(
        "adapter",
        "trained weights: all, the matrices of the blocks or of one kind, or a merged adapter",
    )
    rank: int = setting(32, "rank of the adapter", ge=1)
    collapse: float = setting(
        0.1,
        "coefficient of the loss of the one token after a harmful step (lambda)",
        search=Between(1e-2, 1.0, log=True),
        ge=0,
    )
    step_size: float = setting(
        0.1,
        "the harmful step in gradients of the harmful loss, not normalised (alpha)",
        search=Between(1e-2, 1.0, log=True),
        gt=0,
    )
    token: str = setting("error", "text whose first token is the one that is left", min_length=1)


@safeguard("ctrap")
class Ctrap(Safeguard[CtrapSettings]):
    """Refusal training with a trap: one step along the harmful gradient makes the model collapse.

    The loss is ``L(S) + lambda C(theta - alpha grad L(H))``, where C is the cross-entropy of one
    fixed token at every label of harmless rows; the step counts as fixed.
    """

    summary = "refusal training with a collapse that waits along the harmful gradient"
    cost = "3 passes a step"
    source = "arXiv 2505.16559; lambda and alpha are durometer's own"
    cannot_show = "resistance to an attacker who mixes in harmless rows or stays near the original"
    kinds = ("refusal",)
    settings_class = CtrapSettings
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "tiny": {
            "steps": 120,
            "learning_rate": 3e-3,
            "schedule": "linear",
            "warmup_steps": 12,
            "batch_size": 16,
            "weight_decay": 0.0,
            "rank": 16,
            "step_size": 0.3,
        }
    }
    separate = True

    def terms(self, subject: Subject, data: DefenceData) -> list[Term]:
        """Return the supervised loss, the guide of the step, and the collapse after it."""
        settings = self.settings
        token = first_token(subject, settings.token)

        def collapse(one: Pass) -> torch.Tensor:
            return -one.log_probabilities[:, token]

        guide = 1.0 if settings.collapse else 0.0
        return [
            supervised(settings),
            Term(GUIDE, guide, "restricted", lambda p: p.cross_entropy()),
            Term("collapse", settings.collapse, "retain", collapse, at=PROBE),
        ]

    def visits(self, step: Step) -> Iterator[Visit]:
        """Yield the weights, then the weights after one step on harmful answers."""
        yield Visit()
        if norm_of(step, GUIDE):
            delta = step.bank.combined({GUIDE: -self.settings.step_size})
            with perturbed(step.subject, step.by_name(delta)):
                yield Visit(PROBE)

    def transform(self, step: Step) -> list[torch.Tensor | None]:
        """Return the gradient without that of the guide."""
        return applied(step, GUIDE)


def first_token(subject: Subject, text: str) -> int:
    """Return the id of the first token of ``text``.

    Raises:
        InputError: the tokeniser makes none of it.
    """
    ids = subject.chat.tokenizer.encode(text, add_special_tokens=False)
    if not ids:
        raise InputError(f"the tokeniser of '{subject.name}' makes no token of '{text}'")
    return int(ids[0])
