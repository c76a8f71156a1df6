"""Low-rank changes: an adapter that was folded into the weights, and its rank."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from durometer.audit.forensics.calibration import (
    EDGE_MARGIN,
    LOW_RANK_ENERGY,
    LOW_RANK_TAIL,
    RANK_SHARE,
)
from durometer.audit.forensics.linear_algebra import (
    RESOLUTION,
    Array,
    Spectrum,
    largest_value,
    spectrum,
)
from durometer.audit.forensics.pairs import Pair, Reading
from durometer.findings import Finding, Severity, found

SINGLE = 4
"""Matrices up to which a low-rank change counts as an edit of single facts."""


@dataclass(frozen=True)
class Shape:
    """What the change of one matrix looks like.

    Attributes:
        rank: rank of the change when it is low; None if it is not.
        exact: whether nothing but rounding is left beyond the rank.
        above_edge: singular values above the noise edge, whether or not they are few.
        energy: share of the energy in the ``rank`` (or ``above_edge``) leading values.
        top: share of the energy in the leading value.
        rounding: expected rounding error as a share of the energy.
        edge: largest singular value over the white noise edge, rows and columns levelled.
    """

    rank: int | None
    exact: bool
    above_edge: int | None
    energy: float
    top: float
    rounding: float
    edge: float


def measure(pair: Pair, quantisation: float = 0.0) -> Shape:
    """Return the shape of the change.

    Args:
        quantisation: squared error that rounding the base to the subject's grid makes.
    """
    values = spectrum(pair.delta)
    rounding = quantisation or pair.rounding
    above = values.rank(EDGE_MARGIN)
    exact = _exact_rank(values, rounding)
    rank = exact if exact is not None else _rank_in_noise(values, above)
    counted = rank if rank is not None else above or 0
    return Shape(
        rank,
        exact is not None,
        above,
        1 - values.tail(counted) / values.energy,
        float(values.values[0] ** 2) / values.energy,
        rounding / values.energy,
        _white_edge(pair.delta),
    )


def _exact_rank(values: Spectrum, rounding: float) -> int | None:
    """Return the smallest rank beyond which there is nothing but rounding."""
    if values.energy <= LOW_RANK_TAIL * rounding:
        return None
    m, n = values.shape
    ranks = np.arange(1, len(values.values) + 1)
    # Rounding fills every dimension; a rank takes its share of it along.
    freedom = (m - ranks) * (n - ranks) / (m * n)
    allowed = LOW_RANK_TAIL * rounding * freedom + 10 * RESOLUTION**2 * values.energy
    tails = values.energy - np.cumsum(values.values**2)
    within = np.flatnonzero(tails <= allowed)
    if not within.size or within[0] + 1 > RANK_SHARE * min(values.shape):
        return None
    # Rounding hides the weakest values of the rank; those above its own edge still count.
    rank, limit = int(within[0]) + 1, int(RANK_SHARE * min(values.shape))
    while (
        rank < min(limit, len(values.values))
        and values.values[rank] > EDGE_MARGIN * values.edge(rank)
        and values.values[rank] > RESOLUTION * values.values[0]
    ):
        rank += 1
    return rank


def _rank_in_noise(values: Spectrum, above: int | None) -> int | None:
    """Return the values above the noise if they are few and hold nearly everything."""
    if not above or above > min(values.shape) / 8:
        return None
    return above if 1 - values.tail(above) / values.energy >= LOW_RANK_ENERGY else None


def _white_edge(delta: Array) -> float:
    """Return the largest singular value in units of the noise edge, rows and columns levelled."""
    levelled: NDArray[np.floating[Any]] = delta
    for axis in (1, 0):
        sizes = np.sqrt((levelled**2).mean(axis=axis, keepdims=True))
        levelled = levelled / np.where(sizes > 0, sizes, 1)
    m, n = levelled.shape
    deviation = np.sqrt(float((levelled**2).sum()) / levelled.size)
    edge = float(deviation * (np.sqrt(m) + np.sqrt(n)))
    return largest_value(levelled.astype(np.float32)) / max(edge, 1e-30)


def finding(readings: Sequence[Reading]) -> Finding | None:
    """Return the low-rank change with its rank, None if there is none."""
    open_ones = [r for r in readings if r.open and r.spread is not None]
    low = [r for r in open_ones if r.spread is not None and r.spread.rank is not None]
    if not low or len(low) < 0.5 * len(open_ones):
        return None
    ranks = Counter(r.spread.rank for r in low if r.spread is not None)
    rank, count = ranks.most_common(1)[0]
    by_role = defaultdict[str, list[int]](list)
    for reading in low:
        assert reading.spread is not None
        by_role[reading.place.role].append(reading.spread.rank or 0)
    median = int(np.median([r.spread.rank or 0 for r in low if r.spread is not None]))
    few = len(low) <= SINGLE and median <= 2
    agree = count / len(low)
    what = "an edit of single layers" if few else "an adapter folded in"
    return found(
        "WF-60" if few else "WF-20",
        Severity.MEDIUM,
        f"the change of {len(low)} matrices has rank {rank if agree >= 0.5 else median}: {what}",
        {
            "tensors": len(low),
            "changed_matrices": len(open_ones),
            "median_rank": median,
            "commonest_rank": rank,
            "share_of_commonest_rank": agree,
            "median_rank_by_role": {role: int(np.median(v)) for role, v in by_role.items()},
            "exact_up_to_rounding": sum(r.spread.exact for r in low if r.spread is not None),
        },
        advice="Ask which adapter this is; a claim of unchanged weights is wrong.",
    )
