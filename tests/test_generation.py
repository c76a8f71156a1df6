"""Greedy generation against transformers' own, token for token, and its probabilities."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from durometer.core import generation
from durometer.core.generation import Generated, generate

MakeModel = Callable[..., Any]
NO_STOP: frozenset[int] = frozenset()
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8}
# A window shorter than prompts and responses, so that what lies behind it must be left out.
ARCHITECTURES: list[tuple[str, dict[str, Any]]] = [
    ("Llama", {}),
    ("Qwen2", {}),
    ("Qwen3", {"head_dim": 8}),
    ("Mistral", {"sliding_window": 6}),
    ("Gemma2", {**GEMMA, "sliding_window": 6}),
    ("Gemma3", {"head_dim": 8, "sliding_window": 6}),
    ("Olmo2", {}),
    ("Phi3", {}),
    ("GPTNeoX", {}),
]


def prompts(count: int, *, shared: int = 0, seed: int = 0) -> list[tuple[int, ...]]:
    """Prompts of 1 to 12 tokens behind a common beginning, in no order of length."""
    generator = torch.Generator().manual_seed(seed)

    def draw(size: int) -> tuple[int, ...]:
        return tuple(torch.randint(5, 101, (size,), generator=generator).tolist())

    head = draw(shared)
    return [head + draw(1 + (5 * number + 3) % 12) for number in range(count)]


def theirs(
    model: Any, prompt: tuple[int, ...], max_tokens: int, stop: frozenset[int] = NO_STOP
) -> list[int]:
    """Return what transformers generates for one prompt, without the token that ends it."""
    ids = torch.tensor([prompt])
    found = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_tokens,
        do_sample=False,
        eos_token_id=sorted(stop) or None,
        pad_token_id=0,
    )[0, len(prompt) :].tolist()
    return found[:-1] if found and found[-1] in stop else found


def padded_theirs(model: Any, batch: Sequence[tuple[int, ...]], max_tokens: int) -> list[list[int]]:
    """Return what transformers generates for a left-padded batch."""
    length = max(map(len, batch))
    ids = torch.tensor([[0] * (length - len(p)) + list(p) for p in batch])
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in batch])
    found = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return [row.tolist() for row in found[:, length:]]


def ids_of(results: Sequence[Generated]) -> list[list[int]]:
    return [result.ids for result in results]


@pytest.mark.parametrize(("architecture", "changes"), ARCHITECTURES)
@pytest.mark.parametrize("shared", [0, 5])
def test_tokens_are_those_of_transformers(
    make_model: MakeModel, architecture: str, changes: dict[str, Any], shared: int
) -> None:
    model, asked = make_model(architecture, eos_token_id=None, **changes), prompts(7, shared=shared)
    expected = [theirs(model, prompt, 9) for prompt in asked]
    windowed = "sliding_window" in changes
    for batch in (3, 64):
        for share in (False,) if windowed else (False, True):
            found = generate(
                model, asked, max_tokens=9, stop_ids=NO_STOP, share_prefix=share, batch=batch
            )
            assert ids_of(found) == expected
            assert {result.finish_reason for result in found} == {"length"}
    if not windowed:
        assert padded_theirs(model, asked, 9) == expected


@pytest.mark.parametrize(("architecture", "changes"), ARCHITECTURES)
def test_stop_tokens_end_a_row_and_only_that_row(
    make_model: MakeModel, architecture: str, changes: dict[str, Any]
) -> None:
    model, asked = make_model(architecture, eos_token_id=None, **changes), prompts(8, shared=3)
    free = [theirs(model, prompt, 10) for prompt in asked]
    # Tokens that really come up, at different places of different rows.
    stop = frozenset({free[0][4], free[3][0], free[5][7]})
    found = generate(
        model, asked, max_tokens=10, stop_ids=stop, share_prefix="sliding_window" not in changes
    )
    assert "stop" in {result.finish_reason for result in found}
    for result, whole in zip(found, free, strict=True):
        place = next((n for n, token in enumerate(whole) if token in stop), len(whole))
        assert result.ids == whole[:place]
        assert result.finish_reason == ("stop" if place < len(whole) else "length")
    assert ids_of(found) == [theirs(model, prompt, 10, stop) for prompt in asked]


@pytest.mark.parametrize("shared", [0, 4])
def test_one_prompt_alone(tiny_llama: Any, shared: int) -> None:
    for prompt in prompts(3, shared=shared):
        (found,) = generate(tiny_llama, [prompt], max_tokens=6, stop_ids=NO_STOP)
        assert found.ids == theirs(tiny_llama, prompt, 6)


def test_nothing_asked_nothing_answered(tiny_llama: Any) -> None:
    assert generate(tiny_llama, [], max_tokens=5, stop_ids=NO_STOP) == []


def test_equal_prompts_and_prompts_that_begin_others(tiny_llama: Any) -> None:
    """The shared beginning must leave a token of every prompt; a prompt may be another's head."""
    asked = [(7, 8, 9), (7, 8, 9), (7, 8), (7,), (7, 8, 9, 10, 11), (7, 8, 9)]
    for some in (asked, asked[:2], [asked[3]] * 2):
        found = generate(tiny_llama, some, max_tokens=5, stop_ids=NO_STOP)
        assert ids_of(found) == [theirs(tiny_llama, prompt, 5) for prompt in some]


