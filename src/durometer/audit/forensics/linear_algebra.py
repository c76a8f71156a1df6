"""Singular values, noise edges and rounding: the arithmetic that the detectors share."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from durometer.audit.tensors import FLOAT8, float8_values

Array = NDArray[np.float32]
Vector = NDArray[np.float64]

EXACT_SIDE = 1024
"""Shorter side up to which all singular values are computed."""
SKETCH = 160
"""Singular values computed of larger matrices."""
# Squared in a Gram matrix, smaller values drown in fp32 rounding.
RESOLUTION = 1e-3


@dataclass(frozen=True)
class Spectrum:
    """Singular values of one matrix.

    Attributes:
        values: the largest ones, descending; all of them for a small matrix.
        energy: squared Frobenius norm.
        shape: of the matrix.
    """

    values: Vector
    energy: float
    shape: tuple[int, int]

    def tail(self, rank: int) -> float:
        """Return the energy beyond the first ``rank`` values."""
        return max(self.energy - float((self.values[:rank] ** 2).sum()), 0.0)

    def edge(self, rank: int) -> float:
        """Return the largest singular value that white noise of the tail's energy would have.

        ``nu (sqrt m + sqrt n)``: the upper edge of the Marchenko-Pastur law.
        """
        m, n = self.shape
        freedom = max((m - rank) * (n - rank), 1)
        return float(np.sqrt(self.tail(rank) / freedom) * (np.sqrt(m - rank) + np.sqrt(n - rank)))

    def rank(self, margin: float) -> int | None:
        """Return how many values stand above the noise of all others; None if none stays below."""
        floor = RESOLUTION * self.values[0]
        limit = min(len(self.values), min(self.shape) - 1)
        for rank in range(limit):
            if self.values[rank] <= max(margin * self.edge(rank), floor):
                return rank
        return None


def fro2(matrix: Array) -> float:
    """Return the squared Frobenius norm, summed in fp64 blocks."""
    flat = matrix.reshape(-1)
    return float(sum(float(np.dot(part, part)) for part in np.array_split(flat, _parts(flat))))


def inner(first: Array, second: Array) -> float:
    """Return the sum of element products, summed in fp64 blocks."""
    a, b = first.reshape(-1), second.reshape(-1)
    pairs = zip(np.array_split(a, _parts(a)), np.array_split(b, _parts(b)), strict=True)
    return float(sum(float(np.dot(x, y)) for x, y in pairs))


def _parts(flat: Array) -> int:
    return max(flat.size >> 16, 1)


def spectrum(matrix: Array) -> Spectrum:
    """Return the singular values of ``matrix``, from the smaller Gram matrix or a sketch."""
    shape = (matrix.shape[0], matrix.shape[1])
    if min(shape) <= EXACT_SIDE:
        gram = matrix @ matrix.T if shape[0] <= shape[1] else matrix.T @ matrix
        values = linalg.eigvalsh(gram, check_finite=False)[::-1].astype(np.float64)
        return Spectrum(np.sqrt(np.clip(values, 0, None)), fro2(matrix), shape)
    _, values = left_vectors(matrix, SKETCH)
    return Spectrum(values, fro2(matrix), shape)


def left_vectors(matrix: Array, count: int, iterations: int = 3) -> tuple[Array, Vector]:
    """Return the leading left singular vectors [rows, count] and singular values of ``matrix``.

    Randomised subspace iteration (arXiv 0909.4061) from a fixed seed.
    """
    count = min(count, *matrix.shape)
    width = min(count + 8, *matrix.shape)
    start = np.random.default_rng(0).standard_normal((matrix.shape[1], width), dtype=np.float32)
    basis = np.linalg.qr(matrix @ start)[0]
    for _ in range(iterations):
        basis = np.linalg.qr(matrix @ (matrix.T @ basis))[0]
    small = basis.T @ matrix
    values, vectors = np.linalg.eigh((small @ small.T).astype(np.float64))
    order = np.argsort(values)[::-1][:count]
    found: Array = (basis @ vectors[:, order].astype(np.float32)).astype(np.float32)
    return found, np.sqrt(np.clip(values[order], 0, None))


def largest_value(matrix: Array) -> float:
    """Return the spectral norm."""
    return float(left_vectors(matrix, 1)[1][0])


def rounded(values: Array, dtype: str) -> Array:
    """Return ``values`` rounded to a format (ties to even) and widened again.

    Args:
        dtype: ``BF16``, ``F16``, ``F8_E4M3`` or ``F8_E5M2``; in 8 bits, what is too large becomes
            the largest number.
    """
    if dtype in FLOAT8:
        return _rounded_to_8_bits(values, float8_values(dtype))
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float32)
    bits = np.ascontiguousarray(values).view(np.uint32)
    half = (bits >> np.uint32(16)) & np.uint32(1)
    kept = (bits + np.uint32(0x7FFF) + half) & np.uint32(0xFFFF0000)
    return kept.view(np.float32)


def _rounded_to_8_bits(values: Array, codes: Array) -> Array:
    known = codes[:128][np.isfinite(codes[:128])]
    middles = (known[1:] + known[:-1]) / 2
    size = np.abs(values)
    below = np.searchsorted(middles, size, side="left")
    # On a middle, the even code of the two.
    above = np.searchsorted(middles, size, side="right")
    nearest: Array = np.copysign(known[np.where(below % 2 == 0, below, above)], values)
    return nearest


def narrowest(values: Array) -> str:
    """Return the narrowest of ``BF16``, ``F16`` and ``F32`` that holds ``values`` exactly."""
    for dtype in ("BF16", "F16"):
        part = np.ascontiguousarray(values[:8])
        if np.array_equal(rounded(part, dtype), part) and np.array_equal(
            rounded(values, dtype), values
        ):
            return dtype
    return "F32"


def rounding_energy(values: Array, dtype: str) -> float:
    """Return the expected squared error of rounding ``values`` to ``dtype``, summed."""
    factor = {"BF16": 2.0**16, "F16": 2.0**13}.get(dtype, 1.0)
    steps = np.spacing(np.abs(values))
    return factor**2 / 12 * fro2(steps)
