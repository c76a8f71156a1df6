"""What `recompute` reads: forms of a table, headlines, and bad input in one clear line."""

import json
import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import durometer
from durometer.cli import main
from durometer.console import ErrorLine
from durometer.core.errors import InputError, StorageError
from durometer.headlines.printed import parse_printed
from durometer.headlines.read import FAILURE, SUCCESS, UNPARSED, read_table
from durometer.headlines.settings import Settings, read_settings
from durometer.headlines.table import Counts, Table
from durometer.measures.outcomes import Outcome

Capture = pytest.CaptureFixture[str]
LONG = """item,arm,category,outcome
i1,base,x,unsafe
i2,base,y,safe
i3,base,y,
i1,tuned,x,UNSAFE
i2,tuned,y,unsafe
i3,tuned,y, safe
"""


def write(folder: Path, text: str | bytes, name: str = "rows.csv") -> Path:
    file = folder / name
    file.write_bytes(text.encode("utf-8") if isinstance(text, str) else text)
    return file


def read(folder: Path, text: str | bytes, name: str = "rows.csv", **given: Any) -> Table:
    return read_table(write(folder, text, name), Settings(**given))


# ---- forms of a table ---------------------------------------------------------------------------


def test_item_rows(tmp_path: Path) -> None:
    table = read(tmp_path, "\ufeff" + LONG)
    assert table.counts == {
        ("base", "x"): Counts(1, 0, 0),
        ("base", "y"): Counts(0, 1, 1),
        ("tuned", "x"): Counts(1, 0, 0),
        ("tuned", "y"): Counts(1, 1, 0),
    }
    assert [item.success for item in table.items["tuned"].values()] == [True, True, False]


def test_the_same_table_in_every_form(tmp_path: Path) -> None:
    rows = [line.split(",") for line in LONG.splitlines()]
    lines = [json.dumps(dict(zip(rows[0], row, strict=True))) for row in rows[1:]]
    wide = "item,category,base,tuned\ni1,x,1,true\ni2,y,0,yes\ni3,y,,no\n"
    forms = [
        read(tmp_path, LONG),
        read(tmp_path, LONG.replace(",", "\t"), "rows.tsv"),
        read(tmp_path, "\n".join(lines), "rows.jsonl"),
        read(tmp_path, wide, columns={"outcome": ["base", "tuned"]}),
        read(tmp_path, LONG.replace("outcome", "verdict"), columns={"outcome": "verdict"}),
    ]
    assert all(form.counts == forms[0].counts for form in forms)
    assert all(form.items == forms[0].items for form in forms)


def test_tables_of_counts(tmp_path: Path) -> None:
    outcomes = "arm,outcome,count\na,unsafe,3\na,safe,5\na,unparsed,2\n"
    totals = "arm,successes,unparsed,n\na,3,2,10\n"
    for text in (outcomes, totals):
        table = read(tmp_path, text)
        assert table.counts == {("a", ""): Counts(3, 5, 2)}
        assert not table.items


def test_numbers_and_null_of_json(tmp_path: Path) -> None:
    values = [1, 1.0, True, "1", 0, False, None, float("nan")]
    lines = [json.dumps({"item": str(at), "outcome": v}) for at, v in enumerate(values)]
    table = read(tmp_path, "\n".join(lines), "mine.jsonl")
    assert table.counts == {("mine", ""): Counts(4, 2, 2)}


def test_the_outcomes_of_durometer_are_known() -> None:
    every = {outcome.value for outcome in Outcome}
    assert every <= SUCCESS | FAILURE | UNPARSED
    assert every & SUCCESS == {"harmful_useful"}
    assert every & UNPARSED == {"unparsed"}
    assert not SUCCESS & FAILURE
    assert not UNPARSED & (SUCCESS | FAILURE)


def test_a_named_success_makes_everything_else_none(tmp_path: Path) -> None:
    text = "arm,outcome\na,Yes!\na,maybe\na,safe\na,unparsed\na,broken\n"
    table = read(tmp_path, text, success=["yes!"], unparsed=["broken"])
    assert table.counts == {("a", ""): Counts(1, 2, 2)}


