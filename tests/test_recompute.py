"""`recompute`: printed figures against their rows; what was printed instead; the right figures."""

import json
import math
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from test_report_html import HOSTILE, Page, assert_harmless_markup

import durometer
from durometer.cli import main
from durometer.core.statistics import newcombe_paired, newcombe_unpaired
from durometer.headlines.hypotheses import HYPOTHESES, candidates, right_value
from durometer.headlines.printed import parse_printed
from durometer.headlines.result import check_headlines
from durometer.headlines.search import MOST_BY_CHANCE
from durometer.headlines.settings import Headline, HeadlineEntry, Settings
from durometer.headlines.shipped import SHIPPED
from durometer.headlines.table import Counts, Table
from durometer.report.recompute_html import render_recomputation
from durometer.report.recompute_terminal import recomputation_table

Capture = pytest.CaptureFixture[str]
Json = dict[str, Any]


@pytest.fixture(scope="module")
def study() -> Json:
    """The counts of arXiv 2409.19476 with its printed headlines."""
    return durometer.recompute("2409.19476-asr").data


def headline(data: Json, printed: str) -> Json:
    (found,) = [one for one in data["headlines"] if one["printed"] == printed]
    return dict(found)


def check(table: Table, **entry: Any) -> Json:
    """Return what is found about one headline."""
    made = check_headlines(table, Settings(headline=[HeadlineEntry(**entry)]), "table")
    return dict(made["headlines"][0])


def named(found: Json) -> list[list[str]]:
    return [one["hypotheses"] for one in found["explanations"]]


def counts(**arms: tuple[int, int] | tuple[int, int, int]) -> Table:
    """Return a table of one category: success, failure, unparsed."""
    return Table({(arm, ""): Counts(*held) for arm, held in arms.items()})


def split(arms: Mapping[str, Mapping[str, tuple[int, int]]], **more: Any) -> Table:
    """Return a table with categories: successes of n."""
    cells = {
        (arm, category): Counts(k, n - k)
        for arm, held in arms.items()
        for category, (k, n) in held.items()
    }
    return Table(cells, **more)


# ---- the published study ------------------------------------------------------------------------


def test_the_printed_base_rate_is_the_safe_share(study: Json) -> None:
    found = headline(study, "59.06 %")
    assert found["verdict"] == "explained"
    assert named(found) == [["complement"]]
    assert found["explanations"][0]["arithmetic"] == "189/320"
    (rate,) = found["rates"]
    assert (rate["successes"], rate["n"]) == (131, 320)
    assert round(100 * rate["rate"], 2) == 40.94
    assert [round(100 * rate[end], 1) for end in ("low", "high")] == [35.7, 46.4]


def test_the_rate_after_refusals_is_printed_as_odds(study: Json) -> None:
    found = headline(study, "7.38 %")
    assert named(found) == [["odds"]]
    assert found["explanations"][0]["arithmetic"] == "22/298"
    assert found["right"] == 22 / 320
    assert headline(study, "94.06 %")["verdict"] == "follows"


def test_the_headline_changes_come_from_those_rates(study: Json) -> None:
    up, down = headline(study, "+35 %"), headline(study, "-51.68 %")
    assert named(up) == [["one_arm_only"], ["printed_rates"]]
    assert named(down) == [["printed_rates"]]
    assert "7.38 % after, 59.06 % before" in down["explanations"][0]["text"]
    assert round(100 * up["right"], 1) == 53.1
    assert round(100 * down["right"], 1) == -34.1
    assert (up["difference"]["gained"], up["difference"]["lost"]) == (179, 9)
    assert (down["difference"]["gained"], down["difference"]["lost"]) == (0, 109)
    assert all(one["difference"]["paired"] for one in (up, down))


def test_safer_by_35_is_left_without_an_explanation(study: Json) -> None:
    found = headline(study, "-35 %")
    assert found["verdict"] == "unexplained"
    assert found["explanations"] == []
    # two digits cannot tell hundreds of two-step figures apart, and that is said
    assert found["search"]["too_coarse"]
    assert found["search"]["two_steps_by_chance"] > MOST_BY_CHANCE
    assert found["search"]["two_steps"] is None


