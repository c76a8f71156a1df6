"""NF4 quantisation (QLoRA's), in memory."""

from typing import Any

from torch import Tensor

from durometer.core.quantisation import nf4
from durometer.tampers.base import tamper
from durometer.tampers.quantize import FULL_BITS, WeightOnly, WeightOnlySettings


class QuantizeNf4Settings(WeightOnlySettings):
    """Settings of ``quantize_nf4``; blocks of 64, without quantising the scales again."""


@tamper("quantize_nf4", aliases=("quantize-nf4",))
class QuantizeNf4(WeightOnly[QuantizeNf4Settings]):
    """Blocks of 64 weights on 16 quantiles of a normal distribution."""

    summary = "NF4 quantisation of the blocks' matrices, as loading in 4 bits does"
    cost = "O(weights)"
    source = "arXiv 2305.14314 (QLoRA); bitsandbytes"
    cannot_show = "rounding of the scales themselves (double quantisation)"
    settings_class = QuantizeNf4Settings

    def strengths(self) -> tuple[float, ...]:
        """Return the one there is: 4 of 16 bits are left."""
        return (FULL_BITS - 4.0,)

    def one(self, weight: Tensor, strength: float, facts: dict[str, Any]) -> Tensor:
        """Return ``weight`` in NF4."""
        facts["bits"] = 4
        return nf4(weight)
