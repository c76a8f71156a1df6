"""Intervals, tests and budget summaries; every figure in a report comes from here.

All functions are pure: arrays in, frozen dataclasses out, and bootstraps draw from a generator
made from their ``seed`` argument. Rates and differences are fractions, never percentage points;
budgets carry the unit of the axis they were counted on (examples, steps, tokens, FLOPs).
Arguments that cannot be used raise ``ValueError``.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import (  # type: ignore[import-untyped, unused-ignore]
    integrate,
    optimize,
    special,
    stats,
)

__all__ = [
    "Agreement",
    "Change",
    "Crossing",
    "Difference",
    "Gain",
    "Interval",
    "MedianBudget",
    "Rate",
    "anytime_interval",
    "break_probability",
    "chance_corrected",
    "clopper_pearson",
    "cohen_kappa",
    "crossed_bootstrap",
    "durability_gain",
    "expected_maximum_excess",
    "first_crossing",
    "mcnemar_exact",
    "median_budget",
    "newcombe_paired",
    "newcombe_unpaired",
    "paired_bootstrap",
    "paired_difference",
    "prediction_powered",
    "rogan_gladen",
    "seed_level_change",
    "seed_level_mean",
    "seed_level_rate",
    "wilson",
    "zero_breaks_upper",
]

FloatArray = NDArray[np.float64]

KAPLAN_MEIER_FROM = 15
"""Seeds from which a median budget is a Kaplan-Meier estimate with a log-log interval."""


@dataclass(frozen=True)
class Interval:
    """A closed interval ``[low, high]``."""

    low: float
    high: float


@dataclass(frozen=True)
class Rate:
    """A rate in [0, 1] with its interval.

    ``n`` is the number that the interval rests on (items, entity clusters or seeds) and
    ``method`` names the interval as it is printed.
    """

    rate: float
    low: float
    high: float
    n: int
    method: str


@dataclass(frozen=True)
class Difference:
    """A paired difference, after minus before, in [-1, 1].

    ``gained`` and ``lost`` count items, so ``value == (gained - lost) / n``; ``entities`` is the
    number of clusters that the interval and the test rest on.
    """

    value: float
    low: float
    high: float
    gained: int
    lost: int
    n: int
    entities: int
    p_value: float


@dataclass(frozen=True)
class Change:
    """A mean or a mean change over seeds and items, in the unit of the measure.

    ``entities`` and ``seeds`` are what the interval rests on; ``method`` names it as it is printed.
    """

    value: float
    low: float
    high: float
    entities: int
    seeds: int
    method: str


@dataclass(frozen=True)
class Agreement:
    """Chance-corrected agreement of two raters on the same items.

    Attributes:
        kappa: Cohen's kappa, at most 1; None where both gave one and the same label throughout.
        low, high: percentile interval, entities drawn as clusters; None where most draws leave
            kappa undefined, or with fewer than two entities.
        observed: share of items with the same label.
        expected: the same for raters with these shares of labels who know nothing of each other.
        labels: names of rows and columns of the table, sorted.
        table: items by label of the first rater (rows) and of the second (columns).
        entities: number of clusters that the interval rests on.
    """

    kappa: float | None
    low: float | None
    high: float | None
    observed: float
    expected: float
    labels: tuple[str, ...]
    table: tuple[tuple[int, ...], ...]
    entities: int


@dataclass(frozen=True)
class Crossing:
    """A break that lies in ``(low, high]``; ``high=None`` means none up to ``low``.

    ``low`` is 0 when the first budget of the grid already broke, and ``low == high == 0`` when
    the subject was broken before the attack began.
    """

    low: float
    high: float | None

    def __post_init__(self) -> None:
        """Refuse bounds that are not finite, negative or in the wrong order."""
        high = self.low if self.high is None else self.high
        if not (0 <= self.low <= high < math.inf):
            raise ValueError(f"not a crossing: ({self.low}, {self.high}]")

    @property
    def censored(self) -> bool:
        """Whether no budget that was tried broke the subject."""
        return self.high is None


@dataclass(frozen=True)
class MedianBudget:
    """The median budget-to-break over seeds.

    Attributes:
        median: the median, or None when it was not reached.
        low: lower end of the interval.
        high: upper end of the interval; None when it is unbounded.
        censored: seeds that were not broken.
        n: seeds.
        largest_tried: only when ``median`` is None, the budget that the median is known to
            exceed: the largest tried, or less where more than half the seeds ended earlier.
        coverage: probability that the interval holds the true median.
        kind: name of the method, as it is printed.
    """

    median: float | None
    low: float
    high: float | None
    censored: int
    n: int
    largest_tried: float | None
    coverage: float
    kind: str


@dataclass(frozen=True)
class Gain:
    """A durability gain, the ratio of two median budgets.

    Attributes:
        value: the ratio, or None when one of the medians was not reached.
        low: lower end of the interval; 0 when nothing bounds the gain from below.
        high: upper end of the interval; None when nothing bounds the gain from above.
        censored: the subject's median was not reached, so that ``low`` is all that is known.
        seeds: seeds of the smaller arm; with one, the interval knows nothing of seed luck.
        reason: why ``value`` or ``high`` is missing; empty when both are there.
    """

    value: float | None
    low: float
    high: float | None
    censored: bool
    seeds: int
    reason: str


# ---- checks and small tools ----------------------------------------------------------------


def _tail(level: float) -> float:
    """Return the upper quantile ``1 - (1 - level) / 2`` of a two-sided interval."""
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, not {level}")
    return (1 + level) / 2


def _normal_quantile(level: float) -> float:
    return float(stats.norm.ppf(_tail(level)))


def _check_counts(successes: int, n: int) -> None:
    if n < 1:
        raise ValueError("a rate needs at least one trial")
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes in {n} trials")


def _finite(values: FloatArray, dimensions: int, name: str) -> FloatArray:
    """Return ``values`` as float64 after checking its dimensions, size and finiteness."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != dimensions or array.size == 0:
        raise ValueError(f"{name} must be {dimensions}-dimensional and not empty: {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds a value that is not finite")
    return array


