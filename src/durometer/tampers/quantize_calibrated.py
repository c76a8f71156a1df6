"""What GPTQ and AWQ share: text to calibrate on, and its moments a few blocks at a time."""

from collections.abc import Iterator
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from durometer.core.budget import Spent, matrix_entries
from durometer.core.capture import input_moments
from durometer.core.experts import LAST_MAP
from durometer.core.matrices import Matrix, reached
from durometer.core.rows import Row
from durometer.core.seeds import Seeds
from durometer.core.settings import Levels, setting
from durometer.core.structure import blocks
from durometer.domains.base import Domain
from durometer.subjects.base import Subject
from durometer.tampers.base import Realised
from durometer.tampers.data import Relation, make_rows, training_items
from durometer.tampers.quantize import GridSettings, Quantize

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

    def first_maps(
        self, weights: Tensor, moments: Tensor, bits: int, facts: dict[str, Any]
    ) -> Tensor:
        """Return experts' maps that read what one operation gives, quantised; one by one here.

        Args:
            weights: ``[experts, outputs, inputs]``, fp32, of experts that some token reached.
            moments: ``[experts, inputs, inputs]``.
        """
        pairs = zip(weights, moments, strict=True)
        return torch.stack([self.several([w], m, bits, facts)[0] for w, m in pairs])

    def quantised(
        self, subject: Subject, strength: float, facts: dict[str, Any]
    ) -> Iterator[tuple[Matrix, Tensor]]:
        """Yield the matrices chunk by chunk, capturing the moments of each chunk first."""
        bits = facts["bits"] = int(16 - strength)
        for chunk in self._chunks(subject):
            moments = input_moments(subject.model, self._rows, chunk, full=True)
            self._book(subject)
            for matrix in (m for m in chunk.values() if m.parameter.dim() > 2):
                yield matrix, self._experts(matrix, moments.pop(matrix.name), bits, facts)
            for members, moment in _same_inputs(chunk, moments):
                weights = [matrix.maps().float() for matrix in members]
                yield from zip(members, self.several(weights, moment, bits, facts), strict=True)

    def _experts(self, matrix: Matrix, moments: Tensor, bits: int, facts: dict[str, Any]) -> Tensor:
        """Return fused experts quantised; those that no token reached stay, and are counted."""
        seen = reached(moments)
        weights = matrix.maps().to(torch.float32, copy=True)
        facts["experts_left"] = facts.get("experts_left", 0) + int((~seen).sum())
        if matrix.name.endswith(f".{LAST_MAP}"):
            # What an expert's last map reads is its own.
            for expert in seen.nonzero().flatten().tolist():
                own = self.several([weights[expert]], moments[expert], bits, facts)
                weights[expert] = own[0]
        elif seen.any():
            weights[seen] = self.first_maps(weights[seen], moments[seen], bits, facts)
        return weights

    def _chunks(self, subject: Subject) -> Iterator[dict[str, Matrix]]:
        prefixes = [f"{name}." for name, _ in blocks(subject.model)]
        size = self.settings.blocks_at_once
        for start in range(0, len(prefixes), size):
            chunk = tuple(prefixes[start : start + size])
            yield {m.name: m for m in self._matrices if m.name.startswith(chunk)}

    def _book(self, subject: Subject) -> None:
        tokens = sum(len(row.ids) for row in self._rows)
        self._spent.tokens += tokens
        self._spent.flops += 2.0 * matrix_entries(subject.model) * tokens


def _same_inputs(
    chunk: dict[str, Matrix], moments: dict[str, Tensor]
) -> Iterator[tuple[list[Matrix], Tensor]]:
    """Yield the matrices that read the very same inputs together: query, key and value, say."""
    waiting = dict(moments)
    while waiting:
        moment = next(iter(waiting.values()))
        same = [name for name, other in waiting.items() if torch.equal(moment, other)]
        yield [chunk[name] for name in same], moment
        for name in same:
            del waiting[name]
