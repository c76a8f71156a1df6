"""GPTQ quantisation, in memory."""

from typing import Any

from torch import Tensor

from durometer.core.gptq import DAMPING, gptq, output_error
from durometer.core.quantisation import round_to_nearest
from durometer.core.settings import setting
from durometer.tampers.base import tamper
from durometer.tampers.quantize import RemovedBits
from durometer.tampers.quantize_calibrated import Calibrated, CalibratedSettings


class QuantizeGptqSettings(CalibratedSettings):
    """Settings of ``quantize_gptq``."""

    strengths: RemovedBits = setting(
        (12, 13, 14), "bits taken from 16, weakest first: 12 leaves 4", min_length=1
    )
    damping: float = setting(DAMPING, "share of the Hessian's mean diagonal added to it", gt=0)


@tamper("quantize_gptq", aliases=("quantize-gptq",))
class QuantizeGptq(Calibrated[QuantizeGptqSettings]):
    """Columns rounded in order, their errors made up for by later columns."""

    summary = "GPTQ quantisation of the blocks' matrices, calibrated on a choice of text"
    cost = "a forward pass a few blocks; 2 inputs² tokens + inputs³ + outputs inputs² a matrix"
    source = "arXiv 2210.17323 (GPTQ), 2506.20251 (calibration text)"
    cannot_show = "GPTQ with columns reordered by their inputs"
    settings_class = QuantizeGptqSettings

    def several(
        self, weights: list[Tensor], moments: Tensor, bits: int, facts: dict[str, Any]
    ) -> list[Tensor]:
        """Return each weight by GPTQ; ``facts`` keeps the output error and that of rounding."""
        settings = self.settings
        results = []
        for weight in weights:
            result = gptq(
                weight, moments, bits, settings.group_size, settings.scheme, settings.damping
            )
            plain = round_to_nearest(weight, bits, settings.group_size, settings.scheme)
            _add(facts, "output_error", output_error(weight, result, moments))
            _add(facts, "output_error_of_rounding", output_error(weight, plain, moments))
            results.append(result)
        return results


def _add(facts: dict[str, Any], name: str, value: float) -> None:
    facts[name] = facts.get(name, 0.0) + value
