"""Fuzzing of the readers of an audit: no crash, no hang, bounded memory; found cases are kept."""

import io
import pickle
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hostile import GGUFS, PICKLES, SAFETENSORS, ZIPS, gguf, zipped
from hostile import st as safetensors_file
from hypothesis import given, settings
from hypothesis import strategies as st

from durometer.audit.files import check_files, read_artefact
from durometer.audit.template import check_templates, parse_template, static_findings
from durometer.audit.weights import check_values, check_weights, read_weights
from durometer.formats.pickles import read_zip, walk_stream

MEMORY = 96 << 20
"""Most bytes that a reader may take for a file of at most a few kilobytes."""

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
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()


def examine(data: bytes, name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / name).write_bytes(data)
        artefact = read_artefact(Path(folder))
        weights = read_weights(artefact)
        list(check_files(artefact))
        list(check_weights(artefact, weights))
        list(check_values(artefact, weights))


@given(st.one_of(st.binary(max_size=400), changed([VALID, *PICKLES.values()])))
@settings(deadline=None, max_examples=250)
def test_pickles(data: bytes) -> None:
    bounded(lambda: walk_stream(io.BytesIO(data), len(data)))


@given(changed([VALID, *(data for data in PICKLES.values())]))
@settings(deadline=None, max_examples=150)
def test_what_can_be_unpickled_is_never_called_damaged_and_empty(data: bytes) -> None:
    facts = walk_stream(io.BytesIO(data), len(data))
    assert facts.stopped or facts.damage
    assert all(not each.called or each.position < len(data) for each in facts.unlisted)


@given(changed([data for name, data in ZIPS.items() if name != "expands"]))
@settings(deadline=None, max_examples=120)
def test_archives(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.zip"
        path.write_bytes(data)
        bounded(lambda: read_zip(path))


@given(changed([safetensors_file({}), *(d for d in SAFETENSORS.values() if len(d) < 999)]))
@settings(deadline=None, max_examples=100)
def test_safetensors(data: bytes) -> None:
    bounded(lambda: examine(data, "model.safetensors"))


@given(changed([gguf(), *GGUFS.values()]))
@settings(deadline=None, max_examples=100)
def test_gguf(data: bytes) -> None:
    bounded(lambda: examine(data, "model.gguf"))


@given(st.one_of(st.binary(max_size=300), changed([VALID, zipped({"a": VALID}), gguf()])))
@settings(deadline=None, max_examples=60)
def test_files_of_any_kind(data: bytes) -> None:
    bounded(lambda: examine(data, "file"))


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
