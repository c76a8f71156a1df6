"""Merges against worked examples, a numpy reference and PEFT; the tampers on tiny models."""

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tiny_world
import torch
from peft.utils import merge_utils

from durometer.core import merging
from durometer.core.budget import Budget
from durometer.core.errors import NotApplicableError
from durometer.core.seeds import Seeds
from durometer.subjects.base import Subject
from durometer.subjects.fingerprint import weights_fingerprint
from durometer.tampers import partners
from durometer.tampers.base import Realised, make_tamper

MakeModel = Callable[..., Any]
SEEDS = Seeds(1, 2, 3, 4)
NAMES = ("merge_linear", "merge_slerp", "task_arithmetic", "merge_ties", "merge_dare")
FIRST = torch.tensor([[4.0, -3.0, 2.0], [1.0, 0.5, -6.0], [0.2, 5.0, -0.1]])
SECOND = torch.tensor([[-1.0, -5.0, 6.0], [0.3, -4.0, 2.0], [3.0, -0.2, 0.4]])


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Rules on tensors


def test_ties_by_hand() -> None:
    """Density 5/9 keeps 5 entries each; weights 1 and 2."""
    kept = torch.tensor([[4.0, -3.0, 2.0], [0.0, 0.0, -6.0], [0.0, 5.0, 0.0]])
    assert torch.equal(merging.trim(FIRST, 5 / 9), kept)
    kept = torch.tensor([[0.0, -5.0, 6.0], [0.0, -4.0, 2.0], [3.0, 0.0, 0.0]])
    assert torch.equal(merging.trim(SECOND, 5 / 9), kept)
    # Weighted sums: 4, -13, 14 / 0, -8, -2 / 6, 5, 0.
    expected = torch.tensor([[4.0, -13 / 3, 14 / 3], [0.0, -4.0, -6.0], [3.0, 5.0, 0.0]])
    merged = merging.ties((FIRST, SECOND), (1, 2), 5 / 9)
    torch.testing.assert_close(merged, expected)
    counted = torch.tensor([[4.0, -6.5, 7.0], [0.0, -8.0, -6.0], [6.0, 5.0, 0.0]])
    merged = merging.ties((FIRST, SECOND), (1, 2), 5 / 9, divide_by="agreeing_count")
    torch.testing.assert_close(merged, counted)
    summed = torch.tensor([[4.0, -13.0, 14.0], [0.0, -8.0, -6.0], [6.0, 5.0, 0.0]])
    merged = merging.ties((FIRST, SECOND), (1, 2), 5 / 9, divide_by="nothing", scale=0.5)
    torch.testing.assert_close(merged, 0.5 * summed)


def test_ties_elections_differ() -> None:
    """-6 against 2: weighted by 1 and 4 the sum is 2; plain it is -4; signs alone tie, to plus."""
    first, second = torch.tensor([-6.0]), torch.tensor([2.0])
    merged = {
        sign: float(merging.ties((first, second), (1, 4), 1.0, sign=sign))
        for sign in ("weighted", "unweighted", "count")
    }
    assert merged == {"weighted": 2.0, "unweighted": -6.0, "count": 2.0}


def test_ties_rescaled_to_the_old_l1_norm() -> None:
    merged = merging.ties((FIRST,), (1.0,), 5 / 9, rescale="l1")
    assert float(merged.abs().sum()) == pytest.approx(float(FIRST.abs().sum()), rel=1e-6)


def test_dare_by_hand() -> None:
    keep = torch.rand(3, 3, generator=torch.Generator().manual_seed(5)) < 0.4
    assert 0 < keep.sum() < 9
    generator = torch.Generator().manual_seed(5)
    merged = merging.dare((FIRST,), (0.5,), 0.4, generator)
    expected = torch.where(keep, FIRST * 0.5 / 0.4, 0.0)
    torch.testing.assert_close(merged, expected)
    generator.manual_seed(5)
    l1 = merging.dare((FIRST,), (1.0,), 0.4, generator, rescale="l1")
    assert float(l1.abs().sum()) == pytest.approx(float(FIRST.abs().sum()), rel=1e-6)
    generator.manual_seed(5)
    plain = merging.dare((FIRST,), (1.0,), 0.4, generator, rescale="none")
    assert torch.equal(plain, FIRST * keep)


