"""Weight forensics on small random models with planted changes."""

import json
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from durometer.audit.forensics import ablation, alone, compare, quantisation
from durometer.audit.forensics.comparison import Comparison
from durometer.audit.forensics.grids import BY_NAME, GRIDS
from durometer.audit.forensics.linear_algebra import (
    left_vectors,
    narrowest,
    rounded,
    rounding_energy,
    spectrum,
)
from durometer.audit.forensics.names import place_of, shared_names
from durometer.audit.tensors import ArraySource
from durometer.core import quantisation as reference
from durometer.core.errors import InputError
from durometer.findings import Finding, Severity, Status

State = dict[str, Any]
WIDTH, HIDDEN, LAYERS, VOCABULARY = 64, 128, 4, 96
WRITERS = ("o_proj", "down_proj")
READERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


def matrix(generator: np.random.Generator, rows: int, columns: int) -> Any:
    """A matrix with a spectrum that falls, as trained ones do."""
    w = generator.standard_normal((rows, columns))
    scale = np.arange(1, columns + 1) ** -0.3
    return (w * scale @ np.linalg.qr(generator.standard_normal((columns, columns)))[0]).astype(
        np.float32
    )


def model(seed: int = 0) -> State:
    g = np.random.default_rng(seed)
    state: State = {"model.embed_tokens.weight": matrix(g, VOCABULARY, WIDTH)}
    shapes = {
        "self_attn.q_proj": (WIDTH, WIDTH),
        "self_attn.k_proj": (WIDTH, WIDTH),
        "self_attn.v_proj": (WIDTH, WIDTH),
        "self_attn.o_proj": (WIDTH, WIDTH),
        "mlp.gate_proj": (HIDDEN, WIDTH),
        "mlp.up_proj": (HIDDEN, WIDTH),
        "mlp.down_proj": (WIDTH, HIDDEN),
    }
    for layer in range(LAYERS):
        for part, (rows, columns) in shapes.items():
            state[f"model.layers.{layer}.{part}.weight"] = matrix(g, rows, columns)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            gains = 1 + 0.1 * g.standard_normal(WIDTH)
            state[f"model.layers.{layer}.{norm}.weight"] = gains.astype(np.float32)
    return state


BASE = model()


def direction(seed: int = 5, count: int = 1) -> Any:
    g = np.random.default_rng(seed)
    return np.linalg.qr(g.standard_normal((WIDTH, count)))[0].astype(np.float32)


def edited(roles: Sequence[str], change: Callable[[str, Any], Any], state: State = BASE) -> State:
    return {
        name: np.ascontiguousarray(change(name, value), dtype=np.float32)
        if any(role in name for role in roles)
        else value
        for name, value in state.items()
    }


def removed(v: Any, strength: float, roles: Sequence[str] = WRITERS, state: State = BASE) -> State:
    return edited(roles, lambda _, w: w - strength * v @ (v.T @ w), state)


def everywhere(change: Callable[[Any], Any], state: State = BASE) -> State:
    """Change all matrices."""
    return {n: change(w) if w.ndim == 2 else w for n, w in state.items()}


def stored(state: State, dtype: str = "BF16") -> State:
    return {name: rounded(value, dtype) for name, value in state.items()}


def audit(subject: State, base: State = BASE, *also: State) -> dict[str, Finding]:
    found = compare(ArraySource(subject), ArraySource(base), [ArraySource(state) for state in also])
    json.dumps([finding.evidence for finding in found])
    return {finding.check: finding for finding in found}


def adapter(rank: int, size: float, seed: int = 3, *, shared: bool = False) -> State:
    g = np.random.default_rng(seed)
    left = g.standard_normal((WIDTH, rank))

    def add(name: str, w: Any) -> Any:
        up = left if shared and len(w) == WIDTH else g.standard_normal((len(w), rank))
        change = up @ g.standard_normal((rank, w.shape[1]))
        return w + size * np.linalg.norm(w) / np.linalg.norm(change) * change

    return edited((*WRITERS, *READERS), add)


