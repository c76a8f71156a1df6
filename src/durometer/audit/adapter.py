"""An adapter alone, read as the model that it makes of its base."""

import re
from pathlib import Path

import numpy as np

from durometer.audit.tensors import Array, SafetensorsSource, TensorSource
from durometer.core.errors import InputError
from durometer.formats.folder import check_model_folder
from durometer.formats.safetensors import shown

__all__ = ["AdapterSource"]

_PART = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_(A|B)(?:\.default)?\.weight")


class AdapterSource:
    """The tensors of ``base`` with a LoRA adapter's ``scale * B A`` added where it has any.

    Args:
        folder: PEFT adapter folder in safetensors format.
        base: the model that it is meant for.

    Raises:
        InputError: not a plain LoRA adapter, or one for another model.
    """

    def __init__(self, folder: Path, base: TensorSource) -> None:
        checked = check_model_folder(folder)
        self._adapter, self._base = SafetensorsSource(*checked.weight_files), base
        rank, alpha = checked.config.get("r"), checked.config.get("lora_alpha")
        if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
            raise InputError(f"{shown(folder)}: adapter_config.json has no r and lora_alpha")
        self._scale = alpha / (rank**0.5 if checked.config.get("use_rslora") else rank)
        self._parts: dict[str, dict[str, str]] = {}
        for name in self._adapter.names():
            match = _PART.fullmatch(name)
            target = f"{match[1]}.weight" if match else name
            if match is None or target not in base.names():
                raise InputError(f"{shown(folder)}: '{shown(name)}' is no LoRA part of the base")
            self._parts.setdefault(target, {})[match[2]] = name

    def names(self) -> list[str]:
        """Return the names of the base's tensors."""
        return self._base.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return self._base.shape(name)

    def dtype(self, name: str) -> str:
        """Return the base's encoding, or F32 where the adapter changes it."""
        return "F32" if name in self._parts else self._base.dtype(name)

    def read(self, name: str) -> Array:
        """Return the base's tensor with the adapter's change."""
        weight = self._base.read(name)
        parts = self._parts.get(name)
        if parts is None:
            return weight
        down, up = self._adapter.read(parts["A"]), self._adapter.read(parts["B"])
        if (up.shape[0], down.shape[1]) != weight.shape:
            raise InputError(f"'{shown(name)}': the adapter is for a model of another size")
        return weight + np.float32(self._scale) * (up @ down)
