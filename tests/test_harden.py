"""`harden` and `chat` end to end: folder, record, card, stages, resume, controls, bad input."""

import dataclasses
import errno
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import cli_world
import pytest
import tiny_world
import torch
from cli_world import Files

import durometer
from durometer import hardening
from durometer.cli import main
from durometer.core.errors import InputError
from durometer.options import domain_for, read_config
from durometer.safeguards import checkpoint
from durometer.safeguards import harden as harden_module
from durometer.safeguards.attacks import AttackRunner
from durometer.safeguards.card import measured
from durometer.safeguards.harden import parse_safeguards, stages_of
from durometer.safeguards.train import Report
from durometer.subjects.fingerprint import weights_fingerprint
from durometer.subjects.load import load_subject
from durometer.subjects.record import RECORD, controls, read_record

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
