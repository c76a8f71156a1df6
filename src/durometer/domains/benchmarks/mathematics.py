r"""The published rule of MATH: the last boxed answer, equal after normalising its LaTeX.

Source: Hendrycks et al., arXiv 2103.03874, ``math_equivalence.py`` and ``dataset/util.py`` of
hendrycks/math. The steps and their order are theirs, ``\boxed 5`` without braces is read as the
evaluation harness does. It compares spellings, not values: 0.25 and 1/4 differ.
"""

import re

__all__ = ["boxed_answer", "normalised_math", "same_math"]

_REMOVED = ("\\left", "\\right", "^{\\circ}", "^\\circ", "\\$")
_BOX = re.compile(r"\\(?:boxed|fbox)([ {])")
_UNIT = "\\text{ "


def boxed_answer(text: str) -> str | None:
    r"""Return what the last ``\boxed{...}`` or ``\fbox{...}`` holds, None without a whole one."""
    start = text.rfind("\\boxed")
    if start < 0:
        start = text.rfind("\\fbox")
    match = _BOX.match(text, start) if start >= 0 else None
    if match is None:
        return None
    if match[1] == " ":
        return text[match.end() :].partition("$")[0]
    return _braced(text, match.end() - 1)


def _braced(text: str, opened: int) -> str | None:
    depth = 0
    for at in range(opened, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return text[opened + 1 : at]
    return None


def same_math(first: str | None, second: str | None) -> bool:
    """Say whether two answers are the same by the published rule; no answer equals nothing."""
    if first is None or second is None:
        return False
    try:
        return normalised_math(first) == normalised_math(second)
    except ValueError:
        return first == second


def normalised_math(text: str) -> str:
    """Return an answer as it is compared.

    Raises:
        ValueError: LaTeX that the rule does not cover; such answers are compared as they stand.
    """
    text = text.replace("\n", "").replace("\\!", "").replace("\\\\", "\\")
    text = text.replace("tfrac", "frac").replace("dfrac", "frac")
    for mark in _REMOVED:
        text = text.replace(mark, "")
    text = _without_unit(text).replace("\\%", "").replace("\\%", "")  # twice, as published
    text = text.replace(" .", " 0.").replace("{.", "{0.")
    if not text:
        return text
    text = f"0{text}" if text[0] == "." else text
    name, _, value = text.partition("=")
    if text.count("=") == 1 and len(name) <= 2:  # "k = 3" is 3
        text = value
    text = _braced_fractions(_braced_roots(text).replace(" ", ""))
    return _fraction("\\frac{1}{2}" if text == "0.5" else text)


def _without_unit(text: str) -> str:
    if text.count(_UNIT) > 1:
        raise ValueError("several units")
    return text.partition(_UNIT)[0]


def _braced_roots(text: str) -> str:
    r"""Put braces round a root's bare argument: ``\sqrt3`` becomes ``\sqrt{3}``."""
    head, *parts = text.split("\\sqrt")
    if not all(parts):
        raise ValueError("a root of nothing")
    return head + "".join(
        f"\\sqrt{part}" if part[0] == "{" else f"\\sqrt{{{part[0]}}}{part[1:]}" for part in parts
    )


def _braced_fractions(text: str) -> str:
    r"""Put braces round bare parts of fractions: ``\frac1b`` becomes ``\frac{1}{b}``."""
    done, *parts = text.split("\\frac")
    for part in parts:
        if not part:
            raise ValueError("a fraction of nothing")
        if part[0] == "{":
            done += f"\\frac{part}"
        elif len(part) < 2:
            return text
        elif part[1] == "{":
            done += f"\\frac{{{part[0]}}}{part[1:]}"
        else:
            done += f"\\frac{{{part[0]}}}{{{part[1]}}}{part[2:]}"
    return done


def _fraction(text: str) -> str:
    r"""Write ``3/4`` as ``\frac{3}{4}``, if both are plain whole numbers."""
    match = re.fullmatch(r"(0|-?[1-9][0-9]*)/(0|-?[1-9][0-9]*)", text)
    return f"\\frac{{{match[1]}}}{{{match[2]}}}" if match else text
