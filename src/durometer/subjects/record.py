"""The record that a hardened model's folder carries: where its controls and its domain are."""

import json
from pathlib import Path
from typing import Any

from durometer.core.errors import InputError

RECORD = "hardening.json"
MAX_BYTES = 16 << 20


def read_record(folder: Path) -> dict[str, Any]:
    """Return the record of a hardened model's folder, {} where there is none.

    Raises:
        InputError: it is there, but is no such record.
    """
    path = folder / RECORD
    try:
        if not path.is_file():
            return {}
        if path.stat().st_size > MAX_BYTES:
            raise ValueError("too large")
        record = json.loads(path.read_text("utf-8"))
        if not isinstance(record, dict) or not isinstance(record.get("domain"), dict):
            raise ValueError("not a record of harden")
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read: {error}; delete it, or harden again") from error
    return record


def controls(folder: Path, known: list[str]) -> tuple[str, str]:
    """Return the specs of the undefended subject and of the plain control, '' where there is none.

    Only built-in names and folders of this machine count: a record that somebody else wrote must
    not make anything be downloaded.
    """
    record = read_record(folder)
    base = record.get("undefended", "")
    inside = record.get("reference", "")
    undefended = base if isinstance(base, str) and (base in known or _is_folder(base)) else ""
    plain = folder / inside if isinstance(inside, str) and inside else None
    return undefended, str(plain) if plain is not None and _is_folder(str(plain)) else ""


def _is_folder(spec: str) -> bool:
    return bool(spec) and Path(spec).is_dir()
