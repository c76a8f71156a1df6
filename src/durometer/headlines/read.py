"""Reading a table of outcomes, strictly: CSV, TSV or JSON lines, item by item or as counts.

Cells may hold prompts and responses of a hazardous domain: errors name the line and the column, and
quote an outcome only, shortened.
"""

import csv
import io
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from durometer.core.errors import InputError, unknown_name
from durometer.formats.safetensors import open_regular, shown
from durometer.headlines.settings import Columns, Settings
from durometer.headlines.table import Counts, ItemOutcome, Table

__all__ = ["FAILURE", "SUCCESS", "UNPARSED", "read_table"]

SUCCESS = frozenset(
    {"harmful_useful", "unsafe", "success", "correct", "right", "adopted", "true", "yes", "1"}
)
FAILURE = frozenset(
    [
        "harmful_useless",
        "refusal",
        "benign_deflection",
        "incoherent_or_empty",
        "safe",
        "failure",
        "incorrect",
        "wrong",
        "not_adopted",
        "false",
        "no",
        "0",
    ]
)
UNPARSED = frozenset({"", "unparsed", "na", "n/a", "nan", "none", "null", "error", "errored"})
DELIMITERS = {".csv": ",", ".tsv": "\t"}
JSON_LINES = (".jsonl", ".ndjson")
MAX_LINE = 1 << 22
MAX_COUNT = 10**9
Record = Mapping[str, str]
Line = tuple[int, Record]


@dataclass
class _Reader:
    """Adds up rows; every fault names the file and the line."""

    path: Path
    settings: Settings
    header: frozenset[str] = frozenset()
    counts: dict[tuple[str, str], Counts] = field(default_factory=dict)
    items: dict[str, dict[str, ItemOutcome]] = field(default_factory=dict)
    scorers: dict[str, str] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)

    def fault(self, line: int, what: str) -> InputError:
        return InputError(f"{shown(self.path)}, line {line}: {what}")

    def cell(self, line: int, record: Record, column: str) -> str:
        value = record.get(column)
        if value is None or not value.strip():
            raise self.fault(line, f"no value in '{shown(column, 60)}'")
        return value.strip()

    def number(self, line: int, record: Record, column: str) -> int:
        text = self.cell(line, record, column)
        if not (text.isascii() and text.isdigit()) or int(text[:12]) > MAX_COUNT or len(text) > 12:
            raise self.fault(line, f"'{shown(column, 60)}' must be a whole number, 0 to 10^9")
        return int(text)

    def outcome(self, line: int, value: str) -> Counts:
        """Return one outcome as counts."""
        plain = value.strip().casefold()
        self.seen.add(plain)
        own, unread = (
            {v.strip().casefold() for v in values}
            for values in (self.settings.success, self.settings.unparsed)
        )
        if plain in (own or SUCCESS):
            return Counts(success=1)
        if plain in unread | (UNPARSED - own):
            return Counts(unparsed=1)
        if own or plain in FAILURE:
            return Counts(failure=1)
        raise self.fault(
            line,
            f"unknown outcome '{shown(value.strip(), 40)}'; name what counts as a success with "
            "--success, and everything else counts as none",
        )

    def add(self, arm: str, category: str, counts: Counts) -> None:
        key = (arm, category)
        self.counts[key] = self.counts.get(key, Counts()) + counts

    def add_item(self, line: int, arm: str, name: str, found: ItemOutcome) -> None:
        held = self.items.setdefault(arm, {})
        if name in held:
            raise self.fault(
                line,
                f"item '{shown(name, 60)}' of arm '{shown(arm, 60)}' is there twice; one row an "
                "item and arm (seeds as arms of their own)",
            )
        held[name] = found

    def add_scorer(self, line: int, category: str, scorer: str) -> None:
        if self.scorers.setdefault(category, scorer) != scorer:
            raise self.fault(line, f"category '{shown(category, 60)}' has two scorers")


def read_table(path: Path, settings: Settings) -> Table:
    """Return the table of a file.

    Args:
        path: a ``.csv``, ``.tsv`` or ``.jsonl`` file with a row an item and arm, a row an item with
            a column an arm, or a row an arm and category with counts.
        settings: names of columns, what is a success, scorers, gains and losses.

    Raises:
        InputError: it cannot be read; the message names the line and the column.
    """
    lines = _lines(path)
    first = next(lines, None)
    if first is None:
        raise InputError(f"{shown(path)}: no rows")
    reader = _Reader(path, settings)
    header = list(first[1])
    add = _layout(reader, header)
    roles = _roles(settings.columns)
    reader.header = frozenset(header) & roles
    for line, record in itertools.chain([first], lines):
        odd = (record.keys() & roles) ^ reader.header
        if odd:
            raise reader.fault(line, f"'{shown(min(odd), 60)}' must be in every line or in none")
        add(line, record)
    return _table(reader, clustered=settings.columns.entity in header)