def noisy(size: float, seed: int = 3) -> State:
    g = np.random.default_rng(seed)
    return edited(
        (*WRITERS, *READERS), lambda _, w: w + size * w.std() * g.standard_normal(w.shape)
    )


# ---- nothing was done ----------------------------------------------------------------------


def test_identical_models_pass() -> None:
    found = audit(dict(BASE))
    assert {f.status for f in found.values()} == {Status.PASSED}
    assert set(found) == {
        "WF-01", "WF-03", "WF-10", "WF-12",
    }  # fmt: skip


@pytest.mark.parametrize(
    "casts", [("BF16",), ("F16",), ("F16", "BF16"), ("F8_E4M3",), ("BF16", "F8_E5M2")]
)
def test_a_cast_is_recognised_and_leaves_nothing_open(casts: Sequence[str]) -> None:
    subject = BASE
    for dtype in casts:
        subject = stored(subject, dtype)
    found = audit(subject)
    assert found["WF-02"].status is Status.PASSED
    assert " then ".join(casts) in found["WF-02"].evidence["casts"]
    assert found["WF-10"].status is Status.PASSED
    assert not {"WF-21", "WF-31"} & set(found)


def test_a_subject_with_more_bits_than_its_base_is_not_called_clean() -> None:
    found = audit(BASE, stored(BASE))
    assert found["WF-02"].status is Status.INCONCLUSIVE
    assert found["WF-02"].evidence["casts"] == ["widened BF16"]


def test_order_of_tensors_and_labels_of_dtypes_change_nothing() -> None:
    subject = stored(removed(direction(), 0.3))
    names = list(subject)
    shuffled = {n: subject[n] for n in np.random.default_rng(1).permutation(names)}
    first = compare(ArraySource(subject), ArraySource(BASE))
    second = compare(ArraySource(shuffled, dict.fromkeys(names, "BF16")), ArraySource(BASE))
    assert [(f.check, f.status, f.title) for f in first] == [
        (f.check, f.status, f.title) for f in second
    ]


# ---- direction ablation --------------------------------------------------------------------


@pytest.mark.parametrize("strength", [2.0, 1.0, 0.3, 0.1, 0.05])
def test_a_removed_direction_is_found_with_its_strength(strength: float) -> None:
    finding = audit(stored(removed(direction(), strength)))["WF-10"]
    assert (finding.status, finding.severity) == (Status.FOUND, Severity.HIGH)
    assert finding.evidence["strength"] == pytest.approx(strength, rel=0.05)
    assert finding.evidence["support"] == 2 * LAYERS


def test_a_strengthened_direction_is_told_from_a_removed_one() -> None:
    finding = audit(stored(removed(direction(), -0.5)))["WF-10"]
    assert (finding.status, finding.severity) == (Status.FOUND, Severity.INFO)
    assert "strengthened" in finding.title
    assert finding.evidence["strength"] == pytest.approx(-0.5, rel=0.02)


def test_the_direction_is_found_in_half_of_the_layers_under_a_dense_change() -> None:
    g = np.random.default_rng(2)
    half = {
        n: w for n, w in removed(direction(), 1.0).items()
        if ".layers." in n and int(n.split(".")[2]) < LAYERS // 2
    }  # fmt: skip
    subject = everywhere(
        lambda w: (w + 0.01 * w.std() * g.standard_normal(w.shape)).astype(np.float32), BASE | half
    )
    finding = audit(stored(subject))["WF-10"]
    assert finding.status is Status.FOUND
    assert finding.evidence["support"] == LAYERS


@pytest.mark.parametrize("strength", [1.0, 0.2])
def test_a_direction_taken_out_of_the_reading_side_is_found(strength: float) -> None:
    v = direction()
    subject = edited(READERS, lambda _, w: w - strength * (w @ v) @ v.T)
    found = audit(stored(subject))
    assert found["WF-12"].status is Status.FOUND
    assert found["WF-12"].evidence["support"] == 5 * LAYERS
    assert found["WF-10"].status is Status.PASSED


def test_several_shared_directions_are_found() -> None:
    finding = audit(stored(removed(direction(count=3), 1.0)))["WF-10"]
    assert finding.status is Status.FOUND
    assert finding.evidence["self_projection"] > 0.99


