"""Tables that come with the package: counts only, no text."""

from importlib import resources
from pathlib import Path

from durometer.core.errors import InputError
from durometer.formats.safetensors import shown

__all__ = ["SHIPPED", "shipped_or_named"]

SHIPPED = {
    "2409.19476-asr": "attack success before and after fine-tuning, with the printed headlines",
    "2409.19476-accuracy": "accuracy with false and random context, with the printed headlines",
    "2409.19476-adoption": "how often a planted wrong answer is adopted, counts only",
}


def shipped_or_named(name: str) -> Path:
    """Return the file of that path, or the shipped table of that name where there is no such file.

    Raises:
        InputError: there is neither.
    """
    path = Path(name).expanduser()
    if name in SHIPPED and not path.exists():
        return Path(str(resources.files("durometer.headlines"))) / "data" / f"{name}.csv"
    if not path.exists():
        held = ", ".join(SHIPPED)
        raise InputError(f"{shown(name)}: no such file; name one, or a shipped table: {held}")
    return path