def _cluster_sums(values: FloatArray, entities: Sequence[str]) -> tuple[FloatArray, FloatArray]:
    """Sum the last axis by entity; return sums ``[..., clusters]`` and sizes ``[clusters]``."""
    if len(entities) != values.shape[-1]:
        raise ValueError(f"{values.shape[-1]} items but {len(entities)} entity labels")
    names, index = np.unique(np.asarray(entities, dtype=np.str_), return_inverse=True)
    membership = np.eye(len(names), dtype=np.float64)[index]
    sums: FloatArray = values @ membership
    return sums, membership.sum(axis=0)


@lru_cache(maxsize=8)
def _resampled(seed: int, resamples: int, *sizes: int) -> tuple[FloatArray, ...]:
    """Return bootstrap weights ``[resamples, size]`` of each size: how often each was drawn.

    They are kept, read-only: a table of results asks for the same ones for every cell.
    """
    if resamples < 1:
        raise ValueError("a bootstrap needs at least one resample")
    if min(sizes) < 2:
        raise ValueError("a bootstrap needs at least two clusters and two seeds")
    generator, weights = np.random.default_rng(seed), list[FloatArray]()
    for size in sizes:
        drawn = generator.multinomial(size, np.full(size, 1 / size), resamples)
        weights.append(drawn.astype(np.float64))
        weights[-1].flags.writeable = False
    return tuple(weights)


def _percentiles(draws: FloatArray, level: float) -> Interval:
    low, high = np.quantile(draws, [1 - _tail(level), _tail(level)])
    return Interval(float(low), float(high))


# ---- one rate ------------------------------------------------------------------------------


def _wilson_interval(rate: float, n: float, level: float) -> Interval:
    """Return Wilson's interval of a rate that may stand for a fractional count.

    ``scipy.stats.binomtest`` only takes whole counts; clustered items give rates such as 3.5
    of 10 entities.
    """
    z = _normal_quantile(level)
    scale = 1 + z**2 / n
    centre = (rate + z**2 / (2 * n)) / scale
    half = z * math.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2)) / scale
    # At rates of 0 and 1 the bound equals the rate, but for rounding.
    return Interval(max(0.0, min(rate, centre - half)), min(1.0, max(rate, centre + half)))


def wilson(successes: int, n: int, level: float = 0.95) -> Rate:
    """Return a rate with Wilson's score interval.

    Args:
        successes: whole count in ``[0, n]``.
        n: trials, at least 1.
        level: two-sided confidence level.

    Raises:
        ValueError: if ``n`` is 0 or the count does not fit.

    Source: Wilson (1927), JASA 22:209.
    """
    _check_counts(successes, n)
    interval = _wilson_interval(successes / n, n, level)
    return Rate(successes / n, interval.low, interval.high, n, "wilson")


def prediction_powered(
    truth: Sequence[bool],
    predicted: Sequence[bool],
    others: Sequence[bool],
    level: float = 0.95,
) -> Rate:
    """Return a rate of labels, from a few that are known and a prediction for all.

    The estimate is the predicted rate of the others plus the mean of truth less prediction where
    both are known; it is unbiased whatever the predictor, if the known ones are a random sample.
    The interval adds Wilson's of the first and Newcombe's paired one of the second in quadrature
    (the method of variance estimates recovery), which keeps its width where no prediction was
    wrong. It is clipped to [0, 1].

    Args:
        truth, predicted: labels and predictions of the known items, at least one.
        others: predictions of the items whose labels are not known; with none, the rate is that
            of the labels, with Wilson's interval.

    Raises:
        ValueError: on no labels, or not one prediction a label.

    Source: Angelopoulos et al. (2023), Science 382:669; intervals: Zou and Donner (2008), Stat.
    Med. 27:1693.
    """
    if not truth or len(truth) != len(predicted):
        raise ValueError(f"{len(truth)} labels with {len(predicted)} predictions")
    if not others:
        return replace(wilson(sum(truth), len(truth), level), method="labels alone, wilson")
    pairs = [(bool(label), bool(guess)) for label, guess in zip(truth, predicted, strict=True)]
    gained, lost = pairs.count((True, False)), pairs.count((False, True))
    both, neither = pairs.count((True, True)), pairs.count((False, False))
    known = newcombe_paired(gained, lost, both, neither, level)
    rest = wilson(sum(others), len(others), level)
    value = rest.rate + known.value
    down = math.hypot(rest.rate - rest.low, known.value - known.low)
    up = math.hypot(rest.high - rest.rate, known.high - known.value)
    low, high, rate = (float(np.clip(v, 0, 1)) for v in (value - down, value + up, value))
    return Rate(rate, low, high, len(truth), "prediction-powered")


