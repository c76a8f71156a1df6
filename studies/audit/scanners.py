"""What file scanners say of the same inert hostile files, and of harmless ones, beside ours.

    python studies/audit/scanners.py --work DIR [--python-of NAME=PYTHON ...]

Every case is written into a folder of its own below DIR and handed to each scanner as its users
hand it over. A scanner runs in its own virtual environment (made below DIR where no Python is
named) and in its own process, with a limit on time and memory. Nothing that is in the files is
executed: they name imports and call nothing that exists, and no loader ever sees them.
``results/scanners.json`` holds every verdict; the page on audits shows it by class of file.
"""

import argparse
import datetime
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import harmless  # noqa: E402
import hostile  # noqa: E402
import hostile_templates as templates  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results"
Verdict = Literal["flagged", "noted", "failed", "clean", "not looked at"]
WORST: tuple[Verdict, ...] = ("flagged", "failed", "noted", "clean", "not looked at")


PICKLE_NAMES = {".bin", ".pkl", ".pickle", ".pt", ".pth"}
"""Endings that fickling's own hub mode takes for pickles."""
UNNAMED = "weights"
"""The pickles without an ending, which a user would have to hand over."""


# ---- the cases -----------------------------------------------------------------------------

ALONE = ("model.safetensors", "model.gguf")
"""Files that are the model themselves; all others stand beside a harmless small one."""


@dataclass(frozen=True)
class Case:
    """One folder to be scanned.

    Attributes:
        kind: class of file, a row of the table.
        harmless: whether a report about it is a false alarm.
        build: writes into the folder, which is empty.
    """

    kind: str
    name: str
    harmless: bool
    build: Callable[[Path], object]


def cases() -> Iterator[Case]:
    """Yield every case, hostile ones first."""
    for module, safe in ((hostile, False), (harmless, True)):
        yield from _single("pickle named .bin", module.PICKLES, "pytorch_model.bin", safe)
        yield from _single("pickle named .pkl", module.PICKLES, "state.pkl", safe)
        yield from _single("pickle without extension", module.PICKLES, UNNAMED, safe)
        yield from _single("zip archive named .bin", module.ZIPS, "pytorch_model.bin", safe)
        yield from _single("safetensors", module.SAFETENSORS, "model.safetensors", safe)
        yield from _single("GGUF", module.GGUFS, "model.gguf", safe)
    for name, (check, build) in hostile.FOLDERS.items():
        yield Case(_group(check), name, False, _beside(build))
    for name, build in harmless.FOLDERS.items():
        yield Case("folder", name, True, _beside(build))
    for name, (_, _, source) in templates.HOSTILE.items():
        yield Case("chat template", name, False, _template(source))
    for name, source in templates.BENIGN.items():
        yield Case("chat template", name, True, _template(source))
    yield from _single("pickle of other classes", harmless.OTHER_CLASSES, "training_args.bin", True)


def _single(kind: str, files: dict[str, bytes], name: str, safe: bool) -> Iterator[Case]:
    for case, data in files.items():
        write = partial(_write, name=name, data=data)
        yield Case(kind, case, safe, write if name in ALONE else _beside(write))


def _write(folder: Path, *, name: str, data: bytes) -> None:
    (folder / name).write_bytes(data)


def _group(check: str) -> str:
    """Return the class of a folder that is hostile in what ``check`` looks at."""
    if check in {"FF-01", "FF-02", "FF-03", "FF-04"}:
        return "code beside the weights"
    if check.startswith("CF"):
        return "configuration"
    inside = {"FF-07", "FF-08", "FF-11", "FF-12"}
    return "tensors and index" if check in inside else "links, names, texts"


def _beside(build: hostile.Builder) -> Callable[[Path], object]:
    return lambda folder: build(hostile.write_model(folder))


def _template(source: str) -> Callable[[Path], object]:
    settings = {"chat_template": source}
    return _beside(lambda folder: hostile.write_json(folder / "tokenizer_config.json", settings))


# ---- the scanners --------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What one job said: its exit code, None where it was stopped, and its output."""

    code: int | None
    output: str


Judged = tuple[Verdict, int | None]


@dataclass(frozen=True)
class Scanner:
    """One scanner.

    Attributes:
        package: what pip is asked for, and ``more`` that it needs and does not ask for itself.
        module: holds its command line.
        claims: what its documentation says it looks at.
        used: how it was called, for readers.
        jobs: the calls for one folder, for ``scanner_worker.py``.
        read: from one answer to a verdict and an exit code.
    """

    name: str
    package: str
    more: tuple[str, ...]
    module: str
    claims: str
    used: str
    jobs: Callable[[Path], list[dict[str, Any]]]
    read: Callable[[Answer], Judged]


def picklescan(folder: Path, *options: str) -> list[dict[str, Any]]:
    """Return the call of picklescan for one folder."""
    code = "import sys; from picklescan.cli import main; sys.exit(main())"
    return [{"code": code, "argv": ["picklescan", "-p", str(folder), *options]}]


