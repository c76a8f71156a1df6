"""Keeping foreign text from being read as a judge's own markup.

A response that holds the token which ends the judge's turn, or a line that opens a section of its
prompt, can answer in the judge's place (HarmBench issue 91). Markup is broken by a space after its
first character, and lines that begin like a section are quoted; both are counted. Words cannot be
taken out: what plain words do to a judge is measured, see ``durometer judge-check``.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["CHAT_MARKUP", "Neutral", "fill", "neutralise"]

# Markup of common chat templates, for judges whose template is unknown.
CHAT_MARKUP = (
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "[INST]",
    "[/INST]",
    "<<SYS>>",
    "<</SYS>>",
    "<s>",
    "</s>",
    "<bos>",
    "<eos>",
)
_SLOT = re.compile(r"\{(prompt|behaviour|response|context)\}")
_QUOTE = "> "
# The beginning of the text or of a line, whatever character ended the one before.
_BEGIN = r"(?:\A|(?<=[\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]))"


@dataclass(frozen=True)
class Neutral:
    """Foreign text made harmless for one prompt format, and how often that was needed."""

    text: str
    changes: int


def neutralise(text: str, control: Iterable[str], marks: Iterable[str] = ()) -> Neutral:
    """Return ``text`` without markup of a judge.

    Args:
        control: markup that counts anywhere, in any case of letters.
        marks: beginnings of lines that open a section of the prompt.
    """
    changes = 0
    whole = _any_of(control)
    # A space put into one piece of markup can complete another that holds a space, so until none.
    while whole is not None and whole.search(text):
        text, count = whole.subn(lambda found: f"{found[0][0]} {found[0][1:]}", text)
        changes += count
    opening = _any_of(marks)
    if opening is not None:
        line = re.compile(rf"{_BEGIN}(?=[ \t]*(?:{opening.pattern}))", re.IGNORECASE)
        text, count = line.subn(_QUOTE, text)
        changes += count
    return Neutral(text, changes)


def _any_of(texts: Iterable[str]) -> re.Pattern[str] | None:
    """Return a pattern of the texts, longest first; a single character is no markup."""
    kept = sorted({text.strip() for text in texts if len(text.strip()) > 1}, key=len)
    if not kept:
        return None
    return re.compile("|".join(re.escape(text) for text in reversed(kept)), re.IGNORECASE)


def fill(template: str, values: dict[str, str]) -> str:
    """Return the template with its slots filled in one pass: a slot in a value stays text."""
    return _SLOT.sub(lambda slot: values[slot[1]], template)
