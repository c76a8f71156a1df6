"""Strict readers of the files that benchmarks are published in: CSV, JSON, JSON lines, parquet.

Nothing in them is run, and no text of theirs is quoted in an error. A file that ends half-way, or
that only points to the data, is told apart from one of another format.
"""

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from durometer.core.errors import InputError
from durometer.domains.benchmarks.questions import Row
from durometer.formats.safetensors import open_regular, shown

__all__ = ["MAX_FILE_BYTES", "MAX_ROWS", "file_digest", "files_digest", "read_rows"]

MAX_FILE_BYTES = 1 << 29
MAX_ROWS = 1_000_000
_POINTER = b"version https://git-lfs.github.com/spec/"
_PARQUET = b"PAR1"
_HALF = "was it downloaded whole? fetch it again"


def read_rows(path: Path, columns: Sequence[str], headerless: Sequence[str] = ()) -> Iterator[Row]:
    """Yield the rows of a file, read as its name ends.

    Args:
        columns: what is asked for; parquet files are read no further.
        headerless: names for the fields of a CSV file that has no header line.

    Raises:
        InputError: not a readable file of that format, or not a whole one.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        known = ", ".join(suffix[1:] for suffix in _READERS)
        raise InputError(f"{shown(path)}: not a file of a benchmark; known are: {known}")
    _check_whole(path)
    number = 0
    for values in reader(path, columns, headerless):
        number += 1
        if number > MAX_ROWS:
            raise InputError(
                f"{shown(path)}: more than {MAX_ROWS:,} rows; name the benchmark's own"
            )
        yield Row(path, number, values)
    if number == 0:
        raise InputError(f"{shown(path)}: holds no row; {_HALF}")


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, as ``sha256sum`` prints it."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def files_digest(paths: Sequence[Path], root: Path) -> str:
    """Return one SHA-256 for several files: that of the lines ``sha256sum`` prints in ``root``.

    A single file has its own.
    """
    if len(paths) == 1:
        return file_digest(paths[0])
    lines = [f"{file_digest(path)}  {path.relative_to(root).as_posix()}\n" for path in paths]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _check_whole(path: Path) -> None:
    with open_regular(path) as file:
        head = file.read(len(_POINTER))
        size = file.seek(0, io.SEEK_END)
    if not size:
        raise InputError(f"{shown(path)}: empty; {_HALF}")
    if size > MAX_FILE_BYTES:
        raise InputError(f"{shown(path)}: larger than {MAX_FILE_BYTES >> 20} MiB")
    if head == _POINTER:
        raise InputError(
            f"{shown(path)}: a Git LFS pointer, not the data; run 'git lfs pull' where it came from"
        )


Values = dict[str, Any]


def _csv(path: Path, _: Sequence[str], headerless: Sequence[str]) -> Iterator[Values]:
    with _text(path) as text, _one_line(path):
        reader = csv.reader(text, strict=True)
        first = next(reader, [])
        names = list(headerless) if _no_header(first, headerless) else first
        if len(set(names)) < len(names):
            raise InputError(f"{shown(path)}: a column name occurs twice")
        rows = reader if names is first else (row for part in ([first], reader) for row in part)
        for number, row in enumerate(rows, start=1):
            if len(row) != len(names):
                raise InputError(
                    f"{shown(path)}: row {number}: {len(row)} fields where {len(names)} belong; "
                    f"{_HALF}"
                )
            yield dict(zip(names, row, strict=True))


def _no_header(first: Sequence[str], headerless: Sequence[str]) -> bool:
    """Say whether the first line is a question already: as long, and it ends with a letter."""
    return bool(headerless) and len(first) == len(headerless) and first[-1] in tuple("ABCD")


def _json_lines(path: Path, _: Sequence[str], __: Sequence[str]) -> Iterator[Values]:
    with _text(path) as text:
        number = 0
        while line := text.readline(MAX_FILE_BYTES):
            number += 1
            if line.strip():
                yield _table(_parsed(line, path, f"line {number}"), path, f"line {number}")


def _json(path: Path, _: Sequence[str], __: Sequence[str]) -> Iterator[Values]:
    """Yield the objects of a list, of TriviaQA's ``{"Data": [...]}``, or one: MATH's files."""
    with _text(path) as text:
        content = _parsed(text.read(), path, "")
    if isinstance(content, dict) and isinstance(content.get("Data"), list):
        content = content["Data"]
    for number, value in enumerate(content if isinstance(content, list) else [content], start=1):
        yield _table(value, path, f"row {number}")


def _parquet(path: Path, columns: Sequence[str], _: Sequence[str]) -> Iterator[Values]:
    _check_parquet(path)
    try:
        from pyarrow import parquet
    except ImportError:
        raise InputError(
            f"{shown(path)}: reading parquet files needs pyarrow; install it with: "
            "pip install 'durometer[benchmarks]', or name the set's CSV or JSON file"
        ) from None
    with _one_line(path):
        file = parquet.ParquetFile(path)
        found = list(file.schema_arrow.names)
        if file.metadata.num_rows > MAX_ROWS:
            raise InputError(f"{shown(path)}: more than {MAX_ROWS:,} rows")
        asked = [name for name in found if name in columns]
        absent = dict.fromkeys(name for name in found if name not in columns)
        for batch in file.iter_batches(batch_size=1024, columns=asked):
            for values in batch.to_pylist():
                yield absent | values


def _check_parquet(path: Path) -> None:
    with open_regular(path) as opened:
        if opened.read(4) != _PARQUET:
            raise InputError(f"{shown(path)}: not a parquet file, whatever its name says")
        opened.seek(max(opened.seek(0, io.SEEK_END) - 4, 0))
        if opened.tell() < 4 or opened.read(4) != _PARQUET:
            raise InputError(f"{shown(path)}: a parquet file that ends half-way; {_HALF}")


_READERS: dict[str, Callable[[Path, Sequence[str], Sequence[str]], Iterator[Values]]] = {
    ".csv": _csv,
    ".json": _json,
    ".jsonl": _json_lines,
    ".parquet": _parquet,
}


@contextmanager
def _text(path: Path) -> Iterator[io.TextIOWrapper]:
    with open_regular(path) as raw, io.TextIOWrapper(raw, "utf-8-sig", newline="") as text:
        try:
            yield text
        except UnicodeDecodeError as error:
            raise _not_utf8(path, error) from None


def _not_utf8(path: Path, error: UnicodeDecodeError) -> InputError:
    reason = "ends inside a character" if "end of data" in error.reason else error.reason
    return InputError(f"{shown(path)}: not UTF-8 ({reason}); {_HALF}")


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """Turn what a library raises about a bad file into one line."""
    try:
        yield
    except csv.Error as error:
        reason = str(error).replace("unexpected end of data", "it ends inside a quoted field")
        raise InputError(f"{shown(path)}: not valid CSV: {shown(reason)}; {_HALF}") from None
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error) from None
    except (OSError, ValueError, TypeError, KeyError, NotImplementedError, MemoryError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{shown(path)}: cannot be read: {shown(reason)}; {_HALF}") from None


def _parsed(text: str, path: Path, place: str) -> Any:
    where = ": ".join(filter(None, (shown(path), place)))
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        ended = error.pos >= len(text.rstrip()) or "Unterminated" in error.msg
        reason = "it ends half-way" if ended else f"{error.msg.lower()}, character {error.pos + 1}"
        raise InputError(f"{where}: not valid JSON: {reason}; {_HALF}") from None
    except RecursionError:
        raise InputError(f"{where}: not valid JSON: nested too deeply") from None
    except ValueError:  # a number of thousands of digits
        raise InputError(f"{where}: not valid JSON: a number too long") from None


def _table(value: Any, path: Path, place: str) -> Values:
    if not isinstance(value, dict):
        raise InputError(f"{shown(path)}: {place}: not a JSON object of named fields")
    return value
