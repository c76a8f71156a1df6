"""Statistics: published and printed anchors, independent computations, properties, coverage."""

import dataclasses
import json
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import optimize, stats  # type: ignore[import-untyped, unused-ignore]

from durometer.core import statistics as durometer_statistics
from durometer.core.statistics import (
    Crossing,
    Interval,
    anytime_interval,
    break_probability,
    chance_corrected,
    clopper_pearson,
    crossed_bootstrap,
    durability_gain,
    expected_maximum_excess,
    first_crossing,
    mcnemar_exact,
    median_budget,
    newcombe_paired,
    paired_bootstrap,
    paired_difference,
    seed_level_change,
    seed_level_mean,
    seed_level_rate,
    wilson,
    zero_breaks_upper,
)

FloatArray = NDArray[np.float64]
examples = settings(max_examples=60, deadline=None, database=None)
counts = st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
levels = st.sampled_from([0.5, 0.8, 0.9, 0.95, 0.99])


def percent(interval: object) -> tuple[float, float]:
    """Bounds in per cent with one decimal, as the method pages print them."""
    low, high = getattr(interval, "low"), getattr(interval, "high")  # noqa: B009
    return round(100 * low, 1), round(100 * high, 1)


def names(count: int, each: int = 1) -> list[str]:
    return [f"entity{index // each}" for index in range(count * each)]


def crossings(budgets: Sequence[float], broken: Sequence[int], step: float = 2) -> list[Crossing]:
    """Breaks at the given budgets on a grid of ratio ``step``, or censored there."""
    return [
        Crossing(budget / step, budget) if event else Crossing(budget, None)
        for budget, event in zip(budgets, broken, strict=True)
    ]


# ---- one rate ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("successes", "n", "expected"),
    [
        # evaluation.md A.4.1
        (0, 50, (0.0, 7.1)),
        (0, 320, (0.0, 1.2)),
        (160, 320, (44.6, 55.4)),
        (500, 1000, (46.9, 53.1)),
        (0, 80, (0.0, 4.6)),
        # evaluation.md D.2
        (131, 320, (35.7, 46.4)),
        (301, 320, (90.9, 96.2)),
        (22, 320, (4.6, 10.2)),
        (155, 159, (93.7, 99.0)),
    ],
)
def test_wilson_anchors(successes: int, n: int, expected: tuple[float, float]) -> None:
    assert percent(wilson(successes, n)) == expected


@examples
@given(counts, levels)
def test_wilson_equals_scipy(count: tuple[int, int], level: float) -> None:
    reference = stats.binomtest(*count).proportion_ci(level, method="wilson")
    rate = wilson(*count, level)
    assert (rate.low, rate.high) == pytest.approx((reference.low, reference.high), abs=1e-12)
    assert 0 <= rate.low <= rate.rate <= rate.high <= 1


def test_wilson_is_exact_at_the_ends() -> None:
    for n in range(1, 200):
        assert wilson(0, n).low == 0
        assert wilson(n, n).high == 1


@examples
@given(counts, levels)
def test_clopper_pearson_tails(count: tuple[int, int], level: float) -> None:
    """At each bound the observed count or a more extreme one has probability (1-level)/2."""
    successes, n = count
    interval = clopper_pearson(successes, n, level)
    if successes:
        assert stats.binom.sf(successes - 1, n, interval.low) == pytest.approx((1 - level) / 2)
    else:
        assert interval.low == 0
    if successes < n:
        assert stats.binom.cdf(successes, n, interval.high) == pytest.approx((1 - level) / 2)
    else:
        assert interval.high == 1


@pytest.mark.parametrize(
    ("n", "bound"), [(5, 0.45), (11, 0.24), (22, 0.13), (29, 0.10), (59, 0.05)]
)
def test_zero_breaks_anchors(n: int, bound: float) -> None:
    """The table of evaluation.md A.4.5."""
    upper = zero_breaks_upper(n)
    assert round(upper, 2) == bound
    assert (1 - upper) ** n == pytest.approx(0.05)


def test_break_probability_is_two_sided() -> None:
    rate = break_probability(0, 5)
    assert (rate.rate, rate.low, round(rate.high, 2)) == (0, 0, 0.52)
    assert rate.high == pytest.approx(1 - 0.025**0.2) != pytest.approx(zero_breaks_upper(5))
    assert (rate.n, rate.method) == (5, "Clopper-Pearson, two-sided")
    # R: binom.test(7, 20)$conf.int
    seven = break_probability(7, 20)
    assert (seven.low, seven.high) == pytest.approx((0.1539092, 0.5921885), abs=1e-6)


@pytest.mark.parametrize(
    ("successes", "n", "expected"),
    [(0, 5, (0, 59)), (0, 11, (0, 35)), (0, 29, (0, 17)), (160, 320, (40.3, 59.7))],
)
def test_anytime_anchors(successes: int, n: int, expected: tuple[float, float]) -> None:
    """The numbers of evaluation.md A.4.6."""
    digits = 0 if successes == 0 else 1
    interval = anytime_interval(successes, n)
    bounds = round(100 * interval.low, digits), round(100 * interval.high, digits)
    assert bounds == expected


@examples
@given(counts, levels)
def test_anytime_bounds_solve_the_mixture(count: tuple[int, int], level: float) -> None:
    """The likelihood ratio, written with gamma functions, is 1/alpha at each inner bound."""
    successes, n = count
    interval = anytime_interval(successes, n, level)
    log_mixture = (
        math.lgamma(successes + 0.5) + math.lgamma(n - successes + 0.5) - math.lgamma(n + 1)
    ) - math.log(math.pi)
    for bound, inner in ((interval.low, successes > 0), (interval.high, successes < n)):
        if inner:
            likelihood = stats.binom.logpmf(successes, n, bound)
            likelihood -= math.lgamma(n + 1) - math.lgamma(successes + 1)
            likelihood += math.lgamma(n - successes + 1)
            assert log_mixture - likelihood == pytest.approx(-math.log1p(-level), abs=1e-4)
    wider = clopper_pearson(successes, n, level)
    assert interval.low <= successes / n <= interval.high
    assert interval.high - interval.low > 0.9 * (wider.high - wider.low)


