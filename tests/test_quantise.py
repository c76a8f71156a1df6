"""Quantisation against slow references and the gguf package, as tampers, and the screen for it."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import gguf as gguf_package
import numpy as np
import pytest
import slow_experts
import tiny_world
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from durometer.core import quantisation
from durometer.core.awq import ALPHAS, awq, scales
from durometer.core.budget import Budget, matrix_entries
from durometer.core.errors import InputError, NotApplicableError
from durometer.core.gptq import damped_hessian, gptq, output_error
from durometer.core.matrices import block_matrices
from durometer.core.quantisation import NF4_CODES, gguf_bits, nf4, round_to_nearest
from durometer.core.seeds import Seeds
from durometer.subjects.base import Subject
from durometer.subjects.fingerprint import weights_fingerprint
from durometer.tampers.base import Realised, make_tamper
from durometer.tampers.data import make_rows, training_items
from durometer.trials import quantisation_gap as gap

MakeModel = Callable[..., Any]
SEEDS = Seeds(11, 12, 13, 14)
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": 8},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8},
    "Gemma3": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8},
    "Olmo2": {},
    "Phi3": {},
    "GPTNeoX": {},
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {"head_dim": 8, "num_experts": 4, **EXPERTS},
    "DeepseekV3": {
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        **EXPERTS,
        **LATENT,
    },
}
NAMES = ("quantize_rtn", "quantize_nf4", "quantize_gptq", "quantize_awq", "quantize_gguf")
CALIBRATED = ("quantize_gptq", "quantize_awq")
SIMPLE = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(inputs: int, tokens: int = 200, seed: int = 1) -> torch.Tensor:
    """Return inputs ``[tokens, inputs]`` with correlations and a few large channels."""
    mixing = drawn(inputs, inputs, seed=seed) + torch.eye(inputs)
    sizes = torch.logspace(-1, 1, inputs)
    return (drawn(tokens, inputs, seed=seed + 1) @ mixing / inputs**0.5) * sizes


def slow_rounding(row: list[float], bits: int, group: int, scheme: str) -> list[float]:
    """Round one row, group by group and weight by weight, as the formulas read."""
    result = []
    for start in range(0, len(row), group):
        part = row[start : start + group]
        if scheme == "symmetric":
            origin, scale = 0.0, max(abs(w) for w in part) / (2 ** (bits - 1) - 1)
        else:
            origin, scale = min(part), (max(part) - min(part)) / (2**bits - 1)
        result += [w if not scale else origin + scale * round((w - origin) / scale) for w in part]
    return result


# Rounding to nearest


@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
@pytest.mark.parametrize("group", [None, 32, 24])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_rounding_is_that_of_a_slow_loop(bits: int, group: int | None, scheme: Any) -> None:
    weight = drawn(5, 80, seed=bits)  # neither 32 nor 24 divides 80: a last short group
    expected = [slow_rounding(row, bits, group or 80, scheme) for row in weight.tolist()]
    result = round_to_nearest(weight, bits, group, scheme)
    torch.testing.assert_close(result, torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_experts_are_rounded_one_by_one() -> None:
    weight = drawn(3, 4, 32)
    whole = round_to_nearest(weight, 4, 32)
    assert torch.equal(whole, torch.stack([round_to_nearest(expert, 4, 32) for expert in weight]))


@pytest.mark.parametrize("bits", [1, 17])
def test_bits_that_make_no_grid_are_refused(bits: int) -> None:
    with pytest.raises(InputError, match="2 to 16"):
        round_to_nearest(drawn(2, 8), bits)


ROUNDINGS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "symmetric": lambda w: round_to_nearest(w, 4, 32),
    "affine": lambda w: round_to_nearest(w, 4, 32, "affine"),
    "two bits": lambda w: round_to_nearest(w, 2, None),
    "nf4": nf4,
    "gptq": lambda w: gptq(w, torch.eye(w.shape[1]), 4, 32),
    "gptq affine": lambda w: gptq(w, torch.eye(w.shape[1]), 4, None, "affine"),
    "awq": lambda w: awq([w], torch.eye(w.shape[1]), 4, 32)[0][0],
    **{name: lambda w, name=name: quantisation.gguf(w, name) for name in SIMPLE},  # type: ignore[misc]
}


@pytest.mark.parametrize("name", ROUNDINGS)
@settings(max_examples=15, deadline=None)
@given(value=st.floats(-8, 8, width=32), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_zero_constant_and_single_value_groups_survive(
    name: str, value: float, dtype: torch.dtype
) -> None:
    value = float(torch.tensor(value if abs(value) > 1e-3 else 0.0).to(dtype))
    weight = torch.zeros(4, 64, dtype=dtype)
    weight[1] = value  # constant
    weight[2, 5] = value  # one value in one group
    weight[3] = torch.where(torch.arange(64) % 2 == 0, value, 0.0)
    result = ROUNDINGS[name](weight)
    assert result.dtype == torch.float32
    # A scale or origin in fp16 is kept to 11 bits.
    torch.testing.assert_close(result, weight.float(), rtol=0, atol=1e-3 * abs(value))


@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
@settings(max_examples=30, deadline=None)
@given(
    rows=st.lists(st.lists(st.floats(-1e3, 1e3, width=32), min_size=9, max_size=9), min_size=1),
    bits=st.integers(2, 8),
)
def test_no_weight_moves_by_more_than_half_a_step(
    scheme: Any, rows: list[list[float]], bits: int
) -> None:
    weight = torch.tensor(rows)
    grids = [quantisation.Grid.fit(part, bits, scheme) for part in quantisation.grouped(weight, 4)]
    steps = torch.cat([g.scale.expand(*g.scale.shape[:-1], 4).flatten(-2) for g in grids], dim=-1)
    moved = (round_to_nearest(weight, bits, 4, scheme) - weight).abs()
    assert (moved <= steps[:, :9] / 2 + 1e-3 * steps[:, :9] + 1e-5).all()


# NF4


def test_nf4_codes_are_quantiles_of_a_normal_distribution() -> None:
    """The construction of the paper, from scipy: eight codes from 0 up, seven below it."""
    offset = 0.5 * ((1 - 1 / 32) + (1 - 1 / 30))
    up = norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    down = -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    expected = np.sort(np.concatenate([up, down, [0.0]])) / up.max()
    np.testing.assert_allclose(NF4_CODES, expected, atol=1e-6)


def test_nf4_takes_the_nearest_code_of_each_block() -> None:
    weight = drawn(3, 50)  # blocks of 64 cross rows, and the last is short
    flat, table = weight.flatten().double(), torch.tensor(NF4_CODES, dtype=torch.double)
    expected = []
    for start in range(0, 150, 64):
        part = flat[start : start + 64]
        scale = part.abs().max()
        nearest = (part[:, None] / scale - table).abs().argmin(1)
        expected.append(scale * table[nearest])
    torch.testing.assert_close(nf4(weight).flatten(), torch.cat(expected).float())


def test_nf4_leaves_its_own_codes_alone() -> None:
    weight = torch.tensor(NF4_CODES * 4).view(1, 64) * 0.5
    torch.testing.assert_close(nf4(weight), weight, rtol=1e-6, atol=0)


# GGUF


@pytest.mark.parametrize("name", SIMPLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gguf_is_the_package_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    weight = drawn(3, 4, 64).to(dtype)
    kind = gguf_package.GGMLQuantizationType[name]
    encoded = gguf_package.quants.quantize(weight.float().numpy(), kind)
    expected = torch.from_numpy(gguf_package.quants.dequantize(encoded, kind))
    assert torch.equal(quantisation.gguf(weight, name), expected)


def test_q8_0_is_its_formula() -> None:
    blocks = drawn(6, 32)
    scale = blocks.abs().amax(1, keepdim=True) / 127
    codes = (blocks / scale).abs().add(0.5).floor() * blocks.sign()
    expected = scale.half().float() * codes
    torch.testing.assert_close(quantisation.gguf(blocks, "Q8_0"), expected)


def test_gguf_bits_a_weight() -> None:
    assert [gguf_bits(name) for name in SIMPLE] == [8.5, 6.0, 5.5, 5.0, 4.5]


@pytest.mark.parametrize(
    ("types", "reason"),
    [
        ("Q4_K", "cannot be encoded"),
        ("Q8_0 IQ2_XXS", "cannot be encoded"),
        ("Q9_9", "unknown gguf type"),
        ("F16", "quantises nothing"),
        ("Q4_0 Q4_0", "same bits"),
        ("", "at least 1"),
    ],
)
def test_gguf_types_that_cannot_be_are_refused(types: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        make_tamper("quantize_gguf", types=types)


def test_a_row_that_blocks_do_not_divide_is_refused() -> None:
    with pytest.raises(InputError, match="no multiple"):
        quantisation.gguf(drawn(2, 48), "Q8_0")


# GPTQ and AWQ


def textbook_gptq(
    weight: torch.Tensor, hessian: torch.Tensor, bits: int, group: int, scheme: Any
) -> torch.Tensor:
    """Optimal brain quantisation in a fixed order: the inverse shrinks by one column a step."""
    inverse, rest = torch.linalg.inv(hessian), weight.double().clone()
    for column in range(weight.shape[1]):
        if column % group == 0:
            grid = quantisation.Grid.fit(rest[:, column : column + group], bits, scheme)
        nearest = grid.nearest(rest[:, column : column + 1])
        error = (rest[:, column : column + 1] - nearest) / inverse[column, column]
        rest[:, column + 1 :] -= error * inverse[column, column + 1 :]
        rest[:, column : column + 1] = nearest
        pivot = inverse[column, column].clone()
        inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / pivot
    return rest.float()


@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
@pytest.mark.parametrize(("inputs", "group"), [(40, 16), (48, None), (150, None)])
@pytest.mark.parametrize("bits", [4, 2])
def test_gptq_is_the_textbook(bits: int, inputs: int, group: int | None, scheme: Any) -> None:
    weight, inputs_seen = drawn(6, inputs), correlated(inputs)
    moments = inputs_seen.T @ inputs_seen
    expected = textbook_gptq(weight, damped_hessian(moments), bits, group or inputs, scheme)
    result = gptq(weight, moments, bits, group, scheme)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("group", [None, 32])
def test_calibration_lowers_the_output_error(
    method: str, bits: int, group: int | None, scheme: Any
) -> None:
    weight, inputs = drawn(24, 64), correlated(64)
    moments = inputs.T @ inputs
    if method == "gptq":
        result = gptq(weight, moments, bits, group, scheme)
    else:
        (result,), _ = awq([weight], moments, bits, group, scheme)
    plain = round_to_nearest(weight, bits, group, scheme)
    directly = float(((result - weight) @ inputs.T).square().sum())
    assert directly <= float(((plain - weight) @ inputs.T).square().sum())
    assert output_error(weight, result, moments) == pytest.approx(directly, rel=1e-3)


def test_gptq_with_uncorrelated_inputs_is_rounding() -> None:
    weight = drawn(5, 32)
    torch.testing.assert_close(
        gptq(weight, torch.eye(32), 4, 16), round_to_nearest(weight, 4, 16), rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("moments", [torch.zeros(16, 16), torch.ones(16, 16)])
def test_degenerate_inputs_give_finite_weights(moments: torch.Tensor) -> None:
    weight = drawn(3, 16)
    assert gptq(weight, moments, 4).isfinite().all()
    (result,), _ = awq([weight], moments, 4)
    assert result.isfinite().all()


def test_awq_takes_the_best_exponent_and_folds_the_scale_back() -> None:
    weights, inputs = [drawn(24, 64), drawn(8, 64, seed=5)], correlated(64)
    moments = inputs.T @ inputs
    results, alpha = awq(weights, moments, 3, 32)
    errors = {}
    for tried in (0.05 * index for index in range(20)):
        factors = inputs.square().mean(0).sqrt() ** tried
        rounded = [round_to_nearest(w * factors, 3, 32) / factors for w in weights]
        errors[tried] = sum(
            float(((r - w) @ inputs.T).square().sum())
            for r, w in zip(rounded, weights, strict=True)
        )
    best = min(errors, key=lambda tried: errors[tried])
    assert alpha == pytest.approx(best)
    assert alpha > 0
    factors = scales(moments, alpha)
    for weight, result in zip(weights, results, strict=True):
        assert torch.equal(result, round_to_nearest(weight * factors, 3, 32) / factors)
    assert len(ALPHAS) == 20


# As tampers


@pytest.fixture
def subject(make_model: MakeModel) -> Subject:
    return tiny_world.as_subject(make_model("Llama"))


def run(
    subject: Subject,
    name: str,
    seeds: Seeds = SEEDS,
    look: Callable[[], None] = lambda: None,
    **changes: Any,
) -> tuple[Realised, dict[str, torch.Tensor]]:
    """Run every strength; return what was realised and the weights at the last."""
    tamper = make_tamper(name, **changes)
    steps, seen = tamper.planned_steps(), dict[str, torch.Tensor]()

    def on_checkpoint(checkpoint: Any) -> bool:
        look()
        return True

    budget = Budget(steps, tuple(range(1, steps + 1)))
    before = weights_fingerprint(subject.model)
    with subject.restored():
        realised = tamper.run(subject, tiny_world.tiny_domain(), budget, seeds, on_checkpoint)
        seen = {n: p.detach().clone() for n, p in subject.model.named_parameters()}
    assert weights_fingerprint(subject.model) == before
    assert not subject.model.training
    assert not any(p.requires_grad for p in subject.model.parameters())
    return realised, seen


QUICK: dict[str, dict[str, Any]] = {
    "quantize_gptq": {"strengths": (13,), "examples": 2},
    "quantize_awq": {"strengths": (13,), "examples": 2},
    "quantize_gguf": {"types": "Q8_0 Q4_0"},
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_runs_or_refuses(
    make_model: MakeModel, architecture: str, name: str
) -> None:
    model = make_model(architecture, **ARCHITECTURES[architecture])
    before = {n: p.clone() for n, p in model.named_parameters()}
    quick = QUICK.get(name, {})
    realised, after = run(tiny_world.as_subject(model), name, **quick)
    assert realised.status == "done"
    assert all(0 < norm < math.inf for norm in realised.changed.values())
    linear = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    experts = {n for n, p in before.items() if p.dim() == 3}
    odd = set(realised.facts.get("rows_do_not_fit", ()))
    assert set(realised.changed) == linear - {"lm_head.weight", "embed_out.weight"} - odd | experts
    unchanged = set(before) - set(realised.changed)
    assert all(torch.equal(after[n], before[n]) for n in unchanged)
    routers = {n for n in before if n.endswith("mlp.gate.weight") and n not in linear}
    assert set(realised.facts["left_out"]) == routers
    assert realised.changed_weights == sum(before[n].numel() for n in realised.changed)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_stated_how_much_changed(subject: Subject, name: str) -> None:
    before = {n: p.clone() for n, p in subject.model.named_parameters()}
    realised, after = run(subject, name, **QUICK.get(name, {}))
    last = realised.facts["precisions"][-1]
    old = torch.cat([before[n].flatten() for n in realised.changed])
    new = torch.cat([after[n].flatten() for n in realised.changed])
    assert last["relative_change"] == pytest.approx(float((new - old).norm() / old.norm()), 1e-4)
    assert last["unchanged_share"] == pytest.approx(float((new == old).float().mean()))
    assert last["stored_cosine"] == pytest.approx(1.0)
    assert len(realised.facts["precisions"]) == realised.spent.steps


def test_fewer_bits_change_more(subject: Subject) -> None:
    realised, _ = run(subject, "quantize_rtn")
    precisions = realised.facts["precisions"]
    assert [entry["bits"] for entry in precisions] == [8, 4, 3, 2]
    changes = [entry["relative_change"] for entry in precisions]
    assert changes == sorted(changes)
    assert changes[0] < 0.02
    assert changes[-1] > 0.3


def test_each_matrix_is_what_the_pure_function_makes_of_it(subject: Subject) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    before = dict(subject.model.named_parameters())[name].clone()
    for tamper, changes, expected in (
        ("quantize_rtn", {"strengths": "13"}, round_to_nearest(before, 3, 128)),
        (
            "quantize_rtn",
            {"strengths": "12", "group": "32", "scheme": "affine"},
            round_to_nearest(before, 4, 32, "affine"),
        ),
        ("quantize_nf4", {}, nf4(before)),
        ("quantize_gguf", {"types": "Q4_1"}, quantisation.gguf(before, "Q4_1")),
    ):
        assert torch.equal(run(subject, tamper, **changes)[1][name], expected)


def test_transposed_experts_are_quantised_along_their_inputs(make_model: MakeModel) -> None:
    model = make_model(
        "GptOss", head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=8
    )
    name = "model.layers.0.mlp.experts.down_proj"
    before = dict(model.named_parameters())[name].clone()
    _, after = run(tiny_world.as_subject(model), "quantize_rtn", strengths=(12,), group="32")
    assert torch.equal(after[name], round_to_nearest(before.mT, 4, 32).mT)
    assert not torch.equal(after[name], round_to_nearest(before, 4, 32))


def test_experts_of_an_undeclared_layout_are_refused(make_model: MakeModel) -> None:
    model = make_model("Qwen3Moe", **ARCHITECTURES["Qwen3Moe"])
    for block in model.model.layers:
        block.mlp.experts.is_transposed = None
    with pytest.raises(NotApplicableError, match="not declared"):
        block_matrices(model)


def test_modules_of_no_known_kind_are_refused(subject: Subject) -> None:
    class Own(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(64, 32))

    for block in subject.model.model.layers:
        block.mlp.up_proj = Own()
    with pytest.raises(NotApplicableError, match="no known kind"):
        block_matrices(subject.model)


@pytest.mark.parametrize("tied", [True, False])
def test_the_vocabulary_is_quantised_when_asked_for(make_model: MakeModel, tied: bool) -> None:
    subject = tiny_world.as_subject(make_model("Llama", tie_word_embeddings=tied))
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    without, _ = run(subject, "quantize_nf4")
    with_it, _ = run(subject, "quantize_nf4", vocabulary=True)
    assert not {embedding, head} & set(without.changed)
    wanted = {embedding} if tied else {embedding, head}
    assert set(with_it.changed) - set(without.changed) == wanted


@pytest.mark.parametrize("name", NAMES)
def test_bf16_is_stored_faithfully_or_refused(make_model: MakeModel, name: str) -> None:
    subject = tiny_world.as_subject(make_model("Llama").to(torch.bfloat16))
    realised, after = run(subject, name, **QUICK.get(name, {}))
    assert realised.status == "done"
    assert {p.dtype for p in after.values()} == {torch.bfloat16}
    assert all(0.95 < entry["stored_cosine"] <= 1.001 for entry in realised.facts["precisions"])


def test_a_change_too_fine_for_the_dtype_is_refused(make_model: MakeModel) -> None:
    subject = tiny_world.as_subject(make_model("Llama").to(torch.bfloat16))
    with pytest.raises(NotApplicableError, match="cannot hold the change"):
        run(subject, "quantize_rtn", strengths=(2,))


def test_strength_zero_changes_nothing(subject: Subject) -> None:
    realised, _ = run(subject, "quantize_rtn", strengths=(0,))
    assert (realised.status, realised.changed_weights) == ("done", 0)
    assert realised.facts["precisions"][0]["unchanged_share"] == 1.0


def test_weights_on_the_grid_already_have_no_effect(subject: Subject) -> None:
    for parameter in subject.model.parameters():
        parameter.data.copy_(parameter.sign() * 0.5)
    realised, _ = run(subject, "quantize_rtn", strengths=(12,))
    assert realised.status == "no_effect"


def test_strengths_are_whole_bits_and_sorted() -> None:
    assert make_tamper("quantize_rtn", strengths="14/8 12").strengths() == (8, 12, 14)
    for wrong in ("12.5", "15", "-1", "nan"):
        with pytest.raises(InputError, match="whole number of bits"):
            make_tamper("quantize_rtn", strengths=wrong)


def test_types_are_tried_from_most_to_fewest_bits() -> None:
    tamper = make_tamper("quantize_gguf", types="Q4_0/Q8_0")
    assert tamper.settings.types == ("Q8_0", "Q4_0")
    assert tamper.strengths() == (7.5, 11.5)


def test_rows_that_do_not_fit_are_named_and_all_of_them_refused(make_model: MakeModel) -> None:
    partly = tiny_world.as_subject(make_model("Llama", intermediate_size=48))
    realised, _ = run(partly, "quantize_gguf", types="Q8_0")
    odd = [f"model.layers.{index}.mlp.down_proj.weight" for index in range(2)]
    assert realised.facts["rows_do_not_fit"] == odd
    assert not set(odd) & set(realised.changed)
    small = {"hidden_size": 24, "intermediate_size": 48, "num_attention_heads": 4}
    with pytest.raises(NotApplicableError, match="multiple of 32"):
        run(tiny_world.as_subject(make_model("Llama", **small)), "quantize_gguf", types="Q8_0")


@pytest.mark.parametrize("name", NAMES)
def test_noise_of_the_same_size_is_the_control(subject: Subject, name: str) -> None:
    quick = QUICK.get(name, {}) | ({"blocks_at_once": 2} if name in CALIBRATED else {})
    real, weights = run(subject, name, **quick)
    noise, noisy = run(subject, name, control="noise", **quick)
    _, again = run(subject, name, control="noise", **quick)
    _, other = run(subject, name, replace(SEEDS, initialisation=1), control="noise", **quick)
    assert set(noise.changed) == set(real.changed)
    for matrix, norm_of_change in real.changed.items():
        assert noise.changed[matrix] == pytest.approx(norm_of_change, rel=1e-3)
        assert not torch.equal(noisy[matrix], weights[matrix])
        assert torch.equal(noisy[matrix], again[matrix])
        assert not torch.equal(noisy[matrix], other[matrix])


@pytest.mark.parametrize("calibration", ["general", "retain", "restricted_like"])
@pytest.mark.parametrize("name", CALIBRATED)
def test_calibration_text_is_drawn_and_counted(
    subject: Subject, name: str, calibration: str
) -> None:
    changes = {"strengths": (12, 13), "examples": 4, "blocks_at_once": 1}
    realised, _ = run(subject, name, calibration=calibration, **changes)
    again, _ = run(subject, name, calibration=calibration, **changes)
    assert again.facts == realised.facts
    kind = {"general": "benign", "retain": "retain", "restricted_like": "restricted"}[calibration]
    ids = realised.facts["calibration_items"]
    items = {item.id: item for item in tiny_world.tiny_domain().items}
    assert len(ids) == 4
    assert all(item.startswith(kind) and items[item].split == "attack" for item in ids)
    spent = realised.spent
    assert spent.examples == 4
    assert spent.restricted_examples == (4 if calibration == "restricted_like" else 0)
    chat = subject.chat
    tokens = sum(len(chat.row(items[item].prompt, items[item].response).ids) for item in ids)
    assert spent.tokens == 2 * 2 * tokens  # two strengths, a pass for each of two blocks
    assert spent.flops == 2 * matrix_entries(subject.model) * spent.tokens


def test_gptq_beats_rounding_on_its_text_and_says_so(subject: Subject) -> None:
    realised, _ = run(subject, "quantize_gptq", group="32")
    for entry in realised.facts["precisions"]:
        assert entry["output_error"] < entry["output_error_of_rounding"]


@pytest.mark.parametrize("architecture", slow_experts.LAYOUTS)
@pytest.mark.parametrize("name", CALIBRATED)
def test_each_expert_is_quantised_on_the_tokens_that_reach_it(
    make_model: MakeModel, name: str, architecture: str
) -> None:
    model = make_model(architecture, **slow_experts.LAYOUTS[architecture])
    subject, matrices = tiny_world.as_subject(model), block_matrices(model)
    before = {n: m.maps().clone() for n, m in matrices.items() if m.parameter.dim() == 3}
    quick = {"strengths": (13,), "examples": 3, "group": "32"}
    realised, after = run(subject, name, **quick)
    items = training_items(tiny_world.tiny_domain(), "benign", 3, SEEDS)
    rows = make_rows(items, subject.chat, label_prompt=True, max_length=512)
    left = 0
    for weight, inputs in slow_experts.expert_inputs(model, rows).items():
        moments = torch.stack([x.T @ x for x in inputs])
        reached = [index for index, x in enumerate(inputs) if len(x)]
        left += len(inputs) - len(reached)
        expected = before[weight].clone()
        if name == "quantize_awq" and weight.endswith("gate_up_proj"):
            # One operation feeds them all, so that they share their scale.
            expected[reached] = slow_awq(before[weight][reached], moments[reached], 3, 32)
        else:
            for expert in reached:
                w, m = before[weight][expert], moments[expert]
                expected[expert] = (
                    slow_awq(w[None], m[None], 3, 32)[0]
                    if name == "quantize_awq"
                    else textbook_gptq(w, damped_hessian(m), 3, 32, "symmetric")
                )
        found = matrices[weight].turned(after[weight])
        # Sums in another order may round a weight near a midpoint the other way.
        off = (found - expected).abs() > 1e-4
        assert float(off.float().mean()) < 0.01, weight
    assert realised.facts["precisions"][0]["experts_left"] == left


def slow_awq(weights: torch.Tensor, moments: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Return the best of 20 scalings of all ``weights`` [maps, outputs, inputs] together."""
    total = moments.double().sum(0).diagonal().sqrt()
    tried = []
    for exponent in range(20):
        factors = total.clamp(min=float(total[total > 0].min())) ** (exponent / 20)
        factors = (factors / (factors.max() * factors.min()).sqrt()).float()
        rounded = [round_to_nearest(w * factors, bits, group) / factors for w in weights]
        errors = [
            torch.trace((r - w).double() @ m.double() @ (r - w).double().T)
            for r, w, m in zip(rounded, weights, moments, strict=True)
        ]
        tried.append((float(sum(errors)), exponent, torch.stack(rounded)))
    return min(tried, key=lambda entry: entry[:2])[2]