@pytest.mark.parametrize("limit", [1, 2, 7])
def test_no_response_is_longer_than_asked_for(tiny_llama: Any, limit: int) -> None:
    asked = prompts(5)
    found = generate(tiny_llama, asked, max_tokens=limit, stop_ids=NO_STOP)
    assert ids_of(found) == [theirs(tiny_llama, prompt, limit) for prompt in asked]
    assert {len(result.ids) for result in found} == {limit}


@pytest.mark.parametrize("batch", [3, 64])
def test_rows_that_are_decided_are_exact_prefixes(tiny_llama: Any, batch: int) -> None:
    asked = prompts(9, shared=4)
    free = generate(tiny_llama, asked, max_tokens=12, stop_ids=NO_STOP, batch=batch)
    lengths = {number: 1 + (3 * number) % 11 for number in range(0, 9, 2)}
    calls = list[tuple[int, int]]()

    def decided(index: int, ids: Sequence[int]) -> bool:
        assert list(ids) == free[index].ids[: len(ids)], "asked with another row's tokens"
        calls.append((index, len(ids)))
        return len(ids) == lengths.get(index)

    found = generate(
        tiny_llama, asked, max_tokens=12, stop_ids=NO_STOP, decided=decided, batch=batch
    )
    for index, (result, whole) in enumerate(zip(found, free, strict=True)):
        length = lengths.get(index, 12)
        assert result.ids == whole.ids[:length]
        assert result.finish_reason == ("decided" if index in lengths else "length")
        # Asked after every token of a row, once, and never after its end.
        assert [size for i, size in calls if i == index] == list(range(1, length + 1))


def test_a_stop_token_is_not_shown_to_decided(tiny_llama: Any) -> None:
    asked = prompts(4)
    free = generate(tiny_llama, asked, max_tokens=6, stop_ids=NO_STOP)
    stop = frozenset({free[1].ids[0]})
    seen = list[int]()

    def decided(index: int, ids: Sequence[int]) -> bool:
        seen.extend(ids)
        return False

    found = generate(tiny_llama, asked, max_tokens=6, stop_ids=stop, decided=decided)
    (end,) = stop
    assert found[1] == Generated([], "stop", found[1].log_probability, 0.0, 0.0, end)
    assert not stop & set(seen)


