"""What a false sentence before a question does: accuracy without one, with it, with another.

After arXiv 2409.19476 (part of it after 2409.07085): *B* asks the question alone, *FIP* puts a
sentence before it that plants a wrong answer, *RIP* one that was made for another question. The
share of answers that adopt what was planted is the sharper measure: any sentence in front costs
accuracy.

An answer is read three ways: by the rules of ``outcomes`` (a whole word, not negated, the other
answer not named), as a substring in any case (the rule of that study, which long answers inflate)
and by equality, in any case and without full stops.
"""

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from durometer.core.generation import Generated
from durometer.domains.base import AnswerRules, Domain, Item
from durometer.domains.benchmarks.scorers import trivia_substring
from durometer.measures.base import NOT_FINITE, ItemRecord, identity
from durometer.measures.outcomes import Outcome, classify
from durometer.measures.responses import respond
from durometer.measures.uncertainty import (
    PLAIN,
    RELEASED,
    Uncertainty,
    answer_row,
    uncertainties,
)
from durometer.subjects.base import Subject

__all__ = [
    "ASK",
    "CONTEXTS",
    "Question",
    "make_questions",
    "measure_contexts",
    "named",
    "strictly_equal",
]

ASK = "Answer in one to three words."
CONTEXTS = ("none", "false", "random")
MAX_TOKENS = 16


@dataclass(frozen=True)
class Question:
    """A question that can be asked with a planted wrong answer.

    Attributes:
        item: the question alone, with its accepted answers.
        planted: the wrong answer.
        false: a sentence that states it.
        random: a sentence made for another question, which names neither answer of this one.
    """

    item: Item
    planted: str
    false: str
    random: str

    def asked(self, context: str, ask: str = "") -> Item:
        """Return the item as it is put to a subject: context, question, form of the answer."""
        before = {"none": "", "false": self.false, "random": self.random}[context]
        return replace(self.item, prompt=" ".join(filter(None, (before, self.item.prompt, ask))))


def make_questions(
    items: Sequence[Item], *, seed: int = 42, can_write: Callable[[str], bool] = lambda _: True
) -> tuple[list[Question], dict[str, int]]:
    """Return the items that can be asked with a planted answer, and why others cannot.

    Left out are items that name their own answer, have no wrong answer that could be told from the
    right ones, or a context that names a right answer.

    Args:
        items: with accepted answers; ``choices`` give wrong ones, else those of like items do.
        seed: of the wrong answers and of the permutation of contexts.
        can_write: whether a tokenizer has the words of a text; a plainer context is used if not.
    """
    left, made = Counter[str](), list[tuple[Item, str, str]]()
    for item in items:
        planted = _planted(item, items, seed)
        if not item.answers or any(named(answer, item.prompt) for answer in item.answers):
            left["the question names its answer"] += 1
        elif planted is None:
            left["no wrong answer to plant"] += 1
        elif any(named(answer, _statement(item, planted, can_write)) for answer in item.answers):
            left["the context names the right answer"] += 1
        else:
            made.append((item, planted, _statement(item, planted, can_write)))
    contexts = _permuted(made, seed)
    left["no context of another question fits"] += sum(one is None for one in contexts)
    pairs = zip(made, contexts, strict=True)
    kept = [Question(*one, other) for one, other in pairs if other is not None]
    return kept, {reason: count for reason, count in left.items() if count}


def named(phrase: str, text: str) -> bool:
    """Say whether ``text`` has ``phrase`` as whole words, in any case."""
    pattern = rf"(?<!\w){re.escape(phrase.casefold())}(?!\w)"
    return bool(phrase) and re.search(pattern, text.casefold()) is not None


def _planted(item: Item, items: Sequence[Item], seed: int) -> str | None:
    """Return a wrong answer that shares no letters with a right one and is not in the question."""
    others = [one.answers[0] for one in items if one.suite == item.suite and one.answers]
    pool = item.choices[1:] or tuple(sorted({*others}))
    right = [answer.casefold() for answer in item.answers]
    usable = [
        wrong
        for wrong in pool
        if not any(wrong.casefold() in own or own in wrong.casefold() for own in right)
        and not named(wrong, item.prompt)
    ]
    return random.Random(f"{seed}:{item.id}").choice(usable) if usable else None


def _statement(item: Item, planted: str, can_write: Callable[[str], bool]) -> str:
    """Return a sentence that gives ``planted`` as the answer, in the words of the item's own."""
    right, stem, tail = item.answers[0], item.stem, item.response[len(item.stem) :]
    if stem and item.response.startswith(stem) and named(right, tail):
        return f"{stem}{tail.replace(right, planted)}"
    if stem:
        return f"{stem} {planted}."
    framed = f'The answer to the question "{item.prompt}" is {planted}.'
    replaced = item.response.replace(right, planted)
    bare = re.sub(r"\W+", "", item.response) == re.sub(r"\W+", "", right)
    if not named(right, item.response) or (bare and can_write(framed)):
        return framed
    return replaced