def test_anytime_survives_peeking_where_wilson_does_not() -> None:
    generator = np.random.default_rng(7)
    horizon, rate, runs = 150, 0.3, 200
    sums = (generator.random((runs, horizon)) < rate).cumsum(axis=1)

    def ever_missed(low: FloatArray, high: FloatArray) -> float:
        steps = np.arange(horizon)
        missed = (low[steps, sums] > rate) | (high[steps, sums] < rate)
        return float(missed.any(axis=1).mean())

    def table(method: object) -> tuple[FloatArray, FloatArray]:
        bounds = np.zeros((2, horizon, horizon + 1))
        for n, k in {(i + 1, int(row[i])) for row in sums for i in range(horizon)}:
            interval = method(k, n)  # type: ignore[operator]
            bounds[:, n - 1, k] = interval.low, interval.high
        return bounds[0], bounds[1]

    assert ever_missed(*table(anytime_interval)) <= 0.05
    assert ever_missed(*table(wilson)) > 0.15


def test_anytime_before_the_first_trial() -> None:
    assert anytime_interval(0, 0) == Interval(0, 1)


def test_anytime_is_symmetric_far_out() -> None:
    many = 10**6
    low, high = anytime_interval(1, many), anytime_interval(many - 1, many)
    assert low.low < 1e-10
    assert (1 - high.high, 1 - high.low) == pytest.approx((low.low, low.high), abs=1e-11)


@examples
@given(counts)
def test_rate_intervals_widen_with_level_and_move_with_count(count: tuple[int, int]) -> None:
    successes, n = count
    for method in (wilson, clopper_pearson, anytime_interval):
        narrow, wide = method(successes, n, 0.8), method(successes, n, 0.95)
        assert wide.low <= narrow.low + 1e-12
        assert narrow.high <= wide.high + 1e-12
        assert 0 <= wide.low < wide.high <= 1
        if successes < n:
            more = method(successes + 1, n, 0.95)
            assert more.low > wide.low
            assert more.high >= wide.high


@pytest.mark.parametrize("method", [wilson, clopper_pearson, break_probability])
@pytest.mark.parametrize("arguments", [(0, 0), (-1, 5), (6, 5), (1, 5, 0.0), (1, 5, 1.0)])
def test_rates_refuse_what_is_not_a_rate(method: object, arguments: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"trial|level"):
        method(*arguments)  # type: ignore[operator]


def test_other_rates_refuse_too() -> None:
    for arguments in ((-1, 5), (1, 0), (6, 5), (1, 5, 1.5)):
        with pytest.raises(ValueError, match=r"trial|level"):
            anytime_interval(*arguments)
    with pytest.raises(ValueError, match="at least one trial"):
        zero_breaks_upper(0)
    with pytest.raises(ValueError, match="level"):
        zero_breaks_upper(5, 1.0)


def test_results_are_json() -> None:
    record = json.loads(json.dumps(dataclasses.asdict(wilson(1, 4))))
    assert set(record) == {"rate", "low", "high", "n", "method"}
    values = np.eye(4)
    difference = paired_difference(values[0], values[1], names(4))
    for result in (
        seed_level_rate(values, names(4)),
        difference,
        median_budget(crossings([4, 8], [1, 0])),
        durability_gain([Crossing(2, 4)], [Crossing(0, 1)]),
        crossed_bootstrap(values, names(4)),
    ):
        json.dumps(dataclasses.asdict(result), allow_nan=False)


# ---- several seeds -------------------------------------------------------------------------


def test_seed_level_without_any_success_keeps_wilson_width() -> None:
    """evaluation.md A.4.3: 0 of 80 entities is 0-4.6 %, not 0-0."""
    rate = seed_level_rate(np.zeros((3, 160)), names(80, each=2))
    assert percent(rate) == (0.0, 4.6)
    assert (rate.rate, rate.n) == (0, 80)
    assert rate.method == "seed-level t, hull with Wilson at n = entities"


def test_one_seed_is_wilson_at_entities_and_says_so() -> None:
    values = np.zeros((1, 160))
    values[0, :40] = 1
    rate, reference = seed_level_rate(values, names(80, each=2)), wilson(20, 80)
    assert (rate.low, rate.high, rate.n) == (reference.low, reference.high, 80)
    assert rate.method == "wilson, this checkpoint only"


def test_seed_term_is_a_t_interval() -> None:
    """Seed means .3, .4, .5 without spread over items; t(.975, 2) = 4.30265."""
    values = np.array([[0.3], [0.4], [0.5]]) * np.ones((3, 400))
    rate = seed_level_rate(values, names(400))
    half = 4.30265 * 0.1 / math.sqrt(3)
    assert (rate.low, rate.high) == pytest.approx((0.4 - half, 0.4 + half), abs=1e-5)


def test_prompt_term_is_clustered() -> None:
    """Ten entities, all items of one alike: SE² = .25/9, whatever the number of items."""
    values = np.tile(np.repeat([0.0, 1.0], 5 * 6), (3, 1))
    rate = seed_level_rate(values, names(10, each=6))
    half = 1.959964 * math.sqrt(0.25 / 9)
    assert (rate.low, rate.high) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-6)
    apart = seed_level_rate(values, names(60))
    assert apart.high - apart.low < 0.5 * (rate.high - rate.low)


def test_both_terms_add_in_quadrature_and_are_clipped() -> None:
    prompts = np.repeat([0.0, 0.2], 20)
    values = prompts + np.array([[0.0], [0.1], [0.2]])
    rate = seed_level_rate(values, names(40))
    half = math.hypot(4.30265 * 0.1 / math.sqrt(3), 1.959964 * math.sqrt(0.01 / 39))
    assert rate.rate == pytest.approx(0.2)
    assert rate.high == pytest.approx(0.2 + half, abs=1e-5)
    assert rate.low == 0
    assert seed_level_rate(1 - values, names(40)).high == 1


