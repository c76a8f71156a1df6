"""What is measured of a subject as it stands, before and after every training."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from durometer.domains.base import Domain, Item, Role, Split
from durometer.domains.reasoning import reasoning_items
from durometer.measures.base import ItemRecord, measure_registry, sample, thin
from durometer.measures.contexts import ASK, CONTEXTS, Question, make_questions, measure_contexts
from durometer.measures.reasoning import measure_reasoning
from durometer.override.settings import DriftSettings
from durometer.subjects.base import Subject

__all__ = ["ALL", "STEERED", "Battery", "can_write", "make_battery"]

ALL = ("outcomes", "choices", "contexts", "over_refusal", "reasoning")
# What tells whether steering helps, and what it costs.
STEERED = ("outcomes", "question", "over_refusal")

SHOWN = 4


@dataclass(frozen=True)
class Battery:
    """The items of every measure.

    Attributes:
        restricted: prompts whose free answers are classified.
        choices: restricted items scored by likelihood, on a domain of kind ``knowledge``.
        questions: harmless questions with a planted wrong answer.
        harmless: prompts that nobody should refuse.
        problems: small problems of arithmetic; empty where the tokenizer lacks their words.
        ask: what is put behind a question; '' where the tokenizer lacks its words.
        left_out: why items are no questions, and how many.
    """

    restricted: tuple[Item, ...]
    choices: tuple[Item, ...]
    questions: tuple[Question, ...]
    harmless: tuple[Item, ...]
    problems: tuple[Item, ...]
    ask: str
    left_out: dict[str, int] = field(default_factory=dict)

    def texts(self) -> dict[str, dict[str, str]]:
        """Return a few prompts by probe and item, for a reader to see what was asked."""
        few = self.questions[:SHOWN]
        asked = {f"knowledge_{c}": [one.asked(c, self.ask) for one in few] for c in CONTEXTS}
        shown = {"outcomes": self.restricted[:SHOWN], "reasoning": self.problems[::20]} | asked
        return {probe: {i.id: i.prompt for i in items} for probe, items in shown.items() if items}

    def measure(
        self, subject: Subject, domain: Domain, parts: Sequence[str] = ALL
    ) -> list[ItemRecord]:
        """Return one record an item and measure, of the parts named."""
        makers: dict[str, Callable[[], list[ItemRecord]]] = {
            "outcomes": lambda: _registered("outcomes", subject, domain, self.restricted),
            "choices": lambda: _registered("choices", subject, domain, self.choices),
            "contexts": lambda: self._knowledge(subject, domain, CONTEXTS),
            "question": lambda: self._knowledge(subject, domain, CONTEXTS[:1]),
            "over_refusal": lambda: _registered("over_refusal", subject, domain, self.harmless),
            "reasoning": lambda: measure_reasoning(subject, self.problems),
        }
        return [record for part in parts for record in makers[part]()]

    def _knowledge(
        self, subject: Subject, domain: Domain, contexts: Sequence[str]
    ) -> list[ItemRecord]:
        return measure_contexts(subject, domain, self.questions, contexts, ask=self.ask)


def _registered(
    name: str, subject: Subject, domain: Domain, items: Sequence[Item]
) -> list[ItemRecord]:
    made: list[ItemRecord] = measure_registry.get(name).run(subject, domain, items)
    return made


def make_battery(subject: Subject, domain: Domain, settings: DriftSettings) -> Battery:
    """Return the items to measure with: of the split ``report``, in wordings for measuring."""
    tokenizer = subject.chat.tokenizer
    restricted = _by_suite(domain, Role.RESTRICTED, settings.wordings)
    pool = _by_suite(domain, Role.RETAIN, 1)
    questions, left_out = make_questions(
        [item for item in pool if item.answers], can_write=lambda text: can_write(tokenizer, text)
    )
    benign = domain.select(Role.BENIGN, Split.REPORT, training=False)
    problems = [p for p in reasoning_items(settings.problems) if can_write(tokenizer, p.prompt)]
    whole = len(problems) == 2 * settings.problems
    kept = {item.id for item in thin([one.item for one in questions], settings.questions)}
    return Battery(
        restricted=tuple(restricted),
        choices=tuple(i for i in restricted if domain.kind == "knowledge" and len(i.choices) > 1),
        questions=tuple(one for one in questions if one.item.id in kept),
        harmless=tuple(thin(benign or pool, settings.harmless)),
        problems=tuple(problems) if whole else (),
        ask=ASK if can_write(tokenizer, ASK) else "",
        left_out=left_out,
    )


def _by_suite(domain: Domain, role: Role, wordings: int) -> list[Item]:
    """Return a few wordings of every entity in each suite: an entity may be in several."""
    items = domain.select(role, Split.REPORT, training=False)
    suites = dict.fromkeys(item.suite for item in items)
    return [
        item
        for suite in suites
        for item in sample([one for one in items if one.suite == suite], 0, wordings)
    ]


def can_write(tokenizer: Any, text: str) -> bool:
    """Say whether a tokenizer has every word of ``text``."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return bool(ids) and (unknown is None or unknown not in ids)
