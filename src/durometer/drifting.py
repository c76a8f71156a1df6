"""What ``drift`` does: three trainings of one size, measured before and after, told and written."""

import json
import re
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import durometer.catalogue  # noqa: F401  (fills the registries)
from durometer.console import interruptible, say, show
from durometer.core.errors import ExitCode, InputError
from durometer.domains.load import load_domain
from durometer.options import domain_for, free_folder
from durometer.override.analysis import summarise
from durometer.override.cells import Cell
from durometer.override.run import DriftRequest, Watcher, run_cells
from durometer.override.settings import DriftSettings
from durometer.override.store import CELLS, RUN, check_folder
from durometer.progress import CampaignProgress
from durometer.report.figures import seconds_text
from durometer.report.output import write_output
from durometer.subjects.builtin import subject_registry
from durometer.subjects.load import DtypeName, load_subject

NAME = "drift"


@dataclass(frozen=True)
class Drift:
    """What three ways of fine-tuning changed.

    Attributes:
        data: the contents of ``drift.json``.
        folder: the run folder: ``drift.html``, ``drift.json``, ``cells.jsonl`` and ``run.json``.
    """

    data: dict[str, Any]
    folder: Path

    def exit_code(self) -> ExitCode:
        """Return 0 where every cell was measured, else 3."""
        return ExitCode.COMPLETE if self.data["complete"] else ExitCode.INCOMPLETE


class _Silent:
    """A watcher that shows nothing."""

    def planned(self, cells: int, reused: int) -> None:
        pass

    def started(self, cell: Cell, steps: int) -> None:
        pass

    def updated(self, step: int, steps: int, loss: float) -> None:
        pass

    def finished(self, cell: Cell, record: Mapping[str, Any]) -> None:
        pass


class DriftProgress:
    """Shows how a run goes on, on stderr: a bar while training, one line a cell.

    Args:
        stage: what happens until the first cell begins.
    """

    def __init__(self, stage: str) -> None:
        self._bars = CampaignProgress(stage)
        self._cells = self._done = self._own = 0
        self._begun = time.monotonic()

    def __enter__(self) -> Self:
        self._bars.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._bars.__exit__(*error)

    def planned(self, cells: int, reused: int) -> None:
        """Say how much there is to do."""
        self._cells, self._done, self._begun = cells, reused, time.monotonic()
        there = f", {reused} of them there already" if reused else ""
        self._bars.say(f"{cells} cells{there}")

    def started(self, cell: Cell, steps: int) -> None:
        """Show the cell that begins."""
        self._bars.begin(f"{cell}: training" if steps else f"{cell}: measuring", steps)

    def updated(self, step: int, steps: int, loss: float) -> None:
        """Show the step; after the last one the subject is measured."""
        self._bars.updated(step, steps, loss)

    def finished(self, cell: Cell, record: Mapping[str, Any]) -> None:
        """Give the cell a line, with the time that the others will take."""
        self._done, self._own = self._done + 1, self._own + 1
        left = (time.monotonic() - self._begun) / self._own * (self._cells - self._done)
        facts = [str(record["status"]), seconds_text(record["seconds"])]
        facts += [str(record["reason"])] if record["reason"] else []
        facts += [f"about {seconds_text(left)} left"] if self._done < self._cells else []
        self._bars.say(f"[{self._done}/{self._cells}] {cell}: {', '.join(facts)}")


def drift(
    subject: str,
    domain: str = "",
    *,
    out: str | Path,
    resume: bool = False,
    dtype: DtypeName = "auto",
    device: str = "auto",
    watcher: Watcher | None = None,
    **settings: Any,
) -> Drift:
    """Fine-tune ``subject`` three ways in memory and measure what each changes.

    Args:
        subject: built-in name, model folder, ``.gguf`` file, hub id or ``BASE+ADAPTER``.
        domain: built-in domain or folder, with answers; '' takes that of a built-in subject.
        out: run folder: new, empty, or with ``resume`` one that holds a run of the same settings.
        resume: run only the cells that are missing.
        dtype: number format to compute in.
        device: where to compute.
        watcher: told how the run goes on.
        settings: of ``DriftSettings``: ``ranks``, ``seeds``, ``steps`` ...

    Raises:
        DurometerError: one line that says what to change; finished cells are kept.
    """
    request = DriftRequest(
        subject,
        _domain(subject, domain),
        DriftSettings.parse(NAME, settings),
        dtype,
        device,
    )
    return run_request(request, Path(out).expanduser(), resume=resume, watcher=watcher)


