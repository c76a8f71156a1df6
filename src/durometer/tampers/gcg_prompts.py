"""Where a suffix stands in a rendered conversation, and which suffixes survive as plain text.

What is optimised are token ids, what an attacker can send is text. So a suffix counts only if the
one rendered string that holds it is tokenised to exactly the ids that were optimised.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from durometer.core.errors import DurometerError
from durometer.core.rows import Row
from durometer.subjects.chat import ChatFormat

Suffix = tuple[int, ...]
_MARK = "\u2402suffix\u2402"
# Tokens before the suffix that it is decoded with: whether a space is shown depends on them.
CONTEXT = 8
# A token is tried behind this text as well as alone: some pieces never begin a text.
ANCHOR = "!"
# Stand-ins that show where the suffix begins and ends when the initial text cannot.
PLACEHOLDERS = (" x", " word")
DRAWS = 64


@dataclass(frozen=True)
class SuffixPrompt:
    """One item's conversation with a gap for the suffix.

    Attributes:
        item_id, prompt, response: what is asked, and the target: how the response shall begin.
        head, tail: rendered text before and after the suffix, the target included.
        before, after: token ids between which the suffix stands; the target is not in ``after``.
        target: token ids of the target.
    """

    item_id: str
    prompt: str
    response: str
    head: str
    tail: str
    before: Suffix
    after: Suffix
    target: Suffix

    def ids(self, suffix: Suffix) -> Suffix:
        """Return the whole sequence with ``suffix`` in the gap."""
        return (*self.before, *suffix, *self.after, *self.target)


def row_with(chat: ChatFormat, prompt: str, response: str, text: str) -> Row:
    """Return prompt, suffix ``text`` and target as the subject's tokenizer sees them."""
    return replace(chat, suffix=text).row(prompt, response, ended=False)


def place(
    chat: ChatFormat, item_id: str, prompt: str, response: str, text: str
) -> tuple[SuffixPrompt, Suffix]:
    """Find the gap by the character offsets of ``text``; return it with the ids of ``text``.

    Raises:
        DurometerError: the template, or the tokenizer, shows no trace of a suffix.
    """
    marked = replace(chat, suffix=_MARK).prompt_text(prompt)
    if _MARK not in marked:
        raise DurometerError(f"item '{item_id}': the chat template shows no suffix")
    head, _, tail = marked.partition(_MARK)
    target = chat._joined(response)
    row = row_with(chat, prompt, response, text)
    encoded = chat._encode(replace(chat, suffix=text).prompt_text(prompt) + target)
    inside = [
        index
        for index, (start, end) in enumerate(encoded["offset_mapping"])
        if end > max(start, len(head)) and start < len(head) + len(text)
    ]
    if not inside:
        raise DurometerError(f"item '{item_id}': no token stands for the suffix {text!r}")
    first, end = inside[0], inside[-1] + 1
    parts = (row.ids[:first], row.ids[end : row.first_label], row.labels)
    return SuffixPrompt(item_id, prompt, response, head, tail + target, *parts), row.ids[first:end]


