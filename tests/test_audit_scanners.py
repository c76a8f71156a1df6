"""The comparison with file scanners: its cases, how answers are read, and our own verdicts."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

STUDY = Path(__file__).resolve().parent.parent / "studies" / "audit"


@pytest.fixture(scope="module")
def scanners() -> ModuleType:
    sys.path.insert(0, str(STUDY))
    try:
        return importlib.import_module("scanners")
    finally:
        sys.path.remove(str(STUDY))


def test_the_committed_result_has_every_case(scanners: ModuleType) -> None:
    result = json.loads((STUDY / "results" / "scanners.json").read_text("utf-8"))
    cases = [(c.kind, c.name, c.harmless) for c in scanners.cases()]
    assert len(set(cases)) == len(cases)
    assert [(c["kind"], c["name"], c["harmless"]) for c in result["cases"]] == cases
    assert sum(not safe for *_, safe in cases) >= 60
    assert result["classes"] == scanners.counted(result["cases"])
    assert set(result["cases"][0]["verdicts"]) == {
        scanners.OURS,
        *(scanner.name for scanner in scanners.SCANNERS),
    }


def test_nothing_hostile_was_called_clean_by_us(scanners: ModuleType) -> None:
    result = json.loads((STUDY / "results" / "scanners.json").read_text("utf-8"))
    ours = [(c["name"], c["verdicts"][scanners.OURS]) for c in result["cases"] if not c["harmless"]]
    assert not [name for name, verdict in ours if verdict in {"clean", "not looked at"}]


ALLOWED = ("pickle", "zip")


def test_harmless_files_raise_no_alarm(scanners: ModuleType, tmp_path: Path) -> None:
    every = [c for c in scanners.cases() if c.harmless and c.kind != "chat template"]
    loud, remarked = [], []
    for case, folder in zip(every, scanners.written(every, tmp_path), strict=True):
        verdict, _ = scanners.durometer(folder)
        if verdict == "flagged":
            loud.append(case.kind)
        elif verdict != "clean" and not case.kind.startswith(ALLOWED):
            remarked.append((case.kind, case.name, verdict))
    # Classes that are no tensors are reported, harmless or not; that is the price of a list.
    assert set(loud) == {"pickle of other classes"}
    assert not remarked


PICKLESCAN = "Scanned files: {}\nInfected files: 0\nSuspicious globals: {}\nDangerous globals: 0\n"


def test_answers_of_picklescan_are_read(scanners: ModuleType) -> None:
    def read(code: int | None, output: str = "") -> str:
        return scanners.read_picklescan(scanners.Answer(code, output))[0]

    assert read(1) == "flagged"
    assert read(2) == read(None) == "failed"
    assert read(0, PICKLESCAN.format(1, 0)) == "clean"
    assert read(0, PICKLESCAN.format(1, 2)) == "noted"
    assert read(0, PICKLESCAN.format(0, 0)) == "not looked at"


def test_answers_of_modelscan_are_read(scanners: ModuleType) -> None:
    def read(code: int | None, issues: list[str]) -> str:
        output = "No settings file\n\nREPORT " + json.dumps({"issues": issues}) + "\n"
        return scanners.read_modelscan(scanners.Answer(code, output))[0]

    assert read(1, ["x"]) == read(2, ["x"]) == "flagged"
    assert (read(0, []), read(2, []), read(3, [])) == ("clean", "failed", "not looked at")
    assert scanners.read_modelscan(scanners.Answer(None, ""))[0] == "failed"


def test_answers_of_fickling_are_read(scanners: ModuleType) -> None:
    def read(code: int | None, output: str = "") -> str:
        return scanners.read_fickling(scanners.Answer(code, output))[0]

    assert [read(n) for n in (0, 1, 2, 3, None)] == [
        "clean", "flagged", "failed", "not looked at", "failed",
    ]  # fmt: skip
    assert read(1, "Traceback (most recent call last)") == "failed"


def test_the_worker_runs_jobs_apart_and_survives_them(scanners: ModuleType, tmp_path: Path) -> None:
    codes = [
        "import sys; print(sys.argv[1]); sys.exit(3)",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "x = bytearray(8 << 30)",
        "import json",
    ]
    jobs = [{"code": c, "argv": ["", "said"], "folder": str(tmp_path)} for c in codes]
    found = scanners.answers(Path(sys.executable), "json", jobs)
    assert [answer.code for answer in found] == [3, None, 1, 0]
    assert found[0].output == "said\n"
    assert "MemoryError" in found[2].output


def test_a_folder_without_its_kind_is_not_looked_at(scanners: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert scanners.fickling(folder) == []
    (folder / "a.pkl").write_bytes(b"\x80\x02.")
    (folder / "b.bin").write_bytes(b"PK\x03\x04")
    assert [job["argv"][-1] for job in scanners.fickling(folder)] == [
        str(folder / "a.pkl"), str(folder / "b.bin"),
    ]  # fmt: skip
