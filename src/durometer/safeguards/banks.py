"""Gradients kept by name, and weights that are moved and put back exactly."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from durometer.core.errors import DurometerError
from durometer.subjects.base import Subject

LEAST_COSINE = 0.95


class GradientBank:
    """Gradients of the trained parameters by name, summed in fp32.

    Every gradient is taken over as soon as it is made and leaves the parameter, so one sum costs
    one gradient's memory however many passes go into it, and an inner attack on the same parameters
    is not disturbed.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self._sums: dict[str, list[torch.Tensor | None]] = {}

    def clear(self) -> None:
        """Forget all gradients."""
        self._sums.clear()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Have forwards inside lead back to the parameters, those that an attack froze included.

        An attack that trains an adapter or a slice freezes the rest; a gradient taken at its point
        would have nothing of them.
        """
        flags = [parameter.requires_grad for parameter in self._parameters]
        for parameter in self._parameters:
            parameter.requires_grad_(True)
        try:
            yield
        finally:
            for parameter, flag in zip(self._parameters, flags, strict=True):
                parameter.requires_grad_(flag)

    @contextmanager
    def collecting(self, name: str) -> Iterator[None]:
        """Add to ``name`` the gradients of every backward pass inside."""
        sums = self._sums.setdefault(name, [None] * len(self._parameters))
        with self.watching():
            handles = [
                parameter.register_post_accumulate_grad_hook(partial(_take, sums, index))
                for index, parameter in enumerate(self._parameters)
            ]
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()

    def names(self) -> list[str]:
        """Return the names with a gradient."""
        return list(self._sums)

    def gradients(self, name: str) -> list[torch.Tensor | None]:
        """Return the gradients of one name, one a parameter; None where there is none."""
        return self._sums[name]

    def total(self) -> list[torch.Tensor | None]:
        """Return the sum over all names."""
        return self.combined(dict.fromkeys(self._sums, 1.0))

    def combined(self, weights: Mapping[str, float]) -> list[torch.Tensor | None]:
        """Return the weighted sum of named gradients."""
        total: list[torch.Tensor | None] = [None] * len(self._parameters)
        for name, weight in weights.items():
            for index, gradient in enumerate(self._sums[name]):
                if gradient is None:
                    continue
                scaled = gradient if weight == 1 else gradient * weight
                before = total[index]
                total[index] = scaled if before is None else before + scaled
        return total

    def dot(self, first: str, second: str) -> float:
        """Return the inner product of two named gradients."""
        pairs = zip(self._sums[first], self._sums[second], strict=True)
        return sum(float((a * b).sum()) for a, b in pairs if a is not None and b is not None)

    def norm(self, name: str) -> float:
        """Return the norm of one named gradient."""
        return float(self.dot(name, name) ** 0.5)

    def cosine(self, first: str, second: str) -> float:
        """Return the cosine of two named gradients, 0 where one vanishes."""
        norms = self.norm(first) * self.norm(second)
        return self.dot(first, second) / norms if norms else 0.0


def _take(sums: list[torch.Tensor | None], index: int, parameter: torch.Tensor) -> None:
    gradient, parameter.grad = parameter.grad, None
    if gradient is None:
        return
    before = sums[index]
    sums[index] = gradient.float() if before is None else before.add_(gradient)


def added(first: torch.Tensor | None, second: torch.Tensor | None) -> torch.Tensor | None:
    """Return the sum of two gradients, either of which may be none."""
    if first is None or second is None:
        return first if second is None else second
    return first + second


@contextmanager
def perturbed(
    subject: Subject,
    deltas: Mapping[str, torch.Tensor],
    *,
    least_cosine: float = LEAST_COSINE,
) -> Iterator[None]:
    """Move the named weights by ``deltas`` inside, then put the stored values back bit for bit.

    Raises:
        DurometerError: what was really applied points elsewhere, since the weights' number format
            swallowed it; a probe there would measure noise.
    """
    with subject.lent():
        _move(subject, deltas, least_cosine)
        yield


@torch.no_grad()
def _move(subject: Subject, deltas: Mapping[str, torch.Tensor], least_cosine: float) -> None:
    weights = subject.restoration.writable(deltas)
    product = applied = intended = 0.0
    for (name, wanted), weight in zip(deltas.items(), weights, strict=True):
        delta = wanted.to(weight.device)
        weight.copy_(weight.float() + delta)
        change = subject.restoration.change(name)
        product += float((change * delta).sum())
        applied += float((change**2).sum())
        intended += float((delta.float() ** 2).sum())
    cosine = product / (applied * intended) ** 0.5 if applied and intended else 0.0
    if intended and cosine < least_cosine:
        raise DurometerError(
            f"a perturbation of the weights was applied with cosine {cosine:.2f} to what was "
            f"intended: {subject.dtype} is too coarse for it; use --dtype float32"
        )
