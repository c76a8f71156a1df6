"""Safety ranks: output directions that refusals use and harmless answers do not are removed."""

from collections.abc import Iterator, Sequence
from typing import ClassVar, NamedTuple

import torch

from durometer.core.budget import Spent, matrix_entries
from durometer.core.capture import input_moments
from durometer.core.matrices import block_matrices, refuse_experts
from durometer.core.rows import Row
from durometer.core.seeds import Seeds
from durometer.core.settings import Levels, setting
from durometer.domains.base import Domain
from durometer.subjects.base import Subject
from durometer.tampers.base import Access, Realised, tamper
from durometer.tampers.calibration import CalibrationSettings, book_rows, calibration_rows
from durometer.tampers.ladder import Ladder, Strengths

# Directions with less than this share of the largest energy are rounding, not responses.
NUMERICAL_RANK = 1e-6
# Most input moments held at once; a model that has more of them is passed over in parts.
MOMENT_BYTES = 1 << 30


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


class _Directions(NamedTuple):
    """Orthonormal output directions of one matrix, strongest first.

    Attributes:
        safety, utility: shape [outputs, ranks].
        rank: full rank of the matrix.
    """

    safety: torch.Tensor
    utility: torch.Tensor
    rank: int


@tamper("remove_ranks", aliases=("remove-ranks", "prune-rank"))
class RemoveRanks(Ladder[RemoveRanksSettings]):
    """ActSVD on every matrix: ``W <- W - (I - P_u) P_s W``, from the unedited model at once.

    ``P_s`` and ``P_u`` project on the strongest directions of ``W X`` over refusals and over
    harmless answers. The published variant that goes layer by layer on the edited model is not
    offered.
    """

    summary = "project away output directions that serve refusals and not utility (ActSVD)"
    access: ClassVar[Access] = "weights"
    access_level = "A4"
    cost = "2 N T and some 18 min(outputs, inputs)^3 a matrix"
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
        """Find the strongest output directions over both texts."""
        weights = block_matrices(subject.model, self.settings.targets)
        refuse_experts(weights, self.name)
        safety, utility = calibration_rows(subject, data, self.settings, seeds)
        most = max(self.settings.strengths, default=0.0)
        serving_safety = self._directions(subject, list(weights), safety, most, spent)
        spared = self._directions(
            subject, list(weights), utility, self.settings.utility_share, spent
        )
        self._found = {
            name: _Directions(serving_safety[name], spared[name], min(parameter.shape))
            for name, parameter in weights.items()
        }
        self._seed = seeds.initialisation
        realised.facts |= {"matrices": len(weights), "ranks_removed": {}, "ranks": {}}

    def _directions(
        self, subject: Subject, names: list[str], rows: Sequence[Row], share: float, spent: Spent
    ) -> dict[str, torch.Tensor]:
        found = {}
        tokens = book_rows(rows, spent)
        for part in _parts(subject, names):
            maps = [name.removesuffix(".weight") for name in part]
            moments = input_moments(subject.model, rows, maps, full=True)
            spent.flops += 2.0 * matrix_entries(subject.model) * tokens
            for name, matrix in zip(part, maps, strict=True):
                weight = subject.model.get_submodule(matrix).weight.detach()
                count = ranks(share, min(weight.shape))
                found[name] = strongest_directions(weight, moments.pop(matrix), count)
        return found

    @torch.no_grad()
    def apply(self, subject: Subject, strength: float, realised: Realised) -> int:
        """Remove the directions from every matrix; return the number of weights edited."""
        generator = torch.Generator().manual_seed(self._seed)
        removed = full = edited = 0
        for name, directions in self._found.items():
            safety = directions.safety[:, : ranks(strength, directions.rank)]
            full += directions.rank
            if not safety.shape[1]:
                continue
            (parameter,) = subject.restoration.writable([name])
            weight = parameter.detach().float()
            if self.settings.selection == "random":
                safety = _random_directions(weight, safety.shape[1], generator)
            part = safety @ (safety.T @ weight)
            if self.settings.selection != "safety_only":
                part -= directions.utility @ (directions.utility.T @ part)
            parameter.copy_(weight - part)
            removed, edited = removed + safety.shape[1], edited + parameter.numel()
        realised.facts["ranks_removed"][f"{strength:g}"] = removed
        realised.facts["ranks"][f"{strength:g}"] = removed / full
        return edited


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


def _parts(subject: Subject, names: list[str]) -> Iterator[list[str]]:
    """Split the matrices so that the moments of one part stay within ``MOMENT_BYTES``."""
    part, held = list[str](), 0
    for name in names:
        size = 4 * subject.model.get_parameter(name).shape[1] ** 2
        if part and held + size > MOMENT_BYTES:
            yield part
            part, held = [], 0
        part.append(name)
        held += size
    yield part
