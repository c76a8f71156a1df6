"""Base reversion: a line search from the subject back to its checkpoint before the safeguard."""

from typing import Literal

import torch

from durometer.core.budget import Spent
from durometer.core.merging import linear, random_like
from durometer.core.seeds import Seeds
from durometer.core.settings import Levels, Settings, setting
from durometer.domains.base import Domain
from durometer.subjects.base import Subject
from durometer.tampers.base import Realised, tamper
from durometer.tampers.ladder import Strengths
from durometer.tampers.partners import PartnerLadder, generator_for, undefended_or


class BaseReversionSettings(Settings):
    """How far back, and along which difference."""

    base: str = setting(
        "", "checkpoint before the safeguard, named like a subject; '' is the one known for it"
    )
    strengths: Strengths = setting(
        (0.25, 0.5, 0.75, 1.0, 1.25),
        "share of the way to the base; beyond 1 past it",
        min_length=1,
    )
    delta: Literal["true", "random"] = setting(
        "true",
        "difference taken back: the true one, or a random one of its norm in every tensor (a "
        "control)",
        search=Levels(("true", "random")),
    )


@tamper("base_reversion", aliases=("base-reversion",))
class BaseReversion(PartnerLadder[BaseReversionSettings]):
    """``W_0 + (1 - s) (W_h - W_0)``: the subject at s = 0, its base at s = 1."""

    summary = "walks the weights back to the checkpoint before the safeguard, and past it"
    cost = "O(weights) a strength, no passes"
    source = "arXiv 2212.04089 (negated task vectors)"
    cannot_show = "anything about attackers without the checkpoint from before the safeguard"
    settings_class = BaseReversionSettings
    matched_control = ("delta", "random")
    _base = ""

    def strengths(self) -> tuple[float, ...]:
        """Return the shares of the way in the order given."""
        return self.settings.strengths

    def prepare(
        self, subject: Subject, data: Domain, seeds: Seeds, realised: Realised, spent: Spent
    ) -> None:
        """Load the base and compare it with the subject."""
        self._base = undefended_or(subject, self.settings.base, "base")
        self.load(subject, "base", self._base, realised)
        self.compare(subject, realised, spent)

    def apply(self, subject: Subject, strength: float, realised: Realised) -> int:
        """Take ``strength`` of the difference back, tensor by tensor."""
        base = self._loaded[self._base]

        def make(name: str, own: torch.Tensor) -> torch.Tensor:
            if self.settings.delta == "true":
                # Bit for bit at both ends, which W_0 + lambda delta is not.
                return linear((own, base[name]), (1 - strength, strength))
            generator = generator_for(self._seeds.initialisation, name)
            difference = random_like(own.float() - base[name].float(), generator)
            return own.float() - strength * difference

        return self.write(subject, strength, realised, make)
