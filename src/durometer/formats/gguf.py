"""Strict check of GGUF files, in plain Python, before a library parses them.

Parsers of GGUF have trusted the header's counts and lengths (CVE-2025-53630, CVE-2026-27940,
CVE-2026-7482); the Python library builds an object for every array element. Here every count is
held against the bytes that are left and against a fixed bound first. Format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

import math
import mmap
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from durometer.core.errors import InputError, UnsafeInputError
from durometer.formats.safetensors import describe_content, open_regular, shown

__all__ = [
    "GGML_TYPES",
    "GgmlType",
    "GgufArray",
    "GgufHeader",
    "GgufTensor",
    "GgufValue",
    "check_gguf",
    "read_array",
]

MAX_KEYS = 65_536
"""Most metadata keys accepted in a file."""

MAX_TENSORS = 131_072
"""Most tensors accepted in a file."""

MAX_ELEMENTS = 4_000_000
"""Most array elements accepted in a file, all arrays together: three times a large tokenizer's."""

MAX_STRING_BYTES = 64 << 20
"""Most bytes accepted in names and metadata strings, all together."""

MAX_NESTING = 4
"""Deepest arrays of arrays accepted."""

_MAX_KEY_BYTES = 65_535  # the specification's limits
_MAX_NAME_BYTES = 64
_MAX_DIMENSIONS = 4
_SMALLEST_ENTRY = 8 + 1 + 4 + 1  # key, type and value of a metadata entry, in bytes
_SMALLEST_TENSOR = 8 + 1 + 4 + 8 + 4 + 8
_DAMAGED = "download or convert it again"

_SCALARS = {
    0: ("uint8", "<B"), 1: ("int8", "<b"), 2: ("uint16", "<H"), 3: ("int16", "<h"),
    4: ("uint32", "<I"), 5: ("int32", "<i"), 6: ("float32", "<f"), 7: ("bool", "<B"),
    10: ("uint64", "<Q"), 11: ("int64", "<q"), 12: ("float64", "<d"),
}  # fmt: skip
_UINT32, _BOOL, _STRING, _ARRAY = 4, 7, 8, 9


@dataclass(frozen=True, slots=True)
class GgmlType:
    """A tensor encoding: ``block`` elements are stored together in ``size`` bytes."""

    name: str
    block: int
    size: int


GGML_TYPES = {
    number: GgmlType(name, block, size)
    for number, name, block, size in (
        (0, "F32", 1, 4), (1, "F16", 1, 2), (2, "Q4_0", 32, 18), (3, "Q4_1", 32, 20),
        (6, "Q5_0", 32, 22), (7, "Q5_1", 32, 24), (8, "Q8_0", 32, 34), (9, "Q8_1", 32, 40),
        (10, "Q2_K", 256, 84), (11, "Q3_K", 256, 110), (12, "Q4_K", 256, 144),
        (13, "Q5_K", 256, 176), (14, "Q6_K", 256, 210), (15, "Q8_K", 256, 292),
        (16, "IQ2_XXS", 256, 66), (17, "IQ2_XS", 256, 74), (18, "IQ3_XXS", 256, 98),
        (19, "IQ1_S", 256, 50), (20, "IQ4_NL", 32, 18), (21, "IQ3_S", 256, 110),
        (22, "IQ2_S", 256, 82), (23, "IQ4_XS", 256, 136), (24, "I8", 1, 1), (25, "I16", 1, 2),
        (26, "I32", 1, 4), (27, "I64", 1, 8), (28, "F64", 1, 8), (29, "IQ1_M", 256, 56),
        (30, "BF16", 1, 2), (34, "TQ1_0", 256, 54), (35, "TQ2_0", 256, 66),
        (39, "MXFP4", 32, 17), (40, "NVFP4", 64, 36), (41, "Q1_0", 128, 18),
    )
}  # fmt: skip
"""The tensor encodings in use, by their number in the file; removed ones are left out."""


@dataclass(frozen=True, slots=True)
class GgufArray:
    """An array in the metadata; ``start`` is the byte offset of its first element."""

    item_type: str
    length: int
    start: int = field(default=0, compare=False)


