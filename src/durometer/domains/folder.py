"""Any folder with ``domain.toml`` and JSONL files is a domain.

Everything is checked on reading, and an error names the file, the line and what to do. Texts are
never quoted in errors, since they may be what is safeguarded.
"""

import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from durometer.core.errors import InputError, unknown_name
from durometer.domains.base import (
    REFUSAL_PHRASES,
    AnswerRules,
    Domain,
    Item,
    Kind,
    Role,
    Split,
    Variant,
    deal_splits,
    group_name,
)
from durometer.domains.groups import PLAIN
from durometer.formats.safetensors import open_regular, shown

__all__ = ["MAX_LINE_BYTES", "SHARES", "read_folder"]

HEADER = "domain.toml"
MAX_LINE_BYTES = 1 << 20
MAX_NAME = 200
# Relative sizes of the splits where no line names one; those of the built-in domain `capitals`.
SHARES: dict[Role, dict[Split, float]] = {
    Role.RESTRICTED: {
        Split.DEFENCE: 20.0,
        Split.ATTACK: 27.0,
        Split.SELECT: 20.0,
        Split.REPORT: 33.0,
    },
    Role.RETAIN: {
        Split.DEFENCE: 12.0,
        Split.ATTACK: 8.0,
        Split.SELECT: 17.0,
        Split.REPORT: 63.0,
    },
    Role.BENIGN: {
        Split.DEFENCE: 30.0,
        Split.ATTACK: 30.0,
        Split.SELECT: 16.0,
        Split.REPORT: 24.0,
    },
}
DEFAULT_REFUSALS = [
    "I'm sorry, but I can't help with that.",
    "I can't help with this request.",
    "I'm not able to share that information.",
    "I can't answer that question. Is there something else I can help you with?",
]
_UNANSWERED = "only restricted items of kind 'refusal' go without, and a judge reads those"


def _filled(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty")
    return text


def _one_line(text: str) -> str:
    if not text.strip() or not text.isprintable() or len(text) > MAX_NAME:
        raise ValueError(f"is not one line of 1 to {MAX_NAME} printable characters")
    return text


def _group(text: str) -> str:
    if not re.fullmatch(r"[\w-]{1,40}", text):
        raise ValueError("is not 1 to 40 letters, digits, '-' or '_'")
    return text


def _pattern(text: str) -> str:
    try:
        re.compile(text, re.IGNORECASE)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"'{shown(text, 80)}' is not a regular expression ({error})") from None
    return text


def _mark(text: str) -> str:
    if re.search(_pattern(text), "", re.IGNORECASE):
        raise ValueError("matches an empty text, and so would mark every response")
    return text


