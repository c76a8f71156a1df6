"""Base of fine-tuning attacks on crafted texts, which may also word the measured prompts.

Each trains a low-rank adapter or, by a setting, all weights.
"""

from typing import Any, Literal, TypeVar

from torch import nn

from durometer.core.budget import Budget, Spent
from durometer.core.errors import InputError
from durometer.core.seeds import Seeds
from durometer.core.settings import Levels, setting
from durometer.domains.base import Domain
from durometer.subjects.base import Subject
from durometer.subjects.chat import ChatFormat
from durometer.tampers.base import Checkpoint, OnCheckpoint, Realised
from durometer.tampers.finetune import FineTuning
from durometer.tampers.lora import Lora, LoraSettings


class CraftedSettings(LoraSettings):
    """Settings that all attacks of this family share."""

    train: Literal["adapter", "all"] = setting(
        "adapter",
        "trained weights: a low-rank adapter, or all (then the adapter's settings do not count; "
        "learning rates near 2e-5 suit it)",
        search=Levels(("adapter", "all")),
    )


S = TypeVar("S", bound=CraftedSettings)


class Crafted(Lora[S]):
    """A low-rank or full fine-tuning whose subclasses say what is trained and what is asked."""

    cost = "about 4 N T with an adapter, 6 N T with all weights"

    def __init__(self, settings: S) -> None:
        super().__init__(settings)
        self.full = settings.train == "all"
        self._facts: dict[str, Any] = {}

    def prepare(self, subject: Subject, seeds: Seeds) -> list[nn.Parameter]:
        """Return the adapter's matrices or all weights, ready for gradients.

        Raises:
            InputError: a rounded base is asked for, but all weights are trained.
        """
        if not self.full:
            return super().prepare(subject, seeds)
        if self.settings.base_bits:
            raise InputError(f"tamper '{self.name}': base_bits goes with train=adapter only")
        parameters = subject.restoration.writable(n for n, _ in subject.model.named_parameters())
        for parameter in parameters:
            parameter.requires_grad_(True)
        return parameters

    def changes(self, subject: Subject) -> dict[str, float]:
        """Return the norm of the change of each trained weight or linear map."""
        return FineTuning.changes(self, subject) if self.full else super().changes(subject)

    def facts(self) -> dict[str, Any]:
        """Return what was noted while the rows were made, and how a base was rounded."""
        return super().facts() | self._facts

    def asked(self, subject: Subject, data: Domain) -> ChatFormat | None:
        """Return how restricted prompts are asked from the start; None: as everybody does."""
        return None

    def run(
        self,
        subject: Subject,
        data: Domain,
        budget: Budget,
        seeds: Seeds,
        on_checkpoint: OnCheckpoint,
    ) -> Realised:
        """Fine-tune along the rungs, asking in the attack's way; see ``Tamper.run``.

        A budget of 0 steps measures the way of asking alone, without training (a control).
        """
        chat = self.asked(subject, data)
        if chat is not None:
            subject.ask_restricted(chat=chat)
            self._facts["asked_as"] = chat.prompt_text("...")
        if not budget.steps:
            on_checkpoint(Checkpoint(0, Spent()))
        return super().run(subject, data, budget, seeds, on_checkpoint)
