"""Rounding to the grids of quantised files, in numpy: GGUF block types, plain grids, NF4."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from durometer.audit.forensics.linear_algebra import Array

GGUF_TYPES = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
NF4 = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    dtype=np.float32,
)  # fmt: skip
"""Codes of NF4 (QLoRA, arXiv 2305.14314)."""


@dataclass(frozen=True)
class Grid:
    """One way of rounding a matrix.

    Attributes:
        name: such as ``Q4_0`` or ``4-bit symmetric, groups of 64``.
        exact: whether the rounding is fixed by the format, so that any other value is an edit;
            plain grids may also come from calibrated methods (GPTQ, AWQ).
        levels: values that one block can hold, at most.
        group: values that share a scale; 0 for a whole row.
        nearest: rounds whole rows.
    """

    name: str
    exact: bool
    levels: int
    group: int
    nearest: Callable[[Array], Array]

    def fits(self, columns: int) -> bool:
        """Say whether rows of this length can be held."""
        return self.group == 0 or columns % self.group == 0


def _gguf(name: str) -> Grid:
    def nearest(matrix: Array) -> Array:
        from gguf import quants
        from gguf.constants import GGMLQuantizationType

        kind: Any = GGMLQuantizationType[name]
        # An all-zero block divides by zero in a branch that is not taken.
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            coded = quants.quantize(np.ascontiguousarray(matrix), kind)
            held: Array = quants.dequantize(coded, kind)
        return held

    return Grid(name, True, 2 ** int(name[1]), 32, nearest)


def _plain(bits: int, group: int, symmetric: bool) -> Grid:
    def nearest(matrix: Array) -> Array:
        blocks = matrix.reshape(len(matrix), -1, group) if group else matrix[:, None, :]
        if symmetric:
            high = 2 ** (bits - 1) - 1
            scale = np.abs(blocks).max(-1, keepdims=True) / high
            origin, low = np.zeros_like(scale), -high
        else:
            low, high = 0, 2**bits - 1
            origin = blocks.min(-1, keepdims=True)
            scale = (blocks.max(-1, keepdims=True) - origin) / high
        codes = np.rint((blocks - origin) / np.where(scale > 0, scale, 1)).clip(low, high)
        held: Array = np.where(scale > 0, origin + scale * codes, blocks).reshape(matrix.shape)
        return held

    kind = "symmetric" if symmetric else "affine"
    over = f"groups of {group}" if group else "whole rows"
    return Grid(f"{bits}-bit {kind}, {over}", False, 2**bits, group, nearest)


def _nf4(matrix: Array) -> Array:
    blocks = matrix.reshape(-1, 64)
    scale = np.abs(blocks).max(-1, keepdims=True)
    middles = (NF4[1:] + NF4[:-1]) / 2
    codes = np.searchsorted(middles, blocks / np.where(scale > 0, scale, 1))
    held: Array = (scale * NF4[codes]).reshape(matrix.shape)
    return held


GRIDS: tuple[Grid, ...] = (
    *(_gguf(name) for name in GGUF_TYPES),
    *(
        _plain(bits, group, symmetric)
        for bits in (8, 4, 3)
        for group in (0, 128, 64, 32)
        for symmetric in (True, False)
    ),
    Grid("NF4", False, 16, 64, _nf4),
)
BY_NAME = {grid.name: grid for grid in GRIDS}