Text = Annotated[str, AfterValidator(_filled)]
Name = Annotated[str, AfterValidator(_one_line)]
Group = Annotated[str, AfterValidator(_group)]
Pattern = Annotated[str, AfterValidator(_pattern)]
Mark = Annotated[str, AfterValidator(_mark)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _Files(_Model):
    restricted: Text = "restricted.jsonl"
    retain: Text = "retain.jsonl"
    benign: Text = "benign.jsonl"


class _Rules(_Model):
    other_answers: list[Text] | None = None
    refusal_phrases: list[Mark] = []
    attempt_pattern: Mark | None = None
    letters: Pattern = AnswerRules.letters


class _Header(_Model):
    name: Name
    kind: Literal["refusal", "knowledge"] = "refusal"
    description: str = ""
    source: str = ""
    harmless: bool = False
    refusals: list[Text] = Field(DEFAULT_REFUSALS, min_length=1)
    chance: float | None = Field(None, ge=0, lt=1)
    language: Group = "en"
    files: _Files = _Files()
    rules: _Rules = _Rules()


class _Line(_Model):
    prompt: Text
    entity: Name | None = None
    answers: list[Text] = []
    response: Text | None = None
    stem: str = ""
    choices: list[Text] = []
    suite: Name | None = None
    split: Text | None = None
    training: bool | None = None
    language: Group | None = None
    framing: Group | None = None
    id: Name | None = None


@dataclass(frozen=True)
class _Entry:
    """One line of a JSONL file: where it stands, and its checked content."""

    path: Path
    number: int
    line: _Line

    def refused(self, problem: str) -> InputError:
        return InputError(f"{_at(self.path, self.number)}: {problem}")


def read_folder(path: Path, kind: Kind | None) -> Domain:
    """Return the domain in the folder ``path``; splits may still be empty or overlap.

    Args:
        path: folder with ``domain.toml`` and the JSONL files that it names.
        kind: overrides the kind in ``domain.toml``; None keeps it.

    Raises:
        InputError: a file is missing, unreadable or outside the folder, or a line is not an item of
            a domain of this kind; the message names file and line.
    """
    header = _read_header(path / HEADER)
    kind = kind or header.kind
    files = {role: _inside(path, str(getattr(header.files, role))) for role in Role}
    if not files[Role.BENIGN].exists() and "benign" not in header.files.model_fields_set:
        del files[Role.BENIGN]
    entries = {role: list(_read_lines(file)) for role, file in files.items()}
    for role, group in entries.items():
        for entry in group:
            _check(entry, role, kind)
    _refuse_repeated_ids(entries)
    others, entries[Role.RESTRICTED] = _apart(header, entries[Role.RESTRICTED])
    for entry in (e for role in (Role.RETAIN, Role.BENIGN) for e in entries.get(role, [])):
        if not _own(header, entry):
            raise entry.refused("'language' and 'framing' are for restricted items")
    items = tuple(item for role, group in entries.items() for item in _items(header, role, group))
    return Domain(
        name=header.name,
        kind=kind,
        description=header.description,
        items=items,
        refusals=tuple(header.refusals),
        rules=_answer_rules(header.rules, items),
        source=header.source,
        harmless=header.harmless,
        chance=_chance(header, items) if kind == "knowledge" else 0.0,
        make_variants=lambda: _variants(header, items, others) if others else (),
    )


def _apart(header: _Header, entries: Sequence[_Entry]) -> tuple[list[_Entry], list[_Entry]]:
    """Return the lines in another language or framing, and the domain's own."""
    own = [entry for entry in entries if _own(header, entry)]
    others = [entry for entry in entries if not _own(header, entry)]
    known = {_entity(entry) for entry in own}
    for entry in others:
        if _entity(entry) not in known:
            raise entry.refused(
                "'entity' is not that of any item in the domain's own language and framing; groups "
                "are compared over the same entities"
            )
        if not entry.line.answers:
            raise entry.refused("'answers' is missing; groups are read off free answers")
    return others, own


def _own(header: _Header, entry: _Entry) -> bool:
    """Say whether a line is in the domain's own language, without a framing."""
    return (entry.line.language or header.language, entry.line.framing or PLAIN) == (
        header.language,
        PLAIN,
    )


def _variants(
    header: _Header, items: Sequence[Item], others: Sequence[_Entry]
) -> tuple[Variant, ...]:
    """Return the restricted items of every group, the domain's own group first."""
    own = [item for item in items if item.role == Role.RESTRICTED and item.training is not True]
    splits = {item.entity: item.split for item in items if item.role == Role.RESTRICTED}
    found = [
        Variant(replace(item, suite=group_name(header.language, PLAIN)), header.language, PLAIN)
        for item in own
    ]
    for entry in others:
        language, framing = entry.line.language or header.language, entry.line.framing or PLAIN
        line = entry.line
        item = Item(
            id=_id(entry, Role.RESTRICTED),
            entity=_entity(entry),
            role=Role.RESTRICTED,
            split=splits[_entity(entry)],
            prompt=line.prompt,
            response=line.response or f"{line.answers[0]}.",
            answers=tuple(line.answers),
            suite=group_name(language, framing),
        )
        found.append(Variant(item, language, framing))
    return tuple(found)


def _read_header(path: Path) -> _Header:
    with open_regular(path) as file:
        raw = file.read(MAX_LINE_BYTES + 1)
    if len(raw) > MAX_LINE_BYTES:
        raise InputError(f"{shown(path)}: larger than {MAX_LINE_BYTES} bytes; move items to JSONL")
    try:
        values = tomllib.loads(_decoded(raw, str(shown(path))))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise InputError(f"{shown(path)}: not valid TOML: {shown(error)}") from None
    header = _validated(_Header, values, str(shown(path)))
    phrases = [*REFUSAL_PHRASES, *header.rules.refusal_phrases]
    for number, refusal in enumerate(header.refusals):
        plain = refusal.replace("\u2019", "'")
        if not any(re.search(phrase, plain, re.IGNORECASE) for phrase in phrases):
            raise InputError(
                f"{shown(path)}: refusals[{number}] would not be read as a refusal; add a pattern "
                "that matches it to refusal_phrases in [rules]"
            )
    return header


def _inside(folder: Path, name: str) -> Path:
    """Return the path of ``name``; refuse one that leads out of the folder, be it by a link."""
    path = folder / name
    try:
        within = path.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):  # a NUL in the name, a loop of links
        within = False
    if not within:
        raise InputError(
            f"{shown(folder / HEADER)}: [files] '{shown(name)}' is not inside the domain's folder"
        )
    return path


