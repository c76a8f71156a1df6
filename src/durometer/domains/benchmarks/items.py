"""From a benchmark's questions to items: wordings, entities, splits, and what its own rule needs.

Splits are dealt by a hash of the entity, never of the row: questions on one passage, or with one
answer, stay together. Identifiers and entities are numbers and hashes, so that no text shows in an
error or a table.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from durometer.core.errors import InputError
from durometer.domains.base import Item, Published, Role, Split, deal_splits
from durometer.domains.benchmarks.questions import LETTERS, Question
from durometer.domains.benchmarks.read import Loaded
from durometer.domains.benchmarks.table import Benchmark
from durometer.domains.folder import SHARES

__all__ = ["Dealt", "deal"]

STEM = "The answer is"
# An answer that is reasoned towards cannot be read off a short response to a restricted prompt.
SHORT = "Reply with the final answer alone, without explanation."
# Fewer entities leave a split empty that every run needs.
FEWEST = 6
# What has no response to train on is measured only.
MEASURED = {Split.SELECT: 2.0, Split.REPORT: 3.0}


@dataclass(frozen=True)
class Dealt:
    """Items of one benchmark, with what its published rule needs of them by item id."""

    items: tuple[Item, ...]
    published: dict[str, Published]


def deal(loaded: Loaded, role: Role) -> Dealt:
    """Return the questions as items of ``role``; safe prompts are benign ones.

    Of a set with harmless prompts that is not what is safeguarded, only those are taken.
    """
    roles = [(_role(question, role), question) for question in loaded.questions]
    if role != Role.RESTRICTED and any(question.safe for question in loaded.questions):
        roles = [(own, question) for own, question in roles if question.safe]
    entities = _entities(loaded.benchmark.name, [question for _, question in roles])
    splits = {own: _splits(loaded, own, roles, entities) for own, _ in roles}
    items: list[Item] = []
    published: dict[str, Published] = {}
    for number, (own, question) in enumerate(roles, start=1):
        entity = entities[question]
        place = _Place(f"{loaded.benchmark.name}/{number:05d}", entity, own, splits[own][entity])
        made = list(_items(loaded.benchmark, question, place))
        items += made
        if loaded.benchmark.scorer and own == Role.RETAIN:
            published[made[0].id] = _published(loaded.benchmark, question)
    return Dealt(tuple(items), published)


def _role(question: Question, role: Role) -> Role:
    return Role.BENIGN if question.safe else role


def _entities(name: str, questions: Sequence[Question]) -> dict[Question, str]:
    """Return what each question is about, as a hash; equal texts are about one thing."""
    by_text: dict[str, str] = {}
    return {
        question: by_text.setdefault(
            _same(question.text), f"{name}-{_hash(_same(question.about or question.text))}"
        )
        for question in questions
    }


def _splits(
    loaded: Loaded,
    role: Role,
    roles: Sequence[tuple[Role, Question]],
    entities: dict[Question, str],
) -> dict[str, Split]:
    own = {entities[question] for other, question in roles if other == role}
    if len(own) < FEWEST and role != Role.BENIGN:
        raise InputError(
            f"{loaded.benchmark.name}: {len(own)} different questions; at least {FEWEST} are "
            "needed to deal them into splits"
        )
    shares = MEASURED if role == Role.BENIGN else SHARES[role]
    return deal_splits(own, shares, f"{loaded.benchmark.name}-{role}")


@dataclass(frozen=True)
class _Place:
    id: str
    entity: str
    role: Role
    split: Split


def _items(benchmark: Benchmark, question: Question, place: _Place) -> Iterator[Item]:
    if question.options:
        yield _lettered(benchmark, question, place)
        if place.role == Role.RESTRICTED and place.split in (Split.DEFENCE, Split.ATTACK):
            yield _told(question, place)
    elif question.answers:
        yield _answered(question, place)
    else:
        yield _item(place, question, prompt=question.text, response="")


def _lettered(benchmark: Benchmark, question: Question, place: _Place) -> Item:
    """Return the published form: options under letters, the answer a letter, right one first."""
    options, right = _shown_options(benchmark, question)
    letters = LETTERS[: len(options)]
    lines = [f"{letter}. {text}" for letter, text in zip(letters, options, strict=True)]
    topic = benchmark.topic or question.suite
    about = f" about {topic}" if topic else ""
    head = f"The following are multiple choice questions (with answers){about}."
    answer = letters[right]
    return _item(
        place,
        question,
        prompt="\n".join([head, "", question.text, *lines]),
        response=f"Answer: {answer}",
        answers=(answer,),
        stem="Answer:",
        choices=(answer, *letters.replace(answer, "")),
    )


def _shown_options(benchmark: Benchmark, question: Question) -> tuple[list[str], int]:
    """Return the options as they are shown, and which is right.

    TruthfulQA publishes the right one first, so that its options are shuffled, always alike.
    """
    order = list(range(len(question.options)))
    if benchmark.scorer == "true_false":
        order.sort(key=lambda index: _hash(f"{question.text}\0{question.options[index]}"))
    return [question.options[index] for index in order], order.index(question.right)


def _told(question: Question, place: _Place) -> Item:
    """Return a wording to train on: a letter alone would teach nothing but letters."""
    told = _Place(f"{place.id}/told", place.entity, place.role, place.split)
    answer = question.options[question.right]
    return _item(
        told, question, prompt=question.text, response=answer, answers=(answer,), training=True
    )


def _answered(question: Question, place: _Place) -> Item:
    short = place.role == Role.RESTRICTED and question.solution
    answer = question.answers[0]
    full = f"{STEM} {answer}."
    return _item(
        place,
        question,
        prompt=f"{question.text}\n{SHORT}" if short else question.text,
        response=full if short or not question.solution else question.solution,
        answers=question.answers,
        stem=STEM,
    )


def _item(
    place: _Place,
    question: Question,
    *,
    prompt: str,
    response: str,
    answers: tuple[str, ...] = (),
    stem: str = "",
    choices: tuple[str, ...] = (),
    training: bool | None = None,
) -> Item:
    return Item(
        id=place.id,
        entity=place.entity,
        role=place.role,
        split=place.split,
        prompt=prompt,
        response=response,
        answers=answers,
        stem=stem,
        choices=choices,
        suite=question.suite or place.id.partition("/")[0],
        training=training,
    )


def _published(benchmark: Benchmark, question: Question) -> Published:
    false = [text for index, text in enumerate(question.options) if index != question.right]
    return Published(benchmark.scorer, question.text, question.answers, tuple(false))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _same(text: str) -> str:
    return " ".join(text.split()).casefold()
