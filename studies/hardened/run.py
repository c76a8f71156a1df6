"""Hardening of the real model ``smollm2``, stressed: which safeguard is worth what.

    python studies/hardened/run.py --work DIR [--seeds N] [--only a,b] [--suite standard]
    python studies/hardened/run.py --recompute

A model that is hardened is not trained again, and a run goes on where it was left. Every training
and every run is a process of its own, so that its peak memory is its own, too. Weights stay in the
work folder; results/rows/NAME.json holds what every figure is computed from, and
results/summary.json the figures.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hardened_rows
import hardened_summary
from hardened_plan import DOMAIN, ENTRIES, SEED, SUBJECT, Entry, chosen, reference_of

from durometer.subjects.record import RECORD, read_record
from durometer.trials.store import FILE

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "benchmarks"))

from common import machine  # noqa: E402

RESULTS = HERE / "results"
FAILURES, ROWS = "failures.json", "rows"
INTERRUPTED = 130
Json = dict[str, Any]
# Carries out ``durometer`` with these words; returns its exit code and the last line it said.
Command = Callable[[Sequence[str]], tuple[int, str]]


def own_process(words: Sequence[str]) -> tuple[int, str]:
    """Run ``durometer`` in a process of its own and pass on what it says."""
    command = [sys.executable, "-m", "durometer", *words]
    last = ""
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            sys.stderr.write(line)
            last = line.strip() or last
    return process.returncode, last


@dataclass
class Study:
    """What is hardened and attacked, and where it is kept.

    Attributes:
        work: folder of the models and runs.
        seeds: attack seeds a configuration; None leaves it to the suite.
        tampers: attacks in place of the suite's, for a try.
        dtype: number format of every attack.
        command: carries out one command of the package.
    """

    work: Path
    subject: str = SUBJECT
    domain: str = DOMAIN
    suite: str = "standard"
    seeds: int | None = None
    tampers: tuple[str, ...] = ()
    dtype: str = "auto"
    command: Command = own_process
    entries: tuple[Entry, ...] = ENTRIES

    def run(self, entries: Sequence[Entry]) -> None:
        """Harden what is missing, plain safeguards first, then attack it."""
        self.work.mkdir(parents=True, exist_ok=True)
        ordered = sorted(entries, key=lambda entry: entry.role != "reference")
        for entry in ordered:
            self._harden(entry)
        for entry in ordered:
            if entry.attacked and (self.folder(entry) / RECORD).exists():
                self._stress(entry)

    def folder(self, entry: Entry) -> Path:
        """Return the folder of a hardened model."""
        return self.work / entry.folder

    def failures(self) -> Json:
        """Return what failed, by the name of the folder."""
        path = self.work / FAILURES
        found: Json = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        return found

    def _harden(self, entry: Entry) -> None:
        folder = self.folder(entry)
        if (folder / RECORD).exists():
            made = read_record(folder)["request"]["safeguards"]
            if made != [entry.safeguard]:
                raise SystemExit(
                    f"{folder}: holds {made}, not {entry.safeguard}; remove it, or name another "
                    "--work"
                )
            return
        words = ["harden", self.subject, "--domain", f"{self.domain}:{entry.kind}"]
        words += ["--safeguard", entry.safeguard, "--seed", str(SEED), "--dtype", entry.dtype]
        self._carry_out(entry, [*words, "--out", str(folder), "--resume"])

    def _stress(self, entry: Entry) -> None:
        folder, plain = self.folder(entry), reference_of(entry, self.entries)
        words = ["stress", str(folder), "--domain", f"{self.domain}:{entry.kind}"]
        words += ["--suite", self.suite, "--undefended", self.subject, "--dtype", self.dtype]
        if plain is not None and (self.folder(plain) / RECORD).exists():
            words += ["--reference", str(self.folder(plain))]
        if self.seeds is not None:
            words += ["--seeds", str(self.seeds)]
        words += [word for text in self.tampers for word in ("--tamper", text)]
        own = folder / hardened_rows.STRESS
        words += [word for run in self._runs() if run != own for word in ("--reuse", str(run))]
        self._carry_out(entry, [*words, "--out", str(own), "--resume"])

    def _runs(self) -> list[Path]:
        """Return the runs that there are: they lend the trials of the subjects they share."""
        runs = (self.folder(entry) / hardened_rows.STRESS for entry in self.entries)
        return [run for run in runs if (run / FILE).is_file()]

    def _carry_out(self, entry: Entry, words: Sequence[str]) -> None:
        print(f"durometer {' '.join(words)}", file=sys.stderr, flush=True)
        code, said = self.command(words)
        if code in (INTERRUPTED, -2):
            raise KeyboardInterrupt
        failures = self.failures()
        failures.pop(entry.folder, None)
        if code:
            failures[entry.folder] = {"command": words[0], "exit_code": code, "said": said}
        (self.work / FAILURES).write_text(json.dumps(failures, indent=1) + "\n", "utf-8")

    def collect(self, results: Path) -> None:
        """Write the trimmed rows of everything that is in the work folder."""
        (results / ROWS).mkdir(parents=True, exist_ok=True)
        failures = self.failures()
        for entry in self.entries:
            if self.folder(entry).is_dir() or entry.folder in failures:
                found = hardened_rows.read(
                    self.folder(entry), failures.get(entry.folder), self.work
                )
                path = results / ROWS / f"{entry.folder}.json"
                path.write_text(f"{''.join(_lines(found))}\n", "utf-8")


def _lines(rows: Json) -> Iterator[str]:
    """Yield JSON with one trial a line."""
    trials = rows.get("trials", [])
    head = json.dumps({**rows, "trials": []}, ensure_ascii=False)
    yield head.removesuffix("[]}")
    yield "[\n" + ",\n".join(json.dumps(trial, ensure_ascii=False) for trial in trials) + "\n]}"


def recompute(results: Path, described: Json, entries: Sequence[Entry] = ENTRIES) -> Json:
    """Write summary.json from the rows alone, and return it.

    Args:
        described: the machine.
    """
    rows = {
        entry.folder: json.loads(path.read_text("utf-8"))
        for entry in entries
        if (path := results / ROWS / f"{entry.folder}.json").is_file()
    }
    summary = hardened_summary.summary_of(rows, entries) | {"machine": described}
    text = json.dumps(summary, indent=1, ensure_ascii=False)
    (results / "summary.json").write_text(f"{text}\n", "utf-8")
    return summary


def kept_machine(results: Path) -> Json:
    """Return the machine that the committed figures were measured on."""
    path = results / "summary.json"
    found: Json = json.loads(path.read_text("utf-8"))["machine"] if path.is_file() else {}
    return found


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, help="folder of the models and runs")
    parser.add_argument("--seeds", type=int, help="attack seeds a configuration")
    parser.add_argument("--only", default="", help="names with commas between, else all")
    parser.add_argument("--suite", default="standard", help="quick, standard or full")
    parser.add_argument("--dtype", default="auto", help="number format of every attack")
    parser.add_argument("--tamper", action="append", default=[], help="in place of the suite's")
    parser.add_argument("--results", type=Path, default=RESULTS, help="elsewhere, for a try")
    parser.add_argument("--recompute", action="store_true", help="summary from the rows alone")
    options = parser.parse_args(arguments)
    if not options.work and not options.recompute:
        parser.error("--work DIR, or --recompute")
    return options


def main(arguments: Sequence[str] | None = None, command: Command = own_process) -> int:
    """Run what is missing, then write rows and summary."""
    options = parsed(arguments)
    if options.recompute:
        recompute(options.results, kept_machine(options.results))
        return 0
    study = Study(options.work, suite=options.suite, seeds=options.seeds, command=command)
    study = replace(study, tampers=tuple(options.tamper), dtype=options.dtype)
    try:
        entries = chosen(options.only)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    try:
        study.run(entries)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return INTERRUPTED
    study.collect(options.results)
    recompute(options.results, machine())
    return 0


if __name__ == "__main__":
    sys.exit(main())
