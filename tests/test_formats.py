"""The readers of untrusted files: every refusal, agreement with reference libraries, fuzzing."""

import json
import os
import pickle
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import gguf
import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save, save_file

from durometer.core.errors import InputError, UnsafeInputError
from durometer.formats import gguf as gguf_reader
from durometer.formats.folder import check_model_folder
from durometer.formats.gguf import GGML_TYPES, GgufArray, check_gguf
from durometer.formats.safetensors import DTYPE_BITS, iter_tensor_bytes, read_header, shown

T = TypeVar("T")
Json = dict[str, Any]
TENSORS: dict[str, np.ndarray[Any, Any]] = {
    "b": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a": np.ones((4,), dtype=np.float16),
    "empty": np.zeros((0, 3), dtype=np.int64),
    "scalar": np.array(7, dtype=np.uint8),
}


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


# --- safetensors ---------------------------------------------------------------------------------


def st_bytes(header: Json | str | bytes, data: bytes = b"") -> bytes:
    """Return a safetensors file with this header, right or wrong."""
    text = json.dumps(header) if isinstance(header, dict) else header
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw + data


def tensor(start: int = 0, end: int = 4, dtype: str = "F32", shape: object = (1,)) -> Json:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def by_reference(data: bytes) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return dtype and shape of every tensor as the reference library reads them."""
    found = safetensors.deserialize(data)  # type: ignore[no-untyped-call]
    return {name: (spec["dtype"], tuple(spec["shape"])) for name, spec in found}


def test_safetensors_reads_what_the_reference_writes(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    header = read_header(path)
    raw = path.read_bytes()
    assert header.keys() == TENSORS.keys()
    for name, array in TENSORS.items():
        entry = header[name]
        assert entry.shape == array.shape
        assert entry.byte_count == array.nbytes
        assert raw[entry.start : entry.end] == array.tobytes()
    starts = [entry.start for entry in header.values()]
    assert starts == sorted(starts)


@pytest.mark.parametrize("dtype", sorted(DTYPE_BITS))
def test_safetensors_dtype_sizes_are_those_of_the_reference(tmp_path: Path, dtype: str) -> None:
    size = 4 * DTYPE_BITS[dtype] // 8
    data = st_bytes({"x": tensor(0, size, dtype, [4])}, bytes(size))
    path = write(tmp_path / "x", data)
    assert read_header(path)["x"].dtype == dtype
    assert by_reference(data) == {"x": (dtype, (4,))}


@pytest.mark.parametrize("chunk", [1, 5, 1 << 20])
def test_iter_tensor_bytes_yields_every_byte_in_file_order(tmp_path: Path, chunk: int) -> None:
    path = write(tmp_path / "x", save(TENSORS))
    found: dict[str, bytes] = {}
    for entry, piece in iter_tensor_bytes(path, chunk):
        assert piece.readonly
        assert len(piece) <= chunk
        found[entry.name] = found.get(entry.name, b"") + bytes(piece)
    assert found == {name: array.tobytes() for name, array in TENSORS.items()}
    assert list(found) == list(read_header(path))


class Marker:
    """A pickle that would leave a trace if anything loaded it."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.trace,)


