"""What a tamper is: one attack on a subject, in memory, under a stated budget."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Literal, TypeVar

from durometer.core.budget import Budget, Spent
from durometer.core.registry import Registry
from durometer.core.seeds import Seeds
from durometer.core.settings import Settings
from durometer.core.training import Update
from durometer.domains.base import Domain
from durometer.subjects.base import Subject

Access = Literal["input", "activations", "routing", "weights"]
S = TypeVar("S", bound=Settings)


@dataclass(frozen=True)
class Checkpoint:
    """Where a tamper stands when it lets itself be measured.

    Attributes:
        steps: steps made, in the tamper's ``unit``: optimiser updates, rounds of a search, or the
            place on a ladder of strengths, from 1.
        strength: what the edit of a ladder was done with.
        spent: everything spent so far.
        last: nothing comes after it, though more had been planned (a ladder lost some rungs once
            it saw the subject).
    """

    steps: int
    spent: Spent
    strength: float | None = None
    last: bool = False


# Called at every checkpoint; returning False ends the tamper there.
OnCheckpoint = Callable[[Checkpoint], bool]


@dataclass
class Realised:
    """What a tamper really did, recorded with its trial because it cannot be rebuilt.

    Attributes:
        status: ``done``, ``diverged`` or ``no_effect``.
        reason: one line for any status but ``done``.
        spent: the whole cost.
        learning_rates: the rate of every update.
        losses: the loss of every update, before it, nats a token.
        item_ids: items of every update, in the order they were used.
        data_order_hash: SHA-256 of the item ids of the first epoch, in order.
        label_sample: decoded examples, each token with whether it is a label.
        changed: Frobenius norm of the change by weight tensor, those that are not finite left out.
        changed_weights: number of weights that were trained or edited.
        facts: further facts of the method (modules matched, rank ...).
    """

    status: str = "done"
    reason: str = ""
    spent: Spent = field(default_factory=Spent)
    learning_rates: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    item_ids: list[tuple[str, ...]] = field(default_factory=list)
    data_order_hash: str = ""
    label_sample: list[list[tuple[str, bool]]] = field(default_factory=list)
    changed: dict[str, float] = field(default_factory=dict)
    changed_weights: int = 0
    facts: dict[str, Any] = field(default_factory=dict)


class Tamper(Generic[S]):
    """Base of all tampers: names, settings and documentation; subclasses attack.

    A tamper changes the subject inside ``subject.restored()``, which its caller owns, announces
    every change to ``subject.restoration``, and never restores by itself.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    access: ClassVar[Access]
    access_level: ClassVar[str]
    cost: ClassVar[str]
    source: ClassVar[str]
    cannot_show: ClassVar[str]
    settings_class: ClassVar[type[Settings]]
    # What one step is, and whether every step is a rung of its own (a ladder of strengths).
    unit: ClassVar[str] = "updates"
    # Setting and value that put random content in the place of what the tamper looks for.
    matched_control: ClassVar[tuple[str, str] | None] = None
    ladder: ClassVar[bool] = False

    def __init__(self, settings: S) -> None:
        self.settings = settings
        # Told of every update, for progress only; what is measured goes through on_checkpoint.
        self.on_update: Callable[[Update], None] | None = None

    def runs_once_per_rung(self) -> bool:
        """Say whether each rung of the budget needs a run of its own (a decaying schedule does)."""
        return False

    def planned_steps(self) -> int:
        """Return the updates that the settings plan; 0 for a tamper without steps."""
        return 0

    def steps(self, subject: Subject, data: Domain, budget: Budget, seeds: Seeds) -> Iterator[Any]:
        """Attack one update at a time; yields after each. Tampers without steps yield nothing."""
        yield from ()

    def run(
        self,
        subject: Subject,
        data: Domain,
        budget: Budget,
        seeds: Seeds,
        on_checkpoint: OnCheckpoint,
    ) -> Realised:
        """Attack ``subject`` within ``budget`` and let it be measured at the budget's rungs.

        Args:
            subject: inside ``restored()``.
            data: the domain; a tamper trains on its ``attack`` split alone unless it says
            otherwise. on_checkpoint: measures the subject; returning False ends the attack.

        Raises:
            NotApplicableError: the subject lacks the structure that the tamper needs.
        """
        raise TypeError(f"{type(self).__name__} defines no run()")  # pragma: no cover


tamper_registry: Registry[type[Tamper[Any]]] = Registry("tamper", "durometer.tampers")


def tamper(
    name: str, *, aliases: tuple[str, ...] = ()
) -> Callable[[type[Tamper[Any]]], type[Tamper[Any]]]:
    """Return the decorator that makes a tamper class known to the CLI, the docs and the tests."""

    def decorate(cls: type[Tamper[Any]]) -> type[Tamper[Any]]:
        cls.name = name
        return tamper_registry.register(name, aliases=aliases)(cls)

    return decorate


def make_tamper(name: str, **settings: Any) -> Tamper[Any]:
    """Return the tamper ``name`` with the given settings, defaults for the rest.

    Raises:
        InputError: no such tamper or setting (the nearest is suggested), or a value out of bounds.
    """
    cls = tamper_registry.get(name)
    return cls(cls.settings_class.parse(f"tamper '{cls.name}'", settings))


@tamper("none", aliases=("noop",))
class NoTamper(Tamper[Settings]):
    """The zero-step control: the subject as it is, through the whole harness."""

    summary = "no tamper at all: the zero-budget control, bit for bit the subject"
    access: ClassVar[Access] = "input"
    access_level = "A0"
    cost = "0"
    source = "control C0"
    cannot_show = "anything about durability; it shows where every curve starts"
    settings_class = Settings

    def run(
        self,
        subject: Subject,
        data: Domain,
        budget: Budget,
        seeds: Seeds,
        on_checkpoint: OnCheckpoint,
    ) -> Realised:
        """Measure the subject once, untouched."""
        on_checkpoint(Checkpoint(0, Spent()))
        return Realised()
