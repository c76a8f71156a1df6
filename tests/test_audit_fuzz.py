"""Fuzzing of the readers of an audit: no crash, no hang, bounded memory; found cases are kept."""

import io
import pickle
import random
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hostile import GGUFS, PICKLES, SAFETENSORS, ZIPS, gguf, zipped
from hostile import st as safetensors_file
from hypothesis import given, settings
from hypothesis import strategies as st

import fuzz_audit
from durometer.audit.template import check_templates, parse_template, static_findings
from durometer.formats.pickles import read_zip, walk_stream

VALID = pickle.dumps({"a": [1, 2.5, "text", None, True], "b": (b"bytes" * 9, {3})}, 2)
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' and 'x' in m.content|lower %}{{ m.content[1:] }}"
    "{% endif %}{% endfor %}{% set ns = namespace(a='_' ~ 'b') %}{{ ns.a|attr('c') }}"
)
KEPT_TEMPLATES = [
    "{{ 'a' * 10000000000 }}",  # jinja2's meta functions fold constants, and built this text
    "{{ " + "(" * 5000 + ")" * 5000 + " }}",
    "{{ " + "1" * 5000 + " }}",
    "{{ 10 ** 10 ** 10 }}",
    "{{ a" + "[0]" * 3000 + " }}",
    "{% if a %}" * 500,
    "{#",
    "\0",
    "{{ '\\ud800' }}",
]


def changed(valid: list[bytes]) -> st.SearchStrategy[bytes]:
    """Return a strategy: a file of the list with some bytes overwritten, inserted or cut off."""

    @st.composite
    def build(draw: st.DrawFn) -> bytes:
        data = bytearray(draw(st.sampled_from(valid)))
        for _ in range(draw(st.integers(1, 4))):
            place = draw(st.integers(0, max(len(data) - 1, 0)))
            new = draw(st.binary(min_size=0, max_size=9))
            data[place : place + draw(st.integers(0, 9))] = new
        return bytes(data)

    return build()


def bounded(action: Callable[[], object]) -> None:
    tracemalloc.start()
    try:
        action()
        assert tracemalloc.get_traced_memory()[1] < fuzz_audit.MEMORY
    finally:
        tracemalloc.stop()


@given(st.one_of(st.binary(max_size=400), changed([VALID, *PICKLES.values()])))
@settings(deadline=None, max_examples=250)
def test_pickles(data: bytes) -> None:
    fuzz_audit.bounded(fuzz_audit.TARGETS["pickle"], data)


@given(changed([VALID, *(data for data in PICKLES.values())]))
@settings(deadline=None, max_examples=150)
def test_what_can_be_unpickled_is_never_called_damaged_and_empty(data: bytes) -> None:
    facts = walk_stream(io.BytesIO(data), len(data))
    assert facts.stopped or facts.damage
    assert all(not each.called or each.position < len(data) for each in facts.unlisted)


@given(changed([data for name, data in ZIPS.items() if name != "expands"]))
@settings(deadline=None, max_examples=120)
def test_archives(data: bytes) -> None:
    fuzz_audit.bounded(fuzz_audit.TARGETS["archive"], data)


@given(changed([safetensors_file({}), *(d for d in SAFETENSORS.values() if len(d) < 999)]))
@settings(deadline=None, max_examples=100)
def test_safetensors(data: bytes) -> None:
    fuzz_audit.bounded(fuzz_audit.TARGETS["safetensors"], data)


@given(changed([gguf(), *GGUFS.values()]))
@settings(deadline=None, max_examples=100)
def test_gguf(data: bytes) -> None:
    fuzz_audit.bounded(fuzz_audit.TARGETS["gguf"], data)


@given(st.one_of(st.binary(max_size=300), changed([VALID, zipped({"a": VALID}), gguf()])))
@settings(deadline=None, max_examples=60)
def test_files_of_any_kind(data: bytes) -> None:
    fuzz_audit.bounded(fuzz_audit.TARGETS["file"], data)


@given(
    st.one_of(
        st.text(max_size=200),
        changed([TEMPLATE.encode()]).map(lambda b: b.decode("utf-8", "replace")),
    )
)
@settings(deadline=None, max_examples=150)
def test_templates_are_parsed(source: str) -> None:
    bounded(lambda: list(static_findings(parse_template("t", "default", source))))


@pytest.mark.parametrize("number", range(len(KEPT_TEMPLATES)))
def test_kept_templates(number: int) -> None:
    template = parse_template("t", "default", KEPT_TEMPLATES[number])
    bounded(lambda: list(static_findings(template)))
    assert list(check_templates([template], None, set()))


# ---- cases kept by tools/fuzz_audit.py -------------------------------------------------------


@pytest.mark.parametrize("name", fuzz_audit.TARGETS)
def test_kept_cases_end_as_they_did(name: str) -> None:
    target, cases = fuzz_audit.TARGETS[name], fuzz_audit.corpus(name)
    assert cases
    for case in cases:
        found, failure = fuzz_audit.tried(target, case["data"])
        assert not failure
        # Which damage of an archive stops the reading differs between versions of Python.
        assert name == "archive" or list(fuzz_audit.classes(found)) == case["outcome"]


def test_a_member_without_a_name_is_read(tmp_path: Path) -> None:
    data = zipped({"a": b"x"}).replace(b"a", b"\0")
    (tmp_path / "a.zip").write_bytes(data)
    assert read_zip(tmp_path / "a.zip").members == [""]


def broken(fault: Callable[[bytes], object]) -> fuzz_audit.Target:
    """Return a reader that fails at a byte 7, and tells whether there is a byte 9."""

    def read(data: bytes) -> tuple[str, ...]:
        if 7 in data:
            fault(data)
        return ("nine" if 9 in data else "none",)

    return fuzz_audit.Target("broken", read, lambda: [bytes(range(10, 60))])


def spin(data: bytes) -> None:
    while True:
        pass


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        (lambda data: {}[data], "KeyError"),
        (lambda data: bytearray(fuzz_audit.MEMORY + 1), "TooLargeError"),
        (spin, "TooSlowError"),
    ],
)
def test_the_fuzzer_finds_what_breaks_a_reader(
    fault: Callable[[bytes], object], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzz_audit, "SECONDS", 0.5)
    _, failure = fuzz_audit.tried(broken(fault), b"\x07")
    assert failure.startswith(named)
    assert fuzz_audit.tried(broken(fault), b"\x09") == (("nine",), "")


def test_the_fuzzer_keeps_short_cases_and_goes_on_from_them(tmp_path: Path) -> None:
    target = broken(lambda data: {}[data])
    kept = fuzz_audit.fuzz(target, 0.5, random.Random(0), tmp_path)
    assert len(kept.failures) == 1
    assert {"nine", "none", "FAILED KeyError"} == set(kept.cases)
    fuzz_audit.write(kept, tmp_path, 1.0)
    cases = fuzz_audit.corpus("broken", tmp_path)
    assert {tuple(case["outcome"]): case["data"] for case in cases} == {
        ("FAILED KeyError",): b"\x07", ("nine",): b"\x09", ("none",): b"",
    }  # fmt: skip
    again = fuzz_audit.fuzz(target, 0.0, random.Random(0), tmp_path)
    assert set(again.cases) == set(kept.cases)


def test_a_run_of_the_fuzzer_is_as_long_as_it_is_told(tmp_path: Path) -> None:
    begun = time.process_time()
    fuzz_audit.fuzz(fuzz_audit.TARGETS["pickle"], 0.2, random.Random(1), tmp_path)
    assert time.process_time() - begun < 2
