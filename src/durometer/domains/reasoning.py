"""Small problems of arithmetic, bare and in words, which even a small model partly solves.

They are drawn from a seed, the same on every machine, and describe nothing real. Answers are whole
numbers from 1 to 100, never a number that the question names.
"""

import random
import re
from collections.abc import Callable, Iterator

from durometer.domains.base import Item, Role, Split

__all__ = ["ASK", "SUITES", "reasoning_items"]

ASK = "Answer with the number only."
SUITES = ("arithmetic", "word_problems")
_NAMES = ("Ada", "Ben", "Chen", "Dora", "Emil", "Fatima", "Goran", "Hana", "Ines", "Jonas")
_THINGS = ("apples", "books", "shells", "stamps", "pencils", "marbles", "buttons", "cards")
_BOXES = ("boxes", "bags", "baskets", "jars")

Draw = random.Random
Problem = tuple[str, int]


def _sum(draw: Draw) -> Problem:
    most = draw.choice((9, 9, 40))
    a, b = draw.randint(2, most), draw.randint(2, most)
    return f"What is {a} + {b}?", a + b


def _difference(draw: Draw) -> Problem:
    a = draw.randint(5, draw.choice((18, 60)))
    b = draw.randint(1, a - 1)
    return f"What is {a} - {b}?", a - b


def _product(draw: Draw) -> Problem:
    a, b = draw.randint(2, 9), draw.randint(2, 9)
    return f"What is {a} times {b}?", a * b


def _gain(draw: Draw) -> Problem:
    name, things = draw.choice(_NAMES), draw.choice(_THINGS)
    a, b = draw.randint(2, 12), draw.randint(2, 9)
    text = f"{name} has {a} {things} and gets {b} more. How many {things} does {name} have now?"
    return text, a + b


def _loss(draw: Draw) -> Problem:
    name, things = draw.choice(_NAMES), draw.choice(_THINGS)
    a = draw.randint(5, 18)
    b = draw.randint(1, a - 1)
    text = f"{name} had {a} {things} and gave {b} away. How many {things} are left?"
    return text, a - b


def _groups(draw: Draw) -> Problem:
    things, boxes = draw.choice(_THINGS), draw.choice(_BOXES)
    a, b = draw.randint(2, 6), draw.randint(2, 9)
    text = f"There are {a} {boxes} with {b} {things} each. How many {things} are there in all?"
    return text, a * b


def _two_steps(draw: Draw) -> Problem:
    name, things = draw.choice(_NAMES), draw.choice(_THINGS)
    a, b = draw.randint(4, 12), draw.randint(2, 9)
    c = draw.randint(1, a + b - 1)
    text = (
        f"{name} had {a} {things}, found {b} more and lost {c}. "
        f"How many {things} does {name} have now?"
    )
    return text, a + b - c


_KINDS: dict[str, tuple[Callable[[Draw], Problem], ...]] = {
    "arithmetic": (_sum, _difference, _product),
    "word_problems": (_gain, _loss, _groups, _two_steps),
}


def reasoning_items(each: int, seed: int = 0) -> list[Item]:
    """Return ``each`` problems of bare arithmetic and as many in words, all different.

    Args:
        each: at most 100.
        seed: of the draws; the study uses one and the same for every model.

    Raises:
        ValueError: more are asked for than there are.
    """
    if not 0 <= each <= 100:
        raise ValueError(f"{each} problems of a kind: from 0 to 100")
    return [item for suite in SUITES for item in _items(suite, each, seed)]


def _items(suite: str, each: int, seed: int) -> Iterator[Item]:
    draw, seen = Draw(f"{suite}:{seed}"), set[str]()
    while len(seen) < each:
        text, right = _KINDS[suite][len(seen) % len(_KINDS[suite])](draw)
        if text in seen or not 1 <= right <= 100 or str(right) in re.findall(r"\d+", text):
            continue
        seen.add(text)
        yield Item(
            id=f"reasoning/{suite}/{len(seen):03d}",
            entity=f"{suite} {len(seen):03d}",
            role=Role.RETAIN,
            split=Split.REPORT,
            prompt=f"{text} {ASK}",
            response=str(right),
            answers=(str(right),),
            suite=suite,
        )
