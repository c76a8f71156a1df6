"""Tensors of a model, one at a time, without torch and without loading the model.

Headers are checked in Python before anything else reads the file. Files are mapped into memory,
so that what is read of a model of any size is one tensor.
"""

import math
import mmap
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from durometer.audit.files import Artefact
from durometer.core.errors import InputError
from durometer.formats.gguf import GgufTensor, check_gguf
from durometer.formats.safetensors import TensorEntry, open_regular, read_header, shown

__all__ = [
    "ArraySource",
    "GgufSource",
    "SafetensorsSource",
    "TensorSource",
    "open_tensors",
]

Array = np.ndarray[Any, Any]


class TensorSource(Protocol):
    """Where an audit reads tensors from: a file, a folder, or arrays in memory."""

    def names(self) -> list[str]:
        """Return the names of all tensors, in the order of the file."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape, in numpy's order."""
        ...

    def dtype(self, name: str) -> str:
        """Return the encoding as the file names it: ``BF16``, ``F32``, ``Q4_0`` ..."""
        ...

    def read(self, name: str) -> Array:
        """Return a tensor as float32, dequantised; a fresh array that the caller may change.

        Raises:
            InputError: there is no way to turn this encoding into numbers.
        """
        ...


class ArraySource:
    """Tensors in memory, for derived variants and tests.

    Args:
        arrays: float arrays by name.
        dtypes: the encoding to report; F32 where none is given.
    """

    def __init__(
        self, arrays: Mapping[str, Array], dtypes: Mapping[str, str] | None = None
    ) -> None:
        self._arrays, self._dtypes = dict(arrays), dict(dtypes or {})

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self._arrays)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return tuple(self._arrays[name].shape)

    def dtype(self, name: str) -> str:
        """Return the declared encoding."""
        return self._dtypes.get(name, "F32")

    def read(self, name: str) -> Array:
        """Return a copy of a tensor as float32."""
        return np.array(self._arrays[name], dtype=np.float32)


class SafetensorsSource:
    """The tensors of one or several safetensors files, whose headers are checked strictly.

    Args:
        paths: the file, or all shards.

    Raises:
        InputError: a header is wrong, or two shards hold the same name.
    """

    def __init__(self, *paths: Path) -> None:
        self._entries: dict[str, TensorEntry] = {}
        self._data: dict[str, mmap.mmap] = {}
        for path in paths:
            entries = read_header(path)
            twice = self._entries.keys() & entries.keys()
            if twice:
                problem = f"holds tensor '{shown(min(twice))}', which another shard holds as well"
                raise InputError(f"{shown(path)}: {problem}; download it again")
            data = _mapped(path)
            self._entries |= entries
            self._data |= dict.fromkeys(entries, data)

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return self._entries[name].shape

    def dtype(self, name: str) -> str:
        """Return a tensor's dtype, such as ``BF16``."""
        return self._entries[name].dtype

    def read(self, name: str) -> Array:
        """Return a tensor as float32."""
        entry = self._entries[name]
        raw = np.frombuffer(self._data[name], np.uint8, entry.byte_count, entry.start)
        values = as_float32(raw, entry.dtype).reshape(entry.shape)
        _forget(self._data[name], entry.start, entry.byte_count)
        return values


class GgufSource:
    """The tensors of a GGUF file, dequantised by the ``gguf`` package after a check of the header.

    Args:
        path: the file; names are the file's own (``blk.0.attn_q.weight``).
        parts: the other files of a split model.

    Attributes:
        header: of ``path``.

    Raises:
        InputError: a header is wrong, or a tensor is in two files.
    """

    def __init__(self, path: Path, *parts: Path) -> None:
        self.header = check_gguf(path)
        self._tensors: dict[str, GgufTensor] = {}
        self._maps: dict[str, mmap.mmap] = {}
        for part in (path, *parts):
            data = _mapped(part)
            for tensor in check_gguf(part).tensors:
                if tensor.name in self._tensors:
                    where = f"tensor '{shown(tensor.name)}'"
                    raise InputError(f"{shown(part)}: {where} is in another file as well")
                self._tensors[tensor.name], self._maps[tensor.name] = tensor, data

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return self._tensors[name].shape

    def dtype(self, name: str) -> str:
        """Return a tensor's encoding, such as ``Q4_0``."""
        return self._tensors[name].type.name

    def read(self, name: str) -> Array:
        """Return a tensor as float32."""
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        tensor = self._tensors[name]
        raw = np.frombuffer(self._maps[name], np.uint8, tensor.byte_count, tensor.start)
        kind = tensor.type
        if kind.name in _GGUF_PLAIN:
            return as_float32(raw, _GGUF_PLAIN[kind.name]).reshape(tensor.shape)
        rows = raw.reshape(math.prod(tensor.shape[:-1]), -1)
        try:
            values = dequantize(rows, GGMLQuantizationType[kind.name])
        except (KeyError, NotImplementedError):
            problem = f"tensor '{shown(name)}': no way to decode {kind.name}"
            raise InputError(f"{problem}; use a file in another encoding") from None
        result = np.array(values, dtype=np.float32).reshape(tensor.shape)
        _forget(self._maps[name], tensor.start, tensor.byte_count)
        return result


