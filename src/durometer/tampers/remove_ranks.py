"""Safety ranks: output directions that refusals use and harmless answers do not are removed."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

from durometer.core.budget import Spent, matrix_entries
from durometer.core.capture import input_moments
from durometer.core.matrices import Matrix, block_matrices, experts_unreached
from durometer.core.seeds import Seeds
from durometer.core.settings import Levels, setting
from durometer.core.structure import blocks
from durometer.domains.base import Domain
from durometer.subjects.base import Subject
from durometer.tampers.base import Access, Realised, tamper
from durometer.tampers.calibration import CalibrationSettings, book_rows, calibration_rows
from durometer.tampers.ladder import Ladder, Strengths

# Directions with less than this share of the largest energy are rounding, not responses.
NUMERICAL_RANK = 1e-6
# Most input moments held at once; a model that has more of them is passed over in parts.
MOMENT_BYTES = 1 << 30

Matrices = Mapping[str, Matrix]


class RemoveRanksSettings(CalibrationSettings):
    """Settings of ``remove_ranks``."""

    strengths: Strengths = setting(
        (0.01, 0.025, 0.05, 0.1), "shares of the full rank that count as serving safety"
    )
    utility_share: float = setting(
        0.25,
        "share of the full rank that counts as serving utility and is spared",
        search=Levels((0.1, 0.25, 0.5)),
        ge=0,
        le=1,
    )
    sequential: bool = setting(
        False,
        "find the directions of a block on the model as edited in all blocks before it, as "
        "published, rather than all of them on the unedited model",
        search=Levels((False, True)),
    )


class _Directions(NamedTuple):
    """Orthonormal output directions of one map, strongest first.

    Attributes:
        safety, utility: shape [outputs, ranks].
        rank: full rank of the map.
    """

    safety: torch.Tensor
    utility: torch.Tensor
    rank: int


@dataclass
class _Counts:
    """Ranks removed, ranks there are, and weights edited."""

    removed: int = 0
    full: int = 0
    edited: int = 0


@tamper("remove_ranks", aliases=("remove-ranks", "prune-rank"))
class RemoveRanks(Ladder[RemoveRanksSettings]):
    """ActSVD on every matrix and every expert: ``W <- W - (I - P_u) P_s W``.

    ``P_s`` and ``P_u`` project on the strongest directions of ``W X`` over refusals and over
    harmless answers; an expert that no refusal was routed to has none and stays.
    """

    summary = "project away output directions that serve refusals and not utility (ActSVD)"
    access: ClassVar[Access] = "weights"
    access_level = "A4"
    cost = "2 N T and some 18 min(outputs, inputs)^3 a map; a block and strength when sequential"
    source = "arXiv 2402.05162; boyiwei/alignment-attribution-code"
    cannot_show = "safety in directions that utility uses, too"
    settings_class = RemoveRanksSettings
    matched_control = ("selection", "random")

    def strengths(self) -> tuple[float, ...]:
        """Return the shares of ranks."""
        return self.settings.strengths

    def prepare(
        self, subject: Subject, data: Domain, seeds: Seeds, realised: Realised, spent: Spent
    ) -> None:
        """Find the strongest output directions over both texts, unless it goes by blocks."""
        self._matrices = block_matrices(subject.model, self.settings.targets)
        self._rows = calibration_rows(subject, data, self.settings, seeds)
        self._spent = spent
        for rows in self._rows:
            book_rows(rows, spent)
        self._seed = seeds.initialisation
        realised.facts |= {"matrices": len(self._matrices), "ranks_removed": {}, "ranks": {}}
        realised.facts["experts_unreached"] = {}
        if not self.settings.sequential:
            strongest = max(self.settings.strengths, default=0.0)
            self._found = self._directions(subject, self._matrices, strongest, realised)

    def _directions(
        self, subject: Subject, matrices: Matrices, share: float, realised: Realised
    ) -> dict[str, list[_Directions]]:
        """Return the directions of every map of each matrix, on the model as it is now."""
        safety, utility = self._rows
        unreached = realised.facts["experts_unreached"]
        found = {}
        for part in _parts(matrices):
            images = []
            for text, rows, wanted in (
                ("safety", safety, share),
                ("utility", utility, self.settings.utility_share),
            ):
                moments = input_moments(subject.model, rows, part, full=True)
                tokens = sum(len(row.ids) for row in rows)
                self._spent.flops += 2.0 * matrix_entries(subject.model) * tokens
                unreached[text] = unreached.get(text, 0) + experts_unreached(moments, part)
                images.append(
                    {n: _strongest(matrix, moments.pop(n), wanted) for n, matrix in part.items()}
                )
            for name, matrix in part.items():
                rank = min(matrix.maps().shape[-2:])
                pairs = zip(images[0][name], images[1][name], strict=True)
                found[name] = [_Directions(one, other, rank) for one, other in pairs]
        return found

    @torch.no_grad()
    def apply(self, subject: Subject, strength: float, realised: Realised) -> int:
        """Remove the directions from every matrix; return the number of weights edited."""
        generator = torch.Generator().manual_seed(self._seed)
        counts = _Counts()
        if self.settings.sequential:
            realised.facts["experts_unreached"] = {}
            for block, _ in blocks(subject.model):
                own = {n: m for n, m in self._matrices.items() if n.startswith(f"{block}.")}
                if own:
                    found = self._directions(subject, own, strength, realised)
                    self._remove(subject, found, strength, generator, counts)
        else:
            self._remove(subject, self._found, strength, generator, counts)
        realised.facts["ranks_removed"][f"{strength:g}"] = counts.removed
        realised.facts["ranks"][f"{strength:g}"] = counts.removed / counts.full
        return counts.edited

    def _remove(
        self,
        subject: Subject,
        found: Mapping[str, list[_Directions]],
        strength: float,
        generator: torch.Generator,
        counts: _Counts,
    ) -> None:
        for name, directions in found.items():
            counts.full += sum(entry.rank for entry in directions)
            for weight, entry in zip(self._matrices[name].each(), directions, strict=True):
                safety = entry.safety[:, : ranks(strength, entry.rank)]
                if safety.shape[1]:
                    subject.restoration.writable([name])
                    weight.copy_(self._without(weight.float(), entry, safety, generator))
                    counts.removed += safety.shape[1]
                    counts.edited += weight.numel()

    def _without(
        self,
        weight: torch.Tensor,
        directions: _Directions,
        safety: torch.Tensor,
        generator: torch.Generator,
    ) -> torch.Tensor:
        """Return ``weight`` [outputs, inputs] without the directions that are to go."""
        if self.settings.selection == "random":
            safety = _random_directions(weight, safety.shape[1], generator)
        part = safety @ (safety.T @ weight)
        if self.settings.selection != "safety_only":
            part -= directions.utility @ (directions.utility.T @ part)
        return weight - part


def _strongest(matrix: Matrix, moments: torch.Tensor, share: float) -> list[torch.Tensor]:
    """Return the strongest directions of each map of ``matrix``, [outputs, ranks] each."""
    weights = matrix.each()
    count = ranks(share, min(weights.shape[-2:]))
    each = moments if moments.dim() > 2 else moments[None]
    return [strongest_directions(w, m, count) for w, m in zip(weights, each, strict=True)]


def ranks(share: float, rank: int) -> int:
    """Return how many of ``rank`` directions a share is: at least one unless it is 0."""
    return min(max(round(share * rank), 1), rank) if share else 0


def strongest_directions(weight: torch.Tensor, moment: torch.Tensor, count: int) -> torch.Tensor:
    """Return the strongest left singular vectors of ``W X`` without ever holding X.

    ``(W X)(W X)^T = W M W^T`` with ``M = X X^T``. A tall matrix is solved on the smaller side: with
    ``A = W M^(1/2)`` and ``A^T A v = s^2 v`` the vectors are ``A v / s``.

    Args:
        weight: W, shape [outputs, inputs].
        moment: M, shape [inputs, inputs].
        count: how many vectors; fewer are returned when ``W X`` has a lower rank.

    Returns:
        Orthonormal columns, strongest first, fp32, shape [outputs, at most count].
    """
    weight, moment = weight.double(), moment.double()
    outputs, inputs = weight.shape
    if outputs <= inputs:
        energies, vectors = torch.linalg.eigh(weight @ moment @ weight.T)
        image = vectors
    else:
        values, basis = torch.linalg.eigh(moment)
        image = weight @ (basis * values.clamp(min=0).sqrt()) @ basis.T
        energies, vectors = torch.linalg.eigh(image.T @ image)
        image = image @ vectors
    real = int((energies > NUMERICAL_RANK * energies[-1].clamp(min=0)).sum())
    kept: torch.Tensor = image.flip(-1)[:, : min(count, real)]
    if outputs > inputs and kept.shape[1]:
        # Weak columns are nearly orthogonal only; QR makes them so and keeps their order.
        kept = _orthonormal(kept / kept.norm(dim=0))
    return kept.float()


def _random_directions(
    weight: torch.Tensor, count: int, generator: torch.Generator
) -> torch.Tensor:
    """Draw an orthonormal basis of ``count`` directions in the column space of ``weight``."""
    outputs, inputs = weight.shape
    drawn = torch.randn(min(outputs, inputs), count, generator=generator).to(weight.device)
    if outputs > inputs:
        drawn = _orthonormal(weight) @ drawn
    return _orthonormal(drawn)


def _orthonormal(columns: torch.Tensor) -> torch.Tensor:
    basis: torch.Tensor = torch.linalg.qr(columns).Q
    return basis


def _parts(matrices: Matrices) -> Iterator[dict[str, Matrix]]:
    """Split the matrices so that the moments of one part stay within ``MOMENT_BYTES``."""
    part, held = dict[str, Matrix](), 0
    for name, matrix in matrices.items():
        weights = matrix.each()
        size = 4 * len(weights) * weights.shape[-1] ** 2
        if part and held + size > MOMENT_BYTES:
            yield part
            part, held = {}, 0
        part[name] = matrix
        held += size
    yield part