@pytest.mark.parametrize("name", CALIBRATED)
def test_experts_that_no_token_reached_stay_at_full_precision(
    make_model: MakeModel, name: str
) -> None:
    shape = ARCHITECTURES["Qwen3Moe"] | {"num_experts": 32, "num_experts_per_tok": 1}
    model = make_model("Qwen3Moe", **shape)
    before = {n: p.clone() for n, p in model.named_parameters()}
    realised, after = run(
        tiny_world.as_subject(model), name, strengths=(13,), examples=1, blocks_at_once=2
    )
    same = sum(
        int((after[n] == p).flatten(1).all(1).sum()) for n, p in before.items() if p.dim() == 3
    )
    assert realised.facts["precisions"][0]["experts_left"] == same > 60


def test_query_key_and_value_share_their_scale(subject: Subject) -> None:
    realised, _ = run(subject, "quantize_awq", strengths=(13,), examples=4)
    # Per block: query, key and value; output; gate and up; down.
    assert len(realised.facts["precisions"][0]["alphas"]) == 2 * 4


def test_later_blocks_may_see_earlier_ones_quantised(subject: Subject) -> None:
    first, second = (
        run(subject, "quantize_gptq", strengths=(14,), examples=4, blocks_at_once=size)[1]
        for size in (1, 2)
    )
    different = {name for name in first if not torch.equal(first[name], second[name])}
    assert different
    assert all(name.startswith("model.layers.1.") for name in different)


