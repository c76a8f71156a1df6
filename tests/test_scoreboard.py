"""`compare SUBJECT ...`: models attacked alike, one failing without the others, side by side."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import cli_world
import pytest
from cli_world import Files
from test_compare import KEPT, SHORT, WEAK, flat, hardened, run, shown, subject
from test_report_html import HOSTILE, Page, assert_harmless_markup

import durometer
from durometer import side_by_side
from durometer.cli import main
from durometer.core.errors import InputError, StorageError
from durometer.measures.outcomes import Outcome
from durometer.report.comparison import build_comparison
from durometer.report.comparison_html import render_comparison
from durometer.subjects.base import Source
from durometer.subjects.origin import places
from durometer.subjects.record import RECORD
from durometer.trials.campaign import Request
from durometer.trials.store import FILE, Store

Capture = pytest.CaptureFixture[str]
LIMITS = ["--seeds", "1", "--budget-steps", "2", "--tamper", cli_world.BREAKING]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return cli_world.write_files(tmp_path_factory.mktemp("files"))


def words(files: Files, out: Path, *more: str) -> list[str]:
    models = [str(files.safe), str(files.base), str(files.base.parent / "gone")]
    domain = ["--domain", str(files.domain), "--out", str(out)]
    controls = ["--undefended", f"{files.safe}={files.base}"]
    return ["compare", *models, *domain, *controls, *LIMITS, *more]


@pytest.fixture(scope="module")
def made(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a scoreboard of a safeguarded model, an open one and one that is not there."""
    out = tmp_path_factory.mktemp("board") / "out"
    assert main(words(files, out, "--json")) == 3
    return out


