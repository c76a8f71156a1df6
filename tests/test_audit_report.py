"""Reports of an audit: forms, exit codes, accepted findings, manifests, signatures, comparisons."""

import base64
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hostile import CONFIG, call, gguf, tensors, write_json, write_model
from safetensors.numpy import save_file

import durometer
from durometer.audit.adapter import AdapterSource
from durometer.audit.behaviour import compare_answers, compare_refusals
from durometer.audit.bom import to_cyclonedx
from durometer.audit.checks import CHECKS
from durometer.audit.files import read_artefact
from durometer.audit.html import to_html
from durometer.audit.manifest import format_manifest, read_manifest
from durometer.audit.run import AuditRequest, audit, diff
from durometer.audit.sarif import to_sarif
from durometer.audit.signing import parse_signature
from durometer.audit.tensors import ArraySource, GgufSource, open_tensors
from durometer.cli import main
from durometer.core.errors import InputError
from durometer.findings import Finding, Report, Severity, Status, found, worst_first
from durometer.measures.base import ItemRecord

EVIL_NAME = "<script>alert(1).bin"


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    folder = write_model(tmp_path / "bad", auto_map={"AutoModel": "a.B"})
    (folder / EVIL_NAME).write_bytes(call())
    (folder / "README.md").write_text(
        "---\nlicense: apache-2.0\nbase_model:\n- org/base\n---\nHello"
    )
    (folder / "broken.json").write_text("{")
    return folder


def report_of(folder: Path, **options: Any) -> Report:
    return audit(AuditRequest(folder, **options))


def test_severities_are_ordered_and_named() -> None:
    assert Severity.INFO < Severity.LOW < Severity.MEDIUM < Severity.HIGH < Severity.CRITICAL
    assert Severity.of("high") is Severity.HIGH
    with pytest.raises(InputError, match="severity 'huge'"):
        Severity.of("huge")


def test_json_goes_round(bad: Path) -> None:
    report = report_of(bad)
    again = Report.from_json(report.to_json())
    assert again == report
    assert again.to_json() == report.to_json()


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"schema_version": 99}', '{"schema_version": 1, "target": 1}', "[" * 99999],
)
def test_other_json_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        Report.from_json(text)


def test_the_worst_comes_first(bad: Path) -> None:
    severities = [each.severity for each in report_of(bad).problems]
    assert severities == sorted(severities, reverse=True)
    mixed = [found("A", Severity.LOW, "a"), found("B", Severity.HIGH, "b")]
    assert [each.check for each in worst_first(mixed)] == ["B", "A"]


def test_sarif_keeps_to_the_schema(bad: Path) -> None:
    report = report_of(bad)
    log = json.loads(to_sarif(report))
    schema = json.loads((Path(__file__).parent / "sarif_schema.json").read_text())
    jsonschema.validate(log, schema, format_checker=jsonschema.FormatChecker())
    (run,) = log["runs"]
    rules = {rule["id"] for rule in run["tool"]["driver"]["rules"]}
    assert {result["ruleId"] for result in run["results"]} == rules
    assert not run["invocations"][0]["executionSuccessful"]
    assert len(run["results"]) == sum(e.status is not Status.ERROR for e in report.findings)
    prints = [result["partialFingerprints"]["durometer/v1"] for result in run["results"]]
    assert len(set(prints)) == len(prints)


def test_cyclonedx_tells_measured_from_declared(bad: Path) -> None:
    report = report_of(bad)
    bom = json.loads(to_cyclonedx(report))
    assert (bom["bomFormat"], bom["specVersion"]) == ("CycloneDX", "1.6")
    model = bom["metadata"]["component"]
    assert model["type"] == "machine-learning-model"
    hashes = {each["name"]: each["hashes"][0]["content"] for each in model["components"]}
    assert hashes == report.inputs["files"]
    assert all(
        each["name"].split(":")[1] in ("measured", "declared") for each in model["properties"]
    )
    assert model["licenses"] == [{"license": {"name": "apache-2.0"}}]
    assert model["pedigree"]["ancestors"][0]["name"] == "org/base"
    assert model["modelCard"]["modelParameters"]["modelArchitecture"] == CONFIG["architectures"][0]
    assert to_cyclonedx(report) == to_cyclonedx(report)
    assert len({each["bom-ref"] for each in bom["vulnerabilities"]}) == len(bom["vulnerabilities"])