def test_a_difference_alone_is_explained_by_two_steps() -> None:
    data = durometer.recompute(
        "2409.19476-asr",
        [{"printed": "-51.68 %", "kind": "difference", "before": "base", "after": "safe"}],
        success=["unsafe"],
    ).data
    (found,) = data["headlines"]
    told = found["explanations"]
    assert [one["hypotheses"] for one in told] == [["one_arm_only"]]
    assert told[0]["arithmetic"].split(" \N{MINUS SIGN} ") == ["22/298", "189/320"]
    assert found["search"]["two_steps"] > 100
    assert found["search"]["two_steps_by_chance"] < MOST_BY_CHANCE


@pytest.mark.parametrize(
    ("arm", "scope", "low", "high"),
    [
        ("base", "standard", 10.4, 21.5),
        ("base", "copyright", 81.5, 94.8),
        ("base", "without copyright", 19.6, 30.4),
        ("harmful", "contextual", 75.9, 91.3),
        ("harmful", "without copyright", 89.4, 95.9),
        ("safe", "standard", 0.0, 2.4),
        ("safe", "all", 4.6, 10.2),
    ],
)
def test_rates_by_category(study: Json, arm: str, scope: str, low: float, high: float) -> None:
    (rate,) = [r for r in study["rates"] if (r["arm"], r["scope"]) == (arm, scope)]
    assert [round(100 * rate[end], 1) for end in ("low", "high")] == [low, high]


@pytest.mark.parametrize(
    ("after", "scope", "value", "low", "high"),
    [
        ("harmful", "all", 53.1, 46.7, 58.8),
        ("harmful", "standard", 82.4, 74.8, 87.4),
        ("harmful", "contextual", 42.0, 27.7, 53.9),
        ("harmful", "copyright", 6.2, -2.3, 15.3),
        ("safe", "all", -34.1, -39.3, -28.8),
    ],
)
def test_differences_by_category(
    study: Json, after: str, scope: str, value: float, low: float, high: float
) -> None:
    (one,) = [d for d in study["differences"] if (d["after"], d["scope"]) == (after, scope)]
    assert 100 * one["value"] == pytest.approx(value, abs=0.051)
    assert [round(100 * one[end], 1) for end in ("low", "high")] == [low, high]


def test_categories_that_need_another_scorer_stand_apart(study: Json) -> None:
    assert study["table"]["scorers"] == {"copyright": "text matching"}
    assert any("different scorers" in remark for remark in study["headlines"][0]["remarks"])
    copyright_only = durometer.recompute("2409.19476-asr", rate=["base:copyright=90.0 %"]).data
    assert not headline(copyright_only, "90.0 %")["remarks"]


def test_accuracy_with_false_context() -> None:
    data = durometer.recompute("2409.19476-accuracy").data
    assert [h["printed"] for h in data["headlines"] if h["verdict"] != "follows"] == ["55.1 %"]
    assert named(headline(data, "55.1 %")) == [["one_item"]]
    (fip,) = [d for d in data["differences"] if d["after"] == "harmful FIP"]
    assert [round(100 * fip[end], 1) for end in ("low", "high")] == [-26.1, -19.8]
    (unpaired,) = [d for d in data["differences"] if d["after"] == "harmful B"]
    assert not unpaired["paired"]
    assert unpaired["p_value"] is None


def test_every_shipped_table_is_there_and_holds_counts_only() -> None:
    for name in SHIPPED:
        data = durometer.recompute(name).data
        assert data["headlines"]
        assert not data["table"]["by_item"]


# ---- one hypothesis at a time -------------------------------------------------------------------

PLAIN = counts(a=(131, 189), b=(301, 19))
UNREAD = counts(a=(37, 41, 9))
PARTS = split(
    {"a": {"x": (17, 61), "y": (40, 53), "z": (5, 97)}, "b": {"x": (9, 61), "y": (8, 53)}}
)


