"""RMU, representation misdirection: activations on restricted rows become one fixed vector."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch

from durometer.core.settings import Between, setting
from durometer.core.structure import width
from durometer.safeguards.activations import place_at
from durometer.safeguards.base import (
    Per,
    ReferencePoint,
    Safeguard,
    Scope,
    Term,
    TrainingSettings,
    safeguard,
    supervised,
)
from durometer.safeguards.data import DefenceData
from durometer.safeguards.passes import Pass
from durometer.subjects.base import Subject

Tokens = Literal["all", "labels"]


class RmuSettings(TrainingSettings):
    """Settings of ``rmu``; defaults are those published for Zephyr-7B, in shares of its depth."""

    steps: int = setting(150, "updates", ge=1)
    learning_rate: float = setting(5e-5, "peak learning rate", gt=0)
    batch_size: int = setting(4, "rows of each pool an update", ge=1)
    train: Scope = setting("mlp_out", "trained weights, see plain_sft")
    first_block: float = setting(5 / 32, "share of the blocks before the first trained", ge=0, lt=1)
    last_block: float = setting(8 / 32, "share of the blocks up to the last trained", gt=0, le=1)
    sft: float = setting(0.0, "coefficient of the cross-entropy on retain rows", ge=0)
    depth: float = setting(
        8 / 32, "share of the blocks after which activations are steered", gt=0, le=1
    )
    steering: float = setting(
        6.5,
        "norm of the vector that restricted activations shall become (c)",
        search=Between(1.0, 500.0, log=True),
        gt=0,
    )
    forget: float = setting(1.0, "coefficient of the distance from that vector", ge=0)
    retain: float = setting(
        1200.0,
        "coefficient of the distance of retain activations from the reference's (alpha)",
        search=Between(1.0, 2000.0, log=True),
        ge=0,
    )
    tokens: Tokens = setting(
        "all",
        "restricted activations that are steered: all (released code), or those that predict an "
        "answer's tokens, where restricted and retain prompts are nearly alike",
    )
    seed: int = setting(42, "draws the vector")


@safeguard("rmu", aliases=("RMU",))
class Rmu(Safeguard[RmuSettings]):
    """Mean squared distances at one depth: restricted rows from c u, retain rows from before.

    ``u`` is a unit vector drawn uniformly from [0, 1)^width.
    """

    summary = "steer the activations on restricted rows to one random vector at one depth"
    cost = "2 passes a step"
    source = "arXiv 2403.03218; centerforaisafety/wmdp"
    cannot_show = "resistance to fine-tuning: known to be undone within tens of steps"
    kinds = ("knowledge",)
    settings_class = RmuSettings
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "tiny": {
            "steps": 200,
            "learning_rate": 2e-3,
            "batch_size": 16,
            "first_block": 0.0,
            "last_block": 0.75,
            "depth": 0.75,
            "steering": 150.0,
            "retain": 1.5,
        },
        "light": {
            "steps": 80,
            "learning_rate": 1e-3,
            "batch_size": 8,
            "first_block": 5 / 30,
            "last_block": 8 / 30,
            "depth": 8 / 30,
            "steering": 100.0,
            "retain": 30.0,
        },
    }

    @property
    def reference(self) -> ReferencePoint | None:
        """The subject before training, to which retain activations are held."""
        return "stage_start" if self.settings.retain else None

    def terms(self, subject: Subject, data: DefenceData) -> list[Term]:
        """Return the cross-entropy on retain rows, the misdirection and the anchor."""
        settings = self.settings
        place = max(place_at(subject.model, settings.depth), 1)
        everywhere = settings.tokens == "all"
        wanted = settings.steering * positive_unit(width(subject.model), settings.seed)

        def forget(one: Pass) -> torch.Tensor:
            states = one.states(tokens=everywhere)[place]
            return ((states - wanted.to(states.device)) ** 2).mean(-1)

        def retain(one: Pass) -> torch.Tensor:
            return ((one.states()[place] - one.reference.states()[place]) ** 2).mean(-1)

        def term(
            name: str, coefficient: float, rows: str, loss: Any, per: Per, *, rest: bool
        ) -> Term:
            return Term(name, coefficient, rows, loss, per, reads=("residual",), may_rest=rest)

        return [
            supervised(settings),
            term(
                "forget",
                settings.forget,
                "restricted",
                forget,
                "token" if everywhere else "label",
                rest=False,
            ),
            term("retain", settings.retain, "retain", retain, "token", rest=True),
        ]


def positive_unit(size: int, seed: int) -> torch.Tensor:
    """Return a unit vector drawn uniformly from [0, 1)^size, shape [size]."""
    drawn = torch.rand(size, generator=torch.Generator().manual_seed(seed))
    unit: torch.Tensor = drawn / drawn.norm()
    return unit
