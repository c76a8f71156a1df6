"""CRL, contrastive representation learning: restricted activations gather, away from the rest."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch.nn import functional

from durometer.core.settings import Between, setting
from durometer.domains.base import Domain
from durometer.safeguards.activations import place_at
from durometer.safeguards.base import (
    ReferencePoint,
    Safeguard,
    Scope,
    Term,
    TrainingSettings,
    Visit,
    safeguard,
    supervised,
)
from durometer.safeguards.circuit_breakers import FirstStage, first_stages
from durometer.safeguards.data import DefenceData, Unit
from durometer.safeguards.likelihoods import divergence
from durometer.safeguards.passes import Pass
from durometer.safeguards.train import Step
from durometer.subjects.base import Subject

BOTH = "restricted_and_sft"


class CrlSettings(TrainingSettings):
    """Settings of ``crl``; defaults are those of the cosine form, in shares of 32 blocks."""

    stage1: FirstStage = setting(
        "auto", "safeguard it starts from; auto: refusal training in refusal domains, else none"
    )
    steps: int = setting(1100, "updates", ge=1)
    learning_rate: float = setting(1e-5, "peak learning rate", gt=0)
    train: Scope = setting("adapter", "trained weights, see plain_sft")
    sft: float = setting(0.0, "coefficient of the cross-entropy on the supervised rows", ge=0)
    benign: float = setting(0.5, "coefficient of the triplet of benign activations (alpha)", ge=0)
    harmful: float = setting(
        0.4, "coefficient of the triplet of restricted activations (beta)", ge=0
    )
    divergence: float = setting(
        0.9, "coefficient of the KL divergence from the reference on benign rows (gamma)", ge=0
    )
    benign_margin: float = setting(
        0.3,
        "by how much benign activations shall be nearer to the reference's than to the mean of the "
        "restricted ones, in cosine distances",
        search=Between(0.1, 1.0),
        ge=0,
    )
    harmful_margin: float = setting(
        0.5,
        "by how much restricted activations shall be nearer to their mean than to the reference's",
        search=Between(0.1, 1.5),
        ge=0,
    )
    temperature: float = setting(2.0, "of both sides of the KL divergence (released code)", gt=0)
    first_depth: float = setting(
        20 / 32, "share of the blocks after which activations count first", gt=0, le=1
    )
    last_depth: float = setting(31 / 32, "and last", gt=0, le=1)


@safeguard("crl", aliases=("triplet",))
class Crl(Safeguard[CrlSettings]):
    """Two hinges on cosine distances d of activations, and a KL divergence on benign rows.

    ``relu(d(b0, b) - d(b, c) + m_b)`` and ``relu(d(h, c) - d(h, h0) + m_h)`` at the tokens that
    predict a response, where b is benign, h restricted, 0 the reference and c the mean of h over
    the batch. Benign rows are the supervised ones: harmless rows, and refusals in refusal domains.
    """

    summary = (
        "gather the activations on restricted answers away from where they and benign ones are"
    )
    cost = "1 pass of twice as many rows a step"
    source = "arXiv 2506.11938; samuelsimko/crl-llm-defense, without its adversarial module"
    cannot_show = "resistance to fine-tuning: jailbreak-tuning is its worst case in 2602.06911"
    settings_class = CrlSettings
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "tiny": {"steps": 80, "learning_rate": 1e-3, "harmful_margin": 1.0}
    }

    @property
    def reference(self) -> ReferencePoint | None:
        """The model at the start of this stage, which refuses in a refusal domain."""
        settings = self.settings
        active = settings.benign or settings.harmful or settings.divergence
        return "stage_start" if active else None

    def stages(self, domain: Domain) -> list[Safeguard[Any]]:
        """Return refusal training first, in domains that are refused, then this."""
        return [*first_stages(self.settings.stage1, domain), self]

    def pools(self, data: DefenceData) -> Mapping[str, list[Unit]]:
        """Return the pool of restricted and benign rows, of which each step takes a batch each."""
        return {BOTH: [*data.pool("restricted"), *data.pool("sft")]}

    def visits(self, step: Step) -> Iterator[Visit]:
        """Join this step's restricted and benign rows, whose means are needed in one pass."""
        if self.reference:
            pairs = itertools.zip_longest(step.units("restricted"), step.units("sft"))
            step.put(BOTH, [unit for pair in pairs for unit in pair if unit])
        yield Visit()

    def terms(self, subject: Subject, data: DefenceData) -> list[Term]:
        """Return the supervised loss, both triplets and the divergence."""
        settings, model = self.settings, subject.model
        first, last = (
            max(place_at(model, d), 1) for d in (settings.first_depth, settings.last_depth)
        )
        places = range(first, max(first, last) + 1)

        def benign(one: Pass) -> torch.Tensor:
            restricted = of_restricted(one)
            return triplet(
                one, places, ~restricted, restricted, settings.benign_margin, gather=False
            )

        def harmful(one: Pass) -> torch.Tensor:
            restricted = of_restricted(one)
            return triplet(
                one, places, restricted, restricted, settings.harmful_margin, gather=True
            )

        def kept(one: Pass) -> torch.Tensor:
            return divergence(one, settings.temperature)[~of_restricted(one)].mean()

        def term(name: str, coefficient: float, loss: Any) -> Term:
            return Term(
                name,
                coefficient,
                BOTH,
                loss,
                "batch",
                reads=("residual",),
                whole=True,
                may_rest=True,
            )

        return [
            supervised(settings),
            term("benign", settings.benign, benign),
            term("harmful", settings.harmful, harmful),
            term("divergence", settings.divergence, kept),
        ]


def of_restricted(one: Pass) -> torch.Tensor:
    """Return which labels belong to restricted rows, shape [labels], bool."""
    flags = [row.restricted for row in one.rows for _ in row.labels]
    return torch.tensor(flags, device=one.labelled.logits.device)


def cosine_distance(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return 1 - cosine along the last axis."""
    return 1 - functional.cosine_similarity(left, right, dim=-1)


def triplet(
    one: Pass,
    places: range,
    chosen: torch.Tensor,
    restricted: torch.Tensor,
    margin: float,
    *,
    gather: bool,
) -> torch.Tensor:
    """Return the mean hinge over places and chosen labels.

    Args:
        places: which residual states.
        chosen: labels whose activations are moved, shape [labels], bool.
        restricted: labels whose mean activation is the centre; its gradient flows.
        gather: towards the centre and away from the reference, or the other way round.
    """
    hinges = []
    now, before = one.states(tokens=False), one.reference.states(tokens=False)
    for place in places:
        centre = now[place][restricted].mean(0, keepdim=True)
        old = cosine_distance(now[place][chosen], before[place][chosen])
        new = cosine_distance(now[place][chosen], centre)
        hinges.append(torch.relu((new - old if gather else old - new) + margin))
    return torch.stack(hinges).mean()
