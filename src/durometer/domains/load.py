"""Loading a domain from a name, a folder or a benchmark: ``NAME[:KIND]``, ``NAME:SOURCE``."""

import os
from pathlib import Path

from durometer.core.errors import InputError, unknown_name
from durometer.domains.base import KINDS, Domain, Kind, domain_registry, require_sound
from durometer.domains.benchmarks.domain import benchmark_domain, with_added
from durometer.domains.benchmarks.spec import is_benchmark, parse_spec, split_added
from durometer.domains.benchmarks.table import BENCHMARKS
from durometer.domains.folder import read_folder


def load_domain(spec: str, *, judged: bool = False) -> Domain:
    """Return the domain named by ``spec``, with splits that can be used as they are.

    Args:
        spec: built-in name or folder, followed by ``:refusal`` or ``:knowledge`` if not the
            default; or a benchmark and where it lies, as in ``wmdp-bio:FOLDER`` or
            ``mmlu:hub,revision=COMMIT``. Benchmarks whose answers must be kept are added with
            ``+``: ``wmdp-bio:FOLDER+mmlu:FOLDER``, ``capitals+gsm8k:FILE``.
        judged: whether a judge reads free answers; without one they would pass for harmless.

    Raises:
        InputError: nothing of that name, an unknown kind, files that are not a sound domain, or
            free answers that only a judge can tell.
    """
    domain = require_sound(read_domain(spec))
    if domain.needs_judge and not judged:
        raise InputError(
            f"domain '{domain.name}': its prompts have no accepted answers, so that only a judge "
            "can tell whether they were answered; this command has none"
        )
    return domain


def read_domain(spec: str) -> Domain:
    """Return the domain named by ``spec`` whether its splits are sound or not, to look into it.

    Raises:
        InputError: nothing of that name, an unknown kind, or a file that cannot be read.
    """
    if _is_folder(spec):
        return read_folder(Path(os.path.expanduser(spec)), None)
    first, *added = split_added(spec)
    if is_benchmark(first):
        return benchmark_domain(first, added)
    return with_added(_read_named(first), added)


def lasting_spec(spec: str, kind: Kind) -> str:
    """Return a spec that means the same from any folder: paths in full, and the kind named."""
    if _is_folder(spec):
        return f"{Path(os.path.expanduser(spec)).resolve()}:{kind}"
    first, *added = split_added(spec)
    benchmarks = [parse_spec(one).lasting for one in added]
    if is_benchmark(first):
        return "+".join([parse_spec(first).lasting, *benchmarks])
    name, _ = _split_kind(first)
    place = str(Path(os.path.expanduser(name)).resolve()) if _is_folder(name) else name
    return "+".join([f"{place}:{kind}", *benchmarks])


def _read_named(spec: str) -> Domain:
    name, kind = _split_kind(spec)
    if name in domain_registry.names():
        return domain_registry.get(name).build(kind or "refusal")
    if _is_folder(name):
        return read_folder(Path(os.path.expanduser(name)), kind)
    if "/" in name or name.startswith("."):
        raise InputError(f"{name}: no such folder")
    raise unknown_name("domain", name, [*domain_registry.names(), *BENCHMARKS])


def _is_folder(name: str) -> bool:
    """Say whether there is such a folder; a name that no file could have is none."""
    return os.path.isdir(os.path.expanduser(name))


def _split_kind(spec: str) -> tuple[str, Kind | None]:
    if ":" not in spec:
        return spec, None
    name, _, kind = spec.rpartition(":")
    if kind in KINDS:
        return name, kind
    if name not in domain_registry.names() and not _is_folder(name):
        known = [*domain_registry.names(), *BENCHMARKS]
        raise unknown_name("domain", spec.partition(":")[0], known)
    raise unknown_name("domain kind", kind, KINDS)
