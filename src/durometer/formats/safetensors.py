"""Strict reader of safetensors headers, in plain Python.

The reference library accepts duplicate tensor names, unknown fields and odd names; two readers
of one file may then see two models. Here anything of that kind is refused, before compiled code
sees the file. Layout: 8 bytes little-endian header length, a JSON object, then the tensor data
(https://huggingface.co/docs/safetensors, section "Format").
"""

import json
import mmap
import os
import re
import stat
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from durometer.core.errors import InputError, UnsafeInputError

__all__ = [
    "DTYPE_BITS",
    "MAX_HEADER_BYTES",
    "TensorEntry",
    "iter_tensor_bytes",
    "read_header",
    "read_metadata",
]

MAX_HEADER_BYTES = 100_000_000
"""Largest header accepted, in bytes; the limit of the reference library."""

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
"""Bits an element of every dtype that safetensors 0.8 knows."""

# A tensor's entry holds eight of the characters "{", "[" and ",": room for 250,000 tensors, and a
# bound on the time and memory that a header of nothing but brackets could claim.
_MAX_STRUCTURE = 2_000_000
_MAX_NAME_CHARACTERS = 1024
_MAX_RANK = 64  # numpy's limit
_MAX_ELEMENTS = 2**63 - 1  # what torch can count
_FIELDS = {"dtype", "shape", "data_offsets"}
_DAMAGED = "download or export it again"

_SIGNATURES: tuple[tuple[bytes, str, bool], ...] = (
    (rb"PK(\x03\x04|\x05\x06)", "a zip archive, such as torch.save writes around a pickle", True),
    (rb"\x80[\x02-\x05]", "a pickle", True),
    (rb"c[\w.]+\n[\w.]+\n|[(][dlcit]|[]}][q(.]", "a pickle of protocol 0 or 1", True),
    (rb"version https://git-lfs", "a Git LFS pointer (run: git lfs pull)", False),
    (rb"GGUF", "a GGUF file", False),
    (rb"\x89HDF\r\n", "an HDF5 file", False),
    (rb"\x1f\x8b|\x28\xb5\x2f\xfd|BZh|\xfd7zXZ", "a compressed file", False),
    (rb"\x7fELF|MZ", "a program", True),
    (rb"\s*<", "a web page or XML", False),
    (rb"\x00+$", "nothing but zero bytes (an unfinished download)", False),
)


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a safetensors file; ``start`` and ``end`` are byte offsets in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def byte_count(self) -> int:
        """Bytes that the tensor's data takes."""
        return self.end - self.start


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Return the tensors of the safetensors file ``path`` by name, in the order of their data.

    The data itself is not read. Raises InputError for anything that the format does not allow or
    that readers could understand in two ways, UnsafeInputError for a pickle in disguise.
    """
    header, data_start, size = _json_header(path)
    _check_metadata(path, header.pop("__metadata__", {}))
    entries = [_entry(path, name, fields, data_start) for name, fields in header.items()]
    entries.sort(key=lambda entry: (entry.start, entry.end))
    _check_tiling(path, entries, data_start, size)
    return {entry.name: entry for entry in entries}


def read_metadata(path: Path) -> dict[str, str]:
    """Return the free metadata in the header of ``path``; InputError like ``read_header``."""
    metadata: dict[str, str] = _json_header(path)[0].get("__metadata__", {})
    _check_metadata(path, metadata)
    return metadata


def _json_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """Return the header, the byte offset of the data and the size of the file in bytes."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        raw = _header_bytes(path, file, size)
    return parse_json_object(raw, f"{shown(path)}: the header"), 8 + len(raw), size


def iter_tensor_bytes(path: Path, chunk: int = 1 << 24) -> Iterator[tuple[TensorEntry, memoryview]]:
    """Yield every tensor's data in read-only pieces of at most ``chunk`` bytes, in file order.

    A tensor without elements yields one empty piece, so that every tensor turns up. The pieces
    are views of a memory map: a file that another process cuts short meanwhile kills this one
    (SIGBUS). Raises InputError like ``read_header``.
    """
    entries = read_header(path)
    with open_regular(path) as file:
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    if entries and len(data) < max(entry.end for entry in entries.values()):
        raise _refused(path, "it shrank while it was read", "wait until it is complete")
    for entry in entries.values():
        for at in range(entry.start, max(entry.end, entry.start + 1), chunk):
            yield entry, data[at : min(at + chunk, entry.end)]