def test_a_direction_of_its_own_in_each_matrix_is_found() -> None:
    seeds = iter(range(100, 200))
    subject = edited(WRITERS, lambda _, w: w - 0.5 * (v := direction(next(seeds))) @ (v.T @ w))
    finding = audit(stored(subject))["WF-10"]
    assert (finding.status, finding.severity) == (Status.FOUND, Severity.MEDIUM)
    assert finding.evidence["own_directions"] >= 2 * LAYERS - 1
    assert finding.evidence["own_strength"] == pytest.approx(0.5, rel=0.05)


def test_rows_brought_back_to_their_norms_do_not_hide_the_edit() -> None:
    def restored(name: str, w: Any) -> Any:
        v = direction()
        new = w - v @ (v.T @ w)
        return new * (np.linalg.norm(w, axis=1) / np.linalg.norm(new, axis=1))[:, None]

    assert audit(stored(edited(WRITERS, restored)))["WF-10"].status is Status.FOUND


@pytest.mark.parametrize(("bits", "strength"), [("Q8_0", 0.1), ("Q4_0", 1.0)])
def test_quantising_afterwards_does_not_hide_the_edit(bits: str, strength: float) -> None:
    subject = everywhere(BY_NAME[bits].nearest, removed(direction(), strength))
    found = audit(subject)
    assert found["WF-10"].status is Status.FOUND
    assert found["WF-50"].status is Status.FOUND


@pytest.mark.parametrize(
    "subject",
    [
        removed(direction(), 1.0, ("layers.3.mlp.down_proj",)),
        removed(direction(), 1e-5),
        everywhere(BY_NAME["Q4_0"].nearest, removed(direction(), 0.03)),
    ],
    ids=["one tensor", "next to nothing", "below four bits"],
)
def test_below_the_detection_limit_nothing_is_called_clean(subject: State) -> None:
    finding = audit(subject)["WF-10"]
    assert finding.status is not Status.PASSED


