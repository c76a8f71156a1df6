"""A report as SARIF 2.1.0, the form that code-scanning services take."""

import json
from typing import Any
from urllib.parse import quote

from durometer.audit.checks import CHECKS
from durometer.findings import Finding, Report, Severity, Status

__all__ = ["to_sarif"]

_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
_HELP = "https://durometer.readthedocs.io"
_LEVEL = {Severity.CRITICAL: "error", Severity.HIGH: "error", Severity.MEDIUM: "warning"}
_SCORE = {
    Severity.CRITICAL: "9.5", Severity.HIGH: "8.0", Severity.MEDIUM: "5.5", Severity.LOW: "2.5",
    Severity.INFO: "0.0",
}  # fmt: skip
_KIND = {
    Status.FOUND: "fail",
    Status.PASSED: "pass",
    Status.INCONCLUSIVE: "review",
    Status.NOT_APPLICABLE: "notApplicable",
    Status.NOT_EXAMINED: "open",
}


def to_sarif(report: Report) -> str:
    """Return the report as SARIF text; errors become notifications of the run."""
    results = [each for each in report.findings if each.status is not Status.ERROR]
    errors = [each for each in report.findings if each.status is Status.ERROR]
    log = {
        "$schema": _SCHEMA,
        "version": "2.1.0",
        "runs": [
            {
                "tool": {"driver": _driver(report, results)},
                "invocations": [
                    {
                        "executionSuccessful": not errors,
                        "toolExecutionNotifications": [_notification(each) for each in errors],
                    }
                ],
                "results": [_result(each) for each in results],
                "properties": {"coverage": report.coverage},
            }
        ],
    }
    return json.dumps(log, indent=2)


def _driver(report: Report, results: list[Finding]) -> dict[str, Any]:
    worst: dict[str, Finding] = {}
    for each in results:
        if each.check not in worst or each.severity > worst[each.check].severity:
            worst[each.check] = each
    return {
        "name": "durometer",
        "version": report.tool.rpartition(" ")[2] or "0",
        "informationUri": f"{_HELP}/audit.html",
        "rules": [_rule(worst[check]) for check in sorted(worst)],
    }


def _rule(finding: Finding) -> dict[str, Any]:
    tags = [
        f"external/cwe/{ref.lower()}" if ref.startswith("CWE-") else ref
        for ref in finding.references
    ]
    page = "forensics" if finding.check.startswith("WF-") else "audit"
    return {
        "id": finding.check,
        "shortDescription": {"text": CHECKS[finding.check][0]},
        "helpUri": f"{_HELP}/{page}.html#{finding.check.lower()}",
        "properties": {
            "tags": ["security", *dict.fromkeys(tags)],
            "security-severity": _SCORE[finding.severity],
        },
    }


def _result(finding: Finding) -> dict[str, Any]:
    kind = _KIND[finding.status]
    text = finding.title + (f". {finding.advice}" if finding.advice else "")
    return {
        "ruleId": finding.check,
        "kind": kind,
        "level": _LEVEL.get(finding.severity, "note") if kind == "fail" else "none",
        "message": {"text": text},
        "locations": [{"physicalLocation": _place(finding)}],
        "partialFingerprints": {"durometer/v1": finding.fingerprint},
        "properties": {
            "evidence": finding.evidence,
            "severity": finding.severity.label,
            "confidence": finding.confidence,
        },
    }


def _place(finding: Finding) -> dict[str, Any]:
    name, _, inside = finding.location.partition("#")
    line = inside.rpartition(":")[2]
    position = finding.evidence.get("position")
    region: dict[str, Any] = {"startLine": int(line) if line.isdigit() and int(line) else 1}
    if isinstance(position, int) and not line.isdigit():
        region = {"byteOffset": position}
    return {"artifactLocation": {"uri": quote(name or ".")}, "region": region}


def _notification(finding: Finding) -> dict[str, Any]:
    reason = finding.evidence.get("reason", "")
    return {
        "level": "error",
        "message": {
            "text": f"{finding.check}: {finding.title}: {finding.location} {reason}".strip()
        },
    }
