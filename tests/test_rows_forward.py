"""Tree packs against padded batches and against plain calls of transformers, row by row."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from durometer.core.forward import LAYOUT_TOLERANCE, Forward, RowScore, supports_tree
from durometer.core.rows import Row, tree_packs, tree_size

Model = Any
examples = settings(max_examples=30, deadline=None, database=None)
# Four tokens only, so that random rows share prefixes, repeat each other and begin each other.
tokens = st.lists(st.integers(5, 8), min_size=2, max_size=9).map(tuple)
rows_of = st.lists(
    tokens.flatmap(lambda ids: st.builds(Row, st.just(ids), st.integers(1, len(ids) - 1))),
    min_size=1,
    max_size=9,
)
HEAD = (5, 6, 7, 8, 9, 10)
CASES: dict[str, list[Row]] = {
    "one row": [Row((*HEAD, 11, 12), 6)],
    "first label 1": [Row(HEAD, 1), Row((5, 6, 20, 21), 1)],
    "one label": [Row(HEAD, len(HEAD) - 1)],
    "identical rows": [Row(HEAD, 3)] * 3,
    "identical ids, other labels": [Row(HEAD, 1), Row(HEAD, 3), Row(HEAD, 5)],
    "prefix fully shared": [Row(HEAD[:4], 2), Row(HEAD, 4), Row(HEAD[:5], 4)],
    "one prompt, many responses": [Row((*HEAD, 20 + i, 30 + i), 6) for i in range(4)],
    "one response, many prompts": [Row((20 + i, *HEAD), 4) for i in range(4)],
    "nothing shared": [Row(tuple(range(10 * i + 5, 10 * i + 12)), 3) for i in range(4)],
    "more than one padded batch": [Row((*HEAD, 20 + i, 50 + i % 7), 6) for i in range(35)],
}


@pytest.fixture(scope="module")
def llama(make_model: Callable[..., Model]) -> Model:
    return make_model("Llama")


def by_label(forward: Forward, rows: Sequence[Row], nodes: int = 512) -> list[torch.Tensor]:
    """Return, for each row, its logits [labels, vocabulary]; the targets are checked here."""
    logits: dict[int, torch.Tensor] = {}
    for part in forward.labelled(rows, nodes):
        for index in part.rows.unique().tolist():
            assert index not in logits
            logits[index] = part.logits[part.rows == index]
            assert tuple(part.targets[part.rows == index].tolist()) == rows[index].labels
    return [logits[index] for index in range(len(rows))]


def reference_score(model: Model, row: Row) -> RowScore:
    """Score one row with a plain call: no batch, no mask, no positions."""
    with torch.no_grad():
        logits = model(torch.tensor([row.ids])).logits[0].double()
    values, greedy = [], True
    for position in range(row.first_label, len(row.ids)):
        distribution = logits[position - 1].softmax(-1)
        values.append(float(distribution[row.ids[position]]))
        greedy &= int(distribution.argmax()) == row.ids[position]
    log_sum = float(torch.tensor(values, dtype=torch.double).log().sum())
    return RowScore(log_sum, sum(values) / len(values), len(values), greedy)


def gradients(model: Model, forward: Forward, rows: Sequence[Row], nodes: int) -> dict[str, Any]:
    model.zero_grad()
    for part in forward.labelled(rows, nodes):
        functional.cross_entropy(part.logits, part.targets, reduction="sum").backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def prefixes_of(rows: Sequence[Row]) -> set[tuple[int, ...]]:
    return {row.ids[:end] for row in rows for end in range(1, len(row.ids) + 1)}


@given(rows_of, st.integers(1, 40), st.integers(1, 3))
@settings(max_examples=100, deadline=None, database=None)
def test_a_pack_is_the_tree_of_its_prefixes(rows: list[Row], nodes: int, unit: int) -> None:
    members: list[int] = []
    own: list[Row] = []
    for indices, pack in tree_packs(rows, nodes, unit):
        if members:  # the last pack had no room for these
            assert len(prefixes_of([*own, *rows[indices[0] : indices[0] + unit]])) > nodes
        members += indices
        own = [rows[index] for index in indices]
        prefixes = prefixes_of(own)
        assert len(pack.ids) == len(prefixes) == tree_size(own)
        assert len(prefixes) <= nodes or len(indices) <= unit
        assert indices[0] % unit == 0
        paths = []
        for node in range(len(pack.ids)):
            seen = pack.visible[node].nonzero()[:, 0]
            seen = seen[pack.positions[seen].argsort()]
            assert pack.positions[seen].tolist() == list(range(len(seen)))
            assert seen[-1] == node
            paths.append(tuple(pack.ids[seen].tolist()))
        assert set(paths) == prefixes
        labels = [
            (i, row.ids[:p], row.ids[p])
            for i, row in enumerate(own)
            for p in range(row.first_label, len(row.ids))
        ]
        columns = (pack.rows.tolist(), pack.predictors.tolist(), pack.targets.tolist())
        found = [(i, paths[node], target) for i, node, target in zip(*columns, strict=True)]
        assert found == labels
    assert members == list(range(len(rows)))


@given(rows_of, st.integers(1, 60))
@examples
def test_trees_equal_padded_batches(llama: Model, rows: list[Row], nodes: int) -> None:
    tree, flat = Forward(llama, tree=True), Forward(llama, tree=False)
    for ours, theirs in zip(by_label(tree, rows, nodes), by_label(flat, rows), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    losses = [sum(float(x.detach()) for x in f.loss_sums(rows)) for f in (tree, flat)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    expected = gradients(llama, flat, rows, nodes)
    for name, gradient in gradients(llama, tree, rows, nodes).items():
        torch.testing.assert_close(gradient, expected[name], atol=2e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("tree", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_scores_equal_plain_calls(llama: Model, case: str, tree: bool) -> None:
    scores = Forward(llama, tree=tree).score(CASES[case])
    for row, score in zip(CASES[case], scores, strict=True):
        expected = reference_score(llama, row)
        assert score.log_probability == pytest.approx(expected.log_probability, rel=1e-5)
        assert score.mean_probability == pytest.approx(expected.mean_probability, rel=1e-4)
        assert (score.labels, score.greedy) == (expected.labels, expected.greedy)


@pytest.mark.parametrize("tree", [True, False])
def test_greedy_means_that_greedy_decoding_gives_every_label(llama: Model, tree: bool) -> None:
    ids = list(HEAD)
    with torch.no_grad():
        for _ in range(4):
            ids.append(int(llama(torch.tensor([ids])).logits[0, -1].argmax()))
    other = [*ids[:-1], (ids[-1] + 1) % 101]
    early = [*HEAD, (ids[6] + 1) % 101, *ids[7:]]
    rows = [Row(tuple(row), 6) for row in (ids, other, early)]
    assert [s.greedy for s in Forward(llama, tree=tree).score(rows)] == [True, False, False]


@pytest.mark.parametrize("tree", [True, False])
def test_scores_keep_the_order_given(llama: Model, tree: bool) -> None:
    forward = Forward(llama, tree=tree)
    rows = list(itertools.chain(*CASES.values()))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(3)).tolist()
    scores, shuffled = forward.score(rows), forward.score([rows[index] for index in order])
    for place, index in enumerate(order):
        ours, theirs = shuffled[place].log_probability, scores[index].log_probability
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert len({round(score.log_probability, 3) for score in scores}) > 20  # so order matters


def test_no_rows_have_no_scores(llama: Model) -> None:
    assert Forward(llama, tree=True).score([]) == Forward(llama, tree=False).score([]) == []


@pytest.mark.parametrize(("ids", "first"), [((5, 6), 0), ((5, 6), -1), ((5, 6), 2), ((), 1)])
def test_a_row_has_something_to_predict_and_something_to_predict_it_from(
    ids: tuple[int, ...], first: int
) -> None:
    with pytest.raises(ValueError, match="first_label"):
        Row(ids, first)


# Architecture, changes of its configuration, dtype, whether tree packs are right for it.
ARCHITECTURES: list[tuple[str, dict[str, Any], torch.dtype, bool]] = [
    ("Llama", {}, torch.float32, True),
    ("Llama", {}, torch.bfloat16, True),
    ("Qwen2", {}, torch.float32, True),
    ("Qwen3", {"head_dim": 8}, torch.float32, True),
    ("Gemma2", {"head_dim": 8, "query_pre_attn_scalar": 8}, torch.float32, True),
    ("Olmo2", {}, torch.float32, True),
    ("Phi", {}, torch.float32, True),
    ("GPTNeoX", {}, torch.float32, True),
    ("GPTNeoX", {}, torch.bfloat16, True),
    ("Mistral", {"sliding_window": 8}, torch.float32, False),
    ("Mamba", {}, torch.float32, False),
    ("Mamba", {}, torch.bfloat16, False),
    # its leak between branches is smaller than the rounding of bf16
    ("Jamba", {"initializer_range": 0.02}, torch.bfloat16, False),
]


@pytest.mark.parametrize(("architecture", "changes", "dtype", "expected"), ARCHITECTURES)
def test_trees_are_tried_not_assumed(
    make_model: Callable[..., Model],
    architecture: str,
    changes: dict[str, Any],
    dtype: torch.dtype,
    expected: bool,
) -> None:
    model = make_model(architecture, **changes).to(dtype)
    assert supports_tree(model) is expected
    flat = Forward(model, tree=False).score(CASES["one prompt, many responses"])
    trees = Forward(model, tree=expected).score(CASES["one prompt, many responses"])
    tolerance = 1e-4 if dtype == torch.float32 else 0.2
    for ours, theirs in zip(trees, flat, strict=True):
        assert ours.log_probability == pytest.approx(theirs.log_probability, abs=tolerance)


def test_trying_ignores_dropout_and_keeps_the_mode(make_model: Callable[..., Model]) -> None:
    model = make_model("Llama", attention_dropout=0.5)
    for training in (True, False):
        assert supports_tree(model.train(training))
        assert model.training is training
        assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("Mistral", {"sliding_window": 16}),
        ("Gemma2", {"sliding_window": 16, "head_dim": 8, "query_pre_attn_scalar": 8}),
        ("Gemma3", {"sliding_window": 16, "head_dim": 8}),
        ("Llama4", {"attention_chunk_size": 16, "head_dim": 8, "intermediate_size_mlp": 64}),
    ],
)
def test_rows_longer_than_a_window_are_no_tree(
    make_model: Callable[..., Model], architecture: str, changes: dict[str, Any]
) -> None:
    """The mask of a pack shows every ancestor, also those that lie outside the window."""
    model = make_model(architecture, **changes)
    assert supports_tree(model)
    short = [Row((*range(5, 17), 20 + i, 30 + i), 9) for i in range(6)]
    long = [Row((*range(5, 35), 40 + i, 50 + i), 25) for i in range(3)]
    for rows in (short, long, [*short, *long]):
        for row, score in zip(rows, Forward(model, tree=True).score(rows), strict=True):
            expected = reference_score(model, row).log_probability
            assert score.log_probability == pytest.approx(expected, abs=1e-3)


def test_short_rows_stay_trees_under_a_window(make_model: Callable[..., Model]) -> None:
    model = make_model("Mistral", sliding_window=16)
    rows = [Row((*range(5, 17), 20 + i, 30 + i), 9) for i in range(6)]
    masks = []
    model.register_forward_pre_hook(
        lambda module, args, options: masks.append(options["attention_mask"].shape),
        with_kwargs=True,
    )
    Forward(model, tree=True).score(rows)
    assert all(len(shape) == 4 and shape[-1] <= 16 for shape in masks)


def layouts(model: Model) -> list[tuple[int, ...]]:
    """Return a list that fills with the shape of the mask of every pass."""
    shapes: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(
        lambda module, args, options: shapes.append(tuple(options["attention_mask"].shape)),
        with_kwargs=True,
    )
    return shapes


PAIRS = [Row((*range(5, 12), *range(20 + i, 24 + j)), 7) for i in range(10) for j in (i, i + 3)]


@pytest.mark.parametrize(
    # Nodes that are allowed in a window, and in a whole pass.
    ("window", "most", "tree"),
    [(10_000, 10_000, True), (40, 10_000, False), (10_000, 40, False)],
)
def test_whole_batches_take_one_pass_whatever_they_take(
    make_model: Callable[..., Model],
    monkeypatch: pytest.MonkeyPatch,
    window: int,
    most: int,
    tree: bool,
) -> None:
    monkeypatch.setattr("durometer.core.forward.NODES_PER_WHOLE_PACK", most)
    model = make_model("Mistral", sliding_window=window)
    shapes = layouts(model)
    forward = Forward(model, tree=True)
    (part,) = forward.labelled(PAIRS, whole=True)
    assert part.members == tuple(range(20))
    assert (len(shapes[0]) == 4) is tree
    assert len(shapes) == 1
    for index, logits in enumerate(by_label(forward, PAIRS)):
        torch.testing.assert_close(part.logits[part.rows == index], logits, atol=1e-5, rtol=1e-5)
    assert list(forward.labelled([], whole=True)) == []


@pytest.mark.parametrize("tree", [True, False])
@pytest.mark.parametrize(("window", "unit"), [(40, 2), (16, 2), (13, 2), (40, 5), (16, 5)])
def test_rows_that_belong_together_are_never_parted(
    make_model: Callable[..., Model], window: int, unit: int, tree: bool
) -> None:
    model = make_model("Mistral", sliding_window=window)
    forward = Forward(model, tree=tree)
    expected = by_label(Forward(model, tree=False), PAIRS)
    passes = list(forward.labelled(PAIRS, unit=unit))
    assert [index for part in passes for index in part.members] == list(range(20))
    assert len(passes) > 1
    for part in passes:
        assert part.members[0] % unit == len(part.members) % unit == 0
        for index in part.members:
            own = part.logits[part.rows == index]
            torch.testing.assert_close(own, expected[index], atol=1e-5, rtol=1e-5)


@given(rows_of)
@examples
def test_bf16_layouts_agree_within_the_tolerance(narrow_llama: Model, rows: list[Row]) -> None:
    """Both layouts round, each in its own way; what is allowed is a few units of bf16."""
    with torch.no_grad():
        trees = torch.cat(by_label(Forward(narrow_llama, tree=True), rows)).float()
        flat = torch.cat(by_label(Forward(narrow_llama, tree=False), rows)).float()
    assert (trees - flat).abs().max() <= LAYOUT_TOLERANCE[torch.bfloat16] * flat.std()


@pytest.fixture(scope="module")
def narrow_llama(make_model: Callable[..., Model]) -> Model:
    return make_model("Llama").to(torch.bfloat16)