def run_request(
    request: DriftRequest, folder: Path, *, resume: bool, watcher: Watcher | None = None
) -> Drift:
    """Carry out ``request`` in the run folder ``folder``; see ``drift``."""
    from durometer.report.drift_html import render_drift

    check_folder(folder, resume=resume)
    domain = load_domain(request.domain)  # what is wrong with it is told before a model is loaded
    subject = load_subject(request.subject, dtype=_dtype(request.dtype), device=request.device)
    store = run_cells(request, subject, domain, folder, resume=resume, watcher=watcher or _Silent())
    data = summarise(store.run, store.cells)
    write_output(folder, NAME, data, render_drift(data))
    return Drift(data, folder)


def _dtype(name: str) -> DtypeName:
    known: tuple[DtypeName, ...] = ("auto", "float32", "bfloat16", "float16")
    for one in known:
        if one == name:
            return one
    raise InputError(f"dtype '{name}': one of {', '.join(known)}")


def _domain(subject: str, domain: str | None) -> str:
    """Return the domain: named, of the subject, or of the safeguarded subject made from it."""
    if not domain and subject in subject_registry.names():
        entries = [entry for _, entry in subject_registry if entry.undefended == subject]
        domain = subject_registry.get(subject).domain or next((e.domain for e in entries), None)
    return domain_for(subject, domain)


def ranks_of(text: str) -> tuple[int, ...]:
    """Return ranks as they are typed: ``8,16,32``.

    Raises:
        InputError: one that is no whole number, or below 1, or named twice.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words or not all(re.fullmatch(r"-?[0-9]{1,6}", word) for word in words):
        raise InputError(f"--ranks {text}: whole numbers with commas between them, such as 8,16,32")
    ranks = tuple(int(word) for word in words)
    for rank in ranks:
        if rank < 1:
            raise InputError(f"--ranks {text}: rank {rank}: a rank is at least 1")
    if len(set(ranks)) < len(ranks):
        raise InputError(f"--ranks {text}: a rank is named twice")
    return ranks


def drift_request(
    subject: str,
    domain: str | None,
    ranks: str,
    *,
    seeds: int,
    steps: int,
    dtype: str,
    device: str,
) -> DriftRequest:
    """Return the request of ``drift``.

    Raises:
        InputError: a rank, a number of seeds or steps, or a subject that cannot be.
    """
    for name, value in (("--seeds", seeds), ("--steps", steps)):
        if value < 1:
            raise InputError(f"{name} {value}: at least 1")
    settings = DriftSettings(ranks=ranks_of(ranks), seeds=seeds, steps=steps)
    return DriftRequest(subject, _domain(subject, domain), settings, dtype, device)


def run(request: DriftRequest, out: Path | None, *, resume: bool, as_json: bool) -> int:
    """Run with the progress on stderr, print what changed and where the page is."""
    from durometer.report.drift_terminal import drift_table

    if out is None and resume:
        raise InputError("--resume: name the run folder to go on with, as --out DIR")
    folder = out or free_folder(NAME, request.subject, request.domain)
    try:
        with interruptible(), DriftProgress(f"loading {request.subject}") as progress:
            made = run_request(request, folder, resume=resume, watcher=progress)
    except KeyboardInterrupt:
        if not (folder / RUN).is_file():
            say("interrupted before anything was measured; nothing is kept")
            return ExitCode.INTERRUPTED
        kept = (folder / CELLS).read_bytes().count(b"\n")
        say(
            f"interrupted: {kept} cells are kept in {folder}; go on with: "
            f"{resume_command(request, folder)}"
        )
        return ExitCode.INTERRUPTED
    if as_json:
        print(json.dumps(made.data, indent=2))
    else:
        show(drift_table(made.data))
        print(f"page: {made.folder / NAME}.html")
    return made.exit_code()


def resume_command(request: DriftRequest, folder: Path) -> str:
    """Return the shell command that goes on with a run where it was left."""
    settings = request.settings
    words: Sequence[object] = ["durometer", NAME, request.subject, "--domain", request.domain]
    options = {
        "--ranks": ",".join(map(str, settings.ranks)),
        "--seeds": settings.seeds,
        "--steps": settings.steps,
        "--dtype": request.dtype,
        "--device": request.device,
        "--out": folder,
    }
    told = [str(word) for word in words]
    for name, value in options.items():
        told += [name, str(value)] if str(value) != "auto" else []
    return shlex.join([*told, "--resume"])
