"""What a pickle would import and call, read off its opcodes; nothing is ever unpickled.

The judgement is an allow-list: a name is harmless only if it is on ``ALLOWED``, and whatever cannot
be resolved or parsed counts against the file, since an unpickler runs what comes before the damage.
Lists of forbidden names were never complete (arXiv 2508.19774). Opcodes:
https://github.com/python/cpython/blob/main/Lib/pickletools.py.
"""

import pickletools
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from durometer.formats.safetensors import open_regular, shown

__all__ = ["ALLOWED", "PickleFacts", "ZipFacts", "read_zip", "walk_file", "walk_stream"]

_TORCH_TYPES = (
    "Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool",
    "ComplexFloat", "ComplexDouble", "QInt8", "QUInt8", "QInt32",
)  # fmt: skip
_TORCH_DTYPES = (
    "float16", "float32", "float64", "bfloat16", "int8", "int16", "int32", "int64", "uint8", "bool",
    "float8_e4m3fn", "float8_e5m2", "complex64", "complex128",
)  # fmt: skip

ALLOWED = frozenset(
    {
        *(f"torch.{name}Storage" for name in _TORCH_TYPES),
        *(f"torch.{name}" for name in _TORCH_DTYPES),
        "torch._utils._rebuild_tensor",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_tensor_v3",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_sparse_tensor",
        "torch._utils._rebuild_qtensor",
        "torch.storage.UntypedStorage",
        "torch.storage.TypedStorage",
        "torch.Tensor",
        "torch.Size",
        "torch.device",
        "torch.nn.parameter.Parameter",
        "torch.per_tensor_affine",
        "torch.per_channel_affine",
        "collections.OrderedDict",
        "_codecs.encode",
        "numpy.dtype",
        "numpy.ndarray",
        "numpy.core.multiarray._reconstruct",
        "numpy._core.multiarray._reconstruct",
        "numpy.core.numeric._frombuffer",
        "numpy._core.numeric._frombuffer",
        "numpy.core.multiarray.scalar",
        "numpy._core.multiarray.scalar",
        "builtins.set",
        "builtins.frozenset",
        "builtins.bytearray",
        "builtins.complex",
        "__builtin__.set",
        "__builtin__.frozenset",
        "__builtin__.bytearray",
        "__builtin__.complex",
    }
)
"""What tensors are made of: names whose import and call cannot do anything else."""

MAX_OPERATIONS = 2_000_000
"""Most opcodes walked in one pickle; a state dict of a thousand tensors has some 30,000."""

MAX_ARGUMENT = 16 << 20
"""Most bytes of one string that are read into memory; longer ``bytes`` are stepped over."""

MAX_MEMBERS = 100_000
"""Most members looked at in a zip archive."""

_TORCH_MAGIC = 0x1950A86A20F9469CFC6C  # torch.save before zip: four more pickles, then raw data
_LEGACY_PICKLES = 5
_CODECS = {"latin1", "latin-1"}


@dataclass(frozen=True, slots=True)
class Named:
    """A name that a pickle imports, at a byte position; ``called`` is how, empty if it is not."""

    name: str
    position: int
    called: str = ""


@dataclass(slots=True)
class PickleFacts:
    """What one stream of pickles holds.

    Attributes:
        imports: every imported name.
        unlisted: those that are not on the allow-list, or are used in a way that it does not cover.
        damage: why the stream is not a plain pickle, or pickles, from start to end.
        stopped: whether at least one pickle came to its end.
        end: byte position after what was parsed.
        calls: how often something is called.
    """

    imports: list[Named] = field(default_factory=list)
    unlisted: list[Named] = field(default_factory=list)
    damage: list[str] = field(default_factory=list)
    stopped: bool = False
    end: int = 0
    calls: int = 0

    @property
    def plausible(self) -> bool:
        """Whether an unpickler would do anything with it: a call, or an import and a proper end."""
        return self.calls > 0 or (self.stopped and (bool(self.imports) or not self.damage))


class _MalformedError(ValueError):
    """An opcode asks for what is not there."""


@dataclass(frozen=True, slots=True)
class _Global:
    name: str
    position: int


@dataclass(frozen=True, slots=True)
class _Made:
    """Something that a call made."""


_MARK, _OTHER = object(), object()
_Value = Any  # str, int, tuple, _Global, _Made, _MARK or _OTHER


