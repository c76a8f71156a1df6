"""Safety neurons: weights that refusals need and harmless answers do not are set to zero."""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch

from durometer.core.budget import Spent, matrix_entries, training_flops
from durometer.core.capture import input_moments
from durometer.core.errors import NotApplicableError
from durometer.core.masks import highest, in_groups, lowest_of_each
from durometer.core.matrices import Matrix, block_matrices, experts_unreached
from durometer.core.rows import Row
from durometer.core.seeds import Seeds
from durometer.core.settings import Levels, setting
from durometer.domains.base import Domain
from durometer.subjects.base import Subject
from durometer.tampers.base import Access, Realised, tamper
from durometer.tampers.calibration import CalibrationSettings, book_rows, calibration_rows
from durometer.tampers.ladder import Ladder, Strengths

Scores = dict[str, torch.Tensor]
Matrices = Mapping[str, Matrix]


class PruneSafetySettings(CalibrationSettings):
    """Settings of ``prune_wanda`` and ``prune_snip``."""

    strengths: Strengths = setting(
        (0.01, 0.03, 0.06, 0.1), "q: shares of the weights that count as serving safety"
    )
    utility_share: float = setting(
        0.03,
        "p: share of the weights that count as serving utility and are spared",
        search=Levels((0.01, 0.03, 0.06, 0.1)),
        ge=0,
        le=1,
    )
    granularity: Literal["tensor", "output_row"] = setting(
        "tensor",
        "what is ranked together: a whole matrix or the inputs of one output",
        search=Levels(("tensor", "output_row")),
    )


class PruneSafety(Ladder[PruneSafetySettings]):
    """The set difference; subclasses say what a weight's score is."""

    access: ClassVar[Access] = "weights"
    access_level = "A4"
    settings_class = PruneSafetySettings
    matched_control = ("selection", "random")

    def strengths(self) -> tuple[float, ...]:
        """Return the shares q."""
        return self.settings.strengths

    def scores(
        self, subject: Subject, matrices: Matrices, rows: Sequence[Row], spent: Spent
    ) -> Scores:
        """Return a score of each weight, shape [..., outputs, inputs], and book the passes."""
        raise TypeError(f"{type(self).__name__} defines no scores()")  # pragma: no cover

    def prepare(
        self, subject: Subject, data: Domain, seeds: Seeds, realised: Realised, spent: Spent
    ) -> None:
        """Score every weight on refusals and on harmless answers."""
        settings = self.settings
        self._matrices = block_matrices(subject.model, settings.targets)
        self._seed = seeds.initialisation
        safety, utility = calibration_rows(subject, data, settings, seeds)
        self._safety = self.scores(subject, self._matrices, safety, spent)
        serving_utility = self.scores(subject, self._matrices, utility, spent)
        # Of the utility scores nothing but the spared set is used, so no more is kept.
        self._spared = {
            name: self._serving(scores, settings.utility_share)
            for name, scores in serving_utility.items()
        }
        realised.facts |= {
            "matrices": len(self._matrices),
            "removed": {},
            "experts_unreached": {
                "safety": experts_unreached(self._safety, self._matrices),
                "utility": experts_unreached(serving_utility, self._matrices),
            },
        }

    @torch.no_grad()
    def apply(self, subject: Subject, strength: float, realised: Realised) -> int:
        """Set the chosen weights to zero; return how many."""
        generator = torch.Generator().manual_seed(self._seed)
        removed = size = 0
        for name, matrix in self._matrices.items():
            mask = self._chosen(name, strength, generator)
            removed, size = removed + int(mask.sum()), size + mask.numel()
            if mask.any():
                subject.restoration.writable([name])
                maps = matrix.maps()
                maps.masked_fill_(mask.reshape(maps.shape), 0.0)
        realised.facts["removed"][f"{strength:g}"] = removed / size
        return removed

    def _chosen(self, name: str, share: float, generator: torch.Generator) -> torch.Tensor:
        """Return the mask of what is removed, groups along the last dimension."""
        mask = self._serving(self._safety[name], share)
        if self.settings.selection == "safety_only":
            return mask
        mask &= ~self._spared[name]
        if self.settings.selection == "random":
            drawn = torch.rand(mask.shape, generator=generator).to(mask.device)
            return lowest_of_each(drawn, mask.sum(-1, keepdim=True))
        return mask

    def _serving(self, scores: torch.Tensor, share: float) -> torch.Tensor:
        """Mark the highest scores of every group; a weight that no token touched serves nothing."""
        groups = in_groups(scores, self.settings.granularity)
        return highest(groups, share) & (groups > 0)