def shown(text: object, limit: int = 300) -> str:
    """Return ``text`` for an error line: what a terminal could act on is escaped, length bounded.

    Names come from untrusted files and may hold control sequences or bidirectional marks.
    """
    plain = str(text)
    safe = plain if plain.isprintable() else ascii(plain)[1:-1]
    return safe if len(safe) <= limit else f"{safe[:limit]}..."


def open_regular(path: Path) -> BinaryIO:
    """Open ``path`` for reading; raise InputError unless it is a readable, regular file."""
    try:
        # Asked before opening: opening a pipe would wait for ever.
        if not stat.S_ISREG(path.stat().st_mode):
            raise InputError(f"{shown(path)}: not a file; name a regular file")
        return path.open("rb")
    except FileNotFoundError:
        raise InputError(f"{shown(path)}: no such file; check the path") from None
    except (OSError, ValueError, RuntimeError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{shown(path)}: cannot be read ({shown(reason)})") from None


def describe_content(head: bytes) -> tuple[str, bool]:
    """Return what a file that starts with ``head`` looks like ("" if unknown), and if it is code.

    Only a hint for the error message: nothing is decided by it but the kind of refusal.
    """
    for pattern, name, carries_code in _SIGNATURES:
        if re.match(pattern, head):
            return name, carries_code
    return "", False


def parse_json_object(raw: bytes, what: str) -> dict[str, Any]:
    """Return the JSON object in ``raw``; ``what`` names file and part in the InputError.

    Refuses bytes that are not UTF-8, duplicate keys at any depth, and nesting beyond the stack.
    """
    try:
        value = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_without_duplicates, parse_int=_integer
        )
    except UnicodeDecodeError as error:
        raise InputError(f"{what} is not UTF-8 (byte {error.start}); {_DAMAGED}") from None
    except _DuplicateKeyError as error:
        raise InputError(f"{what} names the key '{error}' twice; {_DAMAGED}") from None
    except RecursionError:
        raise InputError(f"{what} is nested too deeply; {_DAMAGED}") from None
    except ValueError as error:
        raise InputError(f"{what} is not valid JSON ({shown(error)}); {_DAMAGED}") from None
    if not isinstance(value, dict):
        raise InputError(f"{what} is not a JSON object; {_DAMAGED}")
    return value


def nested_items(value: object) -> Iterator[tuple[str, Any]]:
    """Yield every key and its value at any depth, without recursion."""
    stack = [value]
    while stack:
        node = stack.pop()
        if isinstance(node, dict):
            yield from node.items()
            stack.extend(node.values())
        elif isinstance(node, list):
            stack.extend(node)


class _DuplicateKeyError(Exception):
    """A JSON object names the same key twice."""


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise _DuplicateKeyError(shown(twice))
    return result


def _integer(text: str) -> int:
    # "-0" is a number for Python and none for other readers: keep it recognisable as negative.
    return -1 if text == "-0" else int(text)


def _refused(path: Path, problem: str, advice: str = _DAMAGED) -> InputError:
    return InputError(f"{shown(path)}: {problem}; {advice}")


def _header_bytes(path: Path, file: BinaryIO, size: int) -> bytes:
    """Return the header's JSON text; ``file`` stands at its start."""
    head = file.read(64)
    if size < 8:
        raise _not_safetensors(path, head, f"only {size} bytes long, too short for a header")
    (length,) = struct.unpack("<Q", head[:8])
    if length > MAX_HEADER_BYTES:
        problem = f"header length {length} is over the limit of {MAX_HEADER_BYTES} bytes"
        raise _not_safetensors(path, head, problem)
    if 8 + length > size:
        missing = 8 + length - size
        problem = f"header length {length} is beyond the end of the file ({missing} bytes missing)"
        raise _not_safetensors(path, head, problem)
    if head[8:9] != b"{" or not length:
        raise _not_safetensors(path, head, "the header does not begin with '{'")
    file.seek(8)
    raw = file.read(length)
    if sum(raw.count(mark) for mark in (b"{", b"[", b",")) > _MAX_STRUCTURE:
        raise _refused(path, "the header holds more entries than any model")
    return raw


