"""`harden` and `chat` end to end: folder, record, card, stages, resume, controls, bad input."""

import dataclasses
import errno
import io
import json
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import cli_world
import pytest
import tiny_world
import torch
from cli_world import Files
from safetensors import SafetensorError
from scipy.stats import binomtest

import durometer
from durometer import api, hardening
from durometer.cli import main
from durometer.core.errors import InputError, NotApplicableError
from durometer.domains.base import Role
from durometer.options import domain_for, read_config
from durometer.safeguards import checkpoint, inflate
from durometer.safeguards import harden as harden_module
from durometer.safeguards.attacks import AttackRunner, recorded_digests
from durometer.safeguards.base import make_safeguard
from durometer.safeguards.card import measured, model_card
from durometer.safeguards.data import DefenceData
from durometer.safeguards.harden import parse_safeguards, stages_of
from durometer.safeguards.inner import possible
from durometer.safeguards.place import is_begun, is_finished, require_usable, storage_error
from durometer.safeguards.train import Report
from durometer.subjects.fingerprint import weights_fingerprint
from durometer.subjects.load import load_subject
from durometer.subjects.record import RECORD, controls, read_record
from durometer.trials import campaign
from durometer.trials.runner import TrialRunner
from durometer.trials.store import Store
from durometer.trials.suites import Attack, Suite, make_suite

Capture = pytest.CaptureFixture[str]
FAST = "steps=4,learning_rate=3e-3,warmup_steps=0,batch_size=6"
TAR = f"tar:{FAST},inner_steps=4,stride=2,inner_rates=1e-2,inner_batch=6,train=all"


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return cli_world.write_files(tmp_path_factory.mktemp("files"))


def words(
    files: Files, out: Path, *more: str, safeguard: str = TAR, kind: str = "knowledge"
) -> list[str]:
    domain = f"{files.domain}:{kind}"
    start = ["harden", str(files.base), "--domain", domain, "--safeguard", safeguard]
    return [*start, "--budget-steps", "4", "--out", str(out), *more]


