"""The scoreboard of models: each is attacked alike, a run folder a model, and laid side by side."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from durometer.api import CampaignResult, SilentObserver, run_campaign
from durometer.core.errors import DurometerError, InputError, StorageError
from durometer.core.memory import release_free_memory
from durometer.options import domain_for, slug
from durometer.report.comparison import build_comparison
from durometer.report.comparison_runs import read_run
from durometer.report.output import output_folder
from durometer.trials.campaign import (
    Request,
    chosen_suite,
    further_measures,
    judged_domain,
)
from durometer.trials.runner import Observer
from durometer.trials.store import FILE

RUNS = "runs"
Watch = Callable[[Request, str], AbstractContextManager[Observer]]


@dataclass(frozen=True)
class Board:
    """What came of attacking several models alike.

    Attributes:
        data: the contents of ``comparison.json``.
        interrupted: whether the user stopped it; what was measured is kept.
        complete: whether every model was attacked, and every attack on it could be measured.
    """

    data: dict[str, Any]
    interrupted: bool
    complete: bool


@contextmanager
def _unwatched(request: Request, place: str) -> Iterator[Observer]:
    yield SilentObserver()


def plan(
    subjects: Sequence[str],
    request: Request,
    undefended: Sequence[str] = (),
    reference: Sequence[str] = (),
) -> list[Request]:
    """Return one request a model, alike but for the model and its controls.

    Args:
        subjects: specs as for ``load_subject``, each once.
        request: what all have in common; its own subject is not looked at.
        undefended, reference: ``SUBJECT=REF``, or ``REF`` for all.

    Raises:
        InputError: nothing of a name, a suite or a domain as it was given; told before any model
            is loaded.
    """
    named = list(dict.fromkeys(subjects))
    for subject in named:
        _known(subject)
    chosen_suite(request, 0)
    further_measures(request.measures, judged_domain(request).kind)
    controls = (
        _controls("--undefended", undefended, named),
        _controls("--reference", reference, named),
    )
    return [
        replace(
            request,
            subject=subject,
            undefended=controls[0].get(subject, ""),
            reference=controls[1].get(subject, ""),
        )
        for subject in named
    ]


def _known(subject: str) -> None:
    """Refuse a finished run, and a name that is neither built in nor a place."""
    if (Path(subject).expanduser() / FILE).is_file():
        raise InputError(
            f"{subject}: holds a run, not a model; to compare finished runs, leave --domain and "
            "--suite out"
        )
    try:
        domain_for(subject, None)
    except InputError as error:
        if str(error).startswith("unknown"):
            raise


def _controls(option: str, given: Sequence[str], subjects: Sequence[str]) -> dict[str, str]:
    """Return the control of every model that has one.

    Raises:
        InputError: a control of a model that is not compared, or two of one model or of all.
    """
    own: dict[str, str] = {}
    common: list[str] = []
    for text in given:
        owner = next((s for s in subjects if text.startswith(f"{s}=")), None)
        if owner in own or (owner is None and common and "=" not in text):
            raise InputError(f"{option} {text}: a second one for {owner or 'all'}; name one")
        if owner is not None:
            own[owner] = text[len(owner) + 1 :]
        elif "=" in text:
            raise InputError(
                f"{option} {text}: '{text.partition('=')[0]}' is none of the models named; write "
                "SUBJECT=REF, or REF for all"
            )
        else:
            common.append(text)
    return {s: text for s in subjects for text in common if s != text} | own


def run_folders(out: Path, requests: Sequence[Request]) -> list[Path]:
    """Return the run folder of every request: the same whatever else is compared with it."""
    return [out / RUNS / f"{slug(r.subject)}-{_digest(r.subject)}" for r in requests]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]


def require_free(out: Path, folders: Sequence[Path]) -> None:
    """Refuse a folder that holds runs already.

    Raises:
        InputError: it does.
    """
    output_folder(out)
    if any((folder / FILE).exists() for folder in folders):
        raise InputError(f"{out}: holds runs already; go on with --resume or name another --out")


def attack_all(
    requests: Sequence[Request], out: Path, *, resume: bool = False, watch: Watch = _unwatched
) -> Board:
    """Carry out one request after the other, and lay what came of them side by side.

    A model that cannot be attacked leaves the others; the scoreboard names it with the reason.

    Args:
        watch: gives the observer of one run, as a context.

    Raises:
        InputError: a folder that holds runs already.
        StorageError: something cannot be written; going on would lose what comes.
        DurometerError: no model could be attacked.
    """
    folders = run_folders(out, requests)
    if not resume:
        require_free(out, folders)
    failed: list[Mapping[str, str]] = []
    done, complete = [], True
    for number, (request, folder) in enumerate(zip(requests, folders, strict=True), 1):
        with watch(request, f"{number}/{len(requests)}") as observer:
            result, reason = _attacked(request, folder, observer)
        if result is not None and result.interrupted:
            return Board({}, interrupted=True, complete=False)
        release_free_memory()
        if reason and not _answers(folder):
            reason = reason.removeprefix(f"{request.subject}: ")
            failed.append({"subject": request.subject, "reason": reason})
            continue
        if unfinished := _unreadable(folder):
            failed.append({"subject": request.subject, "reason": unfinished})
            continue
        complete = complete and (result is None or result.complete)
        done.append(folder)
    if not done:
        told = "; ".join(f"{one['subject']}: {one['reason']}" for one in failed)
        raise DurometerError(f"no model could be attacked: {told}")
    return Board(build_comparison(done, failed), False, complete and not failed)


def _attacked(
    request: Request, folder: Path, observer: Observer
) -> tuple[CampaignResult | None, str]:
    """Return what a run found, or None and why there is nothing."""
    try:
        return run_campaign(request, folder, resume=True, observer=observer), ""
    except StorageError:
        raise
    except (DurometerError, MemoryError, torch.OutOfMemoryError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return None, first if isinstance(error, DurometerError) else f"out of memory: {first}"


def _unreadable(folder: Path) -> str:
    """Return why a run cannot be laid beside others (all its attacks failed), '' if it can."""
    try:
        read_run(folder)
    except InputError as error:
        return str(error)
    return ""


def _answers(folder: Path) -> bool:
    """Say whether a run that ended early tells all there is: the model answers unasked.

    Such a run is laid beside the others; any other that ended early has failed.
    """
    if not (folder / FILE).is_file():
        return False
    try:
        return not read_run(folder).attacked
    except InputError:
        return False