GgufValue = int | float | bool | str | GgufArray


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor: ``shape`` in numpy's order (the file's reversed), ``start`` in file bytes."""

    name: str
    type: GgmlType
    shape: tuple[int, ...]
    start: int
    byte_count: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What a checked GGUF file declares; ``data_start`` is the tensor data's offset in bytes."""

    version: int
    metadata: dict[str, GgufValue]
    tensors: tuple[GgufTensor, ...]
    alignment: int
    data_start: int

    @property
    def tensor_count(self) -> int:
        """Number of tensors in the file."""
        return len(self.tensors)


def check_gguf(path: Path) -> GgufHeader:
    """Return the header of the GGUF file ``path`` after checking all of it, tensor data excepted.

    Time and memory are bounded by the limits of this module, whatever the file declares. Raises
    InputError naming the first field that is wrong, UnsafeInputError for a pickle in disguise.
    """
    with open_regular(path) as file:
        head = file.read(64)
        if head[:4] != b"GGUF":
            raise _not_gguf(path, head)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _header(_Walk(path, data, at=4))


def read_array(path: Path, array: GgufArray) -> list[Any]:
    """Return the elements of a flat metadata array of the GGUF file that was checked.

    Raises:
        InputError: an array of arrays.
    """
    with open_regular(path) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        walk = _Walk(path, data, at=array.start)
        if array.item_type == "string":
            return [walk.string("array element") for _ in range(array.length)]
        codes = dict(_SCALARS.values())
        if array.item_type not in codes:
            raise walk.refused("an array of arrays cannot be read")
        code = codes[array.item_type]
        return list(struct.unpack_from(f"<{array.length}{code[1]}", data, array.start))


@dataclass(slots=True)
class _Walk:
    """A position in the file, what may still be spent, and the only functions that read."""

    path: Path
    data: mmap.mmap
    at: int
    elements_left: int = MAX_ELEMENTS
    string_bytes_left: int = MAX_STRING_BYTES

    @property
    def left(self) -> int:
        """Bytes between the position and the end of the file."""
        return len(self.data) - self.at

    def refused(self, problem: str, advice: str = _DAMAGED) -> InputError:
        """Return the error that names the file."""
        return InputError(f"{shown(self.path)}: {problem}; {advice}")

    def skip(self, count: int, what: str) -> int:
        """Step over ``count`` bytes and return where they start."""
        if count > self.left:
            missing = count - self.left
            raise self.refused(f"{what} is beyond the end of the file ({missing} bytes missing)")
        self.at += count
        return self.at - count

    def integer(self, code: str, what: str) -> int:
        """Read one integer of the struct format ``code``."""
        start = self.skip(struct.calcsize(code), what)
        value: int = struct.unpack_from(code, self.data, start)[0]
        return value

    def count(self, what: str, limit: int, smallest: int) -> int:
        """Read a count of things that take at least ``smallest`` bytes each."""
        value = self.integer("<Q", what)
        self.check_count(value, what, limit, smallest)
        return value

    def check_count(self, value: int, what: str, limit: int, smallest: int) -> None:
        """Check that ``value`` things are within ``limit`` and can fit into the rest."""
        if value > limit:
            raise self.refused(f"{what} {value} is over the limit of {limit}")
        if value * smallest > self.left:
            raise self.refused(f"{what} {value} cannot fit into the {self.left} bytes left")

    def string(self, what: str, limit: int = MAX_STRING_BYTES) -> str:
        """Read a string of at most ``limit`` bytes, paid for out of ``string_bytes_left``."""
        length = self.integer("<Q", f"{what}: length")
        limit = min(limit, self.string_bytes_left)
        if length > limit:
            raise self.refused(f"{what}: length {length} is over the limit of {limit} bytes")
        self.string_bytes_left -= length
        start = self.skip(length, f"{what}: text")
        try:
            return self.data[start : self.at].decode("utf-8")
        except UnicodeDecodeError:
            raise self.refused(f"{what} is not UTF-8") from None

    def name(self, what: str, limit: int) -> str:
        """Read the name of a key or a tensor: short, printable, not empty."""
        value = self.string(f"{what}: name", limit)
        if not value or not value.isprintable():
            raise self.refused(f"{what}: name '{shown(value)}' is empty or unprintable")
        return value