def test_dare_keeps_the_expectation() -> None:
    delta = drawn(200, 200)
    generator = torch.Generator().manual_seed(0)
    merged = merging.dare((delta,), (1.0,), 0.25, generator)
    assert (merged != 0).float().mean() == pytest.approx(0.25, abs=0.01)
    kept = merged != 0
    torch.testing.assert_close(merged[kept], 4 * delta[kept])


def test_dare_with_consensus_divides_by_agreeing_weights() -> None:
    generator = torch.Generator()
    merged = merging.dare((FIRST, SECOND), (1, 2), 1.0, generator, consensus="ties")
    torch.testing.assert_close(merged, merging.ties((FIRST, SECOND), (1, 2), 1.0))


@pytest.mark.parametrize("sign", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
@pytest.mark.filterwarnings("ignore:The density")
def test_ties_equals_peft(sign: Any, density: float) -> None:
    deltas = [drawn(7, 11, seed=seed) for seed in range(3)]
    weights = [0.7, 0.2, 1.3]
    theirs = merge_utils.ties(deltas, torch.tensor(weights), density, sign)
    ours = merging.ties(
        deltas,
        weights,
        density,
        sign="unweighted" if sign == "total" else "count",
        divide_by="agreeing_count",
    )
    torch.testing.assert_close(ours, theirs)


def test_dare_and_task_arithmetic_equal_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    deltas, weights = [drawn(7, 11, seed=seed) for seed in range(2)], [0.7, -0.2]
    generator = torch.Generator().manual_seed(9)

    def bernoulli(probabilities: torch.Tensor) -> torch.Tensor:
        return (torch.rand(probabilities.shape, generator=generator) < probabilities).float()

    with monkeypatch.context() as patch:
        patch.setattr(torch, "bernoulli", bernoulli)
        theirs = merge_utils.dare_linear(deltas, torch.tensor(weights), 0.3)
    ours = merging.dare(deltas, weights, 0.3, generator.manual_seed(9))
    torch.testing.assert_close(ours, theirs)
    theirs = merge_utils.task_arithmetic(deltas, torch.tensor(weights))
    base = drawn(7, 11, seed=5)
    torch.testing.assert_close(merging.task_arithmetic(base, deltas, weights), base + theirs)


@pytest.mark.parametrize("t", [-0.25, 0.0, 0.3, 0.5, 1.0, 1.2])
def test_slerp_against_numpy(t: float) -> None:
    first, second = drawn(5, 8), drawn(5, 8, seed=1)
    a, b = first.double().numpy(), second.double().numpy()
    angle = np.arccos(np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b))
    expected = np.sin((1 - t) * angle) / np.sin(angle) * a + np.sin(t * angle) / np.sin(angle) * b
    merged = merging.slerp(first, second, t)
    np.testing.assert_allclose(merged.double().numpy(), expected, rtol=1e-4, atol=1e-5)


def test_slerp_of_unit_vectors_stays_on_the_circle() -> None:
    merged = merging.slerp(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), 1 / 3)
    torch.testing.assert_close(merged, torch.tensor([3**0.5 / 2, 0.5]))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_slerp_of_nearly_parallel_tensors_is_linear(sign: float) -> None:
    first = drawn(6, 6)
    second = sign * (2 * first + 1e-3 * drawn(6, 6, seed=1))
    merged = merging.slerp(first, second, 0.3)
    torch.testing.assert_close(merged, 0.7 * first + 0.3 * second)


def test_linear_normalises_and_is_exact_at_the_ends() -> None:
    first, second = drawn(4, 4), drawn(4, 4, seed=1)
    merged = merging.linear((first, second), (1, 3))
    torch.testing.assert_close(merged, (first + 3 * second) / 4)
    assert torch.equal(merging.linear((first, second), (1, 0)), first)
    assert torch.equal(merging.linear((first, second), (0, 1)), second)
    plain = merging.linear((first, second), (1, 3), normalise=False)
    torch.testing.assert_close(plain, first + 3 * second)
    with pytest.raises(ValueError, match="add up to 0"):
        merging.linear((first, second), (1, -1))


