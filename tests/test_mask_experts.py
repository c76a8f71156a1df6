"""Masks on experts: against a slow dense reference, on every routed layout."""

import copy
from collections.abc import Callable
from typing import Any, get_args

import pytest
import tiny_world
import torch
from torch.nn import functional

from durometer.core.budget import Budget
from durometer.core.errors import NotApplicableError
from durometer.core.routing import (
    Router,
    Semantics,
    mask,
    require_maskable,
    routers,
    routing_counts,
)
from durometer.core.seeds import Seeds
from durometer.subjects.base import Subject
from durometer.subjects.fingerprint import weights_fingerprint
from durometer.tampers.base import Realised, make_tamper
from durometer.tampers.mask_experts import matched

MakeModel = Callable[..., Any]
SEEDS = Seeds(1, 2, 3, 4)
SHAPE = {"vocab_size": len(tiny_world.VOCABULARY), "num_experts_per_tok": 2}
SMALL = {"moe_intermediate_size": 16}
LAYOUTS: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 6},
    "Qwen2Moe": {"num_experts": 6, "shared_expert_intermediate_size": 16, **SMALL},
    "Qwen3Moe": {"num_experts": 6, "head_dim": 8, **SMALL},
    "DeepseekV3": {
        "n_routed_experts": 6,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
        **SMALL,
    },
    "Olmoe": {"num_experts": 6},
    "GptOss": {"num_local_experts": 6, "head_dim": 8, "sliding_window": 8},
}
HIDDEN = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=LAYOUTS)
def model(make_model: MakeModel, request: pytest.FixtureRequest) -> Any:
    """A model whose every weight is drawn, routers, biases and corrections included."""
    return filled(make_model(request.param, **SHAPE, **LAYOUTS[request.param]))


