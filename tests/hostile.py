"""Files that an audit must not call clean, all inert: pickles only name what they would import.

Every builder writes into a folder that holds a small clean model already.
"""

# ruff: noqa: E501 - tables of cases, one a line

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

Builder = Callable[[Path], object]
Json = dict[str, Any]

CONFIG: Json = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "rms_norm_eps": 1e-6,
}


def tensors(seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    """Return the tensors of a two-layer Llama of 8 units."""
    random = np.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (32, 8), "lm_head.weight": (32, 8)}
    for layer in range(2):
        block = f"model.layers.{layer}"
        for name in ("q", "k", "v", "o"):
            shapes[f"{block}.self_attn.{name}_proj.weight"] = (8, 8)
        for name, shape in (("gate", (16, 8)), ("up", (16, 8)), ("down", (8, 16))):
            shapes[f"{block}.mlp.{name}_proj.weight"] = shape
    made = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    norms = ["model.norm.weight"]
    norms += [
        f"model.layers.{n}.{k}_layernorm.weight"
        for n in (0, 1)
        for k in ("input", "post_attention")
    ]
    return made | {name: np.ones(8, np.float32) for name in norms}


def write_model(folder: Path, seed: int = 0, **config: Any) -> Path:
    """Write a clean small model into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", CONFIG | config)
    write_json(folder / "generation_config.json", {"eos_token_id": 2})
    save_file(tensors(seed), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), "utf-8")


# --- pickles -------------------------------------------------------------------------------------


def call(module: str = "os", name: str = "system", argument: str = "canary") -> bytes:
    """Return a pickle that would call ``module.name("canary")``; it is never loaded."""
    name_of = f"c{module}\n{name}\nX".encode()
    text_of = struct.pack("<I", len(argument)) + argument.encode()
    return b"\x80\x02" + name_of + text_of + b"\x85R."


def short(text: str) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text.encode()


STACK_GLOBAL = b"\x80\x04" + short("os") + short("system") + b"\x93" + short("canary") + b"\x85R."
PICKLES: dict[str, bytes] = {
    "direct call": call(),
    "submodule": call("os.path", "walk"),
    "resolver": call("pkgutil", "resolve_name"),
    "builtins": call("builtins", "eval"),
    "python 2 builtins": call("__builtin__", "apply"),
    "unknown third party": call("some_package.loaders", "restore"),
    "torch internals": call("torch.storage", "_load_from_bytes"),
    "dotted attribute": b"\x80\x04" + short("torch") + short("serialization.load") + b"\x93.",
    "stack global": STACK_GLOBAL,
    "no protocol opcode": STACK_GLOBAL[2:],
    "import without call": b"\x80\x02cos\nsystem\n.",
    "memo reuse": b"\x80\x02X\x02\x00\x00\x00osq\x00X\x06\x00\x00\x00systemq\x01h\x00h\x01\x93h\x01\x85R.",
    "memo overwritten": b"\x80\x04" + short("collections") + b"q\x00" + short("os") + b"q\x00"
    + short("system") + b"q\x01h\x00h\x01\x93" + short("canary") + b"\x85R.",
    "operand not a text": b"\x80\x04K\x01K\x02\x93" + short("canary") + b"\x85R.",
    "extension registry": b"\x80\x02\x82\x01" + b"X\x06\x00\x00\x00canary\x85R.",
    "inst": b"(S'canary'\nios\nsystem\n.",
    "obj": b"(cos\nsystem\nS'canary'\no.",
    "newobj": b"\x80\x02cos\nsystem\nX\x06\x00\x00\x00canary\x85\x81.",
    "build on a class": b"\x80\x02ctorch._utils\n_rebuild_tensor\n}X\x01\x00\x00\x00aX\x01\x00\x00\x00bsb.",
    "result called": b"\x80\x02ccollections\nOrderedDict\n)R)R.",
    "protocol 0": b"cos\nsystem\n(S'canary'\ntR.",
    "codec": b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86R.",
    "truncated after the call": call()[:-1],
    "unknown opcode after the call": call()[:-1] + b"\xff\xfe.",
    "trailing bytes": pickle.dumps([1, 2], 2) + b"junk follows here",
    "second pickle": pickle.dumps([1, 2], 2) + call(),
    "stack underflow": b"\x80\x02R.",
    "missing memo": b"\x80\x02h\x07.",
    "huge length": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b"x.",
}  # fmt: skip


def zipped(members: dict[str, bytes], **options: Any) -> bytes:
    """Return a zip archive of ``members``, stored unless asked otherwise."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **options) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def _patched(data: bytes, at: bytes, shift: int, new: bytes, last: bool = False) -> bytes:
    place = (data.rfind(at) if last else data.find(at)) + shift
    return data[:place] + new + data[place + len(new) :]


