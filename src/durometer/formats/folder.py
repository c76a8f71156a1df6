"""Check of a model folder before anything loads it: no pickle, no remote code, no broken file.

What is accepted here is what transformers and PEFT would load: ``model.safetensors`` or the shards
of ``model.safetensors.index.json``, or ``adapter_model.safetensors``. Settings that would make a
loader turn to other files or other people's code are refused, since those were never checked.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from durometer.core.errors import InputError, UnsafeInputError
from durometer.formats.safetensors import (
    nested_items,
    open_regular,
    parse_json_object,
    read_header,
    shown,
)

__all__ = ["ModelFolder", "check_model_folder"]

_CONFIG, _ADAPTER_CONFIG = "config.json", "adapter_config.json"
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_ADAPTER = "adapter_model.safetensors"
# Every settings file that transformers or PEFT may act on.
_SETTINGS = (
    _CONFIG,
    _ADAPTER_CONFIG,
    "tokenizer_config.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "tekken.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
)
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
_OTHER_WEIGHTS = {".safetensors", ".gguf", ".h5", ".msgpack", ".onnx"}
_CODE_SETTINGS = {"auto_map", "trust_remote_code", "custom_pipelines"}
# transformers loads this file instead of model.safetensors; X-LoRA loads the adapters listed.
_WEIGHT_SETTINGS = {(_CONFIG, "transformers_weights"), (_ADAPTER_CONFIG, "adapters")}
# Leftovers of a trainer: pickles, but not weights.
_TRAINING_STATE = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state\w*)\.\w+")
_MAX_JSON_BYTES = 64 << 20  # an index of a million tensors; settings take kilobytes
_CACHE_LINK = re.compile(r"\.\./\.\./blobs/([0-9a-f]{40}|[0-9a-f]{64})")
_DAMAGED = "download it again"


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A checked folder; a loader may read ``weight_files`` and nothing of ``ignored``.

    ``config`` is config.json for a model, adapter_config.json for an adapter. ``ignored`` are the
    other files that look like weights: pickles, other formats, other safetensors files.
    """

    path: Path
    kind: Literal["model", "adapter"]
    config: dict[str, Any]
    weight_files: tuple[Path, ...]
    has_tokenizer: bool
    ignored: tuple[Path, ...]


def check_model_folder(path: Path) -> ModelFolder:
    """Return what is in the Hugging Face model or PEFT adapter folder ``path``.

    Every weight file's header is checked strictly; tensor data is not read. Raises InputError for
    what is missing or broken, UnsafeInputError for pickles, remote code and files elsewhere.
    """
    names = _file_names(path)
    kind = _kind(path, names)
    settings = {name: _read_json(path, name) for name in _SETTINGS if name in names}
    for name, values in settings.items():
        _refuse_remote_code(path / name, values)
    weights = _adapter_weights(path, names) if kind == "adapter" else _model_weights(path, names)
    tokenizers = [name for name in _TOKENIZERS if name in names]
    for name in tokenizers:
        _own_file(path, name)
    return ModelFolder(
        path=path,
        kind=kind,
        config=settings[_ADAPTER_CONFIG if kind == "adapter" else _CONFIG],
        weight_files=weights,
        has_tokenizer=bool(tokenizers),
        ignored=tuple(path / name for name in names if _is_ignored(path / name, weights)),
    )


def _file_names(path: Path) -> tuple[str, ...]:
    """Return the sorted names in the folder ``path``."""
    try:
        names = tuple(sorted(entry.name for entry in path.iterdir()))
    except FileNotFoundError:
        raise InputError(f"{shown(path)}: no such folder; check the path") from None
    except NotADirectoryError:
        advice = "name the folder that holds config.json"
        raise InputError(f"{shown(path)}: not a folder; {advice}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{shown(path)}: cannot be read ({shown(error)})") from None
    if not names:
        raise InputError(f"{shown(path)}: the folder is empty; {_DAMAGED}")
    return names


def _kind(path: Path, names: tuple[str, ...]) -> Literal["model", "adapter"]:
    if _ADAPTER_CONFIG in names:
        # transformers would follow the adapter to its base and leave these weights aside.
        for weights in (_SINGLE, _INDEX):
            if weights in names:
                problem = f"holds a model ({weights}) and an adapter ({_ADAPTER_CONFIG})"
                raise InputError(f"{shown(path)}: {problem}; move one of them to its own folder")
        return "adapter"
    if _CONFIG in names:
        return "model"
    gguf = next((name for name in names if name.endswith(".gguf")), None)
    advice = f"name the file {shown(gguf)} itself" if gguf else "name a complete model folder"
    problem = f"holds neither {_CONFIG} nor {_ADAPTER_CONFIG}"
    raise InputError(f"{shown(path)}: {problem}; {advice}")


def _own_file(folder: Path, name: str) -> Path:
    """Return the file ``name`` of ``folder``; refuse a link that leads out of it.

    The one exception is the Hugging Face cache: models--x/snapshots/<revision>/file is a link to
    models--x/blobs/<hash>.
    """
    file = folder / name
    if not file.is_symlink():
        return file
    try:
        target, home, link = file.resolve(), folder.resolve(), os.readlink(file)
    except (OSError, RuntimeError):  # RuntimeError: links in a circle, before Python 3.13
        raise InputError(f"{shown(file)}: the link leads nowhere; {_DAMAGED}") from None
    blob = home.parent.parent / "blobs" / Path(link).name
    in_cache = home.parent.name == "snapshots" and _CACHE_LINK.fullmatch(link) and target == blob
    if not in_cache and not target.is_relative_to(home):
        problem = f"the link leads out of the folder, to {shown(target)}"
        raise UnsafeInputError(f"{shown(file)}: {problem}; put a copy into the folder")
    return file


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    path = _own_file(folder, name)
    with open_regular(path) as file:
        raw = file.read(_MAX_JSON_BYTES + 1)
    if len(raw) > _MAX_JSON_BYTES:
        problem = f"over {_MAX_JSON_BYTES} bytes, no model's settings"
        raise InputError(f"{shown(path)}: {problem}; {_DAMAGED}")
    return parse_json_object(raw, f"{shown(path)}: the file")


