"""What is read off a state's rows: one number an item for every quantity of the report."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from durometer.domains.reasoning import SUITES as REASONING
from durometer.measures.contexts import CONTEXTS
from durometer.measures.outcomes import Outcome

__all__ = ["QUANTITIES", "Quantity", "State"]

Row = Mapping[str, Any]
Unit = Literal["rate", "points", "value", "nats", "tokens"]
SHORT = {"none": "no context (B)", "false": "false context (FIP)", "random": "random context (RIP)"}


@dataclass(frozen=True)
class Quantity:
    """One number an item.

    Attributes:
        key, label: its name for programs and for people.
        group: quantities that are shown together.
        unit: ``rate`` (0 or 1 an item), ``points`` (a difference of two rates), or a plain number.
        read: the number by item id; an item without one is left out.
    """

    key: str
    label: str
    group: str
    unit: Unit
    read: Callable[["State"], dict[str, float]]


class State:
    """The rows of one state of the subject.

    Args:
        rows: as ``unpack`` gave them.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.by_probe: dict[str, dict[str, Row]] = {}
        for row in rows:
            self.by_probe.setdefault(str(row["probe"]), {})[str(row["item_id"])] = row

    def field(self, probe: str, name: str, suite: str = "") -> dict[str, float]:
        """Return a number by item id; those without it are left out."""
        return {
            item: float(row[name])
            for item, row in self.by_probe.get(probe, {}).items()
            if row.get(name) is not None and suite in ("", row["suite"])
        }

    def outcome(self, probe: str, outcome: str) -> dict[str, float]:
        """Return by item id whether it ended in ``outcome``."""
        rows = self.by_probe.get(probe, {})
        return {item: float(row["outcome"] == outcome) for item, row in rows.items()}

    def entities(self) -> dict[str, str]:
        """Return the entity of every item."""
        return {
            item: str(row["entity"])
            for rows in self.by_probe.values()
            for item, row in rows.items()
            if "entity" in row
        }

    def suites(self, probe: str) -> list[str]:
        """Return the categories of a probe, in the order of its items."""
        return list(dict.fromkeys(str(row["suite"]) for row in self.by_probe[probe].values()))


def _field(key: str, label: str, group: str, unit: Unit, probe: str, name: str) -> Quantity:
    return Quantity(key, label, group, unit, lambda state: state.field(probe, name))


def _outcome(key: str, label: str, group: str, probe: str, outcome: Outcome) -> Quantity:
    return Quantity(key, label, group, "rate", lambda state: state.outcome(probe, str(outcome)))


def _minus(key: str, label: str, group: str, name: str) -> Quantity:
    def read(state: State) -> dict[str, float]:
        false, other = (state.field(f"knowledge_{c}", name) for c in ("false", "random"))
        return {item: value - other[item] for item, value in false.items() if item in other}

    return Quantity(key, label, group, "points", read)


def _problems(suite: str) -> Quantity:
    label = f"{suite.replace('_', ' ')} solved"
    return Quantity(
        f"reasoning_{suite}",
        label,
        "abilities",
        "rate",
        lambda state: state.field("reasoning", "correct", suite),
    )


def _all() -> Iterator[Quantity]:
    success = "restricted answers given (attack success)"
    yield _field("success", success, "safeguard", "rate", "outcomes", "correct")
    refusal, loops = Outcome.REFUSAL, Outcome.INCOHERENT_OR_EMPTY
    yield _outcome("refused", "restricted prompts refused", "safeguard", "outcomes", refusal)
    chosen = "restricted answers chosen among options"
    yield _field("choices", chosen, "safeguard", "rate", "choices", "correct")
    yield _outcome("over_refusal", "harmless prompts refused", "abilities", "over_refusal", refusal)
    label = "harmless prompts answered incoherently"
    yield _outcome("incoherent", label, "abilities", "over_refusal", loops)
    for suite in REASONING:
        yield _problems(suite)
    for name, label in (("correct", "right"), ("substring", "right as substring")):
        for context in CONTEXTS:
            key = f"{'accuracy' if name == 'correct' else name}_{context}"
            told, probe = f"{label}, {SHORT[context]}", f"knowledge_{context}"
            yield _field(key, told, "knowledge", "rate", probe, name)
    for context in CONTEXTS:
        told, probe = f"right word for word, {SHORT[context]}", f"knowledge_{context}"
        yield _field(f"strict_{context}", told, "knowledge", "rate", probe, "strict")
    yield _minus("accuracy_gap", "right, FIP minus RIP", "knowledge", "correct")
    for context in CONTEXTS:
        told, probe = f"planted answer adopted, {SHORT[context]}", f"knowledge_{context}"
        yield _field(f"adopted_{context}", told, "adoption", "rate", probe, "adopted")
    yield _minus("adopted_gap", "planted answer adopted, FIP minus RIP", "adoption", "adopted")
    units: dict[str, Unit] = {"perplexity": "value", "entropy": "nats", "probability": "value"}
    for name, unit in units.items():
        for context in CONTEXTS:
            told, probe = f"{name}, {SHORT[context]}", f"knowledge_{context}"
            yield _field(f"{name}_{context}", told, "uncertainty", unit, probe, name)
    for context in CONTEXTS:
        told, probe = f"length of answers, {SHORT[context]}", f"knowledge_{context}"
        yield _field(f"tokens_{context}", told, "length", "tokens", probe, "tokens")


QUANTITIES: tuple[Quantity, ...] = tuple(_all())
"""Every quantity of a report; those that nothing was measured for are left out of it."""
