"""Fine-tuning on harmless data alone: does the safeguard wear off without one restricted row?"""

from typing import Any, ClassVar, Literal

from durometer.core.budget import Spent
from durometer.core.rows import Row
from durometer.core.seeds import Seeds
from durometer.core.settings import Levels, setting
from durometer.domains.base import Domain
from durometer.subjects.base import Subject
from durometer.tampers.base import tamper
from durometer.tampers.data import Harmless
from durometer.tampers.lora import Lora, LoraSettings
from durometer.tampers.salient import Selection, nearest_to_restricted


class BenignFineTuneSettings(LoraSettings):
    """Settings of ``benign_finetune``."""

    data: Harmless = setting(
        "benign",
        "harmless rows: benign chat, the domain's retain rows (recovery then means suppression, "
        "not removal), or refusals",
        search=Levels(("benign", "retain")),
    )
    selection: Literal["random", "representation"] = setting(
        "random",
        "which of them: drawn by seed, or those whose hidden states are nearest to restricted "
        "answers and farthest from refusals (the attacker then needs restricted rows to choose "
        "by, though none is trained on)",
        search=Levels(("random", "representation")),
    )
    anchors: int = setting(64, "restricted rows that rows are chosen by", ge=1)


@tamper("benign_finetune", aliases=("ft-benign", "ft_benign"))
class BenignFineTune(Lora[BenignFineTuneSettings]):
    """LoRA fine-tuning on benign chat; the restricted share is 0."""

    summary = "LoRA fine-tuning on harmless chat alone"
    cost = "about 4 N T; 2 N T more over all harmless rows where they are chosen"
    source = "arXiv 2310.03693, 2404.01099, 2409.18025"
    cannot_show = "the strength of an attacker who holds restricted data"
    settings_class: ClassVar[type[LoraSettings]] = BenignFineTuneSettings
    _made: tuple[Subject, Domain, Seeds, Selection] | None = None
    _booked: Spent | None = None

    def attack_rows(self, subject: Subject, data: Domain, seeds: Seeds) -> list[Row]:
        """Return the harmless rows, chosen as the settings say."""
        if self.settings.selection == "random":
            return super().attack_rows(subject, data, seeds)
        chosen = self._selection(subject, data, seeds).chosen
        return self.tokenised(chosen, self.training_chat(subject))

    def facts(self) -> dict[str, Any]:
        """Return how the rows were chosen, where they were."""
        return super().facts() | (self._made[-1].facts if self._made else {})

    def _selection(self, subject: Subject, data: Domain, seeds: Seeds) -> Selection:
        """Choose once: rows are asked for again when the training begins, and by a run a rung.

        Every run is charged for the choice, as if it were the only one.
        """
        made, settings = self._made, self.settings
        if made and made[0] is subject and made[1] is data and made[2] == seeds:
            if self._booked is not self._spent:
                self._book(made[3].cost)
                self._spent.seconds += made[3].cost.seconds
            return made[3]
        selection = nearest_to_restricted(
            subject,
            data,
            settings.data,
            settings.examples,
            anchors=settings.anchors,
            max_length=settings.max_length,
            seeds=seeds,
        )
        self._book(selection.cost)  # its seconds are on the clock of the run
        self._made = (subject, data, seeds, selection)
        return selection

    def _book(self, cost: Spent) -> None:
        self._spent.tokens += cost.tokens
        self._spent.flops += cost.flops
        self._booked = self._spent

    def looked_at(self) -> list[Row]:
        """Return the restricted rows that the choice was made by."""
        return self._made[-1].restricted if self._made else []
