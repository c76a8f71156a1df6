"""The command line as a user meets it: every command, on real files, in this process."""

import io
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import cli_world
import pytest
import tiny_world
from cli_world import Files, arguments, process, stress, summary_of

from durometer import demo as demo_module
from durometer.cli import main
from durometer.core.cache import cached_folder
from durometer.core.errors import ExitCode, StorageError
from durometer.options import free_folder, read_config, resume_command
from durometer.progress import CampaignProgress
from durometer.subjects.builtin import BuiltinSubject, subject_registry
from durometer.subjects.load import load_subject
from durometer.tampers.base import tamper_registry
from durometer.tampers.lora import LoraSettings
from durometer.trials.campaign import Request
from durometer.trials.estimate import estimate
from durometer.trials.record import CheckpointRecord, TrialRecord, TrialSpec

OUTPUTS = ("summary.json", "trials.jsonl", "report.html")
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return cli_world.write_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="session")
def broken(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run in which the safeguard broke."""
    out = tmp_path_factory.mktemp("broken") / "out"
    assert stress(files, out) == 0
    return out


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


# ---------------------------------------------------------------- the front door


def test_help_and_version_load_no_heavy_library() -> None:
    program = (
        "import sys; from durometer.cli import main\n"
        "codes = [main(words) for words in ([], ['--help'], ['--version'], ['stress', '--help'])]\n"
        "print(codes, sorted({'torch', 'transformers', 'numpy'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith("[0, 0, 0, 0] []\n")
    assert done.stderr == ""


def test_version_is_that_of_the_package(capsys: Capture) -> None:
    from durometer import __version__

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"durometer {__version__}\n"


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["stress"],
        ["report"],
        ["list"],
        ["fetch"],
        ["cache"],
        ["domain"],
        ["demo"],
        ["screen-quantisation"],
    ],
)
def test_every_command_has_help(words: list[str], capsys: Capture) -> None:
    assert main([*words, "--help"]) == 0
    shown = capsys.readouterr()
    assert "Usage: durometer" in shown.out
    assert shown.err == ""


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["strss"],
            "error: No such command 'strss'. Did you mean 'stress'? (see 'durometer --help')",
        ),
        (["stress", "x", "--sed", "1"], "error: No such option: --sed"),
        (["stress", "x", "--seeds", "many"], "error: Invalid value for '--seeds': "),
        (["stress", "x", "--seeds"], "error: Option '--seeds' requires an argument."),
        (["stress", "x", "--fail-on", "broken"], "error: Invalid value for '--fail-on': "),
        (["stress", "x", "--dtype", "int4"], "error: Invalid value for '--dtype': "),
        (["stress", "x", "y"], "error: Got unexpected extra argument"),
        (["report"], "error: Missing argument 'DIR'."),
        (["domain", "chek"], "error: No such command 'chek'. Did you mean 'check'?"),
        (["list", "tamper"], "error: unknown kind 'tamper'; did you mean 'tampers'?"),
        (["list", "tampers", "lor"], "error: unknown tamper 'lor'; did you mean 'lora'?"),
        (["list", "subjects", "mico"], "error: unknown subject 'mico'; did you mean 'micro'?"),
        (["fetch", "smollm"], "error: unknown model to fetch 'smollm'; did you mean 'smollm2'?"),
        (["report", "nowhere"], "error: nowhere: no run here"),
        (
            ["domain", "check", "capitls"],
            "error: unknown domain 'capitls'; did you mean 'capitals'?",
        ),
    ],
)
def test_wrong_usage_is_one_line(words: list[str], expected: str, capsys: Capture) -> None:
    assert main(words) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(expected)
    assert shown.err.count("\n") == 1


# ---------------------------------------------------------------- what goes wrong inside


def raising(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> int:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr("durometer.listing.listed", fail)
    return main(["list"])


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (StorageError("two\nlines \x1b[2J"), 3, "error: two lines ?[2J\n"),
        (
            OSError(28, "No space left on device", "/x/y"),
            3,
            "error: /x/y: No space left on device; ",
        ),
        (OSError(30, "Read-only file system"), 3, "error: Read-only file system; free some space"),
        (OSError(5, "Input/output error"), 4, "internal error: OSError: [Errno 5] Input/output"),
        (
            ZeroDivisionError("by zero"),
            4,
            "internal error: ZeroDivisionError: by zero (set DUROMETER_",
        ),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_an_exception_is_one_line_and_an_exit_code(
    error: BaseException, code: int, line: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.delenv("DUROMETER_DEBUG", raising=False)
    assert raising(error, monkeypatch) == code
    shown = capsys.readouterr().err
    assert shown.startswith(line)
    assert shown.count("\n") == 1


def test_a_traceback_is_shown_only_when_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("DUROMETER_DEBUG", "1")
    assert raising(ZeroDivisionError("by zero"), monkeypatch) == ExitCode.INTERNAL_ERROR
    assert "Traceback (most recent call last)" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="pipes break otherwise on Windows")
def test_a_reader_that_goes_away_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    program = "import sys; from durometer.cli import main; sys.exit(main(['--help']))"
    done = subprocess.run(
        [sys.executable, "-c", program], stdout=writing, stderr=subprocess.PIPE, check=False
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (ExitCode.BROKEN_PIPE, b"")


# ---------------------------------------------------------------- stress and report


def test_a_run_prints_its_table_and_where_the_report_is(broken: Path, capsys: Capture) -> None:
    assert main(["report", str(broken)]) == 0
    shown = capsys.readouterr()
    assert "lora" in shown.out
    assert "Broken: lora brings half of the restricted answers back" in shown.out
    assert shown.out.endswith(f"report: {broken / 'report.html'}\n")
    assert all(line == line.rstrip() for line in shown.out.splitlines())
    assert "\x1b" not in shown.out
    assert shown.err == ""


def test_json_is_the_summary_and_nothing_else(broken: Path, files: Files, capsys: Capture) -> None:
    written = json.loads((broken / "summary.json").read_text("utf-8"))
    assert main(["report", str(broken), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == written
    assert main(arguments(files, broken, "--resume", "--json")) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["tampers"] == written["tampers"]
    assert ", reused" in shown.err


def test_progress_is_a_plain_line_a_trial_where_there_is_no_terminal(
    files: Files, out: Path, capsys: Capture
) -> None:
    assert stress(files, out) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == [f"loading {files.safe}", "6 trials of at most 16 steps in all"]
    assert lines[2].startswith("[1/6] measure safe before any tamper: done, 0 steps, success 0 %, ")
    assert lines[4].startswith("[3/6] attack lora seed 1 on base: done, 4 steps, success ")
    assert lines[6].startswith("[5/6] again, attack lora seed 1001 on safe: done, ")
    assert len(lines) == 8
    assert "\x1b" not in "".join(lines)


def test_fail_on_broke_is_exit_code_1(broken: Path, files: Files, out: Path) -> None:
    assert json.loads((broken / "summary.json").read_text())["tampers"][0]["broke"]
    assert main(arguments(files, broken, "--resume", "--fail-on", "broke")) == 1
    words = ["stress", str(files.safe), "--domain", str(files.easy), "--out", str(out)]
    words += ["--seeds", "1", "--tamper", "lora:learning_rate=1e-9,steps=1", "--fail-on", "broke"]
    assert main(words) == 0


def test_outputs_are_made_again_from_the_records(broken: Path, tmp_path: Path) -> None:
    copy = tmp_path / broken.name  # which the page shows
    copy.mkdir()
    (copy / "trials.sqlite").write_bytes((broken / "trials.sqlite").read_bytes())
    assert main(["report", str(copy)]) == 0
    for name in OUTPUTS:
        assert (copy / name).read_bytes() == (broken / name).read_bytes()


def test_the_run_folder_is_the_first_free_one(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert free_folder("org/model", "./a b/", "quick") == Path("durometer-runs/model-a-b-quick-1")
    words = arguments(files, Path("unused"))
    del words[words.index("--out") : words.index("--out") + 2]
    assert main([*words, "--tamper", "nope"]) == 2
    assert list((tmp_path / "durometer-runs").glob("*")) == []
    for number in (1, 2):
        assert main(words) == 0
        folder = tmp_path / "durometer-runs" / f"safe-easy-quick-{number}"
        assert {path.name for path in folder.iterdir()} == {*OUTPUTS, "trials.sqlite"}
    assert main([*words, "--resume"]) == 2


def test_the_command_to_go_on_with_asks_for_the_same(broken: Path) -> None:
    request = Request(
        "a b", "w:knowledge", "full", "u", "r", ("lora:rank=1", "finetune"), 2, 8, "float32", "cpu"
    )
    command = resume_command(request, broken)
    assert command == (
        "durometer stress 'a b' --domain w:knowledge --suite full --undefended u --reference r "
        f"--tamper lora:rank=1 --tamper finetune --seeds 2 --budget-steps 8 --dtype float32 "
        f"--device cpu --out {broken} --resume"
    )


def test_measures_asked_for_survive_a_file_and_the_command_to_go_on(tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text("measure = ['extraction', 'theirs']")
    assert read_config(config, {"measure": False}) == {"measure": ["extraction", "theirs"]}
    command = resume_command(Request("a", "w", measures=("extraction", "theirs")), tmp_path)
    assert "--measure extraction --measure theirs --out" in command


def test_an_unknown_measure_is_one_line(files: Files, out: Path, capsys: Capture) -> None:
    assert stress(files, out, "--measure", "extracton") == 2
    expected = "error: unknown measure 'extracton'; did you mean 'extraction'?"
    assert capsys.readouterr().err.splitlines()[-1] == expected
    assert not out.exists()


def test_what_is_cached_is_not_announced_as_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DUROMETER_CACHE", str(tmp_path))
    for _ in range(2):
        cached_folder("thing", "0" * 64, lambda folder: None)
    told = "making thing, which takes a while; it is kept for the next time"
    assert [record.getMessage() for record in caplog.records] == [told]


def test_a_dry_run_measures_and_writes_nothing(
    files: Files, out: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(arguments(files, out, "--dry-run")) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in shown[1:]] == ["trials", "time", "memory", "disk"]
    assert shown[1].split()[1:] == ["6,", "of", "at", "most", "16", "updates", "in", "all"]
    assert main(arguments(files, out, "--dry-run", "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["trials"] == 6
    assert 0 < found["seconds_unbroken"] <= found["seconds"]
    assert found["memory"] > 0
    assert 0 < found["disk"] < found["disk_free"]
    assert not out.exists()


def test_a_dry_run_leaves_the_subject_as_it_was_and_bounds_the_real_run(
    files: Files, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []

    def load(*given: Any, **options: Any) -> Any:
        loaded.append(load_subject(*given, **options))
        return loaded[-1]

    monkeypatch.setattr("durometer.trials.campaign.load_subject", load)
    request = Request(
        str(files.safe), str(files.easy), undefended=str(files.base), tampers=("nosuch",)
    )
    request = replace(
        request, tampers=("finetune:schedule=linear", "lora"), seeds=2, budget_steps=4
    )
    found = estimate(request, out, CampaignProgress("estimating"))
    before = load_subject(str(files.safe))
    assert loaded[0].fingerprint == before.fingerprint
    # 2 zero-step controls, 2 x 2 attacks, 2 on the undefended subject, 2 fresh ones; a decaying
    # schedule needs a run for each of the steps 1 to 4.
    assert found.trials == 2 + 4 + 2 + 2
    assert found.updates == 3 * (1 + 2 + 3 + 4) + 3 * 4 + 2 * (1 + 2 + 3 + 4)
    assert found.not_measured == {}


# ---------------------------------------------------------------- TOML files


def test_a_config_file_is_as_good_as_typing(files: Files, broken: Path, out: Path) -> None:
    config = out.parent / "run.toml"
    config.write_text(
        f"""
subject = "{files.safe}"
domain = "{files.easy}"
undefended = "{files.base}"
out = "{out}"
seeds = 3
budget-steps = 4
json = false

[[attack]]
tamper = "lora"
learning_rate = 1e-2
rank = 4
retain_share = 0.5
"""
    )
    assert main(["stress", "--config", str(config), "--seeds", "1"]) == 0
    assert summary_of(out) == summary_of(broken)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sedes = 3", "unknown key 'sedes'; did you mean 'seeds'?"),
        ("config = 'x'", "unknown key 'config'"),
        ("seeds = 'many'", "Invalid value for '--seeds'"),
        ("seeds = 2.5", "Invalid value for '--seeds'"),
        ("seeds = true", "seeds = True: not a value that this option can have"),
        ("resume = 'perhaps'", "resume = 'perhaps': not a value that this option can have"),
        ("seeds = [1]", "seeds = [1]: not a value that this option can have"),
        ("tamper = 3", "tamper = 3: not a value that this option can have"),
        ("[[attack]]\nrank = 2", 'every [[attack]] needs tamper = "NAME"'),
        ("[attack]\ntamper = 'lora'", "must be tables, each headed [[attack]]"),
        ("[[attack]]\ntamper = 'lor'", "unknown tamper 'lor'; did you mean 'lora'?"),
        ("[[attack]]\ntamper = 'lora'\nranks = 2", "'ranks'; did you mean 'rank'?"),
        ("[[attack]]\ntamper = 'lora'\nrank = 0", "tamper 'lora': rank = 0: input should be"),
        ("seeds = = 2", "cannot be read: Invalid value"),
    ],
)
def test_a_config_file_with_a_mistake(
    tmp_path: Path, capsys: Capture, text: str, expected: str
) -> None:
    file = tmp_path / "run.toml"
    file.write_text(text)
    assert main(["stress", "micro-refusal", "--config", str(file)]) == 2
    shown = capsys.readouterr().err
    assert expected in shown
    assert shown.count("\n") == 1


def test_a_config_file_that_is_not_there(tmp_path: Path, capsys: Capture) -> None:
    assert main(["stress", "--config", str(tmp_path / "none.toml")]) == 2
    assert "none.toml: cannot be read: No such file" in capsys.readouterr().err


def test_settings_of_every_type_survive_the_way_through_a_config_file(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    given = LoraSettings(
        learning_rate=3e-5,
        rank=2,
        frozen_a=True,
        system_prompt="Be brief, and kind; x=1 is no name",
    )
    values = given.model_dump(exclude_unset=True)
    body = "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items())
    file.write_text(f"tamper = ['finetune']\n[[attack]]\ntamper = 'lora'\n{body}")
    plain, text = read_config(file, {"tamper": False})["tamper"]
    assert plain == "finetune"
    from durometer.trials.campaign import chosen_suite

    suite = chosen_suite(Request("s", "d", tampers=(text,)), 0)
    own = {name: suite.attacks[0].settings[name] for name in values}
    assert LoraSettings(**own) == given


# ---------------------------------------------------------------- lists, domains, the cache


def test_lists_have_one_line_a_thing(capsys: Capture) -> None:
    assert main(["list", "tampers"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["name", "access", "cost", "what", "it", "does", "source"]
    assert [line.split()[0] for line in lines[1:]] == tamper_registry.names()
    for line, (_, entry) in zip(lines[1:], tamper_registry, strict=True):
        for fact in (entry.access_level, entry.access, entry.cost, entry.summary, entry.source):
            assert fact in line
    assert main(["list"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [w for w in shown if w in ("subjects", "domains", "tampers", "measures", "suites")] == [
        "subjects",
        "domains",
        "tampers",
        "measures",
        "suites",
    ]
    assert main(["list", "subjects", "micro-refusal"]) == 0
    assert "safeguard for the domain 'world'" in capsys.readouterr().out


def test_a_tampers_settings_are_those_of_its_class(capsys: Capture) -> None:
    assert main(["list", "tampers", "ft-lora"]) == 0
    shown = capsys.readouterr().out
    for setting in LoraSettings.describe():
        row = next(line for line in shown.splitlines() if line.split()[:1] == [setting.name])
        for fact in (setting.default, setting.meaning, setting.search):
            assert fact in row


def test_a_sound_domain(files: Files, capsys: Capture) -> None:
    assert main(["domain", "check", str(files.domain)]) == 0
    shown = capsys.readouterr()
    assert "tiny (refusal), " in shown.out
    row = next(line for line in shown.out.splitlines() if line.startswith("restricted entities"))
    assert row.split()[2:] == ["14", "12", "6", "10", "6"]
    assert "sound: no prompt and no restricted entity is in two splits" in shown.out


def test_the_cache_is_listed_and_cleared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("DUROMETER_CACHE", str(tmp_path / "cache"))
    assert main(["cache"]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'cache'}: 0 bytes ")
    (tmp_path / "cache" / "micro-0").mkdir(parents=True)
    (tmp_path / "cache" / "micro-0" / "weights").write_bytes(bytes(2500))
    assert main(["cache"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["micro-0", "2", "kB"]
    assert main(["cache", "--clear"]) == 0
    assert capsys.readouterr().out == f"freed 2 kB in {tmp_path / 'cache'}\n"
    assert list((tmp_path / "cache").iterdir()) == []


# ---------------------------------------------------------------- progress on a terminal


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


SPEC = TrialSpec("subject", "lora", {}, 2, "screen", (1, 2, 4))


def test_bars_are_drawn_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    item = {"probe": "outcomes", "split": "select", "correct": 1.0}
    checkpoint = CheckpointRecord(2, {}, None, [item, item | {"correct": 0.0}])
    with CampaignProgress("loading x") as progress:
        progress.planned(3, 12)
        progress.started(SPEC, "x")
        progress.updated(2, 4, 0.5)
        progress.measured(checkpoint)
        record = TrialRecord("key", SPEC, "diverged", "no end", [checkpoint], seconds=61.0)
        progress.finished(record, reused=False)
        assert progress._live is not None
        progress._live.refresh()
    drawn = terminal.getvalue()
    assert "\x1b[?25l" in drawn  # the cursor is hidden,
    assert drawn.rindex("\x1b[?25h") > drawn.rindex("\x1b[?25l")  # and comes back
    for words in ("attack lora seed 2 on x", "2/4", "loss 0.500  success 50 %", "1/3"):
        assert words in drawn
    assert "about 2:02 left" in drawn
    assert "[1/3] attack lora seed 2 on x: diverged, 2 steps, success 50 %, 61.0 s, no end" in drawn


def test_a_terminal_that_cannot_draw_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "dumb")
    with CampaignProgress("loading x") as progress:
        progress.planned(3, 12)
    assert terminal.getvalue() == "loading x\n3 trials of at most 12 steps in all\n"


# ---------------------------------------------------------------- the demonstration


@pytest.fixture
def tiny_demo(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demonstration's parts with the tiny model in place of the real one."""
    easy, settings = str(files.easy), tiny_world.REFUSING
    monkeypatch.setattr(demo_module, "BUILT_IN", (("smollm2", easy, settings),))
    base = BuiltinSubject("tiny", lambda: files.base)
    monkeypatch.setitem(subject_registry._entries, "smollm2", base)
    safe = replace(subject_registry.get("smollm2-refusal"), folder=lambda: files.safe, domain=easy)
    monkeypatch.setitem(subject_registry._entries, "smollm2-refusal", safe)
    from durometer.trials import suites

    quick = suites._quick

    def quicker(tiny: bool) -> suites.Suite:
        suite = quick(tiny)
        attacks = tuple(
            suites.Attack(a.tamper, {"steps": 4, "learning_rate": 1e-2, "retain_share": 0.5})
            for a in suite.attacks[1:2]
        )
        return replace(suite, steps=4, attacks=attacks)

    monkeypatch.setattr(suites, "_quick", quicker)


@pytest.mark.usefixtures("tiny_demo")
def test_the_demonstration(out: Path, capsys: Capture) -> None:
    assert main(["demo", "--out", str(out), "--seeds", "1"]) == 0
    shown = capsys.readouterr()
    lines = shown.err.splitlines()
    assert lines[0].startswith("1. smollm2 is taught to refuse questions of the domain")
    rows = {line.split("  ")[0]: line.split()[-4:] for line in lines if line.endswith("%")}
    assert rows["restricted questions refused"][0] == "0.0"
    assert float(rows["restricted questions refused"][2]) > 90
    assert "other knowledge kept (right answers)" in rows
    assert "Broken: lora brings half" in shown.out
    assert f"report: {out / 'report.html'}" in shown.out


@pytest.mark.usefixtures("tiny_demo")
def test_the_demonstration_can_be_stopped_while_the_safeguard_is_installed(
    out: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(demo_module, "safeguarded_folder", stop)
    assert main(["demo", "--out", str(out)]) == 130
    assert "nothing is kept" in capsys.readouterr().err
    assert not out.exists()


def test_the_demonstration_says_where_its_model_comes_from(
    out: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DUROMETER_CACHE", str(tmp_path))
    monkeypatch.setattr("durometer.subjects.builtin.installed_smollm2", lambda: None)
    assert main(["demo", "--out", str(out)]) == 2
    assert "run: durometer fetch smollm2" in capsys.readouterr().err


def test_python_m_durometer() -> None:
    done = process("list", "subjects")
    assert done.returncode == 0
    assert "micro-refusal" in done.stdout
