"""AWQ quantisation, in memory."""

from typing import Any

from torch import Tensor

from durometer.core.awq import awq
from durometer.core.settings import setting
from durometer.tampers.base import tamper
from durometer.tampers.quantize import RemovedBits
from durometer.tampers.quantize_calibrated import Calibrated, CalibratedSettings


class QuantizeAwqSettings(CalibratedSettings):
    """Settings of ``quantize_awq``."""

    strengths: RemovedBits = setting(
        (12, 13, 14), "bits taken from 16, weakest first: 12 leaves 4", min_length=1
    )


@tamper("quantize_awq", aliases=("quantize-awq",))
class QuantizeAwq(Calibrated[QuantizeAwqSettings]):
    """Inputs scaled up by their size before rounding, and back after it."""

    summary = "AWQ quantisation of the blocks' matrices, calibrated on a choice of text"
    cost = "a forward pass a few blocks; 20 times rounding and outputs inputs² a matrix"
    source = "arXiv 2306.00978 (AWQ), 2506.20251 (calibration text)"
    cannot_show = "AWQ with clipped ranges"
    settings_class = QuantizeAwqSettings

    def several(
        self, weights: list[Tensor], moments: Tensor, bits: int, facts: dict[str, Any]
    ) -> list[Tensor]:
        """Return the weights by AWQ; ``facts`` keeps the exponents that were chosen."""
        return self._together(weights, moments, bits, facts)

    def first_maps(
        self, weights: Tensor, moments: Tensor, bits: int, facts: dict[str, Any]
    ) -> Tensor:
        """Return experts by AWQ with one scale for all, as one operation before them folds it."""
        return self._together([weights], moments, bits, facts)[0]

    def _together(
        self, weights: list[Tensor], moments: Tensor, bits: int, facts: dict[str, Any]
    ) -> list[Tensor]:
        settings = self.settings
        results, alpha = awq(weights, moments, bits, settings.group_size, settings.scheme)
        facts.setdefault("alphas", []).append(alpha)
        return results
