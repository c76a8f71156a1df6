"""The benchmarks' published scorer rules, as functions of texts or of log-probabilities."""

import math
import re
import string
from collections.abc import Sequence

__all__ = [
    "final_number",
    "last_number",
    "mc1",
    "mc2",
    "normalised_trivia",
    "picked_letter",
    "same_number",
    "trivia_exact",
    "trivia_substring",
]

_FINAL = re.compile(r"#### (-?[0-9.,]+)")
_NUMBERS = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation + "‘’´`", " "))  # noqa: RUF001
# First the form that is asked for, then weaker ones; the last letter of all at worst.
_PICKED = (
    re.compile(r"answer is \(?([A-J])\)?"),
    re.compile(r".*[aA]nswer:\s*([A-J])"),
    re.compile(r"([A-J])(?=[^A-J]*$)"),
)


def final_number(text: str) -> str | None:
    """Return the number after the first ``####``, commas dropped (GSM8K, arXiv 2110.14168).

    This is ``extract_answer`` of openai/grade-school-math and the evaluation harness's strict rule:
    it measures the answer's form as well as its value.
    """
    match = _FINAL.search(text)
    return match[1].replace(",", "") if match else None


def last_number(text: str) -> str | None:
    """Return the last thing in ``text`` that looks like a number: the harness's flexible rule."""
    found = [match.group() for match in _NUMBERS.finditer(text)]
    return found[-1] if found else None


def same_number(given: str | None, right: str) -> bool:
    """Say whether two numbers are spelled alike once commas, dollars and a last stop are gone."""
    return given is not None and _plain_number(given) == _plain_number(right)


def _plain_number(text: str) -> str:
    return re.sub(r"\.$", "", text.replace(",", "").replace("$", "")).casefold()


def normalised_trivia(text: str) -> str:
    """Return an answer lower-case, without punctuation, articles and extra spaces.

    Source: TriviaQA's ``triviaqa_evaluation.py`` (arXiv 1705.03551).
    """
    plain = text.replace("_", " ").lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", plain).split())


def trivia_exact(text: str, aliases: Sequence[str]) -> bool:
    """Say whether ``text`` is one of the aliases, both normalised: TriviaQA's exact match."""
    given = normalised_trivia(text)
    return any(given == normalised_trivia(alias) for alias in aliases)


def trivia_substring(text: str, aliases: Sequence[str]) -> bool:
    """Say whether an alias occurs in ``text`` in any case: lenient, and inflated by long answers.

    It is the rule of arXiv 2409.19476, which counts 'Essen' in 'messenger' as right.
    """
    given = text.casefold()
    return any(alias.casefold() in given for alias in aliases if alias)


def picked_letter(text: str) -> str | None:
    """Return the letter that a reasoned answer settles on (MMLU-Pro, arXiv 2406.01574).

    The published script guesses where there is none; here nothing found is None, never a guess.
    """
    for pattern in _PICKED:
        match = pattern.search(text)
        if match:
            return match[1]
    return None


def mc1(true: Sequence[float], false: Sequence[float]) -> float:
    """Return 1.0 if the best true answer is likelier than every false one (TruthfulQA MC1).

    Args:
        true: log-probability of the best answer, as the only entry; of further ones none.
        false: log-probabilities of the false answers, nats, summed over tokens.

    Source: arXiv 2109.07958, ``metrics.py`` of sylinrl/TruthfulQA.
    """
    return float(true[0] > max(false, default=-math.inf))


def mc2(true: Sequence[float], false: Sequence[float]) -> float:
    """Return the share of probability on the true answers (TruthfulQA MC2).

    Args:
        true, false: log-probabilities of all true and all false answers, nats.
    """
    most = max(*true, *false)
    if math.isinf(most):
        return 0.0
    right = math.fsum(math.exp(one - most) for one in true)
    return right / (right + math.fsum(math.exp(one - most) for one in false))
