"""Writing a file whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


def replace_file(path: Path, parts: Iterator[str]) -> None:
    """Write ``parts`` to ``path`` whole or not at all."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.writelines(parts)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)
