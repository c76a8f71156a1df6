"""Item records as columns: a tenth of their size, nothing lost that a number rests on."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from durometer.measures.base import ItemRecord

__all__ = ["pack", "unpack"]

DIGITS = 7
# What is the same for an item in every state, so that it is kept once, with the state before.
ONCE = ("split", "entity", "suite", "prompt_hash", "text_hash")
LEFT_OUT = ("probe", "gate", "tries", "successful_tries", "verdicts", "details")
Row = dict[str, Any]
Columns = dict[str, dict[str, Any]]


def pack(records: Sequence[ItemRecord], *, whole: bool) -> Columns:
    """Return records by probe and field; a field that is the same throughout is kept once.

    Numbers have seven digits; what is not finite is None.

    Args:
        whole: with the fields that are the same in every state.
    """
    groups: dict[str, list[Row]] = {}
    for record in records:
        row = _flat(record)
        for name in () if whole else ONCE:
            del row[name]
        groups.setdefault(record.probe, []).append(row)
    return {probe: _columns(rows) for probe, rows in groups.items()}


def _flat(record: ItemRecord) -> Row:
    plain = record.as_dict()
    row = {name: value for name, value in plain.items() if name not in LEFT_OUT}
    return {**row, **plain.get("details", {})}


def _columns(rows: Sequence[Row]) -> dict[str, Any]:
    names = dict.fromkeys(name for row in rows for name in row)
    found: dict[str, Any] = {"count": len(rows)}
    for name in names:
        values = [_short(row.get(name)) for row in rows]
        same = name != "item_id" and all(value == values[0] for value in values)
        found[name] = {"all": values[0]} if same else values
    return found


def _short(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def unpack(columns: Columns, items: Mapping[tuple[str, str], Row] | None = None) -> list[Row]:
    """Return one row a record, with its probe.

    Args:
        items: fields by probe and item id that were kept once.

    Raises:
        KeyError, TypeError, ValueError: not what ``pack`` gave.
    """
    rows: list[Row] = []
    for probe, fields in columns.items():
        count = int(fields["count"])
        lists = {
            name: [value["all"]] * count if isinstance(value, dict) else value
            for name, value in fields.items()
            if name != "count"
        }
        if any(len(values) != count for values in lists.values()):
            raise ValueError(f"columns of '{probe}' differ in length")
        for place in range(count):
            row = {name: values[place] for name, values in lists.items()}
            once = (items or {}).get((probe, str(row["item_id"])), {})
            rows.append({"probe": probe, **once, **row})
    return rows
