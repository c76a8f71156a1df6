"""Where the models of a scoreboard come from: their family, base and revision."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from durometer.subjects.record import RECORD

Json = Mapping[str, Any]
REVISION = 8  # characters of a commit that are shown


def origin(role: str, subject: Json, kept: Json) -> dict[str, Any]:
    """Return the origin of one row.

    Args:
        role: ``subject``, ``reference`` or ``undefended``.
        subject: what the summary says of it.
        kept: what the run kept of it, see ``subjects.origin``; {} of an older run.
    """
    source = subject["source"]
    base = (
        source["location"] if role == "undefended" else source["undefended"] or source["location"]
    )
    return {
        "kind": source["kind"],
        "location": source["location"],
        "base": base,
        "revision": source["revision"],
        "family": kept.get("family") or None,
        "architecture": kept.get("architecture") or None,
    }


def is_plain(source: Json, kept: Json) -> bool:
    """Say whether a model is as its maker gave it out: ``harden`` has left no record with it.

    The folder of a run that kept nothing of this must still be there: one that was moved away may
    have held a record.
    """
    if source["kind"] in ("builtin", "hub", "gguf"):
        return True
    recorded = kept.get("recorded")
    if recorded is None:
        return all(_bare(place) for place in _folders(source))
    return not recorded


def _folders(source: Json) -> list[Path]:
    if source["kind"] == "folder":
        return [Path(source["location"])]
    adapter = Path(source["location"].partition("+")[2])
    base = Path(source["undefended"])
    # The base of an adapter may be a name; what is no folder has no record.
    return [adapter, base] if base.is_dir() else [adapter]


def _bare(place: Path) -> bool:
    return place.is_dir() and not (place / RECORD).is_file()


def origin_text(found: Json) -> str:
    """Return family, base and revision in a few words, as ``llama, org/name @ 0123abcd``."""
    base = str(found["base"])
    if found["kind"] in ("folder", "gguf", "adapter") and Path(base).is_absolute():
        base = Path(base).name
    revision = f" @ {found['revision'][:REVISION]}" if found["revision"] else ""
    return ", ".join([*([found["family"]] if found["family"] else []), f"{base}{revision}"])
