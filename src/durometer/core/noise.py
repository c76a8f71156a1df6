"""Gaussian noise on weights, in units of each matrix's own spread (arXiv 2412.01784)."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch

from durometer.core.matrices import Matrix

Form = Literal["additive", "multiplicative", "shrink_and_perturb"]


@dataclass
class Added:
    """What became of noise: a dtype may round it away.

    Attributes:
        cosine: between the change that was meant and the one that the dtype holds; 0 for none.
        moved: number of weights that changed.
    """

    cosine: float
    moved: int


@torch.no_grad()
def add_relative_noise(
    matrices: Iterable[Matrix],
    level: float,
    generator: torch.Generator,
    form: Form = "additive",
    shrink: float = 1.0,
) -> Added:
    """Add noise to matrices in place; announce them before (``Restoration.writable``).

    Args:
        level: s, in standard deviations of a matrix; every fused expert has its own.
        generator: on the CPU; the same state gives the same directions at every level.
        form: ``W + s std(W) e``, ``W (1 + s e)`` or ``(1 - shrink s) W + s std(W) e``.
        shrink: how fast ``shrink_and_perturb`` shrinks.
    """
    product = meant = applied = 0.0
    moved = 0
    for matrix in matrices:
        parameter = matrix.parameter
        before = parameter.detach().to(torch.float32, copy=True)
        noise = torch.randn(before.shape, generator=generator).to(before.device)
        intended = _change(before, noise, level, form, shrink)
        parameter.copy_(before + intended)
        change = parameter.detach().float() - before
        product += float((change * intended).sum())
        meant += float((intended**2).sum())
        applied += float((change**2).sum())
        moved += int(change.count_nonzero())
    norms = math.sqrt(meant * applied)
    return Added(product / norms if norms else 0.0, moved)


def _change(
    weights: torch.Tensor, noise: torch.Tensor, level: float, form: Form, shrink: float
) -> torch.Tensor:
    """Return the change that is meant, in fp32."""
    if form == "multiplicative":
        return level * weights * noise
    change = level * weights.std(dim=(-2, -1), correction=0, keepdim=True) * noise
    if form == "shrink_and_perturb":
        change -= min(shrink * level, 1.0) * weights
    return change
