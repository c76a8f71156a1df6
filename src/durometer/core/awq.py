"""AWQ (arXiv 2306.00978): inputs that matter get finer steps, by scaling before rounding."""

from collections.abc import Sequence

import torch
from torch import Tensor

from durometer.core.gptq import output_error
from durometer.core.quantisation import Scheme, round_to_nearest

ALPHAS = tuple(index / 20 for index in range(20))
"""Exponents that are tried; 0 is plain rounding, so the choice is never worse than it."""


def scales(moments: Tensor, alpha: float) -> Tensor:
    """Return the factor of each input, ``rms(x) ** alpha`` over its geometric middle, ``[inputs]``.

    The paper's ``mean |x|`` is replaced by the root mean square, which the second moments give;
    a common factor does not matter. Inputs that were always zero get the smallest factor in use.

    Args:
        moments: ``sum x xᵀ``, shape ``[inputs, inputs]``, or one an expert, experts first: what
            experts are given comes from one operation, so they share their factors.
    """
    return _raised(_sizes(moments), alpha)


def _sizes(moments: Tensor) -> Tensor:
    """Return the root of the summed squares of each input, shape [inputs]."""
    total = moments.diagonal(dim1=-2, dim2=-1).reshape(-1, moments.shape[-1]).sum(0)
    return total.clamp(min=0).float().sqrt()


def _raised(sizes: Tensor, alpha: float) -> Tensor:
    if not alpha or not bool((sizes > 0).any()):
        return torch.ones_like(sizes)
    raised = sizes.clamp(min=float(sizes[sizes > 0].min())) ** alpha
    factors: Tensor = raised / (raised.max() * raised.min()).sqrt()
    return factors.clamp(min=1e-4)


def awq(
    weights: Sequence[Tensor],
    moments: Tensor,
    bits: int,
    group: int | None = None,
    scheme: Scheme = "symmetric",
) -> tuple[list[Tensor], float]:
    """Return ``RTN(W diag(s)) diag(1/s)`` of each weight (fp32) and the chosen exponent.

    The weights read the same inputs and share s, since 1/s is folded into the one operation before
    them; s is the one of ``ALPHAS`` with the least output error, all weights together.

    Args:
        weights: each ``[outputs, inputs]``, or fused experts ``[experts, outputs, inputs]``.
        moments: ``sum x xᵀ`` of their inputs, shape ``[inputs, inputs]``; experts first.
        group: inputs that share a grid; None for the whole row.

    Raises:
        InputError: ``bits`` outside 2 to 16.
    """
    sizes = _sizes(moments)

    def rounded(alpha: float) -> list[Tensor]:
        factors = _raised(sizes, alpha)
        return [
            round_to_nearest(w.float() * factors, bits, group, scheme) / factors for w in weights
        ]

    def error(alpha: float) -> float:
        pairs = zip(weights, rounded(alpha), strict=True)
        return sum(output_error(weight, other, moments) for weight, other in pairs)

    alpha = min(ALPHAS, key=error)
    return rounded(alpha), alpha
