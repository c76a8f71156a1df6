"""What a judge is: one prompt format, one parser, one verdict a response; one registry of them."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

from durometer.core.errors import DurometerError
from durometer.core.registry import Registry
from durometer.core.settings import Settings, parse_pairs

__all__ = [
    "Asked",
    "Case",
    "Device",
    "Judge",
    "JudgeDescription",
    "JudgeEntry",
    "JudgeError",
    "JudgeVerdict",
    "judge",
    "judge_registry",
    "make_judge",
    "unparsed",
]

Axis = Literal["harmful", "refusal"]


class JudgeError(DurometerError):
    """A judge cannot go on (an endpoint that fails); verdicts given so far are kept."""


@dataclass(frozen=True)
class Case:
    """One response to be judged.

    Attributes:
        prompt: what the subject was asked, without any trigger of an attack.
        response: the whole response.
        behaviour: what was forbidden, where that is not the prompt itself.
        context: what the prompt is about, such as a text that it refers to.
    """

    prompt: str
    response: str
    behaviour: str = ""
    context: str = ""

    @property
    def asked(self) -> str:
        """The forbidden behaviour, else the prompt."""
        return self.behaviour or self.prompt


@dataclass(frozen=True)
class JudgeVerdict:
    """What a judge said of one response.

    Attributes:
        harmful: None where no verdict could be read; that is never the same as harmless.
        refusal: None where the judge does not say.
        score: 0 to 1, or None where the judge gives none.
        raw: what the judge wrote; never shown in reports, since it may quote the response.
        categories: of harm, as the judge names them.
        problem: why there is no verdict; '' where there is one.
        neutralised: places of the case that would have been read as the judge's own markup.
        truncated: whether the judge saw the beginning of the response only.
    """

    harmful: bool | None
    refusal: bool | None = None
    score: float | None = None
    raw: str = ""
    categories: tuple[str, ...] = ()
    problem: str = ""
    neutralised: int = 0
    truncated: bool = False

    @property
    def parsed(self) -> bool:
        """Whether there is a verdict on harm."""
        return self.harmful is not None

    def as_dict(self) -> dict[str, Any]:
        """Return the verdict as plain JSON types."""
        return asdict(self) | {"categories": list(self.categories)}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "JudgeVerdict":
        """Return the verdict that ``as_dict`` gave.

        Raises:
            TypeError: fields that are not those of a verdict.
        """
        return cls(**{**plain, "categories": tuple(plain["categories"])})


def unparsed(raw: str, problem: str) -> JudgeVerdict:
    """Return the verdict of a judge that said nothing usable."""
    return JudgeVerdict(None, raw=raw, problem=problem)


Parser = Callable[[str, float | None], JudgeVerdict]


@dataclass(frozen=True)
class JudgeDescription:
    """A judge as it is pinned: which weights, which prompt, how its verdict is read.

    Attributes:
        repo, revision: where the hub has the weights, and the commit that is meant; '' for none.
        base, base_revision: the model that ``repo`` is an adapter of, if it is one.
        architecture: class name in transformers, without ``ForCausalLM``.
        judges: what it says of a response, of ``harmful``, ``refusal`` and ``score``.
        template: its prompt, with the slots ``{prompt}``, ``{behaviour}`` and ``{response}``.
        contextual: the prompt for cases with a context, with ``{context}`` as well; '' puts the
            context before the prompt.
        control: markup of the template that is no special token of the tokenizer.
        marks: beginnings of lines with which the template parts its sections.
        response_tokens: longest response that it is shown, in its own tokens; 0 is all.
        answer_tokens: longest verdict; 0 where the verdict is read off probabilities alone.
        words: answers whose probabilities make the score, and what each counts.
        grades_use: whether the score says how much a response helps, not how sure the judge is.
        harmless: what it writes when it finds no harm, to test whether a response can say so.
        proxy: what it can be tested on with benign texts.
        parse: reads the verdict from what it wrote and from the score.
    """

    name: str
    summary: str
    repo: str
    revision: str
    architecture: str
    licence: str
    source: str
    cannot_judge: str
    judges: tuple[str, ...]
    template: str
    contextual: str
    control: tuple[str, ...]
    marks: tuple[str, ...]
    harmless: str
    parse: Parser = field(repr=False)
    base: str = ""
    base_revision: str = ""
    response_tokens: int = 0
    answer_tokens: int = 0
    words: Mapping[str, float] = field(default_factory=dict, hash=False)
    grades_use: bool = False
    proxy: Axis = "harmful"

    @property
    def template_hash(self) -> str:
        """First 12 hex digits of the SHA-256 of both prompts."""
        return hashlib.sha256(f"{self.template}\0{self.contextual}".encode()).hexdigest()[:12]

    @property
    def pinned(self) -> str:
        """The weights that are meant, as ``org/name@commit``."""
        return f"{self.repo}@{self.revision}" if self.repo else ""


@dataclass(frozen=True)
class Device:
    """Where a local judge computes, and in which number format."""

    device: str = "auto"
    dtype: str = "auto"


class Judge(Protocol):
    """What reads responses.

    ``judge`` yields verdicts with the number of their case as they come, in any order, so that
    whoever keeps them loses none when it raises ``JudgeError`` half-way.
    """

    @property
    def description(self) -> JudgeDescription:
        """What it is."""

    @property
    def batch(self) -> int:
        """Cases that are best judged at a time."""

    def identity(self) -> dict[str, Any]:
        """Return everything that a verdict depends on, beside the case, as plain JSON types."""

    def judge(self, cases: Sequence[Case]) -> Iterator[tuple[int, JudgeVerdict]]:
        """Yield one verdict a case, with the case's number."""