OTHERS = {
    "adapter": lambda: adapter(16, 0.02),
    "adapter of rank 1": lambda: adapter(1, 0.02),
    "adapters that share a left vector": lambda: adapter(1, 0.02, shared=True),
    "noise": lambda: noisy(0.02),
    "quantised adapter": lambda: everywhere(BY_NAME["Q8_0"].nearest, adapter(4, 0.02)),
    "rows scaled alike": lambda: edited(
        (*WRITERS, *READERS),
        lambda _, w: w * (1 + 0.02 * np.random.default_rng(1).standard_normal((len(w), 1))),
    ),
    "scaled": lambda: edited((*WRITERS, *READERS), lambda _, w: w * 0.98),
    "pruned": lambda: edited(WRITERS, lambda _, w: np.where(abs(w) < np.median(abs(w)), 0, w)),
    "another model": lambda: model(99),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_nothing_else_is_taken_for_a_removed_direction(kind: str) -> None:
    found = audit(stored(OTHERS[kind]()) if "quantised" not in kind else OTHERS[kind]())
    for side in ("WF-10", "WF-12"):
        assert found[side].status is not Status.FOUND


def test_shrinking_each_matrix_along_its_own_leading_pair_is_no_ablation() -> None:
    def shrink(name: str, w: Any) -> Any:
        left, values, right = np.linalg.svd(w, full_matrices=False)
        return w - 0.02 * values[0] * np.outer(left[:, 0], right[0])

    assert audit(stored(edited(WRITERS, shrink)))["WF-10"].status is not Status.FOUND


def test_the_strength_of_a_scaled_matrix_is_exact() -> None:
    v = direction()
    subject = edited(WRITERS, lambda _, w: 0.97 * (w - 0.5 * v @ (v.T @ w)))
    name = "model.layers.0.mlp.down_proj.weight"
    base, delta = BASE[name], subject[name] - BASE[name]
    (found,) = ablation.project(name, place_of(name), base, delta, v, 1.0)
    assert found.strength == pytest.approx(0.5, abs=1e-4)
    assert found.self_projection == pytest.approx(1.0, abs=1e-4)


# ---- everything else -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@pytest.mark.parametrize("rank", [1, 4, 24])
def test_a_folded_adapter_is_found_with_its_rank(rank: int, dtype: str) -> None:
    found = audit(stored(adapter(rank, 0.05), "BF16") if dtype == "BF16" else adapter(rank, 0.05))
    assert found["WF-20"].status is Status.FOUND
    assert found["WF-20"].evidence["median_rank"] == rank
    assert "WF-21" not in found


def test_one_edited_layer_is_called_so() -> None:
    g = np.random.default_rng(1)
    subject = edited(
        ("layers.2.mlp.down_proj",),
        lambda _, w: w + 0.1 * np.outer(g.standard_normal(len(w)), g.standard_normal(w.shape[1])),
    )
    assert "single layers" in audit(stored(subject))["WF-60"].title


def test_a_dense_structured_change_is_called_further_training() -> None:
    g = np.random.default_rng(1)
    subject = edited(
        (*WRITERS, *READERS),
        lambda _, w: w + 0.03 * matrix(g, *w.shape) * np.arange(len(w))[:, None] / 50,
    )
    found = audit(stored(subject))
    assert found["WF-21"].status is Status.FOUND
    assert not {"WF-20", "WF-31"} & set(found)


@pytest.mark.parametrize("size", [0.01, 0.05])
def test_white_noise_is_found(size: float) -> None:
    found = audit(stored(noisy(size)))
    assert found["WF-31"].status is Status.FOUND
    assert found["WF-31"].evidence["median_relative_size"] == pytest.approx(size, rel=0.2)
    assert not {"WF-20", "WF-21"} & set(found)


def smallest(w: Any, axis_groups: Callable[[Any], Any], share: float) -> Any:
    groups = axis_groups(w)
    count = int(share * groups.shape[1])
    order = np.argsort(np.abs(groups), axis=1)[:, :count]
    kept = groups.copy()
    np.put_along_axis(kept, order, 0, axis=1)
    return kept.reshape(w.shape)


PRUNINGS: dict[str, Callable[[Any], Any]] = {
    "whole tensor": lambda w: smallest(w, lambda x: x.reshape(1, -1), 0.5),
    "per row": lambda w: smallest(w, lambda x: x, 0.5),
    "2:4": lambda w: smallest(w, lambda x: x.reshape(-1, 4), 0.5),
    "4:8": lambda w: smallest(w, lambda x: x.reshape(-1, 8), 0.5),
    "rows": lambda w: np.where((np.arange(len(w)) < 5)[:, None], 0, w),
    "columns": lambda w: np.where(np.arange(w.shape[1]) < 5, 0, w),
}


@pytest.mark.parametrize("pattern", PRUNINGS)
def test_pruning_is_found_with_its_pattern(pattern: str) -> None:
    found = audit(stored(edited(WRITERS, lambda _, w: PRUNINGS[pattern](w))), stored(BASE))
    pruning = found["WF-30"]
    assert pruning.status is Status.FOUND
    assert pruning.evidence["patterns"] == {pattern: 2 * LAYERS}
    assert pruning.evidence["otherwise_changed"] == []
    if "s" not in pattern[-1]:
        assert pruning.evidence["smaller_than_kept"] > 0.85


def test_a_direction_is_found_under_pruning() -> None:
    subject = edited(WRITERS, lambda _, w: PRUNINGS["per row"](w), removed(direction(), 1.0))
    found = audit(stored(subject))
    assert found["WF-30"].status is Status.FOUND
    assert len(found["WF-30"].evidence["otherwise_changed"]) == 2 * LAYERS
    assert found["WF-10"].status is not Status.PASSED


@pytest.mark.parametrize(
    "grid", [g.name for g in GRIDS if g.exact or g.group == 64 or "whole" in g.name]
)
def test_a_faithful_quantisation_passes(grid: str) -> None:
    found = audit(everywhere(BY_NAME[grid].nearest))
    assert found["WF-50"].status is Status.PASSED
    assert found["WF-10"].status is Status.PASSED
    assert "WF-30" not in found


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("grid", ["Q8_0", "Q4_0", "NF4", "8-bit symmetric, whole rows"])
def test_a_faithful_quantisation_that_was_cast_passes(grid: str, dtype: str) -> None:
    found = audit(stored(everywhere(BY_NAME[grid].nearest), dtype))
    assert found["WF-50"].status is Status.PASSED
    assert not {"WF-21", "WF-30", "WF-31"} & set(found)


def test_a_tampered_quantisation_that_was_cast_is_not_called_faithful() -> None:
    found = audit(stored(everywhere(BY_NAME["Q8_0"].nearest, adapter(4, 0.03))))
    assert found["WF-50"].evidence["tensors"] == 1  # the embedding, which nobody changed
    assert found["WF-20"].status is Status.FOUND


@pytest.mark.parametrize("grid", ["Q8_0", "Q5_0", "Q4_1"])
def test_a_tampered_quantisation_is_found(grid: str) -> None:
    found = audit(everywhere(BY_NAME[grid].nearest, adapter(4, 0.03)))
    assert (found["WF-50"].status, found["WF-50"].severity) == (
        Status.FOUND, Severity.HIGH,
    )  # fmt: skip
    assert found["WF-50"].evidence["faithful"] == 1


def test_a_plain_grid_that_is_not_the_base_is_inconclusive() -> None:
    nearest = BY_NAME["4-bit symmetric, whole rows"].nearest
    found = audit(everywhere(nearest, noisy(0.05)))
    assert found["WF-50"].status is Status.INCONCLUSIVE


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K"])
def test_a_grid_that_only_llama_cpp_rounds_to_is_inconclusive(kind: str) -> None:
    nearest = BY_NAME["4-bit affine, groups of 32" if kind == "Q4_K" else "Q5_1"].nearest
    subject = everywhere(nearest)
    stored_as = {name: kind for name, w in subject.items() if w.ndim == 2}
    found = compare(ArraySource(subject, stored_as), ArraySource(BASE))
    status = {f.check: f.status for f in found}
    assert status["WF-50"] is Status.INCONCLUSIVE
    assert status["WF-10"] is Status.INCONCLUSIVE
    assert {"WF-20", "WF-21"} & set(status) == set()


def test_a_base_on_a_grid_is_a_fact_and_no_accusation() -> None:
    base = everywhere(BY_NAME["Q4_1"].nearest)
    assert audit(everywhere(BY_NAME["Q4_1"].nearest, base), base)["WF-03"].status is (Status.PASSED)
    (grid,) = [f for f in alone(ArraySource(base)) if f.check == "WF-53"]
    assert (grid.severity, grid.evidence["grids"]) == (Severity.INFO, {"Q4_1": 7 * LAYERS + 1})


@pytest.mark.parametrize("name", ["Q8_0", "Q5_1", "Q4_0"])
def test_grids_agree_with_the_package_that_tampers_use(name: str) -> None:
    w = BASE["model.layers.0.mlp.up_proj.weight"]
    ours = BY_NAME[name].nearest(w)
    assert np.array_equal(ours, reference.gguf(torch.from_numpy(w), name).numpy())


@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, 64), (3, 32)])
@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
def test_plain_grids_agree_with_the_ones_of_the_tampers(
    bits: int, group: int | None, scheme: Any
) -> None:
    w = BASE["model.layers.0.mlp.up_proj.weight"]
    over = f"groups of {group}" if group else "whole rows"
    ours = BY_NAME[f"{bits}-bit {scheme}, {over}"].nearest(w)
    theirs = reference.round_to_nearest(torch.from_numpy(w), bits, group, scheme).numpy()
    assert float(quantisation.same(ours, theirs).mean()) == 1.0
    nf4 = reference.nf4(torch.from_numpy(w)).numpy()
    assert np.array_equal(BY_NAME["NF4"].nearest(w), nf4)


