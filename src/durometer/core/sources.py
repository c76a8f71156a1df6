"""A hash of the package's own code, room by room: changed code must never be served old results."""

import hashlib
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent


@cache
def source_hash(*rooms: str) -> str:
    """Return the SHA-256 (16 digits) over all Python files of the named rooms (sub-packages)."""
    digest = hashlib.sha256()
    for room in rooms:
        for path in sorted((PACKAGE / room).rglob("*.py")):
            digest.update(str(path.relative_to(PACKAGE)).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
