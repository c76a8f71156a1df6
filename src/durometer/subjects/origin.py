"""What a subject is and where it came from, kept with a run so that others can be put beside it."""

from pathlib import Path
from typing import Any

from durometer.subjects.base import Source, Subject
from durometer.subjects.record import RECORD


def origin_of(subject: Subject) -> dict[str, Any]:
    """Return what tells a subject among others of its kind.

    Returns:
        ``family`` as transformers names it (``llama``, ``qwen2``), ``architecture`` (the class),
        and ``recorded``: whether ``harden`` left a record in a folder that it was loaded from.
    """
    config = subject.model.config
    return {
        "family": str(getattr(config, "model_type", "") or ""),
        "architecture": type(subject.model).__name__,
        "recorded": any((place / RECORD).is_file() for place in places(subject.source)),
    }


def places(source: Source) -> list[Path]:
    """Return the folders of this machine that a subject was loaded from, its adapter's too."""
    named = {"folder": [source.location]}
    if source.kind == "adapter":
        base = source.undefended
        named["adapter"] = [base, source.location.partition("+")[2]]
    return [Path(place).expanduser() for place in named.get(source.kind, []) if place]