@torch.no_grad()
def slow(model: Any, prompt: tuple[int, ...], ids: Sequence[int]) -> tuple[float, float, float]:
    """Return log-probability, mean probability and mean entropy, recomputed."""
    total, chosen, entropies = 0.0, [], []
    for place, token in enumerate(ids):
        whole = torch.tensor([[*prompt, *ids[:place]]])
        logits = model(input_ids=whole, use_cache=False).logits[0, -1].double()
        probabilities = logits.softmax(-1)
        total += math.log(probabilities[token])
        chosen.append(float(probabilities[token]))
        ten = probabilities.sort(descending=True).values[:10]
        ten = ten / ten.sum()
        entropies.append(float(-(ten * ten.log()).sum()))
    return total, sum(chosen) / len(chosen), sum(entropies) / len(entropies)


@pytest.mark.parametrize(
    ("architecture", "changes"), [case for case in ARCHITECTURES if case[0] in ("Llama", "Gemma2")]
)
def test_probabilities_equal_a_slow_recomputation(
    make_model: MakeModel, architecture: str, changes: dict[str, Any]
) -> None:
    model, asked = make_model(architecture, eos_token_id=None, **changes), prompts(6, shared=3)
    free = [theirs(model, prompt, 7) for prompt in asked]
    stop = frozenset({free[2][3]})
    share = "sliding_window" not in changes
    found = generate(model, asked, max_tokens=7, stop_ids=stop, share_prefix=share, batch=4)
    for prompt, result, whole in zip(asked, found, free, strict=True):
        ended = result.finish_reason == "stop"
        # The token that ended the response is part of its probability, but of nothing else.
        spoken = whole[: len(result.ids) + ended]
        total, _, _ = slow(model, prompt, spoken)
        assert result.log_probability == pytest.approx(total, abs=1e-4)
        if result.ids:
            _, probability, entropy = slow(model, prompt, result.ids)
            assert result.mean_probability == pytest.approx(probability, abs=1e-5)
            assert result.top_entropy == pytest.approx(entropy, abs=1e-4)


def test_the_batch_has_no_say(tiny_llama: Any) -> None:
    asked = prompts(11, shared=2, seed=3)
    alone = [generate(tiny_llama, [p], max_tokens=6, stop_ids=NO_STOP)[0] for p in asked]
    for batch in (1, 2, 5, 64):
        together = generate(tiny_llama, asked, max_tokens=6, stop_ids=NO_STOP, batch=batch)
        assert ids_of(together) == ids_of(alone)
        for one, other in zip(together, alone, strict=True):
            assert one.log_probability == pytest.approx(other.log_probability, abs=1e-4)


def test_finished_rows_cost_nothing(tiny_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row leaves the batch as soon as it has ended; the shared beginning is run once."""
    shapes = list[tuple[int, int]]()
    forward = tiny_llama.forward

    def spy(*args: Any, **options: Any) -> Any:
        shapes.append(tuple(options["input_ids"].shape))
        return forward(*args, **options)

    monkeypatch.setattr(tiny_llama, "forward", spy)
    asked = [(5, 6, 7, 8, 20 + number) for number in range(4)]

    def decided(index: int, ids: Sequence[int]) -> bool:
        return len(ids) > index

    generate(tiny_llama, asked, max_tokens=9, stop_ids=NO_STOP, decided=decided)
    assert shapes == [(1, 4), (4, 1), (3, 1), (2, 1), (1, 1)]


def test_weights_that_are_not_numbers_are_told_and_end(tiny_llama: Any) -> None:
    tiny_llama.lm_head.weight.data.fill_(float("nan"))
    for result in generate(tiny_llama, prompts(3), max_tokens=4, stop_ids=NO_STOP):
        assert math.isnan(result.log_probability)
        assert len(result.ids) <= 4


def test_a_small_vocabulary_has_fewer_than_ten_likeliest(make_model: MakeModel) -> None:
    model = make_model("Llama", vocab_size=6, eos_token_id=None, pad_token_id=None)
    (found,) = generate(model, [(1, 2, 3)], max_tokens=4, stop_ids=NO_STOP)
    assert 0 < found.top_entropy <= math.log(6)
    assert generation.TOP == 10