def test_a_random_delta_has_the_norm_and_not_the_direction() -> None:
    delta = drawn(60, 60).to(torch.bfloat16) * 0.01
    drawn_delta = merging.random_like(delta, torch.Generator().manual_seed(3))
    assert float(drawn_delta.norm()) == pytest.approx(float(delta.float().norm()), rel=1e-5)
    assert abs(merging.cosine_of(drawn_delta, delta)) < 0.1
    assert not merging.random_like(torch.zeros(3, 3), torch.Generator()).any()


# Tampers


def varied(model: Any, seed: int, size: float = 0.02) -> Any:
    """Return a relative of ``model``: every weight moved a little, but the final norm."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "norm.weight" not in name:
                noise = size * torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise.to(parameter.dtype))
    return other


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Models that can be loaded by name."""
    models: dict[str, Any] = {}

    def load(spec: str, *, dtype: str, device: str) -> Subject:
        assert device == "cpu"
        model = copy.deepcopy(models[spec]).to(getattr(torch, dtype))
        return tiny_world.as_subject(model, spec)

    monkeypatch.setattr(partners, "load_subject", load)
    # A full collection takes most of a test's time.
    monkeypatch.setattr(partners, "release_free_memory", lambda: models.update(released=True))
    return models


@pytest.fixture
def subject(make_model: MakeModel, library: dict[str, Any]) -> Subject:
    base = make_model("Llama", vocab_size=len(tiny_world.VOCABULARY))
    library["base"] = base
    library["cousin"] = varied(base, 7)
    return tiny_world.as_subject(varied(base, 1), undefended="base")


def weights_at_strengths(
    subject: Subject, name: str, **settings: Any
) -> tuple[Realised, list[dict[str, torch.Tensor]]]:
    tamper, seen = make_tamper(name, **settings), list[dict[str, torch.Tensor]]()

    def look(checkpoint: Any) -> bool:
        seen.append({n: t.clone() for n, t in partners.merged_tensors(subject.model).items()})
        return True

    steps = tamper.planned_steps()
    before = weights_fingerprint(subject.model)
    with subject.restored():
        budget = Budget(steps, tuple(range(1, steps + 1)))
        realised = tamper.run(subject, tiny_world.tiny_domain(), budget, SEEDS, look)
    assert weights_fingerprint(subject.model) == before
    assert not any(p.requires_grad for p in subject.model.parameters())
    assert not tamper._loaded  # type: ignore[attr-defined]
    return realised, seen


