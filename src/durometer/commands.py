"""What the commands do once their arguments are known; they print, and return the exit code."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from durometer.api import (
    CampaignResult,
    Condition,
    rebuild,
    run_campaign,
    screen_quantisation,
)
from durometer.console import interruptible, say, show
from durometer.core.cache import cache_entries, cache_root, clear_cache
from durometer.core.errors import ExitCode, InputError
from durometer.listing import cached, checked_domain, estimated, size
from durometer.options import domain_for, free_folder, resume_command
from durometer.progress import CampaignProgress
from durometer.report.write import REPORT
from durometer.subjects.fetch import fetchable
from durometer.trials.campaign import Request
from durometer.trials.estimate import estimate
from durometer.trials.store import FILE


def set_threads(threads: int | None) -> None:
    """Compute on that many threads; None leaves it to torch.

    Raises:
        InputError: fewer than one.
    """
    import torch

    if threads is None:
        return
    if threads < 1:
        raise InputError(f"--threads {threads}: at least 1")
    torch.set_num_threads(threads)


def stress_request(subject: str | None, domain: str | None, **options: Any) -> Request:
    """Return the request of ``stress``.

    Raises:
        InputError: no subject, or nothing that says what it is safeguarded on.
    """
    if not subject:
        raise InputError("name a subject: durometer stress SUBJECT (durometer list subjects)")
    return Request(subject, domain_for(subject, domain), **options)


def run_folder(request: Request, out: Path | None, *, resume: bool) -> Path:
    """Return the run folder: the one named, else the first free one of the usual name.

    Raises:
        InputError: a run to go on with is not named.
    """
    if out is None and resume:
        raise InputError("--resume: name the run folder to go on with, as --out DIR")
    return out or free_folder(request.subject, request.domain, request.suite)


def dry_run(request: Request, folder: Path, *, as_json: bool) -> int:
    """Measure and print what a campaign would take."""
    with CampaignProgress(f"measuring what {request.subject} takes") as progress:
        found = estimate(request, folder, progress)
    _print_json(found.as_dict()) if as_json else show(estimated(request, found))
    return ExitCode.COMPLETE


def run_stress(
    request: Request,
    folder: Path,
    *,
    resume: bool,
    reuse: Sequence[Path] = (),
    fail_on: Condition | None,
    as_json: bool,
    progress: CampaignProgress | None = None,
) -> int:
    """Carry out a campaign with its progress on stderr, and print what it found."""
    progress = progress or CampaignProgress(f"loading {request.subject}")
    try:
        with interruptible():
            with progress:
                result = run_campaign(
                    request, folder, resume=resume, reuse=reuse, observer=progress
                )
            show_result(result, as_json=as_json)
    except KeyboardInterrupt:
        if (folder / FILE).exists():
            _say_how_to_go_on("what was measured is", request, folder)
        else:
            say("interrupted before anything was measured; nothing is kept")
        return ExitCode.INTERRUPTED
    if result.interrupted:
        counts = result.summary["status_counts"]
        kept = counts["planned"] - counts["interrupted"]
        _say_how_to_go_on(f"{kept} of {counts['planned']} trials are", request, folder)
    return result.exit_code(fail_on)


def _say_how_to_go_on(kept: str, request: Request, folder: Path) -> None:
    command = resume_command(request, folder)
    say(f"interrupted: {kept} kept in {folder}; go on with: {command}")


def run_screen(
    subject: str,
    domain: str | None,
    precisions: Sequence[str],
    *,
    fail_on_alarm: bool,
    as_json: bool,
    **options: Any,
) -> int:
    """Screen a subject for behaviour that appears only after quantising; print what was found."""
    from durometer.report.screen import quantisation_table

    with interruptible(), CampaignProgress(f"loading {subject}") as progress:
        found = screen_quantisation(
            subject,
            domain_for(subject, domain),
            precisions=precisions,
            observer=progress,
            stage=progress.stage,
            **options,
        )
    _print_json(found.as_dict()) if as_json else show(quantisation_table(found))
    if fail_on_alarm and found.alarm:
        return ExitCode.CONDITION
    return ExitCode.COMPLETE if found.complete else ExitCode.INCOMPLETE


def run_report(
    folder: Path, *, show_texts: bool, as_json: bool, human_labels: Path | None = None
) -> int:
    """Write a run's outputs again and print what it found."""
    result = rebuild(folder, show_texts=show_texts, human_labels=human_labels)
    show_result(result, as_json=as_json)
    return result.exit_code()


def show_result(result: CampaignResult, *, as_json: bool) -> None:
    """Print the summary as JSON and nothing else, or as a table with the place of the report."""
    from durometer.report.terminal import summary_table

    if as_json:
        _print_json(result.summary)
        return
    show(summary_table(result.summary))
    print(f"report: {result.folder / REPORT}")


def run_fetch(name: str) -> int:
    """Fetch a built-in model and print where it is."""
    fetch = fetchable(name)
    with CampaignProgress(f"fetching {name}"):
        folder, made = fetch()
    print(f"{name} is ready" if made else f"{name} is here already", f"({folder})")
    return ExitCode.COMPLETE


def run_cache(*, clear: bool) -> int:
    """Print what is cached, or delete it."""
    if clear:
        print(f"freed {size(clear_cache())} in {cache_root()}")
        return ExitCode.COMPLETE
    entries = cache_entries()
    if entries:
        show(cached(entries))
    total = sum(entry.size for entry in entries)
    print(f"{cache_root()}: {size(total)} (durometer cache --clear deletes it)")
    return ExitCode.COMPLETE


def check_domain(spec: str) -> int:
    """Print what is in a domain and what its splits have in common."""
    tables, problems, warnings = checked_domain(spec)
    show(tables)
    for warning in warnings:
        say(f"warning: {warning}")
    for problem in problems:
        say(f"error: {problem}")
    if not problems:
        print("sound: no prompt and no restricted entity is in two splits")
    return ExitCode.INPUT_ERROR if problems else ExitCode.COMPLETE


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))
