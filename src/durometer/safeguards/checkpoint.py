"""The state of a training in one file, written whole or not at all, for one configuration."""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from durometer.core.errors import InputError
from durometer.safeguards.place import storage_error


class CheckpointFile:
    """A file that holds the newest state of one training; never an attacked model's.

    Args:
        path: the file.
        identity: what the training is; another one is not gone on with.
        every: updates between two checkpoints.
        resume: whether what is there may be gone on with.
    """

    def __init__(
        self, path: Path, identity: Mapping[str, Any], *, every: int, resume: bool = False
    ) -> None:
        self.path, self._every, self._resume = path, max(every, 1), resume
        self._identity = json.loads(json.dumps(identity))

    def due(self, since: int) -> bool:
        """Say whether the state is to be kept ``since`` so many updates were not."""
        return since >= self._every

    def save(self, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
        """Write the state beside its place, then move it there.

        Raises:
            StorageError: the disk is full, say; the last checkpoint is still there.
        """
        work = self.path.with_suffix(".partial")
        host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        text = {"state": json.dumps(state), "identity": json.dumps(self._identity)}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            save_file(host, work, metadata=text)
            os.replace(work, self.path)
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                work.unlink(missing_ok=True)
            kept = " (the checkpoint before this one is kept)"
            raise storage_error(self.path, error, kept) from error

    def load(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """Return the state, or None where there is none to go on with.

        Raises:
            InputError: it belongs to another configuration, or cannot be read.
        """
        if not self._resume or not self.path.exists():
            return None
        try:
            with safe_open(self.path, "pt") as file:
                text = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            identity, state = json.loads(text["identity"]), json.loads(text["state"])
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise InputError(f"{self.path}: no usable checkpoint ({error}); delete it") from error
        self._require_same(identity)
        return tensors, state

    def remove(self) -> None:
        """Delete the file once it is not needed."""
        self.path.unlink(missing_ok=True)

    def _require_same(self, found: Any) -> None:
        if found == self._identity:
            return
        other = next(_differences(found, self._identity, ""), "configuration")
        raise InputError(
            f"{self.path}: of a run with another {other}; repeat that run's command, or name "
            "another --out"
        )


def _differences(found: Any, wanted: Any, place: str) -> Any:
    """Yield where two configurations differ, as dotted names with both values."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for name in sorted({*found, *wanted}):
            if found.get(name) != wanted.get(name):
                inside = f"{place}.{name}".strip(".")
                yield from _differences(found.get(name), wanted.get(name), inside)
    else:
        yield f"{place} ({_short(found)}, now {_short(wanted)})"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 40 else f"{text[:37]}..."