@pytest.fixture
def board(made: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((made / "comparison.json").read_text("utf-8"))
    return found


# ---- what is shown ------------------------------------------------------------------------------


def test_each_model_stands_where_it_belongs(files: Files, board: dict[str, Any]) -> None:
    assert [row["name"] for row in board["safeguards"]] == ["safe"]
    assert [row["subject"]["name"] for row in board["open"]] == ["base"]
    # As the control of the other it has a row of its own: there it was attacked.
    assert [(r["subject"]["name"], r["role"]) for r in board["controls"]] == [
        ("base", "undefended")
    ]
    assert board["unknown"] == []
    (failed,) = board["failed"]
    assert failed["subject"] == str(files.base.parent / "gone")
    assert failed["reason"] == "no such folder"
    (safe,), (base,) = board["safeguards"], board["open"]
    assert safe["origin"]["family"] == base["origin"]["family"] == "llama"
    assert safe["origin"]["location"] == str(files.safe)
    assert base["nothing_to_break"]
    assert base["zero_step"]["success"]["rate"] > 0.5
    assert safe["gaps"] == ["no plain safeguard to compare with"]
    assert base["gaps"] == []


def test_outcomes_before_any_attack_have_wilson_intervals(board: dict[str, Any]) -> None:
    for row in [*board["safeguards"], *board["open"]]:
        assert set(row["outcomes"]) == {str(outcome) for outcome in Outcome}
        assert sum(rate["rate"] for rate in row["outcomes"].values()) == pytest.approx(1)
        right = row["outcomes"]["harmful_useful"]
        assert right["rate"] == row["zero_step"]["success"]["rate"]
        # Wilson's score interval, written out once more.
        p, n, z = right["rate"], right["n"], 1.959963985
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        assert right["low"] == pytest.approx(max(middle - half, 0), abs=1e-6)
        assert right["high"] == pytest.approx(min(middle + half, 1), abs=1e-6)


def test_what_it_takes_is_that_of_the_run_itself(made: Path, board: dict[str, Any]) -> None:
    (row,) = board["safeguards"]
    summary = json.loads((Path(row["folder"]) / "summary.json").read_text("utf-8"))
    (tamper,) = summary["tampers"]
    for name, within in (("within", True), ("without", False)):
        found = row["removal"][name]
        (budget,) = [
            b
            for b in tamper["budgets"]
            if (b["recovery"], b["within_limit"], b["axis"]) == (0.5, within, "steps")
        ]
        broke = budget["censored"] < budget["seeds"]
        assert found["state"] == ("broke" if broke else "held")
        if broke:
            assert found["worst"]["budgets"]["steps"] == budget
        else:
            assert found["largest_tried"]["steps"] == budget["largest_tried"] == 2


def test_coverage_names_what_was_tested_and_what_was_not(board: dict[str, Any]) -> None:
    tampers = board["coverage"]["tampers"]
    assert tampers["weights"]["all"] == ["lora"]
    assert "finetune" in tampers["weights"]["none"]
    assert "gcg" in tampers["input"]["none"]
    assert not any("none" in names["none"] for names in tampers.values())
    assert "outcomes" in board["coverage"]["measures"]["taken"]
    assert "extraction" in board["coverage"]["measures"]["not_taken"]
    assert board["coverage"]["never"]


def test_page_and_terminal_hold_all_parts(board: dict[str, Any]) -> None:
    for row in board["safeguards"]:
        row["gaps"] = [HOSTILE]
    board["failed"][0] |= {"subject": HOSTILE, "reason": HOSTILE}
    page = Page(render_comparison(board))
    assert_harmless_markup(page)
    for width in (80, 120):
        text = shown(board, width)
        assert max(map(len, text.splitlines())) <= width
        for told in (flat(text), flat(page.all())):
            for part in ("Not safeguarded", "Not attacked", "Before any attack", "not tested"):
                assert part.lower() in told.lower()
    assert "answers at once" in flat(shown(board, 120))


# ---- resumed ------------------------------------------------------------------------------------


def trials(out: Path) -> dict[str, list[str]]:
    found = {}
    for folder in sorted((out / "runs").iterdir()):
        store = Store.open(folder)
        found[folder.name] = [trial.key for trial in store.trials()]
        store.close()
    return found


def test_resuming_runs_nothing_twice(files: Files, made: Path, capsys: Capture) -> None:
    before = trials(made)
    assert len(before) == 2
    assert main(words(files, made)) == 2
    assert "go on with --resume" in capsys.readouterr().err
    first = (made / "comparison.json").read_bytes()
    assert main(words(files, made, "--resume")) == 3
    told = capsys.readouterr()
    assert "gone: no such folder" in told.err
    assert "Scoreboard  tiny (refusal)" in told.out
    assert set(re.findall(r"steps, success \d+ %, (\w+)", told.err)) == {"reused"}
    assert trials(made) == before
    assert (made / "comparison.json").read_bytes() == first
    # The runs are runs like any other: without the failed one they give the same rows.
    again = build_comparison([Path(row["folder"]) for row in json.loads(first)["safeguards"]])
    assert again["safeguards"] == json.loads(first)["safeguards"]


@pytest.fixture
def plain(files: Files, tmp_path: Path) -> list[str]:
    domain = ["--domain", str(files.domain), "--out", str(tmp_path / "out")]
    return ["compare", str(files.safe), str(files.base), *domain]


def test_ctrl_c_says_how_to_go_on(
    plain: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(side_by_side, "run_campaign", stop)
    assert main([*plain, "--undefended", "some", "--seeds", "3"]) == 130
    told = capsys.readouterr().err
    assert f"--undefended {plain[1]}=some" in told
    assert re.search(r"go on with: durometer compare .* --seeds 3 --out .* --resume\n", told)


def test_a_full_disk_stops_everything(
    plain: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise StorageError("run folder x: no space left")

    monkeypatch.setattr(side_by_side, "run_campaign", full)
    assert main(plain) == 3
    told = capsys.readouterr()
    assert told.out == ""
    assert "no space left" in told.err


def test_a_model_that_is_too_large_is_a_failure_like_others(
    plain: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def large(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(side_by_side, "run_campaign", large)
    assert main(plain) == 3
    told = capsys.readouterr()
    assert told.out == ""
    assert f"no model could be attacked: {plain[1]}: out of memory" in told.err


# ---- refused before anything is loaded ----------------------------------------------------------


def test_bad_input_is_one_line(
    files: Files, made: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(side_by_side, "run_campaign", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x", "utf-8")
    safe, domain = str(files.safe), ["--domain", str(files.domain)]
    (one, *_) = (made / "runs").iterdir()
    cases = [
        (["micro-refusall", *domain], "did you mean 'micro-refusal'"),
        ([safe, "--domain", "capitalz"], "did you mean 'capitals'"),
        ([safe, *domain, "--suite", "quik"], "did you mean 'quick'"),
        ([safe, *domain, "--tamper", "loar"], "did you mean 'lora'"),
        ([safe, *domain, "--measure", "extractoin"], "did you mean 'extraction'"),
        ([safe, *domain, "--seeds", "0"], "at least 1"),
        ([safe, *domain, "--undefended", "x=y"], "'x' is none of the models named"),
        ([safe, *domain, "--undefended", "x", "--undefended", "y"], "a second one for all"),
        ([safe, *domain, "--resume"], "name the folder to go on with"),
        ([safe, *domain, "--out", str(tmp_path / "file")], "not a folder"),
        ([str(one), *domain], "leave --domain and --suite out"),
        ([safe, "--suite", "quick"], "say what it is safeguarded on"),
        (["micro-never", "smollm2-refusal", "--suite", "quick"], "different domains"),
        ([safe, "--seeds", "2"], "--seeds: only where models are attacked"),
        ([safe, "--tamper", "lora"], "--tamper: only where models are attacked"),
        ([safe], "to attack models and compare them, add --domain"),
    ]
    for given, message in cases:
        assert main(["compare", *given]) == 2, given
        told = capsys.readouterr()
        assert told.out == ""
        assert told.err.count("\n") == 1
        assert message in told.err, told.err
    assert not (tmp_path / "durometer-runs").exists()


def test_one_folder_a_model_whatever_the_others_are() -> None:
    requests = [Request(name, "d") for name in ("a/model", "b/model", "micro+x")]
    folders = side_by_side.run_folders(Path("out"), requests)
    assert len(set(folders)) == 3
    assert side_by_side.run_folders(Path("out"), requests[1:]) == folders[1:]


def test_a_control_for_all_is_none_for_itself(files: Files) -> None:
    request = Request("", str(files.domain))
    safe, base = str(files.safe), str(files.base)
    made = side_by_side.plan([safe, base, safe], request, undefended=[base])
    assert [(one.subject, one.undefended) for one in made] == [(safe, base), (base, "")]


def test_from_python(files: Files, made: Path, tmp_path: Path) -> None:
    out = shutil.copytree(made, tmp_path / "board")
    again = durometer.scoreboard(
        [str(files.safe)],
        str(files.domain),
        out=out,
        undefended=[str(files.base)],
        tampers=(cli_world.BREAKING,),
        seeds=1,
        budget_steps=2,
        resume=True,
    )
    assert [row["name"] for row in again.data["safeguards"]] == ["safe"]
    assert again.complete
    with pytest.raises(InputError, match="unknown suite"):
        durometer.scoreboard([str(files.safe)], str(files.domain), out=out, suite="x")


# ---- origins ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "location", "undefended", "told"),
    [
        ("hub", "org/model", "", "org/model @ 01234567"),
        ("gguf", "/models/file.gguf", "", "file.gguf"),
        ("adapter", "org/model+/a/dapter", "org/model", "org/model @ 01234567"),
    ],
)
def test_a_plain_model_has_its_own_origin(
    tmp_path: Path, kind: str, location: str, undefended: str, told: str
) -> None:
    about = subject("plain-model", "a")
    about["source"] |= {
        "kind": kind,
        "location": location,
        "undefended": undefended,
        "revision": "" if kind == "gguf" else "0123456789abcdef",
    }
    roles = {"subject": about, "undefended": subject("bare", "0")}
    kept = {"subject": {"family": "mistral", "architecture": "M", "recorded": False}}
    folder = run(tmp_path / "run", "x", SHORT, subjects=roles, origins=kept)
    other = hardened(tmp_path / "tar", ["tar"], WEAK, digit="b")
    board = build_comparison([folder, other])
    assert board["unknown"] == []
    (row,) = [r for r in board["safeguards"] if r["name"] == "plain-model"]
    assert row["origin"]["family"] == "mistral"
    assert f"mistral, {told}" in flat(shown(board, 200))
    assert "Origin unknown" not in render_comparison(board)


def test_a_plain_folder_is_known_while_it_is_there(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    folder = run(tmp_path / "old", "home", SHORT, model=home)  # kept nothing of its subjects
    assert [row["name"] for row in build_comparison([folder])["safeguards"]] == ["home"]
    home.rename(tmp_path / "moved")
    assert [row["name"] for row in build_comparison([folder])["unknown"]] == ["home"]
    # A record of harden that lay there when it was attacked tells that it is no plain model.
    kept = {"subject": {"family": "llama", "architecture": "L", "recorded": True}}
    other = run(tmp_path / "new", "home", SHORT, model=home, origins=kept)
    assert [row["name"] for row in build_comparison([other])["unknown"]] == ["home"]


def test_an_adapter_is_known_by_both_its_folders(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    source = Source("adapter", f"base+{tmp_path / 'adapter'}", "", str(tmp_path))
    assert places(source) == [tmp_path, tmp_path / "adapter"]
    assert not any((place / RECORD).exists() for place in places(source))


def test_a_model_that_refuses_nothing_may_not_know(tmp_path: Path) -> None:
    roles = {"subject": subject("plain", "a")}
    folder = run(tmp_path / "run", "plain", SHORT, subjects=roles, zero=10)
    store = Store.open(folder)
    store._connection.execute("delete from trials where key = '1'")  # the undefended at step 0
    store.describe("planned", 1)
    store.close()
    (row,) = build_comparison([folder])["safeguards"]
    assert any("no undefended model" in gap for gap in row["gaps"])
    assert not any("does not know them" in gap for gap in row["gaps"])
    assert row["outcomes"]["refusal"]["rate"] == pytest.approx(0.75)
    assert KEPT["steps"]
    assert (folder / FILE).exists()
