"""Merging the subject with another checkpoint of its family, by five published rules."""

from typing import Literal, TypeVar

import torch

from durometer.core import merging
from durometer.core.budget import Spent
from durometer.core.merging import Divisor, Rescale, SignElection
from durometer.core.seeds import Seeds
from durometer.core.settings import Between, Levels, Settings, setting
from durometer.domains.base import Domain
from durometer.subjects.base import Subject
from durometer.tampers.base import Realised, tamper
from durometer.tampers.ladder import Strengths
from durometer.tampers.partners import PartnerLadder, Tensors, generator_for, undefended_or

MERGEKIT = "arcee-ai/mergekit"
CANNOT_SHOW = "what merging with checkpoints that were not tried would undo"


class MergeSettings(Settings):
    """What every merge needs: whom with, and how much of it."""

    partner: str = setting(
        "",
        "checkpoint merged with, named like a subject; '' is the subject's own before its "
        "safeguard, which only a defender's insider has (A5)",
    )
    strengths: Strengths = setting(
        (0.25, 0.5, 0.75, 1.0), "weight of the partner, the subject's being the rest", min_length=1
    )


class BasedSettings(MergeSettings):
    """A merge of differences to a common base."""

    base: str = setting(
        "",
        "checkpoint that differences are taken to; '' is the subject's own before its safeguard, "
        "or the subject itself where the partner is that one",
    )


class TaskArithmeticSettings(BasedSettings):
    """Adding a difference of two checkpoints; beyond 1 it overshoots the partner."""

    strengths: Strengths = setting(
        (0.5, 1.0, 1.5), "factor of partner - base; negative ones subtract it", min_length=1
    )


class TiesSettings(BasedSettings):
    """TIES with its conventions."""

    density: float = setting(
        0.5, "share of each difference that stays", search=Between(0.1, 0.9), gt=0, le=1
    )
    sign: SignElection = setting(
        "weighted",
        "whose sum elects the sign: weighted or plain differences, or their signs",
        search=Levels(("weighted", "unweighted", "count")),
    )
    divide_by: Divisor = setting(
        "agreeing_weights",
        "what the agreeing entries are divided by",
        search=Levels(("agreeing_weights", "agreeing_count", "nothing")),
    )
    rescale: Literal["l1", "none"] = setting(
        "none", "whether trimmed differences get their L1 norm back"
    )


class DareSettings(BasedSettings):
    """DARE with its conventions."""

    density: float = setting(
        0.5, "probability with which an entry stays", search=Between(0.1, 0.9), gt=0, le=1
    )
    rescale: Rescale = setting(
        "density", "what makes up for dropped entries: 1/density, the L1 norm, or nothing"
    )
    consensus: Literal["none", "ties"] = setting(
        "none",
        "whether the differences are added, or elect signs as in TIES",
        search=Levels(("none", "ties")),
    )


M = TypeVar("M", bound=MergeSettings)
B = TypeVar("B", bound=BasedSettings)


class Merge(PartnerLadder[M]):
    """Base of merges of two checkpoints: a rule for one tensor of each."""

    cost = "O(weights) a strength, no passes"
    cannot_show = CANNOT_SHOW
    _partner = ""

    def strengths(self) -> tuple[float, ...]:
        """Return the partner's weights in the order given."""
        return self.settings.strengths

    def prepare(
        self, subject: Subject, data: Domain, seeds: Seeds, realised: Realised, spent: Spent
    ) -> None:
        """Load the partner and compare it with the subject."""
        self._partner = undefended_or(subject, self.settings.partner, "partner")
        self.load(subject, "partner", self._partner, realised)
        self.compare(subject, realised, spent)
        used = set(self._loaded)
        realised.facts["access_level"] = "A5" if subject.source.undefended in used else "A4"

    def apply(self, subject: Subject, strength: float, realised: Realised) -> int:
        """Merge tensor by tensor; return how many weights were written."""
        partner = self._loaded[self._partner]

        def make(name: str, own: torch.Tensor) -> torch.Tensor:
            return self.merged(name, own, partner[name], strength)

        return self.write(subject, strength, realised, make)

    def merged(
        self, name: str, own: torch.Tensor, partner: torch.Tensor, strength: float
    ) -> torch.Tensor:
        """Return the merged tensor (fp32)."""
        raise TypeError(f"{type(self).__name__} defines no merged()")  # pragma: no cover