def test_html_is_one_page_that_shows_text_as_data(bad: Path) -> None:
    weights = Finding(
        "WF-03",
        Status.FOUND,
        Severity.HIGH,
        "a projection",
        {"strength_by_layer": {"0": 0.1, "1": 0.2, "2": 0.3}},
    )
    page = to_html(replace(report_of(bad), findings=(*report_of(bad).findings, weights)))
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "http" not in page.replace("http-equiv", "")
    assert page.count('<i style="height') == 3


def test_a_clean_page(tmp_path: Path) -> None:
    assert "Nothing found." in to_html(report_of(write_model(tmp_path)))


# --- command line --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ([], 1),
        (["--fail-on", "critical"], 1),
        (["--format", "json"], 1),
        (["--base", "/nowhere"], 2),
        (["--fail-on", "huge"], 2),
    ],
)
def test_exit_codes(options: list[str], code: int, bad: Path, capsys: Any) -> None:
    assert main(["audit", str(bad), *options]) == code
    assert capsys.readouterr().err == "" or code == 2


def test_incomplete_and_complete(tmp_path: Path, capsys: Any) -> None:
    folder = write_model(tmp_path)
    assert main(["audit", str(folder)]) == 0
    text = capsys.readouterr().out
    assert "Nothing found." in text
    assert "Not examined:" in text
    (folder / "broken.json").write_text("{")
    assert main(["audit", str(folder)]) == 3
    assert main(["audit", str(folder), "--allow-incomplete"]) == 0


