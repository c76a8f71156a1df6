"""The one folder outside a run where Durometer keeps things: built-in subjects, made once.

Only subjects as a user may have them are cached (built-in models, models with a safeguard); nothing
that a tamper changed is ever written.
"""

import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from durometer.core.errors import StorageError
from durometer.core.memory import release_free_memory

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CacheEntry:
    """One cached folder with its size in bytes."""

    name: str
    path: Path
    size: int


def cache_root() -> Path:
    """Return ``$DUROMETER_CACHE``, else the user's cache folder of the platform convention."""
    named = os.environ.get("DUROMETER_CACHE")
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "durometer"


def cached_path(name: str, digest: str) -> Path:
    """Return where ``cached_folder`` keeps ``name``, whether it is there or not."""
    return cache_root() / f"{name}-{digest[:16]}"


def cached_folder(name: str, digest: str, build: Callable[[Path], None]) -> Path:
    """Return the folder ``name`` made by ``build``, building it if it is not there.

    The folder appears whole or not at all: it is built beside its place and then renamed.

    Args:
        name: readable name.
        digest: hash of everything that shapes the content.
        build: writes the content into the folder that it is given.

    Raises:
        StorageError: the cache folder cannot be written.
    """
    final = cached_path(name, digest)
    if final.is_dir():
        return final
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=final.parent))
    except OSError as error:
        raise _unwritable(final.parent, error) from error
    logger.warning(f"making {name}, which takes a while; it is kept for the next time")
    try:
        build(work)
        work.rename(final)
    except (OSError, SafetensorError) as error:
        if not final.is_dir():
            raise _unwritable(final.parent, error) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
        release_free_memory()
    return final


def cache_entries() -> list[CacheEntry]:
    """Return what is cached, by name."""
    root = cache_root()
    folders = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    return [CacheEntry(path.name, path, _size(path)) for path in folders]


def clear_cache() -> int:
    """Delete the cached folders and return how many bytes that freed."""
    entries = cache_entries()
    for entry in entries:
        shutil.rmtree(entry.path)
    return sum(entry.size for entry in entries)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _unwritable(folder: Path, error: OSError | SafetensorError) -> StorageError:
    reason = getattr(error, "strerror", None) or error
    return StorageError(
        f"cache folder {folder}: {reason}; free some space or name another folder "
        "in DUROMETER_CACHE"
    )
