"""Refusal-direction ablation: the weights lose what they write along one direction."""

from typing import ClassVar

from durometer.core.budget import Spent
from durometer.core.seeds import Seeds
from durometer.core.settings import Levels, setting
from durometer.core.writers import edit_weights, edited_names, require_complete, writers
from durometer.domains.base import Domain
from durometer.subjects.base import Subject
from durometer.tampers.base import Access, Realised, tamper
from durometer.tampers.directions import (
    DirectionLadder,
    DirectionSettings,
    Origin,
    random_basis,
)


class AblateDirectionSettings(DirectionSettings):
    """Settings of ``ablate_direction``."""

    direction: Origin = setting(
        "found", "the refusal direction, or a random one (control)", search=Levels(("found",))
    )
    norm_preserving: bool = setting(
        False, "bring every row of a linear map back to its norm after the edit"
    )


@tamper("ablate_direction", aliases=("ablate-direction",))
class AblateDirection(DirectionLadder[AblateDirectionSettings]):
    """``W - strength r rᵀ W`` on everything that writes into the residual stream.

    Token and position tables are edited, too; a table tied to the output head changes the head.
    Where a norm stands between a writer and the residual addition, the writer loses
    ``unit(gain * r)`` instead, so that nothing along r passes the norm.
    """

    summary = "takes the refusal direction out of all weights that write into the residual stream"
    access: ClassVar[Access] = "weights"
    access_level = "A4"
    cost = "2 N T of about 500 short prompts; 4 d_out d_in a writer and strength"
    source = "arXiv 2406.11717; andyrdt/refusal_direction, p-e-w/heretic; DoRA 2402.09353"
    cannot_show = "robustness of a safeguard that is spread over more directions than the rank"
    settings_class = AblateDirectionSettings
    matched_control = ("direction", "random")

    def prepare(
        self, subject: Subject, data: Domain, seeds: Seeds, realised: Realised, spent: Spent
    ) -> None:
        """Find the writers and the direction, and make sure that no writer is missed."""
        self._writers = writers(subject.model)
        self._basis = random_basis(subject, self.settings.rank, seeds)
        left = require_complete(subject.model, self._writers, self._basis)
        if self.settings.direction == "found":
            self._basis = self.search(subject, data, seeds, realised, spent).basis
        head = subject.model.get_output_embeddings()
        table = subject.model.get_input_embeddings()
        realised.facts |= {
            "writers": len(self._writers),
            "writers_behind_norms": sum(w.gain is not None for w in self._writers),
            "largest_leftover": left,
            "edits_tied_head": head is not None and head.weight is table.weight,
        }

    def apply(self, subject: Subject, strength: float, realised: Realised) -> int:
        """Edit every writer at ``strength``; return how many weights were edited."""
        names = edited_names(self._writers)
        parameters = dict(zip(names, subject.restoration.writable(names), strict=True))
        return edit_weights(
            self._writers,
            parameters,
            self._basis,
            strength,
            keep_norms=self.settings.norm_preserving,
        )