@pytest.mark.parametrize("form", ["text", "json", "sarif", "cyclonedx", "html"])
def test_every_form_can_be_written(form: str, bad: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "report"
    assert main(["audit", str(bad), "--format", form, "--out", str(out)]) == 1
    assert out.stat().st_size > 500
    assert capsys.readouterr().out == ""


def test_two_reports_are_compared(bad: Path, tmp_path: Path, capsys: Any) -> None:
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    main(["audit", str(bad), "--format", "json", "--out", str(first)])
    (bad / EVIL_NAME).unlink()
    main(["audit", str(bad), "--format", "json", "--out", str(second)])
    capsys.readouterr()
    assert main(["audit", "diff", str(first), str(second)]) == 0
    assert "gone: critical FF-02" in capsys.readouterr().out
    assert main(["audit", "diff", str(second), str(first)]) == 1
    assert "new: critical FF-02" in capsys.readouterr().out
    assert main(["audit", "diff", str(first)]) == 2


def test_a_check_that_was_not_run_is_no_repair() -> None:
    before = Report("m", (found("WF-10", Severity.HIGH, "x"),))
    after = Report("m", (Finding("WF-10", Status.NOT_EXAMINED, Severity.INFO, "x"),))
    changes = diff(before, after)
    assert not changes["gone"]
    assert len(changes["no_longer_examined"]) == 1


def test_the_python_form(bad: Path) -> None:
    report = durometer.audit_model(bad)
    assert report.at_least(Severity.CRITICAL)


# --- accepted findings ---------------------------------------------------------------------------


def accept(path: Path, report: Report, expires: str, reason: str = "known") -> Path:
    entries = [
        {"fingerprint": each.fingerprint, "reason": reason, "expires": expires}
        for each in report.problems
    ]
    write_json(path, {"accepted": entries})
    return path


def test_accepted_findings_count_no_more(bad: Path, tmp_path: Path) -> None:
    before = report_of(bad)
    after = report_of(bad, baseline=accept(tmp_path / "b.json", before, "2999-01-01"))
    assert not after.problems
    assert len(after.accepted) == len(before.problems)
    assert after.accepted[0]["reason"] == "known"


def test_expired_and_changed_ones_count_again(bad: Path, tmp_path: Path) -> None:
    before = report_of(bad)
    expired = report_of(bad, baseline=accept(tmp_path / "b.json", before, "2001-01-01"))
    assert {each.check for each in expired.problems} >= {"FF-02", "BL-01"}
    (bad / EVIL_NAME).write_bytes(call("posix"))
    changed = report_of(bad, baseline=accept(tmp_path / "b.json", before, "2999-01-01"))
    assert "FF-02" in {each.check for each in changed.problems}


@pytest.mark.parametrize("text", ["{}", '{"accepted": [{"fingerprint": "x"}]}', "[", "[1]"])
def test_a_malformed_baseline_is_refused(text: str, bad: Path, tmp_path: Path) -> None:
    (tmp_path / "b.json").write_text(text)
    with pytest.raises(InputError, match="accepted"):
        report_of(bad, baseline=tmp_path / "b.json")


# --- manifest, claims, base ----------------------------------------------------------------------


def of(report: Report, check: str) -> list[Finding]:
    return [each for each in report.findings if each.check == check]


def test_a_manifest_is_written_and_verified(tmp_path: Path) -> None:
    folder, manifest = write_model(tmp_path / "m"), tmp_path / "sums"
    (written,) = of(report_of(folder, manifest=manifest), "PV-01")
    assert written.status is Status.NOT_EXAMINED
    assert read_manifest(manifest) == report_of(folder).inputs["files"]
    assert of(report_of(folder, manifest=manifest), "PV-01")[0].status is Status.PASSED
    (folder / "extra.py").write_text("x = 1")
    (folder / "config.json").write_text(json.dumps(CONFIG | {"eos_token_id": 3}))
    (folder / "generation_config.json").unlink()
    (changed,) = of(report_of(folder, manifest=manifest), "PV-01")
    assert changed.severity is Severity.HIGH
    assert changed.evidence == {
        "changed": ["config.json"], "added": ["extra.py"], "missing": ["generation_config.json"],
    }  # fmt: skip


def test_an_earlier_report_is_a_manifest(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    (tmp_path / "r.json").write_text(report_of(folder).to_json())
    assert of(report_of(folder, manifest=tmp_path / "r.json"), "PV-01")[0].status is Status.PASSED


def test_manifest_errors(tmp_path: Path) -> None:
    (tmp_path / "sums").write_text("nonsense\n")
    with pytest.raises(InputError, match="line 1"):
        read_manifest(tmp_path / "sums")
    with pytest.raises(InputError, match="rename"):
        format_manifest({"a\nb": "0" * 64})


def test_claims_are_compared(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", _name_or_path="other/model")
    checks = of(report_of(folder, claim="org/model"), "PV-03")
    assert {each.severity for each in checks} == {Severity.LOW, Severity.MEDIUM}
    assert of(report_of(folder), "PV-03")[0].status is Status.NOT_EXAMINED


def test_settings_are_compared_with_the_bases(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", rope_theta=10000.0)
    folder = write_model(tmp_path / "m", rope_theta=5.0)
    report = report_of(folder, base=base)
    (drift,) = of(report, "CF-03")
    assert drift.evidence == {"rope_theta": {"model": 5.0, "base": 10000.0}}
    (side,) = of(report, "PV-04")
    assert side.evidence["files"] == ["config.json"]
    assert report.inputs["base"]["files"].keys() == report.inputs["files"].keys()
    assert any("vouches" in each["why"] for each in report.not_examined)


# --- signatures ----------------------------------------------------------------------------------


def bundle(folder: Path, path: Path, ignored: list[str], **changes: str) -> Path:
    files = dict(report_of(folder).inputs["files"])
    resources = [
        {"name": name, "algorithm": "sha256", "digest": digest}
        for name, digest in (files | changes).items()
    ]
    statement = {
        "predicate": {
            "serialization": {"method": "files", "hash_type": "sha256", "ignore_paths": ignored},
            "resources": resources,
        }
    }
    payload = base64.b64encode(json.dumps(statement).encode()).decode()
    write_json(path, {"dsseEnvelope": {"payload": payload, "signatures": []}})
    return path


def test_what_a_signature_lists_and_leaves_out(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    signature = str(bundle(folder, tmp_path / "model.sig", [".git"]))
    (covered,) = of(report_of(folder, signature=signature), "PV-02")
    assert covered.severity is Severity.INFO
    assert covered.evidence["ignores"] == [".git"]
    (folder / "new.py").write_text("x = 1")
    assert of(report_of(folder, signature=signature), "PV-02")[0].severity is Severity.MEDIUM
    (folder / "config.json").write_text("{}")
    assert of(report_of(folder, signature=signature), "PV-02")[0].severity is Severity.CRITICAL


def test_without_the_extra_the_signer_is_not_examined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    folder = write_model(tmp_path / "m")
    (tmp_path / "signer.pub").write_text("a key")
    signature = f"{bundle(folder, tmp_path / 'model.sig', [])}:key={tmp_path / 'signer.pub'}"
    reasons = [
        each.evidence["reason"] for each in of(report_of(folder, signature=signature), "PV-02")
    ]
    assert any("durometer[signing]" in reason for reason in reasons)


def test_an_identity_needs_a_trust_file(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    signature = f"{bundle(folder, tmp_path / 'model.sig', [])}:identity=a@b.c,issuer=https://i.d"
    assert any(
        "no network" in str(e.evidence) for e in of(report_of(folder, signature=signature), "PV-02")
    )


def test_signature_texts() -> None:
    assert parse_signature("a.sig") == (Path("a.sig"), {})
    assert parse_signature("a:b.sig:key=k.pub") == (Path("a:b.sig"), {"key": "k.pub"})
    text = "m.sig:identity=a@b.c,issuer=https://i.d/x,trust=t.json"
    assert parse_signature(text)[1] == {
        "identity": "a@b.c",
        "issuer": "https://i.d/x",
        "trust": "t.json",
    }


def test_a_signature_that_is_none(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    (tmp_path / "x.sig").write_text("{}")
    with pytest.raises(InputError, match="not a model-signing bundle"):
        report_of(folder, signature=str(tmp_path / "x.sig"))


# --- tensors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", ["float32", "float16", "bfloat16", "float64", "float8_e4m3fn", "int8"]
)
def test_tensors_are_read_as_torch_reads_them(dtype: str, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file as save_torch

    value = (torch.randn(5, 7) * 3).to(getattr(torch, dtype))
    save_torch({"a": value, "b": torch.zeros(0, 2)}, tmp_path / "m.safetensors")
    source = open_tensors(read_artefact(tmp_path / "m.safetensors"))
    assert source.shape("a") == (5, 7)
    assert source.read("b").shape == (0, 2)
    np.testing.assert_array_equal(source.read("a"), value.float().numpy())
    source.read("a")[:] = 0  # a fresh array: the next reading is not changed by it
    np.testing.assert_array_equal(source.read("a"), value.float().numpy())


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "BF16", "F16"])
def test_gguf_tensors_are_dequantised(kind: str, tmp_path: Path) -> None:
    from gguf import GGMLQuantizationType, quants

    from durometer.formats.gguf import GGML_TYPES

    number = next(n for n, each in GGML_TYPES.items() if each.name == kind)
    value = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    packed = quants.quantize(value, GGMLQuantizationType[kind])
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf(infos=[("a", (64, 4), number, 0)], data=packed.tobytes()))
    source = GgufSource(path)
    assert (source.names(), source.shape("a"), source.dtype("a")) == (["a"], (4, 64), kind)
    np.testing.assert_array_equal(
        source.read("a"), quants.dequantize(packed, GGMLQuantizationType[kind])
    )


def test_folders_are_opened_by_their_index(tmp_path: Path) -> None:
    values = tensors()
    names = sorted(values)
    save_file({n: values[n] for n in names[:4]}, tmp_path / "a.safetensors")
    save_file({n: values[n] for n in names[4:]}, tmp_path / "b.safetensors")
    mapping = {n: "a.safetensors" if n in names[:4] else "b.safetensors" for n in names}
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": mapping})
    source = open_tensors(read_artefact(tmp_path))
    assert sorted(source.names()) == names
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.txt").write_text("a")
    with pytest.raises(InputError, match="no weights"):
        open_tensors(read_artefact(tmp_path / "x"))


def test_an_adapter_is_added_to_its_base(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj"
    down, up = np.ones((2, 8), np.float32), np.full((8, 2), 0.5, np.float32)
    prefix = f"base_model.model.{name}"
    save_file(
        {f"{prefix}.lora_A.weight": down, f"{prefix}.lora_B.weight": up},
        tmp_path / "adapter_model.safetensors",
    )
    write_json(tmp_path / "adapter_config.json", {"r": 2, "lora_alpha": 4, "peft_type": "LORA"})
    base = ArraySource(tensors())
    source = AdapterSource(tmp_path, base)
    np.testing.assert_allclose(source.read(f"{name}.weight"), base.read(f"{name}.weight") + 2.0)
    np.testing.assert_array_equal(source.read("lm_head.weight"), base.read("lm_head.weight"))
    with pytest.raises(InputError, match="no LoRA part"):
        AdapterSource(tmp_path, ArraySource({}))
    assert not [each for each in report_of(tmp_path).problems if each.severity]


# --- behaviour -----------------------------------------------------------------------------------


def record(number: int, correct: bool) -> ItemRecord:
    return ItemRecord(
        "outcomes", "report", f"i{number}", f"e{number}", "", "", "", correct=float(correct)
    )


def test_a_lost_safeguard_is_told_from_a_kept_one() -> None:
    safe = [record(n, n < 2) for n in range(60)]
    lost = [record(n, n < 50) for n in range(60)]
    assert compare_answers(safe, lost).severity is Severity.HIGH
    assert compare_answers(safe, safe).status is Status.PASSED
    assert compare_answers(safe[:4], safe[:4]).status is Status.INCONCLUSIVE
    unread = [replace(each, parse_status="non-finite likelihood") for each in safe]
    assert compare_answers(safe, unread).status is Status.ERROR


def test_more_refusals_of_harmless_prompts_are_found() -> None:
    def asked(refused: int, count: int = 60) -> list[ItemRecord]:
        return [
            replace(record(n, False), outcome="refusal" if n < refused else "benign_deflection")
            for n in range(count)
        ]

    assert compare_refusals(asked(1), asked(30)).status is Status.FOUND
    assert compare_refusals(asked(1), asked(30)).severity is Severity.LOW
    assert compare_refusals(asked(30), asked(1)).status is Status.PASSED
    assert compare_refusals(asked(1, 4), asked(2, 4)).status is Status.INCONCLUSIVE


def test_behaviour_needs_a_base(tmp_path: Path) -> None:
    (left,) = of(report_of(write_model(tmp_path), behaviour="world"), "BH-01")
    assert left.status is Status.NOT_EXAMINED
    shutil.rmtree(tmp_path)


# --- the weights, through files ------------------------------------------------------------------


def test_the_weights_are_held_against_the_base_and_the_parents(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    base = {n: generator.normal(size=v.shape).astype(np.float32) for n, v in tensors().items()}
    other = {n: v + generator.normal(size=v.shape).astype(np.float32) for n, v in base.items()}
    mixed = {n: (v + other[n]) / 2 for n, v in base.items()}
    folders = []
    for name, values in (("base", base), ("other", other), ("mixed", mixed)):
        (tmp_path / name).mkdir()
        folders.append(write_model(tmp_path / name))
        save_file(values, folders[-1] / "model.safetensors")
    report = report_of(folders[2], base=folders[0], also=(folders[1],))
    (merge,) = of(report, "WF-40")
    assert merge.status is Status.FOUND
    assert merge.evidence["weights"] == pytest.approx([0.5], abs=0.01)
    assert report.coverage["compared_share"] == 1.0
    assert not {e["check"] for e in report.not_examined} & {"WF-01", "WF-11", "PV-05"}
    same = report_of(folders[0], base=folders[0])
    assert {e.status for e in same.findings if e.check.startswith("WF-")} == {Status.PASSED}
    assert of(same, "PV-05")[0].status is Status.NOT_APPLICABLE
    alone = report_of(folders[0], also=(folders[1],))
    assert {"WF-01", "WF-40", "PV-05"} <= {e["check"] for e in alone.not_examined}


def test_every_check_is_described_once_in_the_code_and_in_the_documentation() -> None:
    root = Path(__file__).resolve().parent.parent
    source = "".join(p.read_text() for p in (root / "src/durometer/audit").rglob("*.py"))
    assert set(re.findall(r'"([A-Z]{2}-\d\d)"', source)) == set(CHECKS)
    pages = "".join((root / "docs" / f"{name}.md").read_text() for name in ("audit", "forensics"))
    assert not [each for each in CHECKS if f"{{ #{each.lower()} }}" not in pages]
