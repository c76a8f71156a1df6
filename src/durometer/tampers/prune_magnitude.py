"""Pruning by size, a compression that users really do; the safeguard may be what it drops."""

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch

from durometer.core.adapters import Targets
from durometer.core.budget import Spent, matrix_entries
from durometer.core.capture import input_moments
from durometer.core.errors import NotApplicableError
from durometer.core.masks import Granularity, lowest_scores, magnitude_masks
from durometer.core.matrices import Matrix, block_matrices, experts_unreached, reached
from durometer.core.seeds import Seeds
from durometer.core.settings import Levels, Settings, setting
from durometer.domains.base import Domain
from durometer.subjects.base import Subject
from durometer.tampers.base import Access, Realised, tamper
from durometer.tampers.data import make_rows, training_items
from durometer.tampers.ladder import Ladder, Strengths


class PruneMagnitudeSettings(Settings):
    """Settings of ``prune_magnitude``."""

    strengths: Strengths = setting(
        (0.1, 0.2, 0.3, 0.5),
        "shares of the weights that are set to zero; 2:4 and 4:8 know 0.5 alone",
    )
    granularity: Granularity = setting(
        "tensor",
        "what is compared: a whole matrix, the inputs of one output, or runs of 4 or 8 inputs",
        search=Levels(("tensor", "output_row", "2:4", "4:8")),
    )
    score: Literal["magnitude", "wanda", "random"] = setting(
        "magnitude",
        "|W|, |W| times the norm of its input on benign text, or chance (the control)",
        search=Levels(("magnitude", "wanda", "random")),
    )
    targets: Targets = setting(
        "all", "matrices that are pruned", search=Levels(("all", "attention", "mlp"))
    )
    examples: int = setting(128, "benign rows that the wanda score is taken from", ge=1)
    max_length: int = setting(512, "longest such row in tokens", ge=8)


@tamper("prune_magnitude", aliases=("prune-magnitude",))
class PruneMagnitude(Ladder[PruneMagnitudeSettings]):
    """Set the weights with the smallest scores to zero; embeddings, norms and head stay."""

    summary = "magnitude or Wanda pruning on general text, at ascending sparsity"
    access: ClassVar[Access] = "weights"
    access_level = "A4"
    cost = "one pass over the weights; 2 N T more for the wanda score"
    source = "arXiv 2306.11695 (Wanda), 2301.00774 (SparseGPT)"
    cannot_show = "what pruning that looks for the safeguard does; see prune_wanda"
    settings_class = PruneMagnitudeSettings
    matched_control = ("score", "random")

    def strengths(self) -> tuple[float, ...]:
        """Return the sparsities; a pattern of N in M leaves one alone."""
        by_pattern = ":" in self.settings.granularity
        return (0.5,) if by_pattern else self.settings.strengths

    def prepare(
        self, subject: Subject, data: Domain, seeds: Seeds, realised: Realised, spent: Spent
    ) -> None:
        """Check the structure, and capture input norms for the wanda score."""
        settings, model = self.settings, subject.model
        self._matrices = block_matrices(model, settings.targets)
        self._seed = seeds.initialisation
        self._moments: dict[str, torch.Tensor] = {}
        self._refuse_ragged()
        weights = [matrix.parameter.detach() for matrix in self._matrices.values()]
        zeros = sum(int((weight == 0).sum()) for weight in weights)
        realised.facts |= {
            "matrices": len(self._matrices),
            # A model that is quantised or sparse already has zeros that are not this edit's.
            "zeros_before": zeros / sum(weight.numel() for weight in weights),
            "sparsity": {},
        }
        if settings.score == "wanda":
            chosen = training_items(data, "benign", settings.examples, seeds)
            rows = make_rows(
                chosen, subject.chat, label_prompt=False, max_length=settings.max_length
            )
            self._moments = input_moments(model, rows, self._matrices)
            realised.facts["experts_unreached"] = experts_unreached(self._moments, self._matrices)
            spent.examples = len(rows)
            spent.tokens = sum(len(row.ids) for row in rows)
            spent.flops = 2.0 * matrix_entries(model) * spent.tokens

    @torch.no_grad()
    def apply(self, subject: Subject, strength: float, realised: Realised) -> int:
        """Set the share ``strength`` of every group to zero; return how many weights."""
        removed = size = 0
        for matrix, mask in self._masks(strength):
            if mask.any():
                subject.restoration.writable([matrix.name])
                matrix.maps().masked_fill_(mask, 0.0)
            removed, size = removed + int(mask.sum()), size + mask.numel()
        realised.facts["sparsity"][f"{strength:g}"] = removed / size
        return removed

    def _masks(self, share: float) -> Iterator[tuple[Matrix, torch.Tensor]]:
        """Yield each matrix with what is removed from it, [..., outputs, inputs]."""
        settings = self.settings
        if settings.score == "magnitude":
            yield from magnitude_masks(self._matrices, share, settings.granularity)
            return
        # The same draw at every strength: a sparser random mask holds the one before.
        generator = torch.Generator().manual_seed(self._seed)
        for name, matrix in self._matrices.items():
            weights = matrix.maps()
            if settings.score == "random":
                scores = torch.rand(weights.shape, generator=generator).to(weights.device)
                yield matrix, lowest_scores(scores, share, settings.granularity)
                continue
            moments = self._moments[name]
            scores = weights.float().abs() * moments.sqrt()[..., None, :]
            mask = lowest_scores(scores, share, settings.granularity)
            if weights.dim() > 2:
                # All scores of an expert that no token reached are 0: they rank nothing.
                mask &= reached(moments)[:, None, None]
            yield matrix, mask

    def _refuse_ragged(self) -> None:
        """Refuse rows that do not fall into whole runs of the pattern."""
        if ":" not in self.settings.granularity:
            return
        run = int(self.settings.granularity[-1])
        for name, matrix in self._matrices.items():
            inputs = matrix.maps().shape[-1]
            if inputs % run:
                raise NotApplicableError(
                    f"{name} has {inputs} inputs, no multiple of {run} "
                    f"(granularity={self.settings.granularity})"
                )
