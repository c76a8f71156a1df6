"""Trimmed rows of a run: everything that its figures are computed from, and no text.

One file a hardened model: what describes the run, and every trial with its checkpoints. An item
measured at a checkpoint is one letter, which stands for outcome, verdict and parse status.
``written`` makes a run folder of it again, from which the package computes what it would have
computed from the run itself.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from durometer.measures.base import ItemRecord
from durometer.subjects.record import RECORD
from durometer.trials.record import TrialRecord
from durometer.trials.store import Store

Json = dict[str, Any]
STRESS = "stress"
DESCRIBED = (
    "request",
    "subjects",
    "hardening",
    "domain",
    "suite",
    "planned",
    "worst",
    "not_tested",
    "wall_seconds",
)
PROBES = ("outcomes", "choices", "retain", "over_refusal")
PLACE = ("probe", "split", "item_id", "entity", "suite")
READING = ("outcome", "correct", "parse_status")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
# Lists of a tamper's record that are as long as its training, or name every weight.
LONG = ("losses", "learning_rates", "item_ids", "label_sample", "changed")
RECORDED = (
    "format",
    "durometer",
    "base",
    "undefended",
    "reference",
    "domain",
    "request",
    "seeds",
    "safeguards",
    "dtype",
    "threads",
    "fingerprint",
    "before_any_tamper",
)


class _Table:
    """Numbers things in the order in which they are met."""

    def __init__(self) -> None:
        self.entries: list[Any] = []
        self._places: dict[Any, int] = {}

    def place(self, entry: tuple[Any, ...]) -> int:
        """Return the number of an entry, a new one where it is not known."""
        if entry not in self._places:
            self._places[entry] = len(self.entries)
            self.entries.append(list(entry))
        return self._places[entry]


def trimmed(trials: Sequence[TrialRecord]) -> Json:
    """Return the trials as ``items``, ``sets`` of items, ``readings`` and ``trials``.

    Raises:
        ValueError: an item has more kinds of readings than there are letters.
    """
    items, sets, readings = _Table(), _Table(), _Table()
    rows = []
    for trial in trials:
        row = trial.as_dict()
        row["realised"] = {k: v for k, v in trial.realised.items() if k not in LONG}
        row["checkpoints"] = []
        for checkpoint in trial.checkpoints:
            kept = [item for item in checkpoint.items if item["probe"] in PROBES]
            places = tuple(items.place(tuple(item[name] for name in PLACE)) for item in kept)
            read = [readings.place(tuple(item[name] for name in READING)) for item in kept]
            if len(readings.entries) > len(LETTERS):
                raise ValueError("more kinds of readings than letters")
            stop = asdict(checkpoint) | {"items": sets.place(places)}
            row["checkpoints"].append(stop | {"readings": "".join(LETTERS[i] for i in read)})
        rows.append(row)
    return {
        "items": items.entries,
        "sets": sets.entries,
        "readings": readings.entries,
        "trials": rows,
    }


def restored(rows: Json) -> Iterator[TrialRecord]:
    """Yield the trials that ``trimmed`` was given, as far as it keeps them."""
    items = [dict(zip(PLACE, entry, strict=True)) for entry in rows["items"]]
    readings = [dict(zip(READING, entry, strict=True)) for entry in rows["readings"]]
    for row in rows["trials"]:
        stops = []
        for stop in row["checkpoints"]:
            kept = {name: value for name, value in stop.items() if name != "readings"}
            places = zip(rows["sets"][stop["items"]], stop["readings"], strict=True)
            kept["items"] = [
                ItemRecord(
                    **items[place], **readings[LETTERS.index(letter)], prompt_hash="", text_hash=""
                ).as_dict()
                for place, letter in places
            ]
            stops.append(kept)
        yield TrialRecord.from_dict(row | {"checkpoints": stops})


def read(folder: Path, failure: Json | None, work: Path) -> Json:
    """Return the rows of one hardened model; paths of this machine are left out of them.

    Args:
        failure: why something of it failed, if it did.
        work: the work folder, whose path is cut off.
    """
    path = folder / RECORD
    found = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    rows: Json = {"record": {name: found[name] for name in RECORDED if name in found}}
    rows["failure"] = failure
    run = folder / STRESS
    if (run / "trials.sqlite").is_file():
        store = Store.open(run)
        try:
            rows["described"] = {name: store.description(name) for name in DESCRIBED}
            rows |= trimmed(list(store.trials()))
        finally:
            store.close()
    text = json.dumps(rows, ensure_ascii=False).replace(f"{work.resolve()}/", "")
    anonymous: Json = json.loads(text.replace(f"{work}/", ""))
    return anonymous


def written(rows: Json, folder: Path, reference: str) -> None:
    """Write the folder of a hardened model with its run again, the weights left out.

    Args:
        reference: folder of the plain safeguard, as seen from this one; '' for none.
    """
    folder.mkdir(parents=True)
    if rows["record"]:
        record = rows["record"] | {"reference": reference}
        (folder / RECORD).write_text(json.dumps(record), "utf-8")
    if "described" not in rows:
        return
    store = Store(folder / STRESS)
    try:
        for name, value in rows["described"].items():
            store.describe(name, value)
        for trial in restored(rows):
            store.add(trial)
    finally:
        store.close()
