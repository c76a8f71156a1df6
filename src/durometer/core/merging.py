"""Merging weights: the published rules on tensors, their conventions as explicit arguments.

Libraries share the names of these rules and differ in conventions, so none is left implicit. The
defaults are mergekit's; PEFT's are named where they differ. All arithmetic is in fp32.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch

# Of which sum the majority sign is taken: weighted deltas (mergekit), plain deltas (PEFT, and the
# paper, which has no weights), or the signs alone.
SignElection = Literal["weighted", "unweighted", "count"]
# What the agreeing entries are divided by: the sum of their weights (mergekit with normalize),
# their number (PEFT), or nothing (mergekit without normalize).
Divisor = Literal["agreeing_weights", "agreeing_count", "nothing"]
# How the entries that stay make up for those dropped: times 1/density (the paper, PEFT), scaled to
# the old L1 norm (mergekit), or not at all.
Rescale = Literal["density", "l1", "none"]
# Beyond this cosine the arc is so short that its formula divides by nearly nothing.
NEARLY_PARALLEL = 0.9995
_TINY = 1e-7


def linear(
    tensors: Sequence[torch.Tensor], weights: Sequence[float], *, normalise: bool = True
) -> torch.Tensor:
    """Return ``sum w_i W_i / sum w_i`` (arXiv 2203.05482) in fp32.

    Weights 1 and 0 give the first tensor bit for bit.

    Args:
        tensors: of one shape.
        normalise: divide by the sum of the weights.

    Raises:
        ValueError: the weights to normalise add up to 0.
    """
    total = math.fsum(weights) if normalise else 1.0
    if not total:
        raise ValueError("weights that add up to 0 cannot be normalised")
    return _weighted_sum(tensors, [weight / total for weight in weights])


def slerp(
    first: torch.Tensor, second: torch.Tensor, t: float, *, parallel: float = NEARLY_PARALLEL
) -> torch.Tensor:
    """Return the point at ``t`` of the arc between two tensors seen as vectors, in fp32.

    ``sin((1-t)w)/sin w A + sin(t w)/sin w B`` with the angle w between A and B.

    Args:
        t: 0 gives ``first`` and 1 ``second``, bit for bit.
        parallel: absolute cosine beyond which the points of the chord are taken.
    """
    cosine = cosine_of(first, second)
    if abs(cosine) > parallel:
        return _weighted_sum((first, second), (1 - t, t))
    angle = math.acos(cosine)
    scale = math.sin(angle)
    shares = (math.sin(angle - t * angle) / scale, math.sin(t * angle) / scale)
    return _weighted_sum((first, second), shares)


def cosine_of(first: torch.Tensor, second: torch.Tensor) -> float:
    """Return the cosine between two tensors seen as vectors; 0 where one of them is 0."""
    left, right = first.flatten().float(), second.flatten().float()
    norms = float(left.norm()) * float(right.norm())
    return float(left @ right) / norms if norms else 0.0


def task_arithmetic(
    base: torch.Tensor, deltas: Sequence[torch.Tensor], weights: Sequence[float]
) -> torch.Tensor:
    """Return ``W_0 + sum w_i d_i`` (arXiv 2212.04089) in fp32; negative weights subtract."""
    return base.float() + _weighted_sum(deltas, weights)


def ties(
    deltas: Sequence[torch.Tensor],
    weights: Sequence[float],
    density: float,
    *,
    sign: SignElection = "weighted",
    divide_by: Divisor = "agreeing_weights",
    rescale: Literal["l1", "none"] = "none",
    scale: float = 1.0,
) -> torch.Tensor:
    """Return the merged delta of TIES (arXiv 2306.01708) in fp32: trim, elect a sign, average.

    Args:
        deltas: differences to the base, of one shape.
        density: share of the entries of each delta that stay, the largest by magnitude.
        rescale: ``l1`` scales each trimmed delta to its L1 norm from before.
        scale: factor of the result (lambda of the paper).
    """
    trimmed = [rescaled(delta.float(), trim(delta.float(), density), rescale) for delta in deltas]
    return scale * merge_agreeing(trimmed, weights, sign=sign, divide_by=divide_by)


def dare(
    deltas: Sequence[torch.Tensor],
    weights: Sequence[float],
    density: float,
    generator: torch.Generator,
    *,
    rescale: Rescale = "density",
    consensus: Literal["none", "ties"] = "none",
) -> torch.Tensor:
    """Return the merged delta of DARE (arXiv 2311.03099) in fp32: drop at random, rescale, add.

    Args:
        density: probability with which an entry stays.
        generator: draws what stays; on the CPU, so that every machine draws the same.
        consensus: how the deltas are put together: their weighted sum, or as TIES does (weighted
            signs, divided by the agreeing weights).
    """
    dropped = []
    for delta in deltas:
        keep = torch.rand(delta.shape, generator=generator) < density
        kept = delta.float() * keep.to(delta.device)
        dropped.append(rescaled(delta.float(), kept, rescale, density))
    if consensus == "ties":
        return merge_agreeing(dropped, weights, sign="weighted", divide_by="agreeing_weights")
    return _weighted_sum(dropped, weights)


def trim(delta: torch.Tensor, density: float) -> torch.Tensor:
    """Return ``delta`` with all but its ``density`` largest entries by magnitude set to 0.

    At least one entry stays; the count is rounded down as in mergekit and PEFT.
    """
    if density >= 1:
        return delta
    flat = delta.flatten()
    count = max(int(density * flat.numel()), 1)
    chosen = torch.topk(flat.abs(), count, sorted=False).indices
    return torch.zeros_like(flat).index_copy_(0, chosen, flat[chosen]).view_as(delta)


def rescaled(
    before: torch.Tensor, kept: torch.Tensor, rescale: Rescale, density: float = 1.0
) -> torch.Tensor:
    """Return ``kept``, what is left of ``before``, made up for what was dropped."""
    if rescale == "none":
        return kept
    if rescale == "density":
        return kept / density
    norm, left = float(before.abs().sum()), float(kept.abs().sum())
    return kept if min(norm, left) < _TINY else kept * (norm / left)


def merge_agreeing(
    deltas: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    sign: SignElection,
    divide_by: Divisor,
) -> torch.Tensor:
    """Return the weighted deltas added up entry by entry, those of the elected sign alone.

    A sum of exactly 0 elects plus; entries that are 0 agree with no sign.
    """
    shares = torch.tensor(weights, dtype=torch.float32, device=deltas[0].device)
    weighted = [delta.float() * weight for delta, weight in zip(deltas, weights, strict=True)]
    # A negative weight turns a delta round, so its weighted form is what agrees or does not.
    voters = {"weighted": weighted, "unweighted": deltas}.get(sign, [w.sign() for w in weighted])
    elected = torch.where(sum(voters[1:], start=voters[0].float()) >= 0, 1.0, -1.0)
    compared = deltas if sign == "unweighted" else weighted
    agrees = [delta.sign() == elected for delta in compared]
    merged = _weighted_sum(
        [w * a for w, a in zip(weighted, agrees, strict=True)], [1.0] * len(agrees)
    )
    if divide_by == "nothing":
        return merged
    if divide_by == "agreeing_count":
        shares = torch.ones_like(shares)
    divisor = _weighted_sum([a.float() for a in agrees], shares.tolist())
    return merged / torch.where(divisor == 0, 1.0, divisor)


def random_like(delta: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return a random direction with the norm of ``delta`` (fp32), drawn on the CPU."""
    drawn = torch.randn(delta.shape, generator=generator).to(delta.device)
    norm = float(drawn.norm())
    return drawn * (float(delta.float().norm()) / norm) if norm else drawn


def _weighted_sum(tensors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    total: torch.Tensor | None = None
    for tensor, weight in zip(tensors, weights, strict=True):
        # Without the terms of weight 0 the rest stays as it is, the sign of its zeros included.
        if weight:
            term = tensor.float() * weight
            total = term if total is None else total.add_(term)
    return torch.zeros_like(tensors[0], dtype=torch.float32) if total is None else total