def _refuse_remote_code(path: Path, values: dict[str, Any]) -> None:
    """Refuse settings by which a loader runs code, or reads weights, that nobody has checked."""
    for key, value in nested_items(values):
        if key in _CODE_SETTINGS and value:
            asked = f"asks for remote code ({key})"
        elif key.endswith("implementation") and "/" in str(value):
            asked = f"asks for code from the hub ({shown(key)}: {shown(value)})"
        elif (path.name, key) in _WEIGHT_SETTINGS and value:
            problem = f"{key} names weights that were not checked ({shown(value)})"
            raise UnsafeInputError(f"{shown(path)}: {problem}; remove the field")
        else:
            continue
        advice = "use a version of the model in an architecture that transformers has itself"
        raise UnsafeInputError(f"{shown(path)}: {asked}; remote code is never run; {advice}")


def _adapter_weights(folder: Path, names: tuple[str, ...]) -> tuple[Path, ...]:
    if _ADAPTER not in names:
        raise _no_weights(folder, names, _ADAPTER)
    return (_checked(folder, _ADAPTER)[0],)


def _model_weights(folder: Path, names: tuple[str, ...]) -> tuple[Path, ...]:
    if _INDEX in names:
        return _sharded_weights(folder, names)
    if _SINGLE not in names:
        raise _no_weights(folder, names, _SINGLE)
    return (_checked(folder, _SINGLE)[0],)


def _checked(folder: Path, name: str) -> tuple[Path, set[str]]:
    """Return the weight file ``name`` and the names of its tensors, of which it must hold some."""
    path = _own_file(folder, name)
    tensors = set(read_header(path))
    if not tensors:
        raise InputError(f"{shown(path)}: holds no tensors; {_DAMAGED}")
    return path, tensors


def _sharded_weights(folder: Path, names: tuple[str, ...]) -> tuple[Path, ...]:
    """Return the shards that the index names, after comparing it with their headers."""
    shards = _shards(folder, _read_json(folder, _INDEX).get("weight_map"))
    # transformers prefers the single file, other loaders follow the index.
    if _SINGLE in names and _SINGLE not in shards:
        problem = f"holds {_SINGLE} and an index that does not name it: two sets of weights"
        raise InputError(f"{shown(folder)}: {problem}; move one of them away")
    missing = [shard for shard in sorted(shards) if shard not in names]
    if missing:
        problem = f"{len(missing)} of {len(shards)} shards are missing, first {shown(missing[0])}"
        raise InputError(f"{shown(folder / _INDEX)}: {problem}; download them")
    return tuple(_checked_shard(folder, shard, shards[shard]) for shard in sorted(shards))


def _shards(folder: Path, weight_map: object) -> dict[str, set[str]]:
    """Return the tensors that the index promises, by shard; shards are plain file names."""
    where = shown(folder / _INDEX)
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{where}: weight_map is missing, empty or no JSON object; {_DAMAGED}")
    shards: dict[str, set[str]] = {}
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors"):
            named = f"tensor '{shown(tensor)}' is in {shown(shard)}"
            raise UnsafeInputError(f"{where}: {named}, not a safetensors file; {_DAMAGED}")
        if re.search(r"[/\\:]", shard) or not shard.isprintable():
            problem = f"the shard {shown(shard)} is not in this folder"
            raise UnsafeInputError(f"{where}: {problem}; shards must be plain file names beside it")
        shards.setdefault(shard, set()).add(tensor)
    return shards


def _checked_shard(folder: Path, name: str, promised: set[str]) -> Path:
    path, found = _checked(folder, name)
    if promised - found:
        some = shown(min(promised - found))
        problem = f"lacks {len(promised - found)} tensors that the index names, first '{some}'"
        raise InputError(f"{shown(path)}: {problem}; {_DAMAGED}")
    if found - promised:
        some = shown(min(found - promised))
        problem = f"holds {len(found - promised)} tensors that the index lacks, first '{some}'"
        raise InputError(f"{shown(path)}: {problem}; {_DAMAGED}")
    return path


def _no_weights(folder: Path, names: tuple[str, ...], wanted: str) -> InputError:
    """Return the error for a folder without usable weights: pickles, other names, or nothing."""
    pickles = [name for name in names if _is_pickle(name)]
    if pickles:
        problem = f"the weights are there only as pickle ({shown(pickles[0])})"
        reason = "a pickle can run any code when loaded and is never opened"
        advice = "convert it to safetensors on an isolated machine"
        return UnsafeInputError(f"{shown(folder)}: {problem}; {reason}; {advice}")
    others = [name for name in names if Path(name).suffix.lower() in _OTHER_WEIGHTS]
    if others:
        problem = f"{wanted} is missing, {shown(others[0])} is not loaded under that name"
        return InputError(f"{shown(folder)}: {problem}; save the model as {wanted}")
    return InputError(f"{shown(folder)}: {wanted} is missing; download it")


def _is_pickle(name: str) -> bool:
    return Path(name).suffix.lower() in _PICKLES and not _TRAINING_STATE.fullmatch(name)


def _is_ignored(path: Path, weights: tuple[Path, ...]) -> bool:
    return path not in weights and path.suffix.lower() in _PICKLES | _OTHER_WEIGHTS
