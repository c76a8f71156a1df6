"""Audit of files: no hostile one is called clean, none is run, and clean ones raise no alarm."""

import hashlib
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile import (
    FOLDERS,
    GGUFS,
    PICKLES,
    SAFETENSORS,
    ZIPS,
    call,
    gguf,
    tensors,
    write_json,
    write_model,
    zipped,
)
from safetensors.numpy import save_file

from durometer.audit.checks import CHECKS
from durometer.audit.run import AuditRequest, audit, exit_code
from durometer.core.errors import ExitCode, InputError
from durometer.findings import Finding, Report, Severity, Status
from durometer.formats.pickles import walk_file


def refuse(*args: Any, **options: Any) -> None:
    raise AssertionError("a model file was loaded")


def run(target: Path, **options: Any) -> Report:
    """Return the report, made while every loader of pickles is out of order."""
    import torch

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((pickle, "load"), (pickle, "loads"), (torch, "load"), (np, "load")):
            patch.setattr(owner, name, refuse)
        return audit(AuditRequest(target, **options))


def problems(report: Report) -> dict[str, Finding]:
    """Return the worst problem of every check."""
    worst: dict[str, Finding] = {}
    for each in report.findings:
        if each.status in (Status.FOUND, Status.ERROR, Status.INCONCLUSIVE):
            worst.setdefault(each.check, each)
    return worst


def test_there_are_enough_hostile_files() -> None:
    assert sum(map(len, (PICKLES, ZIPS, SAFETENSORS, GGUFS, FOLDERS))) >= 100


@pytest.mark.parametrize("name", PICKLES)
@pytest.mark.parametrize("file", ["pytorch_model.bin", "harmless"])
def test_hostile_pickles(name: str, file: str, tmp_path: Path) -> None:
    write_model(tmp_path)
    (tmp_path / file).write_bytes(PICKLES[name])
    report = run(tmp_path)
    checks = problems(report)
    assert {"FF-02", "FF-03"} & checks.keys(), name
    assert exit_code(report, Severity.HIGH) == ExitCode.CONDITION


NOT_CALLED = {
    "import without call",
    "dotted attribute",
    "huge length",
    "trailing bytes",
    "stack underflow",
    "missing memo",
}