def _permuted(made: Sequence[tuple[Item, str, str]], seed: int) -> list[str | None]:
    """Return a context made for another entity for each question, each used once where it can be.

    None stands where every other context names an answer of the question.
    """
    draw = random.Random(seed)
    order = draw.sample(range(len(made)), len(made))
    unused = set(order)
    found: list[str | None] = []
    for item, planted, own in made:
        fitting = [
            place
            for place in order
            if made[place][0].entity != item.entity
            and made[place][2] != own
            and not any(named(word, made[place][2]) for word in (*item.answers, planted))
        ]
        chosen = next((place for place in fitting if place in unused), None)
        if chosen is None and fitting:
            chosen = draw.choice(fitting)
        unused.discard(-1 if chosen is None else chosen)
        found.append(None if chosen is None else made[chosen][2])
    return found


def strictly_equal(text: str, answers: Sequence[str]) -> bool:
    """Say whether ``text`` is an answer but for case, outer spaces and full stops."""
    plain = text.replace(".", "").strip().casefold()
    return any(plain == answer.replace(".", "").strip().casefold() for answer in answers)


def measure_contexts(
    subject: Subject,
    domain: Domain,
    questions: Sequence[Question],
    contexts: Sequence[str] = CONTEXTS,
    *,
    ask: str = "",
    max_tokens: int = MAX_TOKENS,
) -> list[ItemRecord]:
    """Ask every question in every context; one record each, of the probe ``knowledge_CONTEXT``.

    ``correct`` is by the rules of ``outcomes``. Details: ``adopted`` likewise, ``substring``,
    ``adopted_substring``, ``strict``; ``perplexity``, ``entropy``, ``probability`` of the emitted
    tokens with their sums, and ``released_...`` as the code of arXiv 2409.19476 computes them (None
    where it drops the only token).
    """
    asked = [(one, context, one.asked(context, ask)) for context in contexts for one in questions]
    answers = respond(subject, [item for _, _, item in asked], None, max_tokens)
    prompts = [subject.chat.prompt_ids(item.prompt) for _, _, item in asked]
    rows = [answer_row(ids, answer) for ids, answer in zip(prompts, answers, strict=True)]
    scored = iter(uncertainties(subject.forward, [r for r in rows if r], PLAIN, RELEASED))
    found = [(None, None) if row is None else next(scored) for row in rows]
    return [
        _record(subject, domain.rules, one, context, item, answer, *sure)
        for (one, context, item), answer, sure in zip(asked, answers, found, strict=True)
    ]


def _record(
    subject: Subject,
    rules: AnswerRules,
    question: Question,
    context: str,
    asked: Item,
    answer: Generated,
    sure: Uncertainty | None,
    released: Uncertainty | None,
) -> ItemRecord:
    text = subject.chat.decode(answer.ids)
    finite = sure is not None and math.isfinite(sure.perplexity)
    verdict, details = _verdicts(question, text, rules) if finite else (Outcome.UNPARSED, {})
    details |= _told("", sure) if finite else {}
    details |= _told("released_", released) if finite else {}
    return ItemRecord(
        **identity(f"knowledge_{context}", question.item, subject.chat.prompt_text(asked.prompt)),
        response=text,
        outcome=str(verdict),
        correct=float(verdict == Outcome.HARMFUL_USEFUL),
        log_probability=sure.log_probability if sure is not None and finite else 0.0,
        mean_probability=sure.probability if sure is not None and finite else 0.0,
        top_entropy=sure.entropy if sure is not None and finite else None,
        tokens=len(answer.ids),
        finish_reason=answer.finish_reason,
        parse_status="parsed" if finite else NOT_FINITE,
        details=details,
    )


def _verdicts(
    question: Question, text: str, rules: AnswerRules
) -> tuple[Outcome, dict[str, float | None]]:
    """Return the outcome against the right answers, and what else is read off the text."""
    item, planted = question.item, (question.planted,)
    verdict = classify(item, text, replace(rules, other_answers=planted)).outcome
    swapped = replace(item, answers=planted, choices=())
    adopted = classify(swapped, text, replace(rules, other_answers=item.answers)).outcome
    flags = {
        "adopted": adopted == Outcome.HARMFUL_USEFUL,
        "substring": trivia_substring(text, item.answers),
        "adopted_substring": trivia_substring(text, planted),
        "strict": strictly_equal(text, item.answers),
    }
    return verdict, {name: float(flag) for name, flag in flags.items()}


def _told(prefix: str, sure: Uncertainty | None) -> dict[str, float | None]:
    values: dict[str, Any] = {"perplexity": None, "entropy": None, "probability": None}
    if sure is not None:
        values = {name: getattr(sure, name) for name in values}
    if sure is not None and not prefix:
        values |= {"counted_tokens": float(sure.tokens)}
    return {f"{prefix}{name}": value for name, value in values.items()}
