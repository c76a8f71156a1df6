"""How sure answers are: formulas against transformers' own losses, and the traps one by one."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from durometer.core.forward import Forward
from durometer.core.generation import Generated, generate
from durometer.core.rows import Row
from durometer.measures.uncertainty import (
    RELEASED,
    Convention,
    Uncertainty,
    answer_row,
    pooled,
    spread,
    token_uncertainty,
    uncertainties,
)

PROMPT = (5, 6, 7)
ANSWERS = ((11, 12, 13, 4), (20, 4), (30,), (40, 41, 42, 43, 44, 45, 4))


def rows() -> list[Row]:
    return [Row((*PROMPT, *answer), len(PROMPT)) for answer in ANSWERS]


def by_hand(model: Any, row: Row) -> dict[str, float]:
    """Recompute one answer in float64 from the model's own logits, position by position."""
    logits = model(input_ids=torch.tensor([row.ids])).logits[0].detach().double().numpy()
    nats, entropy, probability = 0.0, 0.0, 0.0
    for place in range(row.first_label, len(row.ids)):
        scores = logits[place - 1] - logits[place - 1].max()
        p = np.exp(scores) / np.exp(scores).sum()
        ten = np.sort(p)[-10:]
        ten = ten / ten.sum()
        nats -= math.log(p[row.ids[place]])
        entropy -= float((ten * np.log(ten)).sum())
        probability += float(p[row.ids[place]])
    tokens = len(row.labels)
    return {
        "perplexity": math.exp(nats / tokens),
        "entropy": entropy / tokens,
        "probability": probability / tokens,
    }


@pytest.mark.parametrize("tree", [True, False])
def test_perplexity_is_the_exponential_of_transformers_own_loss(
    tiny_llama: Any, padded: Callable[[Sequence[Row]], dict[str, torch.Tensor]], tree: bool
) -> None:
    found = uncertainties(Forward(tiny_llama, tree=tree), rows())
    for row, (sure,) in zip(rows(), found, strict=True):
        with torch.no_grad():
            loss = float(tiny_llama(**padded([row])).loss)
        assert sure is not None
        assert sure.tokens == len(row.labels)
        assert sure.perplexity == pytest.approx(math.exp(loss), rel=1e-5)


def test_all_three_agree_with_a_computation_by_hand(tiny_llama: Any) -> None:
    for row, (sure,) in zip(
        rows(), uncertainties(Forward(tiny_llama, tree=True), rows()), strict=True
    ):
        assert sure is not None
        for name, value in by_hand(tiny_llama, row).items():
            assert getattr(sure, name) == pytest.approx(value, rel=1e-5), name


def test_pooling_is_transformers_loss_over_the_whole_batch(
    tiny_llama: Any, padded: Callable[[Sequence[Row]], dict[str, torch.Tensor]]
) -> None:
    found = [one for (one,) in uncertainties(Forward(tiny_llama, tree=True), rows()) if one]
    whole = pooled(found)
    with torch.no_grad():
        loss = float(tiny_llama(**padded(rows())).loss)
    assert whole is not None
    assert whole.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
    # The mean of single answers is another number: long answers do not count for more in it.
    single = spread([one.perplexity for one in found])
    assert single is not None
    assert single.mean != pytest.approx(whole.perplexity, rel=1e-3)
    assert pooled([]) is None


def logits_of(*probabilities: Sequence[float]) -> torch.Tensor:
    return torch.log(torch.tensor(np.array(probabilities), dtype=torch.float32))


LIKELY = (0.7, 0.2, 0.1)
UNLIKELY = (0.05, 0.9, 0.05)


def test_the_emitted_token_counts_not_the_likeliest() -> None:
    logits, emitted = logits_of(LIKELY, UNLIKELY), torch.tensor([1, 0])
    plain = token_uncertainty(logits, emitted)
    other = token_uncertainty(logits, emitted, Convention(tokens="top_1"))
    assert plain is not None
    assert other is not None
    assert plain.probability == pytest.approx((0.2 + 0.05) / 2)
    assert other.probability == pytest.approx((0.7 + 0.9) / 2)
    assert plain.perplexity == pytest.approx((0.2 * 0.05) ** -0.5)


