"""Conversations of canaries, and what their renderings say about a chat template."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from durometer.findings import Finding, Severity, found
from durometer.formats.safetensors import shown

__all__ = ["Case", "Rendering", "cases_for", "judge", "words"]

SYSTEM, USERS, ANSWERS = "qzsystemqz", ("qzaskaqz", "qzaskbqz"), ("qzreplyaqz", "qzreplybqz")
NEUTRAL = "qzneutralqz"
ALL_LITERALS = "all of its literals together"
_DATES = ("2020-02-03", "2025-06-15", "2030-10-11", "2035-12-24")
_TOOL = {
    "type": "function",
    "function": {
        "name": "qztoolqz",
        "description": "qztoolqz",
        "parameters": {
            "type": "object",
            "properties": {"qzargumentqz": {"type": "string", "description": "qzargumentqz"}},
            "required": ["qzargumentqz"],
        },
    },
}
_KEYS = {
    "role",
    "content",
    "user",
    "system",
    "assistant",
    "tool",
    "function",
    "name",
    "type",
    "text",
}
_MARKUP = re.compile(r"^\W|\W$|^[A-Z_]+$")
_SPECIALS = re.compile(r"<[^<>\s]{1,48}>|\[/?[A-Z_ ]{2,40}\]|<<SYS>>|<</SYS>>|\{\{|\}\}")
# What names a turn, or opens a block of thought, and is no message to the model.
_FRAME = set(
    re.findall(
        r"\w+",
        """
    system user assistant human model tool ai instruction response input think thinking final
    analysis channel message start end bos eos turn gpt bot question answer developer tools none
    prompt context chat correct""",
    )
)
_DATE_WORDS = set(
    re.findall(
        r"\w+",
        """
    january february march april may june july august september october november december
    jan feb mar apr jun jul aug sep oct nov dec monday tuesday wednesday thursday friday saturday
    sunday mon tue wed thu fri sat sun""",
    )
)
# Default system prompts and headers of official templates, as sets of words.
_KNOWN_TEXTS = (
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions.",
    "Cutting Knowledge Date: December 2023 Today Date: 26 Jul 2024",
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.",
)


@dataclass(frozen=True)
class Case:
    """One conversation to render, and what is asked of it.

    Attributes:
        kind: ``plain``, ``count``, ``date``, ``long``, ``tools``, ``flag``, ``literal`` or
            ``neutral``.
        canaries: words that must come up once each, in this order.
        literal: what was put into the messages in place of the neutral word.
        position: which of the four places it was put in.
        joined: whether the literal is all literals together.
    """

    kind: str
    variables: dict[str, Any]
    canaries: tuple[str, ...]
    date: str = "2025-06-15"
    literal: str = ""
    position: int = 0
    system: bool = True
    prompt: bool = False
    joined: bool = False


@dataclass(frozen=True)
class Rendering:
    """What became of a case: text, or the kind of error and its message."""

    text: str | None
    error: str = ""
    message: str = ""


@dataclass
class _Seen:
    """Evidence by kind of finding, gathered over all cases."""

    dropped: list[str] = field(default_factory=list)
    altered: list[str] = field(default_factory=list)
    added: Counter[str] = field(default_factory=Counter)
    added_always: Counter[str] = field(default_factory=Counter)
    triggers: dict[str, dict[str, Any]] = field(default_factory=dict)
    prefixes: set[str] = field(default_factory=set)


def words(text: str) -> list[str]:
    """Return the words and web addresses of ``text``, canaries left out."""
    found_words = re.findall(r"https?://\S+|[^\W\d_]{2,}", text)
    return [each for each in found_words if not re.fullmatch(r"qz[a-z]+qz", each)]


def _own(text: str) -> list[str]:
    return [word for word in words(text) if word.lower() not in _FRAME | _DATE_WORDS]


_KNOWN = [" ".join(_own(text)).lower() for text in _KNOWN_TEXTS]


def _is_known(text: str) -> bool:
    """Say whether ``text`` is made of nothing but what official templates say."""
    rest = text.lower()
    for phrase in _KNOWN:
        rest = rest.replace(phrase, " ")
    return not rest.strip()


def _variables(messages: list[dict[str, Any]], prompt: bool = False, **more: Any) -> dict[str, Any]:
    base = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return {"messages": messages, "add_generation_prompt": prompt, "tools": None, **base, **more}


def _turns(count: int, system: bool, texts: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Return ``count`` turns, user first, of the canaries or of the texts given."""
    made: list[dict[str, Any]] = []
    if system:
        made.append({"role": "system", "content": texts[0] if texts else SYSTEM})
    for number in range(count):
        role, canaries = (("user", USERS), ("assistant", ANSWERS))[number % 2]
        canary = (
            canaries[number // 2]
            if number < 4
            else f"qz{'abcdefghijklmnopqrst'[number % 20]}turnqz"
        )
        made.append({"role": role, "content": texts[number + system] if texts else canary})
    return made


def cases_for(
    literals: Sequence[str], numbers: Sequence[int], unknown: Sequence[str], system: bool = True
) -> list[Case]:
    """Return the conversations that a template with these constants and variables is tried on.

    Args:
        system: whether conversations begin with a system message, where that is not what is tried.
    """
    cases = []
    for given in (True, False):
        for prompt in (True, False):
            cases.append(_case("plain", _turns(3, given), system=given, prompt=prompt))
    top = min(40, max([8, *(number + 2 for number in numbers if number < 39)]))
    cases += [_case("count", _turns(n, s), system=s) for n in range(1, top) for s in (True, False)]
    years = {m for text in literals for m in re.findall(r"\b20\d\d\b", text)}
    for date in (*_DATES, *(f"{year}-12-31" for year in sorted(years))):
        cases.append(_case("date", _turns(3, system), system=system, date=date))
    for size in {20, 400, 4000, *(n + d for n in numbers if 8 < n < 5000 for d in (-1, 1))}:
        texts = [c["content"] + " " + "qzfillqz " * (size // 9) for c in _turns(3, system)]
        cases.append(_case("long", _turns(3, system, texts), system=system))
    cases += _tool_cases(system)
    known = {
        "messages",
        "add_generation_prompt",
        "tools",
        "bos_token",
        "eos_token",
        "pad_token",
        "unk_token",
        "raise_exception",
        "strftime_now",
    }
    for name in sorted(set(unknown) - known)[:20]:
        for value in (True, "qzflagqz"):
            cases.append(_case("flag", _turns(3, system), system=system, more={name: value}))
    return cases + list(_literal_cases(literals, system))


def _case(
    kind: str,
    messages: list[dict[str, Any]],
    *,
    system: bool = True,
    prompt: bool = False,
    more: dict[str, Any] | None = None,
    **rest: Any,
) -> Case:
    canaries = tuple(
        match[0]
        for each in messages
        if (match := re.match(r"qz[a-z]+qz", str(each.get("content"))))
    )
    variables = _variables(messages, prompt, **(more or {}))
    return Case(kind, variables, canaries, system=system, prompt=prompt, **rest)


def _tool_cases(system: bool) -> list[Case]:
    call = {
        "id": "qzcallqz0",
        "type": "function",
        "function": {"name": "qztoolqz", "arguments": {"qzargumentqz": "qzvalueqz"}},
    }
    talk: list[dict[str, Any]] = [
        *_turns(1, system),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "qztoolqz", "tool_call_id": "qzcallqz0", "content": "qzresultqz"},
        {"role": "assistant", "content": ANSWERS[0]},
        {"role": "user", "content": USERS[1]},
    ]
    parts = [
        {**each, "content": [{"type": "text", "text": each["content"]}]}
        for each in _turns(3, system)
    ]
    return [
        Case("tools", _variables(_turns(3, system), tools=[_TOOL]), USERS, system=system),
        Case("tools", _variables(_turns(3, False), True, tools=[_TOOL]), USERS, system=False),
        Case("tools", _variables(talk, tools=[_TOOL]), ()),
        Case("tools", _variables(parts), ()),
    ]


def _literal_cases(literals: Sequence[str], system: bool) -> Iterator[Case]:
    """Yield, for every literal and place in a message, the case; the neutral word comes first."""
    joined = " ".join(literals[:60])
    for literal in (NEUTRAL, *literals, joined):
        if literal.lower() in _KEYS or not literal.strip():
            continue
        for position in range(4):
            texts = [_placed(c["content"], literal, position) for c in _turns(3, system)]
            messages = _turns(3, system, texts)
            kind = "neutral" if literal == NEUTRAL else "literal"
            yield Case(
                kind,
                _variables(messages),
                (),
                literal=literal,
                position=position,
                joined=literal is joined,
            )


def _placed(canary: str, literal: str, position: int) -> str:
    return (f"{literal} {canary}", f"{canary} {literal} {canary}", f"{canary} {literal}", literal)[
        position
    ]


# --- judgement -----------------------------------------------------------------------------------


def judge(
    cases: Sequence[Case],
    results: Sequence[Rendering],
    theirs: Sequence[Rendering] | None,
    specials: set[str],
    where: str,
    instructions: re.Pattern[str],
) -> list[Finding]:
    """Return what the renderings show.

    Args:
        theirs: renderings of the same cases by the base's template; what both do is the base's.
        specials: contents of special tokens.
        where: location of the findings.
        instructions: what text against safeguards tends to say.
    """
    seen = _Seen()
    neutral = {
        c.position: r.text for c, r in zip(cases, results, strict=False) if c.kind == "neutral"
    }
    usual = _usual_words(cases, results)
    for number, (case, result) in enumerate(zip(cases, results, strict=False)):
        other = theirs[number].text if theirs and number < len(theirs) else None
        if result.text is None or result.text == other:
            continue
        _canaries(case, result.text, other, seen)
        if case.kind in ("literal", "neutral"):
            _literal(case, result.text, neutral.get(case.position), specials, seen)
        else:
            _added(case, result.text, other, usual, specials, seen)
    _prefixes(cases, results, theirs, specials, seen)
    return [*_findings(seen, where, theirs is not None, instructions)]


def _residual(text: str, specials: set[str]) -> list[str]:
    """Return the words of a rendering that are neither canaries nor the frame of turns."""
    for special in sorted(specials, key=len, reverse=True):
        text = text.replace(special, " ")
    return _own(_SPECIALS.sub(" ", text))


def _usual_words(cases: Sequence[Case], results: Sequence[Rendering]) -> set[str]:
    """Return what the template says in the plain conversations, whatever it is."""
    texts = [r.text or "" for c, r in zip(cases, results, strict=False) if c.kind == "plain"]
    return {word for text in texts for word in words(text)}


def _canaries(case: Case, text: str, other: str | None, seen: _Seen) -> None:
    """Record canaries that are gone, repeated or out of order, unless the base does the same."""
    if case.kind in ("literal", "neutral"):
        return
    for canary in case.canaries:
        count = text.count(canary)
        if count == 1 or (other is not None and other.count(canary) == count):
            continue
        if not count:
            seen.dropped.append(f"{_role(case, canary)} ({case.kind})")
        elif case.kind != "tools":
            seen.altered.append(f"{_role(case, canary)} appears {count} times ({case.kind})")
    places = [text.find(canary) for canary in case.canaries if canary != SYSTEM and canary in text]
    if places != sorted(places):
        seen.altered.append(f"messages change places ({case.kind})")
    turn = text.partition(ANSWERS[0])[2].partition(USERS[1])
    marked = set(re.findall(r"[a-z]+", turn[0].lower()))
    if case.kind == "plain" and turn[1] and "system" in marked and not marked & {"user", "human"}:
        seen.altered.append("a user's message is marked as the system's")
    last = places[-1] if places else len(text)
    if SYSTEM in case.canaries and SYSTEM in text and text.find(SYSTEM) > last:
        seen.altered.append(f"the system message comes after the last message ({case.kind})")


def _role(case: Case, canary: str) -> str:
    for message in case.variables["messages"]:
        if str(message.get("content")).startswith(canary):
            return f"the {message['role']} message"
    return "a message"


def _added(
    case: Case, text: str, other: str | None, usual: set[str], specials: set[str], seen: _Seen
) -> None:
    """Record words that come from neither the conversation nor the base."""
    rest = _residual(text, specials)
    if other is not None:
        rest = list((Counter(rest) - Counter(_residual(other, specials))).elements())
    if case.kind in ("tools", "flag"):
        return
    if len(rest) >= 2 and case.kind == "plain":
        (seen.added_always if case.system else seen.added).update({" ".join(rest)[:300]: 1})
    news = [word for word in rest if word not in usual]
    if news and case.kind in ("count", "date", "long"):
        seen.triggers.setdefault(f"({case.kind})", {"adds": news[:30], "case": case.kind})


def _literal(case: Case, text: str, neutral: str | None, specials: set[str], seen: _Seen) -> None:
    """Record what else changes when a literal takes the place of a neutral word."""
    if case.kind != "literal" or neutral is None:
        return
    expected = neutral.replace(NEUTRAL, case.literal)
    if _squeezed(text) in (_squeezed(expected), _squeezed(neutral.replace(NEUTRAL, ""))):
        return
    more = Counter(words(text)) - Counter(words(expected))
    news = [word for word in more if word.lower() not in _FRAME]
    markup = case.literal in specials or bool(_MARKUP.search(case.literal.strip()))
    if not news and (markup or case.position == 3 or case.joined):
        return  # a marker at which the template splits or strips
    if case.joined and any("case" not in what for what in seen.triggers.values()):
        return
    name = ALL_LITERALS if case.joined else case.literal
    seen.triggers.setdefault(name, {"adds": news[:30], "position": case.position})


def _squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text)


def _prefixes(
    cases: Sequence[Case],
    results: Sequence[Rendering],
    theirs: Sequence[Rendering] | None,
    specials: set[str],
    seen: _Seen,
) -> None:
    """Record words that open the answer in the model's place."""
    for system in (True, False):
        ours = _suffix(cases, results, system)
        base = _suffix(cases, theirs, system) if theirs else None
        rest = _residual(ours or "", specials)
        if rest and ours != base:
            seen.prefixes.add(" ".join(rest)[:200])


def _suffix(cases: Sequence[Case], results: Sequence[Rendering], system: bool) -> str | None:
    texts = {
        case.prompt: result.text
        for case, result in zip(cases, results, strict=False)
        if case.kind == "plain" and case.system == system
    }
    longer, shorter = texts.get(True), texts.get(False)
    if longer is None or shorter is None:
        return None
    return longer[len(shorter) :] if longer.startswith(shorter) else longer.rpartition(USERS[1])[2]


def _findings(
    seen: _Seen, where: str, based: bool, instructions: re.Pattern[str]
) -> Iterator[Finding]:
    advice = "Use the template of the base model."
    if seen.dropped:
        title = f"{seen.dropped[0].partition(' (')[0]} does not reach the model"
        yield found("CT-04", Severity.HIGH, title, {"cases": _counted(seen.dropped)}, where, advice)
    if seen.altered:
        title = f"messages are repeated or moved: {seen.altered[0]}"
        yield found("CT-04", Severity.HIGH, title, {"cases": _counted(seen.altered)}, where, advice)
    yield from _texts(seen, where, based, instructions)
    for literal, what in sorted(seen.triggers.items())[:20]:
        title = (
            f"other text comes up with the {what['case']} alone"
            if "case" in what
            else f"{shown(literal, 60)} in a conversation: other text reaches the model"
        )
        yield found(
            "CT-05", Severity.HIGH, title, {"trigger": shown(literal), **what}, where, advice
        )
    if seen.prefixes:
        title = "the template begins the answer with words of its own"
        yield found(
            "CT-06",
            Severity.HIGH,
            title,
            {"text": sorted(map(shown, seen.prefixes))},
            where,
            advice,
        )


def _texts(
    seen: _Seen, where: str, based: bool, instructions: re.Pattern[str]
) -> Iterator[Finding]:
    for texts, place in (
        (seen.added_always, "beside a system message"),
        (seen.added, "by default"),
    ):
        if not texts:
            continue
        text = max(texts, key=len)
        known = all(_is_known(each) for each in texts)
        against = any(instructions.search(each) for each in texts)
        always = texts is seen.added_always
        severity = Severity.MEDIUM
        if based or always or against:
            severity = Severity.HIGH
        if known:
            severity = Severity.MEDIUM if based else Severity.INFO
        title = f"the template puts in words of its own {place}"
        title += ", which the base's does not" if based else ""
        yield found(
            "CT-04",
            severity,
            title,
            {"words": shown(text), "known_default": known},
            where,
            "" if known else "Compare with the base: --base.",
        )
        if always:
            return


def _counted(items: list[str]) -> dict[str, int]:
    return dict(Counter(items).most_common(20))