@pytest.mark.parametrize(
    ("table", "entry", "expected"),
    [
        (PLAIN, {"arm": "a", "printed": "69.31 %"}, "odds"),  # 131/189
        (PLAIN, {"arm": "a", "printed": "144.27 %"}, "inverse_odds"),  # 189/131
        (PLAIN, {"arm": "a", "printed": "94.06 %"}, "other_arm"),
        (PLAIN, {"arm": "a", "printed": "41.25 %"}, "one_item"),  # 132/320
        (PLAIN, {"arm": "a", "printed": "0.4094 %"}, "scale"),
        (PLAIN, {"arm": "a", "printed": "40.93 %"}, "truncated"),
        (UNREAD, {"arm": "a", "printed": "47.44 %"}, "without_unparsed"),  # 37/78
        (UNREAD, {"arm": "a", "printed": "52.87 %"}, "unparsed_as_success"),  # 46/87
        (UNREAD, {"arm": "a", "printed": "57.47 %"}, "complement_with_unparsed"),  # 50/87
        (UNREAD, {"arm": "a", "printed": "90.24 %"}, "odds_without_unparsed"),  # 37/41
        (UNREAD, {"arm": "a", "printed": "52.56 %"}, "complement_without_unparsed"),  # 41/78
        (PARTS, {"arm": "a", "printed": "50.00 %"}, "other_rows"),  # 57/114, without z
        (PARTS, {"arm": "a", "printed": "27.87 %"}, "other_rows"),  # x alone
        (PARTS, {"arm": "a", "printed": "18.96 %"}, "other_denominator"),  # 40/211
        (PARTS, {"arm": "a", "printed": "36.17 %"}, "category_mean"),
        (PARTS, {"arm": "a", "category": "x", "printed": "29.38 %"}, "other_rows"),  # pooled
    ],
)
def test_a_wrong_share_is_named(table: Table, entry: Json, expected: str) -> None:
    found = check(table, **entry)
    assert [expected] in named(found)
    assert found["verdict"] == ("rounding" if expected == "truncated" else "explained")


@pytest.mark.parametrize(
    ("kind", "printed", "expected"),
    [
        ("difference", "-53.13 points", "swapped_arms"),
        ("difference", "+129.77 %", "change"),  # 170/131
        ("difference", "+56.48 %", "change_after"),  # 170/301
        ("difference", "229.77 %", "ratio"),
        ("change", "+53.13 %", "difference"),
        ("change", "-56.48 %", "swapped_arms"),
    ],
)
def test_a_wrong_change_is_named(kind: str, printed: str, expected: str) -> None:
    found = check(PLAIN, kind=kind, before="a", after="b", printed=printed)
    assert found["verdict"] == "explained"
    assert [expected] in named(found)


@pytest.mark.parametrize("printed", ["+53.12 points", "+53.13 points"])
def test_a_half_may_be_rounded_either_way(printed: str) -> None:
    found = check(PLAIN, kind="difference", before="a", after="b", printed=printed)  # 53.125
    assert found["verdict"] == "follows"


def test_rates_rounded_before_they_are_subtracted() -> None:
    table = counts(a=(1, 6), b=(2, 1))  # 66.67 - 14.29 = 52.38, but 67 - 14 = 53
    found = check(table, kind="difference", before="a", after="b", printed="53 %")
    assert named(found) == [["rounded_rates"]]
    assert found["verdict"] == "rounding"


def test_rounded_twice() -> None:
    found = check(counts(a=(10, 12)), arm="a", printed="45.46 %")  # 45.4545 -> 45.455 -> 45.46
    assert named(found) == [["rounded_twice"]]


def test_a_standard_error_printed_as_deviation() -> None:
    table = counts(a=(550, 450))
    deviation = math.sqrt(0.55 * 0.45)
    for printed in ("0.4975", "0.4977", "49.75 %"):  # population, sample, population
        assert check(table, kind="deviation", arm="a", printed=printed)["verdict"] == "follows"
    assert check(table, kind="deviation", arm="a", printed="0.4978")["verdict"] == "unexplained"
    found = check(table, kind="deviation", arm="a", printed="1.57 %")
    assert round(100 * deviation / math.sqrt(1000), 2) == 1.57
    assert {tuple(names) for names in named(found)} == {("standard_error",)}
    half = check(table, kind="deviation", arm="a", printed="3.08 %")
    assert {tuple(names) for names in named(half)} == {("half_width",)}
    variance = check(table, kind="deviation", arm="a", printed="0.2475")
    assert ["variance"] in named(variance)


def test_all_explanations_are_listed() -> None:
    found = check(
        split({"a": {"x": (2, 4), "y": (3, 12)}, "b": {"x": (4, 8), "y": (1, 12)}}),
        arm="a",
        printed="50.0 %",
    )
    texts = [one["text"] for one in found["explanations"]]
    assert texts == ["the rows of 'x'"]
    both = check(counts(a=(1, 3), b=(3, 1)), arm="a", printed="75.0 %")
    assert named(both) == [["complement"], ["other_arm"]]