def rogan_gladen(
    truth: Sequence[bool],
    predicted: Sequence[bool],
    others: Sequence[bool],
    level: float = 0.95,
) -> Rate | None:
    """Return a rate corrected for the sensitivity and specificity of its predictor.

    ``(p + specificity - 1) / (sensitivity + specificity - 1)`` with p over all items, and the
    normal interval of the delta method; both are clipped to [0, 1].

    Args:
        truth, predicted, others: as for ``prediction_powered``.

    Returns:
        None where the known items have one label only, or the predictor does no better than
        chance: then nothing can be corrected.

    Raises:
        ValueError: not one prediction a label.

    Source: Rogan and Gladen (1978), Am. J. Epidemiol. 107:71.
    """
    if len(truth) != len(predicted):
        raise ValueError(f"{len(truth)} labels with {len(predicted)} predictions")
    positive = [guess for label, guess in zip(truth, predicted, strict=True) if label]
    negative = [not guess for label, guess in zip(truth, predicted, strict=True) if not label]
    if not positive or not negative:
        return None
    sensitivity, specificity = sum(positive) / len(positive), sum(negative) / len(negative)
    better = sensitivity + specificity - 1
    if better <= 0:
        return None
    n = len(predicted) + len(others)
    p = (sum(predicted) + sum(others)) / n
    rate = float(np.clip((p + specificity - 1) / better, 0, 1))
    variance = p * (1 - p) / n
    variance += rate**2 * sensitivity * (1 - sensitivity) / len(positive)
    variance += (1 - rate) ** 2 * specificity * (1 - specificity) / len(negative)
    half = _normal_quantile(level) * math.sqrt(variance) / better
    low, high = max(0.0, rate - half), min(1.0, rate + half)
    return Rate(rate, low, high, len(truth), "Rogan-Gladen")


def clopper_pearson(successes: int, n: int, level: float = 0.95) -> Interval:
    """Return the exact two-sided interval of a rate.

    Raises:
        ValueError: if ``n`` is 0 or the count does not fit.

    Source: Clopper and Pearson (1934), Biometrika 26:404.
    """
    _check_counts(successes, n)
    _tail(level)
    bounds = stats.binomtest(successes, n).proportion_ci(level, method="exact")
    return Interval(float(bounds.low), float(bounds.high))


def zero_breaks_upper(n: int, level: float = 0.95) -> float:
    """Return the one-sided upper bound on a break probability after no break in ``n`` seeds.

    It is ``1 - (1 - level)^(1/n)``: at the bound, no break would be seen with probability
    ``1 - level``. Print the side beside it.
    """
    _check_counts(0, n)
    _tail(level)
    return float(-math.expm1(math.log1p(-level) / n))


def break_probability(breaks: int, n: int, level: float = 0.95) -> Rate:
    """Return the share of seeds that broke, with the two-sided Clopper-Pearson interval."""
    interval = clopper_pearson(breaks, n, level)
    return Rate(breaks / n, interval.low, interval.high, n, "Clopper-Pearson, two-sided")


def anytime_interval(successes: int, n: int, level: float = 0.95) -> Interval:
    """Return an interval that holds at all ``n`` at once, so that one may stop when one likes.

    It keeps every ``p`` whose likelihood is more than ``1 - level`` times the likelihood under
    a Beta(1/2, 1/2) mixture; by Ville's inequality the true ``p`` is ever left out with
    probability at most ``1 - level``. ``n = 0`` gives [0, 1].

    Source: Robbins (1970), Ann. Math. Stat. 41:1397, with the mixture over the rate.
    """
    if (successes, n) != (0, 0):
        _check_counts(successes, n)
    _tail(level)
    failures = n - successes
    mixture = special.betaln(0.5 + successes, 0.5 + failures) - special.betaln(0.5, 0.5)
    threshold = float(mixture) + math.log1p(-level)

    def excess(p: float) -> float:
        return float(special.xlogy(successes, p) + special.xlog1py(failures, -p)) - threshold

    # The likelihood has one peak, at the rate; each bound is a root on one side of it.
    rate = successes / n if n else 0.5
    low = optimize.brentq(excess, 1e-300, rate) if successes else 0.0
    high = optimize.brentq(excess, rate, 1 - 1e-16) if failures else 1.0
    return Interval(float(low), float(high))


# ---- several seeds -------------------------------------------------------------------------


def _prompt_error(values: FloatArray, entities: Sequence[str]) -> tuple[float, int]:
    """Return the standard error over entities of the mean, and the number of entities.

    Items ``[seeds, items]`` are averaged over seeds, then deviations are summed within each
    entity. With equally many items an entity this is the standard error of the entity means.
    """
    items = values.mean(axis=0)
    sums, sizes = _cluster_sums(items - items.mean(), entities)
    count = len(sizes)
    if count == 1:
        return 0.0, 1
    return math.sqrt(count / (count - 1) * float((sums**2).sum())) / items.size, count