_GGUF_PLAIN = {
    "F32": "F32", "F16": "F16", "BF16": "BF16", "F64": "F64",
    "I8": "I8", "I16": "I16", "I32": "I32", "I64": "I64",
}  # fmt: skip
_NUMPY = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4",
    "U64": "<u8", "I64": "<i8", "F16": "<f2", "F32": "<f4", "F64": "<f8",
}  # fmt: skip
# Mantissa bits, bias, and the codes (sign aside) from which there are no numbers.
FLOAT8 = {"F8_E4M3": (3, 7, 0x7F), "F8_E5M2": (2, 15, 0x7D)}


def as_float32(raw: Array, dtype: str) -> Array:
    """Return the bytes ``raw`` of safetensors dtype ``dtype`` as float32, flat.

    Raises:
        InputError: the dtype stands for packed or scaled values.
    """
    if dtype == "BF16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    if dtype in FLOAT8:
        return float8_values(dtype)[raw]
    if dtype == "F8_E8M0":
        powers = np.ldexp(np.float64(1), raw.astype(np.int64) - 127)
        return np.where(raw == 255, np.nan, powers).astype(np.float32)
    if dtype not in _NUMPY:
        raise InputError(f"tensors of dtype {shown(dtype)} cannot be read as numbers")
    with np.errstate(over="ignore"):
        return raw.view(_NUMPY[dtype]).astype(np.float32)


@cache
def float8_values(dtype: str) -> Array:
    """Return the value of each of the 256 codes of an 8-bit float, positive ones first."""
    mantissa_bits, bias, first_nan = FLOAT8[dtype]
    code = np.arange(128)
    mantissa, exponent = code & (1 << mantissa_bits) - 1, code >> mantissa_bits
    fraction = mantissa / (1 << mantissa_bits)
    values = np.where(
        exponent == 0, fraction * 2.0 ** (1 - bias), (1 + fraction) * 2.0 ** (exponent - bias)
    )
    values[first_nan:] = np.nan
    if dtype == "F8_E5M2":  # E5M2 keeps IEEE infinities
        values[0x7C] = np.inf
    both = np.concatenate([values, -values]).astype(np.float32)
    both.flags.writeable = False
    return both


def _mapped(path: Path) -> mmap.mmap:
    with open_regular(path) as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _forget(data: mmap.mmap, start: int, count: int) -> None:
    """Take the pages of a tensor out of the process's memory again, where the system can."""
    if hasattr(mmap, "MADV_DONTNEED"):
        first = start - start % mmap.PAGESIZE
        data.madvise(mmap.MADV_DONTNEED, first, count + start - first)


def open_tensors(artefact: Artefact) -> TensorSource:
    """Return the tensors of a model folder, a safetensors file or a GGUF file with its parts.

    Settings are not read: whether a loader would take other files is for other checks to say.

    Raises:
        InputError: there are no weights that can be read without running code, or several sets.
    """
    files = artefact.files
    for name in ("model.safetensors.index.json", "diffusion_pytorch_model.safetensors.index.json"):
        mapping = (artefact.json(name) or {}).get("weight_map") if name in files else None
        shards = set(map(str, mapping.values())) if isinstance(mapping, dict) else set()
        files = {shard: file for shard, file in files.items() if shard in shards} or files
    safe = [file.path for file in files.values() if file.name.endswith(".safetensors")]
    single = [
        each for each in safe if each.name in ("model.safetensors", "adapter_model.safetensors")
    ]
    gguf = [file.path for file in files.values() if file.kind == "gguf"]
    if single or safe:
        return SafetensorsSource(*(single[:1] or safe))
    if not gguf:
        raise InputError(f"{shown(artefact.root)}: no weights that can be read as numbers")
    return GgufSource(*gguf)