def test_unequal_entities_weigh_by_their_items() -> None:
    """The rate is count / n; the error is the ratio estimator's, computed here by hand."""
    values = np.array([[1.0, 1, 1, 0, 0, 0]] * 2)
    labels = ["a", "a", "a", "b", "b", "c"]
    residuals = np.array([1.5, -1.0, -0.5])
    half = 1.959964 * math.sqrt(3 / 2 * (residuals**2).sum()) / 6
    rate = seed_level_rate(values, labels)
    assert rate.rate == 0.5
    assert half > 0.5
    assert (rate.low, rate.high) == (0, 1)
    error, clusters = durometer_statistics._prompt_error(values, labels)
    assert error == pytest.approx(half / 1.959964)
    assert clusters == 3


@examples
@given(st.integers(1, 5), st.integers(1, 12), st.integers(1, 3), st.integers(0, 2**20), levels)
def test_seed_level_properties(seeds: int, n: int, each: int, seed: int, level: float) -> None:
    generator = np.random.default_rng(seed)
    values = (generator.random((seeds, n * each)) < generator.random()).astype(float)
    labels = names(n, each)
    rate = seed_level_rate(values, labels, level)
    assert 0 <= rate.low <= rate.rate <= rate.high <= 1
    assert rate.n == n
    order = generator.permutation(n * each)
    moved = seed_level_rate(values[::-1, order], [labels[index] for index in order], level)
    assert (moved.low, moved.high) == pytest.approx((rate.low, rate.high))
    flipped = seed_level_rate(1 - values, labels, level)
    assert (1 - flipped.high, 1 - flipped.low) == pytest.approx((rate.low, rate.high))
    doubled = seed_level_rate(
        np.repeat(values, 2, axis=1), [x for x in labels for _ in "12"], level
    )
    assert (doubled.low, doubled.high) == pytest.approx((rate.low, rate.high))


def test_seed_level_coverage() -> None:
    """Nominal 95 % with crossed logit effects: the seed-level interval covers, Wilson does not."""
    generator = np.random.default_rng(11)
    seeds, entities, each, runs = 5, 60, 2, 300
    seed_spread, entity_spread = 1.0, 1.5
    grid = generator.normal(0, math.hypot(seed_spread, entity_spread), 200_000)
    truth = float((1 / (1 + np.exp(0.5 - grid))).mean())
    labels, covered, prompts_only = names(entities, each), 0, 0
    for _ in range(runs):
        entity = np.repeat(generator.normal(0, entity_spread, entities), each)
        logits = generator.normal(0, seed_spread, (seeds, 1)) + entity - 0.5
        values = (generator.random(logits.shape) < 1 / (1 + np.exp(-logits))).astype(float)
        rate, single = seed_level_rate(values, labels), wilson(int(values[0].sum()), 120)
        covered += rate.low <= truth <= rate.high
        prompts_only += single.low <= truth <= single.high
    assert 0.93 <= covered / runs <= 0.995
    assert prompts_only / runs < 0.7


