"""One tensor of the subject beside the same tensor of the base, and what is found out about it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from durometer.audit.forensics.linear_algebra import Array, fro2, inner, narrowest, rounding_energy
from durometer.audit.forensics.names import Place, is_gguf, place_of
from durometer.audit.tensors import TensorSource

if TYPE_CHECKING:
    from durometer.audit.forensics.difference import Difference
    from durometer.audit.forensics.low_rank import Shape
    from durometer.audit.forensics.quantisation import GridMatch
    from durometer.audit.forensics.scaling import Scaling
    from durometer.audit.forensics.sparsity import Zeros
    from durometer.audit.forensics.vocabulary import Rows

HEAD_SIZES = (32, 40, 48, 64, 80, 96, 112, 128, 192, 256)


@dataclass
class Pair:
    """A tensor of the subject and of the base, both in fp32 with the base's shape.

    Attributes:
        base, subject: one- or two-dimensional.
        stored: how the subject's file stores it.
    """

    name: str
    place: Place
    base: Array
    subject: Array
    stored: str

    @cached_property
    def delta(self) -> Array:
        """Subject minus base."""
        return self.subject - self.base

    @cached_property
    def energy(self) -> float:
        """Squared Frobenius norm of the base."""
        return fro2(self.base)

    @cached_property
    def changed(self) -> float:
        """Squared Frobenius norm of the change."""
        return fro2(self.delta)

    @cached_property
    def precision(self) -> str:
        """The narrowest dtype that holds the subject's values."""
        return narrowest(self.subject)

    @cached_property
    def rounding(self) -> float:
        """Expected squared error of rounding the subject to its precision, summed."""
        return rounding_energy(self.subject, self.precision)

    @property
    def matrix(self) -> bool:
        """Whether it has two axes, both longer than 1."""
        return self.base.ndim == 2 and min(self.base.shape) > 1

    def against(self, base: Array) -> Pair:
        """Return the pair with another base."""
        return Pair(self.name, self.place, base, self.subject, self.stored)


@dataclass
class Reading:
    """What was found out about one tensor; a detector that did not look leaves None.

    Attributes:
        explained: the first hypothesis that accounts for the whole difference, '' for none.
        finite: whether all values are finite; if not, nothing more was looked at.
    """

    name: str
    place: Place
    shape: tuple[int, ...]
    stored: str
    difference: Difference
    explained: str = ""
    precision: str = ""
    grid: GridMatch | None = None
    zeros: Zeros | None = None
    scaling: Scaling | None = None
    rows: Rows | None = None
    spread: Shape | None = None
    finite: bool = True

    @property
    def open(self) -> bool:
        """Whether a difference is left that no exact hypothesis accounts for."""
        return not self.explained


def read_pair(subject: TensorSource, base: TensorSource, name: str, there: str) -> Pair | None:
    """Return one pair, or None where the shapes do not belong together."""
    ours, theirs = squeezed(subject.shape(name)), squeezed(base.shape(there))
    place = place_of(name)
    resizable = place.role in {"embedding", "head"} and ours[1:] == theirs[1:]
    if ours != theirs and not resizable:
        return None
    rows = min(ours[0], theirs[0]) if ours else 0
    new = subject.read(name).reshape(ours)[:rows]
    old = base.read(there).reshape(theirs)[:rows]
    if place.role in {"query", "key"} and is_gguf([name]) != is_gguf([there]):
        old = _aligned(new, old)
    return Pair(name, place, old, new, subject.dtype(name))


def squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return ``shape`` with leading axes (experts) folded into the rows, at least one axis."""
    shape = shape or (1,)
    return shape if len(shape) <= 2 else (int(np.prod(shape[:-1])), shape[-1])


def _aligned(subject: Array, base: Array) -> Array:
    """Return the base's rows in the order of the subject.

    llama.cpp interleaves the two halves of every head of queries and keys of llama-type models;
    the size of the heads is tried.
    """
    best, least = base, fro2(subject - base)
    for size in HEAD_SIZES:
        if base.shape[0] % size:
            continue
        heads = base.shape[0] // size
        for split in ((heads, 2, size // 2), (heads, size // 2, 2)):
            turned = base.reshape(*split, -1).swapaxes(1, 2).reshape(base.shape)
            distance = fro2(subject - turned)
            if distance < least:
                best, least = turned, distance
    return best


def cosine(pair: Pair) -> float:
    """Return the cosine between subject and base; 1 where both are 0."""
    norms = np.sqrt(pair.energy * fro2(pair.subject))
    return inner(pair.base, pair.subject) / float(norms) if norms else 1.0
