"""Without a base: does the model write almost nothing along some direction of its stream?"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from durometer.audit.forensics.calibration import GAP
from durometer.audit.forensics.linear_algebra import Array, Vector, fro2
from durometer.findings import Finding, Severity, failed, found, left_out, unsure

LOOKED_AT = 8
FEWEST = 4
RESOLUTION = 1e-7


def writing_gram(matrices: Iterable[Array]) -> tuple[Vector | None, int]:
    """Return the summed Gram matrix of writing matrices [width, columns], each of weight 1."""
    total: Vector | None = None
    count = 0
    for matrix in matrices:
        size = fro2(matrix)
        if size and (total is None or total.shape[0] == matrix.shape[0]):
            gram = matrix @ matrix.T / size if np.isfinite(size) else np.full((1, 1), np.nan)
            total = gram.astype(np.float64) if total is None else total + gram
            count += 1
        del matrix
    return total, count


def finding(gram: Vector | None, count: int) -> Finding:
    """Return whether the bottom of the spectrum has a gap, and how many directions lie below."""
    check = "WF-11"
    if gram is None or count < FEWEST or gram.shape[0] < 4 * LOOKED_AT:
        return left_out(check, "a direction that nothing writes", "too few writing matrices")
    if not np.isfinite(gram).all():
        reason = "a writing matrix holds NaN or infinite values"
        return failed(check, "a direction that nothing writes", reason)
    values = np.linalg.eigvalsh(gram)
    # Below the resolution of fp32 products all values are alike.
    values = np.clip(values, RESOLUTION * values[-1], None)
    ratios = values[:LOOKED_AT] / values[1 : LOOKED_AT + 1]
    place = int(np.argmin(ratios))
    evidence: dict[str, Any] = {
        "matrices": count,
        "gap": float(ratios[place]),
        "directions": place + 1,
        "smallest_over_median": float(values[0] / np.median(values)),
    }
    if ratios[place] >= GAP:
        title = "no direction is missing from all that the model writes; partial removal shows not"
        return unsure(check, Severity.INFO, title, **evidence)
    return found(
        check,
        Severity.MEDIUM,
        f"the model almost never writes along {place + 1} direction(s) of its residual stream",
        evidence,
        advice="Compare with the claimed base.",
    )
