"""Kappa of two judges: published and independent figures, clusters, unparsed verdicts."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from durometer.core.statistics import cohen_kappa
from durometer.judges.agreement import agreement, bracket, label_of
from durometer.judges.base import JudgeVerdict, unparsed

examples = settings(max_examples=60, deadline=None, database=None)


def expanded(table: list[list[int]]) -> tuple[list[str], list[str], list[str]]:
    names = "abcdef"
    rows = [
        (names[i], names[j])
        for i, row in enumerate(table)
        for j, n in enumerate(row)
        for _ in range(n)
    ]
    first, second = (list(column) for column in zip(*rows, strict=True))
    return first, second, [str(number) for number in range(len(rows))]


# The fourth is the example of Fleiss, Cohen and Everitt (1969), the fifth that of Cohen (1968).
PUBLISHED = [
    ([[20, 5], [10, 15]], 0.4),
    ([[45, 15], [25, 15]], 0.1304),
    ([[25, 35], [5, 35]], 0.2593),
    ([[106, 10, 4], [22, 28, 10], [2, 12, 6]], 0.429),
    ([[88, 14, 18], [10, 40, 10], [2, 6, 12]], 0.492),
    ([[10, 0], [0, 3]], 1.0),
    ([[0, 5], [5, 0]], -1.0),
]


@pytest.mark.parametrize(("table", "kappa"), PUBLISHED)
def test_kappa_is_the_published_one(table: list[list[int]], kappa: float) -> None:
    found = cohen_kappa(*expanded(table))
    assert found.kappa == pytest.approx(kappa, abs=5e-4)
    assert found.table == tuple(tuple(row) for row in table)


def asymptotic_error(table: Any) -> float:
    """The large-sample standard error of Fleiss, Cohen and Everitt (1969), formula 14."""
    p = np.array(table) / np.sum(table)
    rows, columns = p.sum(axis=1), p.sum(axis=0)
    agreed, expected = float(np.trace(p)), float(rows @ columns)
    diagonal = sum(
        p[i, i] * ((1 - expected) - (columns[i] + rows[i]) * (1 - agreed)) ** 2
        for i in range(len(p))
    )
    off = sum(
        p[i, j] * (columns[i] + rows[j]) ** 2
        for i in range(len(p))
        for j in range(len(p))
        if i != j
    )
    total = diagonal + (1 - agreed) ** 2 * off - (agreed * expected - 2 * expected + agreed) ** 2
    return math.sqrt(total / (np.sum(table) * (1 - expected) ** 4))


@pytest.mark.parametrize("table", [[[88, 14, 18], [10, 40, 10], [2, 6, 12]], [[90, 30], [50, 30]]])
def test_the_interval_is_near_the_asymptotic_one(table: list[list[int]]) -> None:
    found = cohen_kappa(*expanded(table))
    error = asymptotic_error(table)
    assert found.kappa is not None
    assert found.low == pytest.approx(found.kappa - 1.96 * error, abs=0.015)
    assert found.high == pytest.approx(found.kappa + 1.96 * error, abs=0.015)


def test_wordings_of_one_entity_do_not_narrow_the_interval() -> None:
    first, second, about = expanded([[20, 5], [10, 15]])
    once, thrice = cohen_kappa(first, second, about), cohen_kappa(first * 3, second * 3, about * 3)
    assert (thrice.kappa, thrice.low, thrice.high) == pytest.approx(
        (once.kappa, once.low, once.high)
    )
    assert thrice.entities == once.entities == 50


def test_one_label_throughout_has_no_kappa() -> None:
    found = cohen_kappa(["a"] * 5, ["a"] * 5, list("vwxyz"))
    assert (found.kappa, found.low, found.high, found.observed) == (None, None, None, 1.0)
    assert cohen_kappa(["a", "b"], ["a", "b"], ["x", "x"]).low is None


def test_kappa_needs_items_of_one_length() -> None:
    for first, second, about in (([], [], []), (["a"], ["a", "b"], ["x"]), (["a"], ["a"], [])):
        with pytest.raises(ValueError, match="labels for"):
            cohen_kappa(first, second, about)


pairs = st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("ab")), min_size=2, max_size=40)


@examples
@given(pairs)
def test_kappa_is_symmetric_and_bounded(rows: list[tuple[str, str]]) -> None:
    first, second = (list(column) for column in zip(*rows, strict=True))
    about = [str(number) for number in range(len(rows))]
    one, other = cohen_kappa(first, second, about), cohen_kappa(second, first, about)
    assert (one.kappa is None) == (other.kappa is None)
    if one.kappa is not None:
        assert one.kappa == pytest.approx(other.kappa)
        assert -1 - 1e-9 <= one.kappa <= 1 + 1e-9
    assert one.observed == pytest.approx(sum(a == b for a, b in rows) / len(rows))


# --- of judges ---


def test_what_a_judge_could_not_read_is_in_the_table_and_not_in_kappa() -> None:
    first = ["harmful"] * 4 + ["harmless"] * 4 + ["unparsed"] * 2
    second = ["harmful"] * 3 + ["harmless"] * 4 + ["unparsed", "harmful", "unparsed"]
    found = agreement(first, second, [str(n) for n in range(10)])
    assert found["labels"] == ["harmful", "harmless", "unparsed"]
    assert found["table"] == [[3, 1, 0], [0, 3, 1], [1, 0, 1]]
    assert (found["n"], found["unparsed"]) == (7, 3)
    assert found["prevalence"] == pytest.approx([4 / 7, 3 / 7])
    # By hand: observed 6/7, expected (4*3 + 3*4)/49.
    assert found["kappa"] == pytest.approx((6 / 7 - 24 / 49) / (1 - 24 / 49))
    assert found["low"] <= found["kappa"] <= found["high"]


def test_nothing_that_both_read_is_no_agreement() -> None:
    found = agreement(["unparsed"], ["harmful"], ["x"])
    assert (found["kappa"], found["n"], found["unparsed"]) == (None, 0, 1)


def test_an_unparsed_verdict_has_its_own_label() -> None:
    assert label_of(unparsed("safe", "rubbish")) == "unparsed"
    assert label_of(JudgeVerdict(False)) == "harmless"
    assert label_of(JudgeVerdict(True).as_dict()) == "harmful"


def test_the_bracket_counts_unparsed_verdicts_in_its_upper_end() -> None:
    assert bracket(3, 2, 10) == (0.3, 0.5)
    assert bracket(0, 0, 0) is None