class BasedMerge(Merge[B]):
    """Base of merges of differences to a base checkpoint."""

    _base: Tensors | None = None

    def prepare(
        self, subject: Subject, data: Domain, seeds: Seeds, realised: Realised, spent: Spent
    ) -> None:
        """Load partner and base; a base equal to the partner leaves the subject as the base."""
        partner = undefended_or(subject, self.settings.partner, "partner")
        base = undefended_or(subject, self.settings.base, "base")
        self._base = None
        realised.facts["base"] = subject.name
        if base != partner:
            self._base = self.load(subject, "base", base, realised)
        super().prepare(subject, data, seeds, realised, spent)

    def deltas(
        self, name: str, own: torch.Tensor, partner: torch.Tensor
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the base's tensor, and the differences of subject and partner to it (fp32).

        Where the subject is the base its own difference, 0 throughout, is left out.
        """
        if self._base is None:
            return own.float(), [partner.float() - own.float()]
        base = self._base[name].float()
        return base, [own.float() - base, partner.float() - base]

    def weights(self, strength: float) -> list[float]:
        """Return the weight of each difference."""
        return [strength] if self._base is None else [1 - strength, strength]


@tamper("merge_linear", aliases=("merge-linear",))
class MergeLinear(Merge[MergeSettings]):
    """The weighted mean of subject and partner."""

    summary = "weighted mean of the subject's and another checkpoint's weights"
    source = f"arXiv 2203.05482; {MERGEKIT}"
    settings_class = MergeSettings

    def merged(
        self, name: str, own: torch.Tensor, partner: torch.Tensor, strength: float
    ) -> torch.Tensor:
        """Return ``(1 - s) W_h + s W_p``; strengths 0 and 1 give either bit for bit."""
        return merging.linear((own, partner), (1 - strength, strength))


@tamper("merge_slerp", aliases=("merge-slerp",))
class MergeSlerp(Merge[MergeSettings]):
    """Interpolation on the arc between subject and partner."""

    summary = "interpolation on the arc between the subject's and another checkpoint's weights"
    source = f"Shoemake 1985; {MERGEKIT}"
    cannot_show = f"{CANNOT_SHOW}; near relatives are nearly parallel, where it is the linear merge"
    settings_class = MergeSettings

    def merged(
        self, name: str, own: torch.Tensor, partner: torch.Tensor, strength: float
    ) -> torch.Tensor:
        """Return the point of the arc, each tensor flattened."""
        return merging.slerp(own, partner, strength)


@tamper("task_arithmetic", aliases=("task-arithmetic",))
class TaskArithmetic(BasedMerge[TaskArithmeticSettings]):
    """The difference of two checkpoints added to the subject."""

    summary = "adds the difference of two other checkpoints to the subject's weights"
    source = f"arXiv 2212.04089; {MERGEKIT}"
    settings_class = TaskArithmeticSettings

    def merged(
        self, name: str, own: torch.Tensor, partner: torch.Tensor, strength: float
    ) -> torch.Tensor:
        """Return ``W_0 + d_h + s d_p``, that is ``W_h + s (W_p - W_0)``."""
        if self._base is None:
            # The same number, but the partner bit for bit at strength 1.
            return merging.linear((own, partner), (1 - strength, strength))
        _, (_, difference) = self.deltas(name, own, partner)
        return merging.task_arithmetic(own, [difference], [strength])


@tamper("merge_ties", aliases=("merge-ties",))
class MergeTies(BasedMerge[TiesSettings]):
    """Differences trimmed, signs elected, agreeing entries averaged."""

    summary = "TIES merge: trimmed differences to a base, of the elected signs alone"
    source = f"arXiv 2306.01708; {MERGEKIT}"
    settings_class = TiesSettings

    def merged(
        self, name: str, own: torch.Tensor, partner: torch.Tensor, strength: float
    ) -> torch.Tensor:
        """Return the base with the merged difference; a lone difference is scaled by strength.

        Its weight would cancel out in the average.
        """
        settings = self.settings
        base, deltas = self.deltas(name, own, partner)
        alone = len(deltas) == 1
        return base + merging.ties(
            deltas,
            [1.0] if alone else self.weights(strength),
            settings.density,
            sign=settings.sign,
            divide_by=settings.divide_by,
            rescale=settings.rescale,
            scale=strength if alone else 1.0,
        )


@tamper("merge_dare", aliases=("merge-dare",))
class MergeDare(BasedMerge[DareSettings]):
    """Differences with entries dropped at random and the rest scaled up."""

    summary = "DARE merge: differences to a base with random entries dropped, the rest scaled up"
    source = f"arXiv 2311.03099; {MERGEKIT}"
    settings_class = DareSettings

    def merged(
        self, name: str, own: torch.Tensor, partner: torch.Tensor, strength: float
    ) -> torch.Tensor:
        """Return the base with the merged difference; every strength drops the same entries."""
        settings = self.settings
        base, deltas = self.deltas(name, own, partner)
        alone = len(deltas) == 1 and settings.consensus == "ties"
        merged = merging.dare(
            deltas,
            [1.0] if alone else self.weights(strength),
            settings.density,
            generator_for(self._seeds.initialisation, name),
            rescale=settings.rescale,
            consensus=settings.consensus,
        )
        return base + (strength * merged if alone else merged)