PLAIN = {"archive/data.pkl": pickle.dumps({"a": 1}, 2), "archive/version": b"3\n"}
EVIL = PLAIN | {"archive/data.pkl": call()}
ZIPS: dict[str, bytes] = {
    "zip with a call": zipped(EVIL),
    "zip member of odd name": zipped(PLAIN | {"archive/data/0": call()}),
    "zip with python": zipped(PLAIN | {"archive/code.py": b"print('canary')\n"}),
    "nested zip": zipped(PLAIN | {"inner.bin": zipped(EVIL)}),
    "flipped checksum": _patched(zipped(EVIL), b"PK\x03\x04", 14, b"\x00\x00\x00\x01"),
    "encrypted flag": _patched(zipped(EVIL), b"PK\x01\x02", 8, b"\x01\x00"),
    "names differ": _patched(zipped(PLAIN), b"PK\x03\x04", 30, b"evil"),
    "no directory": zipped(EVIL).partition(b"PK\x01\x02")[0],
    "cut": zipped(EVIL)[:-30],
    "archive comment": zipped(PLAIN)[:-2] + b"\x05\x00hello",
    "expands": zipped({"a.pkl": b"\0" * (64 << 20)}, compression=zipfile.ZIP_DEFLATED),
    "prefix before the zip": b"\0" * 100 + zipped(EVIL),
}


# --- safetensors and GGUF ------------------------------------------------------------------------


def st(header: Json | str, data: bytes = b"\0" * 4) -> bytes:
    """Return a safetensors file with this header, right or wrong."""
    raw = (json.dumps(header) if isinstance(header, dict) else header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def entry(
    start: int = 0, end: int = 4, dtype: str = "F32", shape: object = (1,), **more: Any
) -> Json:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end], **more}


ONE = json.dumps(entry())
SAFETENSORS: dict[str, bytes] = {
    "duplicate name": st(f'{{"a": {ONE}, "a": {ONE}}}'),
    "overlap": st({"a": entry(), "b": entry()}),
    "hole": st({"a": entry(), "b": entry(8, 12)}, b"\0" * 12),
    "trailing bytes": st({"a": entry()}, b"\0" * 9),
    "cut short": st({"a": entry()}, b"\0"),
    "wrong size": st({"a": entry(shape=(2,))}),
    "huge length": struct.pack("<Q", 1 << 62) + b"{}",
    "unknown dtype": st({"a": entry(dtype="F31")}),
    "extra field": st({"a": entry(code="x")}),
    "negative": st({"a": entry(shape=(-1,))}),
    "invisible name": st({"a\u200b": entry()}),
    "look-alike name": st({"m\u043edel.weight": entry()}),
    "padding": st(json.dumps({"a": entry()}) + " " * 100_000),
    "metadata not text": st({"__metadata__": {"a": 1}, "b": entry()}),
    "overflow": st({"a": entry(shape=(1 << 40, 1 << 40))}),
    "pickle inside": call(),
    "web address": st({"__metadata__": {"note": "see https://evil.example/x"}, "a": entry()}),
}


