"""Verdicts by the content that they are about: nothing is judged twice, and a run can go on."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from durometer.core.errors import InputError, StorageError
from durometer.core.settings import digest_of
from durometer.judges.base import Case, Judge, JudgeVerdict

__all__ = ["VerdictCache"]


class VerdictCache:
    """Verdicts given so far, in memory and, with a file, on disk.

    The file has one JSON object a line, written as soon as a verdict is there; a last line that was
    cut off is dropped. A key is the SHA-256 of the judge's identity and of the case: no prompt and
    no response is in the file, but what the judge wrote is.

    Args:
        file: made with the first verdict; None keeps nothing after the process.

    Raises:
        InputError: a line of the file is no verdict.
    """

    def __init__(self, file: Path | None = None) -> None:
        self.file = file
        self.judged = 0
        self._known: dict[str, JudgeVerdict] = {}
        if file is not None and file.exists():
            self._known = _read(file)

    def __len__(self) -> int:
        return len(self._known)

    def judge(self, judge: Judge, cases: Sequence[Case]) -> list[JudgeVerdict]:
        """Return one verdict a case; equal cases are judged once, and known ones not at all.

        Raises:
            JudgeError: the judge cannot go on; verdicts that it gave until then are kept.
            StorageError: the file cannot be written.
        """
        identity = judge.identity()
        keys = [digest_of([identity, asdict(case)]) for case in cases]
        open_ = {k: c for k, c in zip(keys, cases, strict=True) if k not in self._known}
        if open_:
            self._fill(judge, open_)
        return [self._known[key] for key in keys]

    def _fill(self, judge: Judge, cases: dict[str, Case]) -> None:
        keys = list(cases)
        with _Lines(self.file) as lines:
            for start in range(0, len(keys), judge.batch):
                chunk = keys[start : start + judge.batch]
                for number, verdict in judge.judge([cases[key] for key in chunk]):
                    self._known[chunk[number]] = verdict
                    self.judged += 1
                    lines.add({"key": chunk[number], "verdict": verdict.as_dict()})


class _Lines:
    """A file to which lines are added, each whole and at once; nothing without a file."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._stream: IO[str] | None = None

    def __enter__(self) -> "_Lines":
        return self

    def __exit__(self, *_: object) -> None:
        if self._stream is not None:
            self._stream.close()

    def add(self, value: dict[str, Any]) -> None:
        if self._file is None:
            return
        try:
            if self._stream is None:
                self._file.parent.mkdir(parents=True, exist_ok=True)
                _drop_cut_off(self._file)
                self._stream = self._file.open("a", encoding="utf-8")
            self._stream.write(json.dumps(value) + "\n")
            self._stream.flush()
        except OSError as error:
            raise StorageError(
                f"{self._file}: {error.strerror or error}; verdicts cannot be kept there"
            ) from error


def _drop_cut_off(file: Path) -> None:
    """Take off a last line without its end: the process was killed while it wrote that."""
    if file.exists():
        raw = file.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        if len(whole) < len(raw):
            with file.open("rb+") as stream:
                stream.truncate(len(whole))


def _read(file: Path) -> dict[str, JudgeVerdict]:
    try:
        raw = file.read_bytes()
        text = raw[: raw.rfind(b"\n") + 1].decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise InputError(f"{file}: cannot be read: {reason}") from error
    return dict(_entries(file, text))


def _entries(file: Path, text: str) -> Iterator[tuple[str, JudgeVerdict]]:
    for number, line in enumerate(text.split("\n")[:-1], 1):
        try:
            entry = json.loads(line)
            yield str(entry["key"]), JudgeVerdict.from_dict(entry["verdict"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise InputError(
                f"{file}:{number}: not a verdict; move the file away, and all is judged anew"
            ) from None