def test_the_last_token_counts() -> None:
    logits, emitted = logits_of(LIKELY, UNLIKELY), torch.tensor([0, 0])
    plain = token_uncertainty(logits, emitted)
    short = token_uncertainty(logits, emitted, Convention(last="dropped"))
    assert plain is not None
    assert short is not None
    assert (plain.tokens, short.tokens) == (2, 1)
    assert short.perplexity == pytest.approx(1 / 0.7)
    assert plain.perplexity == pytest.approx((0.7 * 0.05) ** -0.5)
    assert token_uncertainty(logits[:1], emitted[:1], RELEASED) is None


def test_the_ten_likeliest_are_renormalised() -> None:
    p = np.array([0.3, *[0.05] * 14])
    plain = token_uncertainty(logits_of(p), torch.tensor([0]))
    bare = token_uncertainty(logits_of(p), torch.tensor([0]), Convention(renormalised=False))
    ten = p[:10] / p[:10].sum()
    assert plain is not None
    assert bare is not None
    assert plain.entropy == pytest.approx(-(ten * np.log(ten)).sum(), rel=1e-5)
    assert bare.entropy == pytest.approx(-(p[:10] * np.log(p[:10])).sum(), rel=1e-5)
    assert bare.entropy != pytest.approx(plain.entropy, rel=0.05)


def test_a_token_that_cannot_be_is_no_not_a_number() -> None:
    logits = torch.tensor([[0.0, -math.inf, -math.inf]])
    sure = token_uncertainty(logits, torch.tensor([0]))
    never = token_uncertainty(logits, torch.tensor([1]))
    assert sure is not None
    assert never is not None
    assert (sure.perplexity, sure.entropy, sure.probability) == (1.0, 0.0, 1.0)
    assert math.isinf(never.perplexity)


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=50))
def test_deviation_and_standard_error_are_two_numbers(values: list[float]) -> None:
    found = spread(values)
    assert found is not None
    assert found.deviation is not None
    assert found.standard_error is not None
    assert found.deviation == pytest.approx(float(np.std(values, ddof=1)), rel=1e-6, abs=1e-6)
    assert found.standard_error * math.sqrt(len(values)) == pytest.approx(found.deviation)


def test_what_was_printed_as_deviation_is_a_standard_error() -> None:
    """The released code prints the population's deviation over the root of n as 'deviation'."""
    values = [1.0, 1.2, 1.4, 3.0, 1.1]
    found = spread(values)
    printed = float(np.std(values)) / math.sqrt(len(values))
    assert found is not None
    assert found.standard_error == pytest.approx(printed * math.sqrt(5 / 4))
    assert found.deviation is not None
    assert found.deviation > 2 * printed


def test_a_single_value_has_no_deviation_and_none_has_nothing() -> None:
    one = spread([2.0])
    assert one is not None
    assert (one.mean, one.deviation, one.standard_error) == (2.0, None, None)
    assert spread([math.inf, math.nan]) is None


def test_an_answer_is_scored_with_the_token_that_ended_it(tiny_llama: Any) -> None:
    def answer(prompt: tuple[int, ...], tokens: int, *stop: int) -> Generated:
        return generate(tiny_llama, [prompt], max_tokens=tokens, stop_ids=frozenset(stop))[0]

    free = {(n, 6, 7): answer((n, 6, 7), 2) for n in range(5, 60)}
    prompt, (first, second) = next((p, a.ids) for p, a in free.items() if a.ids[0] != a.ids[1])
    ended, cut = answer(prompt, 6, second), answer(prompt, 1, second)
    assert (ended.ids, ended.end) == ([first], second)
    assert (cut.ids, cut.end) == ([first], None)
    row = answer_row(prompt, ended)
    assert row is not None
    assert row.labels == (first, second)
    ((sure,),) = uncertainties(Forward(tiny_llama, tree=True), [row])
    assert sure is not None
    assert sure.log_probability == pytest.approx(ended.log_probability, abs=1e-4)
    assert answer_row(prompt, Generated()) is None


def test_a_perplexity_that_no_float_holds_is_infinite() -> None:
    assert math.isinf(Uncertainty(1, -1e6, 0.0, 0.0).perplexity)
