"""Judges on this machine: any model folder, in left-padded greedy batches."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, cast

from durometer.core.errors import InputError
from durometer.core.settings import Settings, setting
from durometer.judges.base import Case, Device, JudgeDescription, JudgeVerdict, unparsed
from durometer.judges.neutral import fill, neutralise

if TYPE_CHECKING:
    from durometer.subjects.base import Subject
    from durometer.subjects.load import DtypeName

__all__ = ["LocalJudge", "LocalSettings", "build_local"]

LEAST_MASS = 0.25
"""Probability that the answers must hold together for a score without a written verdict."""


class LocalSettings(Settings):
    """Settings of a judge on this machine."""

    model: str = setting(
        "", "its weights: a folder, a hub id org/name@commit, BASE+ADAPTER, or hub for the pinned"
    )
    dtype: Literal["", "auto", "float32", "bfloat16", "float16"] = setting(
        "", "number format, part of what the judge is; '' is that of the subject"
    )
    device: str = setting("", "where it computes; '' is where the subject does")
    batch: int = setting(16, "cases at a time", ge=1)


def build_local(description: JudgeDescription, settings: Any, device: Device) -> "LocalJudge":
    """Load the weights that ``settings.model`` names.

    Raises:
        InputError: no weights are named, or they cannot be loaded.
    """
    from durometer.subjects.load import load_subject

    dtype = settings.dtype or device.dtype
    place = settings.device or device.device
    model = _model(description, settings.model)
    subject = load_subject(model, dtype=cast("DtypeName", dtype), device=place)
    return LocalJudge(description, subject, settings.batch)


def _model(description: JudgeDescription, named: str) -> str:
    name = description.name
    if not named:
        raise InputError(
            f"judge '{name}': say where its weights are: {name}:model=FOLDER, or model=hub to "
            f"fetch {description.pinned} (licence: {description.licence})"
        )
    if named != "hub":
        return named
    if description.base:
        raise InputError(
            f"judge '{name}': model=hub: {description.repo} is an adapter; fetch it, then name "
            f"{name}:model={description.base}@{description.base_revision}+FOLDER"
        )
    return description.pinned


@dataclass(frozen=True)
class _Filled:
    """A case as the judge is asked about it; ``problem`` says why it cannot be."""

    ids: tuple[int, ...]
    neutralised: int
    truncated: bool
    problem: str = ""


@dataclass(frozen=True)
class LocalJudge:
    """A judge whose weights are loaded.

    Attributes:
        neutral: whether markup in the case is neutralised; False only to measure what that is for.
        begin: whether the ids begin with the token that begins every text.
    """

    description: JudgeDescription
    subject: "Subject"
    batch: int = 16
    neutral: bool = True
    begin: bool = True

    def identity(self) -> dict[str, Any]:
        """Return what a verdict depends on beside the case."""
        source, pinned = self.subject.source, self.description
        expected = {pinned.revision, pinned.base_revision} - {""}
        return {
            "name": pinned.name,
            "kind": "local",
            "model": source.location,
            "revision": source.revision,
            "pinned": pinned.pinned,
            "is_pinned": source.kind == "hub" and source.revision in expected,
            "weights": self.subject.fingerprint[:16],
            "dtype": self.subject.dtype,
            "template_hash": pinned.template_hash,
            "judges": list(pinned.judges),
            "cannot_judge": pinned.cannot_judge,
            "neutralised": self.neutral,
            "begin": self.begin,
        }

    def asked_with(self, template: str) -> "LocalJudge":
        """Return the same judge with another prompt for cases without a context."""
        return replace(self, description=replace(self.description, template=template))

    def judge(self, cases: Sequence[Case]) -> Iterator[tuple[int, JudgeVerdict]]:
        """Yield one verdict a case, with the case's number."""
        filled = [self._fill(case) for case in cases]
        able = [number for number, one in enumerate(filled) if not one.problem]
        for number, one in enumerate(filled):
            if one.problem:
                yield number, self._finished(unparsed("", one.problem), one)
        asked = [filled[number].ids for number in able]
        answers, scores = self._answers(asked), self._scores(asked)
        for number, text, score in zip(able, answers, scores, strict=True):
            yield number, self._finished(self.description.parse(text, score), filled[number])

    def _finished(self, verdict: JudgeVerdict, filled: _Filled) -> JudgeVerdict:
        return replace(verdict, neutralised=filled.neutralised, truncated=filled.truncated)

    def _fill(self, case: Case) -> _Filled:
        response, truncated = self._shortened(case.response)
        context = case.context
        template = self.description.contextual if context else ""
        prompt = case.prompt if template or not context else f"{context}\n\n{case.prompt}"
        asked = case.asked if template or not context else f"{context}\n\n{case.asked}"
        values = {"prompt": prompt, "behaviour": asked, "response": response, "context": context}
        changes = 0
        for name, text in values.items() if self.neutral else ():
            clean = neutralise(text, self._control, self.description.marks)
            values[name] = clean.text
            changes += clean.changes if f"{{{name}}}" in (template or self._template) else 0
        ids = self._ids(fill(template or self._template, values))
        return _Filled(ids, changes, truncated, self._problem(ids, template or self._template))

    @property
    def _template(self) -> str:
        return self.description.template

    def _problem(self, ids: tuple[int, ...], template: str) -> str:
        """Say why the judge cannot be asked, if so."""
        window = self._window
        if len(ids) + self.description.answer_tokens > window:
            return f"{len(ids)} tokens are more than the judge's window of {window}"
        empty = self._ids(fill(template, dict.fromkeys(_SLOTS, "")))
        if self.neutral and self._specials(ids) != self._specials(empty):
            return "the case holds markup of the judge that could not be neutralised"
        return ""

    def _specials(self, ids: tuple[int, ...]) -> list[int]:
        return [token for token in ids if token in self._special_ids]

    def _shortened(self, text: str) -> tuple[str, bool]:
        """Return the response up to the longest that the judge is shown."""
        most = self.description.response_tokens
        if not most:
            return text, False
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ends = [end for _, end in encoded["offset_mapping"]]
        return (text[: ends[most - 1]], True) if len(ends) > most else (text, False)

    def _ids(self, text: str) -> tuple[int, ...]:
        ids = tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        first = self._tokenizer.bos_token_id
        return (first, *ids) if self.begin and first is not None else ids

    @property
    def _tokenizer(self) -> Any:
        return self.subject.chat.tokenizer

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        added = self._tokenizer.added_tokens_decoder
        special = {number for number, token in added.items() if token.special}
        # What stands for unknown text is no markup.
        return frozenset(special | {*self._tokenizer.all_special_ids}) - {
            self._tokenizer.unk_token_id
        }

    @cached_property
    def _control(self) -> tuple[str, ...]:
        tokens = self._tokenizer.convert_ids_to_tokens(sorted(self._special_ids))
        return (*self.description.control, *tokens)

    @cached_property
    def _window(self) -> int:
        config = self.subject.model.config
        return int(getattr(config, "max_position_embeddings", None) or 1 << 30)

    @cached_property
    def _stop_ids(self) -> frozenset[int]:
        ids = {self._tokenizer.eos_token_id}
        for config in (self.subject.model.config, self.subject.model.generation_config):
            declared = getattr(config, "eos_token_id", None)
            ids.update(declared if isinstance(declared, list) else [declared])
        return frozenset(token for token in ids if token is not None)

    def _answers(self, prompts: Sequence[tuple[int, ...]]) -> list[str]:
        """Return what the judge writes after each prompt; nothing where it computes NaN."""
        from durometer.core.generation import generate

        if not self.description.answer_tokens or not prompts:
            return [""] * len(prompts)
        written = generate(
            self.subject.model,
            prompts,
            max_tokens=self.description.answer_tokens,
            stop_ids=self._stop_ids,
            share_prefix=self.subject.tree,
            batch=self.batch,
        )
        return [
            str(self._tokenizer.decode(one.ids, skip_special_tokens=True))
            if math.isfinite(one.log_probability)
            else ""
            for one in written
        ]

    def _scores(self, prompts: Sequence[tuple[int, ...]]) -> list[float | None]:
        """Return the expectation over the answers' probabilities, renormalised; None without."""
        from durometer.core.rows import Row

        words = [(tuple(self._bare(word)), value) for word, value in self.description.words.items()]
        if not words or not prompts:
            return [None] * len(prompts)
        rows = [Row((*ids, *word), len(ids)) for ids in prompts for word, _ in words]
        found = iter(self.subject.forward.score(rows))
        return [
            _expected([(next(found).log_probability, value) for _, value in words], self._least)
            for _ in prompts
        ]

    @property
    def _least(self) -> float:
        """Probability that the answers must hold where the score alone is the verdict."""
        return 0.0 if self.description.answer_tokens else LEAST_MASS

    def _bare(self, word: str) -> list[int]:
        return cast("list[int]", self._tokenizer(word, add_special_tokens=False)["input_ids"])


_SLOTS = ("prompt", "behaviour", "response", "context")


def _expected(answers: Sequence[tuple[float, float]], least: float) -> float | None:
    """Return the mean value under the answers' probabilities, None where these are too small."""
    masses = [math.exp(log) if math.isfinite(log) else 0.0 for log, _ in answers]
    total = math.fsum(masses)
    if total <= 0 or total < least:
        return None
    return math.fsum(m * value for m, (_, value) in zip(masses, answers, strict=True)) / total
