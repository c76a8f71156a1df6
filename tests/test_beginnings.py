"""Beginnings that are run once: which rows share one, and that no score notices."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from durometer.core import forward as forward_module
from durometer.core.beginnings import LEAST, Span, common, spans
from durometer.core.forward import Forward
from durometer.core.rows import Row, tree_size

Model = Any
# Two tokens only, so that random rows share beginnings of all lengths.
tokens = st.lists(st.integers(5, 6), min_size=2, max_size=12).map(tuple)
some_rows = st.lists(
    tokens.flatmap(lambda ids: st.builds(Row, st.just(ids), st.integers(1, len(ids) - 1))),
    min_size=1,
    max_size=20,
)
SHOTS = tuple(5 + index % 50 for index in range(70))
OTHERS = tuple(5 + (3 * index) % 41 for index in range(90))


def question(head: tuple[int, ...], number: int, length: int = 6) -> list[Row]:
    """Return four choices behind one question behind ``head``."""
    asked = (*head, *(60 + (number * 7 + at) % 30 for at in range(length)))
    return [Row((*asked, 91 + choice, 95 + number % 5), len(asked)) for choice in range(4)]


@pytest.fixture(scope="module")
def llama(make_model: Callable[..., Model]) -> Model:
    return make_model("Llama")


def plain_score(model: Model, row: Row) -> float:
    """Score one row with a plain call: no batch, no mask, no cache."""
    with torch.no_grad():
        table = model(torch.tensor([row.ids])).logits[0].double().log_softmax(-1)
    places = range(row.first_label, len(row.ids))
    return sum(float(table[place - 1, row.ids[place]]) for place in places)


@given(some_rows, st.integers(1, 20), st.integers(1, 4))
@settings(max_examples=200, deadline=None, database=None)
def test_spans_are_all_rows_and_share_what_they_say(
    rows: list[Row], nodes: int, least: int
) -> None:
    rows = sorted(rows, key=lambda row: row.ids)
    found = list(spans(rows, nodes, least))
    assert all(before.stop == after.start for before, after in pairwise(found))
    assert (found[0].start, found[-1].stop) == (0, len(rows))
    for span in found:
        own = rows[span.start : span.stop]
        assert own
        assert len({row.ids[: span.length] for row in own}) == 1
        assert all(row.first_label > span.length for row in own)
        assert all(b - a >= least for a, b in pairwise((0, *span.shared)))


def test_a_pack_needs_no_beginning_of_its_own() -> None:
    rows = sorted(question(SHOTS, 1), key=lambda row: row.ids)
    assert list(spans(rows, tree_size(rows))) == [Span(0, 4)]
    (alone,) = spans(rows, tree_size(rows) - 1)
    assert alone == Span(0, 4, (rows[0].first_label - 1,))  # the last token predicts the choices


def test_two_prompts_and_a_long_question_have_a_beginning_each() -> None:
    short = [row for number in range(5) for row in question(SHOTS, number)]
    long = question(OTHERS, 3, length=60)
    rows = sorted([*short, *long, *question((), 1)], key=lambda row: row.ids)
    found = {(span.stop - span.start, span.shared) for span in spans(rows, 80)}
    assert found == {(20, (len(SHOTS),)), (4, (len(OTHERS) + 59,)), (4, ())}


def test_a_beginning_may_lie_behind_another() -> None:
    long = [row for number in range(3) for row in question(SHOTS, number, length=50)]
    rows = sorted([*long, *question(SHOTS, 4)], key=lambda row: row.ids)
    found = {(span.stop - span.start, span.shared) for span in spans(rows, 40)}
    assert found == {(4, (70,)), (4, (70, 119))}


def test_what_is_short_is_not_worth_a_pass() -> None:
    head = SHOTS[: LEAST - 7]
    rows = sorted((row for n in range(5) for row in question(head, n)), key=lambda row: row.ids)
    assert {span.shared for span in spans(rows, 40)} == {()}


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("Llama", {}),
        ("Qwen3", {"head_dim": 8}),
        ("GPTNeoX", {}),
        ("Mistral", {"sliding_window": 100}),
        ("Gemma3", {"sliding_window": 100, "head_dim": 8}),
    ],
)
def test_no_score_notices_that_beginnings_are_shared(
    architecture: str,
    changes: dict[str, Any],
    make_model: Callable[..., Model],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(forward_module, "NODES_PER_SCORING_PACK", 40)
    model = make_model(architecture, **changes)
    rows = [row for number in range(6) for row in question(SHOTS, number)]
    rows += [*question((), 2), *question(SHOTS[:20], 1), Row(SHOTS[:50], 1)]
    seen: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda module, args, options: seen.append(options["input_ids"].shape[1]), with_kwargs=True
    )
    scores = Forward(model, tree=True).score(rows)
    handle.remove()
    for row, score in zip(rows, scores, strict=True):
        assert score.log_probability == pytest.approx(plain_score(model, row), abs=2e-4)
        assert score.labels == len(row.labels)
    # Without sharing every pack of the six questions would hold their 70 tokens again.
    assert sum(seen) < 1.5 * tree_size(rows)


def test_a_beginning_is_never_longer_than_what_the_model_sees(
    make_model: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward_module, "NODES_PER_SCORING_PACK", 40)
    model = make_model("Mistral", sliding_window=80)
    rows = [row for number in range(6) for row in question(SHOTS, number)]
    masks: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, options: masks.append(
            0 if options.get("attention_mask") is None else options["attention_mask"].shape[-1]
        ),
        with_kwargs=True,
    )
    scores = Forward(model, tree=True).score(rows)
    assert max(masks) <= 80
    for row, score in zip(rows, scores, strict=True):
        assert score.log_probability == pytest.approx(plain_score(model, row), abs=2e-4)


def test_padded_batches_hold_rows_of_like_length(llama: Model) -> None:
    rows = [Row(tuple(range(5, 7 + (13 * n) % 60)), 1) for n in range(40)]
    sizes: list[tuple[int, int]] = []
    handle = llama.register_forward_pre_hook(
        lambda module, args, options: sizes.append(tuple(options["input_ids"].shape)),
        with_kwargs=True,
    )
    scores = Forward(llama, tree=False).score(rows)
    handle.remove()
    given = [rows[start : start + 16] for start in range(0, len(rows), 16)]
    unsorted = sum(len(part) * max(len(row.ids) for row in part) for part in given)
    assert sum(rows * length for rows, length in sizes) < 0.75 * unsorted
    assert [score.labels for score in scores] == [len(row.labels) for row in rows]


def test_what_two_rows_share() -> None:
    assert common((1, 2, 3), (1, 2, 4)) == 2
    assert common((1, 2), (1, 2, 4)) == 2
    assert common((), (1,)) == 0
