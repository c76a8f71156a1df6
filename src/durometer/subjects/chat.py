"""One formatter for training and measuring, taken from the subject's own chat template.

A prompt and its response are rendered to one string and tokenised once; labels are found by
character offsets. Tokenising the parts apart gives ids that no user would send.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from durometer.core.errors import InputError
from durometer.core.rows import Row

TemplateName = Literal["own", "plain", "instruction"]
_LAYOUTS = {
    "plain": "Question: {prompt}\nAnswer:",
    "instruction": "### Instruction:\n{prompt}\n\n### Response:\n",
}
_MARK = "\u2402response\u2402"


@dataclass(frozen=True)
class ChatFormat:
    """How prompts become token ids for one subject.

    Attributes:
        tokenizer: the subject's tokenizer.
        template: ``own`` is the subject's chat template; the others are generic layouts.
        system: system prompt; None leaves it to the template, '' asks for none at all.
        end: text that ends a response, as the template has it.
        preamble, suffix: text put before and after every prompt, inside the user's turn.
        suffixes: text after single prompts, instead of ``suffix``.
        prefill: beginning of every response, put into the assistant's turn by the asker.
        prefills: beginnings of the responses to single prompts, instead of ``prefill``.
        bos: whether the ids begin with one beginning-of-sequence token; None leaves it to the
            template and the tokenizer.
    """

    tokenizer: Any
    template: TemplateName = "own"
    system: str | None = None
    end: str = ""
    preamble: str = ""
    suffix: str = ""
    suffixes: Mapping[str, str] = field(default_factory=dict, hash=False, repr=False)
    prefill: str = ""
    prefills: Mapping[str, str] = field(default_factory=dict, hash=False, repr=False)
    bos: bool | None = None

    @classmethod
    def of(cls, tokenizer: Any) -> "ChatFormat":
        """Return the format of a tokenizer: its chat template, or the plain layout without one."""
        own = bool(getattr(tokenizer, "chat_template", None))
        chat = cls(tokenizer, "own" if own else "plain")
        return replace(chat, end=chat._find_end())

    def using(self, template: TemplateName, system: str | None) -> "ChatFormat":
        """Return this format with another template or system prompt.

        Raises:
            InputError: ``own`` is asked for, but the tokenizer has no chat template.
        """
        has_own = bool(getattr(self.tokenizer, "chat_template", None))
        if template == "own" and not has_own:
            template = "plain"
        changed = replace(self, template=template, system=system)
        return replace(changed, end=changed._find_end())

    def prompt_text(self, prompt: str) -> str:
        """Return the rendered conversation up to the response, ``prefill`` included."""
        return self._opened(prompt) + self._joined(self._prefill(prompt))

    def _prefill(self, prompt: str) -> str:
        return self.prefills.get(prompt, self.prefill)

    def _opened(self, prompt: str) -> str:
        prompt = f"{self.preamble}{prompt}{self.suffixes.get(prompt, self.suffix)}"
        if self.template != "own":
            head = f"{self.system}\n\n" if self.system else ""
            return head + _LAYOUTS[self.template].format(prompt=prompt)
        return self._render(self._messages(prompt), add_generation_prompt=True)

    def prompt_ids(self, prompt: str, stem: str = "") -> tuple[int, ...]:
        """Return the token ids of prompt and beginning of the response."""
        return tuple(self._encode(self._begun(prompt, stem))["input_ids"])

    def _begun(self, prompt: str, stem: str) -> str:
        """Return the conversation up to the end of ``stem``, which may repeat the prefill."""
        prefill = self._prefill(prompt)
        if not prefill:
            return self._opened(prompt) + self._joined(stem)
        if stem.startswith(prefill):
            return self._opened(prompt) + self._joined(stem)
        return self.prompt_text(prompt) + (f" {stem}" if stem else "")

    def row(
        self,
        prompt: str,
        response: str,
        *,
        stem: str = "",
        ended: bool = True,
        label_prompt: bool = False,
        item_id: str = "",
        restricted: bool = False,
    ) -> Row:
        """Return one example whose labels are the response after ``stem``.

        Args:
            ended: whether the end of the turn is part of the labels.
            label_prompt: label the prompt as well (declared in the record of a tamper).

        Raises:
            InputError: the response leaves nothing to predict.
        """
        head = self._begun(prompt, stem)
        tail = response[len(stem) :] if stem else self._joined(response)
        if self._prefill(prompt) and not stem:
            tail = f" {response}"  # the template's own opening of a response is behind it already
        encoded = self._encode(head + tail + (self.end if ended else ""))
        ids = tuple(encoded["input_ids"])
        ends = [end for _, end in encoded["offset_mapping"]]
        first = next((i for i, end in enumerate(ends) if end > len(head)), len(ids))
        first = 1 if label_prompt else max(first, 1)
        if first >= len(ids):
            raise InputError(f"item '{item_id}': the response {response!r} has no token to predict")
        return Row(ids, first, item_id, restricted)

    def stop_ids(self, model_config: Any = None) -> frozenset[int]:
        """Return the token ids that end a response."""
        ids = set(self.tokenizer(self.end, add_special_tokens=False)["input_ids"][:1])
        declared = getattr(model_config, "eos_token_id", None)
        ids.update(declared if isinstance(declared, list) else [declared])
        ids.add(self.tokenizer.eos_token_id)
        return frozenset(token for token in ids if token is not None)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of generated ids, special tokens left out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    def _joined(self, text: str) -> str:
        if not text or self.template == "own":
            return text
        return text if self.template == "instruction" else f" {text}"

    def _messages(self, prompt: str) -> list[dict[str, str]]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, {"role": "user", "content": prompt}]

    def _render(self, messages: list[dict[str, str]], **options: Any) -> str:
        from jinja2 import TemplateError

        try:
            # transformers renders templates in jinja2's immutable sandbox.
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **options))
        except TemplateError as error:
            raise InputError(f"the chat template cannot be rendered: {error}") from error

    def _find_end(self) -> str:
        eos = str(self.tokenizer.eos_token or "\n")
        if self.template != "own":
            return eos
        text = self._render([*self._messages("x"), {"role": "assistant", "content": _MARK}])
        tail = text.rpartition(_MARK)[2]
        for token in sorted(self.tokenizer.all_special_tokens, key=len, reverse=True):
            if token in tail:
                return tail[: tail.index(token) + len(token)]
        return tail.rstrip("\n") + eos

    def _encode(self, text: str) -> Any:
        special = self.template != "own"
        encoded = self.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        start, end = encoded["offset_mapping"][-1]
        if special and start == end and encoded["input_ids"][-1] == self.tokenizer.eos_token_id:
            # Some tokenizers end every text; a token that stands for no text is theirs, not ours.
            for values in (encoded["input_ids"], encoded["offset_mapping"]):
                values.pop()
        return self._with_bos(encoded)

    def _with_bos(self, encoded: Any) -> Any:
        """Put one beginning-of-sequence token before the ids, or take it off, if that is asked."""
        bos, ids = getattr(self.tokenizer, "bos_token_id", None), encoded["input_ids"]
        if self.bos is None or bos is None or self.bos == (ids[:1] == [bos]):
            return encoded
        if self.bos:
            ids.insert(0, bos)
            encoded["offset_mapping"].insert(0, (0, 0))
        else:
            del ids[0], encoded["offset_mapping"][0]
        return encoded