@pytest.mark.parametrize(
    ("values", "labels", "message"),
    [
        (np.zeros((0, 3)), names(3), "not empty"),
        (np.zeros(3), names(3), "2-dimensional"),
        (np.zeros((2, 3)), names(2), "3 items but 2 entity labels"),
        (np.full((2, 3), 1.5), names(3), r"\[0, 1\]"),
        (np.full((2, 3), np.nan), names(3), "not finite"),
    ],
)
def test_seed_level_refuses(values: FloatArray, labels: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        seed_level_rate(values, labels)


def test_crossed_bootstrap_has_the_variance_of_both_factors() -> None:
    """For an additive table the bootstrap variance is var(seed)/S + var(entity)/C, exactly."""
    generator = np.random.default_rng(3)
    seed_effect, entity_effect = generator.normal(0, 1, (12, 1)), generator.normal(0, 2, 50)
    values = np.repeat(seed_effect + entity_effect, 3, axis=1)
    interval = crossed_bootstrap(values, names(50, each=3), resamples=8000)
    half = 1.959964 * math.sqrt(seed_effect.var() / 12 + entity_effect.var() / 50)
    assert (interval.high - interval.low) / 2 == pytest.approx(half, rel=0.06)
    assert (interval.high + interval.low) / 2 == pytest.approx(values.mean(), abs=0.1 * half)


def test_bootstrap_of_a_constant_is_that_constant() -> None:
    labels = ["a", "a", "b", "c"]
    for interval in (
        crossed_bootstrap(np.full((3, 4), 0.7), labels),
        paired_bootstrap(np.full(4, 0.7), labels),
    ):
        assert (interval.low, interval.high) == pytest.approx((0.7, 0.7))


def test_bootstraps_repeat_with_their_seed_and_cluster() -> None:
    generator = np.random.default_rng(5)
    values = generator.random((4, 30))
    for method, data in ((crossed_bootstrap, values), (paired_bootstrap, values[0])):
        first = method(data, names(30), seed=1)
        assert first == method(data, names(30), seed=1)
        assert first != method(data, names(30), seed=2)
        doubled = method(np.repeat(data, 2, axis=-1), names(30, each=2), seed=1)
        assert (doubled.low, doubled.high) == pytest.approx((first.low, first.high))
        wide = method(data, names(30), level=0.99, seed=1)
        assert wide.low < first.low < first.high < wide.high


@pytest.mark.parametrize(
    ("values", "labels", "resamples", "message"),
    [
        (np.zeros((1, 3)), names(3), 10, "two seeds"),
        (np.zeros((2, 3)), ["a"] * 3, 10, "two clusters"),
        (np.zeros((2, 3)), names(3), 0, "one resample"),
        (np.zeros((2, 3)), names(4), 10, "entity labels"),
        (np.full((2, 3), np.inf), names(3), 10, "not finite"),
    ],
)
def test_crossed_bootstrap_refuses(
    values: FloatArray, labels: list[str], resamples: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        crossed_bootstrap(values, labels, resamples=resamples)


# ---- paired differences --------------------------------------------------------------------

# Newcombe (1998), Statistics in Medicine 17:2635, Table III, method 10, cells (e, f, g, h): both,
# gained, lost, neither. The paper rounds z to 1.96.
NEWCOMBE_TABLE_III = [
    ((36, 12, 2, 0), (0.0569, 0.3404)),
    ((20, 12, 2, 16), (0.0562, 0.3292)),
    ((18, 12, 2, 18), (0.0562, 0.3290)),
    ((36, 14, 0, 0), (0.1528, 0.4167)),
    ((35, 14, 0, 1), (0.1461, 0.4175)),
    ((18, 14, 0, 18), (0.1441, 0.3963)),
    ((2, 97, 1, 0), (0.8721, 0.9854)),
    ((1, 97, 1, 1), (0.8736, 0.9850)),
    ((0, 29, 1, 0), (0.6666, 0.9882)),
    ((2, 98, 0, 0), (0.9178, 0.9945)),
    ((1, 98, 0, 1), (0.9171, 0.9916)),
    ((0, 30, 0, 0), (0.8395, 1.0)),
    ((54, 0, 0, 0), (-0.0664, 0.0664)),
    ((53, 0, 0, 1), (-0.0729, 0.0729)),
    ((30, 0, 0, 24), (-0.0358, 0.0358)),
    ((27, 0, 0, 27), (-0.0351, 0.0351)),
]


@pytest.mark.parametrize(("cells", "expected"), NEWCOMBE_TABLE_III)
def test_newcombe_published(cells: tuple[int, ...], expected: tuple[float, float]) -> None:
    both, gained, lost, neither = cells
    difference = newcombe_paired(gained, lost, both, neither)
    assert (difference.low, difference.high) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("gained", "lost", "both", "neither", "points", "p_value"),
    [
        # evaluation.md D.2, paired with base
        (179, 9, 122, 10, (53.1, 46.7, 58.8), 4e-42),
        (132, 1, 23, 3, (82.4, 74.8, 87.4), 2e-38),
        (39, 5, 30, 7, (42.0, 27.7, 53.9), 1e-7),
        (8, 3, 69, 0, (6.2, -2.3, 15.3), 0.23),
        (0, 109, 22, 189, (-34.1, -39.3, -28.8), 3e-33),
    ],
)
def test_newcombe_and_mcnemar_in_the_override_study(
    gained: int, lost: int, both: int, neither: int, points: tuple[float, ...], p_value: float
) -> None:
    result = newcombe_paired(gained, lost, both, neither)
    printed = tuple(round(100 * value, 1) for value in (result.value, result.low, result.high))
    assert printed == points
    assert float(f"{result.p_value:.{0 if p_value < 0.1 else 1}e}") == pytest.approx(p_value)


def score_bounds(successes: int, n: int) -> tuple[float, float]:
    """Wilson's bounds by root finding, apart from any formula."""

    def distance(p: float) -> float:
        return (successes / n - p) ** 2 - 1.9599639845**2 * p * (1 - p) / n

    rate = successes / n
    low = optimize.brentq(distance, 1e-12, rate) if successes else 0.0
    high = optimize.brentq(distance, rate, 1 - 1e-12) if successes < n else 1.0
    return float(low), float(high)


def test_newcombe_by_brute_computation() -> None:
    """Item by item: Wilson's bounds by root finding, the correlation from the 0/1 data."""
    gained, lost, both, neither = 9, 6, 14, 11
    after = np.repeat([1.0, 0, 1, 0], [gained, lost, both, neither])
    before = np.repeat([0.0, 1, 1, 0], [gained, lost, both, neither])
    n = after.size
    # ad - bc = 100 exceeds n/2 = 20, which the correction takes off.
    phi = np.corrcoef(after, before)[0, 1] * (100 - 20) / 100
    low_after, high_after = score_bounds(int(after.sum()), n)
    low_before, high_before = score_bounds(int(before.sum()), n)
    a, b = after.mean() - low_after, high_before - before.mean()
    c, d = high_after - after.mean(), before.mean() - low_before
    value = after.mean() - before.mean()
    result = newcombe_paired(gained, lost, both, neither)
    assert result.value == pytest.approx(value)
    assert result.low == pytest.approx(value - math.sqrt(a * a - 2 * phi * a * b + b * b), abs=1e-9)
    assert result.high == pytest.approx(
        value + math.sqrt(c * c - 2 * phi * c * d + d * d), abs=1e-9
    )


cells = st.tuples(*[st.integers(0, 60)] * 4)


@examples
@given(cells, levels)
def test_newcombe_properties(table: tuple[int, int, int, int], level: float) -> None:
    assume(sum(table) > 0)
    gained, lost, both, neither = table
    result = newcombe_paired(gained, lost, both, neither, level)
    assert -1 <= result.low <= result.value <= result.high <= 1
    mirrored = newcombe_paired(lost, gained, both, neither, level)
    assert (-mirrored.high, -mirrored.low) == pytest.approx((result.low, result.high), abs=1e-12)
    swapped = newcombe_paired(lost, gained, neither, both, level)
    assert (-swapped.high, -swapped.low) == pytest.approx((result.low, result.high), abs=1e-9)


@examples
@given(st.integers(0, 80), st.integers(0, 80))
def test_mcnemar_is_a_sign_test(gained: int, lost: int) -> None:
    p_value = mcnemar_exact(gained, lost)
    total = gained + lost
    expected = stats.binomtest(gained, total).pvalue if total else 1.0
    assert p_value == pytest.approx(expected)
    assert 0 < p_value <= 1


def test_paired_difference_of_single_items_is_newcombe() -> None:
    generator = np.random.default_rng(2)
    before, after = (generator.random((2, 70)) < 0.4).astype(float)
    result = paired_difference(before, after, names(70))
    gained, lost = int((after > before).sum()), int((after < before).sum())
    both = int((after * before).sum())
    assert result == newcombe_paired(gained, lost, both, 70 - gained - lost - both)
    assert result.value == pytest.approx(after.mean() - before.mean())
    assert result.value > 0 or result.lost >= result.gained


def test_paired_difference_clusters_interval_and_test() -> None:
    """Four alike items an entity say no more than one."""
    before, after = np.repeat([[0.0] * 6 + [1] * 4, [1.0] * 9 + [0]], 4, axis=1)
    result, single = (
        paired_difference(before, after, names(10, each=4)),
        newcombe_paired(6, 1, 3, 0),
    )
    assert (result.low, result.high) == pytest.approx((single.low, single.high))
    assert result.p_value == single.p_value == 0.125
    assert (result.gained, result.lost, result.n, result.entities) == (24, 4, 40, 10)
    assert result.value == pytest.approx((result.gained - result.lost) / result.n)
    apart = paired_difference(before, after, names(40))
    assert apart.p_value < 0.001
    assert apart.high - apart.low < result.high - result.low


def test_entities_that_gain_and_lose_alike_count_for_neither_side() -> None:
    before, after = np.array([0.0, 1, 0, 0]), np.array([1.0, 0, 1, 1])
    assert paired_difference(before, after, ["a", "a", "b", "c"]).p_value == 0.5


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (np.zeros(3), np.zeros(4), "3 items before but 4 after"),
        (np.zeros(3), np.full(3, 0.5), "0 or 1"),
        (np.zeros((1, 3)), np.zeros(3), "1-dimensional"),
        (np.zeros(3), np.full(3, np.nan), "not finite"),
    ],
)
def test_paired_difference_refuses(before: FloatArray, after: FloatArray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paired_difference(before, after, names(3))


def test_counts_are_checked() -> None:
    with pytest.raises(ValueError, match="paired counts"):
        newcombe_paired(0, 0, 0, 0)
    with pytest.raises(ValueError, match="paired counts"):
        newcombe_paired(-1, 1, 1, 1)
    with pytest.raises(ValueError, match="negative"):
        mcnemar_exact(-1, 2)


def test_paired_bootstrap_approaches_the_normal_interval() -> None:
    differences = np.random.default_rng(4).normal(0.1, 0.5, 400)
    interval = paired_bootstrap(differences, names(400), resamples=6000)
    half = 1.959964 * differences.std() / 20
    centre = differences.mean()
    assert interval.low == pytest.approx(centre - half, abs=0.06 * half)
    assert interval.high == pytest.approx(centre + half, abs=0.06 * half)


def test_paired_bootstrap_clusters() -> None:
    """Alike items of one entity widen the interval by the root of their number."""
    differences = np.repeat(np.random.default_rng(6).normal(0, 1, 60), 4)
    clustered = paired_bootstrap(differences, names(60, each=4))
    apart = paired_bootstrap(differences, names(240))
    ratio = (clustered.high - clustered.low) / (apart.high - apart.low)
    assert ratio == pytest.approx(2, rel=0.15)
    with pytest.raises(ValueError, match="two clusters"):
        paired_bootstrap(differences, ["one"] * 240)
    with pytest.raises(ValueError, match="1-dimensional"):
        paired_bootstrap(np.zeros((2, 3)), names(3))


def test_chance_corrected() -> None:
    right, chance = np.array([[1.0, 0, 1], [0, 1, 0]]), np.array([0.25, 0.25, 0.0])
    expected = np.array([[1, -1 / 3, 1], [-1 / 3, 1, 0]])
    np.testing.assert_allclose(chance_corrected(right, chance), expected)
    guesses = np.array([1.0, 0, 0, 0])
    assert chance_corrected(guesses, np.full(4, 0.25)).mean() == pytest.approx(0)
    for level in (1.0, -0.1, np.nan):
        with pytest.raises(ValueError, match="chance level"):
            chance_corrected(right, np.full(3, level))


# ---- budget-to-break -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.1, 0.5, 0.2], Crossing(2, 4)),
        ([0.0, 0.1, 0.3, 0.2], Crossing(2, 4)),
        ([0.9, 0.1, 0.3, 0.2], Crossing(0, 1)),
        ([0.0, 0.1, 0.2, 0.29], Crossing(8, None)),
        ([0.0, 0.1, 0.2, 0.3], Crossing(4, 8)),
    ],
)
def test_first_crossing(values: list[float], expected: Crossing) -> None:
    assert first_crossing([1, 2, 4, 8], values, 0.3) == expected