DEEP = b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
ST_REFUSED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "only 0 bytes long"),
    "seven bytes": (b"1234567", "too short for a header"),
    "header beyond file": (struct.pack("<Q", 99) + b"{}", "97 bytes missing"),
    "header over limit": (struct.pack("<Q", 100_000_001) + b"{}", "limit of 100000000"),
    "header huge": (b"\xff" * 8 + b"{}", "over the limit"),
    "no brace": (st_bytes(" {}"), "does not begin with '{'"),
    "length 0": (struct.pack("<Q", 0) + b"{}", "does not begin with '{'"),
    "not UTF-8": (st_bytes(b'{"\xff": 1}'), "not UTF-8"),
    "not JSON": (st_bytes("{nonsense}"), "not valid JSON"),
    "two values": (st_bytes("{} {}"), "not valid JSON"),
    "long number": (st_bytes('{"x":' + "9" * 5000 + "}"), "not valid JSON"),
    "deep": (st_bytes(DEEP), "nested too deeply"),
    "brackets": (st_bytes(b"{" + b"[" * 2_000_001), "more entries than any model"),
    "duplicate tensor": (st_bytes('{"x":{},"x":{}}'), "names the key 'x' twice"),
    "duplicate field": (st_bytes('{"x":{"shape":[],"shape":[]}}'), "'shape' twice"),
    "metadata list": (st_bytes({"__metadata__": []}), "__metadata__ is not a JSON object"),
    "metadata number": (st_bytes({"__metadata__": {"k": 1}}), "'k' is not a string"),
    "entry list": (st_bytes({"x": []}), "'x' is not a JSON object"),
    "missing field": (st_bytes({"x": {"dtype": "F32"}}), "(data_offsets, shape)"),
    "extra field": (st_bytes({"x": tensor() | {"code": 1}}, bytes(4)), "unknown fields (code)"),
    "unknown dtype": (st_bytes({"x": tensor(dtype="F7")}, bytes(4)), "unknown dtype 'F7'"),
    "dtype list": (st_bytes({"x": tensor() | {"dtype": ["F32"]}}, bytes(4)), "unknown dtype"),
    "shape text": (st_bytes({"x": tensor(shape="1")}, bytes(4)), "shape is not a list"),
    "shape negative": (st_bytes({"x": tensor(shape=[-1])}, bytes(4)), "shape holds -1"),
    "shape minus zero": (st_bytes('{"x":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}'), "-1"),
    "shape float": (st_bytes({"x": tensor(shape=[1.0])}, bytes(4)), "shape holds 1.0"),
    "shape bool": (st_bytes({"x": tensor(shape=[True])}, bytes(4)), "shape holds True"),
    "shape 2^64": (st_bytes({"x": tensor(shape=[2**64])}, bytes(4)), "not an integer from 0"),
    "shape overflow": (st_bytes({"x": tensor(shape=[2**40] * 2)}, bytes(4)), "overflows"),
    "empty overflow": (st_bytes({"x": tensor(0, 0, shape=[0, 2**40, 2**40])}), "overflows"),
    "rank": (st_bytes({"x": tensor(shape=[1] * 65)}, bytes(4)), "at most 64"),
    "offsets three": (st_bytes({"x": tensor() | {"data_offsets": [0, 4, 4]}}, bytes(4)), "at most"),
    "offsets one": (st_bytes({"x": tensor() | {"data_offsets": [4]}}, bytes(4)), "[start, end]"),
    "offsets reversed": (st_bytes({"x": tensor(4, 0)}, bytes(4)), "are not [start, end]"),
    "size mismatch": (st_bytes({"x": tensor(0, 5)}, bytes(5)), "takes 4 bytes, but data_offsets"),
    "half a byte": (st_bytes({"x": tensor(0, 1, "F4", [3])}, bytes(1)), "takes 1.5 bytes"),
    "overlap": (st_bytes({"x": tensor(), "y": tensor(2, 6)}, bytes(6)), "overlaps"),
    "hole": (st_bytes({"x": tensor(), "y": tensor(8, 12)}, bytes(12)), "a hole of 4 bytes"),
    "hole first": (st_bytes({"x": tensor(4, 8)}, bytes(8)), "a hole of 4 bytes before"),
    "truncated": (st_bytes({"x": tensor()}, bytes(1)), "3 bytes are missing"),
    "trailing": (st_bytes({"x": tensor()}, bytes(6)), "2 trailing bytes"),
    "name empty": (st_bytes({"": tensor()}, bytes(4)), "empty, overlong or unprintable"),
    "name escape": (st_bytes({"\x1b[2J": tensor()}, bytes(4)), r"'\x1b[2J'"),
    "name surrogate": (st_bytes({"\ud800": tensor()}, bytes(4)), r"'\ud800'"),
    "name long": (st_bytes({"x" * 2000: tensor()}, bytes(4)), "overlong"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "git lfs pull"),
    "html": (b"<!DOCTYPE html><html>not found", "a web page"),
    "gguf": (b"GGUF" + bytes(60), "looks like a GGUF file"),
    "zeros": (bytes(500), "unfinished download"),
}


@pytest.mark.parametrize("case", ST_REFUSED)
def test_safetensors_refuses(tmp_path: Path, case: str) -> None:
    data, message = ST_REFUSED[case]
    path = write(tmp_path / "model.safetensors", data)
    with pytest.raises(InputError) as caught:
        read_header(path)
    line = str(caught.value)
    assert message in line
    assert line.startswith(str(path))
    assert line.isprintable()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (pickle.dumps({"a": 1}, protocol=2), "it looks like a pickle, which"),
        (pickle.dumps({"a": 1}, protocol=0), "a pickle of protocol 0"),
        (b"cposix\nsystem\n(S'true'\ntR.", "a pickle of protocol 0"),
        (b"PK\x03\x04" + b"\x01" * 60, "a zip archive, such as torch.save"),
        (b"\x7fELF" + b"\x01" * 60, "a program"),
    ],
)
def test_code_in_disguise_is_unsafe(tmp_path: Path, data: bytes, message: str) -> None:
    path = write(tmp_path / "model.safetensors", data)
    for reader in (read_header, check_gguf):
        with pytest.raises(UnsafeInputError, match="which can run code") as caught:
            reader(path)
        assert message in str(caught.value)


