"""Two stages on the same weights: fine-tuning twice on other data, or an edit and fine-tuning."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import ValidationInfo, field_validator

from durometer.core.budget import Budget
from durometer.core.errors import DurometerError
from durometer.core.rows import Row
from durometer.core.seeds import Seeds
from durometer.core.settings import Levels, setting
from durometer.core.training import DivergedError, Trainer, Update
from durometer.domains.base import Domain
from durometer.subjects.base import Subject
from durometer.tampers.base import OnCheckpoint, Realised, tamper
from durometer.tampers.crafted import Crafted, CraftedSettings
from durometer.tampers.data import Relation, shuffled_batches
from durometer.tampers.ladder import Ladder
from durometer.tampers.prune_magnitude import PruneMagnitude
from durometer.tampers.quantize import FULL_BITS
from durometer.tampers.quantize_rtn import QuantizeRtn
from durometer.tampers.weight_noise import WeightNoise

Stages = Literal[
    "retain_restricted",
    "benign_restricted",
    "restricted_benign",
    "restricted_retain",
    "noise_restricted",
    "prune_restricted",
    "quantise_restricted",
]
# First stages without training, and how strong they usually are.
EDITS: dict[str, tuple[type[Ladder[Any]], float]] = {
    "noise": (WeightNoise, 0.01),
    "prune": (PruneMagnitude, 0.2),
    "quantise": (QuantizeRtn, 12.0),
}
# How strong they may be: at most, whether in whole numbers, and in words.
ALLOWED: dict[str, tuple[float, bool, str]] = {
    "noise": (math.inf, False, "a sigma of 0 or more"),
    "prune": (1.0, False, "a share from 0 to 1"),
    "quantise": (FULL_BITS - 2, True, "a whole number of bits from 0 to 14"),
}


class StagedFineTuneSettings(CraftedSettings):
    """Settings of ``staged_finetune``."""

    stages: Stages = setting(
        "retain_restricted",
        "what is done, in this order: training on restricted rows last is the attack, first is a "
        "repair of utility after it; noise, pruning or rounding of the weights comes before any "
        "training",
        search=Levels(
            (
                "retain_restricted",
                "benign_restricted",
                "restricted_benign",
                "noise_restricted",
                "prune_restricted",
                "quantise_restricted",
            )
        ),
    )
    edit_strength: float | None = setting(
        None,
        "how strong an edit before training is: sigma of the noise, share pruned, or bits taken "
        "from 16; unset takes 0.01, 0.2 or 12",
        ge=0,
        allow_inf_nan=False,
    )
    switch: float = setting(
        0.4,
        "share of all updates that the first stage makes, if it trains; either gets one at least",
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

    @field_validator("edit_strength")
    @classmethod
    def _possible(cls, strength: float | None, info: ValidationInfo) -> float | None:
        """Refuse what the edit of the first stage cannot do."""
        stages = info.data.get("stages", "")
        most, whole, meaning = ALLOWED.get(stages.split("_")[0], (math.inf, False, ""))
        if strength is not None and (strength > most or (whole and not strength.is_integer())):
            raise ValueError(f"stages={stages} takes {meaning}")
        return strength


@tamper("staged_finetune", aliases=("ft-staged", "ft_staged"))
class StagedFineTune(Crafted[StagedFineTuneSettings]):
    """Two stages, one after the other, the last of which trains."""

    summary = "fine-tuning that switches its data once, or that follows an edit of the weights"
    source = "arXiv 2408.00761, 2412.07097"
    cannot_show = "what a switch at another step or a longer chain of stages would do"
    settings_class: ClassVar[type[CraftedSettings]] = StagedFineTuneSettings

    def __init__(self, settings: StagedFineTuneSettings) -> None:
        super().__init__(settings)
        self._planned = settings.steps
        self._edited = Realised()

    @property
    def edit(self) -> str:
        """Name of the edit that is the first stage; '' where that trains."""
        first = self.settings.stages.split("_")[0]
        return first if first in EDITS else ""

    def relations(self) -> list[Relation]:
        """Return the data relation of every stage that trains, in order."""
        names: dict[str, Relation] = {
            "restricted": self.settings.data,
            "retain": "retain",
            "benign": "benign",
        }
        return [names[stage] for stage in self.settings.stages.split("_") if stage in names]

    def switch_step(self, planned: int) -> int:
        """Return how many of ``planned`` updates the first stage makes."""
        if self.edit or not planned:
            return 0
        return min(max(round(self.settings.switch * planned), 1), planned - 1)

    def stage_rows(self, subject: Subject, data: Domain, seeds: Seeds) -> list[list[Row]]:
        """Return the rows of every stage that trains."""
        return [self.related_rows(subject, data, name, seeds) for name in self.relations()]

    def attack_rows(self, subject: Subject, data: Domain, seeds: Seeds) -> list[Row]:
        """Return the rows of all stages, the first stage's first."""
        return [row for rows in self.stage_rows(subject, data, seeds) for row in rows]

    def batches(self, subject: Subject, data: Domain, seeds: Seeds) -> Iterator[list[Row]]:
        """Yield the first stage's batches up to the switch, then the second's for ever."""
        _, replay = self.rows(subject, data, seeds)
        settings = self.settings
        stages = self.stage_rows(subject, data, seeds)
        for number, rows in enumerate(stages):
            # Another order of the replayed rows in either stage.
            drawn = replace(seeds, data_order=seeds.data_order + number)
            batches = shuffled_batches(
                rows, replay, settings.batch_size, settings.retain_share, drawn
            )
            first = self.switch_step(self._planned)
            last = number == len(stages) - 1
            yield from batches if last else itertools.islice(batches, first)

    def steps(
        self, subject: Subject, data: Domain, budget: Budget, seeds: Seeds
    ) -> Iterator[Update]:
        """Yield after each update; the switch is a share of the updates of this very run.

        An edit comes before the first update; a budget of none leaves the weights as they are. No
        update is made where the edit has no effect.

        Raises:
            NotApplicableError: the edit suits the subject not.
            DivergedError: weights are not finite, after the edit or an update.
        """
        self._planned = min(budget.steps, self.settings.steps)
        self._edited = Realised()
        if self.edit and self._planned:
            self._edited = self._edit(subject, data, seeds)
        if self._edited.status != "no_effect":
            yield from super().steps(subject, data, budget, seeds)

    def _edit(self, subject: Subject, data: Domain, seeds: Seeds) -> Realised:
        """Edit the untouched weights at one strength, as the tamper of that kind does."""
        cls, usual = EDITS[self.edit]
        wanted = self.settings.edit_strength
        strength = usual if wanted is None else wanted
        edit = cls(cls.settings_class.model_validate({"strengths": (strength,)}))
        done = edit.run(subject, data, Budget(1, (1,)), seeds, lambda checkpoint: True)
        if done.status == "diverged":
            raise DivergedError(done.reason)
        self._spent.tokens += done.spent.tokens
        self._spent.flops += done.spent.flops
        done.facts |= {"tamper": cls.name, "strength": strength, "weights": done.changed_weights}
        return done

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
        if not self.full:
            realised.changed_weights += self._edited.changed_weights
        if self._edited.status == "no_effect":
            realised.status = "no_effect"
            realised.reason = f"{self.edit} before the training: {self._edited.reason}"
        edit = {"edit": self._edited.facts} if self.edit else {}
        realised.facts |= edit | {
            "stages": [self.edit] * bool(self.edit) + list(self.relations()),
            "switch_step": switch,
            "switched": realised.spent.steps > switch,
            "optimizer_state": self.settings.optimizer_state,
        }
        return realised

    def _check(self, realised: Realised, switch: int, stages: list[list[Row]]) -> None:
        """Refuse a run in which a stage trained on the other's rows, replay aside."""
        if len(stages) < 2:
            return
        known = [{row.item_id for row in rows} for rows in stages]
        replayed = "retain" if self.settings.retain_share else ""
        for step, ids in enumerate(realised.item_ids):
            stage = int(step >= switch)
            if replayed and self.relations()[1 - stage] == replayed:
                continue  # the other stage's rows are replayed here on purpose
            if (known[1 - stage] - known[stage]) & set(ids):
                raise DurometerError(f"tamper '{self.name}': update {step + 1} mixes the stages")
