"""Loading a domain from a built-in name or a folder, with its kind: ``NAME[:KIND]``."""

from pathlib import Path

from durometer.core.errors import InputError, unknown_name
from durometer.domains.base import KINDS, Domain, Kind, domain_registry, require_sound
from durometer.domains.folder import read_folder


def load_domain(spec: str) -> Domain:
    """Return the domain named by ``spec``, with splits that can be used as they are.

    Args:
        spec: built-in name or folder, followed by ``:refusal`` or ``:knowledge`` if not the
        default.

    Raises:
        InputError: nothing of that name, an unknown kind, or a folder that is not a sound domain.
    """
    return require_sound(read_domain(spec))


def read_domain(spec: str) -> Domain:
    """Return the domain named by ``spec`` whether its splits are sound or not, to look into it.

    Raises:
        InputError: nothing of that name, an unknown kind, or a file that cannot be read.
    """
    name, kind = _split_kind(spec)
    if name in domain_registry.names():
        return domain_registry.get(name).build(kind or "refusal")
    if Path(name).expanduser().is_dir():
        return read_folder(Path(name).expanduser(), kind)
    if "/" in name or name.startswith("."):
        raise InputError(f"{name}: no such folder")
    raise unknown_name("domain", name, domain_registry.names())


def _split_kind(spec: str) -> tuple[str, Kind | None]:
    if Path(spec).is_dir() or ":" not in spec:
        return spec, None
    name, _, kind = spec.rpartition(":")
    if kind not in KINDS:
        raise unknown_name("domain kind", kind, KINDS)
    return name, kind