@pytest.mark.parametrize("reader", [read_header, check_gguf])
def test_what_is_not_a_readable_file_is_refused(
    tmp_path: Path, reader: Callable[[Path], object]
) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "circle").symlink_to("circle")
    for path, message in (
        (tmp_path, "not a file"),
        (tmp_path / "pipe", "not a file"),
        (tmp_path / "absent", "no such file"),
        (tmp_path / "circle", "cannot be read"),
        (tmp_path / "nul\0", "cannot be read"),
    ):
        with pytest.raises(InputError, match=message):
            reader(path)


def test_shown_escapes_and_shortens() -> None:
    assert shown("plain é") == "plain é"
    assert shown("\u202egnp.exe") == "\\u202egnp.exe"
    assert shown("x" * 400) == "x" * 300 + "..."


# --- GGUF ----------------------------------------------------------------------------------------

QUANTS = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "MXFP4"]


def written_gguf(path: Path, alignment: int | None = None) -> Path:
    """Write a GGUF file with every kind of metadata and many tensor types by the gguf library."""
    writer = gguf.GGUFWriter(path, "llama")
    if alignment:
        writer.add_custom_alignment(alignment)
    writer.add_block_count(2)
    writer.add_float32("llama.rope.freq_base", 10000.0)
    writer.add_bool("tokenizer.ggml.add_bos_token", False)
    writer.add_token_list(["<s>", "é", ""])
    writer.add_array("scores", [0.5, 1.5])
    writer.add_array("nested", [[1, 2], [3]])
    writer.add_int8("small", -3)
    writer.add_uint64("large", 2**63)
    values = np.linspace(-1, 1, 2 * 256, dtype=np.float32).reshape(2, 256)
    for name in QUANTS:
        kind = gguf.GGMLQuantizationType[name]
        raw = kind not in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)
        data = gguf.quants.quantize(values, kind)
        writer.add_tensor(f"w.{name}", data, raw_dtype=kind if raw else None)
    writer.add_tensor("odd", np.arange(3, dtype=np.int8))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_types_are_those_of_the_library() -> None:
    ours = {(number, kind.name, kind.block, kind.size) for number, kind in GGML_TYPES.items()}
    sizes = gguf.GGML_QUANT_SIZES
    # A newer library may know more types; what we know must not differ.
    assert ours <= {(int(kind), kind.name, *size) for kind, size in sizes.items()}


@pytest.mark.parametrize("alignment", [None, 8, 256])
def test_gguf_reads_what_the_library_writes(tmp_path: Path, alignment: int | None) -> None:
    path = written_gguf(tmp_path / "m.gguf", alignment)
    header = check_gguf(path)
    assert (header.version, header.tensor_count) == (3, len(QUANTS) + 1)
    assert header.alignment == (alignment or 32)
    assert_same_as_library(path)
    expected = {
        "general.architecture": "llama",
        "llama.block_count": 2,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.tokens": GgufArray("string", 3),
        "scores": GgufArray("float32", 2),
        "nested": GgufArray("array", 2),
        "small": -3,
        "large": 2**63,
    }
    assert expected.items() <= header.metadata.items()


def assert_same_as_library(path: Path) -> None:
    """Check that the gguf library finds the same tensors and keys in the file ``path``."""
    header, reference = check_gguf(path), gguf.GGUFReader(path)
    assert [(t.name, t.type.name, t.shape, t.start, t.byte_count) for t in header.tensors] == [
        (t.name, t.tensor_type.name, tuple(t.shape.tolist()[::-1]), t.data_offset, t.n_bytes)
        for t in reference.tensors
    ]
    assert set(header.metadata) == {k for k in reference.fields if not k.startswith("GGUF.")}


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return u64(len(raw)) + raw


