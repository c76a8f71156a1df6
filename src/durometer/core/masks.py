"""Exact masks: the smallest scores of every group, ties included, never one too many."""

from collections.abc import Iterator, Mapping
from typing import Literal

import torch

from durometer.core.matrices import Matrix

Granularity = Literal["tensor", "output_row", "2:4", "4:8"]


def in_groups(scores: torch.Tensor, granularity: Granularity) -> torch.Tensor:
    """Return ``scores`` [..., outputs, inputs] with the compared groups along the last dimension.

    ``tensor`` compares a whole matrix (each expert of a fused tensor is one), ``output_row`` the
    inputs of one output, ``2:4`` and ``4:8`` runs of 4 and 8 neighbouring inputs.
    """
    if granularity == "tensor":
        return scores.flatten(-2)
    if granularity == "output_row":
        return scores
    run = int(granularity[-1])
    return scores.reshape(*scores.shape[:-1], -1, run)


def lowest(scores: torch.Tensor, share: float) -> torch.Tensor:
    """Mark the ``round(share * size)`` smallest scores along the last dimension.

    Of tied scores at the threshold the first ones are taken, so that the count is exact whatever
    the scores (thresholds by value alone over-prune matrices with repeated weights).

    Args:
        scores: shape [..., size], without NaN.
        share: from 0 to 1.

    Returns:
        Mask of the same shape, bool.
    """
    count = round(share * scores.shape[-1])
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(count, dim=-1, keepdim=True).values
    return _filled(scores, threshold, count)


def lowest_scores(scores: torch.Tensor, share: float, granularity: Granularity) -> torch.Tensor:
    """Mark the share of the smallest ``scores`` [..., outputs, inputs] in every group compared."""
    return lowest(in_groups(scores, granularity), share).reshape(scores.shape)


def magnitude_masks(
    matrices: Mapping[str, Matrix], share: float, granularity: Granularity = "tensor"
) -> Iterator[tuple[Matrix, torch.Tensor]]:
    """Yield each matrix with the mask of its smallest weights, shape [..., outputs, inputs].

    Prune by ``matrix.maps().masked_fill_(mask, 0)``, after announcing the change.
    """
    for matrix in matrices.values():
        yield matrix, lowest_scores(matrix.maps().float().abs(), share, granularity)


def highest(scores: torch.Tensor, share: float) -> torch.Tensor:
    """Mark the ``round(share * size)`` largest scores along the last dimension."""
    return lowest(-scores, share)


def lowest_of_each(scores: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Mark as many of the smallest scores of each group as ``counts`` says.

    Args:
        scores: shape [..., size].
        counts: shape [..., 1], integers from 0 to size.
    """
    ordered = scores.sort(dim=-1).values
    threshold = ordered.gather(-1, (counts - 1).clamp(min=0))
    return _filled(scores, threshold, counts) & (counts > 0)


def _filled(
    scores: torch.Tensor, threshold: torch.Tensor, counts: int | torch.Tensor
) -> torch.Tensor:
    """Mark what lies below the threshold, and tied scores until the count is reached."""
    below, tied = scores < threshold, scores == threshold
    missing = counts - below.sum(-1, keepdim=True)
    return below | (tied & (tied.cumsum(-1) <= missing))
