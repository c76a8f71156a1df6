"""A whole run: the subject as it is, then every way, rank and seed that is not in the store."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from durometer.core.errors import InputError
from durometer.core.sources import source_hash
from durometer.core.training import Update
from durometer.domains.base import Domain
from durometer.override.battery import Battery, make_battery
from durometer.override.cells import WAYS, Bench, Cell, relations, rows_each
from durometer.override.settings import DriftSettings
from durometer.override.store import CellStore
from durometer.subjects.base import Subject
from durometer.trials.runner import environment

__all__ = ["DriftRequest", "Watcher", "cells_of", "run_cells"]

ROOMS = ("core", "domains", "measures", "override", "safeguards", "subjects", "tampers")


@dataclass(frozen=True)
class DriftRequest:
    """What is to be run.

    Attributes:
        subject, domain: as they were named.
    """

    subject: str
    domain: str
    settings: DriftSettings
    dtype: str = "auto"
    device: str = "auto"


class Watcher(Protocol):
    """Who is told how a run goes on."""

    def planned(self, cells: int, reused: int) -> None:
        """So many cells there are, of which some are there already."""

    def started(self, cell: Cell, steps: int) -> None:
        """A cell begins."""

    def updated(self, step: int, steps: int, loss: float) -> None:
        """A training made an update."""

    def finished(self, cell: Cell, record: Mapping[str, Any]) -> None:
        """A cell is in the store."""


def cells_of(settings: DriftSettings) -> list[Cell]:
    """Return all cells, seeds outermost, so that a run that is stopped has whole seeds."""
    return [
        Cell("none"),
        *(
            Cell(way, rank, seed)
            for seed in range(1, settings.seeds + 1)
            for rank in settings.ranks
            for way in WAYS
        ),
    ]


def describe(
    request: DriftRequest, subject: Subject, domain: Domain, battery: Battery
) -> dict[str, Any]:
    """Return what a run is: whatever must be the same when it is gone on with.

    Raises:
        InputError: the domain lacks what a way trains on, or what is measured.
    """
    if not battery.restricted or not battery.questions:
        what = "restricted prompts" if not battery.restricted else _no_questions(battery)
        raise InputError(f"domain '{domain.name}': nothing to measure in split 'report': {what}")
    versions = environment(subject)
    return {
        "subject": {
            "name": subject.name,
            "fingerprint": subject.subject_fingerprint,
            "parameters": subject.parameters,
            "dtype": subject.dtype,
            "device": versions["device"],
        },
        "domain": {
            "name": domain.name,
            "kind": domain.kind,
            "content_hash": domain.content_hash,
            "harmless": domain.harmless,
        },
        "settings": request.settings.canonical(),
        "learning_rate": request.settings.rate(subject.parameters),
        "rows": {"each": rows_each(domain, request.settings), "of": relations(domain)},
        "asked": {
            "ask": battery.ask,
            "items": {
                "restricted": len(battery.restricted),
                "choices": len(battery.choices),
                "questions": len(battery.questions),
                "harmless": len(battery.harmless),
                "problems": len(battery.problems),
            },
            "left_out": battery.left_out,
        },
    }


def _no_questions(battery: Battery) -> str:
    reasons = "; ".join(f"{reason} ({count})" for reason, count in battery.left_out.items())
    return f"no retain question with a wrong answer to plant{f': {reasons}' if reasons else ''}"


def run_cells(
    request: DriftRequest,
    subject: Subject,
    domain: Domain,
    folder: Path,
    *,
    resume: bool,
    watcher: Watcher,
) -> CellStore:
    """Run what is missing in ``folder``; see ``check_folder`` for what it may hold.

    Raises:
        InputError: a run with other settings, or a domain that lacks something.
        StorageError: the folder cannot be written; finished cells are kept.
        RestoreError: the subject was not restored.
    """
    settings = request.settings
    relations(domain)  # what is missing is told before anything is tokenised
    battery = make_battery(subject, domain, settings)
    store = CellStore(folder, describe(request, subject, domain, battery))
    code = source_hash(*ROOMS)
    store.resume(code) if resume else store.begin()
    bench = Bench(subject, domain, settings, battery, _told(watcher, settings.steps))
    cells = cells_of(settings)
    missing = [cell for cell in cells if cell.key not in store.cells]
    watcher.planned(len(cells), len(cells) - len(missing))
    for cell in missing:
        watcher.started(cell, settings.steps if cell.rank else 0)
        record = bench.run(cell)
        record |= {"environment": environment(subject), "code": code}
        store.add(cell.key, record)
        watcher.finished(cell, record)
    return store


def _told(watcher: Watcher, steps: int) -> Callable[[Update], None]:
    return lambda update: watcher.updated(update.step, steps, update.loss)
