"""Token surgery: rows of the embedding or the output head that were added, changed or swapped."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from durometer.audit.forensics.names import place_of, shared_names
from durometer.audit.forensics.pairs import Pair, Reading
from durometer.audit.tensors import TensorSource
from durometer.findings import Finding, Severity, found

MOST = 0.5
"""Share of changed rows up to which single rows are listed."""


@dataclass(frozen=True)
class Rows:
    """Changed rows of a vocabulary table.

    Attributes:
        changed: their numbers.
        moved: rows that now hold what another row of the base holds: (row, base's row).
        total: rows compared.
    """

    changed: list[int]
    moved: list[tuple[int, int]]
    total: int


def measure(pair: Pair) -> Rows | None:
    """Return the changed rows of a table, None if there are none or most of them changed."""
    changed = np.flatnonzero((pair.subject != pair.base).any(axis=1))
    if not 0 < changed.size <= MOST * len(pair.base):
        return None
    # Hashes alone: a table may be as large as memory allows.
    where = {hash(row.tobytes()): number for number, row in enumerate(pair.base)}
    found = ((int(n), where.get(hash(pair.subject[n].tobytes()))) for n in changed)
    moved = [
        (number, there)
        for number, there in found
        if there is not None and np.array_equal(pair.subject[number], pair.base[there])
    ]
    return Rows([int(number) for number in changed], moved, len(pair.base))


def finding(
    readings: Sequence[Reading], subject: TensorSource, base: TensorSource
) -> Finding | None:
    """Return resized tables and changed or swapped rows, None if there are none."""
    tables = [(r, r.rows) for r in readings if r.rows is not None]
    resized = _resized(subject, base)
    if not tables and not resized:
        return None
    moved = {r.name: rows.moved for r, rows in tables if rows.moved}
    elsewhere = sum(r.difference.equal < 1 for r in readings) - len(tables)
    parts = [f"{r.name}: {len(rows.changed)} rows changed" for r, rows in tables]
    parts += [f"{name}: {new} rows instead of {old}" for name, (new, old) in resized.items()]
    if moved:
        parts.append(f"{sum(map(len, moved.values()))} rows hold what other tokens held")
    severity = Severity.INFO if elsewhere else Severity.MEDIUM
    return found(
        "WF-62",
        Severity.HIGH if moved else severity if tables else Severity.LOW,
        "; ".join(parts),
        {
            "changed_rows": {r.name: rows.changed[:64] for r, rows in tables},
            "moved_rows": {name: found[:64] for name, found in moved.items()},
            "rows": {name: list(sizes) for name, sizes in resized.items()},
            "other_tensors_changed": elsewhere,
        },
        advice="Decode these token ids: control, refusal or trigger tokens matter most.",
    )


def _resized(subject: TensorSource, base: TensorSource) -> dict[str, tuple[int, int]]:
    sizes = {}
    for name, there in shared_names(subject.names(), base.names()).items():
        if place_of(name).role in {"embedding", "head"}:
            new, old = subject.shape(name), base.shape(there)
            if new[1:] == old[1:] and new != old:
                sizes[name] = (new[0], old[0])
    return sizes
