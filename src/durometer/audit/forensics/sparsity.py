"""Pruning: weights that became zero, the pattern of the zeros, and what the rest is."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from durometer.audit.forensics.calibration import NEW_ZEROS, ROUNDING
from durometer.audit.forensics.linear_algebra import Array, fro2
from durometer.audit.forensics.pairs import Pair, Reading
from durometer.findings import Finding, Severity, found, passed

PATTERNS = ((2, 4), (4, 8))


@dataclass(frozen=True)
class Zeros:
    """The zeros of one tensor.

    Attributes:
        share: of all values, in the subject.
        new: share of values that are zero here and not in the base.
        pattern: ``2:4``, ``4:8``, ``rows``, ``columns``, ``per row`` (equal counts), ``whole
            tensor``, or '' where no zeros are new.
        lines: number of whole rows or columns that became zero.
        by_magnitude: probability that a pruned weight was smaller than a kept one, 0.5 by chance.
        rest_equal: whether all other values are the base's, up to rounding.
    """

    share: float
    new: float
    pattern: str
    lines: int
    by_magnitude: float
    rest_equal: bool


def mask_of(pair: Pair) -> NDArray[np.bool_]:
    """Return where the subject is zero and the base is not."""
    gone: NDArray[np.bool_] = (pair.subject == 0) & (pair.base != 0)
    return gone


def measure(pair: Pair, least: float = NEW_ZEROS) -> Zeros | None:
    """Return the zeros of a matrix, None where fewer than ``least`` (a share) are new."""
    gone = mask_of(pair)
    new = float(gone.mean())
    lines = [int(gone.all(axis=axis).sum()) for axis in (1, 0)]
    if new < least and not any(lines):
        return None
    kept = np.where(gone, 0, pair.delta)
    rest = fro2(kept) <= ROUNDING * pair.rounding
    return Zeros(
        float((pair.subject == 0).mean()), new, _pattern(gone, lines), sum(lines),
        _by_magnitude(pair.base, gone), rest,
    )  # fmt: skip


def _pattern(gone: NDArray[np.bool_], lines: Sequence[int]) -> str:
    whole = gone.all(axis=1).sum() * gone.shape[1] + gone.all(axis=0).sum() * gone.shape[0]
    if whole >= 0.9 * gone.sum():
        return "rows" if lines[0] else "columns"
    for zeros, run in PATTERNS:
        if gone.shape[1] % run == 0 and bool((gone.reshape(-1, run).sum(1) == zeros).all()):
            return f"{zeros}:{run}"
    counts = gone.sum(axis=1)
    return "per row" if counts.max() - counts.min() <= 1 else "whole tensor"


def _by_magnitude(base: Array, gone: NDArray[np.bool_]) -> float:
    """Return the rank statistic of |base| at the zeros against the rest, on a fixed sample."""
    from scipy.stats import rankdata

    values, flags = np.abs(base).reshape(-1), gone.reshape(-1)
    step = max(values.size // 20000, 1)
    values, flags = values[::step], flags[::step]
    pruned, kept = int(flags.sum()), int((~flags).sum())
    if not pruned or not kept:
        return 0.5
    ranks = rankdata(values)[flags].sum()
    return float(1 - (ranks - pruned * (pruned + 1) / 2) / (pruned * kept))


def finding(readings: Sequence[Reading]) -> Finding | None:
    """Return what was pruned, None if nothing was."""
    pruned = [(r, r.zeros) for r in readings if r.zeros is not None]
    if not pruned:
        return None
    shares = [zeros.new for _, zeros in pruned]
    otherwise = [r.name for r, zeros in pruned if not zeros.rest_equal]
    others = sum(r.open and r.zeros is None for r in readings)
    structured = any(zeros.lines for _, zeros in pruned)
    pattern = Counter(zeros.pattern for _, zeros in pruned).most_common(1)[0][0]
    small = structured and max(shares) < 0.1
    elsewhere = "; every other weight is the base's" if not (otherwise or others) else ""
    return found(
        "WF-30",
        Severity.HIGH if small and not others else Severity.MEDIUM,
        f"{np.median(shares):.0%} of the weights of {len(pruned)} matrices became zero"
        f" ({pattern}){elsewhere}",
        {
            "tensors": len(pruned),
            "median_share": float(np.median(shares)),
            "patterns": dict(Counter(zeros.pattern for _, zeros in pruned)),
            "smaller_than_kept": float(np.median([z.by_magnitude for _, z in pruned])),
            "whole_rows_or_columns": {r.name: z.lines for r, z in pruned if z.lines},
            "otherwise_changed": otherwise[:12],
        },
        advice="A few zeroed neurons can remove a safeguard: measure it on this model.",
    )


def finding_alone(shares: dict[str, float]) -> Finding:
    """Return which matrices hold many zeros, with no base to compare."""
    sparse = {name: share for name, share in shares.items() if share >= 0.05}
    if not sparse:
        title = "no matrix holds an unusual share of zeros"
        return passed("WF-30", title)
    median = float(np.median(list(sparse.values())))
    return found(
        "WF-30",
        Severity.MEDIUM,
        f"{len(sparse)} of {len(shares)} matrices are sparse (median {median:.0%} zeros)",
        {"tensors": len(sparse), "median_share": median},
    )
