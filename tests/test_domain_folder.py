"""A folder with ``domain.toml`` and JSONL files: what is read, what is dealt, what is refused."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from durometer.core.errors import InputError
from durometer.domains.base import KINDS, REFUSAL_PHRASES, Item, Role, Split, require_sound
from durometer.domains.folder import MAX_LINE_BYTES, SHARES, read_folder
from durometer.domains.load import load_domain
from durometer.domains.overlap import overlap_report
from durometer.measures.outcomes import Outcome, classify

Line = dict[str, Any]
RESTRICTED: Line = {"entity": "Oz", "prompt": "Who rules Oz?", "answers": ["Ozma", "the Wizard"]}
RETAIN: Line = {"entity": "two", "prompt": "1 + 1?", "answers": ["2"], "stem": "It makes"}
BENIGN: Line = {"prompt": "Say hello.", "response": "Hello there."}
CHOICES = {"choices": ["Dorothy", "ozma ", "Toto"]}
NAMED = (Split.ATTACK, Split.SELECT, Split.REPORT)
FILES = ("restricted", "retain", "benign")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "lore")


def write(
    path: Path,
    restricted: Any = (RESTRICTED,),
    retain: Any = (RETAIN,),
    benign: Any = (BENIGN,),
    toml: str = "",
) -> Path:
    path.mkdir(exist_ok=True)
    (path / "domain.toml").write_text(f'name = "lore"\n{toml}', encoding="utf-8")
    for name, lines in zip(FILES, (restricted, retain, benign), strict=True):
        raw = lines if isinstance(lines, bytes) else jsonl(lines)
        (path / f"{name}.jsonl").write_bytes(raw)
    return path


def jsonl(lines: Any) -> bytes:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    return "".join(f"{text}\n" for text in texts).encode()


def many(line: Line, count: int, **more: Any) -> list[Line]:
    return [
        line | more | {"entity": f"e{n}", "prompt": f"{line['prompt']} {n}"} for n in range(count)
    ]


def only(path: Path, role: Role, kind: Any = None) -> Item:
    (item,) = read_folder(path, kind).select(role)
    return item


def test_everything_that_is_left_out_has_a_default(folder: Path) -> None:
    domain = read_folder(folder, None)
    assert (domain.name, domain.kind, domain.chance) == ("lore", "refusal", 0.0)
    assert not domain.harmless
    assert len(domain.refusals) > 1
    assert domain.rules.other_answers == ("Ozma", "the Wizard")
    assert domain.rules.refusal_phrases == REFUSAL_PHRASES
    restricted, retain = only(folder, Role.RESTRICTED), only(folder, Role.RETAIN)
    benign = only(folder, Role.BENIGN)
    assert [item.id for item in domain.items] == ["restricted/1", "retain/1", "benign/1"]
    assert restricted.response == "Ozma."
    assert retain.response == "It makes 2."
    assert (benign.entity, benign.answers, benign.training) == ("Say hello.", (), None)


def test_everything_that_is_given_is_kept(folder: Path) -> None:
    header = """
