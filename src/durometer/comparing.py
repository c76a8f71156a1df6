"""What ``compare`` does: the scoreboard of finished runs, printed and written."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from durometer.console import show
from durometer.core.errors import ExitCode, InputError
from durometer.core.files import replace_file
from durometer.report.comparison import build_comparison
from durometer.report.comparison_html import render_comparison
from durometer.report.comparison_terminal import comparison_table
from durometer.trials.store import storage_error

DATA, PAGE = "comparison.json", "comparison.html"


@dataclass(frozen=True)
class Comparison:
    """A scoreboard of safeguards x tampers.

    Attributes:
        data: the contents of ``comparison.json``.
        folder: where it was written, None where it was not.
    """

    data: dict[str, Any]
    folder: Path | None = None


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
    folder = Path(out).expanduser() if out is not None else None
    if folder is not None and folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: not a folder; name another --out")
    data = build_comparison([Path(one).expanduser() for one in named])
    if folder is not None:
        _write(data, folder)
    return Comparison(data, folder)


def _write(data: dict[str, Any], folder: Path) -> None:
    page = render_comparison(data)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / DATA, iter([json.dumps(data, indent=2), "\n"]))
        replace_file(folder / PAGE, iter([page]))
    except OSError as error:
        raise storage_error(folder, error) from error


def run(folders: Sequence[Path], out: Path | None, *, as_json: bool) -> int:
    """Print the scoreboard, and where the page is."""
    made = compare(folders, out=out)
    if as_json:
        print(json.dumps(made.data, indent=2))
        return ExitCode.COMPLETE
    show(comparison_table(made.data))
    if made.folder is not None:
        print(f"page: {made.folder / PAGE}")
    return ExitCode.COMPLETE
