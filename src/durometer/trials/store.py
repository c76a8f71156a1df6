"""Trials on disk: one SQLite file a run folder, one atomic transaction a trial."""

import contextlib
import json
import sqlite3
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from durometer.core.errors import InputError, StorageError
from durometer.trials.record import COUNTED, TrialRecord

FILE = "trials.sqlite"
SCHEMA_VERSION = 1
_TABLES = """
create table if not exists meta (name text primary key, value text not null);
create table if not exists trials (
    key text primary key, number integer not null, status text not null, record blob not null
);
"""
_ONE = "select record from trials where key = ?"


class Store:
    """The trials of one run folder.

    A trial is written once, whole, when it has ended: killing the process at any moment loses at
    most the trial under way. A key is written once and never doubled.

    Args:
        folder: the run folder; made if it does not exist.

    Raises:
        StorageError: the folder or the file in it cannot be written or read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lenders: tuple[tuple[Path, sqlite3.Connection], ...] = ()
        file = folder / FILE
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Seconds since 1970 at which a trial was last written, asked before it is opened.
            self.written = file.stat().st_mtime if file.exists() else time.time()
            self._connection = sqlite3.connect(folder / FILE, isolation_level=None)
            # A journal beside the file and a sync a transaction: safe against kill and power loss.
            self._connection.execute("pragma journal_mode = wal")
            self._connection.execute("pragma synchronous = full")
            self._connection.executescript(_TABLES)
            self._check_version()
            own = self.description("keys")
            self._own: set[str] | None = None if own is None else set(own)
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

    @property
    def begun(self) -> bool:
        """Whether a campaign was ever started here."""
        return self.description("request") is not None

    def close(self) -> None:
        """Close the file; the write-ahead log is folded into it."""
        for _, lender in self._lenders:
            lender.close()
        self._connection.close()

    def discard_unused(self) -> None:
        """Close the file, and remove it (and its folder, if empty) when no campaign began here."""
        unused = not self.begun and not self._read("select key from trials limit 1")
        self.close()
        if unused:
            (self.folder / FILE).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # the user's own files stay, and so does the folder
                self.folder.rmdir()

    def describe(self, name: str, value: Any) -> None:
        """Keep a JSON value that describes the run (its configuration, its subjects)."""
        self._write("insert or replace into meta values (?, ?)", (name, json.dumps(value)))

    def description(self, name: str) -> Any:
        """Return the value kept under ``name``, or None."""
        rows = self._read("select value from meta where name = ?", name)
        return json.loads(rows[0][0]) if rows else None

    def add(self, record: TrialRecord) -> None:
        """Write one finished trial in one transaction; a trial that is there already is kept."""
        text = json.dumps(record.as_dict(), ensure_ascii=True, allow_nan=False)
        self._write(
            "insert or ignore into trials values "
            "(?, (select coalesce(max(number), -1) + 1 from trials), ?, ?)",
            (record.key, record.status, zlib.compress(text.encode(), 6)),
        )

    def get(self, key: str) -> TrialRecord | None:
        """Return the trial with ``key``, or None."""
        rows = self._read(_ONE, key)
        return self._decode(rows[0][0]) if rows else None

    def lend_from(self, folders: Sequence[Path]) -> None:
        """Name other runs whose finished trials may stand for the same ones here.

        Raises:
            InputError: one of the folders holds no run.
        """
        self._lenders = tuple(_lender(folder) for folder in folders)

    def borrow(self, key: str) -> TrialRecord | None:
        """Take over the trial with ``key`` from the first run that has it finished, or None.

        A key is a hash of everything that shapes a result, so the trial is the same. It is copied:
        this run needs the other no more.
        """
        for folder, lender in self._lenders:
            try:
                rows = lender.execute(_ONE, (key,)).fetchall()
            except sqlite3.Error as error:
                raise _no_lender(folder, str(error)) from error
            record = self._decode(rows[0][0]) if rows else None
            if record is not None and record.status in COUNTED:
                self.add(record)
                return record
        return None

    def trials(self) -> Iterator[TrialRecord]:
        """Yield the trials in the order in which they were written.

        A run that was resumed with other code or settings holds trials of both; once the campaign
        has named its own (``name_own``), the others are left out.
        """
        for key, record in self._read("select key, record from trials order by number"):
            if self._is_own(key):
                yield self._decode(record)

    def name_own(self, keys: Sequence[str]) -> None:
        """Say which trials belong to the campaign as it now is."""
        self._own = set(keys)
        self.describe("keys", list(keys))

    def statuses(self) -> dict[str, int]:
        """Return the number of trials by status, those of ``trials`` alone."""
        rows = self._read("select key, status from trials")
        return dict(Counter(status for key, status in rows if self._is_own(key)))

    def forget(self, statuses: tuple[str, ...]) -> None:
        """Drop trials that ended in one of ``statuses``, so that they run again."""
        for status in statuses:
            self._write("delete from trials where status = ?", (status,))

    def _is_own(self, key: str) -> bool:
        return self._own is None or key in self._own

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

    def _read(self, statement: str, *values: Any) -> list[Any]:
        try:
            return self._connection.execute(statement, values).fetchall()
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


def _lender(folder: Path) -> tuple[Path, sqlite3.Connection]:
    """Open another run to read from it alone; it may lie where nothing can be written.

    Raises:
        InputError: no run, or one that cannot be read.
    """
    path = folder / FILE
    if not path.is_file():
        raise InputError(f"{folder}: no run here ({FILE} is missing); name a run folder")
    reason = ""
    # A finished run needs no lock where its place allows none.
    for how in ("mode=ro", "immutable=1"):
        try:
            connection = sqlite3.connect(f"{path.resolve().as_uri()}?{how}", uri=True)
            found = connection.execute("select value from meta where name = 'schema_version'")
            if found.fetchone() != (json.dumps(SCHEMA_VERSION),):
                raise InputError(f"{folder}: written by another version; name another --reuse")
        except sqlite3.Error as error:
            reason = str(error)
        else:
            return folder, connection
    raise _no_lender(folder, reason)


def _no_lender(folder: Path, reason: str) -> InputError:
    return InputError(f"--reuse {folder}: cannot be read ({reason}); leave it out")


def storage_error(folder: Path, error: Exception) -> StorageError:
    """Return the one-line error for a folder that cannot be written, or a file that is no store."""
    reason = getattr(error, "strerror", None) or str(error)
    # sqlite3 raises a subclass for everything but a file that is damaged or none of its own.
    if type(error) is sqlite3.DatabaseError:
        return StorageError(
            f"{folder / FILE}: damaged or not written by durometer ({reason}); restore a copy "
            "of it or name a new run folder with --out"
        )
    return StorageError(
        f"run folder {folder}: {reason}; free some space or name a writable folder with --out "
        "(finished trials are kept, go on with --resume)"
    )