def test_merges_are_found_with_their_weights() -> None:
    first, second = adapter(8, 0.1, 1), noisy(0.1, 2)
    mixed = {n: (0.3 * first[n] + 0.7 * second[n]).astype(np.float32) for n in BASE}
    found = audit(stored(mixed), BASE, first, second)["WF-40"]
    assert found.status is Status.FOUND
    assert found.evidence["weights"] == pytest.approx([0.3, 0.7], abs=0.01)
    unknown = audit(stored(noisy(0.1, 7)), BASE, first, second)["WF-40"]
    assert unknown.status is Status.INCONCLUSIVE


def test_a_parent_that_lacks_tensors_is_not_regressed_on() -> None:
    found = audit(stored(noisy(0.1)), BASE, {"other.weight": np.ones((2, 2))})["WF-40"]
    assert found.status is Status.NOT_EXAMINED


def test_swapped_replaced_and_appended_rows_are_found() -> None:
    name = "model.embed_tokens.weight"
    table = BASE[name].copy()
    table[[3, 4]] = table[[4, 3]]
    swapped = audit(BASE | {name: table})["WF-62"]
    assert (swapped.severity, swapped.evidence["moved_rows"]) == (
        Severity.HIGH, {name: [(3, 4), (4, 3)]},
    )  # fmt: skip
    table = BASE[name].copy()
    table[7] = 0.5
    replaced = audit(BASE | {name: table})["WF-62"]
    assert replaced.evidence["changed_rows"] == {name: [7]}
    assert replaced.severity is Severity.MEDIUM
    longer = audit(BASE | {name: np.concatenate([BASE[name], BASE[name][:8]])})
    assert longer["WF-62"].evidence["rows"] == {name: [VOCABULARY + 8, VOCABULARY]}
    assert longer["WF-01"].status is not Status.FOUND