@pytest.fixture(scope="session")
def made(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "out"
    assert main(words(files, out)) == 0
    return out


def test_the_folder_is_a_model_and_says_what_it_is(made: Path, files: Files) -> None:
    record = read_record(made)
    assert [stage["name"] for stage in record["safeguards"]] == ["random_mapping", "tar"]
    assert [stage["settings"]["steps"] for stage in record["safeguards"]] == [4, 4]
    cost = record["safeguards"][1]["cost"]
    assert cost["passes"] == {"inner": 16, "attacked": 8, "anchors": 4, "weights": 4}
    assert record["safeguards"][1]["trained_against"]
    subject, base = load_subject(str(made)), load_subject(str(files.base))
    assert subject.fingerprint == record["fingerprint"] != record["base"]["fingerprint"]
    assert base.fingerprint == record["base"]["fingerprint"]
    for name, norm in record["changed"].items():
        change = subject.model.get_parameter(name) - base.model.get_parameter(name)
        assert norm == pytest.approx(float(change.norm()), rel=1e-4)
    table = record["before_any_tamper"]
    domain = tiny_world.tiny_domain("knowledge")
    assert table["undefended"]["retain"] == measured(base, domain)["retain"]
    assert set(table["hardened"]) == {
        "restricted",
        "never_taught",
        "retain",
        "over_refusal_refused",
    }
    lines = [json.loads(line) for line in (made / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4] * 2
    assert {"sft", "representation", "anchor", "attacked"} == set(lines[-1]["losses"])
    assert not (made / "work").exists()


def test_the_card_shows_method_cost_and_results(made: Path) -> None:
    card = (made / "README.md").read_text("utf-8")
    for text in ("`tar`", "`random_mapping`", "passes", "restricted questions answered right"):
        assert text in card
    assert "`inner_rates` | `[0.01]`" in card
    assert "# A model with a safeguard against tampering" in card


def test_the_card_shows_chance_and_intervals(made: Path) -> None:
    card = (made / "README.md").read_text("utf-8")
    found = read_record(made)["before_any_tamper"]["hardened"]
    restricted, refused = found["restricted"], found["over_refusal_refused"]
    assert "answered right (multiple choice, chance 25.0 %) |" in card
    assert "chance" not in next(line for line in card.splitlines() if "questions refused" in line)
    count = round(restricted["rate"] * restricted["items"])
    assert restricted["entities"] == restricted["items"]  # one wording each
    ends = binomtest(count, restricted["items"]).proportion_ci(method="wilson")
    assert (restricted["low"], restricted["high"]) == pytest.approx((ends.low, ends.high))
    low, high = 100 * restricted["low"], 100 * restricted["high"]
    assert f"{100 * restricted['rate']:.1f} % [{low:.1f}, {high:.1f}]" in card
    assert restricted["chance"] == 0.25
    assert "chance" not in refused


@pytest.mark.parametrize(
    ("names", "control"),
    [
        (["noop"], True),
        (["plain_sft"], True),
        (["random_mapping", "norm_noise"], True),
        (["refusal", "inflate"], True),
        (["random_mapping"], False),
        (["random_mapping", "tar"], False),
        (["tar", "noop"], False),
    ],
)
def test_controls_are_titled_as_such(made: Path, names: list[str], control: bool) -> None:
    record = read_record(made)
    stages = [{"name": name, "settings": {}} for name in names]
    title = next(
        line for line in model_card(record | {"safeguards": stages}).splitlines() if line[:1] == "#"
    )
    assert title.startswith("# A control: ") == control
    reference = (made / "reference" / "README.md").read_text("utf-8")
    assert "# A control: the plain safeguard" in reference


def test_stress_finds_domain_and_controls(made: Path, files: Files) -> None:
    subject = load_subject(str(made))
    assert subject.source.undefended == str(files.base.resolve())
    assert Path(subject.source.reference) == made / "reference"
    assert domain_for(str(made), None) == f"{files.domain.resolve()}:knowledge"
    reference = load_subject(subject.source.reference)
    assert reference.source.undefended == subject.source.undefended
    assert reference.fingerprint not in (
        subject.fingerprint,
        load_subject(str(files.base)).fingerprint,
    )


def test_another_s_record_makes_nothing_be_downloaded(tmp_path: Path) -> None:
    record = {"domain": {}, "undefended": "someone/model", "reference": "../../../nowhere"}
    (tmp_path / RECORD).write_text(json.dumps(record), "utf-8")
    assert controls(tmp_path, ["micro"]) == ("", "")
    (tmp_path / RECORD).write_text(json.dumps(record | {"undefended": "micro"}), "utf-8")
    assert controls(tmp_path, ["micro"]) == ("micro", "")
    for content in ("[]", "{", '{"domain": 3}', "[" * 100_000):
        (tmp_path / RECORD).write_text(content, "utf-8")
        with pytest.raises(InputError, match="cannot be read"):
            read_record(tmp_path)


def test_the_python_interface_does_the_same(files: Files, made: Path, tmp_path: Path) -> None:
    seen: list[Any] = []

    class Observer:
        def stage(self, what: str, steps: int) -> None:
            seen.append((what, steps))

        def trained(self, report: Report) -> None:
            seen.append(report.update.step)

    domain = f"{files.domain}:knowledge"
    found = durometer.harden(
        str(files.base), domain, TAR, out=tmp_path / "o", budget_steps=4, observer=Observer()
    )
    assert found.record["fingerprint"] == read_record(made)["fingerprint"]
    assert ("tar (2 of 2)", 4) in seen
    assert seen.count(4) == 2


@pytest.mark.parametrize("stage", ["random_mapping", "tar"])
def test_a_kill_in_either_stage_loses_nothing(
    stage: str, files: Files, made: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "out"
    trained = hardening.HardenProgress.trained
    reports = 3 if stage == "random_mapping" else 7

    def kill(self: Any, report: Report) -> None:
        nonlocal reports
        reports -= 1
        trained(self, report)
        if not reports:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hardening.HardenProgress, "trained", kill)
        assert main(words(files, out)) == 130
    shown = capsys.readouterr().err
    assert "go on with: durometer harden" in shown
    assert shown.rstrip().endswith("--resume")
    assert not (out / "model.safetensors").exists()
    assert main(words(files, out)) == 2
    assert "not empty; go on with --resume" in capsys.readouterr().err
    assert main(words(files, out, "--seed", "8", "--resume")) == 2
    assert "another seeds." in capsys.readouterr().err
    assert main(words(files, out, "--resume")) == 0
    assert read_record(out)["fingerprint"] == read_record(made)["fingerprint"]
    ran = read_record(out)["safeguards"]
    assert [s["cost"]["passes"] for s in ran] == [
        s["cost"]["passes"] for s in read_record(made)["safeguards"]
    ]
    assert main(words(files, out, "--resume")) == 2
    assert "holds a finished model" in capsys.readouterr().err


def test_biases_of_a_stage_are_there_after_a_kill_in_a_later_one(
    files: Files, tmp_path: Path, capsys: Capture
) -> None:
    """Steering makes biases that the subject, loaded anew, does not have."""
    safeguard = "steering:stage1=none,layer_stride=1,keep=0.01,plain_sft:steps=4"
    given = {"safeguard": safeguard, "kind": "refusal"}
    assert main(words(files, tmp_path / "whole", **given)) == 0
    trained = hardening.HardenProgress.trained

    def kill(self: Any, report: Report) -> None:
        trained(self, report)
        if report.update.step == 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hardening.HardenProgress, "trained", kill)
        assert main(words(files, tmp_path / "killed", **given)) == 130
    assert main(words(files, tmp_path / "killed", "--resume", **given)) == 0
    capsys.readouterr()
    whole, killed = (read_record(tmp_path / name) for name in ("whole", "killed"))
    assert any(name.endswith(".bias") for name in whole["changed"])
    assert killed["fingerprint"] == whole["fingerprint"]
    subject = load_subject(str(tmp_path / "killed"))
    assert subject.fingerprint == whole["fingerprint"]


def test_a_stage_of_other_weights_is_not_taken_over(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """A weight that is not there to be copied into would be lost without a word."""
    given = {"safeguard": f"random_mapping:{FAST},plain_sft:steps=4"}
    keep = checkpoint.CheckpointFile.save

    def more(self: Any, tensors: Any, state: Any) -> None:
        keep(self, {**tensors, "model.extra.weight": torch.ones(1)}, state)

    def kill(self: Any, report: Report) -> None:
        if report.update.step == 1 and (tmp_path / "o" / "work" / "stage-0.safetensors").exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.CheckpointFile, "save", more)
        patch.setattr(hardening.HardenProgress, "trained", kill)
        assert main(words(files, tmp_path / "o", **given)) == 130
    capsys.readouterr()
    assert main(words(files, tmp_path / "o", "--resume", **given)) == 2
    assert "weights of another model (model.extra.weight)" in capsys.readouterr().err


def test_noop_is_the_subject_bit_for_bit(files: Files, tmp_path: Path) -> None:
    assert main(words(files, tmp_path / "o", safeguard="noop")) == 0
    record = read_record(tmp_path / "o")
    assert record["fingerprint"] == record["base"]["fingerprint"]
    assert record["changed"] == {}


def test_noise_like_another_s_edit(files: Files, made: Path, tmp_path: Path) -> None:
    assert main(words(files, tmp_path / "o", safeguard=f"norm_noise:like={made}")) == 0
    found, wanted = read_record(tmp_path / "o")["changed"], read_record(made)["changed"]
    assert found == pytest.approx(wanted, rel=1e-4)


def test_a_diverging_training_ends_with_a_line_and_no_model(
    files: Files, tmp_path: Path, capsys: Capture
) -> None:
    broken = "plain_sft:steps=6,optimizer=sgd,learning_rate=1e30"
    assert main(words(files, tmp_path / "o", safeguard=broken)) == 3
    shown = capsys.readouterr().err
    assert "error: safeguard 'plain_sft' diverged after" in shown
    assert "lower learning_rate" in shown
    assert not (tmp_path / "o" / RECORD).exists()


def test_a_full_disk_is_one_line(
    files: Files, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(harden_module, "save_model", full)
    assert main(words(files, tmp_path / "o", safeguard=f"random_mapping:{FAST}")) == 3
    assert "No space left on device; free some space and go on with --resume" in (
        capsys.readouterr().err
    )
    monkeypatch.undo()
    assert main(words(files, tmp_path / "o", "--resume", safeguard=f"random_mapping:{FAST}")) == 0


def test_what_cannot_be_written_names_path_and_reason(
    files: Files, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "there/model.safetensors")

    monkeypatch.setattr(harden_module, "save_model", closed)
    assert main(words(files, tmp_path / "o", safeguard="noop")) == 3
    shown = capsys.readouterr().err
    assert "there/model.safetensors: Permission denied; choose an --out that can be" in shown
    assert "free some space" not in shown


def test_advice_follows_the_reason(tmp_path: Path) -> None:
    full = SafetensorError("I/O error: No space left on device (os error 28)")
    assert "free some space and go on with --resume (kept)" in str(
        storage_error(tmp_path, full, " (kept)")
    )
    quota = OSError(errno.EDQUOT, "Disk quota exceeded")
    assert str(storage_error(tmp_path, quota)).startswith(f"{tmp_path}: Disk quota exceeded; free")
    for other in (OSError(errno.EROFS, "Read-only file system"), SafetensorError("broken")):
        assert "choose an --out that can be written" in str(storage_error(tmp_path, other))


def test_loading_is_not_blamed_on_the_disk(
    files: Files, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(spec: str) -> Any:
        raise OSError(errno.EIO, "Input/output error", "domain.toml")

    monkeypatch.setattr(harden_module, "load_domain", lost)
    assert main(words(files, tmp_path / "o", safeguard="noop")) == 4
    assert "--out" not in capsys.readouterr().err


# ---- which folders are written to ---------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("place", ["", "inside", "inside/deeper"])
@pytest.mark.parametrize("more", [[], ["--resume"]])
def test_the_subject_s_own_folder_is_never_written_to(
    files: Files, tmp_path: Path, capsys: Capture, place: str, more: list[str]
) -> None:
    base = tmp_path / "base"
    shutil.copytree(files.base, base)
    (tmp_path / "link").symlink_to(base)
    (base / "work").mkdir()
    (base / "work" / "run.json").write_text("{}", "utf-8")
    before = contents(base)
    start = ["harden", str(base), "--domain", f"{files.domain}:knowledge", "--safeguard", "noop"]
    for named in (base, tmp_path / "link"):
        assert main([*start, "--out", str(named / place), *more]) == 2
        shown = capsys.readouterr().err
        assert "the subject's own folder" in shown
        assert "--resume" not in shown
    assert contents(base) == before


def test_an_adapter_s_folder_is_the_subject_s_own(files: Files, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for out in (adapter / "out", files.base / "out"):
        with pytest.raises(InputError, match="subject's own folder"):
            require_usable(out, f"{files.base}+{adapter}", resume=True)
    require_usable(tmp_path / "out", f"{files.base}+{adapter}", resume=True)


@pytest.mark.parametrize("extra", ["README.md", "work/notes.txt"])
def test_a_foreign_folder_is_never_written_to(
    files: Files, tmp_path: Path, capsys: Capture, extra: str
) -> None:
    out = tmp_path / "mine"
    (out / extra).parent.mkdir(parents=True)
    (out / extra).write_text("mine", "utf-8")
    for more in ([], ["--resume"]):
        assert main(words(files, out, *more, safeguard="noop")) == 2
        shown = capsys.readouterr().err
        assert "holds no hardening to go on with; name another --out" in shown
        assert "--resume" not in shown
    assert contents(out) == {extra: b"mine"}


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_file_is_no_place_for_a_model(
    files: Files, tmp_path: Path, capsys: Capture, below: str
) -> None:
    (tmp_path / "file").write_text("mine", "utf-8")
    assert main(words(files, tmp_path / "file" / below, safeguard="noop")) == 2
    shown = capsys.readouterr().err
    assert f"error: {tmp_path / 'file'}: a file, not a folder; name another --out" in shown
    assert (tmp_path / "file").read_text("utf-8") == "mine"


# ---- what an edit needs -------------------------------------------------------------------------

OTHER = json.dumps({"domain": {}, "changed": {"other.weight": 1.0}})


@pytest.mark.parametrize(
    ("record", "line"),
    [
        (None, "cannot be read; name a folder made by harden"),
        ('{"changed": [1]}', "cannot be read"),
        ('{"changed": {"lm_head.weight": "much"}}', "cannot be read"),
        ('{"changed": {"lm_head.weight": NaN}}', "cannot be read"),
        (OTHER, "of another model: this one has no weight 'other.weight'"),
    ],
)
def test_noise_like_nothing_is_told_before_anything_is_done(
    files: Files, tmp_path: Path, capsys: Capture, record: str | None, line: str
) -> None:
    like = tmp_path / "like"
    like.mkdir()
    if record is not None:
        (like / RECORD).write_text(record, "utf-8")
    safeguard = f"random_mapping:{FAST},norm_noise:like={like}"
    assert main(words(files, tmp_path / "o", safeguard=safeguard)) == 2
    shown = capsys.readouterr().err
    assert line in shown
    assert "measuring" not in shown
    assert not (tmp_path / "o").exists()


def test_edits_look_for_what_they_need(files: Files) -> None:
    subject = load_subject(str(files.base))
    domain = tiny_world.tiny_domain("refusal")
    steering = make_safeguard("steering", stage1="none", layer_stride=1)
    steering.require(subject, DefenceData(subject, domain))
    with pytest.raises(InputError, match="'refusals' rows"):
        steering.require(subject, DefenceData(subject, dataclasses.replace(domain, refusals=())))
    make_safeguard("inflate").require(subject, DefenceData(subject, domain))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inflate.Rebalancer, "pairs", lambda *_, **__: iter([[]]))
        with pytest.raises(NotApplicableError, match="no pair of neighbouring maps"):
            make_safeguard("inflate").require(subject, DefenceData(subject, domain))
    kept = tuple(i for i in domain.items if i.role == Role.RESTRICTED)
    bare = DefenceData(subject, dataclasses.replace(domain, items=kept))
    with pytest.raises(InputError, match="'retain' rows"):
        make_safeguard("rep_select").require(subject, bare)


# ---- then stress --------------------------------------------------------------------------------


def attack_words(files: Files, out: Path, *more: str, safeguard: str) -> list[str]:
    start = ["harden", str(files.base), "--domain", str(files.easy), "--out", str(out)]
    return [*start, "--safeguard", safeguard, "--then-stress", "quick", *more]


@pytest.fixture
def short_suite(monkeypatch: pytest.MonkeyPatch) -> list[Attack]:
    """A suite of one attack of a few steps in the place of ``quick``."""
    attacks = [Attack("lora", {"learning_rate": 1e-2, "rank": 4, "steps": 4})]

    def made(name: str, parameters: int) -> Suite:
        suite = make_suite(name, parameters)
        few = {"seeds": 1, "control_seeds": 1, "fresh_seeds": 1, "steps": 4}
        return dataclasses.replace(suite, attacks=tuple(attacks), **few)

    monkeypatch.setattr(hardening, "make_suite", made)
    monkeypatch.setattr(campaign, "make_suite", made)
    return attacks


PLAIN_SFT = "plain_sft:steps=4,learning_rate=1e-3"
REFUSAL = "refusal:steps=40,learning_rate=3e-3,warmup_steps=0,batch_size=6"


def test_an_interrupted_control_is_gone_on_with(
    files: Files, tmp_path: Path, capsys: Capture, short_suite: list[Attack]
) -> None:
    """The command that is printed works as it is, whatever was interrupted."""
    out = tmp_path / "out"
    trained = hardening.HardenProgress.trained
    names = []

    def kill(self: Any, report: Report) -> None:
        trained(self, report)
        names.append(self._what)
        if self._what.startswith("refusal") and len(names) == 6:
            raise KeyboardInterrupt

    words = attack_words(files, out, "--budget-steps", "4", safeguard=PLAIN_SFT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hardening.HardenProgress, "trained", kill)
        assert main(words) == 130
    assert is_finished(out)
    assert is_begun(out / "reference")
    again = shlex.split(capsys.readouterr().err.partition("go on with: durometer ")[2])
    assert again[-1] == "--resume"
    before = (out / "model.safetensors").stat().st_mtime_ns
    seen: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hardening, "run_stress", lambda *given, **more: seen.append(given) or 0)
        assert main(again) == 0
    assert seen[0][0].reference == str(out / "reference")
    assert (out / "model.safetensors").stat().st_mtime_ns == before
    assert read_record(out)["reference"] == "reference"
    assert load_subject(str(out)).source.reference == str(out / "reference")
    assert main([*again, "--seed", "9"]) == 2
    assert "made with another seed (7, now 9)" in capsys.readouterr().err


def test_an_interrupted_attack_is_gone_on_with(
    files: Files, tmp_path: Path, capsys: Capture, short_suite: list[Attack]
) -> None:
    out = tmp_path / "out"
    run = TrialRunner.run
    trials = 0

    def kill(self: TrialRunner, *given: Any) -> Any:
        nonlocal trials
        trials += 1
        if trials == 3:
            raise KeyboardInterrupt
        return run(self, *given)

    words = attack_words(files, out, safeguard=REFUSAL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrialRunner, "run", kill)
        assert main(words) == 130
    again = shlex.split(capsys.readouterr().err.partition("go on with: durometer ")[2])
    assert again[0] == "stress"
    assert main([*words, "--resume"]) in (0, 3)
    shown = capsys.readouterr()
    assert "reused" in shown.err
    assert "hardened model:" in shown.out
    assert (out / "stress" / "summary.json").exists()
    assert main(again) in (0, 3)


def test_a_diverged_control_is_told_and_not_named(
    files: Files, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    harden = hardening.run_harden

    def broken(request: Any, folder: Path, **options: Any) -> Any:
        if folder.name == "reference":
            return harden_module.Hardened(folder, diverged="safeguard 'refusal' diverged after 3")
        return harden(request, folder, **options)

    seen: list[Any] = []
    monkeypatch.setattr(hardening, "run_harden", broken)
    monkeypatch.setattr(hardening, "run_stress", lambda *given, **_: seen.append(given) or 0)
    assert main(attack_words(files, tmp_path / "o", safeguard=PLAIN_SFT)) == 0
    shown = capsys.readouterr().err
    assert "no plain control to compare with: safeguard 'refusal' diverged after 3" in shown
    assert seen[0][0].reference == ""
    assert read_record(tmp_path / "o")["reference"] == ""


def test_an_attack_of_the_suite_is_not_trained_against(
    files: Files, made: Path, tmp_path: Path, capsys: Capture, short_suite: list[Attack]
) -> None:
    """Refused before anything is trained; a plain stress test says so and goes on."""
    inner = possible(make_safeguard("tar", inner_rates=[1e-2], inner_batch=6).settings)
    name, settings = next(attack.tamper for attack in inner if attack.weights == "all")
    short_suite[:] = [Attack(name, settings | {"steps": 2})]
    assert main(words(files, tmp_path / "o", "--then-stress", "quick")) == 2
    shown = capsys.readouterr().err
    assert "was trained against exactly this" in shown
    assert "measuring" not in shown
    assert not (tmp_path / "o").exists()
    rate = f"{name}:" + ",".join(f"{key}={value}" for key, value in settings.items())
    request = campaign.Request(str(made), f"{files.domain}:knowledge", tampers=(rate,))
    store = Store(tmp_path / "run")
    prepared = campaign.Campaign.prepare(request, store, api.SilentObserver())
    (note,) = [text for text in api._notes(prepared) if "trained against" in text]
    assert name in note
    assert "\n" not in note
    other = dataclasses.replace(request, tampers=(f"{rate},batch_size=7",))
    prepared = campaign.Campaign.prepare(other, store, api.SilentObserver())
    assert not any("trained against" in text for text in api._notes(prepared))
    store.close()


def test_a_foreign_record_of_attacks_counts_as_nothing() -> None:
    for stages in (None, 3, [3], [{"trained_against": 3}], [{"trained_against": [3, None]}]):
        assert recorded_digests({"safeguards": stages}) == []
    assert recorded_digests({"safeguards": [{"trained_against": ["a"]}, {}]}) == ["a"]


def test_nothing_was_changed_so_nothing_can_be_broken(
    files: Files, tmp_path: Path, capsys: Capture, short_suite: list[Attack]
) -> None:
    out = tmp_path / "o"
    assert main(attack_words(files, out, safeguard="noop")) == 2
    shown = capsys.readouterr().err
    assert "nothing to break" in shown
    assert "--undefended" not in shown
    assert not (out / "reference").exists()
    assert main(["stress", str(out), "--out", str(tmp_path / "run")]) == 2
    shown = capsys.readouterr().err
    assert "nothing to break" in shown
    assert "--undefended" not in shown
    assert Store.open(tmp_path / "run").statuses() == {"done": 2}


def test_then_stress(files: Files, tmp_path: Path, capsys: Capture) -> None:
    """The refusal safeguard is broken at once, beside both controls."""
    out = tmp_path / "out"
    start = ["harden", str(files.base), "--domain", str(files.easy), "--out", str(out)]
    with pytest.MonkeyPatch.context() as patch:
        seen: list[Any] = []
        patch.setattr(hardening, "run_stress", lambda request, *_, **__: seen.append(request) or 1)
        safeguard = "plain_sft:steps=4,learning_rate=1e-3"
        words = [*start, "--safeguard", safeguard, "--budget-steps", "4", "--then-stress", "quick"]
        assert main(words) == 1
    (request,) = seen
    assert request.subject == str(out)
    assert request.undefended == str(files.base)
    assert request.reference == str(out / "reference")
    assert read_record(out / "reference")["safeguards"][0]["name"] == "refusal"
    assert main([*start, "--safeguard", "noop", "--then-stress", "quik"]) == 2
    assert "did you mean 'quick'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("texts", "found"),
    [
        (["tar"], ("tar",)),
        (["random_mapping,tar:stage1=none,steps=3"], ("random_mapping", "tar:stage1=none,steps=3")),
        (["tar:steps=3,stride=2,noop"], ("tar:steps=3,stride=2", "noop")),
        (["noop", "plain_sft:steps=1"], ("noop", "plain_sft:steps=1")),
    ],
)
def test_how_safeguards_are_spelled(texts: list[str], found: tuple[str, ...]) -> None:
    assert parse_safeguards(texts) == found


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "name a subject"),
        (["micro"], "say what to safeguard, with --domain"),
        (["micro", "--domain", "world"], "name a safeguard"),
        (["micro", "--domain", "world", "--safeguard", "tarr"], "did you mean 'tar'"),
        (["micro", "--domain", "world", "--safeguard", "tar:steps"], "'steps' needs a value"),
        (["micro", "--domain", "world", "--safeguard", "tar:step=3"], "steps"),
        (
            ["micro", "--domain", "world", "--safeguard", "tar", "--budget-steps", "0"],
            "--budget-steps 0: at least 1",
        ),
        (["micro", "--domain", "world", "--safeguard", "tar", "--resume"], "as --out DIR"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], line: str, capsys: Capture) -> None:
    assert main(["harden", *arguments]) == 2
    shown = capsys.readouterr().err
    assert line in shown
    assert shown.count("\n") == 1