@pytest.mark.parametrize("name", sorted(PICKLES.keys() - NOT_CALLED))
def test_a_call_of_an_unlisted_name_is_critical(name: str, tmp_path: Path) -> None:
    write_model(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(PICKLES[name])
    assert problems(run(tmp_path))["FF-02"].severity is Severity.CRITICAL


@pytest.mark.parametrize("name", ZIPS)
def test_hostile_archives(name: str, tmp_path: Path) -> None:
    write_model(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(ZIPS[name])
    report = run(tmp_path)
    assert {"FF-01", "FF-02", "FF-03", "FF-04"} & problems(report).keys()
    assert exit_code(report, Severity.HIGH) == ExitCode.CONDITION


@pytest.mark.parametrize("name", SAFETENSORS)
def test_hostile_safetensors(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(SAFETENSORS[name])
    checks = problems(run(path))
    assert {"FF-05", "FF-06", "FF-02"} & checks.keys()
    quiet = ("padding", "web address")
    assert (max(each.severity for each in checks.values()) >= Severity.HIGH) == (name not in quiet)


@pytest.mark.parametrize("name", GGUFS)
def test_hostile_gguf(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(GGUFS[name])
    report = run(path)
    assert {"FF-09", "FF-10"} & problems(report).keys()
    assert exit_code(report, Severity.MEDIUM) == ExitCode.CONDITION


@pytest.mark.parametrize("name", FOLDERS)
def test_hostile_folders(name: str, tmp_path: Path) -> None:
    check, build = FOLDERS[name]
    folder = write_model(tmp_path / "model")
    build(folder)
    report = run(folder)
    assert problems(report)[check].references == CHECKS[check][1]
    facts_only = ("declared edit", "unknown content")
    assert name in facts_only or exit_code(report, Severity.LOW) != ExitCode.COMPLETE


def test_a_clean_model_raises_no_alarm(tmp_path: Path) -> None:
    report = run(write_model(tmp_path))
    assert not report.problems
    assert report.complete
    assert exit_code(report, Severity.INFO) == ExitCode.COMPLETE
    assert report.coverage["files"] == 3
    assert report.coverage["tensors"] == len(tensors())
    assert {each["check"] for each in report.not_examined} >= {"PV-01", "PV-02", "WF-01", "BH-01"}


def test_hashes_are_those_of_the_files(tmp_path: Path) -> None:
    report = run(write_model(tmp_path))
    for name, digest in report.inputs["files"].items():
        assert digest == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()


ARCHITECTURES = ["Llama", "Mistral", "Qwen2", "Gemma2", "Phi3", "GPTNeoX"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_models_saved_by_transformers_raise_no_alarm(
    architecture: str, make_model: Any, tmp_path: Path
) -> None:
    extra = {"head_dim": 8} if architecture == "Gemma2" else {}
    make_model(architecture, **extra).save_pretrained(tmp_path)
    report = run(tmp_path)
    assert not [each for each in report.problems if each.severity]
    assert report.complete


def test_a_saved_model_with_tokenizer_raises_no_alarm(
    tiny_llama: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    tiny_llama.save_pretrained(tmp_path, max_shard_size="20kB")
    tiny_tokenizer.save_pretrained(tmp_path)
    report = run(tmp_path)
    assert not [each for each in report.problems if each.severity]
    assert report.complete


@pytest.mark.parametrize("new_format", [True, False])
def test_an_honest_state_dict_is_a_remark_only(new_format: bool, tmp_path: Path) -> None:
    import torch

    write_model(tmp_path)
    state = torch.nn.Linear(4, 4).state_dict() | {"half": torch.ones(3, dtype=torch.bfloat16)}
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=new_format)
    report = run(tmp_path)
    checks = problems(report)
    assert "FF-02" not in checks
    assert "FF-03" not in checks
    assert checks["FF-01"].severity is Severity.MEDIUM
    assert exit_code(report, Severity.HIGH) == ExitCode.COMPLETE


@pytest.mark.parametrize("protocol", range(6))
def test_what_tensors_are_made_of_is_allowed(protocol: int, tmp_path: Path) -> None:
    value = {
        "a": np.arange(5.0),
        "b": np.float32(3),
        "c": (1, [None, True], {4}, frozenset("x")),
        1: b"\xff",
    }
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(value, protocol))
    facts = walk_file(tmp_path / "a.pkl")
    assert not facts.unlisted
    assert not facts.damage


def test_only_weight_file_is_worse(tmp_path: Path) -> None:
    write_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}, 2))
    assert problems(run(tmp_path))["FF-01"].severity is Severity.HIGH


def test_the_cache_layout_passes(tmp_path: Path) -> None:
    home = tmp_path / "models--a--b"
    folder = home / "snapshots" / ("0" * 40)
    write_model(home / "plain")
    (home / "blobs").mkdir()
    folder.mkdir(parents=True)
    for file in (home / "plain").iterdir():
        data = file.read_bytes()
        weights = file.suffix == ".safetensors"
        git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        digest = hashlib.sha256(data).hexdigest() if weights else git
        (home / "blobs" / digest).write_bytes(data)
        (folder / file.name).symlink_to(f"../../blobs/{digest}")
    report = run(folder)
    assert not report.problems
    assert any(e.check == "PV-01" and e.status is Status.PASSED for e in report.findings)
    blob = (folder / "config.json").resolve()
    blob.write_bytes(blob.read_bytes() + b" ")
    assert problems(run(folder))["PV-01"].severity is Severity.HIGH


def test_the_downloaders_folder_is_no_alarm(tmp_path: Path) -> None:
    write_model(tmp_path)
    cache = tmp_path / ".cache/huggingface/download"
    cache.mkdir(parents=True)
    (cache / "config.json.metadata").write_text("0" * 40 + "\nabc\n1.0\n")
    assert not run(tmp_path).problems


def test_ties_and_repeated_layers_are_facts(tmp_path: Path) -> None:
    values = tensors()
    values["model.layers.1.mlp.up_proj.weight"] = values["model.layers.0.mlp.up_proj.weight"].copy()
    write_model(tmp_path)
    save_file(values, tmp_path / "model.safetensors")
    report = run(tmp_path)
    assert [(e.check, e.severity) for e in report.problems] == [("FF-13", Severity.INFO)]


def test_equal_copies_are_no_conflict(tmp_path: Path) -> None:
    write_model(tmp_path)
    save_file(tensors(), tmp_path / "copy.safetensors")
    found = problems(run(tmp_path))["FF-08"]
    assert found.severity is Severity.LOW


def test_missing_targets_are_input_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        run(tmp_path / "nothing")
    with pytest.raises(InputError, match="empty"):
        run(tmp_path)


def test_an_unreadable_file_makes_it_incomplete(tmp_path: Path) -> None:
    write_model(tmp_path)
    (tmp_path / "broken.json").write_text("{")
    report = run(tmp_path)
    assert exit_code(report, Severity.HIGH) == ExitCode.INCOMPLETE
    assert exit_code(report, Severity.HIGH, allow_incomplete=True) == ExitCode.COMPLETE
    (tmp_path / "x.bin").write_bytes(call())
    assert exit_code(run(tmp_path), Severity.HIGH) == ExitCode.CONDITION


def test_nothing_of_torch_is_loaded(tmp_path: Path) -> None:
    write_model(tmp_path)
    (tmp_path / "x.bin").write_bytes(zipped({"data.pkl": call()}))
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": "{{ messages[0].content }}"})
    script = (
        "import sys; from durometer.cli import main; code = main(['audit', sys.argv[1]]); "
        "names = {'torch', 'transformers', 'peft', 'os.system'} & set(sys.modules); "
        "print('loaded', sorted(names)); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert "loaded []" in done.stdout, done.stderr
    assert done.returncode == ExitCode.CONDITION


def test_gguf_tokens_are_read(tmp_path: Path) -> None:
    from durometer.formats.gguf import GgufArray, check_gguf, read_array

    path = tmp_path / "a.gguf"
    words = b"".join(len(w).to_bytes(8, "little") + w for w in (b"one", b"two"))
    array = (8).to_bytes(4, "little") + (2).to_bytes(8, "little") + words
    numbers = (5).to_bytes(4, "little") + (2).to_bytes(8, "little") + b"\1\0\0\0\3\0\0\0"
    path.write_bytes(gguf([("tokenizer.ggml.tokens", 9, array), ("types", 9, numbers)]))
    metadata = check_gguf(path).metadata
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["types"]
    assert isinstance(tokens, GgufArray)
    assert isinstance(types, GgufArray)
    assert read_array(path, tokens) == ["one", "two"]
    assert read_array(path, types) == [1, 3]


def test_zip_built_by_the_library_is_undamaged(tmp_path: Path) -> None:
    from durometer.formats.pickles import read_zip

    path = tmp_path / "a.zip"
    path.write_bytes(zipped({"a/b.txt": b"x" * 1000}, compression=zipfile.ZIP_DEFLATED))
    facts = read_zip(path)
    assert not facts.damage
    assert not facts.unread
