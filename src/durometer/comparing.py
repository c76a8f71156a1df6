"""What ``compare`` does: the scoreboard of finished runs, or of models that it attacks first."""

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from durometer.console import interruptible, say, show
from durometer.core.errors import ExitCode, InputError
from durometer.report.comparison import build_comparison
from durometer.report.comparison_html import render_comparison
from durometer.report.comparison_terminal import comparison_table
from durometer.report.output import output_folder, write_output

if TYPE_CHECKING:  # they load torch, which finished runs do not need
    from durometer.trials.campaign import Request
    from durometer.trials.runner import Observer

NAME = "comparison"


@dataclass(frozen=True)
class Comparison:
    """A scoreboard of models x tampers.

    Attributes:
        data: the contents of ``comparison.json``.
        folder: where it was written, None where it was not.
        complete: whether every model named was attacked, and every attack could be measured.
    """

    data: dict[str, Any]
    folder: Path | None = None
    complete: bool = True


def compare(
    folders: str | Path | Sequence[str | Path], *, out: str | Path | None = None
) -> Comparison:
    """Put finished runs side by side, from their stored records alone.

    Args:
        folders: run folders of ``stress``, or hardened models whose ``stress`` folder holds one.
        out: folder for ``comparison.json`` and ``comparison.html``; nothing is written without.

    Raises:
        InputError: a folder without a finished run, a record that cannot be read, or runs on
            different domains.
        StorageError: ``out`` cannot be written.
    """
    named = [folders] if isinstance(folders, str | Path) else list(folders)
    folder = output_folder(out)
    data = build_comparison([Path(one).expanduser() for one in named])
    return _written(data, folder)


def scoreboard(
    subjects: Sequence[str],
    domain: str,
    *,
    out: str | Path,
    suite: str = "quick",
    undefended: Sequence[str] = (),
    reference: Sequence[str] = (),
    resume: bool = False,
    **options: Any,
) -> Comparison:
    """Attack several models alike, and put them side by side.

    A model that cannot be attacked leaves the others, and is in ``data["failed"]`` with the reason.

    Args:
        subjects: built-in names, model folders, ``.gguf`` files, hub ids or ``BASE+ADAPTER``.
        domain: what they are safeguarded on, as for ``stress``.
        out: folder for the runs (``runs/``), ``comparison.json`` and ``comparison.html``.
        suite: ``quick``, ``standard`` or ``full``.
        undefended: controls as ``SUBJECT=REF``, or ``REF`` for all; built-in and hardened models
            and adapters have their own.
        reference: plain safeguards to compare with, likewise.
        resume: run only what is missing in ``out``.
        options: ``tampers``, ``measures``, ``judges``, ``seeds``, ``budget_steps``, ``dtype`` and
            ``device``, as for ``stress``.

    Raises:
        DurometerError: one line that says what to change; nothing measured is lost.
        KeyboardInterrupt: the user stopped it; go on with ``resume``.
    """
    from durometer.side_by_side import attack_all, plan
    from durometer.trials.campaign import Request

    folder = Path(out).expanduser()
    request = Request("", domain, suite, **options)
    made = attack_all(plan(subjects, request, undefended, reference), folder, resume=resume)
    if made.interrupted:
        raise KeyboardInterrupt
    return replace(_written(made.data, folder), complete=made.complete)


def _written(data: dict[str, Any], folder: Path | None) -> Comparison:
    if folder is not None:
        write_output(folder, NAME, data, render_comparison(data))
    return Comparison(data, folder)


def run(folders: Sequence[Path], out: Path | None, *, as_json: bool) -> int:
    """Print the scoreboard of finished runs, and where the page is."""
    return _shown(compare(folders, out=out), as_json=as_json)


def require_no_attack(given: Mapping[str, Any]) -> None:
    """Refuse options that only an attack takes.

    Raises:
        InputError: names the first of them.
    """
    for name, value in given.items():
        if value:
            option = name.removesuffix("s") if isinstance(value, tuple) else name
            raise InputError(
                f"--{option.replace('_', '-')}: only where models are attacked; say on what, with "
                "--domain"
            )


def run_attacks(
    subjects: Sequence[str],
    domain: str | None,
    out: Path | None,
    *,
    suite: str,
    undefended: Sequence[str],
    reference: Sequence[str],
    resume: bool,
    as_json: bool,
    **options: Any,
) -> int:
    """Attack the models with their progress on stderr, and print the scoreboard."""
    from durometer.options import free_folder
    from durometer.side_by_side import attack_all, plan
    from durometer.trials.campaign import Request

    if out is None and resume:
        raise InputError("--resume: name the folder to go on with, as --out DIR")
    request = Request("", domain or _own_domain(subjects), suite, **options)
    requests = plan(subjects, request, undefended, reference)
    folder = out or free_folder("compare", request.domain, suite)
    again = resume_command(requests, folder)
    try:
        with interruptible():
            made = attack_all(requests, folder, resume=resume, watch=_watched)
    except KeyboardInterrupt:
        say(f"interrupted; go on with: {again}")
        return ExitCode.INTERRUPTED
    if made.interrupted:
        say(f"interrupted: finished trials are kept in {folder}; go on with: {again}")
        return ExitCode.INTERRUPTED
    code = _shown(_written(made.data, folder), as_json=as_json)
    for one in made.data["failed"]:
        say(f"not attacked: {one['subject']}: {one['reason']}")
    return code if made.complete else ExitCode.INCOMPLETE


def _own_domain(subjects: Sequence[str]) -> str:
    """Return the domain that all the models are for.

    Raises:
        InputError: it is not known, or not the same.
    """
    from durometer.options import domain_for

    found = {domain_for(subject, None) for subject in subjects}
    if len(found) > 1:
        raise InputError(
            f"the models are safeguarded on different domains ({', '.join(sorted(found))}); name "
            "one with --domain"
        )
    return found.pop()


@contextmanager
def _watched(request: "Request", place: str) -> Iterator["Observer"]:
    from durometer.progress import CampaignProgress

    with CampaignProgress(f"model {place}: loading {request.subject}") as progress:
        yield progress


def resume_command(requests: Sequence["Request"], folder: Path) -> str:
    """Return the shell command that goes on with a comparison where it was left."""
    first = requests[0]
    options: list[tuple[str, object]] = [
        ("--domain", first.domain),
        ("--suite", first.suite),
        *(("--undefended", f"{r.subject}={r.undefended}") for r in requests if r.undefended),
        *(("--reference", f"{r.subject}={r.reference}") for r in requests if r.reference),
        *(("--tamper", tamper) for tamper in first.tampers),
        *(("--measure", measure) for measure in first.measures),
        *(("--judge", judge) for judge in first.judges),
        ("--seeds", first.seeds),
        ("--budget-steps", first.budget_steps),
        ("--dtype", first.dtype),
        ("--device", first.device),
    ]
    words = ["durometer", "compare", *(request.subject for request in requests)]
    for name, value in options:
        if value not in ("", None, "auto"):
            words += [name, str(value)]
    return shlex.join([*words, "--out", str(folder), "--resume"])


def _shown(made: Comparison, *, as_json: bool) -> int:
    if as_json:
        print(json.dumps(made.data, indent=2))
        return ExitCode.COMPLETE
    show(comparison_table(made.data))
    if made.folder is not None:
        print(f"page: {made.folder / NAME}.html")
    return ExitCode.COMPLETE
