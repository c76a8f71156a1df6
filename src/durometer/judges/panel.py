"""One or two judges of one run: the first decides outcomes, the second shows how far they agree."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from durometer.core.errors import InputError
from durometer.judges.base import Asked, Case, Device, Judge, JudgeVerdict
from durometer.judges.cache import VerdictCache

__all__ = ["MOST_JUDGES", "Panel", "Rule", "read_judges"]

MOST_JUDGES = 2
Rule = Literal["first", "both"]
"""Whose word makes an attack a success: the first judge's, or only that of both."""


def read_judges(specs: Sequence[str], rule: Rule = "first") -> list[Asked]:
    """Return the judges named, checked but not loaded.

    Raises:
        InputError: more than two, the same one twice, one that cannot be as it was named, or a
            rule for two judges without two.
    """
    if rule == "both" and len(specs) != MOST_JUDGES:
        raise InputError("--judge-rule both: needs two judges; name them with --judge, twice")
    if len(specs) > MOST_JUDGES:
        raise InputError(
            f"--judge: {len(specs)} are named; at most two, the second to see how far they agree"
        )
    if len(set(specs)) < len(specs):
        raise InputError(f"--judge {specs[0]}: named twice; a judge always agrees with itself")
    return [Asked.read(spec) for spec in specs]


@dataclass(frozen=True)
class Panel:
    """The judges of a run, ready to judge, and what they said so far.

    Attributes:
        rule: how their verdicts make one outcome.
    """

    judges: tuple[Judge, ...]
    cache: VerdictCache
    rule: Rule = "first"

    @classmethod
    def build(
        cls,
        specs: Sequence[str],
        device: Device | None = None,
        file: Path | None = None,
        rule: Rule = "first",
    ) -> "Panel":
        """Load or connect the judges named.

        Args:
            device: where local judges compute, unless their settings say otherwise.
            file: where verdicts are kept.
            rule: how verdicts make one outcome.

        Raises:
            InputError: see ``read_judges``; or a judge that cannot be had.
        """
        asked = read_judges(specs, rule)
        built = tuple(one.build(device or Device()) for one in asked)
        return cls(built, VerdictCache(file), rule)

    def identity(self) -> list[dict[str, Any]]:
        """Return what the verdicts depend on beside the cases, one entry a judge."""
        return [judge.identity() for judge in self.judges]

    def judge(self, cases: Sequence[Case]) -> list[tuple[JudgeVerdict, ...]]:
        """Return the verdicts of all judges, one tuple a case.

        Raises:
            JudgeError: a judge cannot go on; verdicts so far are kept.
        """
        columns = [self.cache.judge(judge, cases) for judge in self.judges]
        return list(zip(*columns, strict=True))