def same(left: dict[str, torch.Tensor], model: Any) -> bool:
    right = partners.merged_tensors(model)
    assert left.keys() == right.keys()
    return all(torch.equal(tensor, right[name]) for name, tensor in left.items())


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("base_reversion", {}),
        ("merge_linear", {}),
        ("merge_slerp", {}),
        ("task_arithmetic", {}),
        ("merge_linear", {"partner": "cousin"}),
        ("merge_slerp", {"partner": "cousin"}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_ends_bit_for_bit(
    subject: Subject,
    library: dict[str, Any],
    name: str,
    settings: dict[str, Any],
    dtype: torch.dtype,
) -> None:
    subject.model.to(dtype)
    other = library[settings.get("partner", "base")].to(dtype)
    realised, seen = weights_at_strengths(subject, name, strengths=(0, 0.5, 1), **settings)
    assert realised.status == "done"
    assert same(seen[0], subject.model)
    assert same(seen[2], other)
    assert not same(seen[1], subject.model)
    assert realised.facts["applied_cosine"]["0.5"] > 0.95


def test_base_reversion_walks_the_line(subject: Subject, library: dict[str, Any]) -> None:
    realised, seen = weights_at_strengths(subject, "base_reversion")
    own = partners.merged_tensors(subject.model)
    base = partners.merged_tensors(library["base"])
    for strength, weights in zip((0.25, 0.5, 0.75, 1.0, 1.25), seen, strict=True):
        for name, tensor in weights.items():
            expected = base[name] + (1 - strength) * (own[name] - base[name])
            torch.testing.assert_close(tensor, expected, atol=1e-6, rtol=1e-5)
    assert realised.facts["base_cosine"] > 0.9
    moved = [name for name in own if not torch.equal(own[name], base[name])]
    assert realised.facts["tensors"] == len(moved) < len(own)
    assert realised.changed_weights == sum(own[name].numel() for name in moved)
    assert set(realised.changed) == set(moved)


def test_a_random_reversion_moves_as_far(subject: Subject) -> None:
    true, walked = weights_at_strengths(subject, "base_reversion", strengths=(1,))
    random, drifted = weights_at_strengths(
        subject, "base_reversion", strengths=(1,), delta="random"
    )
    assert random.changed.keys() == true.changed.keys()
    for name, norm in true.changed.items():
        assert random.changed[name] == pytest.approx(norm, rel=1e-3)
        start = partners.merged_tensors(subject.model)[name]
        assert abs(merging.cosine_of(walked[0][name] - start, drifted[0][name] - start)) < 0.3
    again = weights_at_strengths(subject, "base_reversion", strengths=(0.5, 1), delta="random")[1]
    assert all(torch.equal(again[1][n], tensor) for n, tensor in drifted[0].items())


@pytest.mark.parametrize("name", ["task_arithmetic", "merge_ties", "merge_dare"])
def test_merges_with_a_base_follow_their_rule(
    subject: Subject, library: dict[str, Any], name: str
) -> None:
    realised, seen = weights_at_strengths(subject, name, partner="cousin", strengths=(0.25,))
    key = "model.layers.1.mlp.up_proj.weight"
    own, base, partner = (
        partners.merged_tensors(model)[key]
        for model in (subject.model, library["base"], library["cousin"])
    )
    deltas, weights = (own - base, partner - base), (0.75, 0.25)
    generator = partners.generator_for(SEEDS.initialisation, key)
    expected = {
        "task_arithmetic": own + 0.25 * (partner - base),
        "merge_ties": base + merging.ties(deltas, weights, 0.5),
        "merge_dare": base + merging.dare(deltas, weights, 0.5, generator),
    }[name]
    torch.testing.assert_close(seen[0][key], expected)
    assert realised.facts["base"] == "base"
    assert realised.facts["partner"] == "cousin"
    assert realised.facts["access_level"] == "A5"


def test_merges_without_a_partner_revert_part_of_the_difference(
    subject: Subject, library: dict[str, Any]
) -> None:
    key = "model.layers.0.mlp.down_proj.weight"
    own = partners.merged_tensors(subject.model)[key]
    difference = partners.merged_tensors(library["base"])[key] - own
    _, seen = weights_at_strengths(subject, "merge_ties", strengths=(0.5, 1))
    trimmed = merging.trim(difference, 0.5)
    torch.testing.assert_close(seen[0][key], own + 0.5 * trimmed)
    torch.testing.assert_close(seen[1][key], own + trimmed)
    _, seen = weights_at_strengths(subject, "merge_dare", strengths=(0.5, 1))
    first, second = seen[0][key] - own, seen[1][key] - own
    torch.testing.assert_close(2 * first, second, atol=1e-6, rtol=1e-4)
    assert (second == 0).float().mean() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("name", [*NAMES, "base_reversion"])
def test_same_seeds_same_weights(subject: Subject, name: str) -> None:
    first = weights_at_strengths(subject, name, strengths=(0.5,))[1]
    second = weights_at_strengths(subject, name, strengths=(0.5,))[1]
    for left, right in zip(first, second, strict=True):
        assert all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("name", [*NAMES, "base_reversion"])
def test_an_unknown_checkpoint_is_asked_for(make_model: MakeModel, name: str) -> None:
    subject = tiny_world.as_subject(make_model("Llama"))
    setting = "base" if name == "base_reversion" else "partner"
    with pytest.raises(NotApplicableError, match=f"setting '{setting}'"):
        weights_at_strengths(subject, name)


def test_a_base_is_asked_for_and_a4_is_told(
    make_model: MakeModel, library: dict[str, Any], subject: Subject
) -> None:
    loose = tiny_world.as_subject(subject.model)
    with pytest.raises(NotApplicableError, match="setting 'base'"):
        weights_at_strengths(loose, "merge_ties", partner="cousin")
    realised, _ = weights_at_strengths(loose, "merge_ties", partner="cousin", base="base")
    assert realised.facts["access_level"] == "A4"


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("Llama", {"hidden_size": 48}, "other shapes"),
        ("Llama", {"vocab_size": 120}, "other shapes"),
        ("Llama", {"num_hidden_layers": 3}, "another architecture"),
        ("Llama", {"tie_word_embeddings": True}, "another architecture"),
        ("GPTNeoX", {}, "another architecture"),
        ("Llama", {"seed": 5}, "no relative"),
    ],
)
@pytest.mark.parametrize("name", ["merge_linear", "base_reversion"])
def test_strangers_are_refused(
    make_model: MakeModel,
    subject: Subject,
    library: dict[str, Any],
    name: str,
    architecture: str,
    changes: dict[str, Any],
    message: str,
) -> None:
    changes = {"vocab_size": len(tiny_world.VOCABULARY)} | changes
    library["base"] = make_model(architecture, **changes)
    with pytest.raises(NotApplicableError, match=message):
        weights_at_strengths(subject, name)