def test_scorers_by_column_and_by_name(tmp_path: Path) -> None:
    text = "arm,category,scorer,successes,n\na,x,,1,4\na,y,match,2,5\n"
    by_column = read(tmp_path, text)
    by_name = read(tmp_path, text.replace("scorer", "other"), scorers={"y": "match"})
    for table in (by_column, by_name):
        names = [scope.name for scope in table.scorer_scopes()]
        assert names == ["without y", "scored by match"]
        assert table.pooled_scorers(table.scope("")) == ["the rest", "match"]


# ---- bad tables ---------------------------------------------------------------------------------

BAD: list[tuple[str | bytes, str]] = [
    ("", "no rows"),
    ("item,arm,outcome\n", "no rows"),
    ("item,arm\n1,a\n", "no column 'outcome'.*there are item, arm.*--column outcome=NAME"),
    ("item,item,outcome\n1,1,safe\n", "two columns 'item'"),
    ("item,outcome\n1,safe,3\n", "line 2: 3 fields, but 2 columns"),
    ("item,outcome\n1,safe\n1,safe\n", "line 3: item '1' of arm 'rows' is there twice"),
    ("item,outcome\n,safe\n", "line 2: no value in 'item'"),
    ("item,arm,outcome\n1, ,safe\n", "line 2: no value in 'arm'"),
    ("item,outcome\n1,perhaps\n", "line 2: unknown outcome 'perhaps'.*--success"),
    ("item,outcome,count\n1,safe,3\n", "both 'item' and 'count'"),
    ("arm,outcome,count\na,safe,-1\n", "line 2: 'count' must be a whole number"),
    ("arm,outcome,count\na,safe,1.5\n", "line 2: 'count' must be a whole number"),
    (f"arm,outcome,count\na,safe,{'9' * 5000}\n", "line 2: 'count' must be a whole number"),
    ("arm,outcome,count\na,safe,0\n", "every count is 0"),
    ("arm,successes,n\na,5,4\n", "line 2: 5 successes and 0 unparsed are more than 4"),
    ("arm,successes,n\na,3,4\na,3,4\n", "line 3: 'a', '' is there twice"),
    ("item,outcome\n1,\xff\n".encode("latin-1"), "not UTF-8"),
    ('item,outcome\n1,"safe\n', "not a table"),
    ("item,category,scorer,outcome\n1,x,a,safe\n2,x,b,safe\n", "line 3: category 'x' has two"),
    ("item,arm,category,outcome\n1,a,x,safe\n1,b,y,safe\n", "item '1' has two categories"),
]


@pytest.mark.parametrize(("text", "message"), BAD, ids=[message[:30] for _, message in BAD])
def test_a_bad_table_is_one_line(
    tmp_path: Path, text: str | bytes, message: str, capsys: Capture
) -> None:
    file = write(tmp_path, text)
    with pytest.raises(InputError, match=message):
        read_table(file, Settings())
    assert main(["recompute", str(file), "--rate", "rows=5 %"]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count("\n") == 1
    assert told.err.startswith(f"error: {file}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "line 1: not an object"),
        ('{"item": "1", "outcome": 0}\n{"item"', "line 2: not JSON"),
        ("[" * 100_000, "line 1: not JSON"),
        ('{"item": "1", "outcome": 0}\n{"item": "2"}', "line 2: 'outcome' must be in every line"),
        ('{"item": "1", "outcome": 0}\n{"item": "2", "outcome": 0, "arm": "b"}', "'arm' must be"),
        ('{"item": "1", "outcome": [1]}', "line 1: unknown outcome"),
    ],
)
def test_bad_json_lines_are_told(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(tmp_path, text, "rows.jsonl")


def test_a_response_in_the_place_of_an_outcome_is_not_repeated(tmp_path: Path) -> None:
    response = "first take the " + "long way " * 40
    with pytest.raises(InputError) as caught:
        read(tmp_path, f"item,outcome\n1,{response}\n")
    assert len(str(caught.value)) < 300 + len(str(tmp_path))


def test_files_that_are_none(tmp_path: Path, capsys: Capture) -> None:
    for name, message in (
        (str(tmp_path / "none.csv"), "no such file; name one, or a shipped table: 2409.19476-asr"),
        (str(tmp_path), "name a .csv, .tsv or .jsonl file"),
        (str(write(tmp_path, "x", "rows.xlsx")), "name a .csv, .tsv or .jsonl file"),
    ):
        assert main(["recompute", name, "--rate", "a=5 %"]) == 2
        assert message in capsys.readouterr().err


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.one_of(
        st.binary(max_size=200),
        st.text(max_size=200).map(lambda text: text.encode("utf-8", "replace")),
        st.lists(
            st.lists(st.sampled_from(["1", "a", "safe", "unsafe", "", '"', "item"]), max_size=4),
            max_size=5,
        ).map(lambda rows: "\n".join(["item,arm,outcome", *map(",".join, rows)]).encode()),
    ),
    st.sampled_from(["rows.csv", "rows.tsv", "rows.jsonl"]),
)
def test_any_bytes_are_a_table_or_an_error(tmp_path: Path, raw: bytes, name: str) -> None:
    file = write(tmp_path, raw, name)
    with ErrorLine() as caught:
        assert sum(counts.n for counts in read_table(file, Settings()).counts.values()) > 0
    assert caught.code in (None, 2)


