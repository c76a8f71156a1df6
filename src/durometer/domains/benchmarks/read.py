"""From a named benchmark to its questions, with a record of exactly what was read."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from durometer.core.errors import InputError, unknown_name
from durometer.domains.base import Origin
from durometer.domains.benchmarks.files import files_digest, read_rows
from durometer.domains.benchmarks.hub import fetch_files
from durometer.domains.benchmarks.questions import Question, Row
from durometer.domains.benchmarks.spec import BenchmarkSpec, parse_spec
from durometer.domains.benchmarks.table import Benchmark
from durometer.formats.safetensors import shown

__all__ = ["Loaded", "read_benchmark"]

_HALF = (".incomplete", ".part", ".partial", ".crdownload")
_SHARD = re.compile(r"(.*)-\d{5}-of-(\d{5})\b.*")


@dataclass(frozen=True)
class Loaded:
    """A benchmark that was read.

    Attributes:
        questions: in the order of its files, repeated ones once.
        origin: what was read, for the record.
        notes: what was left out, for people.
    """

    benchmark: Benchmark
    questions: tuple[Question, ...]
    origin: Origin
    notes: tuple[str, ...] = ()


def read_benchmark(spec: str) -> Loaded:
    """Return the benchmark that ``spec`` names, see ``parse_spec``.

    Raises:
        InputError: no access, no such file or split, columns that are not the published ones, a
            row without an answer, or an unknown suite; the message names file and row.
    """
    asked = parse_spec(spec)
    benchmark, wanted = asked.benchmark, asked.wanted
    root, split, paths = _locate(asked)
    read = [_question(benchmark, row) for path in paths for row in _rows(benchmark, path)]
    different = list(dict.fromkeys(read))
    kept, notes = _kept(benchmark, different, wanted.part)
    if repeats := len(read) - len(different):
        notes.append(f"{benchmark.name}: {repeats:,} rows that repeat others count once")
    hub = asked.place is None
    origin = Origin(
        name=benchmark.name,
        location=(wanted.repo or benchmark.repo) if hub else str(asked.place),
        revision=root.name if hub else "",
        split=split,
        part=wanted.part,
        files=len(paths),
        sha256=files_digest(paths, root),
        rows=len(read),
        licence=benchmark.licence,
    )
    return Loaded(benchmark, tuple(kept), origin, tuple(notes))


Place = tuple[Path, str, list[Path]]


def _locate(asked: BenchmarkSpec) -> Place:
    """Return the folder, the split and its files."""
    benchmark, split = asked.benchmark, asked.wanted.split
    if split and split not in benchmark.files:
        known = unknown_name("split", shown(split, 40), benchmark.files)
        raise InputError(f"{benchmark.name}: {known}")
    if asked.place is None:
        return _on_hub(asked, split or benchmark.hub_split or next(iter(benchmark.files)))
    if os.path.isdir(asked.place):
        return _in_folder(benchmark, asked.place, [split] if split else list(benchmark.files))
    if not os.path.exists(asked.place):
        raise InputError(f"{benchmark.name}: {shown(asked.place)}: no such folder or file")
    _refuse_half(asked.place)
    return asked.place.parent, split, [asked.place]


def _on_hub(asked: BenchmarkSpec, split: str) -> Place:
    benchmark = asked.benchmark
    repo, patterns = asked.wanted.repo or benchmark.repo, benchmark.files[split]
    root = fetch_files(benchmark.name, repo, asked.wanted.revision, patterns)
    if found := _found(root, patterns):
        return root, split, found
    raise InputError(
        f"{benchmark.name}: '{shown(repo)}' has no files of split '{split}' at {root.name} (looked "
        f"for {', '.join(patterns)}); name a revision that has, or a local copy"
    )


def _in_folder(benchmark: Benchmark, folder: Path, splits: Sequence[str]) -> Place:
    for split in splits:
        if found := _found(folder, benchmark.files[split]):
            return folder, split, found
    others = [s for s, patterns in benchmark.files.items() if _found(folder, patterns)]
    beside = f", but split {', '.join(others)}" if others else ""
    raise InputError(
        f"{benchmark.name}: {shown(folder)}: no file of split {' or '.join(splits)} in it{beside} "
        f"(looked for {', '.join(benchmark.files[splits[0]])}); name the file itself if it is "
        "called otherwise"
    )


def _found(root: Path, patterns: Sequence[str]) -> list[Path]:
    """Return the files of the first pattern that names any, all parts of them there."""
    for pattern in patterns:
        if paths := sorted(path for path in root.glob(pattern) if path.is_file()):
            _refuse_missing_parts(paths)
            return paths
    for pattern in patterns:
        for path in (path for ending in _HALF for path in root.glob(pattern + ending)):
            _refuse_half(path)
    return []


def _refuse_half(path: Path) -> None:
    if path.suffix in _HALF:
        raise InputError(f"{shown(path)}: half-downloaded; fetch it again")


def _refuse_missing_parts(paths: Sequence[Path]) -> None:
    """Refuse a set of which only some of the files ``...-00000-of-00003...`` are there."""
    counts: dict[tuple[Path, str, int], int] = {}
    for path in paths:
        if match := _SHARD.fullmatch(path.name):
            key = (path.parent, match[1], int(match[2]))
            counts[key] = counts.get(key, 0) + 1
    for (parent, stem, whole), count in counts.items():
        if count < whole:
            raise InputError(
                f"{shown(parent / stem)}-...: {count} of {whole} files are there; fetch the rest"
            )


def _rows(benchmark: Benchmark, path: Path) -> Iterator[Row]:
    columns = [name for form in benchmark.formats for name in (*form.columns, *form.optional)]
    bare = next((form.columns for form in benchmark.formats if form.headerless), ())
    return read_rows(path, columns, bare)


def _question(benchmark: Benchmark, row: Row) -> Question:
    for form in benchmark.formats:
        if row.values.keys() >= set(form.columns):
            return form.read(row)
    lacking = [[c for c in form.columns if c not in row.values] for form in benchmark.formats]
    missing = _listed(min(lacking, key=len))
    raise row.refused(
        f"not the published columns of {benchmark.name}: missing {missing}; found "
        f"{_listed(list(row.values))}"
    )


def _listed(names: Sequence[str], most: int = 12) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(f"'{shown(name, 40)}'" for name in names[:most]) or "none") + more


def _kept(
    benchmark: Benchmark, questions: Sequence[Question], part: str
) -> tuple[list[Question], list[str]]:
    """Return the questions of the suites asked for; what another rule scores is never pooled."""
    if part:
        return _chosen(benchmark, questions, set(part.split("+"))), []
    kept = [question for question in questions if question.suite != benchmark.apart]
    if not benchmark.apart or not kept or len(kept) == len(questions):
        return list(questions), []
    return kept, [
        f"{benchmark.name}: {len(questions) - len(kept)} {benchmark.apart} rows left out, since "
        f"another rule scores them; part={benchmark.apart} reads them alone"
    ]


def _chosen(benchmark: Benchmark, questions: Sequence[Question], parts: set[str]) -> list[Question]:
    halves = any(question.safe for question in questions)
    labels = [_labels(question, halves) for question in questions]
    known = set().union(*labels) - {""}
    if not known:
        raise InputError(f"{benchmark.name}: has no parts; leave out part={shown('+'.join(parts))}")
    if unknown := sorted(parts - known):
        raise InputError(f"{benchmark.name}: {unknown_name('part', shown(unknown[0], 60), known)}")
    if benchmark.apart in parts and len(parts) > 1:
        raise InputError(
            f"{benchmark.name}: '{benchmark.apart}' is scored by another rule than the rest; name "
            "it alone"
        )
    return [q for q, own in zip(questions, labels, strict=True) if not own.isdisjoint(parts)]


def _labels(question: Question, halves: bool) -> set[str]:
    half = {"safe" if question.safe else "unsafe"} if halves else set()
    return half | {re.sub(r"[^a-z0-9]+", "-", question.suite.casefold()).strip("-")}
