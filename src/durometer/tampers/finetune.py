"""Fine-tuning attacks: the shared settings and loop, and full fine-tuning."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal, TypeVar

from torch import nn

from durometer.core.budget import Budget, Spent
from durometer.core.errors import NotApplicableError
from durometer.core.forward import Forward
from durometer.core.optimizers import OptimizerName
from durometer.core.rows import Row
from durometer.core.schedules import Schedule, depends_on_total
from durometer.core.seeds import Seeds
from durometer.core.settings import Between, Levels, Settings, setting
from durometer.core.training import OptimisationPlan, Trainer, Update
from durometer.domains.base import Domain, Item
from durometer.subjects.base import Subject
from durometer.subjects.chat import ChatFormat, TemplateName
from durometer.tampers.base import Access, OnCheckpoint, Realised, Tamper, tamper
from durometer.tampers.data import (
    Relation,
    make_rows,
    order_hash,
    shuffled_batches,
    training_items,
)
from durometer.tampers.ledger import Ledger, along_rungs

LABEL_SAMPLE = 3


class FineTuneSettings(Settings):
    """The axes that every fine-tuning attack shares."""

    optimizer: OptimizerName = setting(
        "adamw",
        "optimiser",
        search=Levels(("adamw", "sgd_nesterov", "adadelta", "schedule_free_adamw", "sign_sgd")),
    )
    learning_rate: float = setting(
        2e-5, "peak learning rate", search=Between(1e-6, 1e-3, log=True), gt=0
    )
    schedule: Schedule = setting(
        "constant", "learning-rate schedule", search=Levels(("constant", "linear", "cosine"))
    )
    schedule_floor: float = setting(0.0, "lowest rate of the cosine schedules", ge=0)
    warmup_steps: int = setting(
        0, "updates of linear warm-up", search=Levels((0, 5, 10, 30, 100)), ge=0
    )
    weight_decay: float = setting(0.0, "decoupled weight decay", search=Levels((0.0, 0.01)), ge=0)
    gradient_clip: float = setting(0.0, "largest gradient norm; 0 clips nothing", ge=0)
    batch_size: int = setting(8, "rows an update", search=Levels((8, 16, 32, 64)), ge=1)
    steps: int = setting(16, "planned updates", search=Levels((4, 16, 64, 256)), ge=1)
    examples: int = setting(
        64, "unique training examples", search=Levels((1, 10, 64, 100, 400, 1000)), ge=1
    )
    data: Relation = setting(
        "disjoint",
        "what is trained on: restricted rows disjoint from the defender's, the defender's own "
        "rows, retain rows, benign chat, or refusals",
        search=Levels(("disjoint", "defence_rows", "retain", "benign")),
    )
    retain_share: float = setting(
        0.0,
        "share of each batch that replays retain rows, which keeps the attacker's utility",
        search=Levels((0.0, 0.25, 0.5, 0.75)),
        ge=0,
        lt=1,
    )
    loss_on: Literal["response", "prompt_and_response"] = setting(
        "response", "labelled tokens", search=Levels(("response", "prompt_and_response"))
    )
    template: TemplateName = setting(
        "own", "chat template of the training rows", search=Levels(("own", "plain", "instruction"))
    )
    system_prompt: str | None = setting(
        None, "system prompt of the training rows; unset leaves it to the template"
    )
    max_length: int = setting(512, "longest row in tokens", search=Between(256, 2048), ge=8)


S = TypeVar("S", bound=FineTuneSettings)


class FineTuning(Tamper[S]):
    """The loop of all fine-tuning attacks; subclasses say which weights are trained."""

    access: ClassVar[Access] = "weights"
    access_level = "A4"
    full: bool
    _trained: int = 0

    def __init__(self, settings: S) -> None:
        super().__init__(settings)
        # What is spent beside the updates (choosing rows, a stage without training) goes here.
        self._spent = Spent()

    def runs_once_per_rung(self) -> bool:
        """A decaying schedule needs a run a rung; a constant one gives the curve at once."""
        return depends_on_total(self.settings.schedule)

    def planned_steps(self) -> int:
        """Return the updates that the settings plan."""
        return self.settings.steps

    def prepare(self, subject: Subject, seeds: Seeds) -> list[nn.Parameter]:
        """Make the trained weights ready and return them."""
        raise TypeError(f"{type(self).__name__} defines no prepare()")  # pragma: no cover

    def rows(self, subject: Subject, data: Domain, seeds: Seeds) -> tuple[list[Row], list[Row]]:
        """Return the rows trained on, and the retain rows replayed among them."""
        rows = self.attack_rows(subject, data, seeds)
        if not self.settings.retain_share:
            return rows, []
        return rows, self.related_rows(subject, data, "retain", seeds)

    def attack_rows(self, subject: Subject, data: Domain, seeds: Seeds) -> list[Row]:
        """Return the rows trained on, replay aside; attacks with texts of their own override it."""
        return self.related_rows(subject, data, self.settings.data, seeds)

    def related_rows(
        self, subject: Subject, data: Domain, relation: Relation, seeds: Seeds
    ) -> list[Row]:
        """Return the domain's own rows of one relation, at most ``examples``."""
        chosen = training_items(data, relation, self.settings.examples, seeds)
        return self.tokenised(chosen, self.training_chat(subject))

    def training_chat(self, subject: Subject) -> ChatFormat:
        """Return the format of the training rows."""
        return subject.chat.using(self.settings.template, self.settings.system_prompt)

    def tokenised(self, chosen: Sequence[tuple[Item, str]], chat: ChatFormat) -> list[Row]:
        """Return rows of items with the responses to train on, labelled as the settings say."""
        labels = self.settings.loss_on == "prompt_and_response"
        return make_rows(chosen, chat, label_prompt=labels, max_length=self.settings.max_length)

    def looked_at(self) -> list[Row]:
        """Return rows that were read but not trained on; most attacks have none."""
        return []

    def forward(self, subject: Subject) -> Forward:
        """Return the forward pass whose loss is minimised."""
        return subject.forward

    def before_update(self, trainer: Trainer, step: int) -> None:
        """Prepare update number ``step``, counted from 0; most attacks need nothing."""

    def facts(self) -> dict[str, Any]:
        """Return what the record of a run should say besides, once it is over."""
        return {}

    def trainer(self, subject: Subject, budget: Budget, seeds: Seeds) -> Trainer:
        """Return a trainer over the prepared weights of ``subject``."""
        settings = self.settings
        plan = OptimisationPlan(
            settings.optimizer,
            settings.learning_rate,
            min(budget.steps, settings.steps),
            settings.schedule,
            settings.warmup_steps,
            settings.schedule_floor,
            settings.weight_decay,
            settings.gradient_clip,
        )
        parameters = self.prepare(subject, seeds)
        self._trained = sum(parameter.numel() for parameter in parameters)
        return Trainer(self.forward(subject), parameters, plan)

    def batches(self, subject: Subject, data: Domain, seeds: Seeds) -> Iterator[list[Row]]:
        """Return the endless batches of this attack, in the order of the data-order seed."""
        rows, replay = self.rows(subject, data, seeds)
        settings = self.settings
        return shuffled_batches(rows, replay, settings.batch_size, settings.retain_share, seeds)

    def steps(
        self, subject: Subject, data: Domain, budget: Budget, seeds: Seeds
    ) -> Iterator[Update]:
        """Yield after each update; the subject may be used or measured in between.

        Raises:
            DivergedError: the loss is not finite; the last finite weights are kept.
        """
        trainer = self.trainer(subject, budget, seeds)
        batches = self.batches(subject, data, seeds)
        planned = min(budget.steps, self.settings.steps)
        for step, rows in enumerate(itertools.islice(batches, planned)):
            self.before_update(trainer, step)
            update = trainer.update(rows)
            with trainer.measuring():
                yield update

    def run(
        self,
        subject: Subject,
        data: Domain,
        budget: Budget,
        seeds: Seeds,
        on_checkpoint: OnCheckpoint,
    ) -> Realised:
        """Fine-tune along the budget's rungs; see ``Tamper.run``."""
        realised = Realised()
        self._spent = realised.spent
        ledger = Ledger(subject, realised.spent, full=self.full)
        rows, replay = self.rows(subject, data, seeds)
        ledger.announce(rows)
        ledger.saw(self.looked_at())
        realised.label_sample = _label_sample(subject, [*rows, *replay])
        updates = self.steps(subject, data, budget, seeds)
        along_rungs(updates, ledger, realised, budget, on_checkpoint, self.on_update)
        self._audit(subject, realised, len(rows) + len(replay))
        realised.facts |= self.facts()
        return realised

    def _audit(self, subject: Subject, realised: Realised, unique_rows: int) -> None:
        """Record what changed; a fine-tuning attack that changed nothing has no effect.

        Weights that the last update made infinite show in no loss, so they are looked for here.
        """
        flat = [item_id for ids in realised.item_ids for item_id in ids]
        realised.data_order_hash = order_hash(flat[:unique_rows])
        realised.changed_weights = self._trained
        norms = self.changes(subject)
        realised.changed = {name: norm for name, norm in norms.items() if math.isfinite(norm)}
        lost = len(norms) - len(realised.changed)
        if lost and realised.status == "done":
            realised.status = "diverged"
            realised.reason = (
                f"after {realised.spent.steps} steps: {lost} weight tensors not finite"
            )
        if realised.status == "done" and not any(realised.changed.values()):
            realised.status, realised.reason = "no_effect", "no weight changed"

    def changes(self, subject: Subject) -> dict[str, float]:
        """Return the norm of the change of each trained weight."""
        return subject.restoration.changes()


def _label_sample(subject: Subject, rows: Sequence[Row]) -> list[list[tuple[str, bool]]]:
    tokenizer = subject.chat.tokenizer
    return [
        [(tokenizer.decode([t]), i >= row.first_label) for i, t in enumerate(row.ids)]
        for row in rows[:LABEL_SAMPLE]
    ]


@tamper("finetune", aliases=("ft-full", "ft_full"))
class FineTune(FineTuning[FineTuneSettings]):
    """Full fine-tuning: every weight is trained."""

    summary = "full fine-tuning of all weights on restricted answers"
    cost = "6 N T"
    source = "arXiv 2310.03693, 2408.00761, 2412.07097"
    cannot_show = "what an attacker gains who may spend more than the largest rung"
    settings_class = FineTuneSettings
    full = True

    def prepare(self, subject: Subject, seeds: Seeds) -> list[nn.Parameter]:
        """Return all weights, announced and ready for gradients."""
        names = [name for name, _ in subject.model.named_parameters()]
        if not names:
            raise NotApplicableError("the subject has no weights to train")
        parameters = subject.restoration.writable(names)
        for parameter in parameters:
            parameter.requires_grad_(True)
        return parameters
