"""The folder that a command writes its figures to: as JSON for programs, as a page for people."""

import json
from pathlib import Path
from typing import Any

from durometer.core.errors import InputError, StorageError
from durometer.core.files import replace_file


def output_folder(out: str | Path | None) -> Path | None:
    """Return the folder named with ``--out``, None where none was.

    Raises:
        InputError: there is something of that name that is no folder.
    """
    folder = Path(out).expanduser() if out is not None else None
    if folder is not None and folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: not a folder; name another --out")
    return folder


def write_output(folder: Path, name: str, data: dict[str, Any], page: str) -> None:
    """Write ``NAME.json`` and ``NAME.html``, each whole or not at all.

    Raises:
        StorageError: they cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / f"{name}.json", iter([json.dumps(data, indent=2), "\n"]))
        replace_file(folder / f"{name}.html", iter([page]))
    except OSError as error:
        raise StorageError(
            f"{folder}: {error.strerror or error}; free some space or name a writable folder with "
            "--out"
        ) from error