def _not_gguf(path: Path, head: bytes) -> InputError:
    """Return the error for a file that lacks the magic bytes, with what it looks like instead."""
    name, carries_code = describe_content(head)
    looks = f"it looks like {name}" if name else f"it starts with {head[:4]!r}, not b'GGUF'"
    text = f"{shown(path)}: not a GGUF file: {looks}"
    if carries_code:
        return UnsafeInputError(f"{text}, which can run code; get the model as GGUF or safetensors")
    return InputError(f"{text}; download it again, or name the right file")


def _header(walk: _Walk) -> GgufHeader:
    version = _version(walk)
    tensor_count = walk.count("tensor count", MAX_TENSORS, _SMALLEST_TENSOR)
    key_count = walk.count("metadata count", MAX_KEYS, _SMALLEST_ENTRY)
    metadata = _metadata(walk, key_count)
    infos = [_tensor_info(walk, number) for number in range(tensor_count)]
    alignment = _alignment(walk, metadata)
    data_start = math.ceil(walk.at / alignment) * alignment
    tensors = _placed(walk, infos, data_start, alignment)
    return GgufHeader(version, metadata, tensors, alignment, data_start)


def _version(walk: _Walk) -> int:
    version = walk.integer("<I", "version")
    if version and version & 0xFFFF == 0:
        raise walk.refused("it is big-endian", "convert it with gguf-convert-endian")
    if version not in (2, 3):
        raise walk.refused(f"version {version} is not 2 or 3", "convert the model again")
    return version


def _metadata(walk: _Walk, count: int) -> dict[str, GgufValue]:
    metadata: dict[str, GgufValue] = {}
    for number in range(count):
        key = walk.name(f"metadata key {number}", _MAX_KEY_BYTES)
        if key in metadata:
            raise walk.refused(f"metadata key '{shown(key)}' occurs twice")
        if key.startswith("GGUF."):  # the gguf library keeps its own fields under these names
            raise walk.refused(f"metadata key '{shown(key)}' is reserved")
        what = f"metadata '{shown(key)}'"
        kind = walk.integer("<I", f"{what}: type")
        if key == "general.alignment" and kind != _UINT32:
            raise walk.refused(f"{what}: value type {kind}, not uint32")
        metadata[key] = _value(walk, kind, what)
    return metadata


def _value(walk: _Walk, kind: int, what: str) -> GgufValue:
    if kind == _STRING:
        return walk.string(what)
    if kind == _ARRAY:
        return _array(walk, what, depth=1)
    if kind not in _SCALARS:
        raise walk.refused(f"{what}: unknown value type {kind}")
    code = _SCALARS[kind][1]
    start = walk.skip(struct.calcsize(code), what)
    value: int | float = struct.unpack_from(code, walk.data, start)[0]
    if kind != _BOOL:
        return value
    if value not in (0, 1):
        raise walk.refused(f"{what}: a bool of {value}, not 0 or 1")
    return bool(value)


def _array(walk: _Walk, what: str, depth: int) -> GgufArray:
    """Step over an array: at once where elements have one size, else element by element."""
    if depth > MAX_NESTING:
        raise walk.refused(f"{what}: arrays nested over {MAX_NESTING} deep")
    kind = walk.integer("<I", f"{what}: element type")
    length = walk.integer("<Q", f"{what}: array length")
    smallest = {_STRING: 8, _ARRAY: 12}.get(kind, 1)
    walk.check_count(length, f"{what}: array length", walk.elements_left, smallest)
    walk.elements_left -= length
    start = walk.at
    if kind == _STRING:
        element = f"{what}: element"
        for _ in range(length):
            walk.string(element)
        return GgufArray("string", length, start)
    if kind == _ARRAY:
        for _ in range(length):
            _array(walk, what, depth + 1)
        return GgufArray("array", length, start)
    if kind not in _SCALARS:
        raise walk.refused(f"{what}: unknown element type {kind}")
    name, code = _SCALARS[kind]
    walk.skip(length * struct.calcsize(code), what)
    return GgufArray(name, length, start)


