"""What goes wrong: every fault is one line and an exit code, and nothing measured is lost."""

import json
import shutil
import signal
import sqlite3
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cli_world
import pytest
import tiny_world
import torch
from cli_world import Files, process, stress, summary_of

from durometer.cli import main
from durometer.core.training import Trainer
from durometer.trials.store import FILE, Store

Run = Callable[..., tuple[int, str]]
FULL_DISK = "database or disk is full"
# Sent at the second update of the second trial of many updates: in the middle, whatever the speed.
AT = 6


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return cli_world.write_files(tmp_path_factory.mktemp("files"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command and return its exit code and the last line on stderr."""

    def call(*words: str) -> tuple[int, str]:
        capsys.readouterr()
        code = main(words)
        lines = capsys.readouterr().err.splitlines()
        assert "Traceback" not in "".join(lines)
        return code, lines[-1] if lines else ""

    return call


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def copy(files: Files, tmp_path: Path) -> Path:
    """A copy of the safeguarded subject's folder, to be damaged."""
    return Path(shutil.copytree(files.safe, tmp_path / "copy"))


@pytest.fixture
def domain(files: Files, tmp_path: Path) -> Path:
    """A copy of the domain's folder, to be damaged."""
    return Path(shutil.copytree(files.easy, tmp_path / "copied-domain"))


@pytest.fixture(scope="session")
def finished_run(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("finished") / "out"
    assert stress(files, out, seeds=2) == 0
    return out


@pytest.fixture(scope="session")
def finished(finished_run: Path) -> Any:
    """The summary of a run that nothing disturbed."""
    return summary_of(finished_run)


@pytest.fixture
def ran(finished_run: Path, out: Path) -> Path:
    """A copy of the finished run, to be damaged."""
    shutil.copytree(finished_run, out)
    return out


# ---------------------------------------------------------------- names and settings


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--tamper", "lra"], "error: unknown tamper 'lra'; did you mean 'lora'?"),
        (["--tamper", "lora:rnk=2"], "tamper 'lora': unknown setting 'rnk'; did you mean 'rank'"),
        (["--tamper", "lora:rank=0"], "tamper 'lora': rank = '0': input should be greater than"),
        (
            ["--tamper", "lora:rank=two"],
            "tamper 'lora': rank = 'two': input should be a valid integer",
        ),
        (["--tamper", "lora:rank"], "'rank' needs a value, as in rank=..."),
        (["--suite", "quikc"], "error: unknown suite 'quikc'; did you mean 'quick'?"),
        (["--seeds", "0"], "error: --seeds 0: at least 1"),
        (["--budget-steps", "0"], "error: --budget-steps 0: at least 1"),
        (["--threads", "0"], "error: --threads 0: at least 1"),
        (["--device", "gpu"], "error: --device gpu: "),
    ],
)
def test_names_and_numbers_that_cannot_be(
    files: Files, run: Run, out: Path, words: list[str], expected: str
) -> None:
    subject = ["stress", str(files.safe), "--domain", str(files.easy), "--out", str(out)]
    code, line = run(*subject, *words)
    assert code == 2
    assert expected in line
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["mircoo", "--domain", "world"], "error: unknown subject 'mircoo'; did you mean 'micro'?"),
        (["mircoo"], "error: unknown subject 'mircoo'; did you mean 'micro'?"),
        (["./none", "--domain", "world"], "error: none: no such folder"),
        (["micro", "--domain", "wold"], "error: unknown domain 'wold'; did you mean 'world'?"),
        (["micro", "--domain", "world:refusals"], "unknown domain kind 'refusals'; did you mean"),
        (["micro", "--domain", "./none"], "error: ./none: no such folder"),
        (["micro"], "error: subject 'micro': say what it is safeguarded on, with --domain"),
        ([], "error: name a subject"),
    ],
)
def test_subjects_and_domains_that_are_not_there(
    run: Run, out: Path, words: list[str], expected: str
) -> None:
    code, line = run("stress", *words, "--out", str(out))
    assert code == 2
    assert expected in line
    assert not out.exists()


def test_an_undefended_subject_must_be_another(files: Files, run: Run, out: Path) -> None:
    words = ["stress", str(files.safe), "--domain", str(files.easy), "--out", str(out)]
    code, line = run(*words, "--undefended", str(files.safe))
    assert (code, "the same weights as the subject's" in line) == (2, True)