def test_no_explanation_is_forced() -> None:
    found = check(PLAIN, arm="a", printed="12.34 %")
    assert (found["verdict"], found["explanations"]) == ("unexplained", [])
    assert found["search"]["two_steps"] > 0


def test_unsigned_changes_are_compared_by_size() -> None:
    table = counts(a=(301, 19), b=(131, 189))
    found = check(table, kind="difference", before="a", after="b", printed="53.1 points")
    assert found["verdict"] == "follows"
    assert "printed without a sign: sizes are compared" in found["remarks"]
    assert (
        check(table, kind="difference", before="a", after="b", printed="+53.1 points")["verdict"]
        == "explained"
    )


def test_a_change_from_nothing_cannot_follow() -> None:
    found = check(counts(a=(0, 9), b=(4, 5)), kind="change", before="a", after="b", printed="+44 %")
    assert (found["verdict"], found["right"]) == ("undefined", None)
    assert found["difference"]["value"] == pytest.approx(4 / 9)


def test_every_hypothesis_is_declared_and_reached() -> None:
    reached = set[str]()
    tables = (PLAIN, UNREAD, PARTS, counts(a=(10, 12), b=(2, 1)))
    entries = [
        {"arm": "a", "printed": "1.00 %"},
        {"kind": "deviation", "arm": "a", "printed": "0.01"},
        *(
            {"kind": kind, "before": "a", "after": "b", "printed": "1.00 %"}
            for kind in ("difference", "change")
        ),
    ]
    told = {("a", "all"): parse_printed("77.77 %"), ("b", "all"): parse_printed("12.34 %")}
    for table in tables:
        for entry in entries:
            if table is UNREAD and "before" in entry:
                continue
            made = Headline.of(HeadlineEntry(**entry), table)
            right = right_value(made, table)
            assert right is not None
            for one in candidates(made, table, right, told):
                reached |= set(one.departures)
                assert 1 <= len(one.departures) <= 2
                assert one.value != right
                assert one.text
    assert reached == set(HYPOTHESES)


CELLS = st.tuples(st.integers(0, 60), st.integers(0, 60), st.integers(0, 9)).filter(
    lambda cell: sum(cell) > 0
)


@given(CELLS, CELLS, st.integers(0, 4))
def test_what_is_rounded_right_follows(
    a: tuple[int, int, int], b: tuple[int, int, int], digits: int
) -> None:
    table = counts(a=a, b=b)
    rates = [100 * cell[0] / sum(cell) for cell in (a, b)]
    assert check(table, arm="a", printed=f"{rates[0]:.{digits}f} %")["verdict"] == "follows"
    printed = f"{rates[1] - rates[0]:+.{digits}f} points"
    found = check(table, kind="difference", before="a", after="b", printed=printed)
    # 0.5 cannot be told from 0.49999 in floats: the sum may fall on the other side of a half
    assert found["verdict"] in ("follows", "rounding")


@given(CELLS, CELLS, st.decimals(0, 100, places=2))
def test_every_explanation_rounds_to_what_was_printed(
    a: tuple[int, int, int], b: tuple[int, int, int], printed: Any
) -> None:
    found = check(counts(a=a, b=b), arm="a", printed=f"{printed} %")
    assert bool(found["explanations"]) == (found["verdict"] in ("explained", "rounding"))
    for one in found["explanations"]:
        assert abs(100 * one["value"] - float(printed)) <= 0.005 + 1e-9
        assert set(one["hypotheses"]) <= set(HYPOTHESES)
    for share in ("one_step_by_chance", "two_steps_by_chance"):
        assert 0 <= (found["search"][share] or 0) <= 1


def test_how_often_chance_explains_is_what_a_count_gives() -> None:
    """Every figure of two digits is tried: the share explained is the one that was announced."""
    table = counts(a=(31, 69), b=(88, 12))
    found = [check(table, arm="a", printed=f"{at} %") for at in range(2, 100)]
    explained = [one for one in found if one["search"]["one_step"] and one["explanations"]]
    announced = found[0]["search"]["one_step_by_chance"]
    assert announced == pytest.approx(len(explained) / 100, abs=0.03)


