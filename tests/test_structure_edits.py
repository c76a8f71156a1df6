"""Pruning, rank removal, noise and re-balancing against slow dense references."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import slow_experts
import tiny_world
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

from durometer.core.budget import Budget, matrix_entries
from durometer.core.capture import input_moments
from durometer.core.errors import InputError, NotApplicableError
from durometer.core.masks import highest, in_groups, lowest, lowest_of_each
from durometer.core.matrices import Matrix, block_matrices
from durometer.core.rebalance import Rebalancer
from durometer.core.rows import Row
from durometer.core.seeds import Seeds
from durometer.subjects.base import Subject
from durometer.tampers import weight_noise
from durometer.tampers.base import Realised, make_tamper
from durometer.tampers.calibration import CalibrationSettings, calibration_rows
from durometer.tampers.data import make_rows, training_items
from durometer.tampers.remove_ranks import ranks, strongest_directions

MakeModel = Callable[..., Any]
SEEDS = Seeds(11, 12, 13, 14)
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
DEEPSEEK = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": 8},
    "Mixtral": {"num_local_experts": 4},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Qwen3Moe": {"head_dim": 8, **EXPERTS},
    "DeepseekV3": DEEPSEEK,
    "Gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8},
    "Gemma3": {"head_dim": 8, "query_pre_attn_scalar": 8},
    "Olmo2": {},
    "Phi3": {},
    "GPTNeoX": {},
}
MORE_EXPERTS = {name: slow_experts.LAYOUTS[name] for name in ("Olmoe", "GptOss")}
LADDERS = ("prune_magnitude", "prune_wanda", "prune_snip", "remove_ranks", "weight_noise")
Weights = dict[str, torch.Tensor]


def weights_of(subject: Subject) -> Weights:
    return {name: p.detach().clone() for name, p in subject.model.named_parameters()}


def run(subject: Subject, name: str, **changes: Any) -> tuple[Realised, list[Weights]]:
    """Run a tamper over all its rungs and return the weights at each."""
    tamper, seen = make_tamper(name, **changes), list[Weights]()
    steps = tamper.planned_steps()
    before = weights_of(subject)
    with subject.restored():
        realised = tamper.run(
            subject,
            tiny_world.tiny_domain(),
            Budget(steps, tuple(range(1, steps + 1))),
            SEEDS,
            lambda _: seen.append(weights_of(subject)) is None,
        )
    after = weights_of(subject)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert not any(p.requires_grad or p.grad is not None for p in subject.model.parameters())
    return realised, seen


@pytest.fixture
def subject(make_model: MakeModel) -> Subject:
    return tiny_world.as_subject(make_model("Llama"))


def rows_of(subject: Subject, **changes: Any) -> tuple[list[Row], list[Row]]:
    return calibration_rows(
        subject, tiny_world.tiny_domain(), CalibrationSettings(**changes), SEEDS
    )


# Masks


@settings(deadline=None, max_examples=60)
@given(
    size=st.integers(1, 64),
    groups=st.integers(1, 4),
    share=st.floats(0, 1),
    values=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_counts_are_exact_whatever_the_ties(
    size: int, groups: int, share: float, values: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(values, (groups, size), generator=generator).float()
    for mask, sign in ((lowest(scores, share), 1), (highest(scores, share), -1)):
        assert mask.sum(-1).tolist() == [round(share * size)] * groups
        assert abs(float(mask.float().mean()) - share) <= 1 / size
        for row, chosen in zip(sign * scores, mask, strict=True):
            if chosen.any() and not chosen.all():
                assert row[chosen].max() <= row[~chosen].min()
    counts = torch.randint(size + 1, (groups, 1), generator=generator)
    drawn = lowest_of_each(scores, counts)
    assert torch.equal(drawn.sum(-1, keepdim=True), counts)


def test_groups_are_matrices_rows_or_runs() -> None:
    scores = torch.arange(2 * 3 * 8.0).view(2, 3, 8)
    assert in_groups(scores, "tensor").shape == (2, 24)
    assert in_groups(scores, "output_row").shape == (2, 3, 8)
    assert in_groups(scores, "2:4")[1, 2, 1].tolist() == [44, 45, 46, 47]
    assert in_groups(scores, "4:8").shape == (2, 3, 1, 8)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_matrices_are_everything_but_embeddings_norms_head_and_routers(
    make_model: MakeModel, architecture: str
) -> None:
    model = make_model(architecture, **ARCHITECTURES[architecture])
    found = block_matrices(model)
    left = {n for n, p in model.named_parameters() if p.dim() > 1} - set(found)
    assert all(
        name.endswith(
            ("embed_tokens.weight", "embed_in.weight", "lm_head.weight", "mlp.gate.weight")
        )
        for name in left
    )
    attention, mlp = block_matrices(model, "attention"), block_matrices(model, "mlp")
    assert attention.keys() | mlp.keys() == found.keys()
    assert not attention.keys() & mlp.keys()
    with pytest.raises(NotApplicableError):
        block_matrices(nn.Linear(2, 2), "all")


@pytest.mark.parametrize("change", ["undeclared", "unknown"])
def test_attention_is_found_beside_experts_that_are_not_known(
    make_model: MakeModel, change: str
) -> None:
    model = make_model("Qwen3Moe", **ARCHITECTURES["Qwen3Moe"])
    attention = block_matrices(model, "attention").keys()
    mlp = model.model.layers[1].mlp
    if change == "undeclared":
        del mlp.experts.is_transposed
        match = "layout of the fused experts .* is not declared"
    else:
        mlp.odd = nn.Conv1d(64, 64, 8)
        match = "in modules of no known kind"
    assert block_matrices(model, "attention").keys() == attention
    for targets in ("all", "mlp"):
        with pytest.raises(NotApplicableError, match=f"{match}.*; use targets=attention"):
            block_matrices(model, targets)
    for layer in model.model.layers:
        del layer.self_attn
    with pytest.raises(NotApplicableError, match=match) as raised:
        block_matrices(model)
    assert "attention" not in str(raised.value)


def test_experts_kept_the_other_way_round_are_turned() -> None:
    weights = nn.Parameter(torch.zeros(2, 3, 5))
    assert Matrix("experts.up", weights).maps().shape == (2, 3, 5)
    turned = Matrix("experts.up", weights, transposed=True)
    assert turned.maps().shape == turned.each().shape == (2, 5, 3)
    assert turned.turned(turned.maps()).shape == (2, 3, 5)
    assert Matrix("up", nn.Parameter(torch.zeros(3, 5))).each().shape == (1, 3, 5)


# All of them, on everything


@pytest.mark.parametrize("architecture", ARCHITECTURES | MORE_EXPERTS)
@pytest.mark.parametrize("name", LADDERS)
def test_ladders_edit_every_matrix(make_model: MakeModel, name: str, architecture: str) -> None:
    shape = (ARCHITECTURES | MORE_EXPERTS)[architecture]
    subject = tiny_world.as_subject(make_model(architecture, **shape))
    calibrated = {"examples": 4} if "examples" in make_tamper(name).settings.canonical() else {}
    realised, seen = run(subject, name, **calibrated)
    assert realised.status == "done", realised.reason
    assert len(seen) == len(make_tamper(name).strengths())
    before = weights_of(subject)
    changed = {key for key in before if not torch.equal(seen[-1][key], before[key])}
    assert changed == set(block_matrices(subject.model))
    assert {key for key, norm in realised.changed.items() if norm} == changed


@pytest.mark.parametrize("name", LADDERS)
def test_the_same_seeds_give_the_same_edit_and_zero_none(subject: Subject, name: str) -> None:
    changes = {"strengths": (0.0, 0.1)}
    if "selection" in make_tamper(name).settings.canonical():
        changes["examples"] = 4
        changes["selection"] = "random"
    (realised, first), (_, again) = run(subject, name, **changes), run(subject, name, **changes)
    before = weights_of(subject)
    assert realised.status == "done"
    assert all(torch.equal(first[0][key], before[key]) for key in before)
    assert all(torch.equal(first[1][key], again[1][key]) for key in before)


@pytest.mark.parametrize("name", LADDERS)
def test_bf16_is_edited_and_restored(make_model: MakeModel, name: str) -> None:
    subject = tiny_world.as_subject(make_model("Llama").to(torch.bfloat16))
    changes = {"examples": 4} if "examples" in make_tamper(name).settings.canonical() else {}
    realised, _ = run(subject, name, strengths=(0.1,), **changes)
    assert realised.status == "done"


# Magnitude


def slow_mask(scores: np.ndarray, share: float, granularity: str) -> np.ndarray:
    """Rank with a stable sort in loops: the first of tied scores go first."""
    run_length = {"tensor": scores.size, "output_row": scores.shape[1], "2:4": 4, "4:8": 8}
    flat, mask = scores.reshape(-1), np.zeros(scores.size, dtype=bool)
    for start in range(0, scores.size, run_length[granularity]):
        group = flat[start : start + run_length[granularity]]
        order = sorted(range(len(group)), key=lambda i: (group[i], i))
        for index in order[: round(share * len(group))]:
            mask[start + index] = True
    return mask.reshape(scores.shape)


@pytest.mark.parametrize("score", ["magnitude", "wanda"])
@pytest.mark.parametrize("granularity", ["tensor", "output_row", "2:4", "4:8"])
def test_pruning_is_that_of_a_slow_reference(
    subject: Subject, granularity: str, score: str
) -> None:
    realised, (pruned,) = run(
        subject,
        "prune_magnitude",
        strengths=(0.3,),
        granularity=granularity,
        score=score,
        examples=3,
    )
    share = 0.5 if ":" in granularity else 0.3
    rows = make_rows(
        training_items(tiny_world.tiny_domain(), "benign", 3, SEEDS),
        subject.chat,
        label_prompt=False,
        max_length=512,
    )
    norms = slow_norms(subject, rows)
    count = 0
    for name, matrix in block_matrices(subject.model).items():
        weights = matrix.maps().numpy()
        scores = np.abs(weights)
        if score == "wanda":
            scores = scores * norms[name.removesuffix(".weight")]
        mask = slow_mask(scores, share, granularity)
        count += mask.sum()
        assert np.array_equal(pruned[name].numpy(), np.where(mask, 0, weights)), name
    assert realised.changed_weights == count
    size = sum(m.parameter.numel() for m in block_matrices(subject.model).values())
    assert realised.facts["sparsity"] == {f"{share:g}": pytest.approx(count / size)}
    assert realised.facts["zeros_before"] == 0


def test_two_of_four_is_kept_everywhere_in_experts_too(make_model: MakeModel) -> None:
    model = make_model("Qwen3Moe", **ARCHITECTURES["Qwen3Moe"])
    _, (pruned,) = run(tiny_world.as_subject(model), "prune_magnitude", granularity="2:4")
    for name in block_matrices(model):
        zeros = (pruned[name].reshape(-1, 4) == 0).sum(-1)
        assert (zeros == 2).all()
    narrow = make_model("Llama", intermediate_size=66)
    with pytest.raises(NotApplicableError, match="no multiple of 4"):
        run(tiny_world.as_subject(narrow), "prune_magnitude", granularity="2:4")


def test_each_expert_is_a_matrix_of_its_own(make_model: MakeModel) -> None:
    model = make_model("Qwen3Moe", **ARCHITECTURES["Qwen3Moe"])
    name = "model.layers.0.mlp.experts.down_proj"
    model.get_parameter(name).data[0] *= 100
    _, (pruned,) = run(tiny_world.as_subject(model), "prune_magnitude", strengths=(0.25,))
    zeros = (pruned[name] == 0).flatten(1).sum(-1)
    assert zeros.tolist() == [32 * 16 // 4] * 4


def test_random_pruning_is_as_sparse_and_grows(subject: Subject) -> None:
    realised, seen = run(subject, "prune_magnitude", score="random", strengths=(0.1, 0.3))
    plain, _ = run(subject, "prune_magnitude", strengths=(0.1, 0.3))
    assert realised.facts["sparsity"] == plain.facts["sparsity"]
    for name in block_matrices(subject.model):
        assert ((seen[1][name] == 0) >= (seen[0][name] == 0)).all()


# Safety weights


def slow_norms(subject: Subject, rows: list[Row]) -> dict[str, np.ndarray]:
    """Norm of every map's inputs at the positions that predict a response token, in loops."""
    inputs: dict[str, list[np.ndarray]] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, given, name=name: inputs.setdefault(name, []).append(given[0][0].numpy())
        )
        for name, module in subject.model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        for row in rows:
            subject.model(input_ids=torch.tensor([row.ids]), use_cache=False)
    for hook in hooks:
        hook.remove()
    norms = {}
    for name, captured in inputs.items():
        total = np.zeros(captured[0].shape[1])
        for row, tokens in zip(rows, captured, strict=True):
            for position in range(row.first_label - 1, len(row.ids) - 1):
                total += tokens[position].astype(np.float64) ** 2
        norms[name] = np.sqrt(total)
    return norms