def test_an_untied_head_is_held_against_the_embedding() -> None:
    table = BASE["model.embed_tokens.weight"]
    same = audit(BASE | {"lm_head.weight": table})
    assert same["WF-01"].status is Status.PASSED
    changed = table.copy()
    changed[[3, 4]] = table[[4, 3]]
    found = audit(BASE | {"lm_head.weight": changed})["WF-62"]
    assert found.severity is Severity.HIGH
    assert found.evidence["moved_rows"] == {"lm_head.weight": [(3, 4), (4, 3)]}


def test_scalings_are_found_and_those_that_cancel_weigh_nothing() -> None:
    factors = np.exp(0.2 * np.random.default_rng(4).standard_normal(HIDDEN)).astype(np.float32)

    def move(name: str, w: Any) -> Any:
        return w * factors[:, None] if "up_proj" in name else w / factors[None]

    kept = audit(stored(edited(("up_proj", "down_proj"), move)))["WF-04"]
    assert (kept.status, kept.severity) == (Status.FOUND, Severity.INFO)
    assert kept.evidence["links_that_cancel"] == kept.evidence["links_tested"] == LAYERS
    one_side = audit(stored(edited(("up_proj",), lambda _, w: w * factors[:, None])))["WF-04"]
    assert (one_side.severity, one_side.evidence["kinds"]) == (Severity.MEDIUM, ["rows"])


def test_gains_folded_into_the_next_maps_cancel() -> None:
    factors = (1 + 0.3 * np.random.default_rng(4).random(WIDTH)).astype(np.float32)

    def fold(name: str, w: Any) -> Any:
        return w * factors if w.ndim == 1 else w / factors[None]

    roles = ("input_layernorm", "q_proj", "k_proj", "v_proj")
    found = audit(stored(edited(roles, fold)))
    assert found["WF-04"].severity is Severity.INFO
    assert found["WF-61"].severity is Severity.INFO
    alone_changed = audit(edited(("input_layernorm",), lambda _, w: w * factors))["WF-61"]
    assert alone_changed.severity is Severity.MEDIUM


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_break_nothing_and_pass_nothing(value: float) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    spoilt = BASE[name].copy()
    spoilt[3, 4] = value
    found = audit(BASE | {name: spoilt})
    assert found["WF-00"].evidence["tensors"] == [name]
    assert found["WF-03"].status is Status.FOUND
    assert found["WF-10"].status is Status.INCONCLUSIVE
    assert alone(ArraySource(BASE | {name: spoilt}))[0].status is Status.ERROR