class _Skipped:
    """The place of a long ``bytes`` argument: its length is all that is asked for."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length


class _Bounded:
    """A stream as ``pickletools`` reads it, of which no read takes more than ``MAX_ARGUMENT``."""

    def __init__(self, stream: IO[bytes], size: int) -> None:
        self._stream, self._size, self._at = stream, size, stream.tell()

    def tell(self) -> int:
        return self._at

    def read(self, count: int) -> Any:
        if count > self._size - self._at:
            raise _MalformedError(f"{count} bytes asked for, {self._size - self._at} left")
        if count > MAX_ARGUMENT:
            self._stream.seek(self._at + count)
            self._at += count
            return _Skipped(count)
        data = self._stream.read(count)
        self._at += len(data)
        return data

    def readline(self) -> bytes:
        line = self._stream.readline(MAX_ARGUMENT)
        self._at += len(line)
        return line


class _Walk:
    """The stack and the memo of an unpickler, holding names instead of things."""

    def __init__(self, facts: PickleFacts) -> None:
        self.facts = facts
        self.stack: list[_Value] = []
        self.memo: dict[int, _Value] = {}

    def pop(self) -> _Value:
        if not self.stack or self.stack[-1] is _MARK:
            raise _MalformedError("the stack is empty where a value is needed")
        return self.stack.pop()

    def pop_to_mark(self) -> list[_Value]:
        for at in range(len(self.stack) - 1, -1, -1):
            if self.stack[at] is _MARK:
                values = self.stack[at + 1 :]
                del self.stack[at:]
                return values
        raise _MalformedError("no mark on the stack")

    def name(self, name: str, position: int) -> _Global:
        self.facts.imports.append(Named(name, position))
        if name not in ALLOWED:
            self.facts.unlisted.append(Named(name, position))
        return _Global(name, position)

    def call(self, target: _Value, arguments: _Value, how: str, position: int) -> _Made:
        self.facts.calls += 1
        if not isinstance(target, _Global):
            # The result of a call, or data: neither can be called by a pickle of tensors.
            self.facts.unlisted.append(Named("(not a plain name)", position, how))
        elif target.name not in ALLOWED or not _fit(target.name, arguments):
            self.facts.unlisted.append(Named(target.name, position, how))
        return _Made()

    def step(self, opcode: Any, argument: Any, position: int) -> None:
        """Do to the stack what ``opcode`` does."""
        special = getattr(self, f"_do_{opcode.name.lower()}", None)
        if special is not None:
            special(argument, position)
            return
        before, after = opcode.stack_before, opcode.stack_after
        if pickletools.markobject in before:
            items = self.pop_to_mark()
            for _ in range(before.index(pickletools.markobject)):
                self.pop()
            made: _Value = tuple(items) if opcode.name == "TUPLE" else _OTHER
        else:
            taken = [self.pop() for _ in before][::-1]
            made = tuple(taken) if opcode.name.startswith("TUPLE") else _OTHER
        if not before and isinstance(argument, str | int):
            made = argument
        self.stack.extend([made] * len(after))

    def _do_mark(self, argument: Any, position: int) -> None:
        self.stack.append(_MARK)

    def _do_pop(self, argument: Any, position: int) -> None:
        if not self.stack:
            raise _MalformedError("the stack is empty where a value is needed")
        self.stack.pop()

    def _do_pop_mark(self, argument: Any, position: int) -> None:
        self.pop_to_mark()

    def _do_dup(self, argument: Any, position: int) -> None:
        value = self.pop()
        self.stack += [value, value]

    def _do_put(self, argument: Any, position: int) -> None:
        value = self.pop()
        self.memo[argument] = value
        self.stack.append(value)

    _do_binput = _do_long_binput = _do_put

    def _do_memoize(self, argument: Any, position: int) -> None:
        self._do_put(len(self.memo), position)

    def _do_get(self, argument: Any, position: int) -> None:
        if argument not in self.memo:
            raise _MalformedError(f"memo entry {argument} was never stored")
        self.stack.append(self.memo[argument])

    _do_binget = _do_long_binget = _do_get

    def _do_global(self, argument: Any, position: int) -> None:
        self.stack.append(self.name(argument.replace(" ", ".", 1), position))

    def _do_stack_global(self, argument: Any, position: int) -> None:
        name, module = self.pop(), self.pop()
        if isinstance(name, str) and isinstance(module, str):
            self.stack.append(self.name(f"{module}.{name}", position))
        else:
            self.stack.append(self.name("(cannot be resolved)", position))

    def _do_ext1(self, argument: Any, position: int) -> None:
        self.stack.append(self.name(f"(extension registry {argument})", position))

    _do_ext2 = _do_ext4 = _do_ext1

    def _do_inst(self, argument: Any, position: int) -> None:
        arguments = tuple(self.pop_to_mark())
        target = self.name(argument.replace(" ", ".", 1), position)
        self.stack.append(self.call(target, arguments, "INST", position))

    def _do_obj(self, argument: Any, position: int) -> None:
        values = self.pop_to_mark()
        if not values:
            raise _MalformedError("OBJ without a class")
        self.stack.append(self.call(values[0], tuple(values[1:]), "OBJ", position))

    def _do_reduce(self, argument: Any, position: int) -> None:
        arguments, target = self.pop(), self.pop()
        self.stack.append(self.call(target, arguments, "REDUCE", position))

    def _do_newobj(self, argument: Any, position: int) -> None:
        arguments, target = self.pop(), self.pop()
        self.stack.append(self.call(target, arguments, "NEWOBJ", position))

    def _do_newobj_ex(self, argument: Any, position: int) -> None:
        self.pop()
        arguments, target = self.pop(), self.pop()
        self.stack.append(self.call(target, arguments, "NEWOBJ_EX", position))

    def _do_build(self, argument: Any, position: int) -> None:
        self.pop()
        if self.stack and isinstance(self.stack[-1], _Global):
            # It would write attributes of an imported function or class.
            self.call(_OTHER, (), "BUILD", position)


def _fit(name: str, arguments: _Value) -> bool:
    """Say whether a listed name may be called so: encoding is for bytes alone, as numpy does it."""
    if name != "_codecs.encode":
        return True
    return isinstance(arguments, tuple) and len(arguments) == 2 and arguments[1] in _CODECS


def _walk_one(stream: _Bounded, facts: PickleFacts) -> _Value:
    """Walk one pickle and return what it holds at its end."""
    walk = _Walk(facts)
    for count, (opcode, argument, position) in enumerate(pickletools.genops(stream)):  # type: ignore[arg-type]
        if count >= MAX_OPERATIONS:
            raise _MalformedError(f"over {MAX_OPERATIONS} operations")
        if opcode.name == "STOP":
            facts.stopped = True
            return walk.pop()
        walk.step(opcode, argument, position or 0)
    raise _MalformedError("no end")


def walk_stream(stream: IO[bytes], size: int, most: int = 64) -> PickleFacts:
    """Return what the pickles in ``stream`` (``size`` bytes, from its position on) would do.

    At most ``most`` pickles in a row are walked. Never raises for what the stream holds.
    """
    facts, bounded, legacy = PickleFacts(), _Bounded(stream, size), False
    for number in range(most):
        start = bounded.tell()
        try:
            value = _walk_one(bounded, facts)
        except (ValueError, struct.error, TypeError, OverflowError, MemoryError) as error:
            if not number:
                facts.damage.append(f"ends at byte {bounded.tell()}: {shown(error)}")
            facts.end = start if number else bounded.tell()
            break
        facts.end = bounded.tell()
        legacy = legacy or (number == 0 and value == _TORCH_MAGIC)
        if facts.end >= size or (legacy and number + 1 == _LEGACY_PICKLES):
            return facts
    if facts.stopped and facts.end < size:
        facts.damage.append(f"{size - facts.end} bytes follow the end at byte {facts.end}")
    elif facts.stopped and number:
        facts.damage.append(f"{number + 1} pickles in a row")
    return facts


def walk_file(path: Path, start: int = 0) -> PickleFacts:
    """Return what the pickle file ``path`` would do, from byte ``start`` on; see ``walk_stream``.

    Raises:
        InputError: it cannot be opened.
    """
    with open_regular(path) as file:
        file.seek(start)
        return walk_stream(file, path.stat().st_size)


@dataclass(slots=True)
class ZipFacts:
    """What a zip archive holds.

    Attributes:
        members: names, in the order of the central directory.
        pickles: what each member that is a pickle would do, by name.
        damage: where two readers could see two archives, or where reading fails.
        code: members that are programs or Python files.
        unread: members that were not read, with the reason.
    """

    members: list[str] = field(default_factory=list)
    pickles: dict[str, PickleFacts] = field(default_factory=dict)
    damage: list[str] = field(default_factory=list)
    code: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)


def read_zip(path: Path) -> ZipFacts:
    """Return what the zip archive ``path`` holds; members are judged by content, not by name.

    Raises:
        InputError: it cannot be opened.
    """
    facts = ZipFacts()
    with open_regular(path) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                _read_members(archive, file, facts)
        except (
            zipfile.BadZipFile,
            ValueError,
            OSError,
            struct.error,
            NotImplementedError,
        ) as error:
            facts.damage.append(f"the archive cannot be read: {shown(error)}")
            file.seek(0)
            _walk_raw_members(file, path.stat().st_size, facts)
    return facts


def _read_members(archive: zipfile.ZipFile, file: IO[bytes], facts: ZipFacts) -> None:
    members = archive.infolist()
    facts.members = [each.filename for each in members]
    if len(members) > MAX_MEMBERS:
        facts.unread.append(f"{len(members) - MAX_MEMBERS} members over {MAX_MEMBERS}")
    twice = [name for name, times in Counter(facts.members).items() if times > 1]
    facts.damage += [f"member '{shown(name)}' occurs twice" for name in sorted(twice)[:5]]
    facts.damage += _header_differences(members[:MAX_MEMBERS], file)
    if archive.comment:
        facts.damage.append(f"a comment of {len(archive.comment)} bytes")
    for member in members[:MAX_MEMBERS]:
        _read_member(archive, member, facts)


def _header_differences(members: list[zipfile.ZipInfo], file: IO[bytes]) -> Iterator[str]:
    """Yield where a member's own header contradicts the directory, and bytes in no member."""
    end = 0
    for member in sorted(members, key=lambda each: each.header_offset):
        where = f"member '{shown(member.filename)}'"
        file.seek(member.header_offset)
        raw = file.read(30)
        if len(raw) < 30 or raw[:4] != b"PK\x03\x04":
            yield f"{where}: no header at byte {member.header_offset}"
            continue
        _, flags, method, _, _, crc, packed, full, name, extra = struct.unpack("<5H3I2H", raw[4:])
        own = file.read(name).decode("utf-8" if flags & 0x800 else "cp437", "replace")
        if own != member.orig_filename:
            yield f"{where}: its own header says '{shown(own)}'"
        if (flags, method) != (member.flag_bits, member.compress_type):
            yield f"{where}: flags or method differ ({flags}, {method})"
        sizes = (crc, packed, full)
        expected = (member.CRC, member.compress_size, member.file_size)
        known = not flags & 8 and 0xFFFFFFFF not in sizes
        if known and sizes != expected:
            yield f"{where}: checksum or sizes differ ({sizes}, not {expected})"
        if member.header_offset < end or member.header_offset - end > 32:
            yield f"{member.header_offset - end} bytes between members before {where}"
        end = member.header_offset + 30 + name + extra + member.compress_size


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, facts: ZipFacts) -> None:
    """Read one member to its end: its kind, its checksum, and what it would do as a pickle."""
    name = shown(member.filename)
    # Not `is_dir`, which older Pythons ask of the last character of a name that may be empty.
    if member.filename.endswith("/"):
        return
    if member.flag_bits & 1:
        facts.unread.append(f"{name} (encrypted)")
        return
    if member.file_size > 1000 * max(member.compress_size, 1024):
        facts.damage.append(f"member '{name}' expands {member.file_size} bytes from few")
        facts.unread.append(f"{name} (expands too far)")
        return
    try:
        with archive.open(member) as stream:
            head = stream.read(64)
            stream.seek(0)
            _judge_member(name, head, stream, member.file_size, facts)
        with archive.open(member) as stream:
            while stream.read(1 << 20):
                pass  # reading to the end compares the checksum
    except (zipfile.BadZipFile, NotImplementedError, OSError, EOFError, zlib.error) as error:
        facts.damage.append(f"member '{name}': {shown(error)}")


