"""Masks on experts: against a slow dense reference, on every routed layout."""

import copy
from collections.abc import Callable
from itertools import combinations
from typing import Any, get_args

import pytest
import slow_experts
import tiny_world
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from durometer.core.budget import Budget, matrix_entries
from durometer.core.errors import NotApplicableError
from durometer.core.routing import (
    Router,
    Semantics,
    mask,
    routers,
    routing_counts,
    unmaskable,
)
from durometer.core.seeds import Seeds
from durometer.subjects.base import Subject
from durometer.subjects.fingerprint import weights_fingerprint
from durometer.tampers.base import Realised, make_tamper
from durometer.tampers.mask_experts import equal_mass, matched

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


def dense_weights(
    layer: Any, router: Router, x: torch.Tensor, masked: list[int], soft: str = ""
) -> torch.Tensor:
    """Return the weight of every expert for every token [T, E], masked logits at -inf.

    With ``soft``, masked logits are moved by 0.01 beyond the least or the largest instead.
    """
    gate: Any = router.module
    logits = x @ gate.weight.T + (gate.bias if hasattr(gate, "bias") else 0.0)
    free = torch.ones(router.experts, dtype=torch.bool)
    free[masked] = False
    if soft:
        return soft_weights(router, logits, masked, up=soft == "soft_favour")
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


def soft_weights(
    router: Router, logits: torch.Tensor, moved: list[int], *, up: bool
) -> torch.Tensor:
    """Return the weight of every expert, the logits of some moved just beyond the others."""
    gate: Any = router.module
    weights = torch.zeros_like(logits)
    for token, raw in enumerate(logits.tolist()):
        edge = max(raw) + 0.01 if up else min(raw) - 0.01
        values = torch.tensor([edge if e in moved else value for e, value in enumerate(raw)])
        if hasattr(gate, "e_score_correction_bias"):
            values = values.sigmoid()
            correction = gate.e_score_correction_bias.tolist()
            far = max(correction) + 1 if up else min(correction) - 1
            ranks = [
                float(values[e]) + (far if e in moved else correction[e]) for e in range(len(raw))
            ]
            size = len(raw) // router.groups
            by_group = [sorted(ranks[s : s + size])[-2:] for s in range(0, len(raw), size)]
            best = max(range(router.groups), key=lambda group: sum(by_group[group]))
            allowed = list(range(best * size, best * size + size))
        else:
            ranks, allowed = values.tolist(), list(range(len(raw)))
            values = values.softmax(-1)
        chosen = sorted(allowed, key=lambda e: -ranks[e])[: router.chosen]
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
@pytest.mark.parametrize("semantics", ["none", *get_args(Semantics)])
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
    soft = semantics if "soft" in semantics else ""
    moved = masked if soft or semantics == "route_mask" else []
    weights = dense_weights(layer, router, HIDDEN[0], moved, soft)
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
    # Every position gets its logits.
    per_token = matrix_entries(subject.model) + subject.model.lm_head.weight.numel()
    assert realised.spent.flops == 2.0 * per_token * realised.spent.tokens
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


@torch.no_grad()
def test_soft_masks_choose_an_expert_last_or_first(model: Any) -> None:
    router = routers(model)[-1]
    undo = mask(router, [1], "soft_mask", 0.0)
    assert not (router.module(HIDDEN[0])[2] == 1).any()
    undo()
    undo = mask(router, [1], "soft_favour", 0.0)
    assert (router.module(HIDDEN[0])[2] == 1).any(-1).all()
    undo()
    # Nothing is left but to take some of them.
    everyone = list(range(router.experts))
    undo = mask(router, everyone, "soft_mask", 0.0)
    _, weights, _ = router.module(HIDDEN[0])
    assert weights.isfinite().all()
    undo()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_soft_step_is_not_rounded_away(make_model: MakeModel, dtype: torch.dtype) -> None:
    model = filled(make_model("Qwen3Moe", **SHAPE, **LAYOUTS["Qwen3Moe"]))
    router = routers(model)[0]
    router.module.weight *= 100
    model.to(dtype)
    undo = mask(router, [0, 1, 2], "soft_favour", 0.0)
    assert (router.module(HIDDEN[0].to(dtype))[2] <= 2).all()
    undo()


def test_retain_experts_are_those_that_are_favoured(make_model: MakeModel) -> None:
    subject = tiny_world.as_subject(planted(make_model))
    realised, _ = run(subject, strengths=(0.84,), semantics="soft_favour")
    assert realised.facts["masked"]["model.layers.0.mlp.gate"] == [0, 1, 2, 4, 5]


def clamped_reference(layer: Any, router: Router, zeroed: dict[int, list[int]]) -> torch.Tensor:
    """Return the layer's output with some inner neurons of experts at 0, from dense copies."""
    dense = copy.deepcopy(layer)
    transposed = hasattr(dense.experts, "gate_up_proj_bias")
    for expert, neurons in zeroed.items():
        for neuron in neurons:
            where = (expert, neuron) if transposed else (expert, slice(None), neuron)
            dense.experts.down_proj[where] = 0.0
    return dense_layer(dense, dense_weights(dense, router, HIDDEN[0], []))


def slow_neurons(model: Any, texts: Any, weight: torch.Tensor, name: str) -> torch.Tensor:
    """Return how much more each neuron gives on the first text, rms times norm, [E, neurons]."""
    rms = []
    for rows in texts:
        inputs = slow_experts.expert_inputs(model, rows)[name]
        rms.append(torch.stack([(x**2).sum(0) / max(len(x), 1) for x in inputs]).sqrt())
    return (rms[0] - rms[1]) * (weight**2).sum(1).sqrt()