def entry(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + u32(kind) + value


def info(name: str = "x", dims: tuple[int, ...] = (8,), kind: int = 0, offset: int = 0) -> bytes:
    sizes = b"".join(u64(size) for size in dims)
    return text(name) + u32(len(dims)) + sizes + u32(kind) + u64(offset)


def gguf_bytes(
    *entries: bytes,
    tensors: tuple[bytes, ...] = (),
    data: int = 0,
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    """Return a GGUF file, right or wrong, with ``data`` bytes of tensor data."""
    tensor_count, key_count = counts or (len(tensors), len(entries))
    head = b"GGUF" + u32(version) + u64(tensor_count) + u64(key_count)
    body = head + b"".join(entries) + b"".join(tensors)
    return body + bytes(-len(body) % 32) + bytes(data)


def array(kind: int, length: int, body: bytes = b"") -> bytes:
    return u32(kind) + u64(length) + body


NESTED = array(9, 1) * 5 + array(0, 0)
GGUF_REFUSED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "starts with b''"),
    "other": (b"GGML" + bytes(90), "starts with b'GGML', not b'GGUF'"),
    "web page": (b"<html>" + bytes(90), "a web page"),
    "only magic": (b"GGUF", "version is beyond the end of the file (4 bytes missing)"),
    "version 1": (gguf_bytes(version=1), "version 1 is not 2 or 3"),
    "big-endian": (b"GGUF" + struct.pack(">I", 3) + bytes(16), "big-endian"),
    "tensor count": (gguf_bytes(counts=(2**63, 0)), "tensor count 9223372036854775808 is over"),
    "tensor count lies": (gguf_bytes(counts=(1000, 0)), "tensor count 1000 cannot fit"),
    "key count": (gguf_bytes(counts=(0, 2**40)), "metadata count 1099511627776 is over"),
    "key count lies": (gguf_bytes(counts=(0, 1000)), "metadata count 1000 cannot fit"),
    "key long": (gguf_bytes(entry("k" * 70_000, 0, b"1")), "over the limit of 65535 bytes"),
    "key empty": (gguf_bytes(entry("", 0, b"1")), "empty or unprintable"),
    "key escape": (gguf_bytes(entry("\x1b[2J", 0, b"1")), r"'\x1b[2J' is empty or unprint"),
    "key not UTF-8": (gguf_bytes(entry(b"\xff", 0, b"1")), "key 0: name is not UTF-8"),
    "key twice": (gguf_bytes(*[entry("k", 0, b"1")] * 2), "'k' occurs twice"),
    "key reserved": (gguf_bytes(entry("GGUF.version", 0, b"1")), "is reserved"),
    "value type": (gguf_bytes(entry("k", 13, b"1")), "'k': unknown value type 13"),
    "bool": (gguf_bytes(entry("k", 7, b"\x02")), "a bool of 2"),
    "string length": (gguf_bytes(entry("k", 8, u64(2**64 - 1))), "is over the limit of 67"),
    "string beyond": (gguf_bytes(entry("k", 8, u64(5000))), "text is beyond the end"),
    "string not UTF-8": (gguf_bytes(entry("k", 8, text(b"\xc0"))), "'k' is not UTF-8"),
    "array length": (gguf_bytes(entry("k", 9, array(0, 2**62))), "is over the limit of 4000000"),
    "array lies": (gguf_bytes(entry("k", 9, array(8, 1000))), "1000 cannot fit"),
    "array wide": (gguf_bytes(entry("k", 9, array(10, 30, bytes(30)))), "beyond the end"),
    "array strings": (gguf_bytes(entry("k", 9, array(8, 2, bytes(16)[:-1] + b"\xf0"))), "over"),
    "array type": (gguf_bytes(entry("k", 9, array(99, 0))), "unknown element type 99"),
    "array nested": (gguf_bytes(entry("k", 9, NESTED)), "nested over 4 deep"),
    "alignment 0": (gguf_bytes(entry("general.alignment", 4, u32(0))), "0 is not a power of two"),
    "alignment 24": (gguf_bytes(entry("general.alignment", 4, u32(24))), "24 is not a power"),
    "alignment type": (gguf_bytes(entry("general.alignment", 5, u32(8))), "type 5, not uint32"),
    "name twice": (gguf_bytes(tensors=(info(), info(offset=32)), data=64), "'x' occurs twice"),
    "name long": (gguf_bytes(tensors=(info("x" * 65),), data=32), "over the limit of 64 bytes"),
    "name empty": (gguf_bytes(tensors=(info(""),), data=32), "empty or unprintable"),
    "rank 0": (gguf_bytes(tensors=(info(dims=()),), data=32), "0 dimensions, not 1 to 4"),
    "rank 5": (gguf_bytes(tensors=(info(dims=(1,) * 5),), data=32), "5 dimensions, not 1 to 4"),
    "dimension 0": (gguf_bytes(tensors=(info(dims=(0, 2)),), data=32), "a dimension of 0"),
    "overflow": (gguf_bytes(tensors=(info(dims=(2**63, 2)),), data=32), "cut short"),
    "wraps to 8": (gguf_bytes(tensors=(info(dims=(2**32, 2**32 + 1)),), data=32), "cut short"),
    "type 4": (gguf_bytes(tensors=(info(kind=4),), data=32), "unknown or removed type 4"),
    "half a block": (gguf_bytes(tensors=(info(dims=(48,), kind=2),), data=32), "Q4_0's 32"),
    "unaligned": (gguf_bytes(tensors=(info(offset=8),), data=64), "8 is not aligned to 32"),
    "overlap": (
        gguf_bytes(tensors=(info("a", (16,)), info("b", (8,), offset=32)), data=64),
        "'b' overlaps another by 32 bytes",
    ),
    "hole": (gguf_bytes(tensors=(info(offset=32),), data=64), "a hole of 32 bytes"),
    "offset beyond": (gguf_bytes(tensors=(info(offset=2**63),), data=32), "a hole of"),
    "truncated": (gguf_bytes(tensors=(info(),), data=30), "2 bytes of tensor data are missing"),
    "trailing": (gguf_bytes(tensors=(info(),), data=64), "32 trailing bytes"),
}