def _judge_member(name: str, head: bytes, stream: IO[bytes], size: int, facts: ZipFacts) -> None:
    if head[:4] == b"PK\x03\x04":
        facts.damage.append(f"member '{name}' is an archive itself")
        facts.unread.append(f"{name} (nested archive)")
        return
    if (
        head[:4] == b"\x7fELF"
        or head[:2] in (b"MZ", b"#!")
        or name.endswith((".py", ".pyc", ".so"))
    ):
        facts.code.append(name)
    start = npy_pickle_start(head)
    if head[:6] == b"\x93NUMPY" and not start:
        return
    stream.seek(start)
    found = walk_stream(stream, size)
    if head[:1] == b"\x80" or name.endswith((".pkl", ".pickle")) or found.plausible:
        is_data = name.rpartition("/")[0].endswith("data") and not found.stopped
        if not is_data or found.plausible:
            facts.pickles[name] = found


def npy_pickle_start(head: bytes) -> int:
    """Return where the pickle of a NumPy file of objects begins, 0 if it has none."""
    if head[:6] != b"\x93NUMPY" or len(head) < 12:
        return 0
    wide = head[6] > 1
    length = int.from_bytes(head[8:12] if wide else head[8:10], "little")
    start = (12 if wide else 10) + length
    return start if b"O" in head[10:start].split(b"descr", 1)[-1].split(b",", 1)[0] else 0


def _walk_raw_members(file: IO[bytes], size: int, facts: ZipFacts) -> None:
    """Walk stored members by their own headers, as readers do that ignore the directory."""
    data = file.read(min(size, 64 << 20))
    at = data.find(b"PK\x03\x04")
    while at >= 0 and at + 30 <= len(data) and len(facts.members) < 1000:
        name, extra = struct.unpack_from("<2H", data, at + 26)
        start = at + 30 + name + extra
        label = shown(data[at + 30 : at + 30 + name].decode("utf-8", "replace"))
        facts.members.append(label)
        file.seek(start)
        found = walk_stream(file, size) if start < size else PickleFacts()
        if found.plausible or data[start : start + 1] == b"\x80":
            facts.pickles[label] = found
        at = data.find(b"PK\x03\x04", start)