def read_picklescan(answer: Answer) -> Judged:
    """Return the verdict: 1 is a finding, 2 an error; *suspicious* names leave the code at 0."""
    if answer.code not in {0, 1}:
        return "failed", answer.code
    if answer.code == 1:
        return "flagged", 1
    if _count(answer.output, "Suspicious globals"):
        return "noted", 0
    return ("clean" if _count(answer.output, "Scanned files") else "not looked at"), 0


def _count(output: str, name: str) -> int:
    found = re.search(rf"^{name}: (\d+)", output, re.MULTILINE)
    return int(found[1]) if found else 0


# Its console breaks lines, so the report is taken from the file that it writes besides.
MODELSCAN = """
from pathlib import Path
from modelscan.cli import main
report = Path("found.json")
report.unlink(missing_ok=True)
try:
    main()
finally:
    print("\\nREPORT", report.read_text() if report.is_file() else "")
"""


def modelscan(folder: Path) -> list[dict[str, Any]]:
    """Return the call of ModelScan for one folder."""
    options = ("-p", str(folder), "-r", "json", "-o", "found.json")
    return [{"code": MODELSCAN, "argv": ["modelscan", *options]}]


def read_modelscan(answer: Answer) -> Judged:
    """Return the verdict: 2 is an error, 3 that no file was of its kinds.

    An issue counts though another file could not be read.
    """
    report = answer.output.rpartition("\nREPORT ")[2].strip()
    if report and json.loads(report)["issues"]:
        return "flagged", answer.code
    verdicts: dict[int | None, Verdict] = {0: "clean", 3: "not looked at"}
    return verdicts.get(answer.code, "failed"), answer.code


FICKLING = "import sys; from fickling.cli import main; sys.exit(main())"
IN_A_ZIP = """
import sys
from fickling import scan_zip_archive
found = scan_zip_archive(sys.argv[1], graceful=True).values()
unsafe, errors = not all(f.is_safe for f in found), any(f.errors for f in found)
sys.exit(2 if errors else 1 if unsafe else 0 if found else 3)
"""


def fickling(folder: Path) -> list[dict[str, Any]]:
    """Return the calls of fickling for the pickles of one folder: it takes single files."""
    jobs = []
    for file in sorted(folder.rglob("*")):
        named = file.suffix in PICKLE_NAMES or file.name == UNNAMED
        if named and file.is_file() and not file.is_symlink():
            if file.read_bytes()[:4] == b"PK\x03\x04":
                jobs.append({"code": IN_A_ZIP, "argv": ["", str(file)]})
            else:
                jobs.append({"code": FICKLING, "argv": ["fickling", "-s", str(file)]})
    return jobs


def read_fickling(answer: Answer) -> Judged:
    """Return the verdict: 1 is unsafe, 2 could not be parsed, 3 an archive without pickles."""
    verdicts: dict[int | None, Verdict] = {0: "clean", 1: "flagged", 3: "not looked at"}
    crashed = "Traceback" in answer.output
    return "failed" if crashed else verdicts.get(answer.code, "failed"), answer.code


def durometer(folder: Path) -> Judged:
    """Audit a folder with ``durometer audit``, in this process: it loads nothing of it."""
    from durometer.audit.run import AuditRequest, audit, exit_code
    from durometer.findings import Severity, Status

    report = audit(AuditRequest(folder))
    code = exit_code(report, Severity.HIGH)
    noted = report.problems or [e for e in report.findings if e.status is Status.INCONCLUSIVE]
    verdicts: dict[int, Verdict] = {0: "noted" if noted else "clean", 1: "flagged"}
    return verdicts.get(int(code), "failed"), int(code)


SCANNERS = (
    Scanner(
        "picklescan", "picklescan", ("numpy",), "picklescan.cli",
        "pickles, PyTorch files, NumPy files and zip archives, by extension and magic bytes",
        "picklescan -p FOLDER", picklescan, read_picklescan,
    ),
    Scanner(
        "picklescan --strict", "picklescan", ("numpy",), "picklescan.cli",
        "the same, and every name that is not on its list of harmless ones",
        "picklescan -p FOLDER --strict", lambda f: picklescan(f, "--strict"), read_picklescan,
    ),
    Scanner(
        "ModelScan", "modelscan[h5py]", (), "modelscan.cli",
        "pickles, PyTorch, NumPy, HDF5, Keras and TensorFlow files, by extension",
        "modelscan -p FOLDER", modelscan, read_modelscan,
    ),
    Scanner(
        "fickling", "fickling", ("typing_extensions",), "fickling.cli",
        "single pickle files; the pickles in a zip archive through a Python function",
        "fickling -s FILE; scan_zip_archive(FILE) for archives", fickling, read_fickling,
    ),
)  # fmt: skip
OURS = "durometer audit"


# ---- the run -------------------------------------------------------------------------------


def environment(scanner: Scanner, work: Path, named: dict[str, Path]) -> Path:
    """Return the Python of a scanner's environment, which is made where none is named."""
    package = scanner.package.partition("[")[0]
    if package in named:
        return named[package].absolute()
    python = (work / "environments" / package / "bin" / "python").absolute()
    if not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", python.parents[1]], check=True)
        wanted = (scanner.package, *scanner.more)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], check=True)
    return python


