"""Casts: a subject that equals the base rounded to another number format, or the reverse."""

from collections.abc import Sequence

import numpy as np

from durometer.audit.forensics.linear_algebra import Array, rounded
from durometer.audit.forensics.pairs import Pair, Reading
from durometer.findings import Finding, Severity, Status

# A tensor may have been cast twice on its way.
CASTS: tuple[tuple[str, ...], ...] = (
    ("BF16",), ("F16",), ("F16", "BF16"), ("BF16", "F16"),
    ("F8_E4M3",), ("F8_E5M2",), ("BF16", "F8_E4M3"), ("BF16", "F8_E5M2"),
)  # fmt: skip
ROWS = 64


def measure(pair: Pair) -> str:
    """Return the casts that turn the base into the subject, '' for none.

    ``widened BF16`` is a subject of more bits that rounds to the base: consistent with the
    original from which the base was cast.
    """
    for casts in CASTS:
        if _becomes(pair.base, pair.subject, casts):
            return " then ".join(casts)
    for dtype in ("BF16", "F16"):
        if _becomes(pair.subject, pair.base, (dtype,)):
            return f"widened {dtype}"
    return ""


def _becomes(first: Array, second: Array, casts: Sequence[str]) -> bool:
    """Say whether casts turn ``first`` into ``second``; a part of the rows is tried before all."""
    for step in (max(len(first) // ROWS, 1), 1):
        cast = np.ascontiguousarray(first[::step])
        for dtype in casts:
            cast = rounded(cast, dtype)
        if not np.array_equal(cast, second[::step]):
            return False
    return True


def finding(readings: Sequence[Reading]) -> Finding | None:
    """Return which casts explain the difference, None if none was seen."""
    casts = sorted({r.precision for r in readings if r.explained == "cast"})
    if not casts:
        return None
    count = sum(r.explained == "cast" for r in readings)
    rest = sum(r.open for r in readings)
    widened = any(cast.startswith("widened") for cast in casts)
    return Finding(
        "WF-02",
        Status.INCONCLUSIVE if rest or widened else Status.PASSED,
        Severity.INFO,
        f"{count} tensors are the base's in another number format ({', '.join(casts)})",
        {"casts": casts, "tensors": count, "not_explained": rest},
    )