def seed_level_rate(values: FloatArray, entities: Sequence[str], level: float = 0.95) -> Rate:
    """Return the mean success over seeds and items with a seed-level interval.

    The half-width is ``sqrt((t·SE_seed)² + (z·SE_prompt)²)``, ``SE_seed² = var_s / S`` with
    ``S - 1`` degrees of freedom and ``SE_prompt`` clustered by entity. The interval is the hull
    of this one and Wilson's at n = entities, because equal seeds (all 0 of n) would otherwise
    give it no width. It is clipped to [0, 1].

    Args:
        values: success in [0, 1], shape ``[seeds, items]``.
        entities: entity of each item, ``items`` labels.
        level: two-sided confidence level.

    Returns:
        The rate, with n = number of entities. With one seed it is Wilson's interval alone,
        which says nothing about other seeds and is labelled so.

    Raises:
        ValueError: on an empty table, values outside [0, 1] or not finite, or a wrong number
            of labels.
    """
    table = _finite(values, 2, "values")
    if table.min() < 0 or table.max() > 1:
        raise ValueError("values must lie in [0, 1]")
    rate = float(np.clip(table.mean(), 0, 1))
    prompt_error, count = _prompt_error(table, entities)
    outer = _wilson_interval(rate, count, level)
    seeds = table.shape[0]
    if seeds == 1:
        return Rate(rate, outer.low, outer.high, count, "wilson, this checkpoint only")
    seed_error = float(table.mean(axis=1).std(ddof=1)) / math.sqrt(seeds)
    quantile = float(stats.t.ppf(_tail(level), seeds - 1))
    half = math.hypot(quantile * seed_error, _normal_quantile(level) * prompt_error)
    low, high = max(0.0, min(outer.low, rate - half)), min(1.0, max(outer.high, rate + half))
    return Rate(rate, low, high, count, "seed-level t, hull with Wilson at n = entities")


def seed_level_mean(
    values: FloatArray,
    entities: Sequence[str],
    level: float = 0.95,
    *,
    bound: float | None = None,
) -> Change:
    """Return the mean of any measure over seeds and items with a seed-level interval.

    The half-width is that of ``seed_level_rate`` before the hull, ``sqrt((t·SE_seed)² +
    (z·SE_prompt)²)``. Pass differences, item by item and seed by seed, for a change.

    Args:
        values: any finite measure, shape ``[seeds, items]``.
        entities: entity of each item, ``items`` labels.
        level: two-sided confidence level.
        bound: most that the size of a value can be, where there is a limit. The interval is then
            joined with Newcombe's for the shares of it that are gained and lost, at n = entities:
            equal values would otherwise give it no width.

    Returns:
        The mean. With one seed the interval is that over items alone, which says nothing about
        other seeds and is labelled so.

    Raises:
        ValueError: on an empty table, values that are not finite or over the bound, or a wrong
            number of labels.
    """
    table = _finite(values, 2, "values")
    prompt_error, count = _prompt_error(table, entities)
    mean, seeds = float(table.mean()), table.shape[0]
    half, method = _normal_quantile(level) * prompt_error, "items, this checkpoint only"
    if seeds > 1:
        seed_error = float(table.mean(axis=1).std(ddof=1)) / math.sqrt(seeds)
        half = math.hypot(float(stats.t.ppf(_tail(level), seeds - 1)) * seed_error, half)
        method = "seed-level t"
    found = Change(mean, mean - half, mean + half, count, seeds, method)
    if bound is None:
        return found
    shares = table / bound
    if not bound > 0 or np.abs(shares).max() > 1 + 1e-9:
        raise ValueError(f"values over the bound {bound}")
    up, down = (float(np.clip(part, 0, None).mean()) for part in (shares, -shares))
    cells = [up * count, down * count, 0.0, max(0.0, 1 - up - down) * count]
    return _hull(found, _newcombe_interval(cells, level), bound)


def _hull(found: Change, outer: Interval, scale: float) -> Change:
    """Return a mean whose interval is joined with Newcombe's, times ``scale``."""
    return Change(
        found.value,
        max(-scale, min(scale * outer.low, found.low)),
        min(scale, max(scale * outer.high, found.high)),
        found.entities,
        found.seeds,
        f"{found.method}, hull with Newcombe at n = entities",
    )


def seed_level_change(
    before: FloatArray, after: FloatArray, entities: Sequence[str], level: float = 0.95
) -> Change:
    """Return the change of a rate over the same items and several seeds, after minus before.

    The interval is the hull of ``seed_level_mean`` of the differences and of Newcombe's paired
    interval with the cells averaged over seeds and scaled to n = entities. It is clipped to
    [-1, 1].

    Args:
        before: 0 or 1, shape ``[seeds, items]``; one seed stands for all where what was before has
            none, such as an untouched subject that answers greedily.
        after: 0 or 1, shape ``[seeds, items]``, seeds and items in the same order.
        entities: entity of each item, ``items`` labels.
        level: two-sided confidence level.

    Raises:
        ValueError: on shapes that do not fit or values other than 0 and 1.
    """
    second = _finite(after, 2, "after")
    first = _finite(before, 2, "before")
    if first.shape != second.shape and first.shape != (1, second.shape[1]):
        raise ValueError(f"before {first.shape} does not fit after {second.shape}")
    if not all(np.isin(table, (0.0, 1.0)).all() for table in (first, second)):
        raise ValueError("paired outcomes must be 0 or 1")
    found = seed_level_mean(second - first, entities, level)
    gained, lost = second * (1 - first), first * (1 - second)
    shares = [float(cell.mean()) for cell in (gained, lost, first * second)]
    cells = [share * found.entities for share in (*shares, max(0.0, 1 - math.fsum(shares)))]
    return _hull(found, _newcombe_interval(cells, level), 1.0)