def test_a_subject_without_a_safeguard_has_nothing_to_break(
    files: Files, run: Run, out: Path
) -> None:
    code, line = run("stress", str(files.base), "--domain", str(files.domain), "--out", str(out))
    assert code == 2
    assert "is not safeguarded on 'tiny'" in line
    assert "nothing to break" in line


# ---------------------------------------------------------------- model files


def attacked(run: Run, subject: Path, files: Files, out: Path, *more: str) -> tuple[int, str]:
    words = ["--domain", str(files.easy), "--tamper", cli_world.BREAKING, "--seeds", "1"]
    budget = ["--budget-steps", "2", "--out", str(out)]
    return run("stress", str(subject), *words, *budget, *more)


def _truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def _pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def _remote_code(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(config))


def _no_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _other_shapes(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["hidden_size"] = 32
    (folder / "config.json").write_text(json.dumps(config))


def _bad_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% for message in %}")


def _refusing_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no users here') }}")


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (_truncate, "model.safetensors"),
        (_pickle, "pickle"),
        (_remote_code, "remote code is never run"),
        (_no_tokenizer, "no tokenizer"),
        (_no_config, "config.json"),
        (_other_shapes, "copy: "),
        (_bad_template, "chat template"),
        (_refusing_template, "no users here"),
    ],
)
def test_a_model_folder_that_cannot_be_used(
    files: Files, run: Run, out: Path, copy: Path, damage: Callable[[Path], None], expected: str
) -> None:
    damage(copy)
    code, line = attacked(run, copy, files, out)
    assert code == 2
    assert line.startswith("error: ")
    assert expected in line
    assert not out.exists()


@pytest.mark.parametrize(
    "header",
    [
        b"GGUF" + struct.pack("<IQQ", 3, 2**60, 1),
        b"GGUF" + struct.pack("<IQQ", 3, 1, 2**60),
        b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + struct.pack("<Q", 2**62),
        b"GGUF",
        b"",
        b"not a model",
    ],
)
def test_a_gguf_header_that_lies(
    files: Files, run: Run, out: Path, tmp_path: Path, header: bytes
) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(header)
    code, line = attacked(run, file, files, out)
    assert code == 2
    assert line.startswith(f"error: {file}: ")


def test_a_tokenizer_without_a_pad_token_works(
    files: Files, run: Run, out: Path, copy: Path
) -> None:
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    code, _ = attacked(run, copy, files, out, "--undefended", str(files.base))
    assert code == 0


def test_a_subject_without_a_chat_template_works_and_says_so(
    files: Files, out: Path, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / "chat_template.jinja").unlink()
    words = ["stress", str(copy), "--domain", str(files.easy), "--tamper", cli_world.BREAKING]
    code = main([*words, "--seeds", "1", "--budget-steps", "2", "--out", str(out)])
    assert code == 0
    assert "note: 'copy' has no chat template: the plain layout" in capsys.readouterr().err
    notes = json.loads((out / "summary.json").read_text())["subject"]["notes"]
    assert "no chat template" in notes[0]


# ---------------------------------------------------------------- domains


def _rewrite(file: Path, change: Callable[[list[dict[str, Any]]], Any]) -> None:
    lines = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    lines = change(lines) or lines
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")


def test_a_malformed_line_is_named_with_its_file_and_number(run: Run, domain: Path) -> None:
    file = domain / "restricted.jsonl"
    lines = file.read_text("utf-8").splitlines()
    lines[4] = lines[4][:-5]
    file.write_text("\n".join(lines), "utf-8")
    code, line = run("domain", "check", str(domain))
    assert code == 2
    assert f"{file}:5: " in line


def test_an_empty_split(files: Files, run: Run, domain: Path, out: Path) -> None:
    _rewrite(
        domain / "restricted.jsonl",
        lambda lines: [line for line in lines if line["split"] != "report"],
    )
    for words in (["domain", "check"], ["stress", str(files.safe), "--out", str(out), "--domain"]):
        code, line = run(*words, str(domain))
        assert (code, "no restricted items in split 'report'" in line) == (2, True)
    assert not out.exists()


