"""Round-to-nearest quantisation, in memory."""

from typing import Any

from torch import Tensor

from durometer.core.quantisation import round_to_nearest
from durometer.tampers.base import tamper
from durometer.tampers.quantize import FULL_BITS, GridSettings, WeightOnly, WeightOnlySettings


class QuantizeRtnSettings(GridSettings, WeightOnlySettings):
    """Settings of ``quantize_rtn``."""


@tamper("quantize_rtn", aliases=("quantize-rtn", "quantise"))
class QuantizeRtn(WeightOnly[QuantizeRtnSettings]):
    """Each group of weights rounded to its own evenly spaced grid."""

    summary = "round-to-nearest quantisation of the blocks' matrices to 8, 4, 3 and 2 bits"
    cost = "O(weights)"
    source = "arXiv 2410.16454 and 2605.02196 (what it undoes), 2506.22776 (what it protects)"
    cannot_show = "what a runtime does that quantises activations or the cache as well"
    settings_class = QuantizeRtnSettings

    def strengths(self) -> tuple[float, ...]:
        """Return the bits to take away, fewest first."""
        return self.settings.strengths

    def one(self, weight: Tensor, strength: float, facts: dict[str, Any]) -> Tensor:
        """Return ``weight`` rounded to what is left of 16 bits."""
        bits = facts["bits"] = int(FULL_BITS - strength)
        return round_to_nearest(weight, bits, self.settings.group_size, self.settings.scheme)
