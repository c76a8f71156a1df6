"""What a safeguard is: one interface for those that train, probe, simulate attacks or edit.

A safeguard lists weighted loss terms; ``safeguards.train`` drives them all with one loop. It visits
points of weight space (``visits``): the weights themselves, a probe beside them, the weights after
some steps of an inner attack. Terms are evaluated where they belong, and their gradients, taken at
the visited point, are applied to the weights. A safeguard without training defines ``edit`` alone.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar

import torch

from durometer.core.errors import InputError
from durometer.core.optimizers import OptimizerName
from durometer.core.registry import Registry
from durometer.core.schedules import Schedule
from durometer.core.settings import Between, Levels, Settings, setting
from durometer.domains.base import KINDS, Domain, Kind
from durometer.subjects.base import Subject

if TYPE_CHECKING:
    from durometer.safeguards.bench import Bench
    from durometer.safeguards.data import DefenceData, Unit
    from durometer.safeguards.passes import Pass
    from durometer.safeguards.train import Step

Access = Literal["weights", "api"]
Per = Literal["label", "token", "row", "pair", "batch"]
Scope = Literal["all", "blocks", "mlp", "mlp_in", "mlp_out", "attention", "adapter"]
Role = Literal["residual", "mlp", "attention"]
ReferencePoint = Literal["original", "stage_start"]
S = TypeVar("S", bound=Settings)
WEIGHTS = "weights"
# Below this many weights a model needs larger learning rates; its steps are cheap.
TINY = 5_000_000


@dataclass(frozen=True)
class Term:
    """One weighted part of a safeguard's loss.

    Attributes:
        name: unique within the safeguard; shown in progress and logs.
        coefficient: its weight, or a function of the step (from 0) and the planned steps; at 0 the
            term is not computed at all.
        rows: the pool of rows that it reads, see ``DefenceData.pool``.
        loss: values of one pass, one for each of what ``per`` names; their mean over the whole
            batch is the loss, nats where it is a likelihood.
        per: labels, tokens (all but each row's last), rows, pairs of rows that follow each other,
            or ``batch``: one value a pass.
        at: the place at which it is evaluated, see ``Safeguard.visits``.
        reads: kinds of activations that it needs.
        whole: it needs the whole batch in one pass (statistics of the batch).
        may_rest: its gradient may vanish for long (a hinge, an anchor at its reference).
    """

    name: str
    coefficient: float | Callable[[int, int], float]
    rows: str
    loss: Callable[["Pass"], torch.Tensor]
    per: Per = "label"
    at: str = WEIGHTS
    reads: tuple[Role, ...] = ()
    whole: bool = False
    may_rest: bool = False

    def weight(self, step: int, steps: int) -> float:
        """Return the coefficient at ``step`` of ``steps``."""
        return self.coefficient(step, steps) if callable(self.coefficient) else self.coefficient

    @property
    def unit(self) -> int:
        """How many rows that follow each other must not be in different passes."""
        return 2 if self.per == "pair" else 1


@dataclass(frozen=True)
class Visit:
    """One point at which terms are evaluated; the change stands until the next visit is asked for.

    Attributes:
        place: which terms: those whose ``at`` is this.
        weight: multiplies their coefficients.
    """

    place: str = WEIGHTS
    weight: float = 1.0


class TrainingSettings(Settings):
    """What all training safeguards share; with every other coefficient at 0 this is plain SFT."""

    steps: int = setting(100, "updates", ge=1)
    learning_rate: float = setting(
        2e-5, "peak learning rate", search=Between(1e-6, 1e-2, log=True), gt=0
    )
    optimizer: OptimizerName = setting("adamw", "optimiser")
    schedule: Schedule = setting("constant", "learning-rate schedule")
    warmup_steps: int = setting(0, "updates of linear warm-up", ge=0)
    weight_decay: float = setting(0.0, "decoupled weight decay", ge=0)
    gradient_clip: float = setting(0.0, "largest gradient norm; 0 clips nothing", ge=0)
    batch_size: int = setting(16, "rows of each pool an update", search=Levels((8, 16, 32)), ge=1)
    train: Scope = setting(
        "all",
        "trained weights: all, the matrices of the blocks or of one kind (mlp_in reads the "
        "residual stream, mlp_out writes to it), or a merged adapter",
    )
    first_block: float = setting(
        0.0, "share of the blocks, from below, before the first trained one", ge=0, lt=1
    )
    last_block: float = setting(
        1.0, "share of the blocks, from below, up to the last trained one", gt=0, le=1
    )
    rank: int = setting(16, "rank of the adapter", ge=1)
    sft: float = setting(
        1.0,
        "coefficient of the cross-entropy on the supervised rows: retain rows of a knowledge "
        "domain, refusals and harmless rows of a refusal domain",
        ge=0,
    )
    harmless_share: float = setting(
        0.5, "refusal domains: share of each supervised batch that is harmless", ge=0, lt=1
    )
    loss_limit: float = setting(0.0, "stop once the loss is below this; 0 never stops", ge=0)


class Safeguard(Generic[S]):
    """Base of all safeguards; every method has a neutral default.

    Attributes:
        access: ``weights`` where it protects open weights, ``api`` where only a provider can use it
            (never shown among open-weight results).
        kinds: kinds of domain that it serves.
        presets: named settings; ``tiny`` is taken by itself for subjects of a few million weights.
        reference: the frozen model that terms may compare with; None: none is kept.
        separate: keep the gradients of the terms apart for ``transform``, not only their sum.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    access: ClassVar[Access] = "weights"
    cost: ClassVar[str]
    source: ClassVar[str]
    cannot_show: ClassVar[str]
    kinds: ClassVar[tuple[Kind, ...]] = KINDS
    settings_class: ClassVar[type[Settings]] = Settings
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    separate: ClassVar[bool] = False

    def __init__(self, settings: S) -> None:
        self.settings = settings

    @property
    def reference(self) -> ReferencePoint | None:
        """The frozen model that terms compare with, if any."""
        return None

    def stages(self, domain: Domain) -> list["Safeguard[Any]"]:
        """Return the safeguards that are carried out one after the other: this one alone."""
        return [self]

    def pools(self, data: "DefenceData") -> Mapping[str, "list[Unit]"]:
        """Return pools of rows beyond those of ``DefenceData``, from the defence split alone."""
        return {}

    def terms(self, subject: Subject, data: "DefenceData") -> list[Term]:
        """Return the loss terms; without any there is no training."""
        if isinstance(self.settings, TrainingSettings):
            return [supervised(self.settings)]
        return []

    def hooks(self, subject: Subject, data: "DefenceData") -> AbstractContextManager[Any]:
        """Return a context in which activations are changed while training."""
        return nullcontext()

    def visits(self, step: "Step") -> Iterator[Visit]:
        """Yield the places at which terms are evaluated in this step."""
        yield Visit()

    def transform(self, step: "Step") -> list[torch.Tensor | None]:
        """Return the gradient that is applied, fp32, one tensor a trained parameter."""
        return step.bank.total()

    def begin(self, bench: "Bench") -> None:
        """Change the weights before training, always in the same way.

        A run that is gone on with comes here, too, before its trained weights are loaded.
        """

    def edit(self, bench: "Bench") -> None:
        """Change the weights once training is over, or in its place."""

    def stop(self, step: "Step", losses: Mapping[str, float]) -> str:
        """Return why training should end after this step, '' to go on."""
        limit = getattr(self.settings, "loss_limit", 0.0)
        if limit and sum(losses.values()) < limit:
            return f"loss below {limit:g}"
        return ""

    def state(self) -> Mapping[str, torch.Tensor]:
        """Return what of its own a later run needs to go on; asked for where it may resume."""
        return {}

    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Go on from what ``state`` returned."""

    def can_resume(self, step: int) -> bool:
        """Say whether a checkpoint after ``step`` updates holds all that the rest depends on."""
        return True

    def facts(self) -> dict[str, Any]:
        """Return what the record should say besides, once it is over."""
        return {}


def supervised(settings: TrainingSettings) -> Term:
    """Return the cross-entropy on the supervised rows, which every training safeguard begins with.

    Alone it is plain supervised fine-tuning.
    """
    return Term("sft", settings.sft, "sft", lambda p: p.cross_entropy())


safeguard_registry: Registry[type[Safeguard[Any]]] = Registry("safeguard", "durometer.safeguards")


def safeguard(
    name: str, *, aliases: tuple[str, ...] = ()
) -> Callable[[type[Safeguard[Any]]], type[Safeguard[Any]]]:
    """Return the decorator that makes a safeguard known to the CLI, the docs and the tests."""

    def decorate(cls: type[Safeguard[Any]]) -> type[Safeguard[Any]]:
        cls.name = name
        return safeguard_registry.register(name, aliases=aliases)(cls)

    return decorate


def make_safeguard(name: str, preset: str = "", **settings: Any) -> Safeguard[Any]:
    """Return the safeguard ``name`` with the given settings over those of ``preset``.

    Raises:
        InputError: no such safeguard, preset or setting, or a value out of bounds.
    """
    cls = safeguard_registry.get(name)
    if preset and preset not in cls.presets:
        known = ", ".join(cls.presets) or "none"
        raise InputError(f"safeguard '{cls.name}': no preset '{preset}'; known: {known}")
    values = {**cls.presets.get(preset, {}), **settings}
    return cls(cls.settings_class.parse(f"safeguard '{cls.name}'", values))