def test_splits_that_overlap(
    files: Files, run: Run, domain: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def leak(lines: list[dict[str, Any]]) -> None:
        stolen = next(line for line in lines if line["split"] == "report")
        lines.append(stolen | {"split": "attack", "id": "leak"})

    _rewrite(domain / "restricted.jsonl", leak)
    code, line = run("stress", str(files.safe), "--out", str(out), "--domain", str(domain))
    assert (code, "splits must be disjoint by entity" in line) == (2, True)
    assert main(["domain", "check", str(domain)]) == 2
    shown = capsys.readouterr()
    assert "restricted/attack - restricted/report" in shown.out
    assert "1 prompts of the latter are also in the former" in shown.err
    assert "1 entities are in both" in shown.err
    assert "sound" not in shown.out


# ---------------------------------------------------------------- attacks that go wrong


def test_an_attack_that_diverges_keeps_its_finite_checkpoints(
    files: Files, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["stress", str(files.safe), "--domain", str(files.easy), "--out", str(out)]
    words += ["--undefended", str(files.base), "--seeds", "1", "--budget-steps", "6"]
    code = main([*words, "--tamper", "finetune:learning_rate=1e30", "--tamper", cli_world.BREAKING])
    assert code == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["status_counts"]["diverged"] == 2  # on the subject and on the undefended one
    tamper = next(t for t in summary["tampers"] if t["name"] == "finetune")
    assert tamper["statuses"]["1"]["status"] == "diverged"
    assert [c["steps"] for c in tamper["checkpoints"]][:2] == [0, 1]
    assert not tamper["broke"]
    assert ": diverged, " in capsys.readouterr().err


def test_a_campaign_of_diverged_attacks_alone_measured_something(
    files: Files, out: Path, run: Run
) -> None:
    words = ["stress", str(files.safe), "--domain", str(files.easy), "--out", str(out)]
    code, _ = run(*words, "--seeds", "1", "--tamper", "finetune:learning_rate=1e30,steps=3")
    summary = json.loads((out / "summary.json").read_text())
    assert summary["status_counts"]["diverged"] >= 1
    assert code == 0


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_subject_with_a_weight_that_is_no_number_is_not_taken_for_a_safe_one(
    files: Files, run: Run, out: Path, tmp_path: Path, value: str
) -> None:
    model = tiny_world.safeguarded().model
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float(value)
    folder = cli_world.write_model(tmp_path / "broken", model)
    code, line = attacked(run, folder, files, out)
    assert code == 2
    assert "the subject subject" not in line
    assert "cannot be measured: its outputs on" in line


def test_an_attack_that_fails_is_counted_and_makes_the_run_incomplete(
    files: Files, out: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = Trainer.update

    def fail(self: Trainer, rows: Any) -> Any:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(Trainer, "update", fail)
    words = cli_world.arguments(files, out)
    assert run(*words, "--fail-on", "broke")[0] == 3
    summary = json.loads((out / "summary.json").read_text())
    assert summary["status_counts"]["errored"] == 2
    assert "the device is gone" in json.dumps(summary["tampers"][0]["statuses"])
    assert summary["verdict"].startswith("Not measured")
    monkeypatch.setattr(Trainer, "update", update)
    assert run(*words, "--resume")[0] == 0
    assert json.loads((out / "summary.json").read_text())["status_counts"]["errored"] == 0


# ---------------------------------------------------------------- disks


def test_an_output_folder_that_cannot_be_written(files: Files, run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, line = attacked(run, files.safe, files, tmp_path / "file" / "below")
    assert code == 3
    assert line.startswith(f"error: run folder {tmp_path / 'file' / 'below'}: ")


class _FullDisk:
    """A connection that refuses the insert number ``at``."""

    def __init__(self, connection: Any, at: int) -> None:
        self._connection, self._left = connection, at

    def execute(self, statement: str, *values: Any) -> Any:
        if statement.startswith("insert or ignore into trials"):
            self._left -= 1
            if self._left == 0:
                raise sqlite3.OperationalError(FULL_DISK)
        return self._connection.execute(statement, *values)

    def close(self) -> None:
        self._connection.close()


def test_a_disk_that_fills_up_keeps_the_finished_trials(
    files: Files, out: Path, run: Run, finished: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Store.__init__

    def open_full(self: Store, folder: Path) -> None:
        opened(self, folder)
        self._connection = _FullDisk(self._connection, 4)  # type: ignore[assignment]

    monkeypatch.setattr(Store, "__init__", open_full)
    code, line = run(*cli_world.arguments(files, out, seeds=2))
    assert code == 3
    assert line.startswith(f"error: run folder {out}: {FULL_DISK}; free some space")
    monkeypatch.setattr(Store, "__init__", opened)
    store = Store(out)
    assert store.statuses() == {"done": 3}
    store.close()
    assert stress(files, out, "--resume", seeds=2) == 0
    assert summary_of(out) == finished


def test_a_disk_that_really_fills_up(files: Files, out: Path, finished: Any) -> None:
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))"
    done = process(*cli_world.arguments(files, out, seeds=2), patch=limit)
    assert done.returncode == 3, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: run folder {out}: ")
    assert "Traceback" not in done.stderr
    assert stress(files, out, "--resume", seeds=2) == 0
    assert summary_of(out) == finished


# ---------------------------------------------------------------- stopping and going on


@pytest.fixture
def reused(capsys: pytest.CaptureFixture[str]) -> Callable[[], int]:
    """Return how many trials the last command took from the store."""
    return lambda: sum(line.endswith(", reused") for line in capsys.readouterr().err.splitlines())


def stopper(name: str, at: int = AT) -> str:
    """Return a patch that sends the process a signal at one of its updates."""
    return f"""
import os, signal
from durometer.core.training import Trainer
made, update = [], Trainer.update
def stop(self, rows):
    made.append(1)
    if len(made) == {at}:
        os.kill(os.getpid(), signal.{name})
    return update(self, rows)
Trainer.update = stop
"""


def test_killed_in_the_middle_and_gone_on_with(
    files: Files, out: Path, finished: Any, reused: Callable[[], int]
) -> None:
    words = cli_world.arguments(files, out, seeds=2)
    done = process(*words, patch=stopper("SIGKILL"))
    assert done.returncode == -signal.SIGKILL
    store = Store(out)
    kept = [trial.key for trial in store.trials()]
    store.close()
    assert len(kept) == len(set(kept)) == 3  # two controls at step 0, one attack
    reused()
    assert main([*words, "--resume"]) == 0
    assert reused() == 3
    assert summary_of(out) == finished
    store = Store(out)
    keys = [trial.key for trial in store.trials()]
    store.close()
    assert keys[:3] == kept
    assert len(keys) == len(set(keys)) == finished["status_counts"]["planned"]
    assert main([*words, "--resume"]) == 0
    assert reused() == len(keys)
    assert summary_of(out) == finished


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Ctrl-C at an update in the middle of a run; the returned call takes it away again."""
    made, update = [], Trainer.update

    def stop(self: Trainer, rows: Any) -> Any:
        made.append(1)
        if len(made) == AT:
            signal.raise_signal(signal.SIGINT)
        return update(self, rows)

    monkeypatch.setattr(Trainer, "update", stop)
    yield lambda: monkeypatch.setattr(Trainer, "update", update)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_keeps_what_is_measured_and_says_how_to_go_on(
    files: Files,
    out: Path,
    run: Run,
    finished: Any,
    interrupt: Callable[[], None],
) -> None:
    code, line = run(*cli_world.arguments(files, out, "--fail-on", "broke", seeds=2))
    assert code == 130
    planned = finished["status_counts"]["planned"]
    assert line.startswith(f"interrupted: 3 of {planned} trials are kept in {out}; go on with: ")
    summary = json.loads((out / "summary.json").read_text())
    assert summary["status_counts"]["interrupted"] == planned - 3
    assert not summary["complete"]
    interrupt()
    words = line.partition("go on with: durometer ")[2].split()
    assert words[-1] == "--resume"
    assert run(*words)[0] == 0
    assert summary_of(out) == finished


def test_ctrl_c_before_the_first_trial_leaves_nothing_behind(
    files: Files, out: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("durometer.trials.campaign.load_subject", stop)
    code, line = run(*cli_world.arguments(files, out))
    assert (code, line) == (130, "interrupted before anything was measured; nothing is kept")
    assert not out.exists()


def test_ctrl_c_while_the_outputs_are_written_keeps_the_trials(
    files: Files, ran: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr("durometer.api.write_outputs", stop)
        code, line = run(*cli_world.arguments(files, ran, "--resume", seeds=2))
    assert code == 130
    assert line.startswith(f"interrupted: what was measured is kept in {ran}; go on with: ")
    assert run(*cli_world.arguments(files, ran, "--resume", seeds=2))[0] == 0


def test_a_second_ctrl_c_ends_it_at_once(files: Files, out: Path) -> None:
    again = (
        "import durometer.api\ndurometer.api.write_outputs = lambda _: os.kill(os.getpid(), 2)\n"
    )
    patch = stopper("SIGINT") + again
    done = process(*cli_world.arguments(files, out, seeds=2), patch=patch)
    assert done.returncode == 130
    assert "Traceback" not in done.stderr
    assert not (out / "summary.json").exists()
    store = Store(out)
    assert store.statuses() == {"done": 3}
    store.close()


# ---------------------------------------------------------------- run folders


def test_a_run_folder_is_not_written_twice_by_accident(files: Files, ran: Path, run: Run) -> None:
    before = (ran / "summary.json").read_bytes()
    code, line = run(*cli_world.arguments(files, ran))
    assert code == 2
    assert line == f"error: {ran}: holds a run already; go on with --resume or name another --out"
    assert (ran / "summary.json").read_bytes() == before


def test_other_settings_are_other_trials(
    files: Files, out: Path, reused: Callable[[], int]
) -> None:
    words = ["stress", str(files.safe), "--domain", str(files.easy), "--out", str(out)]
    words += ["--seeds", "1", "--budget-steps", "2", "--resume", "--tamper"]
    assert main([*words, "lora:rank=2"]) == 0
    first = summary_of(out)
    reused()
    assert main([*words, "lora:rank=4"]) == 0
    assert reused() == 1  # the control at step 0
    second = summary_of(out)
    assert [t["config"]["rank"] for t in second["tampers"]] == [4]
    assert first["tampers"][0]["configuration"] != second["tampers"][0]["configuration"]
    assert main([*words, "lora:rank=2"]) == 0
    assert reused() == first["status_counts"]["planned"]
    assert summary_of(out) == first


def test_more_seeds_go_on_from_those_that_are_there(
    files: Files, out: Path, finished: Any, reused: Callable[[], int]
) -> None:
    assert stress(files, out, seeds=1) == 0
    reused()
    assert stress(files, out, "--resume", seeds=2) == 0
    assert reused() >= 4
    assert summary_of(out)["tampers"] == finished["tampers"]


@pytest.mark.parametrize("where", [0, 4096])
def test_a_damaged_store_is_one_line(files: Files, ran: Path, run: Run, where: int) -> None:
    store = ran / FILE
    raw = bytearray(store.read_bytes())
    raw[where : where + 2048] = b"\xff" * 2048
    store.write_bytes(raw)
    for words in (["report", str(ran)], cli_world.arguments(files, ran, "--resume")):
        code, line = run(*words)
        assert code == 3
        assert line.startswith(f"error: {ran / FILE}: ")
    assert store.read_bytes() == bytes(raw)


def test_a_damaged_record_is_one_line(files: Files, ran: Path, run: Run) -> None:
    connection = sqlite3.connect(ran / FILE)
    connection.execute("update trials set record = x'00' where number = 1")
    connection.commit()
    connection.close()
    code, line = run("report", str(ran))
    assert (code, "a trial record is damaged" in line) == (3, True)


def test_a_store_of_another_version(files: Files, ran: Path, run: Run) -> None:
    store = Store(ran)
    store.describe("schema_version", 99)
    store.close()
    code, line = run("report", str(ran))
    assert (code, "written by another version (schema 99" in line) == (3, True)


def test_a_folder_without_a_run(run: Run, tmp_path: Path) -> None:
    code, line = run("report", str(tmp_path))
    assert (code, "no run here" in line) == (2, True)
    Store(tmp_path).close()
    code, line = run("report", str(tmp_path))
    assert (code, "ended before anything was measured" in line) == (2, True)
