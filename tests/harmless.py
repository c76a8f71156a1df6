"""Files that an audit should raise no alarm on: the harmless counterparts of ``hostile.py``.

``OTHER_CLASSES`` is the exception: harmless too, but they name classes that are no tensors, so that
a reader which allows only what it knows reports them.
"""

import io
import json
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hostile import CONFIG, Builder, entry, gguf, short, st, tensors, text, write_json, zipped
from safetensors.numpy import save_file

VALUES = {"a": [1, 2.5, "text", None, True], "b": (b"bytes" * 9, {3}), 1: -(1 << 70)}


def saved(value: object, **options: Any) -> bytes:
    """Return what ``torch.save`` writes."""
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def archive_of_arrays() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.arange(5.0), b=np.ones((2, 2), np.float32))
    return buffer.getvalue()


LAYER = torch.nn.Linear(4, 4).state_dict()
OLD: dict[str, Any] = {"_use_new_zipfile_serialization": False}
PICKLES: dict[str, bytes] = {
    **{f"values, protocol {n}": pickle.dumps(VALUES, n) for n in range(6)},
    "ordered dictionary": pickle.dumps(OrderedDict(a=1), 2),
    "numpy array": pickle.dumps({"a": np.arange(5.0)}, 2),
    "numpy array, protocol 4": pickle.dumps({"a": np.arange(5.0)}, 4),
    "numpy scalar": pickle.dumps(np.float32(3), 2),
    "state dict, old format": saved(LAYER, **OLD),
    "optimiser state, old format": saved(torch.optim.Adam([torch.ones(2)]).state_dict(), **OLD),
}
ZIPS: dict[str, bytes] = {
    "state dict": saved(LAYER),
    "state dict in bf16": saved({"half": torch.ones(3, dtype=torch.bfloat16)}),
    "optimiser state": saved(torch.optim.Adam([torch.ones(2)]).state_dict()),
    "integers and booleans": saved({"a": torch.arange(4), "b": torch.ones(2, dtype=torch.bool)}),
    "plain values": saved({"steps": 3, "name": "text"}),
}


def made(module: str, name: str) -> bytes:
    """Return the pickle of an empty object of a class, written opcode by opcode."""
    return b"\x80\x04" + short(module) + short(name) + b"\x93)\x81."


OTHER_CLASSES: dict[str, bytes] = {
    "training arguments": made("transformers.training_args", "TrainingArguments"),
    "argparse options": made("argparse", "Namespace"),
    "classifier": made("sklearn.linear_model._logistic", "LogisticRegression"),
    "date": made("datetime", "datetime"),
    "default dictionary": made("collections", "defaultdict"),
}
SAFETENSORS: dict[str, bytes] = {
    "one tensor": st({"a": entry()}),
    "two tensors": st({"a": entry(), "b": entry(4, 8)}, b"\0" * 8),
    "metadata": st({"__metadata__": {"format": "pt"}, "a": entry()}),
    "padded to eight bytes": st(json.dumps({"a": entry()}).ljust(64)),
    "half precision": st({"a": entry(dtype="BF16", shape=(2,))}),
}
VALUE_BYTES = np.random.default_rng(0).standard_normal(32).astype(np.float32).tobytes()
GGUFS: dict[str, bytes] = {
    "one tensor": gguf(data=VALUE_BYTES[:64]),
    "two tensors": gguf(
        infos=[("a.weight", (4, 4), 0, 0), ("b.weight", (4, 4), 0, 64)], data=VALUE_BYTES
    ),
    "named": gguf(
        [("general.architecture", 8, text("llama")), ("general.name", 8, text("m"))],
        data=VALUE_BYTES[:64],
    ),
    "half precision": gguf(infos=[("token_embd.weight", (4, 8), 1, 0)], data=VALUE_BYTES[:64]),
}


def _files(**files: bytes | str) -> Builder:
    def build(folder: Path) -> None:
        for name, data in files.items():
            path = folder / name.replace("__", "/").replace("_dot_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data.encode() if isinstance(data, str) else data)

    return build


def _shards(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    names = list(tensors())
    halves = names[::2], names[1::2]
    mapping = {}
    for number, half in enumerate(halves, 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors()[name] for name in half}, folder / file)
        mapping |= dict.fromkeys(half, file)
    total = sum(value.nbytes for value in tensors().values())
    index = {"metadata": {"total_size": total}, "weight_map": mapping}
    write_json(folder / "model.safetensors.index.json", index)


def _tied(folder: Path) -> None:
    values = tensors()
    del values["lm_head.weight"]
    save_file(values, folder / "model.safetensors")
    write_json(folder / "config.json", CONFIG | {"tie_word_embeddings": True})


def _generation(folder: Path) -> None:
    usual = {"eos_token_id": [2, 3], "do_sample": True, "temperature": 0.6, "top_p": 0.9}
    write_json(folder / "generation_config.json", usual)


FOLDERS: dict[str, Builder] = {
    "plain": _files(),
    "shards": _shards,
    "tied embeddings": _tied,
    "usual sampling": _generation,
    "card and licence": _files(README_dot_md="---\nlicense: mit\n---\n# A model\n", LICENSE="MIT"),
    "git attributes": _files(_dot_gitattributes="*.safetensors filter=lfs\n"),
    "picture": _files(logo_dot_png=b"\x89PNG\r\n\x1a\n" + b"\0\0\0\rIHDR" + b"\0" * 17),
    "cache of a download": _files(
        _dot_cache__huggingface__download__config_dot_json_dot_metadata="0" * 40 + "\nabc\n1.0\n"
    ),
    "array": _files(mean_dot_npy=b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '<f4', 'fortran_order': "
                    b"False, 'shape': (1,), }".ljust(117) + b"\n" + b"\0" * 4),
    "archive of arrays": _files(statistics_dot_npz=archive_of_arrays()),
}  # fmt: skip
__all__ = [
    "FOLDERS", "GGUFS", "OTHER_CLASSES", "PICKLES", "SAFETENSORS", "ZIPS", "zipped",
]  # fmt: skip