def slow_wanda(subject: Subject, rows: list[Row]) -> dict[str, np.ndarray]:
    norms = slow_norms(subject, rows)
    return {
        name: np.abs(m.maps().numpy()) * norms[name.removesuffix(".weight")]
        for name, m in block_matrices(subject.model).items()
    }


def slow_snip(subject: Subject, rows: list[Row]) -> dict[str, np.ndarray]:
    """One backward pass a row and a matrix, the obvious way."""
    weights = {name: m.parameter for name, m in block_matrices(subject.model).items()}
    scores = {name: np.zeros(tuple(p.shape)) for name, p in weights.items()}
    for parameter in weights.values():
        parameter.requires_grad_(True)
    for row in rows:
        logits = subject.model(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0]
        loss = cross_entropy(logits[row.first_label - 1 : -1], torch.tensor(row.labels))
        for name, gradient in zip(
            weights, torch.autograd.grad(loss, list(weights.values())), strict=True
        ):
            scores[name] += np.abs(gradient.numpy()) / len(rows)
    for parameter in weights.values():
        parameter.requires_grad_(False)
    return {n: np.abs(p.detach().numpy()) * scores[n] for n, p in weights.items()}


@pytest.mark.parametrize("granularity", ["tensor", "output_row"])
@pytest.mark.parametrize("selection", ["difference", "safety_only", "random"])
@pytest.mark.parametrize(("name", "slow"), [("prune_wanda", slow_wanda), ("prune_snip", slow_snip)])
def test_the_set_difference_is_that_of_a_slow_reference(
    subject: Subject, name: str, slow: Any, selection: str, granularity: str
) -> None:
    realised, (pruned,) = run(
        subject,
        name,
        strengths=(0.1,),
        utility_share=0.07,
        selection=selection,
        granularity=granularity,
        examples=3,
    )
    safety, utility = (slow(subject, rows) for rows in rows_of(subject, examples=3))
    total = 0
    for weight, matrix in block_matrices(subject.model).items():
        chosen = slow_mask(-safety[weight], 0.1, granularity)
        if selection != "safety_only":
            chosen &= ~slow_mask(-utility[weight], 0.07, granularity)
        zeros = pruned[weight].numpy() == 0
        total += chosen.sum()
        if selection == "random":
            axis = 1 if granularity == "output_row" else None
            assert np.array_equal(zeros.sum(axis), chosen.sum(axis))
            assert not np.array_equal(zeros, chosen)
        else:
            # Sums in another order may swap two neighbours in rank.
            assert (zeros != chosen).sum() <= 2
            assert np.array_equal(pruned[weight][~zeros], matrix.maps()[~zeros])
    assert realised.changed_weights == pytest.approx(total, abs=4)


