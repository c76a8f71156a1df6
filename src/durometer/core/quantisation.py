"""Quantise and dequantise in memory: what a weight becomes at a lower precision.

Every function takes a weight ``[..., inputs]`` and returns one of the same shape in fp32; leading
dimensions (outputs, experts) are independent of each other. Groups run along the inputs; where
the group size does not divide the row, the last group is short. A group whose scale is zero (all
zeros, or constant on an affine grid) comes back as it was: nothing is divided by zero.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from durometer.core.errors import InputError

Scheme = Literal["symmetric", "affine"]

NF4_BLOCK = 64
"""Weights that share one scale in NF4."""

NF4_CODES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""Quantiles of a normal distribution, scaled to [-1, 1] with an exact zero (QLoRA, 2305.14314)."""


@dataclass(frozen=True)
class Grid:
    """Evenly spaced values ``origin + scale * code`` with codes from ``low`` to ``high``.

    Attributes:
        scale: distance of neighbours, at least 0; shape ``[..., 1]``, one a group.
        origin: value of code 0, same shape.
    """

    scale: Tensor
    origin: Tensor
    low: int
    high: int

    @classmethod
    def fit(cls, groups: Tensor, bits: int, scheme: Scheme) -> "Grid":
        """Return the grid of each group, spanned by its extremes.

        Args:
            groups: ``[..., group]``.
            bits: 2 to 16; a symmetric grid leaves one code unused, so that 0 is exact.
        """
        if not 2 <= bits <= 16:
            raise InputError(f"bits = {bits}: a grid needs 2 to 16")
        if scheme == "symmetric":
            high = 2 ** (bits - 1) - 1
            scale = groups.abs().amax(-1, keepdim=True) / high
            return cls(scale, torch.zeros_like(scale), -high, high)
        high = 2**bits - 1
        origin = groups.amin(-1, keepdim=True)
        return cls((groups.amax(-1, keepdim=True) - origin) / high, origin, 0, high)

    def codes(self, values: Tensor) -> Tensor:
        """Return the nearest code of each value (ties to even), 0 where the scale is 0."""
        return torch.where(self.scale > 0, self._steps(values), 0.0)

    def nearest(self, values: Tensor) -> Tensor:
        """Return the nearest value of the grid, values beyond its ends at the ends."""
        return self.origin + self.scale * self._steps(values)

    def _steps(self, values: Tensor) -> Tensor:
        """Return the codes, any finite number where the scale is 0."""
        steps = (values - self.origin) / torch.where(self.scale > 0, self.scale, 1.0)
        return steps.round_().clamp_(self.low, self.high)


def grouped(weight: Tensor, group: int | None) -> list[Tensor]:
    """Return ``weight [..., inputs]`` as whole groups ``[..., n, group]`` and a last short one.

    Args:
        group: inputs that share a scale; None for the whole row.
    """
    inputs = weight.shape[-1]
    size = inputs if group is None else min(group, inputs)
    whole = inputs // size * size
    parts = [weight[..., :whole].reshape(*weight.shape[:-1], -1, size)]
    return parts + ([weight[..., None, whole:]] if whole < inputs else [])


def ungrouped(parts: list[Tensor]) -> Tensor:
    """Return the weight that ``grouped`` took apart."""
    return torch.cat([part.flatten(-2) for part in parts], dim=-1)


def round_to_nearest(
    weight: Tensor, bits: int, group: int | None = None, scheme: Scheme = "symmetric"
) -> Tensor:
    """Return ``weight [..., inputs]`` rounded to each group's own grid (fp32).

    Raises:
        InputError: ``bits`` outside 2 to 16.
    """
    parts = grouped(weight.float(), group)
    return ungrouped([Grid.fit(part, bits, scheme).nearest(part) for part in parts])


def nf4_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return weights ``[blocks, 64]`` in order, the last block padded by zeros, and their scales.

    As in bitsandbytes, blocks run over the flattened weight and may cross rows. Scales are
    ``[blocks, 1]``, the largest absolute value of each block; zeros never change it.
    """
    flat = weight.float().flatten()
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % NF4_BLOCK)).view(-1, NF4_BLOCK)
    return blocks, blocks.abs().amax(-1, keepdim=True)


def nf4_codes(blocks: Tensor, scales: Tensor) -> Tensor:
    """Return the index of the nearest of the 16 codes; exact midpoints go down."""
    table = torch.tensor(NF4_CODES, device=blocks.device)
    midpoints = (table[1:] + table[:-1]) / 2
    return torch.bucketize(blocks / torch.where(scales > 0, scales, 1.0), midpoints)


def nf4(weight: Tensor) -> Tensor:
    """Return ``weight`` in NF4: blocks of 64 over the flattened tensor, absolute-maximum scale."""
    blocks, scales = nf4_blocks(weight)
    table = torch.tensor(NF4_CODES, device=weight.device)
    values = scales * table[nf4_codes(blocks, scales)]
    return values.flatten()[: weight.numel()].view(weight.shape)


def gguf_bits(name: str) -> float:
    """Return the bits a weight of the GGUF type ``name``, scales included.

    Raises:
        InputError: no such type, one of 16 bits or more, or one that the reference encoder of the
            ``gguf`` package only decodes (k-quants search their scales in C).
    """
    import numpy as np
    from gguf.constants import GGML_QUANT_SIZES

    kind = _gguf_type(name)
    block, size = GGML_QUANT_SIZES[kind]
    if size * 8 >= 16 * block:
        raise InputError(f"GGUF type {name} holds {size * 8 // block} bits: it quantises nothing")
    try:
        _gguf_round_trip(np.zeros((1, block), dtype=np.float32), kind)
    except NotImplementedError:
        raise InputError(
            f"GGUF type {name} cannot be encoded by the reference encoder; use Q8_0, Q5_1, Q5_0, "
            "Q4_1, Q4_0 or another simple type"
        ) from None
    return float(size * 8 / block)


def gguf_block(name: str) -> int:
    """Return how many weights of the GGUF type ``name`` are stored together.

    Raises:
        InputError: no such type.
    """
    from gguf.constants import GGML_QUANT_SIZES

    return int(GGML_QUANT_SIZES[_gguf_type(name)][0])


def gguf(weight: Tensor, name: str) -> Tensor:
    """Return ``weight [..., inputs]`` encoded and decoded by the ``gguf`` package's own kernels.

    Raises:
        InputError: no such type, or a row that its block does not divide.
    """
    if weight.shape[-1] % gguf_block(name):
        raise InputError(
            f"a row of {weight.shape[-1]} weights is no multiple of {name}'s block of "
            f"{gguf_block(name)}"
        )
    array = weight.detach().float().contiguous().cpu().numpy()
    return torch.from_numpy(_gguf_round_trip(array, _gguf_type(name))).to(weight.device)


def _gguf_type(name: str) -> Any:
    from gguf.constants import GGMLQuantizationType

    if name not in GGMLQuantizationType.__members__:
        raise InputError(f"unknown GGUF type '{name}'")
    return GGMLQuantizationType[name]


def _gguf_round_trip(array: Any, kind: Any) -> Any:
    import numpy as np
    from gguf import quants

    # An all-zero block has 1 / 0 in a branch that is not taken, a tiny one overflows there.
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        return quants.dequantize(quants.quantize(array, kind), kind)