@pytest.mark.parametrize("case", GGUF_REFUSED)
def test_gguf_refuses(tmp_path: Path, case: str) -> None:
    data, message = GGUF_REFUSED[case]
    path = write(tmp_path / "model.gguf", data)
    with pytest.raises(InputError) as caught:
        check_gguf(path)
    line = str(caught.value)
    assert message in line
    assert line.startswith(str(path))
    assert line.isprintable()


def test_gguf_builder_of_these_tests_writes_valid_files(tmp_path: Path) -> None:
    for version in (2, 3):
        tensors = (info("a", (2, 4)), info("b", (32,), kind=8, offset=32))
        data = gguf_bytes(entry("k", 8, text("v")), tensors=tensors, data=32 + 34, version=version)
        path = write(tmp_path / "m.gguf", data)
        assert_same_as_library(path)
        assert check_gguf(path).metadata == {"k": "v"}


@pytest.mark.parametrize("size", range(0, 400, 13))
def test_gguf_cut_anywhere_is_refused(tmp_path: Path, size: int) -> None:
    raw = written_gguf(tmp_path / "whole.gguf").read_bytes()
    with pytest.raises(InputError):
        check_gguf(write(tmp_path / "cut.gguf", raw[:size]))


def test_gguf_budgets_are_shared_by_the_whole_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = [entry(f"k{number}", 9, array(0, 3_000_000, bytes(3_000_000))) for number in (1, 2)]
    with pytest.raises(InputError, match="over the limit of 1000000"):
        check_gguf(write(tmp_path / "m.gguf", gguf_bytes(*arrays)))
    strings = [entry(f"k{number}", 8, text("x" * (40 << 20))) for number in (1, 2)]
    with pytest.raises(InputError, match="'k2': length 41943040 is over the limit"):
        check_gguf(write(tmp_path / "m.gguf", gguf_bytes(*strings)))


def test_gguf_with_as_many_elements_as_allowed_is_read_fast(tmp_path: Path) -> None:
    length = gguf_reader.MAX_ELEMENTS // 8
    data = gguf_bytes(entry("k", 9, array(8, length, bytes(8 * length))))
    start = time.perf_counter()
    assert check_gguf(write(tmp_path / "m.gguf", data)).metadata == {
        "k": GgufArray("string", length)
    }
    assert time.perf_counter() - start < 5


# --- folders -------------------------------------------------------------------------------------

WEIGHTS = save({"w": np.zeros(3, dtype=np.float32)})
OTHER = save({"v": np.zeros(2, dtype=np.float32)})
CONFIG = b'{"model_type": "llama"}'
INDEX = "model.safetensors.index.json"
S1, S2 = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
PICKLE = pickle.dumps({"w": 1})
Files = dict[str, bytes]


def index(weight_map: object) -> bytes:
    return json.dumps({"metadata": {}, "weight_map": weight_map}).encode()


def settings_file(**values: object) -> bytes:
    return json.dumps(values).encode()


def folder(path: Path, files: Files) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (path / name).write_bytes(data)
    return path


SINGLE: Files = {"config.json": CONFIG, "model.safetensors": WEIGHTS}
SHARDED: Files = {
    "config.json": CONFIG,
    INDEX: index({"w": S1, "v": S2}),
    S1: WEIGHTS,
    S2: OTHER,
}
ADAPTER: Files = {
    "adapter_config.json": b'{"peft_type": "LORA"}',
    "adapter_model.safetensors": WEIGHTS,
}