class SuffixTokens:
    """The tokens that a suffix may be made of, and the test whether one survives as text.

    Args:
        chat: the subject's format, with its tokenizer.
        vocabulary: rows of the model's embedding table.
        ascii_only: whether only printable ASCII is allowed.
    """

    def __init__(self, chat: ChatFormat, vocabulary: int, *, ascii_only: bool) -> None:
        self._chat = chat
        self._tokenizer: Any = chat.tokenizer
        self.allowed = self._table(vocabulary, ascii_only)

    def text(self, prompt: SuffixPrompt, suffix: Suffix) -> str | None:
        """Return the text of ``suffix`` where it stands; None if it has none of its own."""
        return self.texts(prompt, [suffix])[0]

    def texts(self, prompt: SuffixPrompt, suffixes: Sequence[Suffix]) -> list[str | None]:
        """Return the texts of suffixes, each with the space with which it joins the prompt."""
        context = prompt.before[-CONTEXT:]
        head, *whole = self._decoded([context, *((*context, *suffix) for suffix in suffixes)])
        return [text[len(head) :] if text.startswith(head) else None for text in whole]

    def surviving(
        self, prompts: Sequence[SuffixPrompt], suffixes: Sequence[Suffix]
    ) -> list[tuple[Suffix, str]]:
        """Return those suffixes, with their texts, that every rendered prompt gives back."""
        texts = self.texts(prompts[0], suffixes)
        left = [(s, text) for s, text in zip(suffixes, texts, strict=True) if text]
        for prompt in prompts:
            if not left:
                break
            strings = [prompt.head + text + prompt.tail for _, text in left]
            special = self._chat.template != "own"
            ids = self._tokenizer(strings, add_special_tokens=special)["input_ids"]
            left = [
                entry
                for entry, own in zip(left, ids, strict=True)
                if self._same(own, prompt.ids(entry[0]))
            ]
        return left

    def faithful(self, prompts: Sequence[SuffixPrompt], suffix: Suffix, text: str) -> bool:
        """Render every prompt anew with ``text`` and say whether the ids are those optimised."""
        rows = (row_with(self._chat, p.prompt, p.response, text) for p in prompts)
        return all(row.ids == p.ids(suffix) for row, p in zip(rows, prompts, strict=True))

    def random(
        self, prompts: Sequence[SuffixPrompt], count: int, generator: torch.Generator
    ) -> tuple[Suffix, str] | None:
        """Return a random suffix of ``count`` allowed tokens that survives; None if none does.

        It grows token by token, since few long random strings survive as a whole.
        """
        pool = self.allowed.nonzero()[:, 0]
        if not len(pool):
            return None
        suffix: Suffix = ()
        text = ""
        for _ in range(count):
            picks = torch.randint(len(pool), (DRAWS,), generator=generator)
            left = self.surviving(prompts, [(*suffix, token) for token in pool[picks].tolist()])
            chosen = next((e for e in left if self.faithful(prompts, *e)), None)
            if chosen is None:
                return None
            suffix, text = chosen
        return suffix, text

    def _same(self, ids: Sequence[int], expected: Suffix) -> bool:
        if len(ids) == len(expected) + 1 and ids[-1] == self._tokenizer.eos_token_id:
            ids = ids[:-1]  # some tokenizers end every text, see ChatFormat
        return tuple(ids) == expected

    def _decoded(self, sequences: Sequence[Sequence[int]]) -> list[str]:
        decoded = self._tokenizer.batch_decode(
            [list(ids) for ids in sequences], clean_up_tokenization_spaces=False
        )
        return list(decoded)

    def _given_back(self, context: list[int], texts: dict[int, str]) -> set[int]:
        """Return the tokens whose text, decoded behind ``context``, is encoded to the same ids."""
        if not texts:
            return set()
        back = self._tokenizer(list(texts.values()), add_special_tokens=False)["input_ids"]
        return {i for i, own in zip(texts, back, strict=True) if own == [*context, i]}

    def _table(self, vocabulary: int, ascii_only: bool) -> torch.Tensor:
        """Return which ids are allowed, shape [vocabulary], bool: no special one, none unstable."""
        tokenizer = self._tokenizer
        special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", ())}
        ids = [i for i in range(min(vocabulary, len(tokenizer))) if i not in special]
        anchor = tokenizer(ANCHOR, add_special_tokens=False)["input_ids"]
        texts = dict(zip(ids, self._decoded([[i] for i in ids]), strict=True))
        stable = self._given_back([], texts)
        if not set(anchor) & special:
            left = [i for i in ids if i not in stable]
            whole = self._decoded([[*anchor, i] for i in left])
            stable |= self._given_back(anchor, dict(zip(left, whole, strict=True)))
        allowed = torch.zeros(vocabulary, dtype=torch.bool)
        for token in stable:
            text = texts[token]
            plain = text.isascii() and text.isprintable()
            allowed[token] = bool(text.strip()) and (plain or not ascii_only)
        return allowed


@dataclass(frozen=True)
class Start:
    """A suffix to begin with, and the prompts that it stands in.

    Attributes:
        drawn: whether it was drawn at random, since the initial text gave none that survives.
    """

    prompts: list[SuffixPrompt]
    suffix: Suffix
    text: str
    drawn: bool


def begin(
    chat: ChatFormat,
    tokens: SuffixTokens,
    asked: Sequence[tuple[str, str, str]],
    *,
    count: int,
    initial: str,
    generator: torch.Generator,
) -> Start:
    """Return a first suffix of exactly ``count`` tokens that survives in every prompt.

    Args:
        asked: item id, prompt and target of each item.
        initial: text that is repeated; '' draws at random.

    Raises:
        DurometerError: no text of that many tokens survives.
    """
    for repeats in range(1, count + 1) if initial else ():
        text = f" {initial}" * repeats
        placed = [place(chat, *one, text) for one in asked]
        prompts, suffix = [prompt for prompt, _ in placed], placed[0][1]
        if len(suffix) >= count:
            usable = len(suffix) == count and bool(tokens.allowed[list(suffix)].all())
            if usable and tokens.surviving(prompts, [suffix]) == [(suffix, text)]:
                return Start(prompts, suffix, text, drawn=False)
            break
    for text in PLACEHOLDERS:
        prompts = [place(chat, *one, text)[0] for one in asked]
        drawn = tokens.random(prompts, count, generator)
        if drawn is not None:
            return Start(prompts, *drawn, drawn=True)
    raise DurometerError(
        f"no suffix of {count} tokens is read back by the tokenizer as it was written; "
        "try other suffix_tokens or ascii_only = false"
    )
