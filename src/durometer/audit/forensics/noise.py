"""White noise on the weights: no direction, row or column of the change stands out."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from durometer.audit.forensics.calibration import ROUNDING, WHITE_COUNT, WHITE_EDGE
from durometer.audit.forensics.low_rank import Shape
from durometer.audit.forensics.pairs import Reading
from durometer.findings import Finding, Severity, found, unsure


def white(shape: Shape) -> bool:
    """Say whether the spectrum ends where that of white noise does (Marchenko-Pastur)."""
    low, high = WHITE_EDGE
    return shape.rank is None and low <= shape.edge <= high


def finding(readings: Sequence[Reading]) -> Finding | None:
    """Return noise that most changed matrices carry, None if there is none."""
    changed = [(r, r.spread) for r in readings if r.open and r.spread is not None]
    noisy = [(r, shape) for r, shape in changed if white(shape)]
    if not noisy or len(noisy) < WHITE_COUNT * len(changed):
        return None
    sizes = [r.difference.relative for r, _ in noisy]
    rounding = float(np.median([shape.rounding for _, shape in noisy]))
    quantised = sum(r.grid is not None for r, _ in noisy) >= 0.5 * len(noisy)
    within = rounding >= 1 / ROUNDING
    evidence: dict[str, Any] = {
        "tensors": len(noisy),
        "changed_matrices": len(changed),
        "median_relative_size": float(np.median(sizes)),
        "median_edge": float(np.median([shape.edge for _, shape in noisy])),
        "expected_rounding_share": rounding,
    }
    if within or quantised:
        title = f"the change of {len(noisy)} matrices is no more than rounding makes"
        return unsure("WF-31", Severity.INFO, title, **evidence)
    return found(
        "WF-31",
        Severity.MEDIUM,
        f"white noise of {np.median(sizes):.2%} was added to {len(noisy)} matrices",
        evidence,
        advice="Noise hides other edits and can wear down a safeguard: measure it on this model.",
    )
