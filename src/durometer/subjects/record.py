"""The record that a hardened model's folder carries: where its controls and its domain are."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from durometer.core.errors import InputError

if TYPE_CHECKING:  # it loads torch, and options are read without
    from durometer.subjects.base import Source

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


def belongs(record: Mapping[str, Any], fingerprint: str, dtype: str) -> bool:
    """Say whether a record may be that of the weights with ``fingerprint``.

    Weights that were loaded in another number format than the record's have another fingerprint,
    so that nothing can be said against them.
    """
    told = "fingerprint" in record and record.get("dtype") == dtype
    return not told or record["fingerprint"] == fingerprint


def facts_in(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what tells a model's place among others, {} for an empty record.

    ``safeguards`` has name and access of every stage (access None where it was not recorded),
    ``unchanged`` whether the weights are those that hardening started from.
    """
    if not record:
        return {}
    stages = [s if isinstance(s, dict) else {"name": s} for s in record.get("safeguards", [])]
    made, base = record.get("fingerprint"), record.get("base") or {}
    return {
        "safeguards": [{"name": str(s["name"]), "access": _access(s)} for s in stages],
        "unchanged": bool(made) and base.get("fingerprint") == made,
    }


def _access(stage: Mapping[str, Any]) -> str | None:
    return next((known for known in ("weights", "api") if stage.get("access") == known), None)


def facts_of(source: "Source", fingerprint: str, dtype: str) -> dict[str, Any]:
    """Return ``facts_in`` the record of a loaded subject, {} where none can be told to be its.

    A run keeps them, for its model's folder may be moved or trained on later.

    Raises:
        InputError: the folder has a record that cannot be read.
    """
    record = read_record(Path(source.location)) if source.kind == "folder" else {}
    if not belongs(record, fingerprint, dtype):
        return {}
    try:
        return facts_in(record)
    except (AttributeError, KeyError, TypeError):  # somebody else's: it must not stop a run
        return {}


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