def test_an_open_matrix_of_unknown_role_keeps_both_sides_from_passing() -> None:
    base = BASE | {"model.extra.weight": BASE["model.layers.0.mlp.up_proj.weight"]}
    subject = base | {"model.extra.weight": np.cos(base["model.extra.weight"])}
    found = audit(subject, base)
    for side in ("WF-10", "WF-12"):
        assert found[side].status is Status.INCONCLUSIVE


def test_another_model_is_not_this_base() -> None:
    found = audit(stored(model(99)))["WF-01"]
    assert (found.status, found.severity) == (Status.FOUND, Severity.HIGH)
    nothing = audit({"x.weight": np.ones((3, 3), np.float32)})
    assert nothing["WF-01"].severity is Severity.HIGH
    assert nothing["WF-03"].status is Status.INCONCLUSIVE


def test_a_missing_direction_shows_without_a_base() -> None:
    def gap(state: State) -> Finding:
        return alone(ArraySource(state))[0]

    assert gap(stored(removed(direction(), 1.0))).status is Status.FOUND
    three = gap(removed(direction(count=3), 1.0))
    assert three.evidence["directions"] == 3
    assert gap(BASE).status is Status.INCONCLUSIVE
    assert gap(removed(direction(), 0.3)).status is Status.INCONCLUSIVE
    assert gap({"x.weight": np.ones((3, 3), np.float32)}).status is Status.NOT_EXAMINED


# ---- names, memory, arithmetic ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("model.layers.3.self_attn.o_proj.weight", "blk.3.attn_output.weight"),
        ("model.layers.3.mlp.down_proj.weight", "blk.3.ffn_down.weight"),
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("lm_head.weight", "output.weight"),
        ("model.layers.0.input_layernorm.weight", "blk.0.attn_norm.weight"),
        ("model.norm.weight", "output_norm.weight"),
    ],
)
def test_both_conventions_name_the_same_places(ours: str, theirs: str) -> None:
    assert place_of(ours) == place_of(theirs)
    assert shared_names([ours], [theirs]) == {ours: theirs}


def test_a_place_claimed_twice_is_left_out() -> None:
    twice = ["blk.3.attn_output.weight", "h.3.attn.wo.weight"]
    assert shared_names(["model.layers.3.self_attn.o_proj.weight"], twice) == {}


def test_interleaved_heads_of_gguf_files_are_put_in_order() -> None:
    subject: State = {}
    for name, w in stored(BASE).items():
        layer = name.split(".")[2]
        for role, there in (("q_proj", "attn_q"), ("k_proj", "attn_k")):
            if role in name:
                turned = w.reshape(2, 2, 16, WIDTH).swapaxes(1, 2).reshape(w.shape)
                subject[f"blk.{layer}.{there}.weight"] = turned
        if "down_proj" in name:
            subject[f"blk.{layer}.ffn_down.weight"] = w
    found = audit(subject)
    assert found["WF-02"].evidence["tensors"] == 3 * LAYERS
    assert found["WF-10"].status is Status.PASSED


class Counted(ArraySource):
    """A source that knows how many of its arrays are still in use."""

    live = most = 0

    def read(self, name: str) -> Any:
        array = np.array(super().read(name), copy=True).view(_Traced)
        Counted.live += 1
        Counted.most = max(Counted.most, Counted.live)
        weakref.finalize(array, self._gone)
        return array

    @staticmethod
    def _gone() -> None:
        Counted.live -= 1


class _Traced(np.ndarray[Any, Any]):
    pass


def test_one_tensor_of_each_model_is_in_memory_at_a_time() -> None:
    subject = stored(noisy(0.05))
    compare(Counted(subject), Counted(BASE), [Counted(noisy(0.1))])
    assert Counted.most == 3
    Counted.most = 0
    alone(Counted(subject))
    assert Counted.most == 1


def test_progress_counts_every_tensor() -> None:
    seen: list[tuple[int, int]] = []
    compare(ArraySource(BASE), ArraySource(BASE), progress=lambda done, of: seen.append((done, of)))
    assert seen == [(n + 1, len(BASE)) for n in range(len(BASE))]


