"""Loading a subject from a name, a folder, a GGUF file, a hub id or BASE+ADAPTER.

Files are read by the strict readers of ``formats`` first; no pickle is loaded, no remote code run.
"""

import contextlib
import functools
import io
import logging
import math
import re
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import gguf
import torch

from durometer.core.errors import STORAGE_ERRORS, InputError, UnsafeInputError, unknown_name
from durometer.formats.folder import check_model_folder
from durometer.formats.gguf import check_gguf
from durometer.formats.safetensors import read_header
from durometer.subjects.base import Source, Subject
from durometer.subjects.builtin import subject_registry
from durometer.subjects.chat import ChatFormat
from durometer.subjects.record import controls

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w.-]+)?")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt"]
_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_LOCAL = {"local_files_only": True, "trust_remote_code": False}


def load_subject(spec: str, *, dtype: DtypeName = "auto", device: str = "auto") -> Subject:
    """Load the model under test.

    Args:
        spec: built-in name, model folder, ``.gguf`` file, hub id ``org/name[@revision]``, or
            ``BASE+ADAPTER`` with a PEFT adapter folder.
        dtype: ``auto`` is bf16 where the hardware computes in it, else fp32; small models fp32.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``.

    Raises:
        InputError: nothing of that name, or files that cannot be used as they are.
        UnsafeInputError: a pickle checkpoint, or a configuration that asks for remote code.
    """
    place = _device(device)
    base, adapter = _split_adapter(spec)
    with quiet_libraries():
        subject = _load_plain(base, dtype, place)
        if adapter is not None:
            subject = _with_adapter(subject, adapter, spec)
    subject.model.requires_grad_(False).eval()
    return subject


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep the libraries' progress bars and advice out of the terminal while loading."""
    from transformers.utils import logging as transformers_logging

    bars = transformers_logging.is_progress_bar_enabled()
    level = logging.getLogger("transformers").level
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        # Some bars are plain tqdm; what goes wrong is raised, so nothing is lost with this text.
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.getLogger("transformers").setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _load_plain(spec: str, dtype: DtypeName, device: torch.device) -> Subject:
    if spec in subject_registry.names():
        entry = subject_registry.get(spec)
        folder = entry.folder()
        source = Source("builtin", spec, "", entry.undefended, entry.reference)
        return _from_folder(folder, spec, source, dtype, device)
    path = Path(spec).expanduser()
    if path.suffix == ".gguf":
        return _from_gguf(path, dtype, device)
    if path.is_dir():
        source = Source("folder", str(path), "", *controls(path, subject_registry.names()))
        return _from_folder(path, path.resolve().name, source, dtype, device)
    if path.exists():
        raise InputError(f"{path}: not a model folder or .gguf file; name the folder that holds it")
    if _HUB_ID.fullmatch(spec):
        return _from_hub(spec, dtype, device)
    if "/" in spec or spec.startswith("."):
        raise InputError(f"{path}: no such folder")
    raise unknown_name("subject", spec, subject_registry.names())


def _split_adapter(spec: str) -> tuple[str, Path | None]:
    if "+" not in spec or Path(spec).exists():
        return spec, None
    base, _, adapter = spec.partition("+")
    return base, Path(adapter).expanduser()


def local_folders(spec: str) -> list[Path]:
    """Return the folders of this machine that a spec names: a model's, an adapter's, both."""
    base, adapter = _split_adapter(spec)
    named = [Path(base).expanduser(), *([adapter] if adapter is not None else [])]
    folders = [path for path in named if path.is_dir()]
    return [path for path in folders if str(path) not in subject_registry.names()]


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        text = str(error).splitlines()[0]
        raise InputError(
            f"--device {name}: {text}; use cpu, or a device of this machine"
        ) from error
    return device


def _dtype(name: DtypeName, device: torch.device, parameters: int) -> torch.dtype:
    if name != "auto":
        return _DTYPES[name]
    if device.type == "cpu":
        # Emulated bf16 is slower than fp32, and models of a few million weights gain nothing.
        native = torch.backends.mkldnn.is_available() and _native_bf16()
        return torch.bfloat16 if native and parameters > 20_000_000 else torch.float32
    return torch.bfloat16


def _native_bf16() -> bool:
    check = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return bool(check())


def _from_folder(
    folder: Path, name: str, source: Source, dtype: DtypeName, device: torch.device
) -> Subject:
    from transformers import AutoTokenizer

    checked = check_model_folder(folder)
    if checked.kind == "adapter":
        raise InputError(f"{folder}: an adapter alone is no model; name it as BASE+{folder}")
    if not checked.has_tokenizer:
        raise InputError(f"{folder}: no tokenizer; add the tokenizer files of the model to it")
    # In its final dtype from the start: casting the model would also cast the buffers that its
    # code keeps in fp32 (rotary frequencies), and hold the weights twice.
    target = _dtype(dtype, device, _stored_weights(checked.weight_files))
    options = {"use_safetensors": True, "dtype": target, **_attention(device), **_LOCAL}
    model = _model(folder, folder, options).to(device)
    tokenizer = _reading(folder, lambda: AutoTokenizer.from_pretrained(folder, **_LOCAL))
    return _subject(name, model, tokenizer, source)