def crossed_bootstrap(
    values: FloatArray,
    entities: Sequence[str],
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Return the percentile interval of a mean over crossed seeds and entities.

    Seeds and entities are drawn independently, with replacement. To compare two arms pass their
    differences, item by item and seed by seed.

    Args:
        values: any finite measure, shape ``[seeds, items]``, at least two seeds.
        entities: entity of each item, at least two distinct.
        level: two-sided confidence level.
        resamples: bootstrap draws.
        seed: of the draws.

    Raises:
        ValueError: on fewer than two seeds or entities, or values that are not finite.
    """
    sums, sizes = _cluster_sums(_finite(values, 2, "values"), entities)
    seed_weights, weights = _resampled(seed, resamples, sums.shape[0], len(sizes))
    totals = ((seed_weights @ sums) * weights).sum(axis=1) / sums.shape[0]
    return _percentiles(totals / (weights @ sizes), level)


# ---- paired differences --------------------------------------------------------------------


def mcnemar_exact(gained: int, lost: int) -> float:
    """Return the two-sided exact p-value that gains and losses are equally likely.

    ``min(1, 2·P(Bin(gained + lost, 1/2) <= min(gained, lost)))``; 1 without discordant pairs.
    """
    if gained < 0 or lost < 0:
        raise ValueError(f"counts must not be negative: {gained}, {lost}")
    return min(1.0, 2 * float(stats.binom.cdf(min(gained, lost), gained + lost, 0.5)))


def _phi(gained: float, lost: float, both: float, neither: float) -> float:
    """Return Newcombe's correlation, corrected for continuity towards zero when positive."""
    product = (both + gained) * (lost + neither) * (both + lost) * (gained + neither)
    if product <= 0:
        return 0.0
    numerator = both * neither - gained * lost
    if numerator > 0:
        numerator = max(0.0, numerator - (gained + lost + both + neither) / 2)
    return numerator / math.sqrt(product)


def _newcombe_interval(cells: Sequence[float], level: float) -> Interval:
    """Return Newcombe's method 10 for cells (gained, lost, both, neither), whole or not."""
    gained, lost, both, neither = cells
    n = math.fsum(cells)
    after, before = min(1.0, (both + gained) / n), min(1.0, (both + lost) / n)
    outer_after = _wilson_interval(after, n, level)
    outer_before = _wilson_interval(before, n, level)
    phi = _phi(gained, lost, both, neither)

    def reach(first: float, second: float) -> float:
        return math.sqrt(max(0.0, first**2 - 2 * phi * first * second + second**2))

    difference = (gained - lost) / n
    down = reach(after - outer_after.low, outer_before.high - before)
    up = reach(outer_after.high - after, before - outer_before.low)
    return Interval(max(-1.0, difference - down), min(1.0, difference + up))


def newcombe_paired(
    gained: int, lost: int, both: int, neither: int, level: float = 0.95
) -> Difference:
    """Return a difference of paired rates with Newcombe's hybrid score interval.

    Args:
        gained: items that succeed only after.
        lost: items that succeed only before.
        both: items that succeed before and after.
        neither: items that never succeed.
        level: two-sided confidence level.

    Raises:
        ValueError: on a negative count, or without any item.

    Source: Newcombe (1998), Stat. Med. 17:2635, method 10 (phi corrected for continuity); the
    p-value is the exact McNemar test.
    """
    cells = (gained, lost, both, neither)
    n = sum(cells)
    if min(cells) < 0 or n == 0:
        raise ValueError(f"not a table of paired counts: {cells}")
    interval = _newcombe_interval(cells, level)
    value, p_value = (gained - lost) / n, mcnemar_exact(gained, lost)
    return Difference(value, interval.low, interval.high, gained, lost, n, n, p_value)


def newcombe_unpaired(
    before: tuple[int, int], after: tuple[int, int], level: float = 0.95
) -> Interval:
    """Return Newcombe's hybrid score interval of a difference, after minus before, of two samples.

    For arms on different items, or where only the counts of each arm are known.

    Args:
        before: successes and trials of the first arm.
        after: successes and trials of the second arm.
        level: two-sided confidence level.

    Raises:
        ValueError: if an arm has no trials or its count does not fit.

    Source: Newcombe (1998), Stat. Med. 17:873, method 10.
    """
    first, second = wilson(*before, level), wilson(*after, level)
    difference = second.rate - first.rate
    down = math.hypot(second.rate - second.low, first.high - first.rate)
    up = math.hypot(second.high - second.rate, first.rate - first.low)
    return Interval(max(-1.0, difference - down), min(1.0, difference + up))


def paired_difference(
    before: FloatArray, after: FloatArray, entities: Sequence[str], level: float = 0.95
) -> Difference:
    """Return the change of a rate over the same items, clustered by entity.

    The interval is Newcombe's with the counts scaled to n = entities, the test an exact McNemar
    test over entities, each counted by the sign of its net change. With one item an entity both
    are the plain ones of ``newcombe_paired``.

    Args:
        before: 0 or 1, shape ``[items]``.
        after: 0 or 1 for the same items in the same order, shape ``[items]``.
        entities: entity of each item, ``items`` labels.
        level: two-sided confidence level.

    Raises:
        ValueError: on shapes that differ or values other than 0 and 1.
    """
    first, second = _finite(before, 1, "before"), _finite(after, 1, "after")
    if first.shape != second.shape:
        raise ValueError(f"{first.size} items before but {second.size} after")
    if not np.isin(np.concatenate([first, second]), (0.0, 1.0)).all():
        raise ValueError("paired outcomes must be 0 or 1")
    net, sizes = _cluster_sums(second - first, entities)
    gained, lost = int((second > first).sum()), int((second < first).sum())
    both, n, clusters = int((first * second).sum()), first.size, len(sizes)
    cells = np.array([gained, lost, both, n - gained - lost - both]) * (clusters / n)
    interval = _newcombe_interval(cells.tolist(), level)
    p_value = mcnemar_exact(int((net > 0).sum()), int((net < 0).sum()))
    value = (gained - lost) / n
    return Difference(value, interval.low, interval.high, gained, lost, n, clusters, p_value)


def paired_bootstrap(
    differences: FloatArray,
    entities: Sequence[str],
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Return the percentile interval of a mean difference, entities drawn as clusters.

    For differences that are not 0 or 1, such as chance-corrected utility losses.

    Args:
        differences: any finite measure, shape ``[items]``.
        entities: entity of each item, at least two distinct.
        level: two-sided confidence level.
        resamples: bootstrap draws.
        seed: of the draws.

    Raises:
        ValueError: on fewer than two entities, or values that are not finite.
    """
    sums, sizes = _cluster_sums(_finite(differences, 1, "differences"), entities)
    (weights,) = _resampled(seed, resamples, len(sizes))
    return _percentiles((weights @ sums) / (weights @ sizes), level)


def _kappas(tables: FloatArray) -> FloatArray:
    """Return Cohen's kappa of each table ``[draws, labels, labels]``; NaN where undefined."""
    shares = tables / tables.sum(axis=(1, 2), keepdims=True)
    observed = np.trace(shares, axis1=1, axis2=2)
    expected = (shares.sum(axis=2) * shares.sum(axis=1)).sum(axis=1)
    defined = expected < 1 - 1e-12
    found: FloatArray = np.full(len(tables), np.nan)
    found[defined] = (observed - expected)[defined] / (1 - expected[defined])
    return found


def cohen_kappa(
    first: Sequence[str],
    second: Sequence[str],
    entities: Sequence[str],
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Agreement:
    """Return how far two raters agree beyond chance, with an interval by entity.

    Draws in which both raters give one and the same label throughout have no kappa and are left
    out; if more than half are such, there is no interval.

    Args:
        first, second: labels of the same items, at least one.
        entities: entity of each item.
        level: two-sided confidence level.
        resamples: bootstrap draws.
        seed: of the draws.

    Raises:
        ValueError: on no items, or sequences of different lengths.

    Source: Cohen (1960), Educational and Psychological Measurement 20:37.
    """
    if not first or not len(first) == len(second) == len(entities):
        raise ValueError(f"{len(first)} and {len(second)} labels for {len(entities)} items")
    labels = tuple(sorted({*first, *second}))
    rows, columns = (np.array([labels.index(one) for one in side]) for side in (first, second))
    cells = rows * len(labels) + columns
    sums, sizes = _cluster_sums(np.eye(len(labels) ** 2)[cells].T, entities)
    shape = (-1, len(labels), len(labels))
    whole = sums.sum(axis=1).reshape(shape)
    (kappa,) = _kappas(whole)
    low, high = None, None
    if len(sizes) > 1:
        (weights,) = _resampled(seed, resamples, len(sizes))
        draws = _kappas((weights @ sums.T).reshape(shape))
        draws = draws[np.isfinite(draws)]
        if 2 * len(draws) > resamples:
            interval = _percentiles(draws, level)
            low, high = interval.low, interval.high
    shares = whole[0] / whole.sum()
    return Agreement(
        _bounded(float(kappa)),
        low,
        high,
        float(np.trace(shares)),
        float((shares.sum(axis=1) * shares.sum(axis=0)).sum()),
        labels,
        tuple(tuple(int(cell) for cell in row) for row in whole[0]),
        len(sizes),
    )


def chance_corrected(right: FloatArray, chance: FloatArray) -> FloatArray:
    """Return ``(right - chance) / (1 - chance)``: 0 is guessing, 1 is all right.

    Args:
        right: item scores in [0, 1], shape ``[..., items]``.
        chance: chance level of each item in [0, 1), of a shape that broadcasts to ``right``.

    Raises:
        ValueError: if a chance level lies outside [0, 1).
    """
    level = np.asarray(chance, dtype=np.float64)
    if not ((level >= 0) & (level < 1)).all():
        raise ValueError("a chance level must lie in [0, 1)")
    corrected: FloatArray = (np.asarray(right, dtype=np.float64) - level) / (1 - level)
    return corrected


# ---- budget-to-break -----------------------------------------------------------------------


def first_crossing(budgets: Sequence[float], values: Sequence[float], threshold: float) -> Crossing:
    """Return where a measure first reaches a threshold on a grid of budgets.

    The first crossing of the running maximum is the first value at the threshold; what follows
    does not undo it, because the rate may fall again when the subject collapses.

    Args:
        budgets: at least one, not negative, strictly increasing. A budget of 0 may lead.
        values: the measure at each budget. Cut a diverged trial to its finite checkpoints.
        threshold: reached by a value that is equal or larger.

    Raises:
        ValueError: on lengths that differ, budgets out of order, or values that are not finite.
    """
    grid = _finite(np.asarray(budgets), 1, "budgets")
    curve = _finite(np.asarray(values), 1, "values")
    if grid.shape != curve.shape:
        raise ValueError(f"{grid.size} budgets but {curve.size} values")
    if grid[0] < 0 or (np.diff(grid) <= 0).any() or math.isnan(threshold):
        raise ValueError("budgets must increase from 0 or more, and the threshold be a number")
    reached = np.flatnonzero(curve >= threshold)
    if reached.size == 0:
        return Crossing(float(grid[-1]), None)
    first = int(reached[0])
    return Crossing(float(grid[first - 1]) if first else 0.0, float(grid[first]))


def _bounds(crossings: Sequence[Crossing]) -> tuple[FloatArray, FloatArray]:
    """Return lower and upper ends ``[seeds]``; the upper end is infinite when censored."""
    if not crossings:
        raise ValueError("a median budget needs at least one seed")
    lows = np.array([crossing.low for crossing in crossings], dtype=np.float64)
    highs = [math.inf if crossing.high is None else crossing.high for crossing in crossings]
    return lows, np.array(highs, dtype=np.float64)


def _lower_median(values: FloatArray) -> FloatArray:
    """Return the lower middle value along the last axis."""
    middle: FloatArray = np.sort(values, axis=-1)[..., (values.shape[-1] - 1) // 2]
    return middle


def _upper_median(values: FloatArray) -> FloatArray:
    """Return the upper middle value along the last axis."""
    return -_lower_median(-values)


def _bounded(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _survival_bands(lows: FloatArray, highs: FloatArray, level: float) -> list[FloatArray]:
    """Return times and the Kaplan-Meier curve with its log-log bands, each ``[times]``."""
    broken = np.isfinite(highs)
    sample = stats.CensoredData(uncensored=highs[broken], right=lows[~broken])
    survival: Any = stats.ecdf(sample).sf
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        # Where the curve is 1 or 0 the log-log band is undefined: there it is the curve itself.
        warnings.simplefilter("ignore", RuntimeWarning)
        band = survival.confidence_interval(level, method="log-log")
    curve = np.asarray(survival.probabilities, dtype=np.float64)
    inside = (curve > 1e-12) & (curve < 1 - 1e-12)
    low = np.where(inside, band.low.probabilities, curve)
    high = np.where(inside, band.high.probabilities, curve)
    return [np.asarray(survival.quantiles, dtype=np.float64), curve, low, high]


def _first_at_half(times: FloatArray, curve: FloatArray) -> float:
    """Return the first time at which a survival curve is at most one half, or infinity."""
    # A curve of exactly one half may come out a rounding error above it.
    reached = np.flatnonzero(curve <= 0.5 + 1e-9)
    return float(times[reached[0]]) if reached.size else math.inf


def _range_over_seeds(lows: FloatArray, highs: FloatArray) -> tuple[float, float, float]:
    """Return median, minimum and maximum of the breaks; infinite where censored."""
    # A seed that was not broken is known to have survived its last budget, not to be infinite.
    smallest = np.where(np.isfinite(highs), highs, lows).min()
    return float(_lower_median(highs)), float(smallest), float(highs.max())


def _kaplan_meier(lows: FloatArray, highs: FloatArray, level: float) -> tuple[float, float, float]:
    """Return the Kaplan-Meier median and its log-log interval; infinite where not reached."""
    times, curve, band_low, band_high = _survival_bands(lows, highs, level)
    low = _first_at_half(times, band_low)
    if not math.isfinite(low):
        low = float(_lower_median(lows))
    return _first_at_half(times, curve), low, _first_at_half(times, band_high)


def median_budget(crossings: Sequence[Crossing], level: float = 0.95) -> MedianBudget:
    """Return the median budget-to-break over seeds, each break placed at its upper end.

    Below ``KAPLAN_MEIER_FROM`` seeds it is the median with [min, max] over seeds, which covers
    the true median with probability ``1 - 2^(1-n)``. A censored seed counts as infinite, except
    in ``low``, where it counts as the last budget it survived. From there on it is the
    Kaplan-Meier median with the log-log interval. An even number of seeds takes the lower of
    the two middle values: it was tried, and it exists unless more than half are censored.

    Args:
        crossings: one a seed.
        level: two-sided confidence level of the Kaplan-Meier interval.

    Raises:
        ValueError: without any seed.

    Source: Brookmeyer and Crowley (1982), Biometrics 38:29, log-log transformed.
    """
    lows, highs = _bounds(crossings)
    _tail(level)
    n = len(crossings)
    if n < KAPLAN_MEIER_FROM:
        median, low, high = _range_over_seeds(lows, highs)
        coverage, kind = 1 - 2.0 ** (1 - n), "median, [min, max] over seeds"
    else:
        median, low, high = _kaplan_meier(lows, highs, level)
        coverage, kind = level, "Kaplan-Meier median, log-log interval"
    return MedianBudget(
        median=_bounded(median),
        low=low,
        high=_bounded(high),
        censored=int(np.isinf(highs).sum()),
        n=n,
        largest_tried=None if math.isfinite(median) else float(_lower_median(lows)),
        coverage=coverage,
        kind=kind,
    )


def _gain_bounds(
    subject: tuple[FloatArray, FloatArray], reference: tuple[FloatArray, FloatArray]
) -> tuple[FloatArray, FloatArray]:
    """Return lower and upper gain of (lows, highs) ``[..., seeds]``: interval arithmetic.

    For an even number of seeds both the lower and the upper middle values are compared, like
    with like, since outward bounds on each arm would undo the pairing of seeds.
    """
    middles = (_lower_median, _upper_median)
    with np.errstate(divide="ignore"):
        low, other_low = (middle(subject[0]) / middle(reference[1]) for middle in middles)
        high, other_high = (middle(subject[1]) / middle(reference[0]) for middle in middles)
    return np.minimum(low, other_low), np.maximum(high, other_high)


def _gain_interval(
    arms: Sequence[tuple[FloatArray, FloatArray]], level: float, draws: Sequence[NDArray[np.intp]]
) -> tuple[float, float]:
    """Return the bootstrap bounds of a gain, widened to those of the seeds as they are."""
    tail = _tail(level)
    (subject, reference), (first, second) = arms, draws
    plain_low, plain_high = _gain_bounds(subject, reference)
    lows, highs = _gain_bounds(
        (subject[0][first], subject[1][first]), (reference[0][second], reference[1][second])
    )
    # Infinite gains can be ordered but not interpolated. Percentiles of G and log G agree.
    low = np.quantile(lows, 1 - tail, method="inverted_cdf")
    high = np.quantile(highs, tail, method="inverted_cdf")
    return min(float(low), float(plain_low)), max(float(high), float(plain_high))


def _gain_reason(subject: MedianBudget, reference: MedianBudget, high: float) -> str:
    """Say why a gain or its upper end is missing."""
    if reference.median is None:
        return "the reference was not broken: its median budget is unknown"
    if subject.median is None:
        return "the subject was not broken: the gain has a lower bound only"
    if math.isfinite(high):
        return ""
    if subject.censored:
        return "no upper bound: some seeds of the subject were not broken"
    return "no upper bound: the reference broke at the first budget, use a finer grid"


def durability_gain(
    subject: Sequence[Crossing],
    reference: Sequence[Crossing],
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    *,
    paired: bool = True,
) -> Gain:
    """Return how many times the reference's budget it takes to break the subject.

    The value is the ratio of the medians of ``median_budget``. Its interval joins two sources:
    the grid, by interval arithmetic ``[low_subject/high_reference, high_subject/low_reference]``,
    and seeds, by percentiles of that arithmetic over a bootstrap of the seeds.

    * Subject's median not reached: no value, ``low`` from the budgets it survived, no ``high``.
    * Reference's median not reached: no value.
    * Reference broken at the first budget of the grid: no ``high``, as its budget may be as
      small as one likes; a finer grid is needed.

    Args:
        subject: one crossing a seed.
        reference: the plain safeguard of the same kind, on the same axis, under the same tamper.
        level: two-sided confidence level.
        resamples: bootstrap draws.
        seed: of the draws.
        paired: whether crossings at one position share their seed, and so are drawn together.

    Raises:
        ValueError: without any seed, when paired arms differ in length, or when a seed is broken
            at budget 0, for then there is nothing to break.
    """
    arms = _bounds(subject), _bounds(reference)
    if paired and len(subject) != len(reference):
        raise ValueError(f"cannot pair {len(subject)} seeds with {len(reference)}")
    if min(arms[0][1].min(), arms[1][1].min()) == 0:
        raise ValueError("a seed is broken at budget 0: there is nothing to break")
    if resamples < 1:
        raise ValueError("a bootstrap needs at least one resample")
    generator = np.random.default_rng(seed)
    first = generator.integers(len(subject), size=(resamples, len(subject)))
    second = generator.integers(len(reference), size=(resamples, len(reference)))
    low, high = _gain_interval(arms, level, (first, first if paired else second))
    above, below = median_budget(subject, level), median_budget(reference, level)
    return Gain(
        value=above.median / below.median if above.median and below.median else None,
        low=low,
        high=_bounded(high),
        censored=above.median is None,
        seeds=min(len(subject), len(reference)),
        reason=_gain_reason(above, below, high),
    )


# ---- the worst of many ---------------------------------------------------------------------


def expected_maximum_excess(k: int) -> float:
    """Return the expected maximum of ``k`` standard normal scores, in standard deviations.

    This is the optimism of the largest of ``k`` equal configurations that were scored with
    independent noise; it is 0 for one.

    Raises:
        ValueError: if ``k`` is below 1.
    """
    if k < 1:
        raise ValueError(f"a maximum needs at least one score, not {k}")

    def integrand(x: float) -> float:
        return x * k * math.exp(-(x**2) / 2 + (k - 1) * float(special.log_ndtr(x)))

    # Beyond these limits the density of a maximum of up to 1e9 scores is below 1e-20.
    total, _ = integrate.quad(integrand, -12.0, 12.0, limit=200)
    return float(total) / math.sqrt(2 * math.pi)
