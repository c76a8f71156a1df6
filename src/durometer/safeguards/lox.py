"""LoX: the low-rank part of what refusal training changed, extrapolated."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch

from durometer.core.errors import DurometerError
from durometer.core.matrices import block_matrices
from durometer.core.settings import Between, Levels, Settings, setting
from durometer.domains.base import Domain
from durometer.safeguards.base import ReferencePoint, Safeguard, make_safeguard, safeguard
from durometer.safeguards.bench import Bench


class LoxSettings(Settings):
    """Settings of ``lox``; rank and strength are those of the paper."""

    stage1: Literal["refusal", "none"] = setting(
        "refusal", "what is extrapolated; none: the last stage before, whatever it was"
    )
    stage1_preset: str = setting("", "preset of the first stage")
    rank: int = setting(
        6,
        "singular directions of each matrix's change that are extrapolated; 0: all of them",
        search=Levels((0, 2, 6, 16)),
        ge=0,
    )
    strength: float = setting(
        1.25, "how much of them is added again", search=Between(0.25, 4.0, log=True), gt=0
    )


@safeguard("lox", aliases=("low_rank_extrapolation",))
class Lox(Safeguard[LoxSettings]):
    """Refusal training, then the same step further along its main directions; no data is used."""

    summary = "refusal training, extrapolated along the main directions of its change"
    cost = "one singular value decomposition a matrix, after refusal training"
    source = "arXiv 2506.15606; VITA-Group/LoX"
    cannot_show = "protection where the attacker tunes the base: report against that, too"
    kinds = ("refusal",)
    settings_class = LoxSettings
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"tiny": {"strength": 0.25}}

    @property
    def reference(self) -> ReferencePoint | None:
        """The subject before any safeguard."""
        return "original"

    def stages(self, domain: Domain) -> list[Safeguard[Any]]:
        """Return refusal training, and the edit."""
        settings = self.settings
        if settings.stage1 == "none":
            return [self]
        return [make_safeguard(settings.stage1, settings.stage1_preset), self]

    @torch.no_grad()
    def edit(self, bench: Bench) -> None:
        """Add the leading part of every block matrix's change once more.

        Raises:
            DurometerError: nothing was changed before, so that there is nothing to go on with.
        """
        assert bench.reference is not None
        base = block_matrices(bench.reference.model)
        changed = False
        for name, matrix in block_matrices(bench.subject.model).items():
            now, before = matrix.maps().float(), base[name].maps().float()
            change = now - before.to(now.device)
            changed = changed or bool(change.any())
            leading = self.settings.strength * leading_part(change, self.settings.rank)
            matrix.parameter.copy_(matrix.turned(now + leading))
        if not changed:
            raise DurometerError(
                "safeguard 'lox': no matrix differs from the subject before any safeguard; "
                "name another safeguard before it, or stage1=refusal"
            )


def leading_part(change: torch.Tensor, rank: int) -> torch.Tensor:
    """Return the best approximation of rank ``rank`` of every map; 0 returns the change itself.

    Args:
        change: shape [..., outputs, inputs], fp32.
    """
    if not rank or rank >= min(change.shape[-2:]):
        return change
    left, values, right = torch.linalg.svd(change, full_matrices=False)
    leading: torch.Tensor = (left[..., :rank] * values[..., None, :rank]) @ right[..., :rank, :]
    return leading