@pytest.mark.parametrize(
    ("files", "kind", "weights", "ignored"),
    [
        (SINGLE, "model", ["model.safetensors"], []),
        (SHARDED, "model", [S1, S2], []),
        (ADAPTER, "adapter", ["adapter_model.safetensors"], []),
        (ADAPTER | {"config.json": CONFIG}, "adapter", ["adapter_model.safetensors"], []),
        (
            SINGLE | {"pytorch_model.bin": PICKLE, "training_args.bin": PICKLE, "m.gguf": b""},
            "model",
            ["model.safetensors"],
            ["m.gguf", "pytorch_model.bin", "training_args.bin"],
        ),
        (
            {"config.json": CONFIG, INDEX: index({"w": "model.safetensors"}), **SINGLE},
            "model",
            ["model.safetensors"],
            [],
        ),
        (
            SHARDED | {"consolidated.safetensors": b"never read"},
            "model",
            [S1, S2],
            ["consolidated.safetensors"],
        ),
    ],
)
def test_folder_accepts(
    tmp_path: Path, files: Files, kind: str, weights: list[str], ignored: list[str]
) -> None:
    found = check_model_folder(folder(tmp_path, files))
    assert found.kind == kind
    assert [path.name for path in found.weight_files] == weights
    assert [path.name for path in found.ignored] == ignored
    assert not found.has_tokenizer


def test_folder_returns_config_and_tokenizer(tmp_path: Path) -> None:
    harmless = settings_file(auto_map={}, trust_remote_code=False, attn_implementation="sdpa")
    files = SINGLE | {"tokenizer.json": b"{}", "tokenizer_config.json": harmless}
    found = check_model_folder(folder(tmp_path, files))
    assert found.has_tokenizer
    assert found.config == {"model_type": "llama"}
    assert found.path == tmp_path