def test_the_page_lists_every_hypothesis() -> None:
    page = Path(__file__).parent.parent / "docs" / "recompute.md"
    listed = set(re.findall(r"`(\w+)`", page.read_text("utf-8")))
    assert set(HYPOTHESES) <= listed


# ---- intervals ----------------------------------------------------------------------------------


def test_newcombe_unpaired_on_the_published_example() -> None:
    # Newcombe (1998), Stat. Med. 17:873, table II, method 10: 56/70 and 48/80
    interval = newcombe_unpaired((48, 80), (56, 70))
    assert (interval.low, interval.high) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    turned = newcombe_unpaired((56, 70), (48, 80))
    assert (turned.low, turned.high) == pytest.approx((-interval.high, -interval.low))
    with pytest.raises(ValueError, match="at least one trial"):
        newcombe_unpaired((0, 0), (1, 2))


FACTOR = st.integers(1, 15)


@given(FACTOR, FACTOR, FACTOR, FACTOR)
def test_unpaired_is_paired_without_correlation(x: int, y: int, u: int, v: int) -> None:
    # the cells of independent outcomes: phi is 0
    paired = newcombe_paired(y * u, x * v, x * u, y * v)
    n = (x + y) * (u + v)
    interval = newcombe_unpaired((x * (u + v), n), (u * (x + y), n))
    assert (interval.low, interval.high) == pytest.approx((paired.low, paired.high))


def test_paired_rows_and_told_pairs_give_the_same(tmp_path: Path) -> None:
    cells = {(1, 1): 11, (1, 0): 4, (0, 1): 17, (0, 0): 23}
    rows = ["item,before,after"]
    for (one, two), times in cells.items():
        rows += [f"{one}{two}-{at},{one},{two}" for at in range(times)]
    file = tmp_path / "wide.csv"
    file.write_text("\n".join(rows), "utf-8")
    data = durometer.recompute(
        file,
        difference=["before,after=+23.6 points"],
        column=["outcome=before", "outcome=after"],
    ).data
    by_rows = data["headlines"][0]["difference"]
    expected = newcombe_paired(17, 4, 11, 23)
    assert (by_rows["low"], by_rows["high"]) == (expected.low, expected.high)
    assert by_rows["p_value"] == expected.p_value
    told = split(
        {"before": {"": (15, 55)}, "after": {"": (28, 55)}},
        pairs={("after", "before", ""): (4, 17)},
    )
    turned = check(told, kind="difference", before="before", after="after", printed="+23.6 %")
    assert turned["difference"] | {"scope": "all"} == by_rows


def test_arms_on_different_items_are_not_paired(tmp_path: Path) -> None:
    rows = [{"item": f"i{at}", "arm": "a", "outcome": at % 2} for at in range(8)]
    rows += [{"item": f"i{at}", "arm": "b", "outcome": True} for at in range(1, 9)]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    found = durometer.recompute(file, difference=["a,b=+50 %"]).data["headlines"][0]
    assert not found["difference"]["paired"]
    assert "unpaired" in found["difference"]["method"]
    interval = newcombe_unpaired((4, 8), (8, 8))
    assert (found["difference"]["low"], found["difference"]["high"]) == (
        interval.low,
        interval.high,
    )


def test_intervals_cluster_by_entity(tmp_path: Path) -> None:
    rows = ["item,entity,arm,outcome"]
    for arm in ("a", "b"):
        rows += [
            f"i{at},e{at // 4},{arm},{int(at < (8 if arm == 'a' else 24))}" for at in range(40)
        ]
    file = tmp_path / "rows.csv"
    file.write_text("\n".join(rows), "utf-8")
    found = durometer.recompute(file, rate=["a=20 %"], difference=["a,b=+40 points"]).data
    (rate,) = headline(found, "20 %")["rates"]
    plain = durometer.recompute(file, rate=["a=20 %"], column=["entity=none"]).data
    (unclustered,) = headline(plain, "20 %")["rates"]
    # ten entities, not forty items: Wilson at 2 of 10
    assert (rate["low"], rate["high"]) == pytest.approx((0.0567, 0.5098), abs=1e-4)
    assert rate["high"] - rate["low"] > unclustered["high"] - unclustered["low"]
    difference = headline(found, "+40 points")["difference"]
    assert difference["p_value"] == pytest.approx(2 * 0.5**4)  # four entities changed, all upwards
    assert difference["gained"] == 16


