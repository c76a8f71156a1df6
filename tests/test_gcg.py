"""The search for suffixes: gradients, losses and candidates against slow references, controls."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import tiny_world
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast

from durometer.core.budget import Budget, matrix_entries
from durometer.core.errors import DurometerError, InputError, NotApplicableError
from durometer.core.seeds import Seeds
from durometer.domains.base import Item, Role, Split
from durometer.subjects.base import Source, Subject
from durometer.subjects.chat import ChatFormat
from durometer.subjects.fingerprint import weights_fingerprint
from durometer.tampers import gcg_scoring, gcg_screening, gcg_transfer
from durometer.tampers.base import Checkpoint, Realised, make_tamper
from durometer.tampers.gcg import GcgSettings, Hunt, make_ready, make_search, opening
from durometer.tampers.gcg_prompts import SuffixTokens, place
from durometer.tampers.gcg_scoring import Objective, Scorer, Work, first_swap
from durometer.tampers.gcg_screening import Bfloat16Products, Screening, screening_of
from durometer.tampers.gcg_search import SuffixSearch

MakeModel = Callable[..., Any]
SEEDS = Seeds(11, 12, 13, 14)
SHORT: dict[str, Any] = {"steps": 3, "suffix_tokens": 4, "candidates": 12, "top_k": 8}
DEEPSEEK = {
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": 8},
    "Mixtral": {"num_local_experts": 4},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Qwen3Moe": {"head_dim": 8, **EXPERTS},
    "Gemma2": GEMMA,
    "Gemma3": GEMMA,
    "Olmo2": {},
    "Phi3": {},
    "GPTNeoX": {},
    "DeepseekV3": DEEPSEEK,
}
CHATML = (
    "{% for message in messages %}{{ '<|start|>' + message['role'] + '\\n' }}"
    "{{ message['content'] | trim if trimmed else message['content'] }}{{ '<|end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\\n' }}{% endif %}"
)


def bytes_tokenizer() -> Any:
    """Return a byte-level BPE with merges, as most subjects have."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|start|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [item.prompt + " " + item.response for item in tiny_world.tiny_domain().items]
    backend.train_from_iterator([*texts, " ! ! !", " x word"] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture(scope="module")
def bpe() -> Any:
    return bytes_tokenizer()


@pytest.fixture
def bpe_subject(make_model: MakeModel, bpe: Any) -> Subject:
    model = make_model("Llama", vocab_size=448).requires_grad_(False)
    return Subject("bpe", model, ChatFormat.of(bpe), Source("folder", "bpe"))


@pytest.fixture
def subject(make_model: MakeModel) -> Subject:
    return tiny_world.as_subject(make_model("Llama"))


def settings(**changes: Any) -> GcgSettings:
    return GcgSettings(**{**SHORT, **changes})


def ready(subject: Subject, **changes: Any) -> tuple[Hunt, SuffixSearch]:
    chosen = settings(**changes)
    hunt = make_ready(subject, tiny_world.tiny_domain(), chosen, SEEDS)
    cached = chosen.prefix_cache
    return hunt, make_search(subject, hunt, chosen, SEEDS, cached=cached)


def attack(
    subject: Subject,
    name: str = "gcg",
    *,
    seeds: Seeds = SEEDS,
    budget: Budget | None = None,
    stop_at: int | None = None,
    **changes: Any,
) -> tuple[Realised, list[tuple[Checkpoint, str]]]:
    """Run the tamper; return what it did, and the suffix that stood at each checkpoint."""
    tamper = make_tamper(name, **{**SHORT, **changes})
    seen: list[tuple[Checkpoint, str]] = []
    (item,) = tiny_world.tiny_domain().select(Role.RESTRICTED, Split.REPORT)[:1]

    def on_checkpoint(checkpoint: Checkpoint) -> bool:
        seen.append((checkpoint, subject.chat_for(item).suffix))
        return checkpoint.steps != stop_at

    steps = tamper.planned_steps()
    budget = budget or Budget(steps, tuple(range(1, steps + 1)))
    with subject.restored():
        realised = tamper.run(subject, tiny_world.tiny_domain(), budget, seeds, on_checkpoint)
    return realised, seen


def slow_loss(subject: Subject, hunt: Hunt, suffix: tuple[int, ...]) -> float:
    """Return the loss by one plain pass an item, all logits, no cache."""
    losses = []
    for prompt in hunt.start.prompts:
        ids = torch.tensor([prompt.ids(suffix)])
        with torch.no_grad():
            logits = subject.model(input_ids=ids, use_cache=False).logits[0].float()
        count = len(prompt.target)
        losses.append(float(cross_entropy(logits[-count - 1 : -1], ids[0, -count:])))
    return sum(losses) / len(losses)


# Gradient and losses


@pytest.mark.parametrize("architecture", ["Llama", "Gemma2", "Gemma3", "Olmo2", "GPTNeoX"])
def test_the_gradient_is_that_of_finite_differences(
    make_model: MakeModel, architecture: str
) -> None:
    model = make_model(architecture, **ARCHITECTURES[architecture]).double()
    subject = tiny_world.as_subject(model)
    hunt, search = ready(subject)
    prompt, suffix = hunt.start.prompts[0], hunt.start.suffix
    gradient = search.scorer.gradient(suffix)
    embedding = model.get_input_embeddings()
    count, start = len(prompt.target), len(prompt.before)
    ids = torch.tensor([prompt.ids(suffix)])

    def loss(place: int, token: int, change: float) -> float:
        embedded = embedding(ids).clone()
        embedded[0, start + place] += change * embedding(torch.tensor(token))
        logits = model(inputs_embeds=embedded, use_cache=False).logits[0]
        return float(cross_entropy(logits[-count - 1 : -1], ids[0, -count:]))

    with torch.no_grad():
        for place, token in ((0, 7), (1, 30), (3, 80), (3, suffix[3])):
            slope = (loss(place, token, 1e-2) - loss(place, token, -1e-2)) / 2e-2
            assert float(gradient[place, token]) == pytest.approx(slope, rel=5e-3, abs=3e-5)
    assert gradient.shape == (4, model.config.vocab_size)
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


def test_over_items_the_normalised_gradients_are_added(subject: Subject) -> None:
    hunt, search = ready(subject, items=3)
    parts = []
    for prompt in hunt.start.prompts:
        own = Scorer(subject.model, [prompt]).gradient(hunt.start.suffix)
        parts.append(own / own.norm())
    assert torch.allclose(search.scorer.gradient(hunt.start.suffix), sum(parts), atol=1e-6)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_losses_are_those_of_a_slow_loop(make_model: MakeModel, architecture: str) -> None:
    model = make_model(architecture, **ARCHITECTURES[architecture], initializer_range=0.2)
    subject = tiny_world.as_subject(model)
    hunt, search = ready(subject, items=2, candidates=10)
    current = hunt.start.suffix
    candidates = [s for s, _ in search.candidates(search.scorer.gradient(current))] + [current]
    fast = search.scorer.losses(candidates, current)
    slow = torch.tensor([slow_loss(subject, hunt, suffix) for suffix in candidates])
    assert torch.allclose(fast, slow, rtol=1e-5, atol=1e-5)
    assert int(fast.argmin()) == int(slow.argmin())
    # Everything here keeps keys and values that can be shared; the plain path is right as well.
    assert search.scorer.cached
    plain = Scorer(model, hunt.start.prompts, cached=False).losses(candidates, current)
    assert torch.allclose(plain, slow, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("enough", "most"), [(1, 10**6), (10**6, 10**6), (1, 1), (40, 60)])
def test_however_passes_are_cut_the_losses_are_the_same(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, enough: int, most: int
) -> None:
    hunt, search = ready(subject, candidates=24)
    current = hunt.start.suffix
    candidates = [s for s, _ in search.candidates(search.scorer.gradient(current))]
    expected = search.scorer.losses(candidates, current)
    monkeypatch.setitem(gcg_scoring.ENOUGH_TOKENS, "cpu", enough)
    monkeypatch.setitem(gcg_scoring.MOST_TOKENS, "cpu", most)
    passes = list(search.scorer._passes(hunt.start.prompts[0], candidates, current))
    assert sorted(i for _, members in passes for i in members) == list(range(len(candidates)))
    for start, members in passes:
        assert all(first_swap(candidates[i], current) >= start for i in members)
    assert torch.allclose(search.scorer.losses(candidates, current), expected, atol=1e-5)


@pytest.mark.parametrize("fault", ["wrong", "raises"])
def test_a_cache_that_changes_losses_is_given_up(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    right, _ = attack(subject)
    view = gcg_scoring._view

    def broken(cache: Any, length: int, rows: int) -> Any:
        if fault == "raises":
            raise IndexError("no such layer")
        made = view(cache, length, rows)
        for layer in made.layers:
            layer.values = layer.values * 3.0
        return made

    monkeypatch.setattr(gcg_scoring, "_view", broken)
    realised, _ = attack(subject)
    assert realised.facts["prefix_cache"].startswith("off: ")
    assert realised.losses == pytest.approx(right.losses, rel=1e-5)
    assert realised.facts["suffix"] == right.facts["suffix"]


def test_the_cache_can_be_left_out(subject: Subject) -> None:
    on, _ = attack(subject)
    off, _ = attack(subject, prefix_cache=False)
    assert on.facts["prefix_cache"].startswith("exact")
    assert off.facts["prefix_cache"] == "off"
    assert off.losses == pytest.approx(on.losses, rel=1e-5)
    assert off.spent.tokens == on.spent.tokens
    assert off.spent.flops > on.spent.flops


# Objectives


def per_token(logits: torch.Tensor, target: torch.Tensor) -> list[list[float]]:
    """Return the cross-entropy of every token, one at a time."""
    return [
        [float(-torch.log_softmax(at, -1)[token]) for at, token in zip(row, target, strict=True)]
        for row in logits.double()
    ]


@pytest.mark.parametrize("alpha", [0.3, 1.0, 4.0])
def test_mellowmax_lies_between_the_mean_and_the_largest(alpha: float) -> None:
    logits, target = 3 * torch.randn(4, 5, 30), torch.tensor([3, 1, 4, 1, 5])
    found = Objective("mellowmax", alpha)(logits, target)
    for loss, tokens in zip(found.tolist(), per_token(logits, target), strict=True):
        mean = sum(math.exp(alpha * token) for token in tokens) / len(tokens)
        assert loss == pytest.approx(math.log(mean) / alpha, rel=1e-5)
        assert sum(tokens) / len(tokens) <= loss <= max(tokens)
    (sharp,) = Objective("mellowmax", 200.0)(logits[:1], target).tolist()
    assert sharp == pytest.approx(max(per_token(logits[:1], target)[0]), abs=0.02)


def test_the_margin_is_none_once_greedy_decoding_gives_the_target() -> None:
    logits, target = torch.randn(3, 4, 9), torch.tensor([0, 8, 2, 2])
    for place_, token in enumerate(target):
        logits[1, place_, token] = 9.0
    expected = []
    for row in logits:
        gaps = []
        for at, token in zip(row.tolist(), target.tolist(), strict=True):
            others = [value for index, value in enumerate(at) if index != token]
            gaps.append(max(0.0, max(others) - at[token]))
        expected.append(sum(gaps) / len(gaps))
    assert Objective("margin")(logits, target).tolist() == pytest.approx(expected)
    assert expected[1] == 0.0


@pytest.mark.parametrize("loss", ["mellowmax", "margin"])
def test_every_loss_is_searched_by_its_own_gradient(make_model: MakeModel, loss: str) -> None:
    subject = tiny_world.as_subject(make_model("Llama", initializer_range=0.3).double())
    hunt, search = ready(subject, loss=loss, alpha=2.0)
    prompt, suffix = hunt.start.prompts[0], hunt.start.suffix
    embedding = subject.model.get_input_embeddings()
    ids, target = torch.tensor([prompt.ids(suffix)]), torch.tensor(prompt.target)
    one_hot = torch.nn.functional.one_hot(ids, len(embedding.weight)).double().requires_grad_()
    logits = subject.model(inputs_embeds=one_hot @ embedding.weight, use_cache=False).logits
    value = Objective(loss, 2.0)(logits[:, -len(target) - 1 : -1], target).sum()  # type: ignore[arg-type]
    (slow,) = torch.autograd.grad(value, one_hot)
    start = len(prompt.before)
    assert search.initial.loss == pytest.approx(value.item(), rel=1e-6)
    own = slow[0, start : start + len(suffix)].float()
    assert torch.allclose(search.scorer.gradient(suffix), own, atol=1e-6)
    realised, _ = attack(subject, loss=loss, alpha=2.0, steps=6)
    assert realised.losses[-1] < realised.facts["initial_loss"]


# Buffer


def test_a_buffer_goes_on_from_its_best_as_nanogcg_does(subject: Subject) -> None:
    _, search = ready(subject, buffer=4, candidates=4)
    # A list of four, the worst replaced by what is better, the best gone on from.
    kept = sorted((found.loss, found.suffix) for found in search.seen.values())[:4]
    assert len(kept) == 4
    for _ in range(8):
        assert (search.current.loss, search.current.suffix) == kept[0]
        before = dict(search.seen)
        search.step()
        tried = [found for suffix, found in search.seen.items() if suffix not in before]
        for found in tried:
            if found.loss < kept[-1][0]:
                kept[-1] = (found.loss, found.suffix)
                kept.sort()
    assert search.best.loss < search.initial.loss


@pytest.mark.parametrize("buffer", [0, 1, 4])
def test_the_best_text_has_the_best_loss_with_any_buffer(subject: Subject, buffer: int) -> None:
    realised, _ = attack(subject, steps=6, candidates=3, buffer=buffer)
    hunt, _ = ready(subject)
    facts = realised.facts
    assert facts["loss"] == min(realised.losses)
    assert facts["loss"] == pytest.approx(slow_loss(subject, hunt, tuple(facts["suffix_ids"])))
    assert hunt.tokens.faithful(hunt.start.prompts, tuple(facts["suffix_ids"]), facts["suffix"])
    assert facts["candidate_forwards"] == 1 + 6 * 3 + max(0, buffer - 1)


def test_a_buffer_does_not_hide_a_loss_that_is_not_finite(subject: Subject) -> None:
    _, search = ready(subject, buffer=1)
    with torch.no_grad():
        subject.model.lm_head.weight.fill_(math.nan)
    search.step()
    assert not math.isfinite(search.current.loss)


# Memory


def short_of_memory(monkeypatch: pytest.MonkeyPatch, model: Any, rows: int) -> list[int]:
    """Let a pass of more than ``rows`` rows run out of memory; return the rows of each pass."""
    forward, seen = model.forward, list[int]()

    def limited(*given: Any, **named: Any) -> Any:
        ids = named.get("input_ids")
        if ids is not None:
            seen.append(len(ids))
            if len(ids) > rows:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(*given, **named)

    monkeypatch.setattr(model, "forward", limited)
    return seen


def test_passes_that_do_not_fit_are_halved(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = attack(subject)
    assert whole.facts["halvings"] == 0
    seen = short_of_memory(monkeypatch, subject.model, 3)
    halved, _ = attack(subject)
    assert halved.losses == pytest.approx(whole.losses, rel=1e-5)
    assert halved.facts["suffix"] == whole.facts["suffix"]
    assert halved.facts["candidate_forwards"] == whole.facts["candidate_forwards"]
    assert halved.spent.tokens == whole.spent.tokens
    # Once halved, later passes begin as small as what fitted.
    assert 0 < halved.facts["halvings"] <= 4
    assert max(seen[-8:]) <= 3


def test_a_single_row_that_does_not_fit_is_told(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    short_of_memory(monkeypatch, subject.model, 0)
    with pytest.raises(torch.OutOfMemoryError):
        attack(subject)


# Screening


@pytest.fixture
def screened(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> Subject:
    """A subject screened from eight candidates on, whatever the processor."""
    monkeypatch.setattr(gcg_screening, "SCREENED_FROM", 8)
    monkeypatch.setattr(gcg_screening, "SPREAD_FIRST", 6)
    monkeypatch.setattr(gcg_screening, "has_bfloat16", lambda device: True)
    return tiny_world.as_subject(make_model("Llama", initializer_range=0.2))


def test_rough_products_leave_the_model_as_it_was(screened: Subject) -> None:
    model: Any = screened.model
    before = weights_fingerprint(model)
    ids = torch.tensor([[3, 5, 8]])
    bias = torch.nn.Linear(4, 2)
    with torch.no_grad():
        exact, given = model(input_ids=ids).logits, torch.randn(3, 4)
        with Bfloat16Products():
            rough, biased = model(input_ids=ids).logits, bias(given)
            shifted = bias(given.add_(1.0))
        again = model(input_ids=ids).logits
    assert rough.dtype == biased.dtype == torch.float32
    assert not torch.equal(rough, exact)
    assert torch.allclose(rough, exact, rtol=0.05, atol=0.05 * float(exact.abs().max()))
    # An input written to in place is rounded anew.
    assert torch.allclose(shifted, bias(given), atol=0.05)
    assert torch.allclose(biased, bias(given - 1.0), atol=0.05)
    assert torch.equal(again, exact)
    assert weights_fingerprint(model) == before


@pytest.mark.parametrize("items", [1, 3])
def test_screening_chooses_what_exact_scoring_chooses(screened: Subject, items: int) -> None:
    wide: dict[str, Any] = {"candidates": 40, "top_k": 16, "steps": 4, "items": items}
    exact, _ = attack(screened, screening=False, **wide)
    rough, _ = attack(screened, **wide)
    assert rough.losses == pytest.approx(exact.losses, rel=1e-6)
    assert rough.facts["suffix"] == exact.facts["suffix"]
    assert rough.facts["candidate_forwards"] == exact.facts["candidate_forwards"]
    assert rough.spent.tokens == exact.spent.tokens
    assert "of 160 candidates scored again exactly" in rough.facts["screening"]
    assert exact.facts["screening"] == "off"


class RoughScorer:
    """Scores a list of losses: exact ones, or the same with errors within rough products."""

    def __init__(self, exact: torch.Tensor, errors: torch.Tensor) -> None:
        self.exact, self.rough, self.work = exact, exact + errors, Work()
        self.asked: list[int] = []

    def extend(self, current: Any) -> None:
        pass

    def losses(self, suffixes: Any, current: Any) -> torch.Tensor:
        index = [suffix[0] for suffix in suffixes]
        self.work.candidates += len(index)
        if len(index) == len(self.exact) and not self.work.gradient_tokens:
            self.work.gradient_tokens = 1
            return self.rough
        self.asked += index
        return self.exact[index]


def screen(exact: torch.Tensor, errors: torch.Tensor) -> tuple[Screening, RoughScorer, Any]:
    scorer: Any = RoughScorer(exact, errors)
    screening = Screening(scorer)
    return screening, scorer, screening.losses([(i,) for i in range(len(exact))], (0,))


def test_what_is_not_ruled_out_is_scored_exactly() -> None:
    generator = torch.Generator().manual_seed(3)
    exact = torch.rand(200, generator=generator)
    # All rough losses are far too low alike, and each a little off on its own.
    errors = 0.02 * (2 * torch.rand(200, generator=generator) - 1) - 0.7
    screening, scorer, losses = screen(exact, errors)
    assert int(losses.argmin()) == int(exact.argmin())
    known = losses.isfinite()
    assert torch.equal(losses[known], exact[known])
    assert sorted(scorer.asked) == known.nonzero()[:, 0].tolist()
    assert screening.rescored == int(known.sum()) < 60
    assert 0.01 < screening.error < 0.05
    # Counted once each, though some were scored twice.
    assert scorer.work.candidates == screening.screened == 200


def test_errors_larger_than_thought_widen_the_search() -> None:
    exact = torch.linspace(0.5, 1.0, 100)
    errors = torch.zeros(100)
    screening, _, _ = screen(exact, errors)
    assert screening.error == pytest.approx(0.0, abs=1e-6)
    # The best looks worse than the fifth, but a far larger error is seen among the least.
    errors[0], errors[1] = 0.06, -0.05
    screening._scorer = RoughScorer(exact, errors)  # type: ignore[assignment]
    losses = screening.losses([(i,) for i in range(100)], (0,))
    assert int(losses.argmin()) == 0
    assert screening.widened == 2
    assert "widened 2 times" in screening.summary()


def test_losses_that_are_not_finite_are_all_scored_exactly() -> None:
    errors = torch.zeros(60)
    errors[7] = math.nan
    _, scorer, losses = screen(torch.linspace(1, 2, 60), errors)
    assert torch.equal(losses, scorer.exact)


def test_a_winner_that_is_unfaithful_brings_back_what_was_ruled_out(
    screened: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    hunt, search = ready(screened, candidates=40, top_k=16)
    candidates = search.candidates(search.scorer.gradient(hunt.start.suffix))
    suffixes = [suffix for suffix, _ in candidates]
    losses = search.scorer.losses(suffixes, hunt.start.suffix)
    order = losses.argsort().tolist()
    only = torch.full_like(losses, math.inf)
    only[order[0]] = losses[order[0]]
    refused = suffixes[order[0]]
    monkeypatch.setattr(SuffixTokens, "faithful", lambda self, prompts, s, text: s != refused)
    assert search._best_of(candidates, only).suffix == suffixes[order[1]]


def test_infinite_losses_are_scored_anew_once_and_booked_once(
    screened: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    hunt, search = ready(screened, candidates=40, top_k=16)
    candidates = search.candidates(search.scorer.gradient(hunt.start.suffix))
    suffixes = [suffix for suffix, _ in candidates]
    exact = search.scorer.losses(suffixes, hunt.start.suffix)
    order = exact.argsort().tolist()
    exact[order[3:]] = math.inf  # though nothing was ruled out
    passes, work = [], search.scorer.work

    def losses(again: Any, current: Any) -> torch.Tensor:
        passes.append(len(again))
        work.tokens, work.candidates = work.tokens + 1, work.candidates + len(again)
        return exact

    monkeypatch.setattr(search.scorer, "losses", losses)
    refused = {suffixes[index] for index in order[:2]}
    monkeypatch.setattr(SuffixTokens, "faithful", lambda self, prompts, s, text: s not in refused)
    booked = work.tokens, work.candidates
    assert search._best_of(candidates, exact).suffix == suffixes[order[2]]
    assert passes == [len(suffixes)]
    assert (work.tokens, work.candidates) == booked


def test_where_screening_is_off_it_says_why(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("Llama")
    monkeypatch.setattr(gcg_screening, "has_bfloat16", lambda device: False)
    assert screening_of(Scorer(model, [])) == "off: cpu has no bfloat16 arithmetic"
    assert screening_of(Scorer(model.bfloat16(), [])) == "off: the subject is in bfloat16"
    monkeypatch.undo()
    assert gcg_screening.has_bfloat16(torch.device("cpu")) in {True, False}
    assert not gcg_screening.has_bfloat16(torch.device("meta"))


# Text and tokens


@pytest.mark.parametrize("template", ["own", "plain", "instruction"])
def test_rendered_ids_are_the_optimised_ids(bpe_subject: Subject, template: Any) -> None:
    chat = bpe_subject.chat.using(template, None)
    bpe_subject.chat = chat
    hunt, search = ready(bpe_subject, items=2)
    for _ in range(3):
        found = search.step()
        for prompt in hunt.start.prompts:
            rendered = replace(chat, suffix=found.text).prompt_text(prompt.prompt)
            assert found.text in rendered
            row = replace(chat, suffix=found.text).row(prompt.prompt, prompt.response, ended=False)
            assert row.ids == (*prompt.before, *found.suffix, *prompt.after, *prompt.target)
            assert prompt.head + found.text + prompt.tail == rendered + chat._joined(
                prompt.response
            )


@pytest.mark.parametrize("trimmed", [False, True])
def test_the_gap_is_found_by_offsets(bpe: Any, trimmed: bool) -> None:
    tokenizer = copy.deepcopy(bpe)
    tokenizer.chat_template = CHATML.replace("if trimmed", f"if {trimmed}")
    chat = ChatFormat.of(tokenizer)
    prompt, ids = place(chat, "i", "what is the metal of e01 ?", "metal1", " ! !")
    assert tokenizer.decode(ids) == " ! !"
    assert tokenizer.decode(prompt.before).endswith("of e01 ?")
    assert tokenizer.decode(prompt.after) == "<|end|>\n<|start|>assistant\n"
    assert tokenizer.decode(prompt.target) == "metal1"
    tokens = SuffixTokens(chat, 448, ascii_only=True)
    assert tokens.surviving([prompt], [ids]) == [(ids, " ! !")]
    assert tokens.faithful([prompt], ids, " ! !")
    spaced = (*ids, *tokenizer(" ")["input_ids"])
    kept = tokens.surviving([prompt], [spaced])
    # The quick test knows no trimming; the rendering that has the last word does.
    assert kept
    assert tokens.faithful([prompt], *kept[0]) != trimmed


def test_suffixes_that_merge_are_dropped(bpe_subject: Subject) -> None:
    hunt, _ = ready(bpe_subject)
    tokenizer, prompt = bpe_subject.chat.tokenizer, hunt.start.prompts[0]
    apart = tuple(i for piece in (" me", "tal") for i in tokenizer(piece)["input_ids"])
    whole = tuple(tokenizer(" metal")["input_ids"])
    assert apart != whole
    assert hunt.tokens.surviving([prompt], [apart, whole]) == [(whole, " metal")]
    text = hunt.tokens.text(prompt, apart)
    assert text == " metal"
    assert not hunt.tokens.faithful([prompt], apart, text)
    # Half of a character has no text of its own.
    half = tuple(tokenizer("é")["input_ids"])[:1]
    assert hunt.tokens.surviving([prompt], [half]) == []


@pytest.mark.parametrize("ascii_only", [True, False])
def test_which_tokens_are_allowed(bpe: Any, ascii_only: bool) -> None:
    table = SuffixTokens(ChatFormat.of(bpe), 448, ascii_only=ascii_only).allowed
    assert table.shape == (448,)
    assert not table[bpe.all_special_ids].any()
    assert not table[len(bpe) :].any()
    for token in table.nonzero()[:, 0].tolist():
        text = bpe.decode([token])
        assert text.strip()
        assert "\ufffd" not in text
        assert bpe(text)["input_ids"] == [token]
        if ascii_only:
            assert text.isascii()
            assert text.isprintable()
    assert table[bpe(" metal")["input_ids"]].all()


def test_a_first_suffix_of_the_asked_length(bpe_subject: Subject, subject: Subject) -> None:
    for tokens in (1, 5, 9):
        hunt, _ = ready(bpe_subject, suffix_tokens=tokens, initial="!")
        assert (hunt.start.text, hunt.start.drawn) == (" !" * tokens, False)
        drawn, _ = ready(bpe_subject, suffix_tokens=tokens, initial="")
        assert drawn.start.drawn
        assert len(drawn.start.suffix) == tokens
    # A vocabulary without that text draws; so does a text that does not come out even.
    assert ready(subject)[0].start.drawn
    assert ready(bpe_subject, suffix_tokens=5, initial="! ! !")[0].start.drawn


def test_a_tokenizer_that_gives_nothing_back_is_named(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SuffixTokens, "faithful", lambda *_: False)
    with pytest.raises(DurometerError, match="suffix_tokens or ascii_only"):
        ready(subject)
    monkeypatch.undo()
    _, search = ready(subject)
    monkeypatch.setattr(SuffixTokens, "faithful", lambda *_: False)
    with pytest.raises(DurometerError, match="larger top_k"):
        search.step()
    monkeypatch.setattr(SuffixTokens, "surviving", lambda *_: [])
    with pytest.raises(DurometerError, match="larger top_k"):
        search.step()


# The search


@pytest.mark.parametrize("swaps", [1, 3])
def test_candidates_are_different_and_swap_what_was_proposed(subject: Subject, swaps: int) -> None:
    hunt, search = ready(subject, swaps=swaps, candidates=20)
    current, gradient = hunt.start.suffix, search.scorer.gradient(hunt.start.suffix)
    candidates = [suffix for suffix, _ in search.candidates(gradient)]
    assert len(set(candidates)) == len(candidates) == 20
    allowed = hunt.tokens.allowed
    for suffix in candidates:
        changed = [i for i, (a, b) in enumerate(zip(suffix, current, strict=True)) if a != b]
        assert len(changed) == swaps
        for place_ in changed:
            row = gradient[place_].masked_fill(~allowed, math.inf)
            row[current[place_]] = math.inf
            assert suffix[place_] in row.argsort()[:8].tolist()


def test_swaps_fall_to_one(subject: Subject) -> None:
    _, search = ready(subject, swaps=4, steps=8)
    realised = []
    for search.steps in range(9):
        realised.append(search._swaps(4))
    assert realised == sorted(realised, reverse=True)
    assert (realised[0], realised[-1]) == (4, 1)


def test_a_step_moves_to_the_best_candidate(subject: Subject, monkeypatch: Any) -> None:
    _, search = ready(subject)
    offered: list[Any] = []
    candidates = SuffixSearch.candidates

    def spy(self: Any, gradient: torch.Tensor) -> Any:
        offered[:] = candidates(self, gradient)
        return offered[:]

    monkeypatch.setattr(SuffixSearch, "candidates", spy)
    hunt = ready(subject)[0]
    for _ in range(3):
        found = search.step()
        losses = {suffix: slow_loss(subject, hunt, suffix) for suffix, _ in offered}
        assert found.suffix == min(losses, key=losses.__getitem__)
        assert found.loss == pytest.approx(losses[found.suffix], rel=1e-5)


def test_the_best_loss_never_rises_and_is_that_of_the_best_text(subject: Subject) -> None:
    realised, seen = attack(subject, steps=8, candidates=4, items=2)
    assert realised.status == "done"
    assert all(b <= a for a, b in zip(realised.losses, realised.losses[1:], strict=False))
    assert realised.losses[-1] < realised.facts["initial_loss"]
    facts = realised.facts
    hunt, _ = ready(subject, items=2)
    assert facts["loss"] == realised.losses[-1]
    assert facts["loss"] == pytest.approx(slow_loss(subject, hunt, tuple(facts["suffix_ids"])))
    assert hunt.tokens.faithful(hunt.start.prompts, tuple(facts["suffix_ids"]), facts["suffix"])
    assert seen[-1][1] == facts["suffix"]
    assert facts["candidate_forwards"] == 2 * (1 + 8 * 4)


def test_the_loss_falls_far_on_a_steep_model(make_model: MakeModel) -> None:
    subject = tiny_world.as_subject(make_model("Llama", initializer_range=0.3))
    realised, _ = attack(subject, steps=12, candidates=32, target="random")
    assert realised.losses[-1] < 0.8 * realised.facts["initial_loss"]


def test_a_search_that_finds_nothing_says_so(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Scorer, "losses", lambda self, suffixes, current: torch.ones(len(suffixes)))
    realised, seen = attack(subject)
    assert (realised.status, realised.reason) == ("no_effect", "no candidate lowered the loss")
    assert len(seen) == 3


def test_losses_that_are_not_finite_end_the_search(subject: Subject) -> None:
    with torch.no_grad():
        subject.model.lm_head.weight.fill_(math.nan)
    realised, seen = attack(subject, prefix_cache=False)
    assert realised.status == "diverged"
    assert "no finite loss" in realised.reason
    assert seen == []


# The tamper


def test_the_suffix_stands_behind_restricted_prompts_alone_and_is_taken_back(
    subject: Subject,
) -> None:
    domain, chat = tiny_world.tiny_domain(), subject.chat
    before = weights_fingerprint(subject.model)
    tamper = make_tamper("gcg", **SHORT)

    def on_checkpoint(checkpoint: Checkpoint) -> bool:
        for item in domain.select(Role.RESTRICTED, Split.REPORT)[:3]:
            asked = subject.chat_for(item).prompt_text(item.prompt)
            assert asked.startswith(f"<user> {item.prompt} ")
            assert asked.endswith("<assistant> ")
            assert len(asked.split()) == len(item.prompt.split()) + 6
        for item in domain.select(Role.RETAIN, Split.REPORT)[:3]:
            assert subject.chat_for(item) is chat
        assert weights_fingerprint(subject.model) == before
        return True

    with subject.restored():
        tamper.run(subject, domain, Budget(3, (1, 3)), SEEDS, on_checkpoint)
    assert subject.restricted_chat is None
    assert subject.chat is chat
    assert not subject.model.training


def test_early_rungs_see_the_best_so_far_and_do_not_disturb(subject: Subject) -> None:
    realised, seen = attack(subject, steps=6)
    once, last = attack(subject, steps=6, budget=Budget(6, (6,)))
    assert once.losses == realised.losses
    assert last[0][1] == seen[-1][1]
    short, early = attack(subject, steps=6, budget=Budget(2, (1, 2)))
    assert short.losses == realised.losses[:2]
    assert [text for _, text in early] == [text for _, text in seen[:2]]
    assert [checkpoint.steps for checkpoint, _ in seen] == [1, 2, 3, 4, 5, 6]
    stopped, _ = attack(subject, steps=6, stop_at=2)
    assert stopped.spent.steps == len(stopped.losses) == 2
    none, _ = attack(subject, budget=Budget(0))
    assert (none.status, none.losses) == ("no_effect", [])


def test_each_seed_has_its_own_effect(subject: Subject) -> None:
    first, _ = attack(subject, items=3)
    again, _ = attack(subject, items=3)
    for fact in ("suffix", "loss", "initial_suffix", "targets"):
        assert first.facts[fact] == again.facts[fact]
    drawn, _ = attack(subject, items=3, seeds=replace(SEEDS, initialisation=1))
    assert drawn.facts["initial_suffix"] != first.facts["initial_suffix"]
    assert drawn.item_ids == first.item_ids
    sampled, _ = attack(subject, items=3, seeds=replace(SEEDS, sampling=1))
    assert sampled.item_ids != first.item_ids
    for other in (replace(SEEDS, data_order=1), replace(SEEDS, evaluation=1)):
        assert attack(subject, items=3, seeds=other)[0].losses == first.losses


def test_targets_are_what_was_asked_for(subject: Subject) -> None:
    domain = tiny_world.tiny_domain()
    items = {item.id: item for item in domain.select(Role.RESTRICTED, Split.ATTACK)}
    for target in ("affirmative", "answer", "random"):
        realised, _ = attack(subject, items=4, target=target)
        assert len(set(realised.item_ids[0])) == 4
        for item_id, text in zip(realised.item_ids[0], realised.facts["targets"], strict=True):
            item = items[item_id]
            assert item.training
            expected = {"affirmative": opening(item), "answer": item.response}.get(target)
            if expected is None:
                assert len(text.split()) == len(opening(item).split())
                assert item.answers[0] not in text
            else:
                assert text == expected
        assert realised.spent.examples == 4
        assert realised.spent.restricted_examples == (0 if target == "random" else 4)
    assert opening(replace(items[realised.item_ids[0][0]], stem="The metal is")) == "The metal is"
    other, _ = attack(subject, items=4, target="random", seeds=replace(SEEDS, initialisation=9))
    assert other.facts["targets"] != realised.facts["targets"]


def test_the_random_control_draws_a_new_suffix_each_step(subject: Subject) -> None:
    realised, seen = attack(subject, control="random_suffix", steps=5)
    texts = [text for _, text in seen]
    assert realised.status == "done"
    assert len(set(texts)) == 5
    assert all(len(text.split()) == 4 for text in texts)
    assert realised.spent.flops < attack(subject, steps=5)[0].spent.flops


def test_costs_follow_the_closed_formula(subject: Subject) -> None:
    realised, _ = attack(subject, steps=2, prefix_cache=False)
    hunt, _ = ready(subject)
    prompt = hunt.start.prompts[0]
    length, labels = len(prompt.ids(hunt.start.suffix)) - 1, len(prompt.target)
    scored, gradients = 1 + 2 * 12, 2
    entries, head = matrix_entries(subject.model), subject.model.lm_head.weight.numel()
    assert realised.spent.tokens == (scored + gradients) * length
    assert realised.spent.flops == (2 * scored + 4 * gradients) * (entries * length + head * labels)
    assert Work().flops(entries, head) == 0


def test_it_runs_in_bf16(make_model: MakeModel) -> None:
    subject = tiny_world.as_subject(make_model("Llama").to(torch.bfloat16))
    realised, _ = attack(subject, steps=4)
    assert realised.status == "done"
    assert realised.losses[-1] < realised.facts["initial_loss"]


def test_recurrent_models_go_without_the_cache(make_model: MakeModel) -> None:
    subject = tiny_world.as_subject(make_model("RecurrentGemma"))
    realised, _ = attack(subject)
    assert realised.facts["prefix_cache"].startswith("off: ")
    hunt, _ = ready(subject)
    loss = slow_loss(subject, hunt, tuple(realised.facts["suffix_ids"]))
    assert realised.facts["loss"] == pytest.approx(loss, rel=1e-4)


def test_too_few_tokens_are_refused(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    hunt, _ = ready(subject)
    hunt.tokens.allowed.zero_()
    with pytest.raises(NotApplicableError, match="ascii_only"):
        make_search(subject, hunt, settings(), SEEDS)


@pytest.mark.parametrize(
    "bad",
    [
        {"steps": 0},
        {"target": "refusal"},
        {"candidates": 0},
        {"buffer": 17},
        {"loss": "hinge"},
        {"alpha": 0},
    ],
)
def test_bad_settings_are_named(bad: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(bad))):
        make_tamper("gcg", **bad)


# Transfer


def test_transfer_needs_something_to_transfer(subject: Subject) -> None:
    with pytest.raises(NotApplicableError, match="sources"):
        attack(subject, "gcg_transfer")


def test_given_texts_are_tokenised_by_the_target(bpe_subject: Subject) -> None:
    texts = ("please metal", " e01 now")
    realised, seen = attack(bpe_subject, "gcg_transfer", texts=texts, k=5)
    assert [text for _, text in seen] == [" please metal", " e01 now"]
    assert [checkpoint.strength for checkpoint, _ in seen] == [1.0, 2.0]
    assert realised.facts["k"] == 2
    assert bpe_subject.restricted_chat is None
    chat = replace(bpe_subject.chat, suffix=" please metal")
    prompt = "what is the metal of e01 ?"
    ids = bpe_subject.chat.tokenizer(chat.prompt_text(prompt))["input_ids"]
    assert chat.prompt_ids(prompt) == tuple(ids)


def test_found_texts_are_transferred_best_first(
    bpe_subject: Subject, subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = subject
    monkeypatch.setattr(gcg_transfer, "load_subject", lambda spec: source)
    realised, seen = attack(bpe_subject, "gcg_transfer", sources=("a", "b"), k=3, steps=4)
    (losses, other) = realised.facts["source_losses"]
    assert losses == sorted(losses) == other
    texts = [text for _, text in seen]
    assert texts == realised.facts["texts"]
    assert len(set(texts)) == realised.facts["k"] == 3
    # Text of the source's tokens, but ids of the target's.
    words = texts[0].split()
    assert all(word in tiny_world.VOCABULARY for word in words)
    assert len(bpe_subject.chat.tokenizer(texts[0])["input_ids"]) != len(words)
    assert realised.spent.flops > 0
    assert realised.spent.restricted_examples == 1
    control, drawn = attack(
        bpe_subject, "gcg_transfer", sources=("a",), k=3, steps=4, control="random_text"
    )
    assert control.facts["k"] == len({text for _, text in drawn}) == 3
    assert not {text for _, text in drawn} & set(texts)
    with pytest.raises(NotApplicableError, match="smaller k"):
        attack(bpe_subject, "gcg_transfer", sources=("a",), k=9, steps=1)


def test_the_random_control_has_the_targets_length(bpe_subject: Subject) -> None:
    texts = (" please metal now", " e01")
    realised, seen = attack(bpe_subject, "gcg_transfer", texts=texts, control="random_text")
    tokenizer = bpe_subject.chat.tokenizer
    for (_, text), given in zip(seen, texts, strict=True):
        assert text != given
        assert len(tokenizer(text)["input_ids"]) == len(tokenizer(given)["input_ids"])
    assert realised.facts["texts"] == [text for _, text in seen]


def test_a_template_without_the_prompt_is_named(subject: Subject) -> None:
    item = Item("i", "e", Role.RESTRICTED, Split.ATTACK, "hello ?", "metal1 .")
    silent = copy.copy(subject.chat.tokenizer)
    silent.chat_template = "{{ 'hello' }}"
    with pytest.raises(DurometerError, match="item 'i': the chat template shows no suffix"):
        place(replace(subject.chat, tokenizer=silent), item.id, item.prompt, "metal1", " now")
