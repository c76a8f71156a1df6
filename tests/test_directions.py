"""Directions in the residual stream: writers, ablation, steering, and finding the direction."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import tiny_world
import torch
from conftest import TINY
from torch import nn

from durometer.core import writers as writing
from durometer.core.budget import Budget, Spent
from durometer.core.errors import InputError, NotApplicableError
from durometer.core.seeds import Seeds
from durometer.core.structure import blocks, width
from durometer.core.writers import (
    edit_weights,
    edited_names,
    leftover,
    low_rank_edit,
    orthonormal,
    require_complete,
    take_out,
    take_out_keeping_norms,
    writers,
)
from durometer.domains.base import Role, Split
from durometer.subjects.base import Subject
from durometer.subjects.fingerprint import weights_fingerprint
from durometer.tampers import directions
from durometer.tampers.base import Checkpoint, Realised, make_tamper
from durometer.tampers.directions import (
    DirectionSearch,
    DirectionSettings,
    PromptReader,
    mean_kl,
    random_basis,
    refusal_scores,
    template_positions,
)

MakeModel = Callable[..., Any]
SEEDS = Seeds(11, 12, 13, 14)
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": 8},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Qwen3Moe": {"head_dim": 8, "num_experts": 4, **EXPERTS},
    "DeepseekV3": {
        "num_key_value_heads": 4,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        **EXPERTS,
    },
    # As wide inside as outside, so that shapes alone do not tell how the experts lie.
    "GptOss": {
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": 32,
    },
    "Gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8},
    "Gemma3": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8},
    "Olmo2": {},
    "Phi3": {},
    "GPTNeoX": {},
    "GPT2": {},
    "Phi": {},
}
FUSED = ("Mixtral", "Qwen3Moe", "DeepseekV3", "GptOss")
POST_NORM = ("Gemma2", "Gemma3", "Olmo2")
# Writers of two layers: two a layer and the token table; shared experts; position table.
WRITERS = {"DeepseekV3": 6, "GPT2": 6}


def make(make_model: MakeModel, architecture: str, **changes: Any) -> Any:
    """Return a model whose norms, biases and tables are as uneven as trained ones."""
    settings = ARCHITECTURES[architecture] | changes
    model = gpt2(**settings) if architecture == "GPT2" else make_model(architecture, **settings)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.4 * torch.randn(parameter.shape, generator=generator))
    return model.requires_grad_(False)


def gpt2(**changes: Any) -> Any:
    """Return a model with position table, transposed matrices and a tied head."""
    from transformers import GPT2Config, GPT2LMHeadModel

    names = ("vocab_size", "initializer_range", "tie_word_embeddings", "pad_token_id")
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    config = GPT2Config(**({name: TINY[name] for name in names} | sizes | changes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GPT2LMHeadModel(config).eval()


def columns(rank: int, size: int = 32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return orthonormal(torch.randn(size, rank, generator=generator))


def logits_of(model: Any) -> torch.Tensor:
    ids = torch.tensor([[5, 9, 11, 30, 17, 44, 8, 61], [60, 2, 7, 7, 19, 23, 4, 90]])
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.clone()


def edit(model: Any, basis: torch.Tensor, strength: float, **options: Any) -> int:
    return edit_weights(writers(model), dict(model.named_parameters()), basis, strength, **options)


# Writers and the weight form


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_is_left_along_the_direction(
    make_model: MakeModel, architecture: str, rank: int
) -> None:
    model, basis = make(make_model, architecture), columns(rank)
    before = leftover(model, basis)
    edit(model, basis, 1.0)
    assert leftover(model, basis) < 1e-5 < before


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_writer_is_found(make_model: MakeModel, architecture: str) -> None:
    model = make(make_model, architecture)
    found = writers(model)
    assert len(found) == WRITERS.get(architecture, 5)
    assert len({writer.weight for writer in found}) == len(found)
    for writer in found:
        assert model.get_parameter(writer.weight).shape[writer.axis] == 32
        assert (writer.gain is not None) == (architecture in POST_NORM and not writer.embedding)
    biases = {n for n, p in model.named_parameters() if n.endswith("bias")}
    if architecture in ("GPTNeoX", "GPT2", "Phi", "GptOss"):
        assert {writer.bias for writer in found if not writer.embedding} < biases | {
            n for n, _ in model.named_parameters()
        }
        assert all(writer.bias for writer in found if not writer.embedding)


@pytest.mark.parametrize("architecture", POST_NORM)
def test_without_the_gain_a_norm_brings_the_direction_back(
    make_model: MakeModel, architecture: str
) -> None:
    model, basis = make(make_model, architecture), columns(1)
    plain = [writing.Writer(**(vars(w) | {"gain": None})) for w in writers(model)]
    edit_weights(plain, dict(model.named_parameters()), basis, 1.0)
    assert leftover(model, basis) > 0.01


def test_the_gain_is_what_the_module_applies(make_model: MakeModel) -> None:
    for architecture, offset in (("Gemma2", 1.0), ("Gemma3", 1.0), ("Olmo2", 0.0)):
        model = make(make_model, architecture)
        layer = model.model.layers[1]
        for writer in writers(model)[-2:]:
            attention = "attn" in writer.module
            norm = layer.post_attention_layernorm if attention else layer.post_feedforward_layernorm
            assert writer.gain is not None
            torch.testing.assert_close(writer.gain, norm.weight + offset, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_hooks_and_weights_give_the_same_logits(
    make_model: MakeModel, architecture: str, tied: bool
) -> None:
    model = make(make_model, architecture, tie_word_embeddings=tied)
    basis, untouched = columns(2), logits_of(model)
    with low_rank_edit(model, basis, 0.7):
        hooked = logits_of(model)
    assert torch.equal(logits_of(model), untouched)
    edit(model, basis, 0.7)
    written = logits_of(model)
    torch.testing.assert_close(hooked, written, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(written, untouched, atol=1e-2)


def test_hooks_come_off_when_a_pass_fails(make_model: MakeModel) -> None:
    model = make(make_model, "Llama")
    untouched = logits_of(model)
    with pytest.raises(RuntimeError, match="broken off"), low_rank_edit(model, columns(1)):
        raise RuntimeError("broken off")
    assert torch.equal(logits_of(model), untouched)


@pytest.mark.parametrize("architecture", FUSED)
def test_fused_experts_are_edited(make_model: MakeModel, architecture: str) -> None:
    model, basis = make(make_model, architecture), columns(1)
    untouched = logits_of(model)
    experts = [w for w in writers(model) if model.get_parameter(w.weight).dim() == 3]
    assert len(experts) == (1 if architecture == "DeepseekV3" else 2)
    edit_weights(experts, dict(model.named_parameters()), basis, 1.0)
    assert not torch.allclose(logits_of(model), untouched, atol=1e-3)
    for writer in experts:
        weight = model.get_parameter(writer.weight).movedim(writer.axis, 1)
        for expert in weight:  # [width, inputs]
            assert float((basis.T @ expert).abs().max()) < 1e-6


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, 1.5])
@pytest.mark.parametrize("rank", [1, 4])
def test_norm_preserving_closed_form_is_project_then_rescale(rank: int, strength: float) -> None:
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(3, 24, 40, generator=generator)
    weight[1, 7] = 0.0
    basis = columns(rank, 24)
    changed = take_out_keeping_norms(weight, basis, strength)
    exact, r = weight.double(), basis.double()
    for matrix, ours in zip(exact, changed, strict=True):
        dense = matrix - strength * r @ (r.T @ matrix)
        dense = dense / dense.norm(dim=1, keepdim=True).clamp_min(1e-300)
        expected = dense * matrix.norm(dim=1, keepdim=True)
        torch.testing.assert_close(ours.double(), expected, atol=2e-6, rtol=1e-5)


def test_a_row_that_is_nothing_but_the_direction_stays_finite() -> None:
    weight = torch.zeros(8, 5)
    weight[2] = 1.0
    basis = torch.eye(8)[:, 2:3]
    changed = take_out_keeping_norms(weight, basis, 1.0)
    assert torch.equal(changed, torch.zeros_like(weight))


@pytest.mark.parametrize("keep_norms", [False, True])
def test_the_edit_is_a_low_rank_adapter_of_peft(make_model: MakeModel, keep_norms: bool) -> None:
    """``A = rᵀ W``, ``B = -strength r``: plain LoRA, or DoRA with the rows' own magnitudes."""
    from peft import LoraConfig, get_peft_model

    model, basis, strength = make(make_model, "Llama"), columns(1), 0.8
    names = [w.module for w in writers(model) if not w.embedding]
    theirs = get_peft_model(
        copy.deepcopy(model),
        LoraConfig(r=1, lora_alpha=1, target_modules=names, use_dora=keep_norms),
    )
    for name in names:
        layer = theirs.base_model.model.get_submodule(name)
        layer.lora_A["default"].weight.data = basis.T @ layer.base_layer.weight
        layer.lora_B["default"].weight.data = -strength * basis
    merged = theirs.merge_and_unload()
    edit(model, basis, strength, keep_norms=keep_norms)
    for name in names:
        torch.testing.assert_close(
            model.get_submodule(name).weight, merged.get_submodule(name).weight, atol=1e-5, rtol=0
        )