def version_of(python: Path, package: str) -> str:
    """Return the installed version of a package."""
    code = "import importlib.metadata as m, sys; print(m.version(sys.argv[1]))"
    name = package.partition("[")[0]
    done = subprocess.run([python, "-c", code, name], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def answers(python: Path, module: str, jobs: list[dict[str, Any]]) -> list[Answer]:
    """Return what a scanner says to every job, run by a worker with the scanner's Python."""
    command = [str(python), str(Path(__file__).with_name("scanner_worker.py")), module]
    done = subprocess.run(command, input=json.dumps(jobs), stdout=subprocess.PIPE, text=True,
                          check=True)  # fmt: skip
    return [Answer(**json.loads(line)) for line in done.stdout.splitlines()]


def verdicts_of(scanner: Scanner, python: Path, folders: Sequence[Path]) -> list[Judged]:
    """Return a scanner's verdict on every folder, the worst one where it takes single files."""
    jobs = [scanner.jobs(folder) for folder in folders]
    scratch = folders[0].parents[1] / "scratch"
    scratch.mkdir(exist_ok=True)
    flat = [job | {"folder": str(scratch)} for each in jobs for job in each]
    said = iter(answers(python, scanner.module, flat))
    read = [[scanner.read(next(said)) for _ in each] for each in jobs]
    nothing: Judged = ("not looked at", None)
    return [min(each, key=lambda v: WORST.index(v[0]), default=nothing) for each in read]


def written(every: Sequence[Case], work: Path) -> list[Path]:
    """Write every case into a folder of its own and return the folders."""
    shutil.rmtree(work / "cases", ignore_errors=True)
    folders = []
    for number, case in enumerate(every):
        # A builder may put something beside its model.
        folder = work / "cases" / str(number) / "model"
        folder.mkdir(parents=True)
        case.build(folder)
        folders.append(folder)
    return folders


def judged(every: Sequence[Case], verdicts: dict[str, list[Judged]]) -> list[dict[str, Any]]:
    """Return one record a case."""
    return [
        {
            "kind": case.kind,
            "name": case.name,
            "harmless": case.harmless,
            "verdicts": {name: found[number][0] for name, found in verdicts.items()},
            "exit_codes": {name: found[number][1] for name, found in verdicts.items()},
        }
        for number, case in enumerate(every)
    ]


def merged(found: list[dict[str, Any]], path: Path | None) -> list[dict[str, Any]]:
    """Return the records of all cases, those that were not run from an earlier result."""
    earlier = json.loads(path.read_text("utf-8"))["cases"] if path else []
    known = {(r["kind"], r["name"], r["harmless"]): r for r in (*earlier, *found)}
    return [known[case.kind, case.name, case.harmless] for case in cases()]


def counted(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return, by class of file, how many cases got which verdict from which scanner."""
    rows: dict[tuple[bool, str], list[dict[str, Any]]] = {}
    for each in found:
        rows.setdefault((each["harmless"], each["kind"]), []).append(each["verdicts"])
    return [
        {
            "kind": kind,
            "harmless": safe,
            "cases": len(verdicts),
            "verdicts": {name: dict(Counter(v[name] for v in verdicts)) for name in verdicts[0]},
        }
        for (safe, kind), verdicts in rows.items()
    ]


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for cases and environments"
    )
    parser.add_argument(
        "--python-of", action="append", default=[], metavar="NAME=PYTHON",
        help="Python of an environment that has picklescan, modelscan or fickling",
    )  # fmt: skip
    parser.add_argument(
        "--class", action="append", default=[], dest="kinds", metavar="CLASS",
        help="run these classes of files alone and keep the other verdicts as they are",
    )  # fmt: skip
    options = parser.parse_args()
    named = {name: Path(path) for name, _, path in (o.partition("=") for o in options.python_of)}
    options.work.mkdir(parents=True, exist_ok=True)
    pythons = {s.name: environment(s, options.work, named) for s in SCANNERS}
    tools = {
        s.name: {
            "version": version_of(pythons[s.name], s.package), "claims": s.claims, "used": s.used
        }
        for s in SCANNERS
    }  # fmt: skip
    every = [case for case in cases() if not options.kinds or case.kind in options.kinds]
    folders = written(every, options.work.absolute())
    verdicts = {OURS: [durometer(folder) for folder in folders]}
    for scanner in SCANNERS:
        print(f"{scanner.name} {tools[scanner.name]['version']}", flush=True)
        verdicts[scanner.name] = verdicts_of(scanner, pythons[scanner.name], folders)
    shutil.rmtree(options.work / "cases")
    path = RESULTS / "scanners.json"
    found = merged(judged(every, verdicts), path if options.kinds else None)
    result = {
        "date": datetime.date.today().isoformat(), "python": sys.version.split()[0],
        "tools": tools, "classes": counted(found), "cases": found,
    }  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
