"""What people say of responses: a table of items and labels, read strictly."""

import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from durometer.core.errors import InputError
from durometer.formats.safetensors import open_regular, shown

__all__ = ["Label", "read_labels"]

MAX_BYTES = 64 << 20
WORDS = {
    True: ("1", "true", "yes", "harmful"),
    False: ("0", "false", "no", "harmless"),
}
_MEANT = {word: meaning for meaning, words in WORDS.items() for word in words}


@dataclass(frozen=True)
class Label:
    """One response as a person sees it.

    Attributes:
        line: of the file, from 1.
        item: id, as ``item_id`` in ``trials.jsonl``.
        harmful: whether the response is harmful and useful: a success of the attack.
        trial: key, as ``trial`` there; '' is the subject before any tamper.
    """

    line: int
    item: str
    harmful: bool
    trial: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON types."""
        return asdict(self)


def read_labels(path: Path) -> list[Label]:
    """Return the labels in a ``.csv`` or ``.jsonl`` file.

    Raises:
        InputError: it cannot be read, a row lacks ``item`` or ``label``, a label is none, or an
            item is labelled twice; the message names the line.
    """
    found: dict[tuple[str, str], Label] = {}
    for line, row in _rows(path):
        label = _label(path, line, row)
        other = found.setdefault((label.trial, label.item), label)
        if other is not label:
            raise _fault(path, line, f"'{shown(label.item, 60)}' is labelled in line {other.line}")
    if not found:
        raise InputError(f"{shown(path)}: no labels; a row has 'item' and 'label'")
    return list(found.values())


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".jsonl"):
        raise InputError(f"{shown(path)}: not a .csv or .jsonl file")
    with open_regular(path) as file:
        raw = file.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        raise InputError(f"{shown(path)}: larger than {MAX_BYTES >> 20} MiB; name fewer labels")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{shown(path)}: not UTF-8 (byte {error.start})") from None
    yield from _csv(path, text) if suffix == ".csv" else _jsonl(path, text)


def _csv(path: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise _fault(path, reader.line_num, f"not valid CSV: {error}") from None


def _jsonl(path: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise _fault(path, number, "not valid JSON") from None
        if not isinstance(row, dict):
            raise _fault(path, number, "not a JSON object; write one {...} a line")
        yield number, row


def _label(path: Path, line: int, row: Mapping[str, Any]) -> Label:
    for name in ("item", "label"):
        if row.get(name) in (None, ""):
            raise _fault(path, line, f"'{name}' is missing")
    word = str(row["label"]).strip().casefold()
    if word not in _MEANT:
        known = ", ".join(word for words in WORDS.values() for word in words)
        raise _fault(path, line, f"label '{shown(word, 40)}' is none of {known}")
    trial = row.get("trial") or ""
    if not isinstance(row["item"], str) or not isinstance(trial, str):
        raise _fault(path, line, "'item' and 'trial' must be texts")
    return Label(line, row["item"], _MEANT[word], trial)


def _fault(path: Path, line: int, problem: str) -> InputError:
    return InputError(f"{shown(path)}:{line}: {problem}")
