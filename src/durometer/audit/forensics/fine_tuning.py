"""What is left when no other hypothesis holds: a dense change, as by full fine-tuning."""

from collections.abc import Sequence

import numpy as np

from durometer.audit.forensics.calibration import DENSE_COUNT
from durometer.audit.forensics.noise import white
from durometer.audit.forensics.pairs import Reading
from durometer.findings import Finding, Severity, found

ROUNDED = 0.5
"""Share of rounding in a change from which nothing more is said about it."""


def finding(readings: Sequence[Reading], combined: bool) -> Finding | None:
    """Return the dense change of matrices that nothing else accounts for, None if none is left.

    Args:
        combined: whether a combination of known parents accounts for the change.
    """
    unexplained = [(r, r.spread) for r in readings if r.open and r.spread is not None]
    dense = [
        (r, shape)
        for r, shape in unexplained
        if shape.rank is None and shape.rounding < ROUNDED and not white(shape)
    ]
    if combined or not dense or len(dense) < DENSE_COUNT * len(unexplained):
        return None
    sizes = np.array([r.difference.relative for r, _ in dense])
    even = float(np.median(np.abs(sizes - np.median(sizes))) / np.median(sizes))
    return found(
        "WF-21",
        Severity.MEDIUM,
        f"{len(dense)} matrices changed densely by {np.median(sizes):.2%} (median): trained "
        "further, or merged with a model that was not given",
        {
            "tensors": len(dense),
            "median_relative_change": float(np.median(sizes)),
            "relative_spread": even,
            "median_top_energy": float(np.median([shape.top for _, shape in dense])),
        },
        advice="Weights cannot tell what was trained: measure the safeguard on this model.",
    )