REMOTE = "remote code is never run; use a version of the model in an architecture"
AUTO_MAP = settings_file(auto_map={"AutoModel": "evil.Model"})
UNSAFE: dict[str, tuple[Files, str]] = {
    "auto_map": (SINGLE | {"config.json": AUTO_MAP}, REMOTE),
    "auto_map tokenizer": (SINGLE | {"tokenizer_config.json": AUTO_MAP}, REMOTE),
    "auto_map generation": (SINGLE | {"generation_config.json": AUTO_MAP}, REMOTE),
    "auto_map nested": (
        SINGLE | {"config.json": settings_file(text_config=[{"auto_map": {"A": "b"}}])},
        "config.json: asks for remote code (auto_map)",
    ),
    "trust": (
        ADAPTER | {"adapter_config.json": settings_file(kwargs={"trust_remote_code": True})},
        "adapter_config.json: asks for remote code (trust_remote_code)",
    ),
    "pipelines": (
        SINGLE | {"config.json": settings_file(custom_pipelines={"x": {"impl": "evil.P"}})},
        "(custom_pipelines)",
    ),
    "kernel": (
        SINGLE | {"config.json": settings_file(attn_implementation="evil/kernel")},
        "code from the hub (attn_implementation: evil/kernel)",
    ),
    "kernel of a part": (
        SINGLE | {"config.json": settings_file(_attn_implementation={"text": "evil/kernel"})},
        "code from the hub",
    ),
    "other weights": (
        SINGLE | {"config.json": settings_file(transformers_weights="adapter_model.bin")},
        "names weights that were not checked (adapter_model.bin)",
    ),
    "other adapters": (
        ADAPTER | {"adapter_config.json": settings_file(adapters={"0": "evil/adapter"})},
        "adapters names weights that were not checked",
    ),
    "pickle": (
        {"config.json": CONFIG, "pytorch_model.bin": PICKLE},
        "only as pickle (pytorch_model.bin); a pickle can run any code",
    ),
    "pickle shards": (
        {"config.json": CONFIG, "pytorch_model-00001-of-00002.bin": PICKLE},
        "convert it to safetensors on an isolated machine",
    ),
    "pt": ({"config.json": CONFIG, "model.pt": PICKLE}, "only as pickle (model.pt)"),
    "pth": ({"config.json": CONFIG, "model.PTH": PICKLE}, "only as pickle (model.PTH)"),
    "ckpt": ({"config.json": CONFIG, "model.ckpt": PICKLE}, "only as pickle (model.ckpt)"),
    "adapter pickle": (
        {"adapter_config.json": b"{}", "adapter_model.bin": PICKLE},
        "only as pickle (adapter_model.bin)",
    ),
    "disguised": (SINGLE | {"model.safetensors": PICKLE}, "looks like a pickle"),
    "disguised zip": (SINGLE | {"model.safetensors": b"PK\x03\x04" + b"\1" * 9}, "a zip archive"),
    "shard above": (SHARDED | {INDEX: index({"w": "../x.safetensors"})}, "is not in this folder"),
    "shard absolute": (SHARDED | {INDEX: index({"w": "/x.safetensors"})}, "is not in this folder"),
    "shard backslash": (SHARDED | {INDEX: index({"w": "..\\x.safetensors"})}, "not in this folder"),
    "shard drive": (SHARDED | {INDEX: index({"w": "c:x.safetensors"})}, "not in this folder"),
    "shard pickle": (SHARDED | {INDEX: index({"w": "x.bin"})}, "x.bin, not a safetensors file"),
    "shard number": (SHARDED | {INDEX: index({"w": 1})}, "'w' is in 1, not a safetensors file"),
}
BROKEN: dict[str, tuple[Files, str]] = {
    "empty": ({}, "the folder is empty"),
    "no config": ({"model.safetensors": WEIGHTS}, "neither config.json nor adapter_config.json"),
    "gguf": ({"m.gguf": b"GGUF"}, "name the file m.gguf itself"),
    "config list": (SINGLE | {"config.json": b"[]"}, "config.json: the file is not a JSON object"),
    "config cut": (SINGLE | {"config.json": b'{"a": '}, "config.json: the file is not valid JSON"),
    "config twice": (SINGLE | {"config.json": b'{"a": 1, "a": 2}'}, "the key 'a' twice"),
    "tokenizer config": (SINGLE | {"tokenizer_config.json": b"x"}, "tokenizer_config.json"),
    "no weights": ({"config.json": CONFIG}, "model.safetensors is missing; download it"),
    "training only": (
        {"config.json": CONFIG, "training_args.bin": PICKLE, "rng_state_0.pth": PICKLE},
        "model.safetensors is missing; download it",
    ),
    "other name": (
        {"config.json": CONFIG, "model.fp16.safetensors": WEIGHTS},
        "model.fp16.safetensors is not loaded under that name",
    ),
    "no adapter": ({"adapter_config.json": b"{}"}, "adapter_model.safetensors is missing"),
    "both": (SINGLE | ADAPTER, "holds a model (model.safetensors) and an adapter"),
    "no tensors": (SINGLE | {"model.safetensors": save({})}, "holds no tensors"),
    "truncated": (SINGLE | {"model.safetensors": WEIGHTS[:-5]}, "5 bytes are missing"),
    "truncated shard": (SHARDED | {S2: OTHER[:-3]}, f"{S2}: the file is cut short, 3 bytes"),
    "map list": (SHARDED | {INDEX: index([])}, "weight_map is missing, empty or no JSON"),
    "map empty": (SHARDED | {INDEX: index({})}, "weight_map is missing, empty"),
    "map missing": (SHARDED | {INDEX: b"{}"}, "weight_map is missing"),
    "map twice": (SHARDED | {INDEX: b'{"weight_map": {"w": 1, "w": 2}}'}, "the key 'w' twice"),
    "shard missing": (
        SHARDED | {INDEX: index({"w": S1, "v": "gone.safetensors"})},
        "1 of 2 shards are missing, first gone.safetensors",
    ),
    "tensor missing": (
        SHARDED | {INDEX: index({"w": S1, "v": S2, "u": S2})},
        f"{S2}: lacks 1 tensors that the index names, first 'u'",
    ),
    "tensor extra": (
        SHARDED | {S2: save({"v": np.zeros(2), "w": np.zeros(3)})},
        f"{S2}: holds 1 tensors that the index lacks, first 'w'",
    ),
    "two sets": (SHARDED | {"model.safetensors": WEIGHTS}, "two sets of weights"),
}


@pytest.mark.parametrize("case", UNSAFE)
def test_folder_refuses_as_unsafe(tmp_path: Path, case: str) -> None:
    files, message = UNSAFE[case]
    with pytest.raises(UnsafeInputError) as caught:
        check_model_folder(folder(tmp_path / "m", files))
    assert message in str(caught.value)


@pytest.mark.parametrize("case", BROKEN)
def test_folder_refuses_as_broken(tmp_path: Path, case: str) -> None:
    files, message = BROKEN[case]
    with pytest.raises(InputError) as caught:
        check_model_folder(folder(tmp_path / "m", files))
    assert message in str(caught.value)
    assert not isinstance(caught.value, UnsafeInputError)


