"""SOPHON: non-fine-tunable learning, by turns against simulated fine-tuning and for the rest."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import torch

from durometer.core.settings import Levels, setting
from durometer.safeguards.attacks import Adversary
from durometer.safeguards.base import Term, Visit, safeguard, supervised
from durometer.safeguards.data import DefenceData
from durometer.safeguards.passes import Pass
from durometer.safeguards.tar import ATTACKED, AgainstAttacks, InnerSettings
from durometer.safeguards.train import Step
from durometer.subjects.base import Subject

# Log-probabilities above this count as this: an answer that is sure keeps a finite loss.
SUREST = -1e-6


class SophonSettings(InnerSettings):
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
    rows: Literal["restricted", "held_out_restricted"] = setting(
        "restricted", "restricted rows of the outer loss: all, or those no inner attack trains on"
    )
    inner_steps: int = setting(16, "updates of an inner attack (K)", ge=1)
    visits: Literal["trajectory", "last"] = setting(
        "last", "take gradients all along an inner attack, or at its end alone"
    )
    weighting: Literal["exponential", "flat", "normalised"] = setting(
        "normalised",
        "weights of the visits: exp(4 (k - K) / K), 1 / K each, or exponential ones that sum to 1",
    )
    adversaries: tuple[Adversary, ...] = setting(
        ("restricted",),
        "inner attacks, drawn with equal chances: on restricted rows, retain then restricted ones, "
        "both mixed, retain alone; with + between",
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
            "inner_batch": 16,
        }
    }

    def terms(self, subject: Subject, data: DefenceData) -> list[Term]:
        """Return the retain loss and, at attacked weights, the bounded restricted loss."""
        self.require_fine(subject)
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
    # 1 - p by way of expm1: as a difference it rounds to 0 where the answer is sure.
    return -torch.log(-torch.expm1(one.log_likelihood().clamp(max=SUREST)))


def from_uniform(one: Pass) -> torch.Tensor:
    """Return KL(uniform || prediction) at each label, nats, shape [labels]; 0 where it is flat."""
    log_probabilities = one.log_probabilities
    return -log_probabilities.mean(-1) - math.log(log_probabilities.shape[-1])