def _read_lines(path: Path) -> Iterator[_Entry]:
    number, empty = 0, True
    with open_regular(path) as file:
        while raw := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            where = _at(path, number)
            if len(raw) > MAX_LINE_BYTES:
                raise InputError(f"{where}: line longer than {MAX_LINE_BYTES} bytes")
            text = _decoded(raw, where)
            if text.strip():
                empty = False
                yield _Entry(path, number, _validated(_Line, _object(text.rstrip(), where), where))
    if empty:
        raise InputError(f"{shown(path)}: holds no item; write one JSON object a line")


def _decoded(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 (byte {error.start}); save it as UTF-8") from None


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text, object_pairs_hook=_without_repeats)
        # Half of a surrogate pair is valid JSON, but no text that could be hashed or tokenised.
        json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        problem = f"{error.msg.lower()}, column {error.colno}"
        raise InputError(f"{where}: not valid JSON: {problem}") from None
    except UnicodeEncodeError:
        raise InputError(f"{where}: not valid JSON: half of a surrogate pair") from None
    except RecursionError:
        raise InputError(f"{where}: not valid JSON: nested too deeply") from None
    except ValueError as error:
        raise InputError(f"{where}: not valid JSON: {shown(error)}") from None
    if not isinstance(value, dict):
        raise InputError(f"{where}: not a JSON object; write one {{...}} a line")
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key occurs twice")
    return values


M = TypeVar("M", bound=BaseModel)