def test_folder_path_must_be_a_folder(tmp_path: Path) -> None:
    for path, message in (
        (tmp_path / "absent", "no such folder"),
        (write(tmp_path / "file", b""), "not a folder"),
        (tmp_path / "nul\0", "cannot be read"),
    ):
        with pytest.raises(InputError, match=message):
            check_model_folder(path)


def test_no_pickle_is_ever_loaded(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    payload = pickle.dumps(Marker(trace))
    for name in ("model.safetensors", "pytorch_model.bin"):
        with pytest.raises(UnsafeInputError):
            check_model_folder(folder(tmp_path / name, {"config.json": CONFIG, name: payload}))
    assert not trace.exists()
    pickle.loads(payload)  # the marker does work
    assert trace.exists()


def test_folder_of_the_hub_cache_is_accepted(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--x" / "snapshots" / "abc"
    blobs = folder(tmp_path / "models--x" / "blobs", {"a" * 40: CONFIG, "b" * 64: WEIGHTS})
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").symlink_to(f"../../blobs/{'a' * 40}")
    (snapshot / "model.safetensors").symlink_to(f"../../blobs/{'b' * 64}")
    assert check_model_folder(snapshot).config == {"model_type": "llama"}
    (tmp_path / "short").symlink_to(snapshot)
    assert check_model_folder(tmp_path / "short").kind == "model"
    # A blob that is a link itself leads anywhere.
    (blobs / ("b" * 64)).rename(tmp_path / "elsewhere")
    (blobs / ("b" * 64)).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafeInputError, match="leads out of the folder"):
        check_model_folder(snapshot)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_links_may_not_leave_the_folder(tmp_path: Path, name: str) -> None:
    path = folder(tmp_path / "m", SINGLE | {"tokenizer.json": b"{}"})
    (path / name).rename(tmp_path / "outside")
    (path / name).symlink_to("../outside")
    with pytest.raises(UnsafeInputError, match="leads out of the folder"):
        check_model_folder(path)
    (path / name).unlink()
    (tmp_path / "outside").rename(path / "inside.data")
    (path / name).symlink_to("inside.data")
    assert check_model_folder(path).kind == "model"
    (path / name).unlink()
    (path / name).symlink_to(name)
    with pytest.raises(InputError, match="leads nowhere"):
        check_model_folder(path)


# --- random damage -------------------------------------------------------------------------------

AWKWARD = [u64(value) for value in (0, 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1)]
EDITS = st.lists(
    st.tuples(
        st.integers(0, 4000),
        st.integers(0, 12),
        st.one_of(st.binary(max_size=8), st.sampled_from([*AWKWARD, b"-", b"0", b"{", b'"'])),
    ),
    min_size=1,
    max_size=6,
)


def damaged(raw: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    """Return ``raw`` with pieces cut out and others put in; places wrap around at its end."""
    for place, cut, piece in edits:
        at = place % (len(raw) + 1)
        raw = raw[:at] + piece + raw[at + cut :]
    return raw


@pytest.fixture(scope="module")
def whole_gguf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return written_gguf(tmp_path_factory.mktemp("whole") / "m.gguf").read_bytes()


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damage") / "file"


def accepted(reader: Callable[[Path], T], path: Path) -> T | None:
    """Return what ``reader`` finds, or None where it refuses in one printable line."""
    try:
        return reader(path)
    except InputError as error:
        line = str(error)
    assert line.isprintable()
    return None


@given(edits=EDITS)
@settings(max_examples=400, deadline=2000)
def test_damaged_safetensors_is_read_as_by_the_reference_or_refused(
    scratch: Path, edits: list[tuple[int, int, bytes]]
) -> None:
    data = damaged(save(TENSORS, {"format": "pt"}), edits)
    header = accepted(read_header, write(scratch, data))
    if header is not None:
        found = {name: (entry.dtype, entry.shape) for name, entry in header.items()}
        assert found == by_reference(data)


@given(edits=EDITS, in_place=st.booleans())
@settings(max_examples=400, deadline=2000)
def test_damaged_gguf_is_read_as_by_the_library_or_refused(
    scratch: Path, whole_gguf: bytes, edits: list[tuple[int, int, bytes]], in_place: bool
) -> None:
    # Damage of equal length reaches further than cuts, after which every field is out of place.
    edits = [(at, len(piece), piece) for at, _, piece in edits] if in_place else edits
    path = write(scratch, damaged(whole_gguf, edits))
    if accepted(check_gguf, path) is not None:
        assert_same_as_library(path)