def _roles(columns: Columns) -> set[str]:
    """Return the names of all columns that are read; what else a table holds is left alone."""
    names = set[str]()
    for value in columns.model_dump().values():
        names |= {value} if isinstance(value, str) else set(value)
    return names


def _layout(reader: _Reader, header: Sequence[str]) -> Any:
    """Return what adds a row of this table: counts, one arm a row, or one arm a column."""
    columns = reader.settings.columns
    outcomes = [columns.outcome] if isinstance(columns.outcome, str) else columns.outcome
    if columns.successes in header and columns.n in header:
        return lambda line, record: _add_counts(reader, line, record)
    missing = [name for name in outcomes if name not in header]
    if missing or not outcomes:
        held = ", ".join(shown(name, 40) for name in header[:20])
        raise InputError(
            f"{shown(reader.path)}: no column '{missing[0] if missing else 'outcome'}', nor "
            f"'{columns.successes}' and '{columns.n}'; there are {held}: say which it is with "
            "--column outcome=NAME"
        )
    if columns.item in header and columns.count in header:
        raise InputError(
            f"{shown(reader.path)}: both '{columns.item}' and '{columns.count}'; a row is either "
            "an item or a count"
        )
    wide = columns.arm not in header and len(outcomes) > 1
    return lambda line, record: _add_outcomes(reader, line, record, outcomes, wide=wide)


def _add_counts(reader: _Reader, line: int, record: Record) -> None:
    columns = reader.settings.columns
    arm, category = _place(reader, line, record)
    success, n = (reader.number(line, record, c) for c in (columns.successes, columns.n))
    unparsed = (
        reader.number(line, record, columns.unparsed) if columns.unparsed in reader.header else 0
    )
    if success + unparsed > n:
        raise reader.fault(line, f"{success} successes and {unparsed} unparsed are more than {n}")
    if (arm, category) in reader.counts:
        raise reader.fault(line, f"'{shown(arm, 60)}', '{shown(category, 60)}' is there twice")
    reader.add(arm, category, Counts(success, n - success - unparsed, unparsed))


def _add_outcomes(
    reader: _Reader, line: int, record: Record, outcomes: Sequence[str], *, wide: bool
) -> None:
    columns = reader.settings.columns
    arm, category = _place(reader, line, record)
    times = reader.number(line, record, columns.count) if columns.count in reader.header else 1
    for column in outcomes:
        name = column if wide else arm
        one = reader.outcome(line, record[column])
        many = Counts(one.success * times, one.failure * times, one.unparsed * times)
        reader.add(name, category, many)
        if columns.item in reader.header:
            item = reader.cell(line, record, columns.item)
            entity = record.get(columns.entity, item)
            reader.add_item(line, name, item, ItemOutcome(category, bool(one.success), entity))


def _place(reader: _Reader, line: int, record: Record) -> tuple[str, str]:
    """Return arm and category of a row; a table without arms is one arm."""
    columns = reader.settings.columns
    arm = (
        reader.cell(line, record, columns.arm) if columns.arm in reader.header else reader.path.stem
    )
    category = ""
    if columns.category in reader.header:
        category = reader.cell(line, record, columns.category)
    if columns.scorer in reader.header:
        reader.add_scorer(line, category, record[columns.scorer].strip())
    return arm, category


def _table(reader: _Reader, *, clustered: bool) -> Table:
    settings = reader.settings
    for value in settings.success:
        if value.strip().casefold() not in reader.seen:
            held = ", ".join(f"'{shown(v, 40)}'" for v in sorted(reader.seen)[:12])
            raise InputError(
                f"{shown(reader.path)}: no row has the outcome '{shown(value, 40)}' named as "
                f"success; there are {held or 'counts only'}"
            )
    _same_places(reader)
    table = Table(reader.counts, {**reader.scorers, **settings.scorers}, reader.items, clustered)
    for category in settings.scorers:
        if category not in table.categories:
            raise unknown_name("category", category, table.categories)
    if not sum(counts.n for counts in reader.counts.values()):
        raise InputError(f"{shown(reader.path)}: every count is 0")
    return Table(table.counts, table.scorers, table.items, clustered, _pairs(reader, table))


