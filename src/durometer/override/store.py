"""The folder of a run: what it is in ``run.json``, one line a finished cell in ``cells.jsonl``.

A line is written whole and flushed to the disk at once, so that a run that is killed loses the cell
under way and no other. A last line without an end is what a kill left; it is dropped.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from durometer.core.errors import InputError, StorageError
from durometer.core.files import replace_file

__all__ = ["CELLS", "RUN", "CellStore"]

RUN, CELLS = "run.json", "cells.jsonl"
SCHEMA_VERSION = 1
# Cells that ended like this are run again.
AGAIN = ("errored", "out_of_memory")
Json = dict[str, Any]


class CellStore:
    """The cells of one run.

    Args:
        folder: the run folder.
        run: what the run is; the same for as long as it is gone on with.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any]) -> None:
        self.folder = folder
        self.run = {"schema_version": SCHEMA_VERSION, **run}
        self.cells: dict[str, Json] = {}

    def begin(self) -> None:
        """Write what the run is.

        Raises:
            StorageError: the folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_file(self.folder / RUN, iter([json.dumps(self.run, indent=1), "\n"]))
            (self.folder / CELLS).touch()
        except OSError as error:
            raise _unwritable(self.folder, error) from error

    def resume(self, code: str) -> None:
        """Read the cells that are there, once what the run is has been compared.

        Args:
            code: hash of the code that measures now; cells of other code are run again, since what
                is before and after a training must have been measured alike.

        Raises:
            InputError: the folder holds no run, or one with other settings.
            StorageError: a line in the middle cannot be read.
        """
        self._compare(read_run(self.folder))
        self.cells = read_cells(self.folder)
        self.cells = {
            key: cell
            for key, cell in self.cells.items()
            if cell["status"] not in AGAIN and cell.get("code") == code
        }
        _drop_partial_line(self.folder / CELLS)

    def add(self, key: str, cell: Mapping[str, Any]) -> None:
        """Write one finished cell and make sure that it lies on the disk.

        Raises:
            StorageError: it cannot be written; cells before it are kept.
        """
        kept = {"key": key, **cell}
        line = json.dumps(kept, separators=(",", ":"), allow_nan=False) + "\n"
        try:
            with (self.folder / CELLS).open("a", encoding="utf-8") as stream:
                stream.write(line)
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise _unwritable(self.folder, error) from error
        self.cells[key] = json.loads(line)  # as it will be read, tuples and all

    def _compare(self, found: Mapping[str, Any]) -> None:
        """Refuse a run that is not this one, and say what differs."""
        for name in self.run:
            for place, was, now in _differences(name, found.get(name), self.run[name]):
                raise InputError(
                    f"{self.folder}: begun with {place} = {_told(was)}, not {_told(now)}; go on "
                    "with the same settings, or name another --out"
                )


def _differences(name: str, was: Any, now: Any) -> Iterable[tuple[str, Any, Any]]:
    if isinstance(was, dict) and isinstance(now, dict):
        for key in {**now, **was}:
            yield from _differences(f"{name}.{key}", was.get(key), now.get(key))
    elif was != now:
        yield name.removeprefix("settings."), was, now


def _told(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def check_folder(folder: Path, *, resume: bool) -> None:
    """Refuse a folder that is not there to go on with, or that holds something already.

    Raises:
        InputError: one line that says which and what to do.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: not a folder; name another --out")
    begun = (folder / RUN).is_file()
    if resume and not begun:
        raise InputError(f"{folder}: no run to go on with ({RUN} is missing)")
    if begun and not resume:
        raise InputError(
            f"{folder}: holds a run already; go on with --resume or name another --out"
        )
    if not begun and folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"{folder}: holds other files; name an empty or a new folder as --out")


def read_run(folder: Path) -> Json:
    """Return what a run is.

    Raises:
        InputError: the folder holds no run.
        StorageError: ``run.json`` is damaged.
    """
    path = folder / RUN
    if not path.is_file():
        raise InputError(f"{folder}: no run here ({RUN} is missing); name a run folder of drift")
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise StorageError(f"{path}: cannot be read ({error}); use a new run folder") from error
    if not isinstance(found, dict) or found.get("schema_version") != SCHEMA_VERSION:
        raise StorageError(f"{path}: written by another version; use a new run folder")
    return found


def read_cells(folder: Path) -> dict[str, Json]:
    """Return the finished cells by key, the last of several of one key.

    Raises:
        StorageError: a line that a newline ends cannot be read.
    """
    path, cells = folder / CELLS, dict[str, Json]()
    try:
        lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    except OSError as error:
        raise _unwritable(folder, error) from error
    for number, line in enumerate(lines, start=1):
        try:
            cell = json.loads(line.decode("utf-8"))
            cells[cell["key"]] = cell
            _ = cell["status"], cell["way"], cell["rank"], cell["seed"]
        except (ValueError, KeyError, TypeError) as error:
            raise StorageError(
                f"{path}, line {number}: damaged; take the line out to run its cell again"
            ) from error
    return cells


def _drop_partial_line(path: Path) -> None:
    whole = path.read_bytes() if path.is_file() else b""
    end = whole.rfind(b"\n") + 1
    if end < len(whole):
        os.truncate(path, end)


def _unwritable(folder: Path, error: OSError) -> StorageError:
    return StorageError(
        f"run folder {folder}: {error.strerror or error}; free some space or name a writable "
        "folder with --out (finished cells are kept, go on with --resume)"
    )
