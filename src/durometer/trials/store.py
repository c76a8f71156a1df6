"""Trials on disk: one SQLite file a run folder, one atomic transaction a trial."""

import json
import sqlite3
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from durometer.core.errors import InputError, StorageError
from durometer.trials.record import TrialRecord

FILE = "trials.sqlite"
SCHEMA_VERSION = 1
_TABLES = """
create table if not exists meta (name text primary key, value text not null);
create table if not exists trials (
    key text primary key, number integer not null, status text not null, record blob not null
);
"""


class Store:
    """The trials of one run folder.

    A trial is written once, whole, when it has ended: killing the process at any moment loses at most the
    trial under way. A key is written once and never doubled.

    Args:
        folder: the run folder; made if it does not exist.

    Raises:
        StorageError: the folder or the file in it cannot be written or read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(folder / FILE, isolation_level=None)
            # A journal beside the file and a sync a transaction: safe against kill and power loss.
            self._connection.execute("pragma journal_mode = wal")
            self._connection.execute("pragma synchronous = full")
            self._connection.executescript(_TABLES)
            self._check_version()
        except (OSError, sqlite3.Error) as error:
            raise storage_error(folder, error) from error

    @classmethod
    def open(cls, folder: Path) -> "Store":
        """Open the store of an existing run.

        Raises:
            InputError: the folder holds no run.
        """
        if not (folder / FILE).is_file():
            raise InputError(f"{folder}: no run here ({FILE} is missing); name a run folder")
        return cls(folder)

    def close(self) -> None:
        """Close the file; the write-ahead log is folded into it."""
        self._connection.close()

    def describe(self, name: str, value: Any) -> None:
        """Keep a JSON value that describes the run (its configuration, its subjects)."""
        self._write("insert or replace into meta values (?, ?)", (name, json.dumps(value)))

    def description(self, name: str) -> Any:
        """Return the value kept under ``name``, or None."""
        row = self._connection.execute("select value from meta where name = ?", (name,)).fetchone()
        return json.loads(row[0]) if row else None

    def add(self, record: TrialRecord) -> None:
        """Write one finished trial in one transaction; a trial that is there already is kept."""
        text = json.dumps(record.as_dict(), ensure_ascii=True, allow_nan=False)
        self._write(
            "insert or ignore into trials values (?, (select count(*) from trials), ?, ?)",
            (record.key, record.status, zlib.compress(text.encode(), 6)),
        )

    def get(self, key: str) -> TrialRecord | None:
        """Return the trial with ``key``, or None."""
        found = self._connection.execute("select record from trials where key = ?", (key,))
        row = found.fetchone()
        return self._decode(row[0]) if row else None

    def trials(self) -> Iterator[TrialRecord]:
        """Yield all trials in the order in which they were written."""
        for row in self._connection.execute("select record from trials order by number"):
            yield self._decode(row[0])

    def statuses(self) -> dict[str, int]:
        """Return the number of trials by status."""
        rows = self._connection.execute("select status, count(*) from trials group by status")
        return dict(rows.fetchall())

    def forget(self, statuses: tuple[str, ...]) -> None:
        """Drop trials that ended in one of ``statuses``, so that they run again."""
        for status in statuses:
            self._write("delete from trials where status = ?", (status,))

    def _decode(self, blob: bytes) -> TrialRecord:
        try:
            return TrialRecord.from_dict(json.loads(zlib.decompress(blob)))
        except (zlib.error, ValueError, KeyError, TypeError) as error:
            raise StorageError(
                f"{self.folder / FILE}: a trial record is damaged ({error}); use a new run folder"
            ) from error

    def _write(self, statement: str, values: tuple[Any, ...]) -> None:
        try:
            self._connection.execute(statement, values)
        except sqlite3.Error as error:
            raise storage_error(self.folder, error) from error

    def _check_version(self) -> None:
        found = self.description("schema_version")
        if found is None:
            self.describe("schema_version", SCHEMA_VERSION)
        elif found != SCHEMA_VERSION:
            raise StorageError(
                f"{self.folder / FILE}: written by another version (schema {found}, this one has "
                f"{SCHEMA_VERSION}); use a new run folder"
            )


def storage_error(folder: Path, error: Exception) -> StorageError:
    """Return the one-line error for a folder that cannot be written."""
    reason = getattr(error, "strerror", None) or str(error)
    return StorageError(
        f"run folder {folder}: {reason}; free some space or name a writable folder with --out "
        "(finished trials are kept, go on with --resume)"
    )
