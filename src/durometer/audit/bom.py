"""A report as a CycloneDX 1.6 bill of materials, each property marked measured or declared."""

import json
import uuid
from pathlib import Path
from typing import Any

from durometer.audit.files import read_artefact
from durometer.audit.lineage import Claims, read_claims
from durometer.findings import Finding, Report, Severity

__all__ = ["to_cyclonedx"]


def to_cyclonedx(report: Report) -> str:
    """Return the bill of materials of the audited model.

    What was recomputed from bytes is ``durometer:measured:*``, what its authors wrote is
    ``durometer:declared:*``.
    """
    artefact = read_artefact(Path(report.target))
    claims, config = read_claims(artefact), artefact.json("config.json") or {}
    hashes: dict[str, str] = report.inputs.get("files", {})
    seed = json.dumps([report.target, hashes], sort_keys=True)
    component = {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": Path(report.target).name or report.target,
        "components": [_file(name, digest) for name, digest in hashes.items()],
        "pedigree": {"ancestors": _ancestors(report, claims)},
        "modelCard": {"modelParameters": _parameters(config)},
        "properties": _properties(report, claims, config),
    }
    if claims.licence:
        component["licenses"] = [{"license": {"name": claims.licence}}]
    bom = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, seed)}",
        "version": 1,
        "metadata": {
            "tools": {"components": [{"type": "application", "name": "durometer",
                                      "version": report.tool.rpartition(" ")[2] or "0"}]},
            "component": component,
        },
        "vulnerabilities": [_problem(each) for each in report.problems if each.severity],
    }  # fmt: skip
    return json.dumps(bom, indent=2)


def _file(name: str, digest: str) -> dict[str, Any]:
    is_data = name.endswith((".jinja", ".json", ".txt", ".md", ".model"))
    return {
        "type": "data" if is_data else "file",
        "bom-ref": f"file:{name}",
        "name": name,
        "hashes": [{"alg": "SHA-256", "content": digest}],
    }


def _ancestors(report: Report, claims: Claims) -> list[dict[str, Any]]:
    names = dict.fromkeys(name for names in claims.bases.values() for name in names)
    declared = [
        {"type": "machine-learning-model", "name": name,
         "properties": [{"name": "durometer:declared:base", "value": name}]}
        for name in names
    ]  # fmt: skip
    base = report.inputs.get("base")
    if base:
        lineage = next((each for each in report.findings if each.check == "WF-01"), None)
        value = lineage.title if lineage else "not compared"
        declared.append(
            {"type": "machine-learning-model", "name": Path(base["path"]).name or base["path"],
             "properties": [{"name": "durometer:measured:lineage", "value": value}]}
        )  # fmt: skip
    return declared


def _parameters(config: dict[str, Any]) -> dict[str, Any]:
    architectures = config.get("architectures")
    named = architectures[0] if isinstance(architectures, list) and architectures else ""
    parameters = {
        "architectureFamily": str(config.get("model_type", "")),
        "modelArchitecture": str(named),
    }
    return {key: value for key, value in parameters.items() if value}


def _properties(report: Report, claims: Claims, config: dict[str, Any]) -> list[dict[str, str]]:
    measured = {key: report.coverage.get(key) for key in ("files", "bytes", "tensors")}
    declared = {
        "licence": claims.licence,
        "commit": claims.commit,
        "relation": claims.relation,
        "transformers_version": config.get("transformers_version"),
    }
    return [
        {"name": f"durometer:{kind}:{key}", "value": str(value)}
        for kind, values in (("measured", measured), ("declared", declared))
        for key, value in values.items()
        if value not in (None, "")
    ]


def _problem(finding: Finding) -> dict[str, Any]:
    file = finding.location.partition("#")[0]
    severity = "info" if finding.severity is Severity.INFO else finding.severity.label
    return {
        "bom-ref": f"finding:{finding.fingerprint[:16]}",
        "id": finding.check,
        "description": finding.title,
        "recommendation": finding.advice or "See docs/audit.md.",
        "ratings": [{"severity": severity, "method": "other"}],
        "analysis": {"state": "in_triage"},
        "affects": [{"ref": "model"}],
        "properties": [{"name": "durometer:measured:location", "value": file or "model"}],
    }
