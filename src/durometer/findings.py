"""What an audit or a probe found: evidence with a status and a severity, never an accusation."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from enum import IntEnum, StrEnum
from typing import Any

from durometer.core.errors import InputError

__all__ = [
    "SCHEMA_VERSION",
    "Finding",
    "Report",
    "Severity",
    "Status",
    "failed",
    "found",
    "left_out",
    "passed",
    "unsure",
    "worst_first",
]

SCHEMA_VERSION = 1
"""Version of the JSON form of a report."""


class Severity(IntEnum):
    """How much a finding matters to somebody who deploys the artefact as what it claims to be."""

    INFO = 0
    LOW = 1
    MEDIUM = 2
    HIGH = 3
    CRITICAL = 4

    @property
    def label(self) -> str:
        """The word shown and stored: ``info`` to ``critical``."""
        return self.name.lower()

    @classmethod
    def of(cls, label: str) -> "Severity":
        """Return the severity of that name; raise InputError if there is none."""
        try:
            return cls[label.upper()]
        except KeyError:
            known = ", ".join(each.label for each in cls)
            raise InputError(f"severity '{label}': not one of {known}") from None


class Status(StrEnum):
    """How a check ended; only ``passed`` and ``not_applicable`` may be read as clean.

    Attributes:
        FOUND: the evidence meets the check's rule.
        PASSED: examined completely, nothing found.
        INCONCLUSIVE: examined, and the evidence does not tell.
        NOT_APPLICABLE: there is nothing of this kind in the artefact.
        NOT_EXAMINED: a base, an option or an extra that it needs was not given; no error.
        ERROR: something could not be read or examined; the audit is incomplete.
    """

    FOUND = "found"
    PASSED = "passed"
    INCONCLUSIVE = "inconclusive"
    NOT_APPLICABLE = "not_applicable"
    NOT_EXAMINED = "not_examined"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check says about one place.

    Attributes:
        check: id such as ``FF-02``; see ``docs/audit.md``.
        status: how it ended.
        severity: what it would mean; read it together with ``status``.
        title: one line, worded as evidence.
        evidence: what was seen, JSON-able; numbers, names, positions.
        location: relative path, with ``#`` and a tensor, key or member where there is one.
        advice: what the user can do.
        references: ids of weaknesses, techniques, advisories, arXiv numbers.
        confidence: ``low``, ``medium`` or ``high``.
    """

    check: str
    status: Status
    severity: Severity
    title: str
    evidence: dict[str, Any] = field(default_factory=dict)
    location: str = ""
    advice: str = ""
    references: tuple[str, ...] = ()
    confidence: str = "high"

    @property
    def fingerprint(self) -> str:
        """SHA-256 over check, place and evidence: the same finding in another run has the same."""
        parts = [self.check, self.location, self.status.value, self.evidence]
        text = json.dumps(parts, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        values = asdict(self)
        return values | {"severity": self.severity.label, "references": list(self.references)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Finding":
        """Return the finding of a JSON form; KeyError or ValueError if it is none."""
        known = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        known["severity"] = Severity.of(str(values["severity"]))
        known["status"] = Status(values["status"])
        known["references"] = tuple(values.get("references", ()))
        return cls(**known)


@dataclass(frozen=True, slots=True)
class Report:
    """All findings about one target.

    Attributes:
        target: what was audited, as the user named it.
        findings: worst first, those that say "clean" or "not examined" included.
        coverage: counts of what was examined, by name.
        not_examined: what was not, each with the reason.
        inputs: SHA-256 of every file of the target (``files``) and of the base (``base``), and
            what else was given.
        accepted: findings that a baseline of the user accepts, with its reasons.
        tool: version of durometer.
    """

    target: str
    findings: tuple[Finding, ...]
    coverage: dict[str, Any] = field(default_factory=dict)
    not_examined: tuple[dict[str, str], ...] = ()
    inputs: dict[str, Any] = field(default_factory=dict)
    accepted: tuple[dict[str, Any], ...] = ()
    tool: str = ""

    @property
    def problems(self) -> tuple[Finding, ...]:
        """The findings with status ``found``."""
        return tuple(each for each in self.findings if each.status is Status.FOUND)

    @property
    def complete(self) -> bool:
        """Whether nothing failed to be read or examined."""
        return all(each.status is not Status.ERROR for each in self.findings)

    def at_least(self, severity: Severity) -> tuple[Finding, ...]:
        """Return the problems of that severity and above."""
        return tuple(each for each in self.problems if each.severity >= severity)

    def to_json(self) -> str:
        """Return the report as JSON text."""
        values = {
            "schema_version": SCHEMA_VERSION,
            "tool": self.tool,
            "target": self.target,
            "inputs": self.inputs,
            "coverage": self.coverage,
            "findings": [each.as_dict() for each in self.findings],
            "not_examined": list(self.not_examined),
            "accepted": list(self.accepted),
        }
        return json.dumps(values, indent=2, sort_keys=False)

    @classmethod
    def from_json(cls, text: str, where: str = "report") -> "Report":
        """Return the report of a JSON text; ``where`` names it in the InputError."""
        try:
            values = json.loads(text)
            if values["schema_version"] != SCHEMA_VERSION:
                version = values["schema_version"]
                raise InputError(f"{where}: version {version} of the format, not {SCHEMA_VERSION}")
            return cls(
                target=values["target"],
                findings=tuple(Finding.from_dict(each) for each in values["findings"]),
                coverage=values["coverage"],
                not_examined=tuple(values["not_examined"]),
                inputs=values["inputs"],
                accepted=tuple(values["accepted"]),
                tool=values["tool"],
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"{where}: not the JSON report of an audit ({error!r})") from None


def found(
    check: str,
    severity: Severity,
    title: str,
    evidence: Mapping[str, Any] | None = None,
    at: str = "",
    advice: str = "",
    references: tuple[str, ...] = (),
) -> Finding:
    """Return a finding whose evidence meets the check's rule."""
    seen = dict(evidence or {})
    return Finding(check, Status.FOUND, severity, title, seen, at, advice, references)


def passed(check: str, title: str, **evidence: Any) -> Finding:
    """Return the record of a check that examined everything and found nothing."""
    return Finding(check, Status.PASSED, Severity.INFO, title, evidence)


def unsure(
    check: str, severity: Severity, title: str, at: str = "", advice: str = "", **evidence: Any
) -> Finding:
    """Return the record of a check whose evidence does not tell."""
    return Finding(check, Status.INCONCLUSIVE, severity, title, evidence, at, advice)


def left_out(check: str, title: str, reason: str) -> Finding:
    """Return the record of a check that was not run, for want of what ``reason`` names."""
    return Finding(check, Status.NOT_EXAMINED, Severity.INFO, title, {"reason": reason})


def failed(check: str, title: str, reason: object, at: str = "") -> Finding:
    """Return the record of something that could not be read or examined."""
    return Finding(check, Status.ERROR, Severity.HIGH, title, {"reason": str(reason)}, at)


def worst_first(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Return the findings by what a reader should see first."""
    order = list(Status)
    rank = {Status.FOUND: 0, Status.ERROR: 1, Status.INCONCLUSIVE: 2}
    return tuple(
        sorted(
            findings,
            key=lambda each: (
                rank.get(each.status, 3 + order.index(each.status)),
                -each.severity,
                each.check,
                each.location,
            ),
        )
    )
