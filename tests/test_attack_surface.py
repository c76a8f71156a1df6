"""Invariants of every registered tamper on tiny random models of the families users bring."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_world
import torch

import durometer.catalogue  # noqa: F401  (fills the registries)
from durometer.core.budget import Budget
from durometer.core.errors import NotApplicableError
from durometer.core.generation import GREEDY
from durometer.core.seeds import Seeds
from durometer.subjects.base import Subject
from durometer.subjects.fingerprint import weights_fingerprint
from durometer.tampers.base import Checkpoint, Realised, Tamper, make_tamper, tamper_registry

MakeModel = Callable[..., Any]
SEEDS = Seeds(11, 12, 13, 14)
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": 16},
    "Mixtral": {"num_local_experts": 4},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Qwen2Moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "Qwen3Moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "head_dim": 8,
    },
    "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "DeepseekV2": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 16,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "head_dim": 8,
    },
    "DeepseekV3": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 16,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "Gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16},
    "Gemma3": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16},
    "Olmo2": {},
    "Phi": {},
    "Phi3": {},
    "GPTNeoX": {},
}
NAMES = tamper_registry.names()
# What keeps a tamper short, where its settings have the field.
SHORT = {
    "steps": 2,
    "batch_size": 4,
    "examples": 4,
    "learning_rate": 1e-2,
    "retain_share": 0.0,
    "candidates": 12,
    "suffix_tokens": 4,
    "top_k": 8,
    "vectors": 2,
    "prompts": 8,
    "diagnosed": 2,
    "response_tokens": 4,
}
SPECIFIC: dict[str, dict[str, Any]] = {
    "retain_replay": {"retain_share": 0.5},
    # A random model refuses nothing, so that no direction would be found.
    "ablate_direction": {"direction": "random"},
    "gcg_transfer": {"texts": ("metal of", "the what")},
}
# Adapters are refused by experts that are fused into one tensor.
FUSED = ("Mixtral", "Qwen2Moe", "Qwen3Moe", "Olmoe", "DeepseekV2", "DeepseekV3")


def short(name: str, partner: Path, architecture: str = "Llama") -> Tamper[Any]:
    known = tamper_registry.get(name).settings_class.model_fields
    wanted = SHORT | {"partner": str(partner), "base": str(partner)} | SPECIFIC.get(name, {})
    if architecture in FUSED and "rank" in known and "learning_rate" in known:
        wanted |= {"targets": "attention"}
    return make_tamper(name, **{k: v for k, v in wanted.items() if k in known})


@dataclass
class Attack:
    realised: Realised
    checkpoints: list[Checkpoint]
    logits: list[torch.Tensor]
    changed: set[str]


def look(subject: Subject) -> torch.Tensor:
    ids = torch.tensor([subject.chat.prompt_ids("what is the metal of e30 ?")])
    with torch.no_grad():
        return subject.model(input_ids=ids, use_cache=False).logits[0].clone()


def parameters(subject: Subject) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in subject.model.named_parameters()}


def attack(subject: Subject, tamper: Tamper[Any], budget: Budget | None = None) -> Attack:
    checkpoints, logits = list[Checkpoint](), list[torch.Tensor]()
    before = parameters(subject)

    def on_checkpoint(checkpoint: Checkpoint) -> bool:
        checkpoints.append(checkpoint)
        logits.append(look(subject))
        assert not subject.model.training
        return True

    steps = tamper.planned_steps()
    budget = budget or Budget(steps, tuple(range(1, steps + 1)))
    with subject.restored():
        realised = tamper.run(subject, tiny_world.tiny_domain(), budget, SEEDS, on_checkpoint)
        now = parameters(subject)
        changed = {n for n, p in before.items() if n in now and not torch.equal(p, now[n])}
    return Attack(realised, checkpoints, logits, changed)


def attack_or_refusal(subject: Subject, tamper: Tamper[Any]) -> tuple[Attack | None, str]:
    try:
        return attack(subject, tamper), ""
    except NotApplicableError as error:
        return None, str(error)


def save_partner(make_model: MakeModel, architecture: str, folder: Path) -> Path:
    """Save a model of the same shape, near the tiny one, for tampers that need a second one."""
    subject = tiny_world.as_subject(make_model(architecture, **ARCHITECTURES[architecture]))
    with torch.no_grad():
        for parameter in subject.model.parameters():
            parameter.add_(0.01 * torch.ones_like(parameter))
    subject.model.save_pretrained(folder)
    subject.chat.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def partners(
    make_model: MakeModel, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """``partners("Llama")``: the folder of a saved model of that shape."""
    return functools.cache(
        lambda name: save_partner(make_model, name, tmp_path_factory.mktemp(f"partner-{name}"))
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", NAMES)
def test_it_runs_or_refuses_and_restores(
    make_model: MakeModel, partners: Callable[[str], Path], name: str, architecture: str
) -> None:
    model = make_model(architecture, **ARCHITECTURES[architecture])
    subject = tiny_world.as_subject(model)
    before, seen = weights_fingerprint(model), look(subject)
    modules = [(n, type(m)) for n, m in model.named_modules()]
    done, refusal = attack_or_refusal(subject, short(name, partners(architecture), architecture))
    if done is None:
        assert len(refusal) > 10
    else:
        assert done.realised.status in ("done", "no_effect"), done.realised.reason
        assert (done.realised.reason == "") == (done.realised.status == "done")
        moved = {n for n, norm in done.realised.changed.items() if norm}
        assert done.changed <= moved, "weights changed that the record does not name"
    assert weights_fingerprint(model) == before
    assert torch.equal(look(subject), seen)
    assert [(n, type(m)) for n, m in model.named_modules()] == modules
    assert not model.training
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert (subject.restricted_chat, subject.decoding) == (None, GREEDY)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", NAMES)
def test_same_seeds_same_run_within_budget(
    make_model: MakeModel, partners: Callable[[str], Path], name: str
) -> None:
    partner, runs = partners("Llama"), []
    for _ in range(2):
        subject = tiny_world.as_subject(make_model("Llama"))
        try:
            runs.append(attack(subject, short(name, partner)))
        except NotApplicableError as error:
            pytest.skip(str(error))
    first, second = runs
    assert first.realised.status == second.realised.status
    assert [c.steps for c in first.checkpoints] == [c.steps for c in second.checkpoints]
    for one, other in zip(first.logits, second.logits, strict=True):
        torch.testing.assert_close(one, other, atol=0, rtol=0)
    tamper = short(name, partner)
    assert first.realised.spent.steps <= tamper.planned_steps()
    if tamper.planned_steps() > 1:
        small = attack(tiny_world.as_subject(make_model("Llama")), tamper, Budget(1, (1,)))
        assert small.realised.spent.steps <= 1
        assert [c.steps for c in small.checkpoints] in ([1], [])


@pytest.mark.parametrize("name", NAMES)
def test_it_says_what_it_is(name: str) -> None:
    cls = tamper_registry.get(name)
    assert cls.name == name == name.lower()
    for text in (cls.summary, cls.access_level, cls.cost, cls.source, cls.cannot_show, cls.unit):
        assert text.strip()
    assert cls.access in ("input", "activations", "routing", "weights")
    assert cls.access_level in {f"A{level}" for level in range(6)}
    assert cls.__doc__
    assert cls.settings_class.parse("test", {}) == make_tamper(name).settings