def test_crossing_at_budget_zero_is_no_attack() -> None:
    assert first_crossing([0, 1, 2], [0.5, 0.6, 0.7], 0.3) == Crossing(0, 0)
    assert first_crossing([0, 1, 2], [0.1, 0.6, 0.7], 0.3) == Crossing(0, 1)
    assert not Crossing(0, 1).censored
    assert Crossing(8, None).censored


@pytest.mark.parametrize(
    ("budgets", "values", "threshold"),
    [
        ([], [], 0.3),
        ([1, 2], [0.1], 0.3),
        ([2, 1], [0.1, 0.2], 0.3),
        ([1, 1], [0.1, 0.2], 0.3),
        ([-1, 1], [0.1, 0.2], 0.3),
        ([1, 2], [0.1, math.nan], 0.3),
        ([1, 2], [0.1, 0.2], math.nan),
    ],
)
def test_first_crossing_refuses(
    budgets: list[float], values: list[float], threshold: float
) -> None:
    with pytest.raises(ValueError, match=r"budgets|values"):
        first_crossing(budgets, values, threshold)


@pytest.mark.parametrize(
    "bounds", [(-1, 2), (3, 2), (0, math.inf), (math.inf, None), (math.nan, 2)]
)
def test_crossing_refuses(bounds: tuple[float, float | None]) -> None:
    with pytest.raises(ValueError, match="not a crossing"):
        Crossing(*bounds)


curves = st.lists(st.floats(0, 1), min_size=1, max_size=12)


@examples
@given(curves, st.floats(0, 1), st.floats(0, 1))
def test_first_crossing_properties(values: list[float], one: float, other: float) -> None:
    budgets = [2.0**index for index in range(len(values))]
    easy, hard = (first_crossing(budgets, values, tau) for tau in sorted([one, other]))
    assert easy.low <= hard.low
    running = np.maximum.accumulate(values)
    assert all(
        (easy.high is not None and budget >= easy.high) == (value >= min(one, other))
        for budget, value in zip(budgets, running, strict=True)
    )


