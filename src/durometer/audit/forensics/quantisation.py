"""Is a quantised tensor the base rounded to that grid, and nothing else?

Rounding is deterministic, so the base is quantised again and compared value by value.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from durometer.audit.forensics.calibration import FAITHFUL, ON_GRID, ROW_LIMIT, UNFAITHFUL
from durometer.audit.forensics.grids import BY_NAME, GRIDS, Grid
from durometer.audit.forensics.linear_algebra import Array, fro2, rounded
from durometer.audit.forensics.pairs import Pair, Reading
from durometer.findings import Finding, Severity, Status, found, passed

SAMPLED_ROWS, CAST_ROWS = 32, 4
# A dequantised value may have been stored in bf16; neighbours on 8-bit grids are further apart.
TOLERANCE = 2.0**-8
# GGUF types that only llama.cpp's C code quantises to, with the width of their smallest blocks.
SEARCHED = {"Q2_K": 16, "Q3_K": 16, "Q4_K": 32, "Q5_K": 32, "Q6_K": 16}


@dataclass(frozen=True)
class GridMatch:
    """A grid that the subject's tensor lies on, and how the base rounds to it.

    Attributes:
        equal: share of values that are the base's, rounded.
        worst_row: largest share of unequal values in one row.
        beyond: share of values further from the base than 0.55 steps of their block.
        base_too: whether the base lies on the same grid.
    """

    grid: str
    exact: bool
    equal: float
    worst_row: float
    beyond: float
    base_too: bool

    @property
    def faithful(self) -> bool:
        """Whether the tensor is the quantised base."""
        return self.equal >= FAITHFUL and self.worst_row <= ROW_LIMIT


def same(first: Array, second: Array) -> Any:
    """Return where two matrices hold the same grid value, up to a bf16 cast."""
    return np.abs(first - second) <= TOLERANCE * np.abs(second)


def lies_on(grid: Grid, matrix: Array) -> bool:
    """Say whether rounding to ``grid`` again leaves ``matrix`` as it is, on sampled rows."""
    if not grid.fits(matrix.shape[1]):
        return False
    rows = _sample(matrix)
    if not _few_levels(rows, grid):
        return False
    return float(same(grid.nearest(rows), rows).mean()) >= ON_GRID


def _sample(matrix: Array) -> Array:
    step = max(len(matrix) // SAMPLED_ROWS, 1)
    return np.ascontiguousarray(matrix[::step][:SAMPLED_ROWS])


def _few_levels(rows: Array, grid: Grid) -> bool:
    """Say whether blocks repeat values as the grid makes them do; 8-bit blocks of 32 need not."""
    width = grid.group or rows.shape[1]
    blocks = np.sort(rows.reshape(-1, width)[:256], axis=1)
    distinct = (np.diff(blocks, axis=1) > 0).sum(axis=1) + 1
    return bool((distinct <= grid.levels).all())


def grid_of(matrix: Array, stored: str = "") -> Grid | None:
    """Return the coarsest grid that ``matrix`` lies on, or the one it is stored in."""
    if stored in BY_NAME:
        return BY_NAME[stored]
    found = [grid for grid in GRIDS if lies_on(grid, matrix)]
    return min(found, key=lambda grid: (grid.levels, not grid.exact), default=None)


def measure(pair: Pair) -> GridMatch | None:
    """Return how the base rounds to the grid of the subject, None if it lies on none."""
    if pair.stored in SEARCHED:
        width = SEARCHED[pair.stored]
        beyond = _beyond(pair, width, 2 ** int(pair.stored[1]))
        return GridMatch(pair.stored, False, 0.0, 1.0, beyond, False)
    grid = grid_of(pair.subject, pair.stored) or _cast_grid(pair)
    if grid is None or not grid.fits(pair.base.shape[1]):
        return None
    best = None
    for base in (pair.base, rounded(pair.base, "F16"), rounded(pair.base, "BF16")):
        equal = same(pair.subject, grid.nearest(base))
        share, worst = float(equal.mean()), float(1 - equal.mean(axis=1).min())
        if best is None or share > best[0]:
            best = (share, worst)
        if share >= FAITHFUL:
            break
    assert best is not None
    beyond = _beyond(pair, grid.group or pair.base.shape[1], grid.levels)
    return GridMatch(grid.name, grid.exact, *best, beyond, lies_on(grid, pair.base))


def _cast_grid(pair: Pair) -> Grid | None:
    """Return the grid that the base, rounded to it and cast, is the subject on; a few rows decide.

    Casting moves the values of fine grids further than the grid itself can be told from.
    """
    if pair.precision == "F32":
        return None
    rows = slice(None, None, max(len(pair.base) // CAST_ROWS, 1))
    ours, theirs = (np.ascontiguousarray(m[rows]) for m in (pair.subject, pair.base))
    for grid in GRIDS:
        if grid.fits(theirs.shape[1]):
            equal = rounded(grid.nearest(theirs), pair.precision) == ours
            if float(equal.mean()) >= FAITHFUL:
                return grid
    return None


def error(pair: Pair, match: GridMatch) -> float:
    """Return the squared error that rounding the base to the subject's grid makes, summed.

    Where only llama.cpp rounds to it, that of even steps over each block.
    """
    if match.grid in BY_NAME:
        return fro2(BY_NAME[match.grid].nearest(pair.base) - pair.base)
    width, levels = SEARCHED[match.grid], 2 ** int(match.grid[1])
    if pair.subject.shape[1] % width:
        return 0.0
    blocks = pair.subject.reshape(-1, width)
    steps = (blocks.max(1) - blocks.min(1)) / (levels - 1)
    return float(width / 12 * (steps**2).sum(dtype=np.float64))


def _beyond(pair: Pair, width: int, levels: int) -> float:
    """Return the share of values further from the base than 0.55 steps."""
    if pair.subject.shape[1] % width:
        return float("nan")
    blocks = pair.subject.reshape(-1, width)
    spread = blocks.max(1, keepdims=True) - blocks.min(1, keepdims=True)
    far = np.abs(pair.delta.reshape(-1, width)) > 0.55 * spread / max(levels - 2, 1) + 1e-12
    return float(far.mean())


def finding(readings: Sequence[Reading]) -> Finding | None:
    """Return whether the quantised tensors are the base's, None if none is quantised."""
    lying = [r for r in readings if r.grid is not None]
    if not lying:
        return None
    matches = [r.grid for r in lying if r.grid is not None]
    unequal = {r.name: r.grid.equal for r in lying if r.grid is not None and not r.grid.faithful}
    evidence = {
        "grids": dict(Counter(match.grid for match in matches)),
        "tensors": len(lying),
        "faithful": len(lying) - len(unequal),
        "share_of_equal_values": dict(sorted(unequal.items(), key=lambda item: item[1])[:12]),
        "share_beyond_rounding": float(np.nanmedian([match.beyond for match in matches])),
        "base_on_the_same_grid": sum(match.base_too for match in matches),
    }
    if not unequal:
        title = f"{len(lying)} quantised tensors are the base's, rounded, value for value"
        return passed("WF-50", title, **evidence)
    exact = [match for match in matches if match.exact and not match.faithful]
    tampered = [match for match in exact if match.equal < UNFAITHFUL]
    status = Status.FOUND if tampered else Status.INCONCLUSIVE
    title = (
        f"{len(unequal)} of {len(lying)} quantised tensors are not the base's, rounded to that grid"
        if tampered
        else f"{len(unequal)} of {len(lying)} quantised tensors cannot be told from edited ones"
    )
    return Finding(
        "WF-50",
        status,
        Severity.HIGH if tampered else Severity.MEDIUM,
        title,
        evidence,
        advice="Quantise the base yourself, or fetch the file from its maker.",
    )


def grid_alone(names: Sequence[tuple[str, str, Grid]]) -> Finding | None:
    """Return which 16- or 32-bit tensors lie on a coarser grid: a fact, never an accusation."""
    if not names:
        return None
    grids = Counter(grid.name for _, _, grid in names)
    listed = ", ".join(f"{name} ({count})" for name, count in grids.most_common(3))
    return found(
        "WF-53",
        Severity.INFO,
        f"{len(names)} tensors lie on the grid of a quantised file: {listed}",
        {"grids": dict(grids), "stored_as": dict(Counter(stored for _, stored, _ in names))},
        advice="A dequantised upload is no full-precision model, even if it says so.",
    )