def test_a_partner_with_moved_tokens_is_refused(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    load: Any = vars(partners)["load_subject"]

    def renumbered(*args: Any, **options: Any) -> Subject:
        other = load(*args, **options)
        vocabulary = other.chat.tokenizer.get_vocab()
        swapped = {word: len(vocabulary) - 1 - index for word, index in vocabulary.items()}
        tables = iter([vocabulary, swapped])
        monkeypatch.setattr(type(other.chat.tokenizer), "get_vocab", lambda self: next(tables))
        return other

    monkeypatch.setattr(partners, "load_subject", renumbered)
    with pytest.raises(NotApplicableError, match="another vocabulary"):
        weights_at_strengths(subject, "merge_linear")


@pytest.mark.parametrize("breaks_off", [False, True])
def test_the_partner_is_let_go(subject: Subject, library: dict[str, Any], breaks_off: bool) -> None:
    tamper = make_tamper("base_reversion")

    def on_checkpoint(checkpoint: Any) -> bool:
        assert tamper._loaded  # type: ignore[attr-defined]
        if breaks_off:
            raise RuntimeError("broken off")
        return False

    with contextlib.suppress(RuntimeError), subject.restored():
        tamper.run(subject, tiny_world.tiny_domain(), Budget(2, (1, 2)), SEEDS, on_checkpoint)
    assert library["released"]
    assert not tamper._loaded  # type: ignore[attr-defined]


def test_a_partner_equal_to_the_subject_has_no_effect(
    subject: Subject, library: dict[str, Any]
) -> None:
    library["base"] = subject.model
    realised, _ = weights_at_strengths(subject, "merge_linear")
    assert realised.status == "no_effect"


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("GPTNeoX", {}),
        ("Phi3", {}),
        ("Gemma2", {"head_dim": 8, "query_pre_attn_scalar": 8}),
        ("Mixtral", {"num_local_experts": 4}),
        ("Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
    ],
)
def test_every_tensor_of_other_architectures_is_reverted(
    make_model: MakeModel, library: dict[str, Any], architecture: str, changes: dict[str, Any]
) -> None:
    base = make_model(architecture, vocab_size=len(tiny_world.VOCABULARY), **changes)
    library["base"] = base
    subject = tiny_world.as_subject(varied(base, 1), undefended="base")
    realised, seen = weights_at_strengths(subject, "base_reversion", strengths=(1,))
    assert same(seen[0], base)
    assert realised.status == "done"


def test_trained_buffers_are_reverted_and_restored(
    make_model: MakeModel, library: dict[str, Any]
) -> None:
    base = make_model("DeepseekV3", vocab_size=len(tiny_world.VOCABULARY), **DEEPSEEK)
    library["base"] = base
    model = varied(base, 1)
    correction = model.model.layers[0].mlp.gate.e_score_correction_bias
    correction += 0.5
    subject = tiny_world.as_subject(model, undefended="base")
    _, seen = weights_at_strengths(subject, "base_reversion", strengths=(0.5, 1))
    name = "model.layers.0.mlp.gate.e_score_correction_bias"
    assert torch.equal(seen[0][name], torch.full_like(correction, 0.25))
    assert same(seen[1], base)


DEEPSEEK = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "moe_intermediate_size": 16,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}


def test_a_partner_from_a_folder(
    make_model: MakeModel, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partners, "release_free_memory", lambda: None)
    base = make_model("Llama", vocab_size=len(tiny_world.VOCABULARY))
    base.save_pretrained(tmp_path)
    tiny_world.tiny_tokenizer().save_pretrained(tmp_path)
    subject = tiny_world.as_subject(varied(base, 1))
    _, seen = weights_at_strengths(subject, "merge_linear", partner=str(tmp_path), strengths=(1.0,))
    assert same(seen[0], base)