def _stored_weights(files: Iterable[Path]) -> int:
    return sum(math.prod(entry.shape) for file in files for entry in read_header(file).values())


def _attention(device: torch.device) -> dict[str, str]:
    """Return the attention to load: on a CPU the plain products beat the fused kernel here.

    At the lengths and masks of tree packs, see ``benchmarks/attention.py``.
    """
    return {"attn_implementation": "eager"} if device.type == "cpu" else {}


@contextlib.contextmanager
def one_gguf_reading() -> Iterator[None]:
    """Let configuration, weights and tokenizer of a GGUF file share one reading of it.

    transformers parses the file for each of them, and names its tensors once a module; for a small
    model that is half of the loading time.
    """
    kept = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    try:
        for name, function in kept.items():
            setattr(gguf, name, functools.cache(function))
        yield
    finally:
        for name, function in kept.items():
            setattr(gguf, name, function)


def _from_gguf(path: Path, dtype: DtypeName, device: torch.device) -> Subject:
    from transformers import AutoTokenizer

    header = check_gguf(path)
    if not header.tensors:
        raise InputError(f"{path}: holds no tensors; name the file with the weights")
    if "split.count" in header.metadata and header.metadata["split.count"] != 1:
        raise InputError(
            f"{path}: one of several parts; join them with llama.cpp's gguf-split first"
        )
    where = {"gguf_file": path.name, **_LOCAL}
    with one_gguf_reading():
        model = dequantised(_model(path, path.parent, where | _attention(device)))
        tokenizer = _reading(path, lambda: AutoTokenizer.from_pretrained(path.parent, **where))
    target = _dtype(dtype, device, sum(parameter.numel() for parameter in model.parameters()))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(device=device, dtype=target)
    return _subject(path.stem, model.to(device), tokenizer, Source("gguf", str(path)))


def _model(place: Path, folder: Path, options: dict[str, Any]) -> Any:
    """Return the model in ``folder``; weights that are not there are not drawn at random."""
    from transformers import AutoModelForCausalLM

    model, told = _reading(
        place,
        lambda: AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options),
    )
    lost = sorted(map(str, {*told["missing_keys"], *told["mismatched_keys"]}))
    if lost:
        raise InputError(
            f"{place}: {len(lost)} weights are missing or of another shape, {lost[0]} for one"
        )
    return model


def dequantised(loaded: Any) -> Any:
    """Return a fresh model with the weights of ``loaded``, as if never quantised.

    A model read from GGUF keeps its ``quantization_config``, with which it refuses to be saved.
    """
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    return model


def _from_hub(spec: str, dtype: DtypeName, device: torch.device) -> Subject:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError

    name, _, revision = spec.partition("@")
    try:
        folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=_HUB_FILES))
    except (HTTPError, OSError, ValueError) as error:
        if getattr(error, "errno", None) in STORAGE_ERRORS:
            raise
        raise InputError(
            f"hub id '{spec}' could not be fetched: {_hub_reason(error)} (a local folder needs "
            "'./' or an absolute path)"
        ) from error
    if not any(folder.glob("*.safetensors")):
        raise UnsafeInputError(
            f"hub id '{spec}': no safetensors weights there; a pickle can run any code when loaded "
            "and is never fetched; name a revision or a copy with safetensors"
        )
    # The snapshot's folder is named by its commit: this is the revision that was really read.
    source = Source("hub", name, folder.name)
    return _from_folder(folder, name, source, dtype, device)


def _hub_reason(error: Exception) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "access is given on request; ask for it on the hub, and log in with: hf auth login"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "no such repository, or a private one; to log in: hf auth login"
    if isinstance(error, errors.RevisionNotFoundError):
        return "no such revision"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _with_adapter(base: Subject, adapter: Path, spec: str) -> Subject:
    from peft import PeftModel

    if check_model_folder(adapter).kind != "adapter":
        raise InputError(f"{adapter}: no adapter_config.json; BASE+ADAPTER needs a PEFT adapter")
    merged = _reading(
        adapter, lambda: PeftModel.from_pretrained(base.model, adapter).merge_and_unload()
    )
    source = Source("adapter", spec, base.source.revision, base.source.location, "")
    return Subject(f"{base.name}+{adapter.name}", merged, base.chat, source, base.notes)


def _subject(
    name: str,
    model: Any,
    tokenizer: Any,
    source: Source,
) -> Subject:
    if not tokenizer.is_fast:
        raise InputError(f"{source.location}: the tokenizer has no fast form (tokenizer.json)")
    notes = []
    if not tokenizer.chat_template:
        notes.append(
            f"'{name}' has no chat template: the plain layout 'Question: ... Answer:' is used, "
            "which is not how a chat model would be asked"
        )
    return Subject(name, model, ChatFormat.of(tokenizer), source, tuple(notes))


def _reading(place: Path, load: Any) -> Any:
    """Call ``load`` and turn what the libraries raise about a bad file into one line."""
    try:
        return load()
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, ImportError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        raise InputError(f"{place}: cannot be loaded: {reason[:300]}") from error
