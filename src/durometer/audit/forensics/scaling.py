"""Row, column and global scaling, edits of norms, and rescalings that keep the function."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from durometer.audit.forensics.calibration import EXPLAINED, ROUNDING
from durometer.audit.forensics.linear_algebra import Array, fro2, inner
from durometer.audit.forensics.pairs import Pair, Reading
from durometer.findings import Finding, Severity, found

# Relative tolerance of factors that must cancel; bf16 rounds single factors by 2^-9.
CANCEL = 0.01
CLOSE = 0.3


@dataclass(frozen=True)
class Scaling:
    """How much of a change is mere scaling.

    Attributes:
        factor: best global factor.
        rows, columns: factors of rows and columns, of a norm its element ratios.
        left: share of the change's energy that row or column scaling leaves, the smaller one.
        kind: ``global``, ``rows``, ``columns`` or '' if none accounts for all of it.
    """

    factor: float
    rows: NDArray[np.float32]
    columns: NDArray[np.float32]
    left: float
    kind: str


def _factors(pair: Pair, axis: int) -> tuple[Array, float]:
    """Return the best factor of every row (axis 1) or column (axis 0), and the energy left."""
    rule = "ij,ij->i" if axis else "ij,ij->j"
    norms = np.einsum(rule, pair.base, pair.base)
    mixed = np.einsum(rule, pair.delta, pair.base)
    factors: Array = (1 + mixed / np.where(norms > 0, norms, 1)).astype(np.float32)
    left = pair.changed - float((mixed * (factors - 1)).sum(dtype=np.float64))
    if left < CLOSE * pair.changed:
        # Differences of sums are too coarse for the decision.
        scaled = pair.base * (factors[:, None] if axis else factors[None])
        left = fro2(pair.subject - scaled)
    return factors, left


def measure(pair: Pair) -> Scaling:
    """Return the best scalings of a matrix, and whether one of them is all that was done."""
    rows, left_rows = _factors(pair, 1)
    columns, left_columns = _factors(pair, 0)
    factor = 1 + inner(pair.delta, pair.base) / max(pair.energy, 1e-30)
    allowed = max(ROUNDING * pair.rounding, EXPLAINED**2 * pair.changed)
    if min(left_rows, left_columns) >= CLOSE * pair.changed:
        left_global = pair.changed
    else:
        left_global = fro2(pair.subject - np.float32(factor) * pair.base)
    kind = ""
    if left_global <= allowed:
        kind = "global"
    elif min(left_rows, left_columns) <= allowed:
        kind = "rows" if left_rows <= left_columns else "columns"
    left = min(left_rows, left_columns) / max(pair.changed, 1e-30)
    return Scaling(factor, rows, columns, left, kind)


def measure_norm(pair: Pair) -> Scaling:
    """Return the element ratios of a norm's gains."""
    safe = np.where(pair.base == 0, 1, pair.base)
    ratios = np.where(pair.base == 0, 1, pair.subject / safe).astype(np.float32)
    return Scaling(float(np.median(ratios)), ratios, ratios, 0.0, "gains")


def finding(readings: Sequence[Reading]) -> Finding | None:
    """Return which matrices were merely scaled, None if none was."""
    scaled = [r for r in readings if r.explained == "scaled"]
    if not scaled:
        return None
    kept, tested = preserved(readings)
    kinds = sorted({r.scaling.kind for r in scaled if r.scaling})
    same = tested > 0 and kept == tested
    return found(
        "WF-04",
        Severity.INFO if same else Severity.MEDIUM,
        f"{len(scaled)} matrices are the base's with scaled {' and '.join(kinds)}"
        + ("; the factors cancel between neighbours" if same else ""),
        {
            "tensors": len(scaled),
            "kinds": kinds,
            "factors": {r.name: _range(r) for r in scaled[:12]},
            "links_tested": tested,
            "links_that_cancel": kept,
        },
        advice="" if same else "Scaled rows, columns or gains change the function: ask why.",
    )


def _range(reading: Reading) -> list[float]:
    scaling = reading.scaling
    assert scaling is not None
    factors = scaling.columns if scaling.kind == "columns" else scaling.rows
    return [float(factors.min()), float(factors.max())]


def norms(readings: Sequence[Reading]) -> Finding | None:
    """Return changes of gains and biases; they weigh more when nothing else changed."""
    changed = [r for r in readings if len(r.shape) == 1 and r.open]
    if not changed:
        return None
    matrices = sum(len(r.shape) == 2 and r.difference.equal < 1 for r in readings)
    kept, tested = preserved(readings)
    same = tested > 0 and kept == tested
    alone = matrices == 0
    return found(
        "WF-61",
        Severity.MEDIUM if alone and not same else Severity.INFO,
        f"{len(changed)} vectors (gains, biases) differ from the base's"
        + (" and nothing else does" if alone else ""),
        {
            "tensors": {r.name: r.difference.relative for r in changed[:12]},
            "matrices_changed": matrices,
            "links_tested": tested,
            "links_that_cancel": kept,
        },
        advice="One vector can add or remove a behaviour." if alone else "",
    )


# Where a factor on one side is taken back on the other: (giver, its factors, taker).
_LINKS = (("up", "down"), ("value", "output"))
_FED = {"before_attention": ("query", "key", "value"), "before_mlp": ("gate", "up")}


def preserved(readings: Sequence[Reading]) -> tuple[int, int]:
    """Return how many links between scaled neighbours cancel, and how many were tested."""
    kept = tested = 0
    for layer in sorted({r.place.layer for r in readings if r.place.layer is not None}):
        here = {
            r.place.role if r.place.role != "norm" else r.place.detail: r.scaling
            for r in readings
            if r.place.layer == layer and r.place.part == "weight" and r.scaling is not None
        }
        products = [
            _product(here[giver].rows, here[taker].columns)
            for giver, taker in _LINKS
            if giver in here and taker in here
        ] + [
            _product(here[norm].rows, here[reader].columns)
            for norm, fed in _FED.items()
            for reader in fed
            if norm in here and reader in here
        ]
        tested += len(products)
        kept += sum(float(np.abs(product - 1).max()) < CANCEL for product in products)
    return kept, tested


def _product(rows: Array, columns: Array) -> Array:
    """Return factors times factors; shared key-value heads reach several blocks of columns."""
    if rows.size == columns.size:
        return rows * columns
    if columns.size % rows.size:
        return np.full(1, np.inf, dtype=np.float32)
    times = columns.size // rows.size
    options = []
    for size in (32, 64, 128, rows.size):
        if rows.size % size == 0:
            spread = np.repeat(rows.reshape(-1, size), times, axis=0).reshape(-1)
            options.append(spread * columns)
    return min(options, key=lambda product: float(np.abs(product - 1).max()))
