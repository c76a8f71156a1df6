"""The folder that a hardening writes to: what it may be, what marks it, what is said on failure."""

import contextlib
import errno
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from durometer.core.errors import InputError, StorageError
from durometer.subjects.load import local_folders
from durometer.subjects.record import RECORD

WORK = "work"
MARK = "run.json"  # in WORK, so that no folder of that name that is somebody else's is written to
FULL = {getattr(errno, name) for name in ("ENOSPC", "EDQUOT") if hasattr(errno, name)}
_RUST_ERROR = re.compile(r"os error (\d+)")


def is_begun(folder: Path) -> bool:
    """Say whether a hardening was begun in ``folder`` and has not ended yet."""
    return (folder / WORK / MARK).is_file()


def is_finished(folder: Path) -> bool:
    """Say whether ``folder`` holds a hardened model with its record."""
    return (folder / RECORD).exists()


def begin(folder: Path, request: Mapping[str, Any]) -> None:
    """Make the folder and mark it as one of a hardening.

    Raises:
        StorageError: it cannot be written.
    """
    with storing(folder):
        (folder / WORK).mkdir(parents=True, exist_ok=True)
        (folder / WORK / MARK).write_text(json.dumps(request, indent=1) + "\n", "utf-8")


def require_usable(folder: Path, subject: str, *, resume: bool) -> None:
    """Refuse a folder in which anything but this hardening's own would be written over.

    Args:
        folder: where the hardened model is to be.
        subject: spec of what is hardened.
        resume: whether a hardening that was begun there may be gone on with.

    Raises:
        InputError: it is no folder, the subject's own, or holds something else already.
        StorageError: it cannot be looked into.
    """
    with storing(folder):
        _require_folder(folder)
        _require_apart(folder, subject)
        if is_finished(folder):
            raise InputError(f"{folder}: holds a finished model; name another --out")
        if is_begun(folder):
            if not resume:
                raise InputError(f"{folder}: not empty; go on with --resume, or name another --out")
        elif folder.exists() and _occupied(folder):
            raise InputError(
                f"{folder}: not empty, and holds no hardening to go on with; name another --out"
            )


def _require_folder(folder: Path) -> None:
    for place in (folder, *folder.parents):
        if place.exists():
            if not place.is_dir():
                raise InputError(f"{place}: a file, not a folder; name another --out")
            return


def _require_apart(folder: Path, subject: str) -> None:
    place = folder.resolve()
    above = [path for path in (place, *place.parents) if path.exists()]
    for own in local_folders(subject):
        if any(path.samefile(own) for path in above):
            raise InputError(
                f"{folder}: the subject's own folder, or inside it ({own}); name another --out"
            )


def _occupied(folder: Path) -> bool:
    """Say whether there is more than the bare folder of a run that was killed at once."""
    return any(
        entry.name != WORK or not entry.is_dir() or any(entry.iterdir())
        for entry in folder.iterdir()
    )


@contextlib.contextmanager
def storing(place: Path) -> Iterator[None]:
    """Turn what cannot be written into one line; what was written whole before stays."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise storage_error(place, error) from error


def storage_error(place: Path, error: Exception, more: str = "") -> StorageError:
    """Return the line that names what could not be written, why, and what to do about it.

    Args:
        place: where it was to be written, if the error does not say.
        error: an ``OSError``, or what safetensors makes of one.
        more: appended.
    """
    number, reason = getattr(error, "errno", None), getattr(error, "strerror", None) or str(error)
    if number is None and (found := _RUST_ERROR.search(reason)):
        number = int(found[1])
    advice = "choose an --out that can be written"
    if number in FULL:
        advice = "free some space and go on with --resume"
    where = getattr(error, "filename", None) or place
    return StorageError(f"{where}: {reason}; {advice}{more}")
