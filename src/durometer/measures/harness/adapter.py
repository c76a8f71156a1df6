"""A subject as a language model of lm-eval; imported only where lm-eval is installed.

Texts become ids as in the harness's own backend for transformers (``HFLM``), so that both score the
same tokens. What differs is how: see ``Forward.score`` and ``generate``.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
    resolve_max_length,
)

from durometer.core.errors import InputError
from durometer.core.forward import RowScore
from durometer.core.generation import GREEDY, Decoding, generate
from durometer.core.rows import Row
from durometer.subjects.base import Subject

MAX_GENERATED = 256
# Settings of a task's generation that are understood; another one would be ignored silently.
GENERATION = {"until", "do_sample", "temperature", "top_p", "max_gen_toks"}


class SubjectLM(TemplateLM):  # type: ignore[misc]
    """Answers the harness's requests with a subject in memory.

    Attributes:
        scores: of every pair of context and continuation that was asked for.
    """

    def __init__(self, subject: Subject) -> None:
        super().__init__()
        self.subject = subject
        self.tokenizer = subject.chat.tokenizer
        self.scores: dict[tuple[str, str], RowScore] = {}

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token that stands for an empty context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def max_length(self) -> int:
        """Tokens that the subject can read at most."""
        return int(resolve_max_length(self.subject.model.config, self.tokenizer))

    @property
    def tokenizer_name(self) -> str:
        """What tells one tokenizer from another."""
        return str(self.tokenizer.name_or_path)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Return the ids of a text, with what the tokenizer adds unless it is there already."""
        if add_special_tokens is None:
            begun = has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id))
            options = {"add_special_tokens": False} if begun else {}
        else:
            options = {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **options))

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return a conversation in the subject's own template."""
        text = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return str(text)

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """Return log-probability (nats) and whether greedy decoding gives it, a pair each."""
        return list(super().loglikelihood(requests, disable_tqdm=True))

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        rows = [self._row(context, continuation) for _, context, continuation in requests]
        found = self.subject.forward.score(rows)
        self.scores |= {texts: score for (texts, *_), score in zip(requests, found, strict=True)}
        return [(score.log_probability, score.greedy) for score in found]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = True
    ) -> list[float]:
        """Return the log-probability of whole texts, in windows of the subject's length."""
        windows = [self._windows(request.args[0]) for request in requests]
        scores = iter(self.subject.forward.score([row for rows in windows for row in rows]))
        sums = []
        for request, rows in zip(requests, windows, strict=True):
            own = [next(scores) for _ in rows]
            sums.append(sum(score.log_probability for score in own))
            labels = sum(score.labels for score in own)
            mean = sum(score.mean_probability * score.labels for score in own) / max(labels, 1)
            greedy = all(score.greedy for score in own)
            self.scores["", request.args[0]] = RowScore(sums[-1], mean, labels, greedy)
        return sums

    def _windows(self, text: str) -> list[Row]:
        parts: Iterable[tuple[list[int], list[int]]] = map(
            utils.make_disjoint_window,
            utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ),
        )
        return [self._row(context, continuation) for context, continuation in parts]

    def _row(self, context: list[int], continuation: list[int]) -> Row:
        """Return the row of a pair; what is too long loses its beginning."""
        ids = (context + continuation)[-(self.max_length + 1) :]
        first = len(ids) - len(continuation)
        if not 1 <= first < len(ids):
            raise InputError(
                "an answer of this lm-eval task has no token of its own, or more than the subject "
                f"reads ({len(continuation)} tokens, {self.max_length} at most)"
            )
        return Row(tuple(ids), first)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        """Return what the subject says to each context, up to the first text that ends it."""
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(index)
        told: dict[int, str] = {}
        for members in groups.values():
            contexts = [requests[index].args[0] for index in members]
            texts = self._generated(contexts, requests[members[0]].args[1])
            told |= dict(zip(members, texts, strict=True))
        return [told[index] for index in range(len(requests))]

    def _generated(self, contexts: Sequence[str], settings: dict[str, Any]) -> list[str]:
        wanted = normalize_gen_kwargs(settings, MAX_GENERATED)
        unknown = set(wanted) - GENERATION
        if unknown:
            raise InputError(f"lm-eval's generation setting '{min(unknown)}' is not supported")
        eos = self.tokenizer.decode(self.eot_token_id)
        until = handle_stop_sequences(list(wanted["until"]), eos=eos)
        room = self.max_length - wanted["max_gen_toks"]
        if room < 1:
            raise InputError(
                f"an lm-eval task generates {wanted['max_gen_toks']} tokens, and the subject reads "
                f"{self.max_length}"
            )

        def ended(_: int, ids: Sequence[int]) -> bool:
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            return any(stop and stop in text for stop in until)

        found = generate(
            self.subject.model,
            [tuple(self.tok_encode(context)[-room:]) for context in contexts],
            max_tokens=wanted["max_gen_toks"],
            stop_ids=frozenset({self.eot_token_id}),
            decided=ended,
            share_prefix=self.subject.tree,
            decoding=_decoding(wanted),
        )
        texts = [self.tokenizer.decode(one.ids, skip_special_tokens=True) for one in found]
        return [str(postprocess_generated_text(text, until, None)) for text in texts]


def _decoding(wanted: dict[str, Any]) -> Decoding:
    if not wanted.get("do_sample"):
        return GREEDY
    return Decoding(
        temperature=float(wanted.get("temperature", 1.0)), top_p=float(wanted.get("top_p", 1.0))
    )
