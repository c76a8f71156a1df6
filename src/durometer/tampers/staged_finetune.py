"""Fine-tuning in two stages on the same weights, with one switch of the data between them."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar, Literal

from durometer.core.budget import Budget
from durometer.core.errors import DurometerError
from durometer.core.rows import Row
from durometer.core.seeds import Seeds
from durometer.core.settings import Levels, setting
from durometer.core.training import Trainer, Update
from durometer.domains.base import Domain
from durometer.subjects.base import Subject
from durometer.tampers.base import OnCheckpoint, Realised, tamper
from durometer.tampers.crafted import Crafted, CraftedSettings
from durometer.tampers.data import Relation, shuffled_batches

Stages = Literal["retain_restricted", "benign_restricted", "restricted_benign", "restricted_retain"]


class StagedFineTuneSettings(CraftedSettings):
    """Settings of ``staged_finetune``."""

    stages: Stages = setting(
        "retain_restricted",
        "what is trained on, in this order; restricted rows last is the attack, first is a repair "
        "of utility after it",
        search=Levels(("retain_restricted", "benign_restricted", "restricted_benign")),
    )
    switch: float = setting(
        0.4,
        "share of all updates that the first stage makes; either stage gets one at least",
        search=Levels((0.1, 0.25, 0.4, 0.67, 0.9)),
        gt=0,
        lt=1,
    )
    optimizer_state: Literal["carried", "reset"] = setting(
        "carried",
        "whether the optimiser keeps its moments at the switch; the schedule goes on either way",
        search=Levels(("carried", "reset")),
    )
    examples: int = setting(
        64, "unique training examples a stage", search=Levels((10, 64, 100, 400)), ge=1
    )
    data: Literal["disjoint", "defence_rows"] = setting(
        "disjoint",
        "restricted rows: disjoint from the defender's, or the defender's own",
        search=Levels(("disjoint", "defence_rows")),
    )


@tamper("staged_finetune", aliases=("ft-staged", "ft_staged"))
class StagedFineTune(Crafted[StagedFineTuneSettings]):
    """Two stages of fine-tuning, one after the other."""

    summary = "fine-tuning that switches once from retain or benign to restricted rows, or back"
    source = "arXiv 2408.00761, 2412.07097"
    cannot_show = "what a switch at another step or a longer chain of stages would do"
    settings_class: ClassVar[type[CraftedSettings]] = StagedFineTuneSettings

    def __init__(self, settings: StagedFineTuneSettings) -> None:
        super().__init__(settings)
        self._planned = settings.steps

    def relations(self) -> tuple[Relation, Relation]:
        """Return the data relation of either stage, in order."""
        first, second = self.settings.stages.split("_")
        names: dict[str, Relation] = {
            "restricted": self.settings.data,
            "retain": "retain",
            "benign": "benign",
        }
        return names[first], names[second]

    def switch_step(self, planned: int) -> int:
        """Return how many of ``planned`` updates the first stage makes."""
        return min(max(round(self.settings.switch * planned), 1), planned - 1) if planned else 0

    def stage_rows(
        self, subject: Subject, data: Domain, seeds: Seeds
    ) -> tuple[list[Row], list[Row]]:
        """Return the rows of the first and of the second stage."""
        first, second = self.relations()
        return (
            self.related_rows(subject, data, first, seeds),
            self.related_rows(subject, data, second, seeds),
        )

    def attack_rows(self, subject: Subject, data: Domain, seeds: Seeds) -> list[Row]:
        """Return the rows of both stages, the first stage's first."""
        first, second = self.stage_rows(subject, data, seeds)
        return [*first, *second]

    def batches(self, subject: Subject, data: Domain, seeds: Seeds) -> Iterator[list[Row]]:
        """Yield the first stage's batches up to the switch, then the second's for ever."""
        _, replay = self.rows(subject, data, seeds)
        settings = self.settings
        for number, rows in enumerate(self.stage_rows(subject, data, seeds)):
            # Another order of the replayed rows in either stage.
            drawn = replace(seeds, data_order=seeds.data_order + number)
            batches = shuffled_batches(
                rows, replay, settings.batch_size, settings.retain_share, drawn
            )
            first = self.switch_step(self._planned)
            yield from batches if number else itertools.islice(batches, first)

    def steps(
        self, subject: Subject, data: Domain, budget: Budget, seeds: Seeds
    ) -> Iterator[Update]:
        """Yield after each update; the switch is a share of the updates of this very run."""
        self._planned = min(budget.steps, self.settings.steps)
        yield from super().steps(subject, data, budget, seeds)

    def before_update(self, trainer: Trainer, step: int) -> None:
        """Reset the optimiser at the switch, if the settings say so."""
        if self.settings.optimizer_state == "reset" and step == self.switch_step(self._planned):
            trainer.reset_optimizer()

    def run(
        self,
        subject: Subject,
        data: Domain,
        budget: Budget,
        seeds: Seeds,
        on_checkpoint: OnCheckpoint,
    ) -> Realised:
        """Fine-tune in stages; see ``Tamper.run``.

        Raises:
            DurometerError: a batch held a row of the other stage.
        """
        realised = super().run(subject, data, budget, seeds, on_checkpoint)
        switch = self.switch_step(self._planned)
        self._check(realised, switch, self.stage_rows(subject, data, seeds))
        realised.facts |= {
            "stages": list(self.relations()),
            "switch_step": switch,
            "switched": realised.spent.steps > switch,
            "optimizer_state": self.settings.optimizer_state,
        }
        return realised

    def _check(self, realised: Realised, switch: int, stages: tuple[list[Row], list[Row]]) -> None:
        """Refuse a run in which a stage trained on the other's rows, replay aside."""
        known = [{row.item_id for row in rows} for rows in stages]
        replayed = "retain" if self.settings.retain_share else ""
        for step, ids in enumerate(realised.item_ids):
            stage = int(step >= switch)
            if replayed and self.relations()[1 - stage] == replayed:
                continue  # the other stage's rows are replayed here on purpose
            if (known[1 - stage] - known[stage]) & set(ids):
                raise DurometerError(f"tamper '{self.name}': update {step + 1} mixes the stages")
