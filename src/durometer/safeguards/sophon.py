"""SOPHON: non-fine-tunable learning, by turns against simulated fine-tuning and for the rest."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import torch

from durometer.core.settings import Levels, setting
from durometer.safeguards.base import Term, Visit, safeguard, supervised
from durometer.safeguards.data import DefenceData
from durometer.safeguards.inner import ATTACKED, AgainstAttacks, OneLossSettings
from durometer.safeguards.likelihoods import improbability
from durometer.safeguards.passes import Pass
from durometer.safeguards.train import Step
from durometer.subjects.base import Subject


class SophonSettings(OneLossSettings):
    """Settings of ``sophon``; coefficients and turns are those of a published port to GPT-2."""

    steps: int = setting(600, "updates, both kinds together", ge=1)
    learning_rate: float = setting(2e-5, "learning rate", gt=0)
    sft: float = setting(5.0, "coefficient of the cross-entropy on retain rows (beta)", ge=0)
    suppression: float = setting(
        3.0,
        "coefficient of the bounded loss on restricted rows under attack (alpha)",
        search=Levels((1.0, 3.0, 10.0)),
        ge=0,
    )
    bound: Literal["inverse", "uniform"] = setting(
        "inverse",
        "the bounded loss: inverse cross-entropy -log(1 - p), or the divergence of predictions "
        "from uniform ones",
    )
    normal_steps: int = setting(5, "updates on retain rows after each one against attacks", ge=1)
    visits: Literal["trajectory", "last"] = setting(
        "last", "take gradients all along an inner attack, or at its end alone"
    )


@safeguard("sophon", aliases=("sophon_ar",))
class Sophon(AgainstAttacks[SophonSettings]):
    """One update against a simulated attack, then some on retain rows, and so on.

    Both losses of attacked predictions are bounded from below by 0, unlike minus a cross-entropy,
    whose ascent ruins the model.
    """

    summary = "turns of training against simulated fine-tuning and of training on the rest"
    cost = "K + visits passes an update against attacks, 1 pass an ordinary one"
    source = "arXiv 2404.12699, first-order; losses as in ports to language models"
    cannot_show = "resistance to attacks that are longer than, or unlike, those it is trained with"
    kinds = ("knowledge",)
    settings_class = SophonSettings
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "tiny": {
            "steps": 300,
            "learning_rate": 1e-3,
            "schedule": "linear",
            "warmup_steps": 5,
            "gradient_clip": 1.0,
            "batch_size": 32,
            "train": "blocks",
            "sft": 1.0,
            "suppression": 1.0,
            "bound": "uniform",
            "inner_rates": (1e-3,),
            "inner_batch": 8,
        }
    }

    def terms(self, subject: Subject, data: DefenceData) -> list[Term]:
        """Return the retain loss and, at attacked weights, the bounded restricted loss."""
        self.require_fit(subject)
        settings = self.settings
        loss = inverse_cross_entropy if settings.bound == "inverse" else from_uniform
        return [
            supervised(settings),
            Term(
                ATTACKED,
                settings.suppression,
                settings.rows,
                loss,
                at=ATTACKED,
                may_rest=True,
            ),
        ]

    def turn(self, number: int) -> int:
        """Return how many updates against attacks come before update ``number``."""
        return -(-number // (self.settings.normal_steps + 1))

    def visits(self, step: Step) -> Iterator[Visit]:
        """Yield points of an inner attack in one update, the weights themselves in the others."""
        settings = self.settings
        if settings.suppression and step.number % (settings.normal_steps + 1) == 0:
            yield from self.attacked(step)
        # An update that no attack has given a loss is an ordinary one, too.
        if ATTACKED not in step.losses:
            yield Visit()


def inverse_cross_entropy(one: Pass) -> torch.Tensor:
    """Return -log(1 - p) of each label, nats, shape [labels]; 0 where it is impossible."""
    return improbability(one)


def from_uniform(one: Pass) -> torch.Tensor:
    """Return KL(uniform || prediction) at each label, nats, shape [labels]; 0 where it is flat."""
    log_probabilities = one.log_probabilities
    return -log_probabilities.mean(-1) - math.log(log_probabilities.shape[-1])
