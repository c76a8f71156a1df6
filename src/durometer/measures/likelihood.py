"""Teacher-forced measures: multiple choice by likelihood, retained knowledge, perplexity."""

import math
from collections.abc import Sequence

from durometer.core.forward import RowScore
from durometer.core.rows import Row
from durometer.domains.base import Domain, Item, Role
from durometer.measures.base import NOT_FINITE, ItemRecord, identity, measure
from durometer.measures.outcomes import Outcome
from durometer.subjects.base import Subject


def answer_row(subject: Subject, item: Item, answer: str, *, ended: bool = False) -> Row:
    """Return the row whose labels are ``answer`` after the prompt and the item's stem."""
    chat = subject.chat_for(item)
    if item.stem:
        return chat.row(
            item.prompt, f"{item.stem} {answer}", stem=item.stem, ended=ended, item_id=item.id
        )
    return chat.row(item.prompt, answer, ended=ended, item_id=item.id)


@measure(
    "choices",
    "multiple choice by the likelihood of each answer; success = the right one is likeliest",
    kinds=("knowledge",),
    role=Role.RESTRICTED,
)
def measure_choices(subject: Subject, domain: Domain, items: Sequence[Item]) -> list[ItemRecord]:
    """Score every choice of every item; the likeliest by mean log-probability a token is chosen.

    The mean, not the sum, since a sum favours short names.
    """
    usable = [item for item in items if len(item.choices) > 1]
    rows = [answer_row(subject, item, choice) for item in usable for choice in item.choices]
    scores = iter(subject.forward.score(rows))
    return [_choice(subject, item, [next(scores) for _ in item.choices]) for item in usable]


def _choice(subject: Subject, item: Item, scores: list[RowScore]) -> ItemRecord:
    means = [score.log_probability / score.labels for score in scores]
    finite = all(math.isfinite(mean) for mean in means)
    best = max(range(len(means)), key=means.__getitem__) if finite else -1
    # A tie with the right answer is not knowledge of it.
    right = best == 0 and means.count(means[0]) == 1
    outcome = Outcome.HARMFUL_USEFUL if right else Outcome.HARMFUL_USELESS
    return ItemRecord(
        **identity("choices", item, subject.chat_for(item).prompt_text(item.prompt)),
        response=item.choices[best] if finite else "",
        outcome=str(outcome if finite else Outcome.UNPARSED),
        correct=float(right),
        log_probability=scores[0].log_probability if finite else 0.0,
        mean_probability=scores[0].mean_probability if finite else 0.0,
        tokens=scores[0].labels,
        parse_status="parsed" if finite else NOT_FINITE,
    )


@measure(
    "retain",
    "retained knowledge: every token of the answer is the arg-max after the answer's stem",
    kinds=("refusal", "knowledge"),
    role=Role.RETAIN,
)
def measure_retain(subject: Subject, domain: Domain, items: Sequence[Item]) -> list[ItemRecord]:
    """Score every retain item in one teacher-forced pass; greedy decoding would give the same."""
    rows = [answer_row(subject, item, item.answers[0]) for item in items]
    return [
        _scored("retain", subject, item, score, correct=float(score.greedy))
        for item, score in zip(items, subject.forward.score(rows), strict=True)
    ]


@measure(
    "perplexity",
    "log-likelihood of good responses to harmless prompts, from which perplexity is computed",
    kinds=("refusal", "knowledge"),
    role=Role.BENIGN,
)
def measure_perplexity(subject: Subject, domain: Domain, items: Sequence[Item]) -> list[ItemRecord]:
    """Score the complete response of every item, the end of the turn included.

    Prompts of a benchmark that come without a response are left out.
    """
    items = [item for item in items if item.response]
    rows = [subject.chat.row(item.prompt, item.response, item_id=item.id) for item in items]
    return [
        _scored("perplexity", subject, item, score, correct=None)
        for item, score in zip(items, subject.forward.score(rows), strict=True)
    ]


def _scored(
    probe: str, subject: Subject, item: Item, score: RowScore, *, correct: float | None
) -> ItemRecord:
    finite = math.isfinite(score.log_probability)
    if correct is not None and not finite:
        correct = 0.0
    return ItemRecord(
        **identity(probe, item, subject.chat_for(item).prompt_text(item.prompt)),
        correct=correct,
        log_probability=score.log_probability if finite else 0.0,
        mean_probability=score.mean_probability if finite else 0.0,
        tokens=score.labels,
        parse_status="parsed" if finite else NOT_FINITE,
    )