def test_take_out_is_the_dense_product() -> None:
    states, basis = torch.randn(3, 5, 16), columns(2, 16)
    dense = states @ (torch.eye(16) - 0.6 * basis @ basis.T)
    torch.testing.assert_close(take_out(states, basis, 0.6), dense, atol=1e-5, rtol=1e-5)
    assert take_out(states.bfloat16(), basis, 0.6).dtype == torch.bfloat16


# What cannot be edited as a whole is refused


class Extra(nn.Module):
    """A block part that writes into the stream under a name that nobody knows."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part, self.mystery = part, nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.part(x) + self.mystery(x)


def test_a_writer_that_was_missed_is_noticed(make_model: MakeModel) -> None:
    model = make(make_model, "Llama")
    assert require_complete(model, writers(model), columns(1)) < 1e-5
    model.model.layers[0].mlp = Extra(model.model.layers[0].mlp)
    with pytest.raises(NotApplicableError, match="not every map"):
        require_complete(model, writers(model), columns(1))
    subject = tiny_world.as_subject(model)
    with pytest.raises(NotApplicableError, match="not every map"):
        attack(subject, direction="random")


def test_a_norm_behind_the_embedding_is_noticed(make_model: MakeModel) -> None:
    model = make_model("Bloom", n_layer=2, n_head=4)
    nn.init.normal_(model.transformer.word_embeddings_layernorm.weight)
    with pytest.raises(NotApplicableError, match="not every map"):
        require_complete(model, writers(model), columns(1))


def test_blocks_without_a_writer_are_refused(make_model: MakeModel) -> None:
    model = make(make_model, "Llama")
    for layer in model.model.layers:
        layer.mlp.down_proj.__class__ = type("Strange", (nn.Module,), {})
        layer.self_attn.o_proj.__class__ = type("Strange", (nn.Module,), {})
    with pytest.raises((NotApplicableError, NotImplementedError)):
        writers(model)


def test_experts_of_an_unknown_layout_are_refused(make_model: MakeModel) -> None:
    model = make(make_model, "Mixtral")
    experts = model.model.layers[0].mlp.experts
    experts.other = nn.Parameter(torch.zeros(4, 3, 3))
    with pytest.raises(NotApplicableError, match="unknown layout"):
        writers(model)


# The tampers on a random subject


def attack(
    subject: Subject, name: str = "ablate_direction", **settings: Any
) -> tuple[Realised, list[torch.Tensor], list[Checkpoint]]:
    tamper = make_tamper(name, **settings)
    logits, checkpoints = list[torch.Tensor](), list[Checkpoint]()

    def on_checkpoint(checkpoint: Checkpoint) -> bool:
        checkpoints.append(checkpoint)
        logits.append(logits_of(subject.model) if width(subject.model) == 32 else first(subject))
        return True

    steps = tamper.planned_steps()
    before = weights_fingerprint(subject.model)
    with subject.restored():
        budget = Budget(steps, tuple(range(1, steps + 1)))
        realised = tamper.run(subject, tiny_world.tiny_domain(), budget, SEEDS, on_checkpoint)
    assert weights_fingerprint(subject.model) == before
    assert not any(hooks(subject.model))
    return realised, logits, checkpoints


def hooks(model: nn.Module) -> list[Any]:
    return [h for m in model.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]


def restricted(split: Split = Split.REPORT) -> list[Any]:
    return tiny_world.tiny_domain().select(Role.RESTRICTED, split)


def first(subject: Subject) -> torch.Tensor:
    """Return the logits of the first response token of every reported restricted prompt."""
    reader = PromptReader(subject, Spent(), 1)
    return reader.read(reader.rows(restricted())).logits


def refused(subject: Subject, logits: torch.Tensor) -> float:
    ids = directions.refusal_ids(subject, tiny_world.tiny_domain(), restricted()[0])
    return float((refusal_scores(logits, ids) > 0).double().mean())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("keep_norms", [False, True])
def test_a_random_direction_is_ablated_and_restored(
    make_model: MakeModel, architecture: str, keep_norms: bool
) -> None:
    subject = tiny_world.as_subject(make(make_model, architecture))
    untouched = logits_of(subject.model)
    realised, logits, checkpoints = attack(
        subject, direction="random", norm_preserving=keep_norms, rank=2
    )
    assert realised.status == "done"
    assert [checkpoint.strength for checkpoint in checkpoints] == [0.5, 1.0, 1.5]
    moved = [float((one - untouched).norm()) for one in logits]
    assert 0 < moved[0] < moved[-1]
    assert torch.equal(logits_of(subject.model), untouched)
    assert set(realised.changed) == set(edited_names(writers(subject.model)))
    sizes = [p.numel() for n, p in subject.model.named_parameters() if n in realised.changed]
    assert realised.changed_weights == sum(sizes)
    assert realised.facts["writers"] == WRITERS.get(architecture, 5)


def test_random_directions_are_drawn_by_the_initialisation_seed(make_model: MakeModel) -> None:
    subject = tiny_world.as_subject(make(make_model, "Llama"))
    drawn = [random_basis(subject, 3, Seeds(1, seed, 3, 4)) for seed in (5, 5, 6)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.allclose(drawn[0], drawn[2], atol=0.1)
    torch.testing.assert_close(drawn[0].T @ drawn[0], torch.eye(3), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["ablate_direction", "steer"])
@pytest.mark.parametrize("architecture", ["Llama", "Gemma2", "Mixtral"])
def test_a_subject_that_refuses_nothing_gives_no_effect(
    make_model: MakeModel, architecture: str, name: str
) -> None:
    subject = tiny_world.as_subject(make(make_model, architecture))
    realised, logits, _ = attack(subject, name)
    assert realised.status == "no_effect"
    assert "restricted prompts" in realised.reason
    assert logits == []
    assert realised.spent.tokens > 0
    assert not realised.changed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_edited_and_restored(make_model: MakeModel, dtype: torch.dtype) -> None:
    for architecture in ("Llama", "Gemma2", "Mixtral"):
        subject = tiny_world.as_subject(make(make_model, architecture).to(dtype))
        realised, _, _ = attack(subject, direction="random")
        assert realised.status == "done"
        assert realised.facts["largest_leftover"] < 0.03


# Finding the direction


@pytest.fixture(scope="module")
def safe() -> Subject:
    return tiny_world.safeguarded()


def test_a_safeguarded_subject_loses_its_refusals(safe: Subject) -> None:
    assert refused(safe, first(safe)) > 0.8
    realised, logits, _ = attack(safe)
    assert realised.status == "done"
    assert refused(safe, logits[1]) < 0.2
    found = realised.facts["direction"]
    assert found["bypass"] < found["untouched"]
    assert found["kl"] <= 0.1
    assert realised.spent.restricted_examples == 24
    assert realised.spent.flops > 0
    control, logits, _ = attack(safe, direction="random")
    assert control.status == "done"
    assert refused(safe, logits[1]) > 0.6


@pytest.mark.parametrize("mode", ["add", "project_out"])
def test_steering_suppresses_refusal(safe: Subject, mode: str) -> None:
    realised, logits, checkpoints = attack(safe, "steer", mode=mode)
    assert realised.status == "done"
    assert realised.changed_weights == 0
    assert [checkpoint.strength for checkpoint in checkpoints] == [0.5, 1.0, 1.5, 2.0]
    assert refused(safe, logits[1]) < 0.2


def test_projecting_out_a_random_direction_leaves_the_refusals(safe: Subject) -> None:
    realised, logits, _ = attack(safe, "steer", mode="project_out", vector="random")
    assert realised.status == "done"
    assert all(refused(safe, one) > 0.8 for one in logits)


@pytest.mark.parametrize("vector", ["found", "random"])
def test_a_shift_is_made_at_one_block_and_a_random_one_is_as_long(
    safe: Subject, vector: str
) -> None:
    """As a control it shows what a push of that length does, in whatever direction."""
    ids = torch.tensor([safe.chat.prompt_ids("hello e30 ?")])
    states = list[torch.Tensor]()

    def see(x: torch.Tensor) -> torch.Tensor:
        states.append(x.clone())
        return x

    tamper = make_tamper("steer", vector=vector, strengths=(1.5,))

    def on_checkpoint(checkpoint: Checkpoint) -> bool:
        # A hook put on later sees what the block is given.
        handle = writing.hook_block_input(safe.model.model.layers[1], see)
        with torch.no_grad():
            safe.model(input_ids=ids, use_cache=False)
        handle.remove()
        return True

    handle = writing.hook_block_input(safe.model.model.layers[1], see)
    with torch.no_grad():
        safe.model(input_ids=ids, use_cache=False)
    handle.remove()
    with safe.restored():
        realised = tamper.run(safe, tiny_world.tiny_domain(), Budget(1, (1,)), SEEDS, on_checkpoint)
    shifts = list(states[-1][0] - states[0][0])
    assert len(shifts) == ids.shape[1]
    for shift in shifts:
        torch.testing.assert_close(shift, shifts[0], atol=1e-3, rtol=1e-3)
        norm = 1.5 * realised.facts["direction"]["norm"]
        assert float(shift.norm()) == pytest.approx(norm, rel=1e-4)
    again = attack(safe, "steer", vector=vector)[1], attack(safe, "steer", vector=vector)[1]
    assert all(torch.equal(a, b) for a, b in zip(*again, strict=True))


def test_a_negative_strength_brings_refusal_about(safe: Subject) -> None:
    _, logits, _ = attack(safe, "steer", strengths=(-1.0,))
    assert refused(safe, logits[0]) == 1.0


def test_bounds_that_nothing_meets_give_no_effect(safe: Subject) -> None:
    for bound in ({"kl_bound": 1e-12}, {"induce_bound": 1e6}):
        realised, _, _ = attack(safe, bounds="required", **bound)
        assert realised.status == "no_effect"
        assert "within the bounds" in realised.reason


def test_without_a_direction_within_the_bounds_the_least_harmful_is_taken(safe: Subject) -> None:
    tight, _, _ = attack(safe, kl_bound=1e-12)
    plain, _, _ = attack(safe)
    assert (tight.status, plain.status) == ("done", "done")
    chosen = tight.facts["direction"]
    assert not chosen["within_bounds"]
    assert plain.facts["direction"]["within_bounds"]
    assert chosen["bypass"] < 0
    assert chosen["kl"] <= plain.facts["direction"]["kl"]


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_a_basis_of_any_rank_begins_with_the_direction(safe: Subject, rank: int) -> None:
    settings = DirectionSettings(rank=rank)
    search = DirectionSearch(safe, settings, writers(safe.model), Spent())
    direction = search.run(tiny_world.tiny_domain(), SEEDS)
    basis = direction.basis
    assert basis.shape == (64, rank)
    torch.testing.assert_close(basis.T @ basis, torch.eye(rank), atol=1e-5, rtol=0)
    unit = direction.mean_difference / direction.mean_difference.norm()
    torch.testing.assert_close(basis[:, 0], unit, atol=1e-5, rtol=0)


def plant(subject: Subject, direction: torch.Tensor, size: float) -> None:
    """Make ``subject`` refuse whatever asks for a metal, along ``direction`` and nothing else."""
    metal, refuse = (subject.chat.tokenizer.convert_tokens_to_ids(w) for w in ("metal", "i"))
    last = list[torch.Tensor]()

    def mark(module: nn.Module, inputs: Any, states: torch.Tensor) -> torch.Tensor:
        asked = (inputs[0] == metal).cumsum(-1).clamp(max=1)[..., None]
        return states + size * asked * direction

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        last[:] = [output if isinstance(output, torch.Tensor) else output[0]]

    def say(module: nn.Module, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        changed = logits.clone()
        changed[..., refuse] += last[0][:, -logits.shape[1] :] @ direction
        return changed

    subject.model.model.embed_tokens.register_forward_hook(mark)
    subject.model.model.layers[-1].register_forward_hook(keep)
    subject.model.lm_head.register_forward_hook(say)
    # The mark goes by the order of the tokens, which a tree does not keep.
    subject.__dict__["tree"] = False


def test_a_planted_direction_is_found() -> None:
    subject = tiny_world.as_subject(tiny_world.fresh_model())
    planted = columns(1, 64, seed=9)
    plant(subject, planted[:, 0], 30.0)
    search = DirectionSearch(
        subject, DirectionSettings(kl_bound=1), writers(subject.model), Spent()
    )
    direction = search.run(tiny_world.tiny_domain(), SEEDS)
    assert abs(float(direction.basis[:, 0] @ planted[:, 0])) > 0.95
    assert direction.bypass < 0 < direction.untouched
    assert direction.induce > 0


def test_reading_gives_the_hidden_states_of_single_prompts(safe: Subject) -> None:
    items = restricted()[:5] + tiny_world.tiny_domain().select(Role.BENIGN)[:3]
    chain = [block for _, block in blocks(safe.model)]
    for tree in (True, False):
        subject = tiny_world.as_subject(safe.model)
        subject.__dict__["tree"] = tree
        spent = Spent()
        reader = PromptReader(subject, spent, 2)
        seen = reader.read(reader.rows(items), [0, 1])
        states = list[torch.Tensor]()

        def see(x: torch.Tensor, states: list[torch.Tensor] = states) -> torch.Tensor:
            states.append(x)
            return x

        for index, item in enumerate(items):
            states.clear()
            handles = [writing.hook_block_input(block, see) for block in chain]
            ids = torch.tensor([subject.chat.prompt_ids(item.prompt)])
            with torch.no_grad():
                logits = subject.model(input_ids=ids, use_cache=False).logits[0, -1]
            for handle in handles:
                handle.remove()
            torch.testing.assert_close(seen.logits[index], logits, atol=1e-3, rtol=1e-3)
            for layer in (0, 1):
                expected = states[layer][0, -2:]
                torch.testing.assert_close(
                    seen.hidden[layer][index], expected, atol=1e-3, rtol=1e-3
                )
        assert spent.tokens == sum(len(subject.chat.prompt_ids(item.prompt)) for item in items)


def test_only_the_attack_split_is_read(safe: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[Any]()
    rows = PromptReader.rows

    def spy(self: PromptReader, items: Any) -> Any:
        asked.extend(items)
        return rows(self, items)

    monkeypatch.setattr(PromptReader, "rows", spy)
    search = DirectionSearch(safe, DirectionSettings(), writers(safe.model), Spent())
    kinds = search._prompts(tiny_world.tiny_domain(), SEEDS)
    assert {str(item.split) for item in asked} == {"attack"}
    for kind, start in zip(kinds, (0, 24), strict=True):
        entities = [
            {asked[start + index].entity for index in chosen}
            for chosen in (kind.training, kind.validation)
        ]
        assert not entities[0] & entities[1]


def test_scores_are_log_odds() -> None:
    logits = torch.randn(4, 9)
    p = logits.double().softmax(-1)[:, [2, 5]].sum(-1)
    torch.testing.assert_close(refusal_scores(logits, [2, 5]), (p / (1 - p)).log())


def test_kl_is_the_sum_over_the_vocabulary() -> None:
    base, changed = torch.randn(3, 7), torch.randn(3, 7)
    p, q = base.double().softmax(-1), changed.double().softmax(-1)
    assert mean_kl(base, changed) == pytest.approx(float((p * (p / q).log()).sum(-1).mean()))
    assert mean_kl(base, base) == pytest.approx(0.0, abs=1e-12)


def test_template_positions_are_those_behind_the_prompt(safe: Subject) -> None:
    assert template_positions(safe) == 1


@pytest.mark.parametrize(
    "settings",
    [{"rank": 0}, {"prompts": 1}, {"kl_bound": 0.0}, {"strengths": ()}, {"direction": "other"}],
)
def test_settings_out_of_bounds_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        make_tamper("ablate_direction", **settings)


def test_strength_zero_changes_nothing(make_model: MakeModel) -> None:
    subject = tiny_world.as_subject(make(make_model, "Llama"))
    untouched = logits_of(subject.model)
    realised, logits, _ = attack(subject, direction="random", strengths="0")
    assert realised.status == "done"
    assert torch.equal(logits[0], untouched)
    assert math.isclose(sum(realised.changed.values()), 0.0)