def _same_places(reader: _Reader) -> None:
    """Refuse an item that has another category or entity in another arm."""
    places = dict[str, tuple[str, str]]()
    for held in reader.items.values():
        for name, found in held.items():
            place = (found.category, found.entity)
            if places.setdefault(name, place) != place:
                raise InputError(
                    f"{shown(reader.path)}: item '{shown(name, 60)}' has two categories or "
                    "entities; give items names of their own"
                )


def _pairs(reader: _Reader, table: Table) -> dict[tuple[str, str, str], tuple[int, int]]:
    """Return told gains and losses, after checking that the counts allow them."""
    found = dict[tuple[str, str, str], tuple[int, int]]()
    for pair in reader.settings.pair:
        where = f"pair '{shown(pair.before, 60)}', '{shown(pair.after, 60)}'"
        if reader.items:
            raise InputError(f"{where}: the items of the table tell this; leave it out")
        for name in (pair.before, pair.after):
            if name not in table.arms:
                raise unknown_name("arm", name, table.arms)
        if pair.category not in table.categories:
            raise unknown_name("category of a pair", pair.category, table.categories)
        before, after = (table.counts[name, pair.category] for name in (pair.before, pair.after))
        if (
            before.n != after.n
            or pair.gained - pair.lost != after.success - before.success
            or pair.lost > before.success
            or pair.gained > after.success
        ):
            raise InputError(
                f"{where}, '{shown(pair.category, 60)}': {pair.gained} gained and {pair.lost} lost "
                f"do not lead from {before.success}/{before.n} to {after.success}/{after.n}"
            )
        key = (pair.before, pair.after, pair.category)
        if key in found:
            raise InputError(f"{where}, '{shown(pair.category, 60)}': there twice")
        found[key] = pair.gained, pair.lost
    return found


def _lines(path: Path) -> Iterator[Line]:
    suffix = path.suffix.lower()
    if suffix not in (*DELIMITERS, *JSON_LINES):
        raise InputError(f"{shown(path)}: name a .csv, .tsv or .jsonl file")
    with open_regular(path) as stream:
        text = io.TextIOWrapper(stream, "utf-8-sig", newline="")
        try:
            yield from (
                _json_lines(path, text)
                if suffix in JSON_LINES
                else _csv_lines(path, text, DELIMITERS[suffix])
            )
        except UnicodeDecodeError:
            raise InputError(f"{shown(path)}: not UTF-8; save it as UTF-8") from None
        except OSError as error:
            raise InputError(f"{shown(path)}: cannot be read ({error.strerror})") from None


def _csv_lines(path: Path, text: io.TextIOWrapper, delimiter: str) -> Iterator[Line]:
    rows = csv.reader(text, delimiter=delimiter, strict=True)
    header = list[str]()
    try:
        for row in rows:
            line = rows.line_num
            if not row:
                continue
            if not header:
                header = _header(path, [name.strip() for name in row])
            elif len(row) != len(header):
                raise InputError(
                    f"{shown(path)}, line {line}: {len(row)} fields, but {len(header)} columns"
                )
            else:
                yield line, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise InputError(
            f"{shown(path)}, line {rows.line_num}: not a table: {shown(error)}"
        ) from None


def _header(path: Path, names: list[str]) -> list[str]:
    if len(set(names)) < len(names):
        double = next(name for name in names if names.count(name) > 1)
        raise InputError(f"{shown(path)}: two columns '{shown(double, 60)}'")
    return names


def _json_lines(path: Path, text: io.TextIOWrapper) -> Iterator[Line]:
    line = 0
    while raw := text.readline(MAX_LINE + 1):
        line += 1
        if len(raw) > MAX_LINE:
            raise InputError(f"{shown(path)}, line {line}: longer than 4 MiB")
        if raw.strip():
            yield line, _json_record(path, line, raw)


def _json_record(path: Path, line: int, raw: str) -> dict[str, str]:
    try:
        record = json.loads(raw)
    except (json.JSONDecodeError, RecursionError, ValueError):
        raise InputError(f"{shown(path)}, line {line}: not JSON; one object a line") from None
    if not isinstance(record, dict):
        raise InputError(f"{shown(path)}, line {line}: not an object; one object a line")
    return {name: _plain(value) for name, value in record.items()}


def _plain(value: Any) -> str:
    """Return a JSON value as a cell would hold it; lists and objects are kept as JSON."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return value if isinstance(value, str) else json.dumps(value)