def test_median_of_few_seeds_is_the_range() -> None:
    result = median_budget(crossings([16, 8, 32, 64, 16, 32], [1] * 6))
    assert (result.median, result.low, result.high) == (16, 8, 64)
    assert (result.censored, result.n, result.largest_tried) == (0, 6, None)
    assert result.kind == "median, [min, max] over seeds"
    assert round(result.coverage, 2) == 0.97
    assert round(median_budget(crossings([8] * 5, [1] * 5)).coverage, 2) == 0.94


def test_censored_seeds_are_infinite_above() -> None:
    half = median_budget(crossings([16, 32, 64, 64], [1, 1, 0, 0]))
    assert (half.median, half.low, half.high, half.censored) == (32, 16, None, 2)
    most = median_budget(crossings([16, 64, 64], [1, 0, 0]))
    assert (most.median, most.low, most.high, most.largest_tried) == (None, 16, None, 64)


def test_seeds_that_ended_early_do_not_overstate() -> None:
    """A run that diverged at 4 survived 4, no more; most seeds must have survived a bound."""
    one = median_budget(crossings([4, 32, 32], [0, 1, 1]))
    assert (one.median, one.low, one.high) == (32, 4, None)
    most = median_budget(crossings([4, 4, 64], [0, 0, 0]))
    assert (most.median, most.largest_tried) == (None, 4)


def test_range_covers_as_it_says() -> None:
    generator = np.random.default_rng(9)
    hits = 0
    for budgets in np.exp(generator.normal(0, 1, (1500, 6))):
        result = median_budget(crossings(budgets.tolist(), [1] * 6, step=1.001))
        assert result.high is not None
        hits += result.low <= 1 <= result.high
    assert hits / 1500 == pytest.approx(result.coverage, abs=0.015)


# Medians and log-log intervals computed once with statsmodels 0.15.0 (SurvfuncRight.quantile and
# quantile_ci with method "cloglog") and lifelines 0.30.3 (median_survival_times), which agree.
SIX_MP = (  # remission weeks of 21 patients on 6-MP, Freireich (1963)
    [6, 6, 6, 6, 7, 9, 10, 10, 11, 13, 16, 17, 19, 20, 22, 23, 25, 32, 32, 34, 35],
    [1, 1, 1, 0, 1, 0, 1, 0, 0, 1, 1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0],
)
PLACEBO = ([1, 1, 2, 2, 3, 4, 4, 5, 5, 8, 8, 8, 8, 11, 11, 12, 12, 15, 17, 22, 23], [1] * 21)
MIXED = (
    [
        3,
        5,
        5,
        5,
        7,
        8,
        8,
        9,
        12,
        12,
        13,
        15,
        15,
        15,
        18,
        20,
        20,
        21,
        24,
        25,
        25,
        27,
        30,
        30,
        31,
        34,
        40,
        40,
        44,
        50,
    ],
    [1, 1, 0, 1, 1, 0, 1, 1, 1, 1, 0, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 0, 1, 0, 1, 1, 0, 1, 0, 0],
)


@pytest.mark.parametrize(
    ("sample", "level", "expected"),
    [
        (SIX_MP, 0.95, (23, 13, None)),
        (PLACEBO, 0.95, (8, 4, 11)),
        (MIXED, 0.95, (24, 15, 31)),
        (MIXED, 0.80, (24, 18, 30)),
    ],
)
def test_kaplan_meier_reference(
    sample: tuple[list[float], list[int]], level: float, expected: tuple[float | None, ...]
) -> None:
    result = median_budget(crossings(*sample), level)
    assert (result.median, result.low, result.high) == expected
    assert result.censored == sample[1].count(0)
    assert (result.kind, result.coverage) == ("Kaplan-Meier median, log-log interval", level)


def test_kaplan_meier_curve_and_bands_reference() -> None:
    """The 6-MP curve of statsmodels 0.15.0 and the bands of lifelines 0.30.3 at its events."""
    lows, highs = durometer_statistics._bounds(crossings(*SIX_MP))
    times, *curves = durometer_statistics._survival_bands(lows, highs, 0.95)
    events = np.isin(times, [6, 7, 10, 13, 16, 22, 23])
    expected = [
        [0.857143, 0.806723, 0.752941, 0.690196, 0.627451, 0.537815, 0.448179],
        [0.619718, 0.563147, 0.503200, 0.431610, 0.367511, 0.267779, 0.188052],
        [0.951552, 0.922809, 0.889362, 0.849066, 0.804912, 0.746791, 0.680143],
    ]
    np.testing.assert_allclose(np.array(curves)[:, events], expected, atol=1e-6)


def test_kaplan_meier_starts_at_fifteen_seeds() -> None:
    sample = [Crossing(32, 64)] * 15
    assert median_budget(sample[1:]).kind.startswith("median, [min, max]")
    assert median_budget(sample).kind.startswith("Kaplan-Meier")


def test_kaplan_meier_limits() -> None:
    survived = median_budget([Crossing(64, None)] * 15)
    assert (survived.median, survived.low, survived.high) == (None, 64, None)
    assert (survived.largest_tried, survived.censored) == (64, 15)
    one = median_budget([Crossing(64, None)] * 19 + [Crossing(0, 1)])
    assert (one.median, one.low, one.high, one.largest_tried) == (None, 64, None, 64)
    together = median_budget([Crossing(32, 64)] * 15)
    assert (together.median, together.low, together.high) == (64, 64, 64)
    # At exactly one half the lower middle value is taken, as for few seeds.
    half = median_budget([Crossing(32, 64), Crossing(64, None)] * 8)
    assert (half.median, half.high) == (64, None)


seed_crossings = st.lists(
    st.tuples(st.sampled_from([1.0, 2.0, 4.0, 8.0, 16.0]), st.integers(0, 3)),
    min_size=1,
    max_size=24,
).map(lambda seeds: crossings([b for b, _ in seeds], [int(e > 0) for _, e in seeds]))


@examples
@given(seed_crossings, st.randoms(use_true_random=False))
def test_median_budget_properties(sample: list[Crossing], random: object) -> None:
    result = median_budget(sample)
    assert result.censored == sum(crossing.censored for crossing in sample)
    assert (result.median is None) == (result.largest_tried is not None)
    if result.median is not None:
        assert result.low <= result.median <= (result.high or math.inf)
        assert result.median in {crossing.high for crossing in sample}
    shuffled = sample[:]
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert median_budget(shuffled) == result
    harder = [Crossing(c.low * 2, c.high and c.high * 2) for c in sample]
    doubled = median_budget(harder)
    assert doubled.median == (result.median and result.median * 2)
    assert doubled.low == result.low * 2