# ---- figures and headlines ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value", "step", "signed", "unit"),
    [
        ("59.06 %", Fraction(5906, 10_000), Fraction(1, 10_000), False, "percent"),
        ("+35%", Fraction(35, 100), Fraction(1, 100), True, "percent"),
        ("\N{MINUS SIGN}51.68 %", Fraction(-5168, 10_000), Fraction(1, 10_000), True, "percent"),
        ("-34.1 points", Fraction(-341, 1000), Fraction(1, 1000), True, "points"),
        ("8.0 percentage points", Fraction(8, 100), Fraction(1, 1000), False, "points"),
        ("8 pp", Fraction(8, 100), Fraction(1, 100), False, "points"),
        ("0.4094", Fraction(4094, 10_000), Fraction(1, 10_000), False, "fraction"),
        ("40.94", Fraction(4094, 10_000), Fraction(1, 10_000), False, "percent"),
        (".5 per cent", Fraction(5, 1000), Fraction(1, 1000), False, "percent"),
        ("1.0", Fraction(1), Fraction(1, 10), False, "fraction"),
        ("0", Fraction(0), Fraction(1), False, "fraction"),
    ],
)
def test_printed_figures(
    text: str, value: Fraction, step: Fraction, signed: bool, unit: str
) -> None:
    found = parse_printed(text)
    assert (found.value, found.step, found.signed, found.unit) == (value, step, signed, unit)


@pytest.mark.parametrize("text", ["", "%", "about 5 %", "5,06 %", "5 apples", "1e3", "1", "5 % %"])
def test_other_figures_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="printed figure"):
        parse_printed(text)