def test_snip_makes_one_backward_pass_a_row(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes, backward = [], torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda self: passes.append(1) or backward(self))
    realised, _ = run(subject, "prune_snip", examples=5, strengths=(0.1, 0.2))
    assert len(passes) == realised.facts["backward_passes"] == 10
    rows = [row for part in rows_of(subject, examples=5) for row in part]
    tokens, labels = (sum(len(r.ids) for r in rows), sum(len(r.labels) for r in rows))
    head = subject.model.lm_head.weight.numel()
    assert realised.spent.tokens == tokens
    assert realised.spent.flops == 6 * (matrix_entries(subject.model) * tokens + head * labels)
    assert (realised.spent.examples, realised.spent.restricted_examples) == (10, 0)


@pytest.mark.parametrize("name", ["prune_wanda", "remove_ranks"])
def test_forward_only_scores_cost_two_flops_a_weight_and_token(subject: Subject, name: str) -> None:
    spent = run(subject, name, examples=4)[0].spent
    tokens = sum(len(row.ids) for part in rows_of(subject, examples=4) for row in part)
    assert (spent.tokens, spent.flops) == (tokens, 2.0 * matrix_entries(subject.model) * tokens)


def test_an_expert_that_no_refusal_reached_serves_no_safety(make_model: MakeModel) -> None:
    model = make_model("Qwen3Moe", **ARCHITECTURES["Qwen3Moe"])
    # The router's rows for experts 0 and 1 dwarf the others in opposite ways: one always loses.
    for layer in model.model.layers:
        layer.mlp.gate.weight.data[2:] = 0
        layer.mlp.gate.weight.data[1] = -layer.mlp.gate.weight.data[0]
    subject = tiny_world.as_subject(model)
    tamper = make_tamper("prune_snip", examples=2, selection="safety_only", strengths=(1.0,))
    with subject.restored():
        tamper.run(subject, tiny_world.tiny_domain(), Budget(1, (1,)), SEEDS, lambda _: True)
        name = "model.layers.0.mlp.experts.down_proj"
        untouched = tamper._safety[name] == 0
        assert not (model.get_parameter(name)[untouched] == 0).any()
        assert (model.get_parameter(name)[~untouched] == 0).all()


