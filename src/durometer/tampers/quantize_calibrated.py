"""What GPTQ and AWQ share: text to calibrate on, and its moments a few blocks at a time."""

from collections.abc import Iterator
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from durometer.core.budget import Spent, matrix_entries
from durometer.core.capture import input_moments
from durometer.core.errors import NotApplicableError
from durometer.core.rows import Row
from durometer.core.seeds import Seeds
from durometer.core.settings import Levels, setting
from durometer.core.structure import blocks
from durometer.domains.base import Domain
from durometer.subjects.base import Subject
from durometer.tampers.base import Realised
from durometer.tampers.data import Relation, make_rows, training_items
from durometer.tampers.quantize import GridSettings, Matrix, Quantize

_RELATIONS: dict[str, Relation] = {
    "general": "benign",
    "retain": "retain",
    "restricted_like": "disjoint",
}


class CalibratedSettings(GridSettings):
    """Settings of quantisations that look at the inputs of every matrix."""

    calibration: Literal["general", "retain", "restricted_like"] = setting(
        "general", "text whose inputs are kept right; the choice moves safety (2506.20251)",
        search=Levels(("general", "retain", "restricted_like")),
    )  # fmt: skip
    examples: int = setting(32, "calibration rows", search=Levels((8, 32, 128)), ge=1)
    max_length: int = setting(512, "tokens of a row", ge=2)
    blocks_at_once: int = setting(
        8, "blocks calibrated in one pass; 1 lets each see all earlier ones quantised", ge=1
    )


C = TypeVar("C", bound=CalibratedSettings)


class Calibrated(Quantize[C]):
    """Base of quantisations that keep outputs right on calibration text.

    Blocks are taken in order, ``blocks_at_once`` at a time: a pass over the text gives their
    inputs' moments, with earlier blocks quantised already as they will be in use.
    """

    def strengths(self) -> tuple[float, ...]:
        """Return the bits to take away, fewest first."""
        return self.settings.strengths

    def matrices(self, subject: Subject, realised: Realised) -> list[Matrix]:
        """Return the blocks' matrices.

        Raises:
            NotApplicableError: experts fused into one tensor, whose inputs no hook can see.
        """
        chosen = super().matrices(subject, realised)
        fused = [matrix.name for matrix in chosen if matrix.parameter.dim() > 2]
        if fused:
            raise NotApplicableError(
                f"experts are fused into one tensor ({fused[0]}), so that their inputs cannot be "
                "captured; use quantize_rtn, quantize_nf4 or quantize_gguf"
            )
        return chosen

    def prepare(
        self, subject: Subject, data: Domain, seeds: Seeds, realised: Realised, spent: Spent
    ) -> None:
        """Draw and tokenise the calibration text.

        Raises:
            InputError: the domain has no such rows, or one is longer than ``max_length``.
        """
        super().prepare(subject, data, seeds, realised, spent)
        settings = self.settings
        items = training_items(data, _RELATIONS[settings.calibration], settings.examples, seeds)
        # A kernel sees every token, so the prompt counts as much as the response.
        self._rows: list[Row] = make_rows(
            items, subject.chat, label_prompt=True, max_length=settings.max_length
        )
        self._spent = spent
        spent.examples = len(self._rows)
        spent.restricted_examples = sum(row.restricted for row in self._rows)
        realised.facts |= {"calibration_items": [row.item_id for row in self._rows]}

    def several(
        self, weights: list[Tensor], moments: Tensor, bits: int, facts: dict[str, Any]
    ) -> list[Tensor]:
        """Return the ``weights`` that read the same inputs, quantised.

        Args:
            weights: each ``[outputs, inputs]``, fp32.
            moments: ``sum x xᵀ`` of their inputs, ``[inputs, inputs]``.
        """
        raise TypeError(f"{type(self).__name__} defines no several()")  # pragma: no cover

    def quantised(
        self, subject: Subject, strength: float, facts: dict[str, Any]
    ) -> Iterator[tuple[Matrix, Tensor]]:
        """Yield the matrices chunk by chunk, capturing the moments of each chunk first."""
        bits = facts["bits"] = int(16 - strength)
        for chunk in self._chunks(subject):
            names = [matrix.name.removesuffix(".weight") for matrix in chunk]
            moments = input_moments(subject.model, self._rows, names, full=True)
            self._book(subject)
            for together in _same_inputs(chunk, [moments.pop(name) for name in names]):
                members, moment = together
                weights = [matrix.oriented() for matrix in members]
                yield from zip(members, self.several(weights, moment, bits, facts), strict=True)

    def _chunks(self, subject: Subject) -> Iterator[list[Matrix]]:
        prefixes = [f"{name}." for name, _ in blocks(subject.model)]
        size = self.settings.blocks_at_once
        for start in range(0, len(prefixes), size):
            chunk = tuple(prefixes[start : start + size])
            yield [matrix for matrix in self._matrices if matrix.name.startswith(chunk)]

    def _book(self, subject: Subject) -> None:
        tokens = sum(len(row.ids) for row in self._rows)
        self._spent.tokens += tokens
        self._spent.flops += 2.0 * matrix_entries(subject.model) * tokens


def _same_inputs(
    chunk: list[Matrix], moments: list[Tensor]
) -> Iterator[tuple[list[Matrix], Tensor]]:
    """Yield the matrices that read the very same inputs together: query, key and value, say."""
    waiting = list(zip(chunk, moments, strict=True))
    while waiting:
        moment = waiting[0][1]
        same = [torch.equal(moment, other) for _, other in waiting]
        yield (
            [matrix for (matrix, _), is_same in zip(waiting, same, strict=True) if is_same],
            moment,
        )
        waiting = [pair for pair, is_same in zip(waiting, same, strict=True) if not is_same]
