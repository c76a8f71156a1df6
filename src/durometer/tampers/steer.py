"""Activation steering: hidden states are pushed away from refusal while the subject answers."""

from typing import ClassVar, Literal

from durometer.core.budget import Spent
from durometer.core.seeds import Seeds
from durometer.core.settings import Levels, setting
from durometer.core.structure import blocks
from durometer.core.writers import Edit, hook_block_input, take_out
from durometer.domains.base import Domain
from durometer.subjects.base import Subject
from durometer.tampers.base import Access, Realised, tamper
from durometer.tampers.directions import (
    DirectionLadder,
    DirectionSettings,
    Origin,
    added,
    random_basis,
)
from durometer.tampers.ladder import Strengths


class SteerSettings(DirectionSettings):
    """Settings of ``steer``."""

    strengths: Strengths = setting(
        (0.5, 1.0, 1.5, 2.0),
        "multiples of the mean difference taken off (or shares projected out), in the order tried",
        min_length=1,
    )
    mode: Literal["add", "project_out"] = setting(
        "add",
        "shift the input of one block, or project the direction out of every block's input",
        search=Levels(("add", "project_out")),
    )
    vector: Origin = setting("found", "the refusal vector, or a random one of equal norm (control)")


@tamper("steer")
class Steer(DirectionLadder[SteerSettings]):
    """``x - strength m`` at the input of the block where the mean difference ``m`` was found.

    At all positions, those of the response included. Subtracting suppresses refusal; a negative
    strength brings it about.
    """

    summary = "steers hidden states against the refusal direction while the subject answers"
    access: ClassVar[Access] = "activations"
    access_level = "A3"
    cost = "2 N T of about 500 short prompts; O(d) a token"
    source = "arXiv 2406.11717; andyrdt/refusal_direction"
    cannot_show = "what an attacker gains who may choose layer and strength per prompt"
    settings_class = SteerSettings
    matched_control = ("vector", "random")
    changes_weights = False

    def prepare(
        self, subject: Subject, data: Domain, seeds: Seeds, realised: Realised, spent: Spent
    ) -> None:
        """Find the vector; a random one takes its place, its layer and its norm."""
        found = self.search(subject, data, seeds, realised, spent)
        self._layer, self._shift, self._basis = found.layer, found.mean_difference, found.basis
        if self.settings.vector == "random":
            self._basis = random_basis(subject, found.basis.shape[1], seeds)
            self._shift = self._basis[:, 0] * self._shift.norm()

    def apply(self, subject: Subject, strength: float, realised: Realised) -> int:
        """Hang the hooks; no weight is edited."""
        chain = [block for _, block in blocks(subject.model)]
        if self.settings.mode == "add":
            edit: Edit = added(-strength * self._shift)
            chain = chain[self._layer : self._layer + 1]
        else:
            edit = self._projection(strength)
        for block in chain:
            subject.restoration.on_exit(hook_block_input(block, edit).remove)
        return 0

    def _projection(self, strength: float) -> Edit:
        return lambda states: take_out(states, self._basis, strength)
