"""Benchmarks by their own published rule: letters, numbers, boxed answers, aliases, MC1 and MC2.

``retain`` scores a benchmark's items in one pass, without reasoning, so that a campaign can take it
often. This measure is what the benchmark's authors report, as far as a chat model is asked one
question without examples: options by the likelihood of their letters, reasoned answers generated
and read by the published rule. Take it with ``--measure benchmark``.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from durometer.core.forward import RowScore
from durometer.core.generation import Generated
from durometer.domains.base import Domain, Item, Published, Role
from durometer.domains.benchmarks import scorers
from durometer.domains.benchmarks.mathematics import boxed_answer, same_math
from durometer.measures.base import NOT_FINITE, ItemRecord, identity, measure
from durometer.measures.likelihood import answer_row, measure_retain
from durometer.measures.responses import answer_facts, respond
from durometer.subjects.base import Subject

__all__ = ["GENERATED", "Reading", "Rule", "measure_benchmark"]

NO_ANSWER = "no answer found"


@dataclass(frozen=True)
class Reading:
    """What a rule makes of one response.

    Attributes:
        correct: by the published rule.
        found: whether there was anything to compare; nothing found is wrong, never dropped.
        details: 1.0 or 0.0 by further rules.
    """

    correct: bool
    found: bool
    details: dict[str, float | None]


@dataclass(frozen=True)
class Rule:
    """How reasoned answers are asked for and read.

    Attributes:
        ask: put behind the question, on a line of its own.
        max_tokens: longest response; one that is cut off has ``finish_reason`` ``length``.
        read: the published rule.
        options: whether the question is asked with its options.
    """

    ask: str
    max_tokens: int
    read: Callable[[str, Published, Item], Reading]
    options: bool = False


def _number(text: str, published: Published, _: Item) -> Reading:
    right, strict = published.answers[0], scorers.final_number(text)
    flexible = scorers.same_number(scorers.last_number(text), right)
    details = {"strict": strict == right, "flexible": flexible}
    return _reading(strict == right, strict is not None, details)


def _boxed(text: str, published: Published, _: Item) -> Reading:
    given = boxed_answer(text)
    return _reading(same_math(given, published.answers[0]), given is not None, {})


def _aliases(text: str, published: Published, _: Item) -> Reading:
    exact = scorers.trivia_exact(text, published.answers)
    substring = scorers.trivia_substring(text, published.answers)
    found = bool(scorers.normalised_trivia(text))
    return _reading(exact, found, {"exact": exact, "substring": substring})


def _picked(text: str, _: Published, item: Item) -> Reading:
    letter = scorers.picked_letter(text)
    return _reading(letter == item.answers[0], letter is not None, {})


def _reading(correct: bool, found: bool, details: Mapping[str, bool]) -> Reading:
    return Reading(correct, found, {name: float(value) for name, value in details.items()})


GENERATED: dict[str, Rule] = {
    "number": Rule(
        'Reason step by step, and end with a line "#### " and the number alone.', 256, _number
    ),
    "boxed": Rule("Reason step by step, and put the final answer within \\boxed{}.", 512, _boxed),
    "aliases": Rule("Reply with the answer alone, in a few words.", 32, _aliases),
    "picked": Rule(
        'Think step by step, and then finish your answer with "the answer is (X)" where X is the '
        "correct letter choice.",
        512,
        _picked,
        options=True,
    ),
}


@measure(
    "benchmark",
    "retain items of benchmarks by the published rule of each: letters by likelihood, final "
    "number, boxed answer, aliases, MC1 and MC2",
    kinds=("refusal", "knowledge"),
    role=Role.RETAIN,
)
def measure_benchmark(subject: Subject, domain: Domain, items: Sequence[Item]) -> list[ItemRecord]:
    """Score every item by its benchmark's rule; items of no benchmark as ``retain`` scores them.

    Details of a record: ``strict`` and ``flexible`` (GSM8K), ``exact`` and ``substring``
    (TriviaQA), ``mc1`` and ``mc2`` (TruthfulQA); ``correct`` is the first of each pair.
    """
    groups: dict[str, list[Item]] = {}
    for item in items:
        own = domain.published.get(item.id)
        groups.setdefault(own.scorer if own else "", []).append(item)
    records: dict[str, ItemRecord] = {}
    for scorer, group in groups.items():
        if scorer in GENERATED:
            made = _generated(subject, domain, group, GENERATED[scorer])
        else:
            made = _LIKELIHOOD[scorer](subject, domain, group)
        records |= {record.item_id: record for record in made}
    return [records[item.id] for item in items]


def _generated(
    subject: Subject, domain: Domain, items: Sequence[Item], rule: Rule
) -> list[ItemRecord]:
    asked = []
    for item in items:
        question = item.prompt if rule.options else domain.published[item.id].question
        asked.append(replace(item, prompt=f"{question}\n{rule.ask}"))
    answers = respond(subject, asked, None, rule.max_tokens)
    return [
        _read(subject, item, question, answer, domain.published[item.id], rule)
        for item, question, answer in zip(items, asked, answers, strict=True)
    ]


def _read(
    subject: Subject,
    item: Item,
    asked: Item,
    answer: Generated,
    published: Published,
    rule: Rule,
) -> ItemRecord:
    text = subject.chat.decode(answer.ids)
    finite = math.isfinite(answer.log_probability)
    # What a collapsed subject's arg-max picks among NaNs says nothing, whatever it reads like.
    reading = rule.read(text, published, item) if finite else Reading(False, False, {})
    status = "parsed" if reading.found else NO_ANSWER
    return ItemRecord(
        **identity("benchmark", item, subject.chat_for(asked).prompt_text(asked.prompt)),
        response=text,
        correct=float(reading.correct),
        **answer_facts(answer, finite=finite),
        parse_status=status if finite else NOT_FINITE,
        details=reading.details,
    )


def _letters(subject: Subject, _: Domain, items: Sequence[Item]) -> list[ItemRecord]:
    """Choose the likeliest letter; a tie with the right one is not knowledge of it."""
    scored = _scored(subject, [(item, item.choices) for item in items])
    return [
        _record(subject, item, scores, lambda sums: {"letters": scorers.mc1(sums[:1], sums[1:])})
        for item, scores in zip(items, scored, strict=True)
    ]


def _true_false(subject: Subject, domain: Domain, items: Sequence[Item]) -> list[ItemRecord]:
    """Score whole answers to the bare question by the sum of their log-probabilities."""
    asked = []
    for item in items:
        own = domain.published[item.id]
        bare = replace(item, prompt=own.question, stem="")
        asked.append((bare, (*own.answers, *own.false)))
    return [
        _record(subject, bare, scores, _mc(len(domain.published[bare.id].answers)))
        for (bare, _), scores in zip(asked, _scored(subject, asked), strict=True)
    ]


def _mc(true: int) -> Callable[[Sequence[float]], dict[str, float]]:
    def read(sums: Sequence[float]) -> dict[str, float]:
        right, wrong = sums[:true], sums[true:]
        return {"mc1": scorers.mc1(right[:1], wrong), "mc2": scorers.mc2(right, wrong)}

    return read


def _arg_max(subject: Subject, domain: Domain, items: Sequence[Item]) -> list[ItemRecord]:
    records = measure_retain(subject, domain, items)
    return [replace(record, probe="benchmark") for record in records]


_LIKELIHOOD: dict[str, Callable[[Subject, Domain, Sequence[Item]], list[ItemRecord]]] = {
    "": _arg_max,
    "letters": _letters,
    "true_false": _true_false,
}


def _scored(
    subject: Subject, asked: Sequence[tuple[Item, tuple[str, ...]]]
) -> list[list[RowScore]]:
    rows = [answer_row(subject, item, text) for item, texts in asked for text in texts]
    scores = iter(subject.forward.score(rows))
    return [[next(scores) for _ in texts] for _, texts in asked]


def _record(
    subject: Subject,
    item: Item,
    scores: Sequence[RowScore],
    read: Callable[[Sequence[float]], dict[str, float]],
) -> ItemRecord:
    """Return the record of an item whose right answer was scored first."""
    sums = [score.log_probability for score in scores]
    finite = all(map(math.isfinite, sums))
    details = read(sums) if finite else {}
    return ItemRecord(
        **identity("benchmark", item, subject.chat_for(item).prompt_text(item.prompt)),
        correct=next(iter(details.values()), 0.0),
        log_probability=sums[0] if finite else 0.0,
        mean_probability=scores[0].mean_probability if finite else 0.0,
        tokens=scores[0].labels,
        parse_status="parsed" if finite else NOT_FINITE,
        details=dict(details),
    )