def _not_safetensors(path: Path, head: bytes, problem: str) -> InputError:
    """Return the error for a file that is no safetensors file, with what it looks like instead."""
    name, carries_code = describe_content(head)
    if carries_code:
        text = f"not a safetensors file: it looks like {name}, which can run code when loaded"
        advice = "get the model in safetensors format, or convert it on an isolated machine"
        return UnsafeInputError(f"{shown(path)}: {text}; {advice}")
    if name:
        return _refused(path, f"not a safetensors file: it looks like {name}")
    return _refused(path, problem)


def _check_metadata(path: Path, metadata: object) -> None:
    if not isinstance(metadata, dict):
        raise _refused(path, "__metadata__ is not a JSON object")
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise _refused(path, f"__metadata__ '{shown(key)}' is not a string")


def _entry(path: Path, name: str, fields: object, data_start: int) -> TensorEntry:
    """Return the checked entry of one tensor; only the whole file's tiling is left to check."""
    where = f"tensor '{shown(name)}'"
    if not name or not name.isprintable() or len(name) > _MAX_NAME_CHARACTERS:
        raise _refused(path, f"{where} has an empty, overlong or unprintable name")
    if not isinstance(fields, dict):
        raise _refused(path, f"{where} is not a JSON object")
    if fields.keys() != _FIELDS:
        wrong = ", ".join(sorted(shown(key) for key in fields.keys() ^ _FIELDS)[:5])
        raise _refused(path, f"{where} has missing or unknown fields ({wrong})")
    dtype = fields["dtype"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        advice = f"convert it to one of {', '.join(sorted(DTYPE_BITS))}"
        raise _refused(path, f"{where} has the unknown dtype '{shown(dtype)}'", advice)
    shape = _counts(path, f"{where}: shape", fields["shape"], _MAX_RANK)
    offsets = _counts(path, f"{where}: data_offsets", fields["data_offsets"], 2)
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _refused(path, f"{where}: data_offsets {shown(offsets)} are not [start, end]")
    _check_size(path, where, dtype, shape, offsets[1] - offsets[0])
    return TensorEntry(name, dtype, shape, data_start + offsets[0], data_start + offsets[1])


def _counts(path: Path, what: str, value: object, limit: int) -> tuple[int, ...]:
    """Return ``value`` as a tuple if it is a list of at most ``limit`` non-negative integers."""
    if not isinstance(value, list) or len(value) > limit:
        raise _refused(path, f"{what} is not a list of at most {limit} integers")
    for number in value:
        if type(number) is not int or not 0 <= number <= _MAX_ELEMENTS:
            raise _refused(path, f"{what} holds {shown(number)}, not an integer from 0 to 2^63-1")
    return tuple(value)


def _check_size(path: Path, where: str, dtype: str, shape: tuple[int, ...], found: int) -> None:
    """Check that ``found`` bytes hold exactly ``shape`` elements of ``dtype``."""
    elements = 1
    for dimension in shape:
        # Empty dimensions count as 1: torch multiplies the others for its strides all the same.
        elements *= max(dimension, 1)
        if elements > _MAX_ELEMENTS:
            raise _refused(path, f"{where}: shape {shown(shape)} overflows 2^63-1 elements")
    bits = (0 if 0 in shape else elements) * DTYPE_BITS[dtype]
    if bits % 8 or found != bits // 8:
        needed = f"{dtype} of shape {shown(list(shape))} takes {bits / 8:.15g} bytes"
        raise _refused(path, f"{where}: {needed}, but data_offsets give {found}")


def _check_tiling(path: Path, entries: list[TensorEntry], data_start: int, size: int) -> None:
    """Check that the sorted ``entries`` cover the file from ``data_start`` to its end, once."""
    end = data_start
    for entry in entries:
        where = f"tensor '{shown(entry.name)}'"
        if entry.start < end:
            raise _refused(path, f"{where} overlaps another tensor by {end - entry.start} bytes")
        if entry.start > end:
            raise _refused(path, f"a hole of {entry.start - end} bytes before {where}")
        end = entry.end
    if end > size:
        raise _refused(path, f"the file is cut short, {end - size} bytes are missing")
    if end < size:
        raise _refused(path, f"{size - end} trailing bytes after the last tensor")