@tamper("prune_wanda", aliases=("prune-wanda", "prune-setdiff"))
class PruneWanda(PruneSafety):
    """Scores by size of weight and of what flows into it: ``|W_ij| norm(X_j)``."""

    summary = "zero weights that serve refusals and not utility, by Wanda score"
    cost = "2 N T"
    source = "arXiv 2402.05162, 2306.11695; boyiwei/alignment-attribution-code"
    cannot_show = "safety that is spread over weights which utility needs, too"

    def scores(
        self, subject: Subject, matrices: Matrices, rows: Sequence[Row], spent: Spent
    ) -> Scores:
        """Return ``|W_ij|`` times the norm of input j over the response tokens."""
        moments = input_moments(subject.model, rows, matrices)
        spent.flops += 2.0 * matrix_entries(subject.model) * book_rows(rows, spent)
        return {
            name: matrix.maps().float().abs() * moments[name].sqrt()[..., None, :]
            for name, matrix in matrices.items()
        }


@tamper("prune_snip", aliases=("prune-snip",))
class PruneSnip(PruneSafety):
    """Scores by first-order effect on the loss: ``|W_ij| mean_n |dCE_n / dW_ij|``."""

    summary = "zero weights that serve refusals and not utility, by SNIP score"
    cost = "6 N T, one backward pass a row"
    source = "arXiv 2402.05162, 1810.02340; boyiwei/alignment-attribution-code"
    cannot_show = "safety that is spread over weights which utility needs, too"

    def prepare(
        self, subject: Subject, data: Domain, seeds: Seeds, realised: Realised, spent: Spent
    ) -> None:
        """Score every weight; record the backward passes."""
        self._passes = 0
        super().prepare(subject, data, seeds, realised, spent)
        realised.facts["backward_passes"] = self._passes

    def scores(
        self, subject: Subject, matrices: Matrices, rows: Sequence[Row], spent: Spent
    ) -> Scores:
        """Return ``|W|`` times the mean over rows of the absolute gradient, fused experts too."""
        sums = _absolute_gradients(subject, matrices, rows)
        self._passes += len(rows)
        tokens, labels = book_rows(rows, spent), sum(len(row.labels) for row in rows)
        head = subject.model.get_output_embeddings()
        spent.flops += training_flops(
            matrix_entries(subject.model), tokens, head.weight.numel(), labels, full=True
        )
        return {
            name: matrix.maps().float().abs() * matrix.turned(sums[name]) / len(rows)
            for name, matrix in matrices.items()
        }


def _absolute_gradients(subject: Subject, matrices: Matrices, rows: Sequence[Row]) -> Scores:
    """Return ``sum_n |dCE_n / dW|`` (fp32), CE_n the mean over the labels of row n.

    Each gradient is added up and dropped as soon as it is there, so that one is held at a time.

    Raises:
        NotApplicableError: a matrix takes no part in the loss.
    """
    sums: Scores = {}
    weights = {name: matrix.parameter for name, matrix in matrices.items()}
    names = {id(parameter): name for name, parameter in weights.items()}

    def add(parameter: torch.Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None
        name, size = names[id(parameter)], gradient.float().abs()
        sums[name] = sums[name] + size if name in sums else size
        parameter.grad = None

    hooks = []
    try:
        for parameter in weights.values():
            parameter.requires_grad_(True)
            hooks.append(parameter.register_post_accumulate_grad_hook(add))
        with torch.enable_grad():
            for row in rows:
                for loss in subject.forward.loss_sums([row]):
                    (loss / len(row.labels)).backward()
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in weights.values():
            parameter.requires_grad_(False)
    missing = [name for name in weights if name not in sums]
    if missing:
        raise NotApplicableError(f"no gradient reached {missing[0]} and {len(missing) - 1} more")
    return sums
