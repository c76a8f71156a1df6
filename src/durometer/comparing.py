"""What ``compare`` does: the scoreboard of finished runs, printed and written."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from durometer.console import show
from durometer.core.errors import ExitCode
from durometer.report.comparison import build_comparison
from durometer.report.comparison_html import render_comparison
from durometer.report.comparison_terminal import comparison_table
from durometer.report.output import output_folder, write_output

NAME = "comparison"


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
    folder = output_folder(out)
    data = build_comparison([Path(one).expanduser() for one in named])
    if folder is not None:
        write_output(folder, NAME, data, render_comparison(data))
    return Comparison(data, folder)


def run(folders: Sequence[Path], out: Path | None, *, as_json: bool) -> int:
    """Print the scoreboard, and where the page is."""
    made = compare(folders, out=out)
    if as_json:
        print(json.dumps(made.data, indent=2))
        return ExitCode.COMPLETE
    show(comparison_table(made.data))
    if made.folder is not None:
        print(f"page: {made.folder / NAME}.html")
    return ExitCode.COMPLETE