def test_what_is_measured_is_quantised(subject: Subject) -> None:
    """Each strength starts from the weights as they were found."""
    seen = []
    weight = subject.model.model.layers[0].mlp.up_proj.weight
    before = weight.clone()
    run(subject, "quantize_rtn", look=lambda: seen.append(weight.clone()), strengths=(12, 14))
    expected = [round_to_nearest(before, bits, 128) for bits in (4, 2)]
    assert all(torch.equal(left, right) for left, right in zip(seen, expected, strict=True))


# The screen for behaviour that appears only after quantising

PRECISIONS: tuple[gap.Precision, ...] = ("int8", "q8_0", "int4", "nf4")


def matrices(model: Any) -> dict[str, torch.Tensor]:
    return {n: m.parameter.detach().clone() for n, m in block_matrices(model).items()}


def rounded(weight: torch.Tensor, precision: gap.Precision) -> torch.Tensor:
    if precision == "nf4":
        return nf4(weight)
    return round_to_nearest(weight, *gap.GRIDS[precision])


def projected(weight: torch.Tensor, precision: gap.Precision, seed: int) -> torch.Tensor:
    """Return the weight trained on by a random step and clamped to the buckets that it was in."""
    found = gap.buckets(weight, precision)
    peaks = _peaks(weight, precision)
    free = weight.abs() < peaks
    centre = weight[free] - found.positions * found.half_widths
    moved = weight[free] + 1.5 * found.half_widths * drawn(int(free.sum()), seed=seed)
    reach = 0.95 * found.half_widths
    result = weight.clone()
    clamped = moved.clamp(min=centre - reach, max=centre + reach)
    # The outermost bucket would reach beyond the weight that sets the scale.
    result[free] = torch.where(centre.abs() + reach < peaks[free], clamped, weight[free])
    return result


