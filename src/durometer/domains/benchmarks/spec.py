"""How a benchmark is named: ``NAME:SOURCE[,KEY=VALUE...][:KIND]``, several joined by ``+``."""

import os
import re
from dataclasses import dataclass, fields
from pathlib import Path

from durometer.core.errors import InputError, unknown_name
from durometer.domains.base import KINDS
from durometer.domains.benchmarks.table import BENCHMARKS, Benchmark
from durometer.formats.safetensors import shown

__all__ = ["HUB", "BenchmarkSpec", "is_benchmark", "parse_spec", "short_name", "split_added"]

HUB = "hub"
_NAMES = "|".join(sorted(BENCHMARKS, key=len, reverse=True))
_ADDED = re.compile(rf"\+(?=(?:{_NAMES})(?::|\+|$))")
_SETTING = re.compile(r",(?=[a-z_]+=)")


@dataclass(frozen=True)
class Wanted:
    """Settings after the source.

    Attributes:
        split: the benchmark's own split, '' for its default.
        part: suites to keep, joined by ``+``; '' for all.
        revision: of the hub's repository: branch, tag or commit.
        repo: another repository of the hub with the same files.
    """

    split: str = ""
    part: str = ""
    revision: str = ""
    repo: str = ""


@dataclass(frozen=True)
class BenchmarkSpec:
    """A benchmark, where it is to be read, and what of it.

    Attributes:
        place: folder or file; None for the hub.
        wanted: the settings.
    """

    benchmark: Benchmark
    place: Path | None
    wanted: Wanted

    @property
    def lasting(self) -> str:
        """The spec that means the same from any folder."""
        source = HUB if self.place is None else str(self.place.resolve())
        settings = (f",{key}={value}" for key, value in vars(self.wanted).items() if value)
        return f"{self.benchmark.name}:{source}{''.join(settings)}"


def split_added(spec: str) -> list[str]:
    """Return the domain that a spec begins with, and the benchmarks added to it with ``+``."""
    return _ADDED.split(spec)


def is_benchmark(spec: str) -> bool:
    """Say whether ``spec`` names a benchmark: with a source or, wrongly, without."""
    return spec.partition(":")[0] in BENCHMARKS


def short_name(spec: str) -> str:
    """Return a spec without the sources of its benchmarks, to name a folder after."""
    parts = split_added(spec)
    return "+".join(part.partition(":")[0] if is_benchmark(part) else part for part in parts)


def parse_spec(spec: str) -> BenchmarkSpec:
    """Return what a spec says.

    Raises:
        InputError: no source, a kind that the benchmark does not have, or an unknown setting.
    """
    name, _, rest = spec.partition(":")
    benchmark = BENCHMARKS[name]
    source, kind = _split_kind(rest)
    if kind not in ("", benchmark.kind):
        raise InputError(
            f"{name}: measured as kind '{benchmark.kind}' alone; leave out ':{kind}' "
            f"({_WHY[benchmark.kind]})"
        )
    source, wanted = _settings(name, source)
    if not source:
        raise InputError(
            f"{name}: not shipped with durometer; name your copy as {name}:FOLDER_OR_FILE, or "
            f"{name}:hub to fetch {benchmark.repo} ({benchmark.licence})"
        )
    if source == HUB:
        return BenchmarkSpec(benchmark, None, wanted)
    if wanted.revision or wanted.repo:
        raise InputError(f"{name}: revision and repo are settings of the hub: {name}:hub,...")
    return BenchmarkSpec(benchmark, Path(os.path.expanduser(source)), wanted)


_WHY = {
    "knowledge": "its answers are chosen among options",
    "refusal": "it has no options to choose among",
}


def _split_kind(rest: str) -> tuple[str, str]:
    source, _, kind = rest.rpartition(":")
    return (source, kind) if kind in KINDS and source else (rest, "")


def _settings(name: str, rest: str) -> tuple[str, Wanted]:
    if rest == HUB or os.path.exists(os.path.expanduser(rest)):
        return rest, Wanted()
    source, *pairs = _SETTING.split(rest)
    known = [field.name for field in fields(Wanted)]
    values: dict[str, str] = {}
    for key, _, value in (pair.partition("=") for pair in pairs):
        if key not in known:
            raise InputError(f"{name}: {unknown_name('setting', shown(key, 40), known)}")
        if not value or key in values:
            raise InputError(f"{name}: setting '{key}' needs one value")
        values[key] = value
    return source, Wanted(**values)
