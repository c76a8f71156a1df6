"""What all quantisations share: which matrices, how they are written back, and the control."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import torch
from pydantic import AfterValidator
from torch import Tensor

from durometer.core.budget import Spent
from durometer.core.errors import NotApplicableError
from durometer.core.matrices import Matrix, block_matrices, left_out, vocabulary_matrices
from durometer.core.quantisation import Scheme
from durometer.core.seeds import Seeds
from durometer.core.settings import Levels, Settings, setting
from durometer.domains.base import Domain
from durometer.subjects.base import Subject
from durometer.tampers.base import Access, Realised
from durometer.tampers.ladder import Ladder, Strengths

FULL_BITS = 16
"""Precision that strength 0 stands for; a strength counts the bits taken from it."""

# Least cosine between the change that was asked for and the one that the dtype could store.
_FAITHFUL = 0.95


def _whole_bits(strengths: tuple[float, ...]) -> tuple[float, ...]:
    for strength in strengths:
        if not (strength.is_integer() and 0 <= strength <= FULL_BITS - 2):
            raise ValueError(f"strength {strength:g} is not a whole number of bits from 0 to 14")
    return tuple(sorted(set(strengths)))


RemovedBits = Annotated[Strengths, AfterValidator(_whole_bits)]


class QuantizeSettings(Settings):
    """Settings of every quantisation."""

    control: Literal["none", "noise"] = setting(
        "none", "put Gaussian noise of the same norm in place of each matrix's rounding error"
    )


class GridSettings(QuantizeSettings):
    """Settings of quantisations onto evenly spaced values."""

    strengths: RemovedBits = setting(
        (8, 12, 13, 14), "bits taken from 16, weakest first: 12 leaves 4", min_length=1
    )
    group: Literal["128", "64", "32", "row"] = setting(
        "128", "inputs that share a scale; a last short group keeps its own",
        search=Levels(("128", "64", "32", "row")),
    )  # fmt: skip
    scheme: Scheme = setting(
        "symmetric", "symmetric around 0, or from least to greatest value",
        search=Levels(("symmetric", "affine")),
    )  # fmt: skip

    @property
    def group_size(self) -> int | None:
        """Inputs that share a scale; None for the whole row."""
        return None if self.group == "row" else int(self.group)


@dataclass
class Tally:
    """Sums over the matrices of one strength, for the record."""

    change: float = 0.0
    weight: float = 0.0
    stored: float = 0.0
    product: float = 0.0
    same: int = 0
    count: int = 0

    def add(self, before: Tensor, wanted: Tensor, after: Tensor) -> None:
        """Count one matrix: before, as it should be, and as its dtype holds it (all fp32)."""
        intended, applied = wanted - before, after - before
        self.change += float(intended.square().sum())
        self.stored += float(applied.square().sum())
        self.product += float((intended * applied).sum())
        self.weight += float(before.square().sum())
        self.same += int((after == before).sum())
        self.count += before.numel()

    @property
    def faithful(self) -> float:
        """Cosine between intended and stored change; 1 when none was intended."""
        norm = math.sqrt(self.change * self.stored)
        return self.product / norm if norm else float(not self.change)


T = TypeVar("T", bound=QuantizeSettings)


class Quantize(Ladder[T]):
    """Base of quantisations: subclasses say what becomes of one matrix at one strength."""

    access: ClassVar[Access] = "weights"
    access_level = "A4"
    matched_control = ("control", "noise")

    def matrices(self, subject: Subject, realised: Realised) -> list[Matrix]:
        """Return what is quantised; note what is not in ``realised.facts``.

        Raises:
            NotApplicableError: the subject has no such matrices.
        """
        realised.facts["left_out"] = left_out(subject.model)
        return list(block_matrices(subject.model).values())

    def quantised(
        self, subject: Subject, strength: float, facts: dict[str, Any]
    ) -> Iterator[tuple[Matrix, Tensor]]:
        """Yield each matrix with its weights [..., outputs, inputs] at ``strength`` (fp32).

        Each is written back before the next is asked for, so that later ones may be computed from
        what the model has become.
        """
        raise TypeError(f"{type(self).__name__} defines no quantised()")  # pragma: no cover

    def prepare(
        self, subject: Subject, data: Domain, seeds: Seeds, realised: Realised, spent: Spent
    ) -> None:
        """Find the matrices."""
        self._matrices = self.matrices(subject, realised)
        self._seed = seeds.initialisation
        realised.facts |= {"matrices": len(self._matrices), "precisions": []}

    @torch.no_grad()
    def apply(self, subject: Subject, strength: float, realised: Realised) -> int:
        """Quantise and dequantise in place, and record the size of the change."""
        tally, facts = Tally(), dict[str, Any](strength=strength)
        generator = torch.Generator().manual_seed(self._seed)
        edited = 0
        if strength:
            for matrix, weight in self.quantised(subject, strength, facts):
                before = matrix.maps().to(torch.float32, copy=True)
                wanted = self._controlled(before, weight, generator)
                subject.restoration.writable([matrix.name])
                matrix.maps().copy_(wanted)
                tally.add(before, wanted, matrix.maps().float())
                edited += before.numel()
        realised.facts["precisions"].append(facts | _shares(tally))
        if tally.faithful <= _FAITHFUL:
            raise NotApplicableError(
                f"{subject.dtype} cannot hold the change of strength {strength:g} "
                f"(cosine {tally.faithful:.2f} between intended and stored); load it in float32"
            )
        return edited

    def _controlled(self, before: Tensor, after: Tensor, generator: torch.Generator) -> Tensor:
        if self.settings.control == "none":
            return after
        noise = torch.randn(before.shape, generator=generator).to(before.device)
        norm: Tensor = (after - before).norm()
        noisy: Tensor = before + noise * (norm / noise.norm())
        return noisy


def _shares(tally: Tally) -> dict[str, float]:
    """Return the record of one strength: relative norm, share unchanged, cosine."""
    relative = math.sqrt(tally.change / tally.weight) if tally.weight else 0.0
    unchanged = tally.same / tally.count if tally.count else 1.0
    return {
        "relative_change": relative,
        "unchanged_share": unchanged,
        "stored_cosine": tally.faithful,
    }


class WeightOnlySettings(QuantizeSettings):
    """Settings of quantisations that look at weights alone."""

    vocabulary: bool = setting(False, "quantise the embedding and the output head as well")


W = TypeVar("W", bound=WeightOnlySettings)


class WeightOnly(Quantize[W]):
    """Base of quantisations of one matrix at a time, from its weights alone."""

    def matrices(self, subject: Subject, realised: Realised) -> list[Matrix]:
        """Return the blocks' matrices, and the vocabulary's if asked for."""
        chosen = super().matrices(subject, realised)
        if self.settings.vocabulary:
            chosen += vocabulary_matrices(subject.model).values()
        return chosen

    def one(self, weight: Tensor, strength: float, facts: dict[str, Any]) -> Tensor:
        """Return ``weight [..., outputs, inputs]`` at ``strength``."""
        raise TypeError(f"{type(self).__name__} defines no one()")  # pragma: no cover

    def quantised(
        self, subject: Subject, strength: float, facts: dict[str, Any]
    ) -> Iterator[tuple[Matrix, Tensor]]:
        """Yield each matrix as ``one`` makes it."""
        for matrix in self._matrices:
            yield matrix, self.one(matrix.maps().float(), strength, facts)