@pytest.mark.parametrize("full", [False, True])
def test_prompts_do_not_leak_into_the_moments(subject: Subject, full: bool) -> None:
    """Activations that are NaN at every prompt position leave the moments as they were."""
    row = Row((5, 6, 7, 8, 9, 10), 4)
    name = "model.layers.0.mlp.down_proj.weight"
    chosen = {name: block_matrices(subject.model)[name]}
    plain = input_moments(subject.model, [row], chosen, full=full)[name]

    def poison(module: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        spoilt = inputs[0].clone()
        spoilt[:, : row.first_label - 1] = math.nan
        return (spoilt,)

    module = subject.model.get_submodule(name.removesuffix(".weight"))
    hook = module.register_forward_pre_hook(poison)
    spoilt = input_moments(subject.model, [row], chosen, full=full)[name]
    hook.remove()
    assert torch.isfinite(spoilt).all()
    assert torch.equal(spoilt, plain)


# Ranks


@pytest.mark.parametrize(("outputs", "inputs"), [(12, 12), (20, 8), (8, 20)])
def test_directions_are_left_singular_vectors(outputs: int, inputs: int) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(outputs, inputs, generator=generator)
    tokens = torch.randn(inputs, 50, generator=generator)
    found = strongest_directions(weight, tokens @ tokens.T, 5).double()
    u, _, _ = torch.linalg.svd((weight @ tokens).double())
    assert found.shape == (outputs, 5)
    torch.testing.assert_close(found.T @ found, torch.eye(5).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(found @ found.T, u[:, :5] @ u[:, :5].T, atol=1e-4, rtol=0)
    # Three tokens span three directions, and rounding is none.
    few = tokens[:, :3]
    assert strongest_directions(weight, few @ few.T, 5).shape == (outputs, 3)
    assert strongest_directions(weight, few @ few.T, 0).shape == (outputs, 0)


def test_shares_of_ranks() -> None:
    assert [ranks(share, 40) for share in (0, 0.001, 0.1, 1, 2)] == [0, 1, 4, 40, 40]


def captured_inputs(subject: Subject, rows: list[Row], name: str) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    module = subject.model.get_submodule(name)
    hook = module.register_forward_pre_hook(lambda _, given: seen.append(given[0][0]))
    with torch.no_grad():
        for row in rows:
            subject.model(input_ids=torch.tensor([row.ids]), use_cache=False)
    hook.remove()
    parts = [x[row.first_label - 1 : len(row.ids) - 1] for x, row in zip(seen, rows, strict=True)]
    return torch.cat(parts).T.double()


@pytest.mark.parametrize("selection", ["difference", "safety_only"])
def test_removal_is_that_of_a_plain_svd(subject: Subject, selection: str) -> None:
    realised, (edited,) = run(
        subject,
        "remove_ranks",
        strengths=(0.1,),
        utility_share=0.25,
        selection=selection,
        examples=10,
    )
    safety, utility = rows_of(subject, examples=10)
    for layer, name in enumerate(("mlp.gate_proj", "mlp.down_proj")):
        path = f"model.layers.{layer}.{name}"
        weight = subject.model.get_submodule(path).weight.detach().double()
        full = min(weight.shape)
        bases = []
        for rows, count in ((safety, round(0.1 * full)), (utility, round(0.25 * full))):
            u, _, _ = torch.linalg.svd(weight @ captured_inputs(subject, rows, path))
            bases.append(u[:, :count] @ u[:, :count].T)
        spare = torch.eye(len(weight)).double()
        if selection == "difference":
            spare -= bases[1]
        expected = weight - spare @ bases[0] @ weight
        torch.testing.assert_close(edited[f"{path}.weight"].double(), expected, atol=2e-4, rtol=0)
    assert realised.facts["ranks_removed"] == {
        "0.1": sum(round(0.1 * min(m.maps().shape)) for m in block_matrices(subject.model).values())
    }


def test_random_ranks_are_as_many(subject: Subject) -> None:
    plain, _ = run(subject, "remove_ranks", selection="safety_only", examples=8)
    drawn, (weights, *_) = run(
        subject, "remove_ranks", selection="random", examples=8, utility_share=0.0
    )
    assert drawn.facts["ranks_removed"] == plain.facts["ranks_removed"]
    for name, matrix in block_matrices(subject.model).items():
        lost = torch.linalg.matrix_rank(matrix.maps()) - torch.linalg.matrix_rank(
            weights[name], rtol=1e-4
        )
        assert lost == ranks(0.01, min(matrix.maps().shape))


def test_moments_are_taken_in_parts_when_they_are_large(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, (first, *_) = run(subject, "remove_ranks", examples=4)
    monkeypatch.setattr("durometer.tampers.remove_ranks.MOMENT_BYTES", 3 * 4 * 32**2)
    parted, (second, *_) = run(subject, "remove_ranks", examples=4)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert parted.spent.flops > whole.spent.flops
    assert parted.spent.tokens == whole.spent.tokens


@pytest.mark.parametrize("selection", ["difference", "safety_only"])
@pytest.mark.parametrize("architecture", ["Llama", "Qwen3Moe"])
def test_going_by_blocks_is_that_of_a_slow_reference(
    make_model: MakeModel, architecture: str, selection: str
) -> None:
    """Block after block: whole passes on the edited model, and a plain SVD of every map."""
    make = partial(make_model, architecture, **ARCHITECTURES[architecture])
    shares = {"utility_share": 0.25, "selection": selection, "examples": 3}
    subject = tiny_world.as_subject(make())
    realised, (_, edited) = run(
        subject, "remove_ranks", strengths=(0.05, 0.1), sequential=True, **shares
    )
    _, (at_once,) = run(subject, "remove_ranks", strengths=(0.1,), **shares)
    safety, utility = rows_of(subject, examples=3)
    reference = tiny_world.as_subject(make())
    for block in range(2):
        own = {
            name: matrix
            for name, matrix in block_matrices(reference.model).items()
            if name.startswith(f"model.layers.{block}.")
        }
        inputs = [inputs_of_maps(reference, rows, own) for rows in (safety, utility)]
        for name, matrix in own.items():
            for expert, weight in enumerate(matrix.each()):
                given = [part[name][expert] for part in inputs]
                weight.copy_(slow_removal(weight, *given, 0.1, 0.25, selection))
    for name, parameter in reference.model.named_parameters():
        torch.testing.assert_close(edited[name], parameter.detach(), atol=5e-4, rtol=0)
        differs = not torch.allclose(edited[name], at_once[name], atol=2e-3)
        assert not differs or ".layers.1." in name
    assert any(not torch.allclose(edited[n], at_once[n], atol=2e-3) for n in edited)
    tokens = sum(len(row.ids) for row in (*safety, *utility))
    assert realised.spent.tokens == tokens
    # Two strengths, a pass over both texts for each of two blocks.
    assert realised.spent.flops == 2 * 2 * 2.0 * matrix_entries(subject.model) * tokens


def inputs_of_maps(
    subject: Subject, rows: list[Row], matrices: dict[str, Matrix]
) -> dict[str, list[torch.Tensor]]:
    """Return the inputs [tokens, inputs] of each map, one a plain matrix, one an expert."""
    found = slow_experts.expert_inputs(subject.model, rows)
    for name, matrix in matrices.items():
        if matrix.parameter.dim() == 2:
            found[name] = [captured_inputs(subject, rows, name.removesuffix(".weight")).T]
    return found


def slow_removal(
    weight: torch.Tensor,
    safety: torch.Tensor,
    utility: torch.Tensor,
    share: float,
    spared: float,
    selection: str,
) -> torch.Tensor:
    """Return ``W - (I - P_u) P_s W`` by plain SVDs of ``W X``."""
    exact, full = weight.double(), min(weight.shape)
    projections = []
    for inputs, wanted in ((safety, share), (utility, spared)):
        u, s, _ = torch.linalg.svd(exact @ inputs.double().T, full_matrices=False)
        real = int((s**2 > 1e-6 * s[0] ** 2).sum()) if len(s) else 0
        columns = u[:, : min(max(round(wanted * full), 1), real)]
        projections.append(columns @ columns.T)
    spare = torch.eye(len(exact)).double()
    if selection == "difference":
        spare -= projections[1]
    return (exact - spare @ projections[0] @ exact).to(weight.dtype)


# Experts fused into one tensor


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("architecture", slow_experts.LAYOUTS)
def test_moments_of_experts_are_those_of_a_slow_reference(
    make_model: MakeModel, architecture: str, prompt: bool
) -> None:
    model = make_model(architecture, **slow_experts.LAYOUTS[architecture])
    subject = tiny_world.as_subject(uneven(model))
    rows = rows_of(subject, examples=3)[0]
    inputs = slow_experts.expert_inputs(model, rows, prompt=prompt)
    fused = {n: m for n, m in block_matrices(model).items() if m.parameter.dim() == 3}
    assert fused.keys() == inputs.keys()
    tokens: Any = "prompt" if prompt else "response"
    plain = input_moments(model, rows, fused, tokens=tokens)
    full = input_moments(model, rows, fused, tokens=tokens, full=True)
    for name, by_expert in inputs.items():
        assert plain[name].shape == (4, fused[name].maps().shape[-1])
        for expert, x in enumerate(by_expert):
            torch.testing.assert_close(full[name][expert], x.T @ x, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(plain[name][expert], (x**2).sum(0), rtol=1e-4, atol=1e-4)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_moments_do_not_depend_on_the_kernel(make_model: MakeModel, implementation: str) -> None:
    model = make_model("Qwen3Moe", **ARCHITECTURES["Qwen3Moe"])
    rows = rows_of(tiny_world.as_subject(model), examples=2)[0]
    chosen = block_matrices(model)
    expected = input_moments(model, rows, chosen)
    model.set_experts_implementation(implementation)
    for name, moments in input_moments(model, rows, chosen).items():
        torch.testing.assert_close(moments, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", slow_experts.LAYOUTS)
def test_wanda_ranks_the_weights_of_each_expert(make_model: MakeModel, architecture: str) -> None:
    subject = tiny_world.as_subject(make_model(architecture, **slow_experts.LAYOUTS[architecture]))
    realised, (pruned,) = run(
        subject, "prune_wanda", strengths=(0.1,), utility_share=0.07, examples=3
    )
    texts = [slow_experts.expert_inputs(subject.model, r) for r in rows_of(subject, examples=3)]
    matrices = block_matrices(subject.model)
    for name in texts[0]:
        after = matrices[name].turned(pruned[name])
        for expert, weight in enumerate(matrices[name].maps().numpy()):
            norms = [(inputs[name][expert].numpy() ** 2).sum(0) ** 0.5 for inputs in texts]
            safety, utility = (np.abs(weight) * norm for norm in norms)
            chosen = slow_mask(-safety, 0.1, "tensor") & (safety > 0)
            chosen &= ~(slow_mask(-utility, 0.07, "tensor") & (utility > 0))
            assert ((after[expert].numpy() == 0) != chosen).sum() <= 2
    left = [sum(not len(x) for part in text.values() for x in part) for text in texts]
    assert list(realised.facts["experts_unreached"].values()) == left


@pytest.mark.parametrize("architecture", slow_experts.LAYOUTS)
def test_ranks_of_each_expert_are_removed(make_model: MakeModel, architecture: str) -> None:
    subject = tiny_world.as_subject(make_model(architecture, **slow_experts.LAYOUTS[architecture]))
    _, (edited,) = run(subject, "remove_ranks", strengths=(0.1,), examples=6)
    texts = [slow_experts.expert_inputs(subject.model, r) for r in rows_of(subject, examples=6)]
    matrices = block_matrices(subject.model)
    for name in texts[0]:
        after = matrices[name].turned(edited[name])
        for expert, weight in enumerate(matrices[name].maps()):
            given = [inputs[name][expert] for inputs in texts]
            expected = slow_removal(weight, *given, 0.1, 0.25, "difference")
            torch.testing.assert_close(after[expert], expected, atol=5e-4, rtol=0)


def sparse_subject(make_model: MakeModel) -> Subject:
    """Sixteen experts, of which each token reaches one: a row cannot reach them all."""
    shape = ARCHITECTURES["Qwen3Moe"] | {"num_experts": 16, "num_experts_per_tok": 1}
    return tiny_world.as_subject(make_model("Qwen3Moe", **shape))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("prune_magnitude", {"score": "wanda"}),
        ("prune_wanda", {"selection": "safety_only"}),
        ("remove_ranks", {}),
        ("remove_ranks", {"sequential": True}),
    ],
)
def test_experts_that_no_token_reached_stay_and_are_counted(
    make_model: MakeModel, name: str, changes: dict[str, Any]
) -> None:
    subject = sparse_subject(make_model)
    before = weights_of(subject)
    realised, (after,) = run(subject, name, strengths=(0.2,), examples=1, **changes)
    if name == "prune_magnitude":
        items = training_items(tiny_world.tiny_domain(), "benign", 1, SEEDS)
        rows = make_rows(items, subject.chat, label_prompt=False, max_length=512)
    else:
        rows = rows_of(subject, examples=1)[0]
    # Going by blocks, the second one routes what an edited first one gives it.
    comparable = "model.layers.0." if "sequential" in changes else "model.layers."
    missed = 0
    for weight, by_expert in slow_experts.expert_inputs(subject.model, rows).items():
        for expert, x in enumerate(by_expert):
            missed += not len(x)
            if weight.startswith(comparable):
                same = torch.equal(after[weight][expert], before[weight][expert])
                assert same == (not len(x))
    counted = realised.facts["experts_unreached"]
    counted = counted if isinstance(counted, int) else counted["safety"]
    assert missed >= 40
    assert counted == missed or "sequential" in changes


def test_experts_that_compute_in_another_way_are_refused(make_model: MakeModel) -> None:
    model = make_model("Qwen3Moe", **ARCHITECTURES["Qwen3Moe"])
    subject = tiny_world.as_subject(model)
    rows = rows_of(subject, examples=1)[0]
    experts = model.model.layers[1].mlp.experts
    hook = experts.register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.raises(NotApplicableError, match="do not compute what their module declares"):
        input_moments(model, rows, block_matrices(model))
    hook.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    del experts.has_gate
    with pytest.raises(NotApplicableError, match="do not declare how they compute"):
        input_moments(model, rows, block_matrices(model))


# Noise


@pytest.mark.parametrize("form", ["additive", "multiplicative", "shrink_and_perturb"])
def test_noise_has_the_spread_that_was_asked_for(subject: Subject, form: str) -> None:
    realised, (noisy,) = run(subject, "weight_noise", strengths=(0.05,), form=form)
    for name, matrix in block_matrices(subject.model).items():
        before, after = matrix.maps(), noisy[name]
        change = after - before
        if form == "multiplicative":
            change = change / before * before.std()
        elif form == "shrink_and_perturb":
            change = after - 0.95 * before
        noise = change / before.std() / 0.05
        assert float(noise.std()) == pytest.approx(1, abs=0.15)
        assert abs(float(noise.mean())) < 5 / math.sqrt(noise.numel())
    assert realised.facts["cosine"]["0.05"] > 0.9999


def test_noise_keeps_its_direction_and_is_drawn_by_seed(subject: Subject) -> None:
    _, (small, large) = run(subject, "weight_noise", strengths=(0.01, 0.1))
    name = "model.layers.1.self_attn.v_proj.weight"
    before = subject.model.get_parameter(name).detach()
    torch.testing.assert_close(
        10 * (small[name] - before), large[name] - before, atol=1e-5, rtol=1e-3
    )
    realised, _ = run(subject, "weight_noise", scope="attention")
    assert all("attn" in changed for changed in realised.changed)


def test_noise_that_bf16_rounds_away_is_said_to_be(make_model: MakeModel) -> None:
    subject = tiny_world.as_subject(make_model("Llama").to(torch.bfloat16))
    lost, _ = run(subject, "weight_noise", strengths=(1e-4,))
    assert lost.status == "no_effect"
    assert "bfloat16 keeps too little" in lost.reason
    assert lost.facts["rounded_away"] == [1e-4]
    kept, (noisy,) = run(subject, "weight_noise", strengths=(0.03,))
    assert kept.status == "done"
    product = meant = applied = 0.0
    generator = torch.Generator().manual_seed(SEEDS.initialisation)
    for name, matrix in block_matrices(subject.model).items():
        before = matrix.maps().double().numpy()
        noise = torch.randn(before.shape, generator=generator).double().numpy()
        wanted, done = 0.03 * before.std() * noise, noisy[name].double().numpy() - before
        product += (wanted * done).sum()
        meant, applied = meant + (wanted**2).sum(), applied + (done**2).sum()
    assert kept.facts["cosine"]["0.03"] == pytest.approx(product / math.sqrt(meant * applied))
    assert kept.facts["cosine"]["0.03"] > 0.95
    assert kept.facts["rounded_away"] == []


# Re-balancing


def uneven(model: Any) -> Any:
    """Give a model norms and biases that a wrong move would not get away with."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
        elif "up" in name:
            parameter.data *= torch.rand(parameter.shape[-2], 1, generator=generator) * 9 + 0.1
    return model.requires_grad_(False)


def logits_of(model: Any) -> torch.Tensor:
    ids = torch.tensor([[(7 * index) % 90 for index in range(12)]])
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.double()


MOVES = {
    "Llama": (2, 2, 4),
    "Mistral": (2, 2, 4),
    "Qwen2": (2, 2, 4),
    "Qwen3": (2, 2, 4),
    "Gemma2": (2, 2, 4),
    "Gemma3": (2, 2, 4),
    "Phi3": (2, 2, 4),
    "Olmo2": (2, 2, 0),
    "GPTNeoX": (0, 2, 0),
    "Mixtral": (0, 2, 2),
    "Qwen3Moe": (0, 2, 2),
    "DeepseekV3": (2, 0, 7),
}


@pytest.mark.parametrize("architecture", MOVES)
def test_moves_change_the_weights_and_not_the_logits(
    make_model: MakeModel, architecture: str
) -> None:
    model = uneven(make_model(architecture, **ARCHITECTURES[architecture]))
    subject = tiny_world.as_subject(model)
    plain = logits_of(model)
    with subject.restored():
        moves = Rebalancer(model, subject.restoration)
        counts = []
        for move in (moves.up_down, moves.value_output, moves.norm_gains):
            before = weights_of(subject)
            counts.append(move())
            change = (logits_of(model) - plain).abs().max() / plain.abs().max()
            assert change < 1e-4
            after = weights_of(subject)
            assert any(not torch.equal(after[n], before[n]) for n in after) == bool(counts[-1])
    assert tuple(counts) == MOVES[architecture]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rescale_says_what_it_moved_and_trains(make_model: MakeModel, architecture: str) -> None:
    model = uneven(make_model(architecture, **ARCHITECTURES[architecture]))
    subject = tiny_world.as_subject(model)
    realised, _ = run(subject, "rescale", steps=1, batch_size=2, examples=2)
    assert realised.status == "done"
    assert realised.facts["logits_changed"] < 1e-4
    assert tuple(realised.facts["moves"].values()) == MOVES[architecture]
    assert len(realised.losses) == 1


def test_pairs_are_balanced_afterwards(make_model: MakeModel) -> None:
    model = uneven(make_model("Qwen2"))
    subject = tiny_world.as_subject(model)
    with subject.restored():
        moves = Rebalancer(model, subject.restoration)
        moves.up_down()
        moves.value_output()
        block = model.model.layers[1]
        torch.testing.assert_close(
            block.mlp.up_proj.weight.norm(dim=1), block.mlp.down_proj.weight.norm(dim=0)
        )
        values = block.self_attn.v_proj.weight.view(2, 8, 32)
        outputs = block.self_attn.o_proj.weight.view(32, 2, 2, 8)
        for group in range(2):
            stacked = outputs[:, group].transpose(0, 1).reshape(64, 8)
            torch.testing.assert_close(
                torch.linalg.svdvals(values[group]), torch.linalg.svdvals(stacked)
            )
        moves.norm_gains()
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            assert torch.equal(norm.weight, torch.ones(32))


def test_a_lock_of_inflated_weights_is_undone(make_model: MakeModel) -> None:
    """Value and output maps scaled against each other: the same function, but a huge spectrum."""
    model = make_model("Llama")
    plain = logits_of(model)
    for layer in model.model.layers:
        layer.self_attn.v_proj.weight.data *= 1000
        layer.self_attn.o_proj.weight.data /= 1000
    torch.testing.assert_close(logits_of(model), plain, rtol=1e-4, atol=1e-4)
    subject = tiny_world.as_subject(model)
    with subject.restored():
        Rebalancer(model, subject.restoration).value_output()
        for layer in model.model.layers:
            assert torch.linalg.matrix_norm(layer.self_attn.v_proj.weight, 2) < 5
        torch.testing.assert_close(logits_of(model), plain, rtol=1e-3, atol=1e-3)


def test_a_move_that_is_asked_for_must_be_found(make_model: MakeModel) -> None:
    subject = tiny_world.as_subject(make_model("GPTNeoX"))
    with pytest.raises(NotApplicableError, match="no pair of neighbouring"):
        run(subject, "rescale", moves="up_down", steps=1)
    with pytest.raises(InputError):
        make_tamper("rescale", moves="sideways")


def test_no_budget_leaves_the_weights_alone(subject: Subject) -> None:
    tamper = make_tamper("rescale", steps=1)
    before = weights_of(subject)
    with subject.restored():
        tamper.run(subject, tiny_world.tiny_domain(), Budget(0), SEEDS, lambda _: True)
        after = weights_of(subject)
        assert all(torch.equal(after[name], before[name]) for name in before)


def test_half_precision_is_rebalanced_almost_exactly(make_model: MakeModel) -> None:
    model = uneven(make_model("Llama")).to(torch.bfloat16)
    subject, plain = tiny_world.as_subject(model), logits_of(model)
    with subject.restored():
        moves = Rebalancer(model, subject.restoration)
        moves.up_down()
        assert torch.equal(logits_of(model), plain)
    realised, _ = run(subject, "rescale", steps=1, batch_size=2, examples=2)
    assert realised.facts["logits_changed"] < 0.1


def test_a_strength_without_effect_does_not_hide_the_others(subject: Subject) -> None:
    """A break at an earlier strength must stay in the rates."""

    class Fading(weight_noise.WeightNoise):
        def apply(self, subject: Subject, strength: float, realised: Realised) -> int:
            return super().apply(subject, strength if strength < 0.5 else 0.0, realised)

    fading = Fading(weight_noise.WeightNoiseSettings(strengths=(0.1, 1.0)))
    with subject.restored():
        realised = fading.run(
            subject, tiny_world.tiny_domain(), Budget(2, (1, 2)), Seeds(1, 2, 3, 4), lambda c: True
        )
    assert realised.status == "done"
    assert "without_effect" in realised.facts