def test_singular_values_agree_with_numpy() -> None:
    w = BASE["model.layers.0.mlp.down_proj.weight"]
    exact = np.linalg.svd(w, compute_uv=False)
    assert spectrum(w).values[:WIDTH] == pytest.approx(exact, rel=1e-3)
    big = (adapter(4, 1.0)["model.layers.0.mlp.down_proj.weight"] - w).repeat(20, 0)
    vectors, values = left_vectors(big, 4)
    assert values == pytest.approx(np.linalg.svd(big, compute_uv=False)[:4], rel=1e-3)
    assert vectors.T @ vectors == pytest.approx(np.eye(4), abs=1e-4)


def test_white_noise_has_no_rank() -> None:
    g = np.random.default_rng(0)
    noise = g.standard_normal((200, 300)).astype(np.float32)
    assert spectrum(noise).rank(1.1) == 0
    spiked = noise + 60 * np.outer(g.standard_normal(200), g.standard_normal(300)) / 240
    assert spectrum((spiked * 1).astype(np.float32)).rank(1.1) in {0, 1}
    strong = noise + 8 * np.outer(g.standard_normal(200), g.standard_normal(300)) / 10
    assert spectrum(strong.astype(np.float32)).rank(1.1) == 1


@pytest.mark.parametrize(("name", "dtype"), [("BF16", torch.bfloat16), ("F16", torch.float16)])
def test_rounding_agrees_with_torch(name: str, dtype: torch.dtype) -> None:
    values = np.random.default_rng(0).standard_normal((50, 40)).astype(np.float32)
    ours = rounded(values, name)
    assert np.array_equal(ours, torch.from_numpy(values).to(dtype).float().numpy())
    assert (narrowest(ours), narrowest(values)) == (name, "F32")
    error = float(((ours - values) ** 2).sum())
    assert rounding_energy(values, name) == pytest.approx(error, rel=0.1)


@pytest.mark.parametrize(
    ("name", "dtype"), [("F8_E4M3", torch.float8_e4m3fn), ("F8_E5M2", torch.float8_e5m2)]
)
def test_rounding_to_8_bits_agrees_with_torch(name: str, dtype: torch.dtype) -> None:
    generator = np.random.default_rng(0)
    spread = generator.standard_normal(5000) * np.exp(4 * generator.standard_normal(5000))
    middles = np.arange(0, 448, 0.25)  # ties among them
    values = np.concatenate([np.clip(spread, -448, 448), middles, -middles]).astype(np.float32)
    expected = torch.from_numpy(values).to(dtype).float().numpy()
    assert np.array_equal(rounded(values, name), expected)


def test_the_score_ignores_what_is_strengthened_and_what_is_too_few() -> None:
    def score(subject: State) -> float:
        comparison = Comparison(ArraySource(subject), ArraySource(BASE))
        comparison.run()
        return ablation.removal_score(
            comparison.projections["writing"], comparison.evidence["writing"]
        )

    assert score(stored(removed(direction(), 0.2))) > 1.2
    assert score(stored(removed(direction(), -0.2))) < 0.8
    assert score(stored(removed(direction(), 0.2, ("layers.1.mlp.down",)))) == 0.0
    assert score(dict(BASE)) == 0.0


def test_what_cannot_be_read_or_unpacked_is_an_error_and_no_accusation() -> None:
    class Odd(ArraySource):
        def read(self, name: str) -> Any:
            if "o_proj" in name:
                raise InputError(f"{name}: no way to decode it")
            return super().read(name)

    found = {f.check: f for f in compare(Odd(BASE), ArraySource(BASE))}
    assert found["WF-00"].status is Status.ERROR
    assert found["WF-01"].status is not Status.FOUND
    assert "WF-00" in {f.check for f in alone(Odd(BASE))}
    packed = {
        f"{n[:-6]}qweight": np.ones((4, 4), np.float32) for n, w in BASE.items() if w.ndim == 2
    }
    assert audit(packed)["WF-01"].status is Status.ERROR