# ---- durability gain -----------------------------------------------------------------------


def test_gain_of_one_seed_is_interval_arithmetic() -> None:
    gain = durability_gain([Crossing(40, 64)], [Crossing(5, 8)])
    assert (gain.value, gain.low, gain.high) == (8, 40 / 8, 64 / 5)
    assert (gain.censored, gain.seeds, gain.reason) == (False, 1, "")


def test_gain_of_few_seeds_spans_the_ratios() -> None:
    """Up to six seeds the percentiles are the extreme seeds, as the range of one median is."""
    for seeds in (3, 4, 5, 6):
        subject = [Crossing(2.0**index, 2.0**index) for index in range(4, 4 + seeds)]
        gain = durability_gain(subject, [Crossing(2, 2)] * seeds)
        assert (gain.low, gain.high) == (8, 2.0 ** (2 + seeds))
        assert gain.value == 2.0 ** (3 + (seeds - 1) // 2)


def test_gain_compares_both_middle_seeds_of_an_even_number() -> None:
    steady, varied = [Crossing(16, 16)] * 2, [Crossing(2, 2), Crossing(8, 8)]
    harder, easier = durability_gain(steady, varied), durability_gain(varied, steady)
    assert (harder.value, harder.low, harder.high) == (8, 2, 8)
    assert (easier.value, easier.low, easier.high) == (1 / 8, 1 / 8, 1 / 2)
    assert durability_gain(steady, varied, level=0.02).low == 2


def test_gain_is_never_narrower_than_its_grid() -> None:
    """At a level of 2 % the percentiles alone would be; the grid's own bounds remain."""
    subject, reference = crossings([1, 8, 16, 1], [1] * 4), crossings([1, 8, 4, 8, 16], [1] * 5)
    assert durability_gain(subject, reference, 0.02, paired=False).low == 0.5 / 8
    subject, reference = crossings([8, 2, 4], [1] * 3), crossings([1, 4, 16], [1] * 3)
    assert durability_gain(subject, reference, 0.02).high == 4 / 2


def test_gain_bounds_are_not_interpolated_between_draws() -> None:
    subject, reference = [Crossing(b, b) for b in (1, 4, 64)], [Crossing(1, 1)] * 3
    bounds = {durability_gain(subject, reference, resamples=2, seed=s).high for s in range(20)}
    assert bounds == {4, 64}


def test_pairing_by_seed_removes_what_the_arms_share() -> None:
    luck = [4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0]
    reference = [Crossing(b, b) for b in luck]
    subject = [Crossing(b * 4, b * 4) for b in luck]
    paired = durability_gain(subject, reference)
    loose = durability_gain(subject, reference, paired=False)
    assert paired.value == loose.value == 4
    assert (paired.low, paired.high) == (4, 4)
    assert loose.high is not None
    assert loose.low < 1
    assert loose.high > 16


def test_unbroken_subject_gives_a_lower_bound_only() -> None:
    gain = durability_gain([Crossing(64, None)] * 3, crossings([8, 8, 16], [1] * 3))
    assert (gain.value, gain.low, gain.high, gain.censored) == (None, 4, None, True)
    assert "lower bound only" in gain.reason
    some = durability_gain(crossings([64] * 6, [1] * 4 + [0] * 2), crossings([8] * 6, [1] * 6))
    assert (some.value, some.high, some.censored) == (8, None, False)
    assert "some seeds of the subject" in some.reason


def test_reference_broken_at_once_gives_no_upper_bound() -> None:
    gain = durability_gain(crossings([16] * 3, [1] * 3), [Crossing(0, 1)] * 3)
    assert (gain.value, gain.low, gain.high) == (16, 8, None)
    assert "finer grid" in gain.reason


def test_unbroken_reference_gives_no_value() -> None:
    gain = durability_gain([Crossing(32, 64)] * 2, [Crossing(8, None)] * 2)
    assert (gain.value, gain.low, gain.high, gain.censored) == (None, 0, 8, False)
    assert "reference was not broken" in gain.reason
    both = durability_gain([Crossing(64, None)] * 2, [Crossing(8, None)] * 2)
    assert (both.value, both.low, both.high, both.censored) == (None, 0, None, True)


def test_gain_repeats_with_its_seed_and_widens_with_level() -> None:
    generator = np.random.default_rng(8)
    arms = [crossings(np.exp(generator.normal(m, 1, 20)).tolist(), [1] * 20) for m in (3, 1)]
    first = durability_gain(arms[0], arms[1], seed=1)
    assert first == durability_gain(arms[0], arms[1], seed=1)
    wide, narrow = (durability_gain(arms[0], arms[1], level) for level in (0.99, 0.5))
    assert wide.low < narrow.low
    assert wide.high is not None
    assert narrow.high is not None
    assert narrow.high < wide.high
    half = durability_gain(arms[0][:18], arms[1][:18])
    assert half.seeds == 18


@examples
@given(seed_crossings, seed_crossings, st.sampled_from([0.02, 0.5, 0.95]))
def test_gain_properties(subject: list[Crossing], reference: list[Crossing], level: float) -> None:
    gain = durability_gain(subject, reference, level, resamples=50, paired=False)
    high = math.inf if gain.high is None else gain.high
    assert 0 <= gain.low <= high
    assert gain.censored == (median_budget(subject).median is None)
    if gain.value is not None:
        assert gain.low <= gain.value <= high
    assert bool(gain.reason) == (gain.value is None or gain.high is None)
    # A bound is a ratio of budgets that were tried, never a value interpolated between two.
    lows = {s.low / r.high for s in subject for r in reference if r.high}
    highs = {s.high / r.low for s in subject for r in reference if s.high}
    assert gain.low in lows | {0.0}
    assert gain.high in highs | {None}


def test_gain_refuses() -> None:
    one, two = [Crossing(4, 8)], [Crossing(4, 8)] * 2
    with pytest.raises(ValueError, match="cannot pair 2 seeds with 1"):
        durability_gain(two, one)
    for arms in ((one, [Crossing(0, 0)]), ([Crossing(0, 0)], one)):
        with pytest.raises(ValueError, match="nothing to break"):
            durability_gain(*arms)
    with pytest.raises(ValueError, match="one seed"):
        durability_gain([], one)
    with pytest.raises(ValueError, match="resample"):
        durability_gain(one, one, resamples=0)
    with pytest.raises(ValueError, match="level"):
        durability_gain(one, one, level=95)
    with pytest.raises(ValueError, match="level"):
        median_budget(one, level=0)


# ---- the worst of many ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "excess"), [(5, 1.16), (10, 1.54), (20, 1.87), (40, 2.16), (50, 2.25), (100, 2.51)]
)
def test_expected_maximum_anchors(k: int, excess: float) -> None:
    """The table of evaluation.md A.5."""
    assert round(expected_maximum_excess(k), 2) == excess