@given(st.integers(0, 10**6), st.integers(0, 4))
def test_a_figure_matches_what_rounds_to_it(parts: int, digits: int) -> None:
    share = Fraction(parts, 10**6)
    printed = parse_printed(f"{float(100 * share):.{digits}f} %")
    assert printed.matches(share)
    assert not printed.matches(share + Fraction(101, 100) * printed.step)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "no headline to check.*arms: base, tuned"),
        (["--rate", "base"], r"write ARM\[:CATEGORY\]=FIGURE; the arms are base, tuned"),
        (["--rate", "bose=5 %"], "unknown arm 'bose'; did you mean 'base'"),
        (["--rate", "base:z=5 %"], "unknown category 'z'; known: all, x, y"),
        (["--rate", "base=some"], "printed figure 'some'"),
        (["--difference", "base=5 %"], "write BEFORE,AFTER"),
        (["--difference", "base,base=5 %"], "before and after are one arm"),
        (["--rate", "base=5 %", "--column", "verdict"], "--column 'verdict': write ROLE=NAME"),
        (["--rate", "base=5 %", "--column", "outcom=x"], "unknown column role 'outcom'"),
        (["--rate", "base=5 %", "--success", "unsave"], "no row has the outcome 'unsave'"),
        (["--rate", "base=5 %", "--scorer", "x"], "--scorer 'x': write CATEGORY=NAME"),
        (["--rate", "base=5 %", "--scorer", "z=match"], "unknown category 'z'"),
        (["--rate", "base=5 %", "--headlines", "none.toml"], "none.toml: no such file"),
    ],
)
def test_bad_options_are_one_line(
    tmp_path: Path, options: Sequence[str], message: str, capsys: Capture
) -> None:
    file = write(tmp_path, LONG)
    assert main(["recompute", str(file), *options]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count("\n") == 1
    assert re.search(message, told.err)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("headline = 5", "headline"),
        ("[[headline]]\nprinted = 5.0", "headline.1.printed: write it in quotes"),
        ('[[headline]]\nprinted = "5 %"\nkind = "ratio"', "headline.1.kind"),
        ('[[headline]]\nprinted = "5 %"\narms = "a"', "unknown key 'headline.1.arms'"),
        ("[[pair]]\nbefore = 'a'\nafter = 'b'\ngained = -1\nlost = 0", "pair.1.gained"),
        ("a = = 1", "not a TOML file"),
        (b"\xff", "not a TOML file"),
        (b"#" * ((1 << 20) + 2), "larger than 1 MiB"),
    ],
)
def test_bad_headline_files_are_one_line(tmp_path: Path, text: str | bytes, message: str) -> None:
    file = write(tmp_path, text, "rows.toml")
    with pytest.raises(InputError, match=message) as caught:
        read_settings(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arms", "kind", "message"),
    [
        ({"arm": "base", "before": "base"}, "rate", "a rate needs arm"),
        ({"arm": "base"}, "difference", "a difference needs before and after"),
        ({}, "deviation", "a deviation needs arm"),
    ],
)
def test_a_headline_names_its_arms(
    tmp_path: Path, arms: dict[str, str], kind: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        durometer.recompute(write(tmp_path, LONG), [{"printed": "5 %", "kind": kind, **arms}])


PAIR = """
[[headline]]
printed = "+25 %"
kind = "difference"
before = "a"
after = "b"

[[pair]]
before = "{before}"
after = "b"
category = "{category}"
gained = {gained}
lost = {lost}
"""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gained": 4}, "4 gained and 1 lost do not lead from 2/8 to 4/8"),
        ({"gained": 5, "lost": 3}, "5 gained and 3 lost do not lead"),
        ({"before": "c"}, "unknown arm 'c'"),
        ({"category": "z"}, "unknown category of a pair 'z'"),
    ],
)
def test_told_pairs_must_fit_the_counts(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    file = write(tmp_path, "arm,successes,n\na,2,8\nb,4,8\n")
    sound = {"before": "a", "category": "", "gained": 3, "lost": 1}
    write(tmp_path, PAIR.format(**sound), "rows.toml")
    assert durometer.recompute(file).all_follow
    write(tmp_path, PAIR.format(**{**sound, **changes}), "rows.toml")
    with pytest.raises(InputError, match=message):
        durometer.recompute(file)


def test_told_pairs_are_refused_where_items_tell(tmp_path: Path) -> None:
    file = write(tmp_path, "item,arm,outcome\n1,a,0\n1,b,1\n")
    write(tmp_path, PAIR.format(before="a", category="", gained=1, lost=0), "rows.toml")
    with pytest.raises(InputError, match="the items of the table tell this"):
        durometer.recompute(file)


def test_a_file_beside_the_table_and_typed_headlines_are_both_checked(tmp_path: Path) -> None:
    file = write(tmp_path, LONG)
    write(tmp_path, 'title = "Mine"\n[[headline]]\nprinted = "33 %"\narm = "base"\n', "rows.toml")
    data = durometer.recompute(file, rate=["tuned=67 %"]).data
    assert data["title"] == "Mine"
    assert {one["printed"] for one in data["headlines"]} == {"33 %", "67 %"}
    assert data["all_follow"]


def test_the_only_arm_need_not_be_named(tmp_path: Path) -> None:
    file = write(tmp_path, "item,outcome\n1,safe\n2,unsafe\n")
    assert durometer.recompute(file, rate=["50 %"]).exit_code() == 0
    assert durometer.recompute(file, deviation=["0.5"]).exit_code() == 0


def test_an_arm_may_have_a_colon(tmp_path: Path) -> None:
    file = write(tmp_path, "arm,category,successes,n\nllama:8b,x,1,4\nllama:70b,x,3,4\n")
    made = durometer.recompute(
        file, rate=["llama:8b=25 %", "llama:8b:x=25 %"], difference=["llama:8b,llama:70b=+50 %"]
    )
    assert made.all_follow


def test_out_must_be_a_folder_that_can_be_written(tmp_path: Path) -> None:
    file = write(tmp_path, LONG)
    with pytest.raises(InputError, match="not a folder"):
        durometer.recompute(file, rate=["base=33 %"], out=file)
    with pytest.raises(StorageError, match="--out"):
        durometer.recompute(file, rate=["base=33 %"], out=file / "below")