def _alignment(walk: _Walk, metadata: dict[str, GgufValue]) -> int:
    """Return the alignment of the tensor data in bytes, 32 unless the metadata says otherwise."""
    value = metadata.get("general.alignment", 32)
    if type(value) is not int or value < 1 or value & (value - 1):
        raise walk.refused(f"general.alignment {shown(value)} is not a power of two")
    return value


@dataclass(frozen=True, slots=True)
class _TensorInfo:
    """A tensor as declared: its offset counts from the start of the tensor data."""

    name: str
    type: GgmlType
    shape: tuple[int, ...]
    byte_count: int
    offset: int


def _tensor_info(walk: _Walk, number: int) -> _TensorInfo:
    name = walk.name(f"tensor {number}", _MAX_NAME_BYTES)
    what = f"tensor '{shown(name)}'"
    rank = walk.integer("<I", f"{what}: number of dimensions")
    if not 1 <= rank <= _MAX_DIMENSIONS:
        raise walk.refused(f"{what}: {rank} dimensions, not 1 to {_MAX_DIMENSIONS}")
    dimensions = [walk.integer("<Q", f"{what}: dimension") for _ in range(rank)]
    type_number = walk.integer("<I", f"{what}: type")
    if type_number not in GGML_TYPES:
        raise walk.refused(f"{what}: unknown or removed type {type_number}", "convert it again")
    kind = GGML_TYPES[type_number]
    byte_count = _byte_count(walk, what, kind, dimensions)
    offset = walk.integer("<Q", f"{what}: offset")
    return _TensorInfo(name, kind, tuple(reversed(dimensions)), byte_count, offset)


def _byte_count(walk: _Walk, what: str, kind: GgmlType, dimensions: list[int]) -> int:
    if 0 in dimensions:
        raise walk.refused(f"{what}: a dimension of 0 in {dimensions}")
    row = dimensions[0]
    if row % kind.block:
        raise walk.refused(f"{what}: rows of {row} are no multiple of {kind.name}'s {kind.block}")
    return math.prod(dimensions) // kind.block * kind.size


def _placed(
    walk: _Walk, infos: list[_TensorInfo], data_start: int, alignment: int
) -> tuple[GgufTensor, ...]:
    """Return the tensors in the file's order, once names and places are found to be sound."""
    seen: set[str] = set()
    for info in infos:
        if info.name in seen:
            raise walk.refused(f"tensor '{shown(info.name)}' occurs twice")
        seen.add(info.name)
    _check_tiling(walk, infos, data_start, alignment)
    return tuple(
        GgufTensor(info.name, info.type, info.shape, data_start + info.offset, info.byte_count)
        for info in infos
    )


def _check_tiling(walk: _Walk, infos: list[_TensorInfo], data_start: int, alignment: int) -> None:
    """Check that the tensors fill the file to its end, with nothing but padding between them.

    llama.cpp demands the same; a hole or a tail could hide a second file.
    """
    end = 0
    for info in sorted(infos, key=lambda info: info.offset):
        what = f"tensor '{shown(info.name)}'"
        if info.offset % alignment:
            raise walk.refused(f"{what}: offset {info.offset} is not aligned to {alignment}")
        if info.offset < end:
            raise walk.refused(f"{what} overlaps another by {end - info.offset} bytes")
        if info.offset - end >= alignment:
            raise walk.refused(f"a hole of {info.offset - end} bytes before {what}")
        end = info.offset + info.byte_count
    size = len(walk.data)
    if infos and data_start + end > size:
        missing = data_start + end - size
        raise walk.refused(f"the file is cut short, {missing} bytes of tensor data are missing")
    if size - (data_start + end) >= alignment:
        raise walk.refused(f"{size - data_start - end} trailing bytes after the last tensor")