def gguf(
    keys: list[tuple[str, int, bytes]] | None = None,
    infos: list[tuple[str, tuple[int, ...], int, int]] | None = None,
    data: bytes = b"\0" * 64,
    *,
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    """Return a GGUF file: keys as (name, type, raw value), tensors as (name, shape, type, offset)."""
    keys = [("general.architecture", 8, text("llama"))] if keys is None else keys
    infos = [("token_embd.weight", (4, 4), 0, 0)] if infos is None else infos
    n_infos, n_keys = counts or (len(infos), len(keys))
    out = b"GGUF" + struct.pack("<IQQ", version, n_infos, n_keys)
    for name, kind, raw in keys:
        out += text(name) + struct.pack("<I", kind) + raw
    for name, shape, kind, offset in infos:
        out += text(name) + struct.pack("<I", len(shape))
        out += struct.pack(f"<{len(shape)}QIQ", *shape, kind, offset)
    return out + b"\0" * (-len(out) % 32) + data


def text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


TWO = ("b", (4, 4), 0, 0)
GGUFS: dict[str, bytes] = {
    "many tensors": gguf(counts=(1 << 40, 1)),
    "many keys": gguf(counts=(1, 1 << 40)),
    "long text": gguf([("a", 8, struct.pack("<Q", 1 << 60))]),
    "long array": gguf([("a", 9, struct.pack("<IQ", 4, 1 << 60))]),
    "duplicate key": gguf([("a", 4, b"\1\0\0\0"), ("a", 4, b"\2\0\0\0")]),
    "alignment": gguf([("general.alignment", 4, struct.pack("<I", 24))]),
    "beyond the end": gguf(infos=[("a", (4, 4), 0, 1 << 40)]),
    "overlap": gguf(infos=[("a", (4, 4), 0, 0), TWO]),
    "unknown type": gguf(infos=[("a", (4, 4), 99, 0)]),
    "version": gguf(version=77),
    "misaligned": gguf(infos=[("a", (4, 4), 0, 1)], data=b"\0" * 65),
    "five dimensions": gguf(infos=[("a", (1, 1, 1, 1, 16), 0, 0)]),
    "zero dimension": gguf(infos=[("a", (0, 4), 0, 0)]),
    "trailing bytes": gguf(data=b"\0" * 4096),
    "product overflow": gguf(infos=[("a", (1 << 62, 1 << 62), 0, 0)]),
    "wrong labels": gguf(
        [
            ("general.architecture", 8, text("llama")),
            ("llama.embedding_length", 4, struct.pack("<I", 77)),
        ]
    ),
    "half a split": gguf(
        [
            ("split.count", 2, b"\3\0"),
            ("split.no", 2, b"\0\0"),
            ("split.tensors.count", 5, b"\1\0\0\0"),
        ]
    ),
}


# --- folders -------------------------------------------------------------------------------------


def _edit(name: str, **changes: Any) -> Builder:
    def build(folder: Path) -> None:
        values = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        write_json(folder / name, values | changes)

    return build


def _file(name: str, data: bytes | str) -> Builder:
    def build(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)

    return build


def _link(folder: Path) -> None:
    (folder.parent / "secret.txt").write_text("outside")
    (folder / "notes.txt").symlink_to("../secret.txt")


def _values(**changes: Any) -> Builder:
    def build(folder: Path) -> None:
        save_file(tensors() | changes, folder / "model.safetensors")

    return build


def _shards(mapping: dict[str, str], *, total: int | None = None) -> Builder:
    def build(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        save_file(tensors(), folder / "model-00001-of-00001.safetensors")
        names = dict.fromkeys(tensors(), "model-00001-of-00001.safetensors") | mapping
        index = {"metadata": {"total_size": total}, "weight_map": names}
        write_json(folder / "model.safetensors.index.json", index)

    return build


def _second_set(folder: Path) -> None:
    save_file(tensors(1), folder / "other.safetensors")


NAN = np.full((8, 8), np.nan, np.float32)
FOLDERS: dict[str, tuple[str, Builder]] = {
    "auto_map": ("CF-01", _edit("config.json", auto_map={"AutoModel": "modeling_x.Model"})),
    "auto_map elsewhere": ("CF-01", _edit("config.json", auto_map={"AutoModel": "other/repo--m.M"})),
    "internal attention": ("CF-01", _edit("config.json", _attn_implementation_internal="a/b")),
    "hub attention": ("CF-01", _edit("config.json", attn_implementation="someone/kernel")),
    "custom pipelines": ("CF-01", _edit("config.json", custom_pipelines={"x": {"impl": "p.P"}})),
    "nested trust": ("CF-01", _edit("processor_config.json", a={"trust_remote_code": True})),
    "other weights": ("CF-01", _edit("config.json", transformers_weights="x.safetensors")),
    "modules.json": ("CF-01", _file("modules.json", '[{"type": "evil.module.Layer"}]')),
    "python file": ("CF-01", _file("modeling_x.py", "import os\nos.system('canary')\n")),
    "suppressed": ("CF-02", _edit("generation_config.json", suppress_tokens=[2])),
    "forced": ("CF-02", _edit("generation_config.json", forced_bos_token_id=7)),
    "hot": ("CF-02", _edit("generation_config.json", temperature=50.0)),
    "bias": ("CF-02", _edit("generation_config.json", sequence_bias={"[3, 4]": -10.0})),
    "adapter beside weights": ("CF-05", _edit("adapter_config.json", r=8, target_modules=["q_proj"])),
    "not quantised": ("CF-04", _edit("config.json", quantization_config={"quant_method": "gptq"})),
    "other size": ("FF-11", _edit("config.json", hidden_size=16)),
    "other layers": ("FF-11", _edit("config.json", num_hidden_layers=3)),
    "extra tensor": ("FF-11", _values(**{"model.layers.0.hook.weight": np.eye(8, dtype=np.float32)})),
    "not a number": ("FF-12", _values(**{"lm_head.weight": np.full((32, 8), np.nan, np.float32)})),
    "infinite": ("FF-12", _values(**{"model.layers.0.mlp.up_proj.weight": NAN * 0 + np.inf})),
    "all zero": ("FF-12", _values(**{"lm_head.weight": np.zeros((32, 8), np.float32)})),
    "missing shard": ("FF-07", _shards({"lm_head.weight": "model-00002-of-00002.safetensors"})),
    "shard elsewhere": ("FF-07", _shards({"lm_head.weight": "../other.safetensors"})),
    "tensor not there": ("FF-07", _shards({"ghost.weight": "model-00001-of-00001.safetensors"})),
    "wrong total": ("FF-07", _shards({}, total=3)),
    "second set": ("FF-08", _second_set),
    "link outside": ("FF-16", _link),
    "broken link": ("FF-16", lambda folder: (folder / "x").symlink_to("nowhere")),
    "pipe": ("FF-16", lambda folder: os.mkfifo(folder / "pipe")),
    "program": ("FF-01", _file("helper", b"\x7fELF" + b"\0" * 60)),
    "script": ("FF-01", _file("run", b"#!/bin/sh\necho canary\n")),
    "archive": ("FF-01", _file("more.tar.gz", b"\x1f\x8b" + b"\0" * 30)),
    "hdf5": ("FF-01", _file("model.h5", b"\x89HDF\r\n\x1a\n" + b"\0" * 30)),
    "objects in numpy": (
        "FF-02",
        _file("a.npy", b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '|O', 'fortran_order': False, "
              b"'shape': (1,), }".ljust(118) + call()),
    ),
    "pickle named json": ("FF-04", _file("data.json", call())),
    "pickle named text": ("FF-02", _file("notes.txt", PICKLES["protocol 0"])),
    "zip after a picture": ("FF-04", _file("logo.png", b"\x89PNG\r\n\x1a\n" + zipped(EVIL))),
    "hidden file": ("FF-17", _file(".secret", "x")),
    "odd name": ("FF-17", _file("c\u043enfig.txt", "x")),
    "unknown content": ("FF-17", _file("blob.dat", bytes(range(128, 256)) * 4)),
    "unfinished": ("FF-03", _file("model-2.safetensors.part", b"\0" * 100)),
    "key twice": ("FF-18", _file("special.json", '{"a": 1, "a": 2}')),
    "not json": ("FF-00", _file("broken.json", '{"a": ')),
    "secret": ("FF-14", _file("notes.md", "token hf_" + "a" * 34)),
    "invisible text": ("FF-06", _file("notes.md", "hello \u202e dlrow")),
    "declared edit": ("FF-15", _file("abliteration_metadata.json", "{}")),
}  # fmt: skip