@torch.no_grad()
@pytest.mark.parametrize("share", [0.1, 1.0])
def test_clamped_neurons_are_those_of_a_slow_reference(model: Any, share: float) -> None:
    subject = tiny_world.as_subject(model)
    tamper = make_tamper(
        "mask_experts", semantics="neuron_clamp", neurons=share, strengths=(0.34,), examples=4
    )
    found = routers(model)
    router, layer = found[-1], layer_of(model, found[-1])
    texts = tamper._rows(subject, tiny_world.tiny_domain(), SEEDS, Realised())
    name = f"{router.name.rpartition('.')[0]}.experts.down_proj"
    transposed = hasattr(layer.experts, "gate_up_proj_bias")
    maps = layer.experts.down_proj.mT if transposed else layer.experts.down_proj
    score = slow_neurons(model, texts, maps, name)
    outputs = []

    def look(checkpoint: Any) -> bool:
        outputs.append(layer_output(layer))
        return True

    zeroed: dict[int, list[int]] = {}
    before = weights_fingerprint(model)
    with subject.restored():
        realised = tamper.run(subject, tiny_world.tiny_domain(), Budget(1, (1,)), SEEDS, look)
    assert weights_fingerprint(model) == before
    count = round(share * score.shape[1])
    for expert in realised.facts["masked"][router.name]:
        zeroed[expert] = score[expert].argsort(descending=True)[:count].tolist()
    assert len(zeroed) == 2
    torch.testing.assert_close(
        outputs[0], clamped_reference(layer, router, zeroed), atol=2e-5, rtol=1e-4
    )
    assert not torch.allclose(outputs[0], layer_output(layer), atol=1e-4)
    assert realised.facts["clamped_neurons"] == 2 * count * len(found)
    assert realised.changed_weights == 2 * count * 32 * len(found)
    assert set(realised.changed) == {r.last_map for r in found}


def test_controls_clamp_as_many_neurons_and_refuse_no_share(make_model: MakeModel) -> None:
    subject = tiny_world.as_subject(planted(make_model))
    clamp = {"semantics": "neuron_clamp", "neurons": 0.2, "strengths": (0.34,)}
    true, _ = run(subject, **clamp)
    random, _ = run(subject, selector="random", **clamp)
    again, _ = run(subject, selector="random", **clamp)
    assert random.facts["clamped_neurons"] == true.facts["clamped_neurons"]
    assert random.changed == again.changed != true.changed
    everyone, _ = run(subject, **(clamp | {"strengths": (1.0,)}))
    assert everyone.facts["masked_share_of_routing"] == pytest.approx(1.0)


@pytest.mark.parametrize("semantics", ["route_mask", "output_zero", "soft_mask"])
def test_a_random_mask_may_get_as_much_of_the_routing(model: Any, semantics: str) -> None:
    subject = tiny_world.as_subject(model)
    changes = {"semantics": semantics, "strengths": (0.17,), "examples": 6}
    true, _ = run(subject, **changes)
    random, _ = run(subject, selector="random_equal_mass", **changes)
    again, _ = run(subject, selector="random_equal_mass", **changes)
    assert random.facts["masked"] == again.facts["masked"]
    assert all(
        chosen and chosen != true.facts["masked"][name]
        for name, chosen in random.facts["masked"].items()
    )
    wanted = true.facts["masked_share_of_routing"]
    assert random.facts["wanted_share_of_routing"] == pytest.approx(wanted)
    assert random.facts["masked_share_of_routing"] == pytest.approx(wanted, abs=0.15)


@settings(deadline=None, max_examples=40)
@given(
    counts=st.lists(st.integers(1, 50), min_size=6, max_size=8),
    wanted=st.sets(st.integers(0, 5), min_size=1, max_size=3),
    seed=st.integers(0, 100),
)
def test_equal_mass_is_near_the_best_there_is(
    counts: list[int], wanted: set[int], seed: int
) -> None:
    shares = torch.tensor(counts).float() / sum(counts)
    target = float(shares[list(wanted)].sum())
    sets = [set(c) for size in range(1, 5) for c in combinations(range(len(counts)), size)]
    # With all of the wanted experts among them they would be no control.
    others = [s for s in sets if not wanted <= s]
    nearest = min(abs(float(shares[list(s)].sum()) - target) for s in others)
    try:
        drawn = equal_mass(shares, list(wanted), lambda chosen: len(chosen) < 5, seed)
    except NotApplicableError:
        # No other set is nearer than masking nothing is.
        assert nearest >= target - 1e-6
        return
    assert 0 < len(drawn) < 5
    assert not wanted <= set(drawn)
    gap = abs(float(shares[drawn].sum()) - target)
    assert gap <= nearest + 0.1


def test_no_other_set_of_equal_mass_is_said_to_be_none() -> None:
    """One expert gets everything: masking it has no control of equal mass."""
    with pytest.raises(NotApplicableError, match=r"about 1.00 of a layer's routing"):
        equal_mass(torch.tensor([1.0, 0.0, 0.0]), [0], lambda chosen: True, 0)


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
    assert unmaskable(router, [0, 3], "route_mask") == ""
    assert unmaskable(router, [0, 1], "output_zero") == ""
    assert unmaskable(router, [3, 4, 5], "soft_mask") == ""
    assert "leaves 1 to choose" in unmaskable(router, [0, 1], "route_mask")
    assert "none in a group" in unmaskable(router, [3, 4, 5], "output_zero")


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