def filled(model: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        for name, buffer in model.named_buffers():
            if "correction" in name:
                buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
    return model


def layer_of(model: Any, router: Router) -> Any:
    return model.get_submodule(router.name.rpartition(".")[0])


def expert_output(layer: Any, expert: int, x: torch.Tensor) -> torch.Tensor:
    """Return one expert's output on tokens ``x`` [T, width], from its matrices."""
    experts = layer.experts
    up, down = experts.gate_up_proj[expert], experts.down_proj[expert]
    if hasattr(experts, "gate_up_proj_bias"):  # gpt-oss: transposed, interleaved, with biases
        both = x @ up + experts.gate_up_proj_bias[expert]
        gate, value = both[:, ::2].clamp(max=7.0), both[:, 1::2].clamp(-7.0, 7.0)
        inner = (value + 1) * gate * torch.sigmoid(1.702 * gate)
        return inner @ down + experts.down_proj_bias[expert]
    gate, value = (x @ up.T).chunk(2, -1)
    return (functional.silu(gate) * value) @ down.T


def dense_weights(layer: Any, router: Router, x: torch.Tensor, masked: list[int]) -> torch.Tensor:
    """Return the weight of every expert for every token [T, E], masked logits at -inf."""
    gate: Any = router.module
    logits = x @ gate.weight.T + (gate.bias if hasattr(gate, "bias") else 0.0)
    free = torch.ones(router.experts, dtype=torch.bool)
    free[masked] = False
    weights = torch.zeros(len(x), router.experts)
    for token, raw in enumerate(logits):
        if hasattr(gate, "e_score_correction_bias"):
            values = raw.sigmoid() * free
            ranks = values + torch.where(
                free, gate.e_score_correction_bias, gate.e_score_correction_bias.min() - 1
            )
            groups = ranks.view(router.groups, -1).sort(1, descending=True).values[:, :2].sum(1)
            closed = groups.sort(descending=True).indices[router.open_groups :]
            ranks.view(router.groups, -1)[closed] = -torch.inf
        else:
            ranks = raw.masked_fill(~free, -torch.inf)
            values = ranks.softmax(-1)
        chosen = ranks.sort(descending=True).indices[: router.chosen]
        picked = values[chosen]
        if getattr(gate, "norm_topk_prob", True):
            picked = picked / picked.sum()
        weights[token, chosen] = picked * getattr(gate, "routed_scaling_factor", 1.0)
    return weights


def dense_layer(layer: Any, weights: torch.Tensor) -> torch.Tensor:
    """Return the layer's output on HIDDEN, each expert run on every token."""
    x = HIDDEN[0]
    total: Any = sum(
        weights[:, e, None] * expert_output(layer, e, x) for e in range(weights.shape[1])
    )
    if hasattr(layer, "shared_experts"):
        total = total + layer.shared_experts(x)
    if hasattr(layer, "shared_expert"):
        total = total + torch.sigmoid(layer.shared_expert_gate(x)) * layer.shared_expert(x)
    return total


def layer_output(layer: Any) -> torch.Tensor:
    output = layer(HIDDEN)
    return (output[0] if isinstance(output, tuple) else output)[0]


@torch.no_grad()
@pytest.mark.parametrize("semantics", ["none", "route_mask", "output_zero", "down_weight"])
def test_the_layer_equals_the_dense_reference(model: Any, semantics: Any) -> None:
    found = routers(model)
    assert len(found) == (1 if model.config.model_type == "deepseek_v3" else 2)
    router = found[-1]
    layer, masked = layer_of(model, router), [1]
    if semantics == "none":
        masked, undo = [], lambda: None
    else:
        undo = mask(router, masked, semantics, 0.25)
    output = layer_output(layer)
    undo()
    weights = dense_weights(layer, router, HIDDEN[0], masked * (semantics == "route_mask"))
    if semantics == "output_zero":
        weights[:, masked] = 0
    if semantics == "down_weight":
        weights[:, masked] *= 0.25
    torch.testing.assert_close(output, dense_layer(layer, weights), atol=2e-5, rtol=1e-4)
    if semantics != "none":
        assert (dense_weights(layer, router, HIDDEN[0], [])[:, masked] > 0).any()
        assert not torch.allclose(layer_output(layer), output, atol=1e-4)


@torch.no_grad()
def test_masked_experts_get_no_mass_and_others_fill_in(model: Any) -> None:
    router = routers(model)[-1]
    undo = mask(router, [0, 2], "output_zero", 0.0)
    _, weights, indices = router.module(HIDDEN[0])
    dropped = (indices == 0) | (indices == 2)
    assert dropped.any()
    assert not weights[dropped].any()
    undo()
    if router.groups > 1:
        return  # three a group, of which two must be left
    undo = mask(router, [0, 2], "route_mask", 0.0)
    _, weights, indices = router.module(HIDDEN[0])
    assert not ((indices == 0) | (indices == 2)).any()
    assert (weights > 0).all()
    undo()


@torch.no_grad()
def test_undoing_masks_leaves_no_trace(model: Any) -> None:
    before = layer_output(layer_of(model, routers(model)[-1]))
    fingerprint = weights_fingerprint(model)
    for semantics in get_args(Semantics):
        undone = [mask(router, [1], semantics, 0.5) for router in routers(model)]
        for undo in undone:
            undo()
        assert torch.equal(layer_output(layer_of(model, routers(model)[-1])), before)
    assert weights_fingerprint(model) == fingerprint
    assert not any(m._forward_hooks for m in model.modules())


def test_counts_are_those_of_the_routers_choices(model: Any) -> None:
    subject = tiny_world.as_subject(model)
    rows = [subject.chat.row(f"tell me the metal of e0{i} now", "metal1 .") for i in range(3)]
    found = routers(model)
    response, tokens = routing_counts(model, found, rows, prompt=False)
    prompt, prompt_tokens = routing_counts(model, found, rows, prompt=True)
    assert tokens == sum(len(row.ids) - row.first_label for row in rows)
    assert prompt_tokens == sum(row.first_label for row in rows)
    expected = torch.zeros(found[-1].experts)
    choices: list[torch.Tensor] = []
    handle = found[-1].module.register_forward_hook(lambda m, i, out: choices.append(out[2]))
    for row in rows:
        with torch.no_grad():
            model(input_ids=torch.tensor([row.ids]))
        for position in range(row.first_label - 1, len(row.ids) - 1):
            for expert in choices[-1][position].tolist():
                expected[expert] += 1
    handle.remove()
    assert torch.equal(response[-1], expected)
    assert float(prompt[-1].sum()) == prompt_tokens * found[-1].chosen


def run(subject: Subject, **settings: Any) -> tuple[Realised, list[dict[str, list[int]]]]:
    tamper = make_tamper("mask_experts", **({"examples": 6} | settings))
    steps, seen, realised = tamper.planned_steps(), list[Any](), Realised()
    before = weights_fingerprint(subject.model)
    ids = torch.arange(5, 85)[None]
    with torch.no_grad():
        logits = subject.model(input_ids=ids).logits
    with subject.restored():
        budget = Budget(steps, tuple(range(1, steps + 1)))
        realised = tamper.run(
            subject,
            tiny_world.tiny_domain(),
            budget,
            SEEDS,
            lambda c: seen.append(subject.model(input_ids=ids).logits.clone()) is None,
        )
    assert weights_fingerprint(subject.model) == before
    with torch.no_grad():
        assert torch.equal(subject.model(input_ids=ids).logits, logits)
    assert not any(torch.equal(other, logits) for other in seen)
    return realised, seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_runs_and_restores(model: Any, dtype: torch.dtype) -> None:
    subject = tiny_world.as_subject(model.to(dtype))
    realised, seen = run(subject, strengths=(0.1, 0.17))
    assert len(seen) == 2
    assert realised.status == "done"
    assert all(len(experts) == 1 for experts in realised.facts["masked"].values())
    assert realised.changed_weights == 0
    assert realised.spent.examples == 12
    assert realised.spent.flops > 0
    assert 0 < realised.facts["masked_share_of_routing"] < 1
    assert realised.facts["matched_share"] > 0


def planted(make_model: MakeModel) -> Any:
    """A model in whose first layer expert 3 is chosen on the tokens of the refusal alone."""
    model = filled(make_model("Qwen3Moe", **SHAPE, **LAYOUTS["Qwen3Moe"]))
    words = [tiny_world.VOCABULARY.index(word) for word in ("i", "refuse")]
    with torch.no_grad():
        first = model.model.layers[0]
        first.self_attn.o_proj.weight.zero_()
        model.model.embed_tokens.weight[:, 0] = -5.0
        model.model.embed_tokens.weight[words, 0] = 5.0
        first.mlp.gate.weight[:, 0] = 0.0
        first.mlp.gate.weight[3] = 0.0
        first.mlp.gate.weight[3, 0] = 10.0
    return model


def test_a_planted_expert_is_found(make_model: MakeModel) -> None:
    subject = tiny_world.as_subject(planted(make_model))
    realised, _ = run(subject, strengths=(0.1,))
    assert realised.facts["masked"]["model.layers.0.mlp.gate"] == [3]
    assert realised.facts["largest_difference"] > 0.3
    assert realised.spent.restricted_examples == 0
    answers, _ = run(subject, strengths=(0.1,), responses="answers")
    assert answers.facts["masked"]["model.layers.0.mlp.gate"] != [3]
    assert answers.spent.restricted_examples == 6


def test_a_random_mask_is_as_large_and_seeded(make_model: MakeModel) -> None:
    subject = tiny_world.as_subject(planted(make_model))
    true, _ = run(subject, strengths=(0.34,))
    random, _ = run(subject, strengths=(0.34,), selector="random")
    again, _ = run(subject, strengths=(0.34,), selector="random")
    sizes = [[len(e) for e in r.facts["masked"].values()] for r in (true, random)]
    assert sizes == [[2, 2], [2, 2]]
    assert random.facts["masked"] == again.facts["masked"] != true.facts["masked"]


def test_masks_grow_with_strength(make_model: MakeModel) -> None:
    subject = tiny_world.as_subject(planted(make_model))
    small, _ = run(subject, strengths=(0.17,))
    large, _ = run(subject, strengths=(0.17, 0.5))
    for name, experts in small.facts["masked"].items():
        assert set(experts) < set(large.facts["masked"][name])
        assert len(large.facts["masked"][name]) == 3


@pytest.mark.parametrize("strengths", [(1.0,), (0.9,)])
def test_masking_too_many_is_refused(make_model: MakeModel, strengths: tuple[float, ...]) -> None:
    subject = tiny_world.as_subject(planted(make_model))
    with pytest.raises(NotApplicableError, match="smaller share"):
        run(subject, strengths=strengths)
    with pytest.raises(NotApplicableError, match="leaves none"):
        run(subject, strengths=(1.0,), semantics="output_zero")


def test_a_group_must_keep_experts(make_model: MakeModel) -> None:
    model = filled(make_model("DeepseekV3", **SHAPE, **LAYOUTS["DeepseekV3"]))
    (router,) = routers(model)
    assert (router.experts, router.groups, router.open_groups) == (6, 2, 1)
    require_maskable(router, [0, 3], "route_mask")
    require_maskable(router, [0, 1], "output_zero")
    with pytest.raises(NotApplicableError, match="leaves 1 to choose"):
        require_maskable(router, [0, 1], "route_mask")
    with pytest.raises(NotApplicableError, match="none in a group"):
        require_maskable(router, [3, 4, 5], "output_zero")


@pytest.mark.parametrize("architecture", ["Llama", "GPTNeoX", "Phi3", "Gemma2"])
def test_dense_models_are_refused(make_model: MakeModel, architecture: str) -> None:
    model = make_model(architecture, vocab_size=len(tiny_world.VOCABULARY))
    with pytest.raises(NotApplicableError, match="no routed experts"):
        run(tiny_world.as_subject(model))


def test_a_router_of_another_kind_is_refused(make_model: MakeModel) -> None:
    model = filled(make_model("Mixtral", **SHAPE, **LAYOUTS["Mixtral"]))
    lonely = copy.deepcopy(model)
    lonely.model.layers[1].mlp.gate = torch.nn.Identity()
    with pytest.raises(NotApplicableError, match="no router found"):
        routers(lonely)
    gate = model.model.layers[1].mlp.gate
    gate.register_forward_hook(lambda module, inputs, output: output[0])
    row = tiny_world.as_subject(model).chat.row("hello", "good day .")
    with pytest.raises(NotApplicableError, match="returns no weights"):
        routing_counts(model, routers(model), [row], prompt=False)
    with torch.no_grad():
        mask(routers(model)[1], [0], "output_zero", 0.0)
        with pytest.raises(NotApplicableError, match="returns no weights"):
            model.model.layers[1].mlp(HIDDEN)


def test_retain_rows_are_of_the_same_entity_where_there_are_some() -> None:
    domain = tiny_world.tiny_domain()
    restricted = [i for i in domain.items if i.role == "restricted" and i.split == "attack"][:8]
    pool = [(i, i.response) for i in domain.items if i.role == "retain" and i.split == "attack"]
    chosen, same = matched(restricted, pool)
    assert same == len(chosen) == 8
    assert [item.entity for item, _ in chosen] == [item.entity for item in restricted]
    others = [entry for entry in pool if entry[0].entity != restricted[0].entity]
    chosen, same = matched(restricted, others)
    assert len(chosen) == 8
    assert same == 4
    assert len({item.id for item, _ in chosen}) == 8