def test_expected_maximum_closed_forms() -> None:
    assert expected_maximum_excess(1) == pytest.approx(0, abs=1e-9)
    assert expected_maximum_excess(2) == pytest.approx(1 / math.sqrt(math.pi))
    assert expected_maximum_excess(3) == pytest.approx(1.5 / math.sqrt(math.pi))
    # Blom's approximation is good to a hundredth for large k.
    blom = stats.norm.ppf((10**6 - math.pi / 8) / (10**6 - math.pi / 4 + 1))
    assert expected_maximum_excess(10**6) == pytest.approx(blom, abs=0.02)
    with pytest.raises(ValueError, match="at least one"):
        expected_maximum_excess(0)


# ---- seed-level means and changes ----------------------------------------------------------


def test_a_seed_level_mean_has_the_width_of_the_formula() -> None:
    values = np.random.default_rng(3).normal(2.0, 1.0, (4, 30)) + np.arange(4)[:, None] * 0.3
    entities = [f"e{n}" for n in range(30)]
    found = seed_level_mean(values, entities)
    seed_error = values.mean(axis=1).std(ddof=1) / 2
    item_error = values.mean(axis=0).std(ddof=1) / math.sqrt(30)
    half = math.hypot(stats.t.ppf(0.975, 3) * seed_error, stats.norm.ppf(0.975) * item_error)
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half))
    assert (found.entities, found.seeds) == (30, 4)
    alone = seed_level_mean(values[:1], entities)
    assert "only" in alone.method
    assert alone.high - alone.value == pytest.approx(
        stats.norm.ppf(0.975) * values[0].std(ddof=1) / math.sqrt(30)
    )


def test_paraphrases_of_an_entity_do_not_narrow_a_seed_level_mean() -> None:
    once = np.random.default_rng(4).normal(size=(3, 20))
    entities = [f"e{n}" for n in range(20)]
    found = seed_level_mean(once, entities)
    again = seed_level_mean(np.repeat(once, 3, axis=1), [e for e in entities for _ in range(3)])
    assert again == found or (again.low, again.high) == pytest.approx((found.low, found.high))


def test_equal_values_have_a_width_where_they_are_bounded() -> None:
    zeros, entities = np.zeros((3, 40)), [f"e{n}" for n in range(40)]
    assert seed_level_mean(zeros, entities).high == 0.0
    found = seed_level_mean(zeros, entities, bound=2.0)
    most = wilson(0, 40).high
    assert (found.low, found.high) == pytest.approx((-2 * most, 2 * most))
    with pytest.raises(ValueError, match="bound"):
        seed_level_mean(zeros + 3, entities, bound=2.0)


def test_the_change_of_one_seed_is_the_paired_interval_joined_with_that_over_items() -> None:
    """Counts of arXiv 2409.19476: 179 gained, 9 lost of 320; +53.1 points (46.7 to 58.8)."""
    gained, lost, both = 179, 9, 122
    before = np.array([[0.0] * gained + [1.0] * (lost + both) + [0.0] * 10])
    after = np.array([[1.0] * gained + [0.0] * lost + [1.0] * both + [0.0] * 10])
    entities = [f"p{n}" for n in range(320)]
    found = seed_level_change(before, after, entities)
    paired = newcombe_paired(gained, lost, both, 10)
    assert found.value == pytest.approx(0.53125)
    assert found.low <= paired.low == pytest.approx(0.467, abs=5e-4)
    assert found.high >= paired.high == pytest.approx(0.588, abs=5e-4)
    assert found.high - found.low < paired.high - paired.low + 0.01


def test_seeds_that_disagree_widen_a_change() -> None:
    before, entities = np.zeros((1, 60)), [f"e{n}" for n in range(60)]
    same, apart = np.zeros((3, 60)), np.zeros((3, 60))
    same[:, :30] = 1.0
    apart[0, :10], apart[1, :30], apart[2, :50] = 1.0, 1.0, 1.0
    narrow, wide = (seed_level_change(before, after, entities) for after in (same, apart))
    assert narrow.value == wide.value == pytest.approx(0.5)
    assert narrow.high - narrow.low < 0.3
    assert wide.high - wide.low > 1.0


def test_a_change_without_any_difference_is_not_sure_of_it() -> None:
    zeros, entities = np.zeros((3, 80)), [f"e{n}" for n in range(80)]
    found = seed_level_change(zeros, zeros, entities)
    assert (found.low, found.high) == pytest.approx((-wilson(0, 80).high, wilson(0, 80).high))


@pytest.mark.parametrize(
    ("before", "after", "why"),
    [
        (np.zeros((2, 5)), np.zeros((3, 5)), "fit"),
        (np.zeros((1, 4)), np.zeros((3, 5)), "fit"),
        (np.full((1, 5), 0.5), np.zeros((3, 5)), "0 or 1"),
    ],
)
def test_a_change_of_what_does_not_fit_is_refused(
    before: FloatArray, after: FloatArray, why: str
) -> None:
    with pytest.raises(ValueError, match=why):
        seed_level_change(before, after, [f"e{n}" for n in range(after.shape[1])])