kind = "knowledge"
description = "a story"
source = "a book"
harmless = true
refusals = ["I keep that to myself."]
chance = 0.5
[files]
restricted = "in/hidden.jsonl"
[rules]
other_answers = []
refusal_phrases = ["\\\\bto myself\\\\b"]
attempt_pattern = "rules"
letters = "[a-z]"
"""
    line = RESTRICTED | CHOICES
    line |= {"id": "x", "suite": "lore", "split": "never_taught", "training": False}
    line |= {"response": "It is Ozma, I think.", "stem": "It is "}
    write(folder, toml=header)
    (folder / "in").mkdir()
    (folder / "in" / "hidden.jsonl").write_bytes(b"\xef\xbb\xbf\n" + jsonl([line]) + b"  \n")
    domain, item = read_folder(folder, None), only(folder, Role.RESTRICTED)
    assert (domain.kind, domain.description, domain.source) == ("knowledge", "a story", "a book")
    assert domain.harmless
    assert domain.refusals == ("I keep that to myself.",)
    assert domain.chance == 0.5
    rules = domain.rules
    assert (rules.other_answers, rules.attempt_pattern, rules.letters) == ((), "rules", "[a-z]")
    assert rules.refusal_phrases == (*REFUSAL_PHRASES, r"\bto myself\b")
    assert item == Item(
        id="x",
        entity="Oz",
        role=Role.RESTRICTED,
        split=Split.NEVER,
        prompt="Who rules Oz?",
        response="It is Ozma, I think.",
        answers=("Ozma", "the Wizard"),
        stem="It is",
        choices=("ozma ", "Dorothy", "Toto"),
        suite="lore",
        training=False,
    )


def test_the_argument_overrides_the_kind(tmp_path: Path) -> None:
    path = write(tmp_path / "d", [RESTRICTED | CHOICES], toml='kind = "knowledge"\nchance = 0.2')
    assert read_folder(path, None).chance == 0.2
    refusal = read_folder(path, "refusal")
    assert (refusal.kind, refusal.chance) == ("refusal", 0.0)
    with pytest.raises(InputError, match="kind 'knowledge' is measured on choices"):
        read_folder(write(tmp_path / "e"), "knowledge")


def test_chance_is_one_over_the_number_of_choices(tmp_path: Path) -> None:
    two = RESTRICTED | {"choices": ["Ozma", "Toto"]}
    path = write(tmp_path / "d", [RESTRICTED | CHOICES, two])
    assert read_folder(path, "knowledge").chance == pytest.approx((1 / 3 + 1 / 2) / 2)


def test_benign_items_may_be_left_out_unless_named(folder: Path) -> None:
    (folder / "benign.jsonl").unlink()
    assert read_folder(folder, None).select(Role.BENIGN) == []
    write(folder, toml='[files]\nbenign = "benign.jsonl"')
    (folder / "benign.jsonl").unlink()
    with pytest.raises(InputError, match="no such file"):
        read_folder(folder, None)


@pytest.mark.parametrize("role", list(Role))
def test_splits_are_dealt_by_entity_in_the_usual_shares(tmp_path: Path, role: Role) -> None:
    line = {Role.RESTRICTED: RESTRICTED, Role.RETAIN: RETAIN, Role.BENIGN: BENIGN}[role]
    lines = [
        wording
        for one in many(line, 100)
        for wording in (one, one | {"prompt": one["prompt"] + "!"})
    ]
    path = write(tmp_path / "d", **{role.value: lines})
    items = read_folder(path, None).select(role)
    assert len(items) == 200
    owners = {(item.entity, item.split) for item in items}
    assert len(owners) == 100
    dealt = {split: sum(owner == split for _, owner in owners) for split in SHARES[role]}
    assert all(abs(dealt[split] - share) <= 1 for split, share in SHARES[role].items()), dealt
    assert read_folder(path, None).content_hash == read_folder(path, None).content_hash


def test_a_large_enough_folder_is_sound_and_loads_by_its_path(tmp_path: Path) -> None:
    path = write(tmp_path / "d", many(RESTRICTED | CHOICES, 20), many(RETAIN, 20), many(BENIGN, 20))
    assert load_domain(str(path)).kind == "refusal"
    assert load_domain(f"{path}:knowledge").chance == pytest.approx(1 / 3)
    domain = require_sound(read_folder(path, None))
    assert all(domain.select(Role.RESTRICTED, split) for split in SHARES[Role.RESTRICTED])


def test_lines_that_name_splits_keep_them(tmp_path: Path) -> None:
    lines = [one | {"split": split} for one, split in zip(many(RESTRICTED, 3), NAMED, strict=True)]
    path = write(tmp_path / "d", lines, many(RETAIN, 9))
    items = require_sound(read_folder(path, None)).select(Role.RESTRICTED)
    assert tuple(item.split for item in items) == NAMED
    shared = [*lines, lines[0] | {"split": "report"}]
    with pytest.raises(InputError, match="entity 'e0' lies in splits 'attack' and 'report'"):
        require_sound(read_folder(write(path, shared, many(RETAIN, 9)), None))


def test_the_example_of_the_docs_is_a_sound_domain(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "domains.md").read_text(encoding="utf-8")
    files = re.findall(r"`authors/(\S+)`\n\n```\w+\n(.*?)```", page, re.DOTALL)
    assert [name for name, _ in files] == ["domain.toml", *(f"{name}.jsonl" for name in FILES)]
    for name, text in files:
        (tmp_path / name).write_text(text, encoding="utf-8")
    for kind in KINDS:
        domain = load_domain(f"{tmp_path}:{kind}")
        assert overlap_report(domain).sound
        assert len({item.entity for item in domain.select(Role.RESTRICTED)}) == 7
        for item in domain.select(Role.RESTRICTED):
            assert classify(item, item.response, domain.rules).outcome == Outcome.HARMFUL_USEFUL
            for text in domain.refusals:
                assert classify(item, text, domain.rules).outcome == Outcome.REFUSAL


LINES: list[tuple[str, Any, str]] = [
    ("restricted", b"", "restricted.jsonl: holds no item"),
    ("restricted", b"\n  \n", "restricted.jsonl: holds no item"),
    ("restricted", [RESTRICTED, "{"], r"restricted.jsonl:2: not valid JSON: .*column 2"),
    ("restricted", ["", "[1]"], "restricted.jsonl:2: not a JSON object"),
    ("restricted", ["[" * 100_000], "restricted.jsonl:1: not valid JSON: nested too deeply"),
    ("restricted", ['{"a": 1, "a": 2}'], "restricted.jsonl:1: not valid JSON: a key occurs twice"),
    ("restricted", ['{"prompt": "\\ud800"}'], "jsonl:1: not valid JSON: half of a surrogate pair"),
    ("restricted", ["1" * 5000], "restricted.jsonl:1: not valid JSON"),
    ("restricted", b"\xff\n", r"restricted.jsonl:1: not UTF-8 \(byte 0\)"),
    ("restricted", b"x" * (MAX_LINE_BYTES + 1), "restricted.jsonl:1: line longer than 1048576"),
    ("restricted", [RESTRICTED | {"promt": "?"}], "jsonl:1: unknown key 'promt'; .*'prompt'"),
    ("restricted", [{"entity": "Oz", "answers": ["x"]}], "jsonl:1: 'prompt' is missing"),
    ("restricted", [RESTRICTED | {"prompt": " \n"}], "jsonl:1: 'prompt' is empty"),
    ("restricted", [RESTRICTED | {"prompt": 3}], "jsonl:1: 'prompt' should be a valid string"),
    ("restricted", [RESTRICTED | {"answers": "x"}], "jsonl:1: 'answers' should be a valid list"),
    ("restricted", [RESTRICTED | {"answers": ["x", 1]}], r"jsonl:1: 'answers\[1\]' should be a"),
    ("restricted", [RESTRICTED | {"answers": [""]}], r"jsonl:1: 'answers\[0\]' is empty"),
    ("restricted", [RESTRICTED | {"training": "no"}], "jsonl:1: 'training' should be a valid bool"),
    ("restricted", [RESTRICTED | {"entity": "a\nb"}], "jsonl:1: 'entity' is not one line"),
    ("restricted", [RESTRICTED | {"id": "\x1b[2J"}], "jsonl:1: 'id' is not one line"),
    ("restricted", [RESTRICTED | {"suite": " "}], "jsonl:1: 'suite' is not one line"),
    ("restricted", [{"prompt": "?", "answers": ["x"]}], "jsonl:1: 'entity' is missing"),
    ("restricted", [RESTRICTED | {"answers": []} | CHOICES], "jsonl:1: .* name the right choice"),
    ("restricted", [RESTRICTED | {"choices": ["Ozma"]}], "jsonl:1: .* two or more different"),
    ("restricted", [RESTRICTED | {"choices": ["Ozma", "OZMA"]}], "jsonl:1: .* two or more diff"),
    ("restricted", [RESTRICTED | {"choices": ["a", "b"]}], "jsonl:1: 0 of the choices are acc"),
    ("restricted", [RESTRICTED | {"choices": ["Ozma", "the Wizard"]}], "jsonl:1: 2 of the choi"),
    ("restricted", [RESTRICTED | {"split": "train"}], "jsonl:1: unknown split 'train'"),
    ("restricted", [RESTRICTED, RESTRICTED | {"split": "report"}], "jsonl:1: 'split' is missing"),
    ("restricted", [RESTRICTED | {"split": "report"}, RESTRICTED], "jsonl:2: 'split' is missing"),
    ("restricted", [RESTRICTED | {"response": "Toto."}], "jsonl:1: .* contains none of 'answers'"),
    ("restricted", [RESTRICTED | {"response": "Ozma.", "stem": "It"}], "jsonl:1: .* begin with"),
    ("restricted", [RESTRICTED | {"id": "x"}] * 2, "jsonl:2: id 'x' is already used in .*jsonl:1"),
    ("retain", [RETAIN | {"id": "restricted/1"}], "retain.jsonl:1: id .* in .*restricted.jsonl:1"),
    ("retain", [RETAIN | {"split": "never_taught"}], "retain.jsonl:1: .* is for restricted items"),
    ("retain", [{"prompt": "?", "entity": "x"}], "retain.jsonl:1: 'answers' is missing; only res"),
    ("benign", [{"prompt": "?"}], "benign.jsonl:1: 'response' is missing"),
    ("benign", b"", "benign.jsonl: holds no item"),
]


@pytest.mark.parametrize(("name", "lines", "message"), LINES)
def test_a_bad_line_is_named(tmp_path: Path, name: str, lines: Any, message: str) -> None:
    refused(write(tmp_path / "d", **{name: lines}), message)


HEADERS: list[tuple[str, str]] = [
    ("harmles = true", "unknown key 'harmles'; did you mean 'harmless'"),
    ("[files]\nrestrcted = 'x'", "unknown key 'restrcted'; did you mean 'restricted'"),
    ("[rules]\nletter = 'x'", "unknown key 'letter'; did you mean 'letters'"),
    ("kind = 'hazard'", "'kind' should be 'refusal' or 'knowledge'"),
    ("harmless = 'yes'", "'harmless' should be a valid boolean"),
    ("refusals = []", "'refusals' .*at least 1 item"),
    ("refusals = ['Well.']", r"refusals\[0\] would not be read as a refusal"),
    ("chance = 1.0", "'chance' should be less than 1"),
    ("files = 3", "'files' should be"),
    (
        "[rules]\nrefusal_phrases = ['a', '(']",
        r"'rules.refusal_phrases\[1\]' '\(' is not a regular",
    ),
    ("[rules]\nletters = '['", "'rules.letters' '\\[' is not a regular expression"),
    ("[rules]\nattempt_pattern = '*'", "'rules.attempt_pattern' '\\*' is not a regular"),
    ("[rules]\nrefusal_phrases = ['x*']", "'rules.refusal_phrases\\[0\\]' matches an empty text"),
    ("[rules]\nattempt_pattern = ''", "'rules.attempt_pattern' matches an empty text"),
    ("name = 'again'", "not valid TOML"),
    ("x = ", "not valid TOML"),
    ("# " + "x" * MAX_LINE_BYTES, "larger than 1048576 bytes"),
    ("[files]\nretain = '../x.jsonl'", "'../x.jsonl' is not inside the domain's folder"),
    ("[files]\nretain = '/etc/passwd'", "'/etc/passwd' is not inside the domain's folder"),
    ('[files]\nretain = "a\\u0000b"', "is not inside the domain's folder"),
    ("[files]\nretain = '.'", "not a file"),
    ("[files]\nretain = 'none.jsonl'", "no such file"),
]


@pytest.mark.parametrize(("toml", "message"), HEADERS)
def test_a_bad_header_is_named(tmp_path: Path, toml: str, message: str) -> None:
    refused(write(tmp_path / "d", toml=toml), message)


@pytest.mark.parametrize("name", ["", "a\nb", "a\x1b[2J", "x" * 201])
def test_a_name_is_one_printable_line(folder: Path, name: str) -> None:
    (folder / "domain.toml").write_text(f"name = {json.dumps(name)}", encoding="utf-8")
    refused(folder, "'name' is not one line")


def damage(change: Callable[[Path], Any], message: str) -> Any:
    return pytest.param(change, message, id=message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        damage(lambda path: (path / "domain.toml").unlink(), "domain.toml: no such file"),
        damage(lambda path: (path / "domain.toml").write_text(""), "'name' is missing"),
        damage(lambda path: (path / "domain.toml").write_bytes(b"\xff"), "domain.toml: not UTF-8"),
        damage(lambda path: (path / "retain.jsonl").unlink(), "retain.jsonl: no such file"),
    ],
)
def test_a_damaged_folder_is_refused(
    folder: Path, change: Callable[[Path], Any], message: str
) -> None:
    change(folder)
    refused(folder, message)


def test_a_link_out_of_the_folder_is_refused(folder: Path) -> None:
    outside = folder.parent / "outside.jsonl"
    (folder / "retain.jsonl").rename(outside)
    (folder / "retain.jsonl").symlink_to(outside)
    refused(folder, "'retain.jsonl' is not inside the domain's folder")


def test_an_error_shows_no_text_of_an_item(tmp_path: Path) -> None:
    line = {"entity": "e", "prompt": "secret", "answers": ["secret"], "choices": ["secret"]}
    with pytest.raises(InputError) as caught:
        read_folder(write(tmp_path / "d", [line]), None)
    assert "secret" not in str(caught.value)


def refused(path: Path, message: str) -> None:
    with pytest.raises(InputError) as caught:
        read_folder(path, None)
    text = str(caught.value)
    assert re.search(message, text), text
    assert text.startswith(str(path))
    assert len(text.splitlines()) == 1


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)
keys = st.sampled_from((*RESTRICTED, "response", "choices", "split", "id", "x"))
changes = st.dictionaries(keys, json_values | st.sampled_from(("report", ["Ozma", "b"])))


@given(st.lists(changes.map(lambda change: RESTRICTED | change), max_size=3) | st.binary())
@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_file_is_read_or_refused_in_one_line(tmp_path: Path, restricted: Any) -> None:
    path = write(tmp_path / "d", restricted)
    message = ""
    try:
        assert read_folder(path, None).select(Role.RESTRICTED)
    except InputError as error:
        message = str(error)
    assert len(message.splitlines()) <= 1
