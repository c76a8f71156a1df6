"""Circuit breakers (representation rerouting): restricted activations leave their old direction."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import field_validator
from torch.nn import functional

from durometer.core.settings import Between, setting
from durometer.domains.base import Domain
from durometer.safeguards.activations import distance, listed, place_at
from durometer.safeguards.base import (
    ReferencePoint,
    Safeguard,
    Scope,
    Term,
    TrainingSettings,
    make_safeguard,
    safeguard,
    supervised,
)
from durometer.safeguards.data import DefenceData
from durometer.safeguards.passes import Pass
from durometer.safeguards.rmu import Tokens
from durometer.subjects.base import Subject

FirstStage = Literal["auto", "refusal", "none"]


class CircuitBreakersSettings(TrainingSettings):
    """Settings of ``circuit_breakers``; defaults are those of Llama-3-8B, in shares of depth."""

    stage1: FirstStage = setting(
        "auto", "safeguard it starts from; auto: refusal training in refusal domains, else none"
    )
    steps: int = setting(150, "updates", ge=1)
    learning_rate: float = setting(1e-4, "peak learning rate", gt=0)
    train: Scope = setting("adapter", "trained weights, see plain_sft")
    first_block: float = setting(0.0, "share of the blocks before the first trained", ge=0, lt=1)
    last_block: float = setting(21 / 32, "share of the blocks up to the last trained", gt=0, le=1)
    sft: float = setting(0.0, "coefficient of the cross-entropy on the supervised rows", ge=0)
    rerouting: float = setting(
        10.0,
        "coefficient of the rerouting at the start; it falls to half at the end",
        search=Between(1.0, 50.0, log=True),
        ge=0,
    )
    retain: float = setting(
        10.0,
        "coefficient of the distance of supervised activations from the reference's: it rises from "
        "nothing to half of this",
        search=Between(1.0, 50.0, log=True),
        ge=0,
    )
    depths: tuple[float, ...] = setting(
        (10 / 32, 20 / 32),
        "shares of the blocks after which activations are rerouted",
        min_length=1,
    )
    tokens: Tokens = setting(
        "all",
        "restricted activations that are rerouted: all, or those that predict an answer's tokens, "
        "where restricted and other prompts are nearly alike",
    )

    @field_validator("depths", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        """Accept ``a+b`` as the command line has it."""
        return listed(value)


@safeguard("circuit_breakers", aliases=("rr", "representation_rerouting"))
class CircuitBreakers(Safeguard[CircuitBreakersSettings]):
    """``c_s relu(cos(h, h0))`` on restricted rows and ``c_r |h - h0|`` on supervised ones.

    ``c_s = a (1 - t / 2T)`` and ``c_r = a t / 2T`` at update t of T, counted from 1.
    """

    summary = "turn the activations on restricted answers away from what they were"
    cost = "2 passes a step"
    source = "arXiv 2406.04313; GraySwanAI/circuit-breakers"
    cannot_show = "resistance to fine-tuning, and to embedding attacks; it is meant for prompts"
    settings_class = CircuitBreakersSettings
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "tiny": {
            "steps": 100,
            "learning_rate": 2e-3,
            "train": "blocks",
            "last_block": 1.0,
            "depths": (0.5, 1.0),
            "harmless_share": 0.75,
        }
    }

    @property
    def reference(self) -> ReferencePoint | None:
        """The model at the start of this stage, which refuses in a refusal domain."""
        settings = self.settings
        return "stage_start" if settings.rerouting or settings.retain else None

    def stages(self, domain: Domain) -> list[Safeguard[Any]]:
        """Return refusal training first, in domains that are refused, then this."""
        return [*first_stages(self.settings.stage1, domain), self]

    def terms(self, subject: Subject, data: DefenceData) -> list[Term]:
        """Return the supervised loss, the rerouting and the anchor, the last two on a schedule."""
        settings = self.settings
        places = sorted({max(place_at(subject.model, d), 1) for d in settings.depths})
        everywhere = settings.tokens == "all"

        def reroute(one: Pass) -> torch.Tensor:
            now, before = (p.states(tokens=everywhere) for p in (one, one.reference))
            turned = [functional.cosine_similarity(now[i], before[i], dim=-1) for i in places]
            return torch.relu(torch.stack(turned)).mean(0)

        return [
            supervised(settings),
            Term(
                "rerouting",
                lambda step, steps: settings.rerouting * (1 - ramp(step, steps)),
                "restricted",
                reroute,
                per="token" if everywhere else "label",
                reads=("residual",),
                may_rest=True,
            ),
            Term(
                "retain",
                lambda step, steps: settings.retain * ramp(step, steps),
                "sft",
                distance,
                per="token",
                reads=("residual",),
                may_rest=True,
            ),
        ]


def first_stages(stage1: FirstStage, domain: Domain) -> list[Safeguard[Any]]:
    """Return the plain safeguard that a chat model of the literature already has."""
    wanted = stage1 == "refusal" or (stage1 == "auto" and domain.kind == "refusal")
    return [make_safeguard("refusal")] if wanted else []


def ramp(step: int, steps: int) -> float:
    """Return t / 2T of update ``step``, counted from 0, of ``steps``."""
    return (step + 1) / (2 * steps)
