"""Activations by depth: how far they have moved, and changes row by row while a model trains."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from durometer.core.rows import Row
from durometer.core.structure import blocks, width
from durometer.safeguards.passes import Pass
from durometer.safeguards.train import Step
from durometer.subjects.base import Subject
from durometer.tampers.latent_perturbation import add_everywhere


def place_at(model: nn.Module, depth: float) -> int:
    """Return which residual state lies at a share of the depth; 0 is the embedding's output."""
    count = len(blocks(model))
    return min(max(round(depth * count), 0), count)


def listed(value: Any) -> Any:
    """Return the parts of ``a+b`` as the command line has it, anything else as it is."""
    return tuple(value.split("+")) if isinstance(value, str) else value


def distance(one: Pass) -> torch.Tensor:
    """Return the distance of each token's activations from the reference's, shape [tokens].

    The mean of the norms over all residual states, the embedding's output included.
    """
    pairs = zip(one.states(), one.reference.states(), strict=True)
    # The library's norm has a gradient of 0 at 0; a square root by hand has none there.
    return torch.stack([torch.linalg.vector_norm(h - r, dim=-1) for h, r in pairs]).mean(0)


@contextmanager
def rows_apart(subject: Subject) -> Iterator[None]:
    """Lay batches out row by row inside: in a tree, rows share what may have to differ."""
    tree = subject.tree
    subject.tree = False
    try:
        yield
    finally:
        subject.tree = tree


def blank(subject: Subject, rows: int, length: int) -> torch.Tensor:
    """Return a shift of nothing that can be trained, fp32, shape [rows, length, width]."""
    shape = (rows, length, width(subject.model))
    return torch.zeros(shape, device=subject.forward.device, requires_grad=True)


@contextmanager
def shifted(modules: Sequence[nn.Module], shifts: Sequence[torch.Tensor]) -> Iterator[None]:
    """Add one shift to the output of each module inside, tuple or tensor.

    Args:
        shifts: each of shape [rows, length, width]; inside ``rows_apart``, all rows in one pass.
    """
    with ExitStack() as stack:
        for module, shift in zip(modules, shifts, strict=True):
            stack.callback(add_everywhere(module, shift))
        yield


def steepest(
    step: Step, place: str, rows: Sequence[Row], modules: Sequence[nn.Module]
) -> list[torch.Tensor]:
    """Return the gradient of the mean cross-entropy by each module's output, fp32.

    No gradient of a weight is computed. To be called inside ``rows_apart``.

    Args:
        place: under which name the pass is counted.
        rows: all in one pass.

    Returns:
        one tensor a module, each of shape [rows, length, width].
    """
    longest = max(len(row.ids) for row in rows)
    leaves = [blank(step.subject, len(rows), longest) for _ in modules]
    step.attacks.ledger.count(place, sum(len(row.ids) for row in rows))
    with shifted(modules, leaves):
        (labelled,) = step.subject.forward.labelled(rows, whole=True)
        loss = functional.cross_entropy(labelled.logits.float(), labelled.targets)
        return list(torch.autograd.grad(loss, leaves))