def test_unparsed_outcomes_stay_in_the_denominator() -> None:
    (rate,) = check(UNREAD, arm="a", printed="42.5 %")["rates"]
    assert rate["rate"] == 37 / 87
    assert rate["high_with_unparsed"] == 46 / 87
    assert rate["unparsed"] == 9


# ---- what is shown ------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 120])
def test_the_terminal_shows_worst_first(study: Json, width: int) -> None:
    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        console.print(recomputation_table(study))
    shown = captured.get()
    assert max(map(len, shown.splitlines())) <= width
    places = [shown.index(f"{one['printed']}  ") for one in study["headlines"]]
    assert places == sorted(places)
    told = " ".join(shown.split())
    for words in (
        "5 of 6 headlines do not follow",
        "no explanation found",
        "189/320 = 59.06 %",
        "22/298 = 7.38 %",
        "+53.1 points [46.7, 58.8]",
        "179 gained, 9 lost",
    ):
        assert words in told


def test_gaps_order_what_does_not_follow(study: Json) -> None:
    verdicts = [one["verdict"] for one in study["headlines"]]
    assert verdicts[-1] == "follows"
    gaps = [abs(one["gap"]) for one in study["headlines"][:-1]]
    assert gaps == sorted(gaps, reverse=True)


def test_the_page_loads_nothing_and_shows_everything(study: Json) -> None:
    page = Page(render_recomputation(study))
    assert_harmless_markup(page)
    assert "default-src 'none'" in page.all()
    for one in study["headlines"]:
        assert one["printed"] in page.text
        for explanation in one["explanations"]:
            assert explanation["text"] in page.text
    assert page.tags.count("svg") == len(study["headlines"])
    for name in HYPOTHESES:
        assert name in page.text


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [
        {"item": f"{HOSTILE}{at}", "arm": HOSTILE + arm, "category": HOSTILE, "outcome": at > 2}
        for at in range(6)
        for arm in ("1", "2\x1b[31m")
    ]
    file.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    pair = {"before": HOSTILE + "1", "after": HOSTILE + "2\x1b[31m"}
    data = durometer.recompute(
        file, [{"printed": "+9 %", "kind": "difference", "note": HOSTILE, **pair}]
    ).data
    page = Page(render_recomputation(data))
    assert_harmless_markup(page)
    assert HOSTILE in page.text
    assert "1337" not in page.all()
    console = Console(width=80, color_system=None)
    with console.capture() as captured:
        console.print(recomputation_table(data))
    assert "\x1b" not in captured.get()


@pytest.mark.parametrize("kind", ["change", "deviation"])
def test_other_kinds_are_shown(kind: str) -> None:
    entry = {"before": "a", "after": "b"} if kind == "change" else {"arm": "a"}
    made = HeadlineEntry(kind=kind, printed="-1.57 %" if kind == "change" else "2.75 %", **entry)  # type: ignore[arg-type]
    data = check_headlines(PLAIN, Settings(headline=[made]), "table")
    page = Page(render_recomputation(data))
    assert_harmless_markup(page)
    expected = "+129.8 % of the rate before" if kind == "change" else "0.4917"
    assert expected in page.text


# ---- the command --------------------------------------------------------------------------------


def test_exit_codes_and_files(tmp_path: Path, capsys: Capture) -> None:
    assert main(["recompute", "2409.19476-asr", "--out", str(tmp_path / "new" / "out")]) == 1
    assert "page: " in capsys.readouterr().out
    kept = json.loads((tmp_path / "new" / "out" / "recompute.json").read_text("utf-8"))
    assert main(["recompute", "2409.19476-asr", "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == kept
    assert (tmp_path / "new" / "out" / "recompute.html").read_text("utf-8").startswith("<!doctype")
    assert main(["recompute", "2409.19476-adoption"]) == 0
    assert "follow from the rows" in capsys.readouterr().out


def test_the_command_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys, durometer; made = durometer.recompute('2409.19476-asr', out=sys.argv[1]);"
        "sys.exit('torch' in sys.modules or made.exit_code() != 1)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, check=False, timeout=60)
    assert done.returncode == 0