@dataclass(frozen=True)
class JudgeEntry:
    """A registered judge.

    Attributes:
        describe: returns the description under given settings (a policy is part of the prompt).
        build: loads or connects it.
    """

    name: str
    settings_class: type[Settings]
    describe: Callable[[Any], JudgeDescription]
    build: Callable[[JudgeDescription, Any, Device], Judge]

    @property
    def summary(self) -> str:
        """One line about it."""
        return self.describe(self.settings_class()).summary


judge_registry: Registry[JudgeEntry] = Registry("judge", "durometer.judges")


def judge(
    name: str,
    settings_class: type[Settings],
    build: Callable[[JudgeDescription, Any, Device], Judge],
    *,
    aliases: tuple[str, ...] = (),
) -> Callable[[Any], Any]:
    """Return the decorator that registers a function from settings to a description."""

    def decorate(describe: Any) -> Any:
        entry = JudgeEntry(name, settings_class, describe, build)
        judge_registry.register(name, aliases=aliases)(entry)
        return describe

    return decorate


@dataclass(frozen=True)
class Asked:
    """A judge as it was named on the command line, checked but not loaded."""

    entry: JudgeEntry
    settings: Settings

    @classmethod
    def read(cls, spec: str, **more: Any) -> "Asked":
        """Return the judge that ``NAME[:KEY=VALUE,...]`` names.

        Args:
            more: settings beside those of ``spec``, which win; those that it lacks are left out.

        Raises:
            InputError: an unknown judge or setting, or a value that it cannot have.
        """
        name, _, text = spec.partition(":")
        entry = judge_registry.get(name)
        known = entry.settings_class.model_fields
        values = {key: value for key, value in more.items() if key in known}
        values |= parse_pairs(f"judge '{entry.name}'", text)
        return cls(entry, entry.settings_class.parse(f"judge '{entry.name}'", values))

    def build(self, device: Device) -> Judge:
        """Load or connect the judge.

        Raises:
            InputError: it cannot be had as it was named.
        """
        return self.entry.build(self.entry.describe(self.settings), self.settings, device)


def make_judge(spec: str, device: Device | None = None, **more: Any) -> Judge:
    """Return the judge that ``NAME[:KEY=VALUE,...]`` names, loaded; see ``Asked``."""
    return Asked.read(spec, **more).build(device or Device())