def test_a_safeguard_for_another_kind_of_domain_is_refused(
    files: Files, tmp_path: Path, capsys: Capture
) -> None:
    start = ["harden", str(files.base), "--domain", str(files.domain), "--out", str(tmp_path / "o")]
    assert main([*start, "--safeguard", "random_mapping"]) == 2
    assert "serves domains of kind knowledge" in capsys.readouterr().err


def test_what_a_later_stage_lacks_is_told_before_the_first_is_trained(
    files: Files, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = harden_module.load_domain
    monkeypatch.setattr(
        harden_module, "load_domain", lambda spec: dataclasses.replace(load(spec), refusals=())
    )
    assert main(words(files, tmp_path / "o", safeguard=f"{TAR},loss=dpo")) == 2
    assert "nothing for the safeguard's 'held_out_pairs' rows" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_presets_for_tiny_subjects_are_taken_by_themselves(files: Files) -> None:
    subject, domain = load_subject(str(files.base)), tiny_world.tiny_domain("knowledge")
    request = harden_module.HardenRequest("x", "y", ("tar", "tar:preset=faithful,stage1=none"))
    stages = stages_of(request, subject, domain)
    assert [stage.settings.steps for stage in stages] == [
        int(type(stage).presets["tiny"]["steps"]) for stage in stages[:2]
    ] + [750]


def test_a_toml_file_holds_stages(tmp_path: Path, files: Files) -> None:
    file = tmp_path / "f.toml"
    file.write_text(
        'domain = "world:knowledge"\nseed = 3\n[[stage]]\nsafeguard = "tar"\nsteps = 3\n'
        "inner_rates = [1e-3, 3e-4]\n",
        "utf-8",
    )
    options = read_config(file, {"domain": False, "seed": False, "safeguard": False})
    assert options["safeguard"] == ["tar:steps=3,inner_rates=0.001+0.0003"]
    assert parse_safeguards(options["safeguard"]) == ("tar:steps=3,inner_rates=0.001+0.0003",)
    file.write_text('[[stage]]\nsafeguard = "tar"\nstep = 3\n', "utf-8")
    with pytest.raises(InputError, match=r"f\.toml: .*steps"):
        read_config(file, {"safeguard": False})


HARDEN_PAGE = Path(__file__).parent.parent / "docs" / "harden.md"
ATTACK = '[[attack]]\ntamper = "lora"\nlearning_rate = 1e-2\ntargets = "attention"\n'


@pytest.mark.parametrize("command", ["harden", "stress"])
def test_tables_of_a_toml_file_are_read_in_a_fresh_process(command: str, tmp_path: Path) -> None:
    """Options are read before any command has imported the methods that they name."""
    found = re.search(r"```toml\n(.*?)```", HARDEN_PAGE.read_text("utf-8"), re.S)
    assert found is not None
    file = tmp_path / "f.toml"
    file.write_text(found[1] if command == "harden" else ATTACK, "utf-8")
    done = cli_world.process(command, "--config", str(file))
    assert (done.returncode, done.stderr.startswith("error: name a subject")) == (2, True)


# ---- chat --------------------------------------------------------------------------------------


def test_chat_takes_any_bytes_and_shows_no_control_characters(
    files: Files, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def reply(subject: Any, prompt: str, most: int) -> str:
        asked.append(prompt)
        return "one\x1b[2J\u202etwo \ud800 caf\u00e9"

    monkeypatch.setattr(hardening, "answer", reply)
    stream = io.TextIOWrapper(io.BytesIO(b"caf\xe9 ?\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", stream)
    assert main(["chat", str(files.base)]) == 0
    assert capsys.readouterr().out == "one\\u001b[2J\\u202etwo \\ud800 caf\u00e9\n"
    assert main(["chat", str(files.base), "--prompt", "caf\udce9 ?"]) == 0
    assert asked == ["caf\ufffd ?"] * 2
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", narrow)
    assert main(["chat", str(files.base), "--prompt", "x"]) == 0
    assert narrow.buffer.getvalue().endswith(b"caf?\n")  # type: ignore[attr-defined]


def test_chat_answers_one_prompt_or_many(
    files: Files, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = "what is the fruit of e10 ?"
    wanted = f"it is {tiny_world.fruit_of('e10')} ."
    assert main(["chat", str(files.base), "--prompt", prompt]) == 0
    assert capsys.readouterr().out.strip() == wanted
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{prompt}\n\n{prompt}\n"))
    assert main(["chat", str(files.base)]) == 0
    assert capsys.readouterr().out.splitlines() == [wanted, wanted]
    assert main(["chat", str(files.base), "--max-tokens", "0"]) == 2


def test_listing(capsys: Capture) -> None:
    assert main(["list", "safeguards"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("tar", "refusal", "noop", "random_mapping"))
    assert main(["list", "safeguards", "tar"]) == 0
    shown = capsys.readouterr().out
    assert "preset light:" in shown
    assert "inner_steps" in shown


def test_nothing_of_an_attacked_model_is_written(files: Files, tmp_path: Path) -> None:
    """What is saved at any time are weights of the outer training, never those under attack."""
    attacked: set[str] = set()
    run = AttackRunner.run

    def spy(self: AttackRunner, *args: Any) -> Any:
        for update in run(self, *args):
            attacked.add(weights_fingerprint(self._subject.model))
            yield update

    written: list[dict[str, torch.Tensor]] = []
    save = checkpoint.save_file

    def keep(tensors: Any, path: Any, **options: Any) -> None:
        written.append({name: tensor.clone() for name, tensor in tensors.items()})
        save(tensors, path, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AttackRunner, "run", spy)
        patch.setattr(checkpoint, "save_file", keep)
        assert main(words(files, tmp_path / "o")) == 0
    assert len(attacked) == 16
    model = load_subject(str(files.base)).model
    names = [name for name, _ in model.named_parameters()]
    for tensors in written:
        keys = [key for key in tensors if key.startswith("weights.")] or names
        for name, key in zip(names, keys, strict=True):
            model.get_parameter(name).data.copy_(tensors[key])
        assert weights_fingerprint(model) not in attacked
    saved = sorted((tmp_path / "o").rglob("*.safetensors"))
    assert len(saved) == 2
    for path in saved:
        assert load_subject(str(path.parent)).fingerprint not in attacked