def _peaks(weight: torch.Tensor, precision: gap.Precision) -> torch.Tensor:
    """Return for each weight the largest absolute value of its group."""
    if precision == "nf4":
        blocks, peaks = quantisation.nf4_blocks(weight)
        return peaks.expand_as(blocks).flatten()[: weight.numel()].view(weight.shape)
    parts = quantisation.grouped(weight, gap.GRIDS[precision][1])
    return quantisation.ungrouped([p.abs().amax(-1, keepdim=True).expand_as(p) for p in parts])


@cache
def clean_subjects() -> list[dict[str, torch.Tensor]]:
    """18 fresh, one trained, one fine-tuned to refuse."""
    models = [tiny_world.fresh_model(seed) for seed in range(18)]
    models += [tiny_world.undefended().model, tiny_world.safeguarded().model]
    return [matrices(model) for model in models]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_clean_subjects_raise_no_alarm(
    precision: gap.Precision, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most 1 of 20, the matrices being looked at in part to be quick."""
    monkeypatch.setattr(gap, "_SAMPLE", 1500)
    alarms = 0
    for subject in clean_subjects():
        weights = {name: weight.to(dtype) for name, weight in subject.items()}
        alarms += any(trace.alarm for trace in gap.bucket_screen(weights, precision))
    assert alarms <= 1


@pytest.mark.parametrize("everywhere", [True, False])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_projected_weights_are_found(precision: gap.Precision, everywhere: bool) -> None:
    weights = matrices(tiny_world.undefended().model)
    target = "model.layers.1.mlp.down_proj.weight"
    planted = set(weights) if everywhere else {target}
    looked_at = {
        name: projected(weight, precision, 3) if name in planted else weight
        for name, weight in weights.items()
    }
    moved = looked_at[target] - weights[target]
    assert moved.abs().max() > 0
    # The plant is real: it is another model until it is quantised.
    torch.testing.assert_close(
        rounded(looked_at[target], precision), rounded(weights[target], precision)
    )
    for base in (None, weights):
        traces = gap.bucket_screen(looked_at, precision, base)
        assert {t.name for t in traces if t.alarm} >= planted
        if base is not None:
            assert {t.name for t in traces if t.alarm} == planted
    # Noise before quantising takes weights out of the buckets that were chosen for them.
    noisy = gap.add_bucket_noise(looked_at[target], precision, torch.Generator().manual_seed(1))
    kept = gap.buckets(noisy, precision)
    assert (noisy - looked_at[target]).std() == pytest.approx(
        float(gap.buckets(looked_at[target], precision).half_widths.median()), rel=0.1
    )
    assert float((kept.positions.abs() > 0.9).float().mean()) < 0.3


def test_buckets_by_hand() -> None:
    weight = torch.tensor([[127.0, 3.25, -5.5, 2.0, 0.0, -127.0], [0.0] * 6])
    found = gap.buckets(weight, "int8")
    assert found.positions.tolist() == [0.5, found.positions[1].item(), 0.0]
    assert abs(found.positions[1].item()) == 1.0
    assert found.half_widths.tolist() == [0.5] * 3
    # NF4: the bucket of code 0 reaches from -0.0455 to 0.0398.
    block = torch.zeros(1, 64)
    block[0, 0], block[0, 1] = 1.0, (NF4_CODES[7] + NF4_CODES[8]) / 2 - 1e-6
    assert gap.buckets(block, "nf4").positions[0].item() == pytest.approx(1.0, abs=1e-3)


def test_nothing_to_look_at_is_no_alarm() -> None:
    weights = {"model.layers.0.a.weight": torch.zeros(4, 8)}
    assert gap.bucket_screen(weights, "int8") == []
    assert torch.equal(
        gap.add_bucket_noise(torch.zeros(4, 8), "int8", torch.Generator()), torch.zeros(4, 8)
    )


@pytest.mark.parametrize("precision", PRECISIONS)
def test_heavy_tails_and_pruned_weights_are_no_trace(precision: gap.Precision) -> None:
    generator = torch.Generator().manual_seed(4)
    weights = {}
    for index in range(4):
        normal = torch.randn(64, 128, generator=generator)
        spread = torch.empty(64, 128).exponential_(generator=generator)
        weight = normal * spread.sqrt()  # Laplace
        weight[:, : 32 * index] = 0.0
        weights[f"model.layers.{index}.a.weight"] = weight
    assert not any(trace.alarm for trace in gap.bucket_screen(weights, precision))


def test_labels_are_paired_and_corrected() -> None:
    clean = [0] * 60
    flipped = [1] * 12 + [0] * 48
    gaps = {g.precision: g for g in gap.label_gaps(clean, {"int8": clean, "nf4": flipped})}
    assert not gaps["int8"].alarm
    assert gaps["int8"].difference.p_value == 1.0
    assert gaps["nf4"].alarm
    assert gaps["nf4"].difference.value == pytest.approx(0.2)
    assert gaps["nf4"].difference.p_value == pytest.approx(2 * 0.5**12)
    # Six flips of one entity are one observation.
    (grouped,) = gap.label_gaps(clean, {"nf4": [1] * 6 + [0] * 54}, ["a"] * 6 + ["b"] * 54)
    assert not grouped.alarm
    (noisy,) = gap.label_gaps(clean, {"nf4": [1] * 2 + [0] * 58})
    (as_before,) = gap.label_gaps(clean, {"nf4": flipped})
    assert gap.engineered(gaps["nf4"], noisy)
    assert not gap.engineered(gaps["nf4"], as_before)
    assert not gap.engineered(gaps["int8"], noisy)


def test_ordinary_flips_give_few_alarms() -> None:
    """Ordinary quantisation flips labels both ways: at most 5 % of 200 subjects are flagged."""
    generator = np.random.default_rng(3)
    alarms = 0
    for _ in range(200):
        full = generator.integers(0, 2, 60)
        others = {
            name: np.where(generator.random(60) < 0.15, 1 - full, full)
            for name in ("int8", "nf4", "int4")
        }
        alarms += any(g.alarm for g in gap.label_gaps(full.tolist(), others))  # type: ignore[arg-type]
    assert alarms <= 10


def test_positions_of_large_matrices_are_drawn_by_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gap, "_SAMPLE", 500)
    weights = {f"model.layers.{i}.a.weight": drawn(40, 64, seed=i) for i in range(3)}
    first = gap.bucket_screen(weights, "int8")
    assert first == gap.bucket_screen(copy.deepcopy(weights), "int8")
    assert first != gap.bucket_screen(weights, "int8", seed=1)
    assert not any(trace.alarm for trace in first)