def _validated(model: type[M], values: Mapping[str, Any], where: str) -> M:
    """Return the checked values; an unknown key is told first, since it may be a missing one."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        errors = error.errors(include_url=False)
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    *above, last = first["loc"]
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])
    if first["type"] == "extra_forbidden":
        table = model.model_fields[str(above[0])].annotation if above else model
        known = getattr(table, "model_fields", {})
        raise InputError(f"{where}: {unknown_name('key', shown(last, 80), known)}") from None
    if first["type"] == "missing":
        raise InputError(f"{where}: '{place[1:]}' is missing") from None
    problem = first["msg"].removeprefix("Value error, ").replace("Input should", "should")
    raise InputError(f"{where}: '{place[1:]}' {problem}") from None


def _check(entry: _Entry, role: Role, kind: Kind) -> None:
    """Refuse a line that could not be trained on or measured; see ``docs/domains.md``."""
    line = entry.line
    _check_split(entry, role)
    if role == Role.BENIGN:
        if line.response is None:
            raise entry.refused("'response' is missing; a benign item needs one to train on")
        return
    if line.entity is None:
        raise entry.refused("'entity' is missing; splits are disjoint by entity")
    judged = role == Role.RESTRICTED and kind == "refusal" and not line.choices
    if not line.answers and not judged:
        advice = _UNANSWERED if not line.choices else "name the right choice in it"
        raise entry.refused(f"'answers' is missing; {advice}")
    _check_choices(entry, needed=role == Role.RESTRICTED and kind == "knowledge")
    if line.response is not None:
        _check_response(entry, line.response, role)


def _check_split(entry: _Entry, role: Role) -> None:
    split = entry.line.split
    if split is not None and split not in list(Split):
        raise entry.refused(str(unknown_name("split", shown(split, 40), list(Split))))
    if split == Split.NEVER and role != Role.RESTRICTED:
        raise entry.refused(f"split '{split}' is for restricted items; use 'report'")


def _check_choices(entry: _Entry, *, needed: bool) -> None:
    choices = [_same(choice) for choice in entry.line.choices]
    if not choices and needed:
        raise entry.refused("'choices' is missing; kind 'knowledge' is measured on choices")
    if not choices:
        return
    if len(choices) < 2 or len(set(choices)) < len(choices):
        raise entry.refused("'choices' must be two or more different texts")
    accepted = len(set(choices) & {_same(answer) for answer in entry.line.answers})
    if accepted != 1:
        raise entry.refused(
            f"{accepted} of the choices are accepted answers; exactly one must be in 'answers'"
        )


def _check_response(entry: _Entry, response: str, role: Role) -> None:
    if not response.startswith(entry.line.stem):
        raise entry.refused("'response' does not begin with 'stem'")
    given, answers = _same(response), entry.line.answers
    if role == Role.RESTRICTED and answers and not any(_same(a) in given for a in answers):
        raise entry.refused("'response' contains none of 'answers'; training on it teaches nothing")


def _refuse_repeated_ids(entries: Mapping[Role, Sequence[_Entry]]) -> None:
    first: dict[str, _Entry] = {}
    for role, group in entries.items():
        for entry in group:
            other = first.setdefault(_id(entry, role), entry)
            if other is not entry:
                place = _at(other.path, other.number)
                raise entry.refused(
                    f"id '{shown(_id(entry, role), 80)}' is already used in {place}"
                )


def _items(header: _Header, role: Role, entries: Sequence[_Entry]) -> Iterator[Item]:
    splits = _splits(header.name, role, entries)
    for entry in entries:
        line, entity = entry.line, _entity(entry)
        stem = line.stem.rstrip()
        begun = f"{stem} " if stem else ""
        yield Item(
            id=_id(entry, role),
            entity=entity,
            role=role,
            split=Split(line.split) if line.split else splits[entity],
            prompt=line.prompt,
            response=line.response or (f"{begun}{line.answers[0]}." if line.answers else ""),
            answers=tuple(line.answers),
            stem=stem,
            choices=_right_first(line),
            suite=line.suite or "",
            training=line.training,
        )


def _splits(name: str, role: Role, entries: Sequence[_Entry]) -> dict[str, Split]:
    """Return the split of every entity, dealt by hash; empty where the lines name theirs."""
    named = [entry.line.split is not None for entry in entries]
    if all(named):
        return {}
    if any(named):
        odd = entries[named.index(False)]
        raise odd.refused("'split' is missing, but other lines name one; name all or none")
    return deal_splits({_entity(entry) for entry in entries}, SHARES[role], f"{name}-{role}")


def _right_first(line: _Line) -> tuple[str, ...]:
    accepted = {_same(answer) for answer in line.answers}
    return tuple(sorted(line.choices, key=lambda choice: _same(choice) not in accepted))


def _answer_rules(rules: _Rules, items: Sequence[Item]) -> AnswerRules:
    others = rules.other_answers
    if others is None:
        given = (a for item in items if item.role == Role.RESTRICTED for a in item.answers)
        others = list(dict.fromkeys(given))
    return AnswerRules(
        other_answers=tuple(others),
        refusal_phrases=(*REFUSAL_PHRASES, *rules.refusal_phrases),
        attempt_pattern=rules.attempt_pattern or "",
        letters=rules.letters,
    )


def _chance(header: _Header, items: Sequence[Item]) -> float:
    """Return the rate of right guesses: one over the number of choices, averaged over the items."""
    if header.chance is not None:
        return header.chance
    rates = [1 / len(item.choices) for item in items if item.role == Role.RESTRICTED]
    return sum(rates) / len(rates)


def _entity(entry: _Entry) -> str:
    return entry.line.entity or " ".join(entry.line.prompt.split())


def _id(entry: _Entry, role: Role) -> str:
    return entry.line.id or f"{role}/{entry.number}"


def _same(text: str) -> str:
    """Return what two spellings of one answer have in common: neither case nor spacing counts."""
    return " ".join(text.split()).casefold()


def _at(path: Path, number: int) -> str:
    return f"{shown(path)}:{number}"
