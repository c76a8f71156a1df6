"""Whether a problem with a number for an answer is solved: the last number of a free response."""

import math
from collections.abc import Sequence

from durometer.core.generation import Generated
from durometer.domains.base import Item
from durometer.domains.benchmarks.scorers import last_number, same_number
from durometer.measures.base import NOT_FINITE, ItemRecord, identity
from durometer.measures.responses import answer_facts, respond
from durometer.subjects.base import Subject

PROBE = "reasoning"
NO_NUMBER = "no number found"
MAX_TOKENS = 24


def measure_reasoning(
    subject: Subject, items: Sequence[Item], max_tokens: int = MAX_TOKENS
) -> list[ItemRecord]:
    """Generate an answer to every problem; one without a number is wrong and counted as such."""
    answers = respond(subject, items, None, max_tokens)
    return [_read(subject, item, answer) for item, answer in zip(items, answers, strict=True)]


def _read(subject: Subject, item: Item, answer: Generated) -> ItemRecord:
    text = subject.chat.decode(answer.ids)
    finite = math.isfinite(answer.log_probability)
    number = last_number(text) if finite else None
    status = "parsed" if number is not None else NO_NUMBER
    return ItemRecord(
        **identity(PROBE, item, subject.chat.prompt_text(item.prompt)),
        response=text,
        correct=float(same_number(number, item.answers[0])),
        **answer_facts(answer, finite=finite),
        parse_status=status if finite else NOT_FINITE,
    )
