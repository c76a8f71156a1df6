"""Losses on likelihoods that several safeguards share, and when to end an ascent without bound."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional

from durometer.safeguards.base import Term
from durometer.safeguards.passes import Pass


def divergence(one: Pass, temperature: float = 1.0) -> torch.Tensor:
    """Return T^2 KL(frozen || trained) at temperature T of each label, nats, shape [labels]."""
    now, before = (
        (p.labelled.logits.float() / temperature).log_softmax(-1) for p in (one, one.reference)
    )
    return temperature**2 * (before.exp() * (before - now)).sum(-1)


def mean_nll(one: Pass) -> torch.Tensor:
    """Return the mean cross-entropy of each row's own labels, nats, shape [rows].

    Every row counts alike, however long it is.
    """
    lengths = torch.tensor([len(row.labels) for row in one.rows])
    return -one.row_log_likelihood() / lengths.to(one.labelled.logits.device)


def improbability(one: Pass, floor: float = -math.inf) -> torch.Tensor:
    """Return ``-log(1 - p)`` of each label, nats, shape [labels].

    It is 0 where ``log p`` is below ``floor``.
    """
    logits, targets = one.labelled.logits.float(), one.labelled.targets[:, None]
    rest = logits.scatter(1, targets, -math.inf).logsumexp(-1)
    # By the lead over all other tokens together: 1 - p rounds to 0 where the answer is sure, and
    # there the gradient by the lead is 1.
    lead = logits.gather(1, targets)[:, 0] - rest
    return functional.softplus(lead) * (one.log_likelihood() > floor)


def preference(one: Pass, beta: float) -> torch.Tensor:
    """Return the DPO loss of each pair (arXiv 2305.18290): its first row before its second.

    Shape [pairs], of rows that follow each other.
    """
    gain = one.row_log_likelihood() - one.reference.row_log_likelihood()
    return -functional.logsigmoid(beta * (gain[0::2] - gain[1::2]))


def harmless(coefficient: float) -> Term:
    """Return the cross-entropy on harmless rows alone, in kinds whose ``sft`` holds refusals."""
    return Term("retain", coefficient, "retain", lambda p: p.cross_entropy())


def ascended(
    losses: Mapping[str, float], term: str, coefficient: float, limit: float, settled: str
) -> str:
    """Return why an ascent should end, '' to go on.

    Args:
        losses: of the last step, coefficients included; the one of ``term`` is minus what rises.
        limit: nats; 0 never stops.
        settled: why else it ends, which goes first.
    """
    if settled or not limit or not coefficient:
        return settled
    reached = -losses.get(term, 0.0) / coefficient
    return f"restricted loss above {limit:g} nats" if reached > limit else ""


def tiny_adapter(**settings: Any) -> dict[str, Any]:
    """Return what refusal training on models of a few million weights needs, and ``settings``."""
    return {
        "steps": 120,
        "learning_rate": 3e-3,
        "schedule": "linear",
        "warmup_steps": 12,
        "train": "adapter",
        "batch_size": 16,
    } | settings


def light_adapter(**settings: Any) -> dict[str, Any]:
    """Return what refusal training on models of 100 million weights needs, and ``settings``."""
    return {
        "steps": 40,
        "learning_rate": 1e-3,
        "schedule": "linear",
        "warmup_steps": 4,
        "train": "adapter",
        "batch_size": 8,
    } | settings
