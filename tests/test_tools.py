"""The checker of the house rules: each rule fires on what breaks it, and on nothing else."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import check_functions

ROOT = Path(__file__).parents[1]


def messages(source: str, name: str = "module.py") -> list[str]:
    """Check a module whose own docstring is supplied."""
    faults, _ = check_functions.check(f'"""Doc."""\n{source}', Path(name))
    return [fault.message for fault in faults]


def long_function(lines: int) -> str:
    return "def _f() -> None:\n" + "    pass\n" * (lines - 1)


BROKEN = {
    "long": (long_function(81), "_f is 81 lines long, over 80"),
    "function docstring": ("def f() -> None: ...", "f has no docstring"),
    "async docstring": ("async def f() -> None: ...", "f has no docstring"),
    "class docstring": ("class C: ...", "C has no docstring"),
    "method docstring": ('class C:\n "D."\n def f(self) -> None: ...', "f has no docstring"),
    "conditional": ("if True:\n def f() -> None: ...", "f has no docstring"),
    "no return": ("def _f(): ...", "_f lacks annotations: return"),
    "no parameter": ("def _f(a, *, b) -> None: ...", "_f lacks annotations: a, b"),
    "positional only": ("def _f(a, /) -> None: ...", "_f lacks annotations: a"),
    "variadic": ("def _f(*a, **k) -> None: ...", "_f lacks annotations: a, k"),
    "nested": ("def _f() -> None:\n def g(a): ...", "g lacks annotations: a, return"),
    "init": ("class _C:\n def __init__(self): ...", "__init__ lacks annotations: return"),
    "static": (
        "class _C:\n @staticmethod\n def f(a) -> None: ...",
        "f lacks annotations: a",
    ),
    "bare except": (
        "try: pass\nexcept: pass",
        "catches every exception: name those that are meant",
    ),
    "except Exception": (
        "try: pass\nexcept Exception as e: pass",
        "catches every exception: name those that are meant",
    ),
    "except tuple": (
        "try: pass\nexcept (OSError, builtins.BaseException): pass",
        "catches every exception: name those that are meant",
    ),
    "except star": (
        "try: pass\nexcept* Exception: pass",
        "catches every exception: name those that are meant",
    ),
    "suppress": (
        "with contextlib.suppress(Exception): pass",
        "suppresses every exception: name those that are meant",
    ),
}

ALLOWED = {
    "eighty lines": long_function(80),
    "documented": 'def f(a: int, *b: str) -> int:\n "D."\n return a',
    "private": "def _f() -> None: ...\nclass _C:\n def f(self) -> None: ...",
    "nested": 'def f() -> None:\n "D."\n def g() -> None: ...\n class C: ...',
    "dunder": 'class C:\n "D."\n def __len__(self) -> int: ...',
    "class method": "class _C:\n @classmethod\n def f(cls) -> None: ...",
    "lambda": "f = lambda a: a",
    "override": 'class C:\n "D."\n @typing.override\n def f(self) -> None: ...',
    "setter": 'class C:\n "D."\n @x.setter\n def x(self, x: int) -> None: ...',
    "overload": "@overload\ndef f(a: int) -> int: ...",
    "named exceptions": "try: pass\nexcept (OSError, errors.ExceptionGroup): pass",
    "named suppress": "with suppress(OSError): pass",
}


@pytest.mark.parametrize(("source", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_rule_is_reported(source: str, message: str) -> None:
    assert messages(source) == [message]


@pytest.mark.parametrize("source", ALLOWED.values(), ids=ALLOWED)
def test_good_source_is_passed(source: str) -> None:
    assert messages(source) == []


@pytest.mark.parametrize(
    ("name", "faults"), [("module.py", 1), ("__init__.py", 1), ("_private.py", 0)]
)
def test_a_public_module_needs_a_docstring(name: str, faults: int) -> None:
    found, _ = check_functions.check("", Path(name))
    assert len(found) == faults


def test_nothing_in_a_private_module_is_public() -> None:
    assert messages("def f() -> None: ...", "_private.py") == []


def test_length_counts_from_def_and_includes_the_docstring() -> None:
    source = '@cache\n@other\ndef _f(\n    a: int,\n) -> None:\n    """Doc."""\n    pass\n'
    _, lengths = check_functions.check(source, Path("module.py"))
    assert lengths == [5]


def test_faults_are_in_line_order() -> None:
    faults, _ = check_functions.check("def f(): ...\ndef g(): ...\n", Path("m.py"))
    assert [fault.line for fault in faults] == sorted(fault.line for fault in faults)
    assert str(faults[0]).startswith("m.py:1: ")


def test_main_prints_faults_and_median(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "good.py").write_text('"""Doc."""\n\n\ndef _f() -> None:\n    pass\n')
    assert check_functions.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out == "1 functions in 1 modules: median 2 lines, longest 2\n"
    (tmp_path / "bad.py").write_text('"""Doc."""\n\n\ndef _f():\n    return 1\n    return 2\n')
    assert check_functions.main([str(tmp_path)]) == 1
    fault, summary = capsys.readouterr().out.splitlines()
    assert fault == f"{tmp_path / 'bad.py'}:4: _f lacks annotations: return"
    assert summary == "2 functions in 2 modules: median 2.5 lines, longest 3"


def test_main_refuses_a_folder_without_modules(tmp_path: Path) -> None:
    assert check_functions.main([str(tmp_path)]) == 2


def test_the_tool_keeps_its_own_rules() -> None:
    assert check_functions.main([str(ROOT / "tools")]) == 0


make_needed = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def run_make(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run make as a user would, not as a child of the make that may run these tests."""
    clean = {k: v for k, v in os.environ.items() if k not in {"MAKEFLAGS", "MAKELEVEL", "MFLAGS"}}
    return subprocess.run(
        ["make", *arguments], cwd=ROOT, env=clean, capture_output=True, text=True, check=False
    )


@make_needed
def test_make_lists_its_targets() -> None:
    shown = run_make()
    assert shown.returncode == 0
    listed = {line.split()[0] for line in shown.stdout.splitlines()[1:]}
    assert listed == {"help", "setup", "demo", "test", "lint", "bench", "docs", "clean"}


@make_needed
def test_make_setup_refuses_an_unusable_python(tmp_path: Path) -> None:
    stamp = tmp_path / "venv"
    shown = run_make("setup", f"VENV={stamp}", "PYTHON=/nonexistent/python")
    assert shown.returncode != 0
    assert "Python 3.11 or newer" in shown.stderr
    assert not stamp.exists()


def test_the_checker_runs_as_a_script(tmp_path: Path) -> None:
    (tmp_path / "empty.py").write_text("")
    script = ROOT / "tools" / "check_functions.py"
    shown = subprocess.run(
        [sys.executable, script, tmp_path], capture_output=True, text=True, check=False
    )
    assert shown.returncode == 1
    assert "the module has no docstring" in shown.stdout
