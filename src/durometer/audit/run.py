"""The audit of one model: every check in order, coverage, and what was not examined."""

import datetime
import json
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from durometer import __version__
from durometer.audit.adapter import AdapterSource
from durometer.audit.checks import CHECKS, references
from durometer.audit.config import check_config
from durometer.audit.files import Artefact, check_files, read_artefact
from durometer.audit.lineage import check_lineage, read_claims
from durometer.audit.manifest import check_manifest
from durometer.audit.signing import check_signature
from durometer.audit.template import check_templates, read_templates
from durometer.audit.tensors import open_tensors
from durometer.audit.tokenizer import check_encoding, check_tokenizer, read_tokenizer
from durometer.audit.weights import Weights, check_values, check_weights, read_weights
from durometer.core.errors import ExitCode, InputError
from durometer.findings import (
    Finding,
    Report,
    Severity,
    Status,
    failed,
    found,
    left_out,
    worst_first,
)
from durometer.formats.safetensors import open_regular, shown

__all__ = ["AuditRequest", "audit", "diff", "exit_code"]

Progress = Callable[[str], None]


@dataclass(frozen=True)
class AuditRequest:
    """What to audit, and what with.

    Attributes:
        target: model folder, adapter folder, GGUF or safetensors file.
        base: the model that the target claims to come from, in the same forms.
        also: further models that may have been merged in.
        signature: see ``signing.parse_signature``.
        claim: ``ORG/NAME@COMMIT`` that the target is said to be.
        manifest: SHA-256 manifest, or the JSON report of an earlier audit; written if missing.
        baseline: file of accepted findings.
        behaviour: domain on which model and base are compared; this loads both.
    """

    target: Path
    base: Path | None = None
    also: tuple[Path, ...] = ()
    signature: str | None = None
    claim: str | None = None
    manifest: Path | None = None
    baseline: Path | None = None
    behaviour: str | None = None


def audit(request: AuditRequest, progress: Progress | None = None) -> Report:
    """Return everything that was found, without importing or running anything of the model.

    Args:
        progress: told what is done next, in a few words.

    Raises:
        InputError: the target, the base or another input is not there or cannot be used.
    """
    tell = progress or (lambda text: None)
    accepted = _read_baseline(request.baseline)
    with ThreadPoolExecutor(max_workers=1) as pool:
        tell("reading files")
        subject = read_artefact(request.target, pool)
        if not subject.files and not subject.faults:
            raise InputError(f"{shown(request.target)}: the folder is empty")
        base = read_artefact(request.base, pool) if request.base else None
        findings = [
            replace(each, references=each.references or references(each.check))
            for each in _all_checks(request, subject, base, tell)
        ]
        tell("hashing files")
        inputs = _inputs(request, subject, base)
    findings, taken = _accept(findings, accepted)
    weights = read_weights(subject)
    return Report(
        target=str(request.target),
        findings=worst_first(findings),
        coverage=_coverage(findings, subject, weights),
        not_examined=tuple(_not_examined(findings)),
        inputs=inputs,
        accepted=tuple(taken),
        tool=f"durometer {__version__}",
    )


def _all_checks(
    request: AuditRequest, subject: Artefact, base: Artefact | None, tell: Progress
) -> Iterator[Finding]:
    weights = read_weights(subject)
    base_weights = read_weights(base) if base else None
    tokens = read_tokenizer(subject, weights)
    base_tokens = read_tokenizer(base, base_weights) if base and base_weights else None
    yield from check_files(subject)
    yield from check_weights(subject, weights)
    tell("reading all values")
    yield from check_values(subject, weights)
    yield from check_config(subject, weights, tokens, base, base_tokens)
    tell("rendering the chat template in a child process")
    templates = read_templates(subject, weights)
    theirs = read_templates(base, base_weights) if base and base_weights else None
    yield from check_templates(templates, theirs, set(tokens.special.values()))
    yield from check_tokenizer(subject, weights, tokens, base_tokens)
    yield from check_encoding(subject, base)
    yield from check_manifest(subject, request.manifest)
    yield from check_signature(subject, request.signature)
    tell("reading the weights' numbers")
    forensics = [*_forensics(request, subject, base, tell)]
    yield from forensics
    metadata = next((header.metadata for header in weights.gguf.values()), None)
    claims = read_claims(subject, metadata)
    yield from check_lineage(subject, claims, request.claim, base, forensics)
    yield from _base_itself(base)
    yield from _behaviour(request, tell)


def _forensics(
    request: AuditRequest, subject: Artefact, base: Artefact | None, tell: Progress
) -> Iterator[Finding]:
    """Yield what the numbers show, alone or against the base; both are read tensor by tensor."""
    from durometer.audit import forensics

    if base is None:
        yield left_out("WF-01", "the weights against a base (WF-01 to WF-62)", "no --base given")
        if request.also:
            yield left_out("WF-40", CHECKS["WF-40"][0], "no --base given")
    if base is None and subject.is_adapter:
        yield left_out("WF-11", "the weights of an adapter alone", "no --base given")
        return
    try:
        if base is None:
            yield from forensics.alone(open_tensors(subject))
            return
        origin = open_tensors(base)
        own = AdapterSource(subject.root, origin) if subject.is_adapter else open_tensors(subject)
        also = [open_tensors(read_artefact(path)) for path in request.also]
        yield from forensics.compare(
            own, origin, also, progress=lambda done, of: tell(f"comparing tensors {done}/{of}")
        )
    except InputError as error:
        yield failed("WF-00", "the weights could not be read as numbers", shown(error, 500))


def _base_itself(base: Artefact | None) -> Iterator[Finding]:
    if base is None:
        return
    for fault in (*base.faults, *read_weights(base).faults):
        yield replace(fault, location=f"base: {fault.location}")
    reason = (
        "nothing vouches for the base: compare its hashes in this report with a source you trust"
    )
    yield left_out("PV-02", "authenticity of the base", reason)


def _behaviour(request: AuditRequest, tell: Progress) -> Iterator[Finding]:
    if request.behaviour is None:
        yield left_out("BH-01", "behaviour", "no --behaviour DOMAIN given")
    elif request.base is None:
        yield left_out("BH-01", "behaviour", "no --base to compare with")
    else:
        from durometer.audit.behaviour import check_behaviour

        tell("loading model and base, and asking both")
        yield from check_behaviour(request.target, request.base, request.behaviour)


# --- what the report says about itself -----------------------------------------------------------


def _inputs(request: AuditRequest, subject: Artefact, base: Artefact | None) -> dict[str, Any]:
    return {
        "files": subject.hashes(),
        "base": {"path": str(request.base), "files": base.hashes()} if base else None,
        "also": [str(path) for path in request.also],
        "claim": request.claim,
        "behaviour": request.behaviour,
    }


def _coverage(findings: Sequence[Finding], subject: Artefact, weights: Weights) -> dict[str, Any]:
    counts = {status.value: sum(each.status is status for each in findings) for status in Status}
    return {
        "files": len(subject.files),
        "bytes": sum(file.size for file in subject.files.values()),
        "tensors": weights.tensor_count,
        "compared_share": next(
            (e.evidence.get("compared_share") for e in findings if e.check == "WF-01"), None
        ),
        "checks": len({each.check for each in findings if each.status is not Status.NOT_EXAMINED}),
        "records": counts,
    }


def _not_examined(findings: Sequence[Finding]) -> Iterator[dict[str, str]]:
    for each in findings:
        if each.status in (Status.NOT_EXAMINED, Status.ERROR):
            what = f"{each.title} ({each.location})" if each.location else each.title
            reason = str(each.evidence.get("reason", ""))
            yield {"check": each.check, "what": what, "why": reason, "status": each.status.value}


def exit_code(report: Report, fail_on: Severity, *, allow_incomplete: bool = False) -> ExitCode:
    """Return 1 for findings at or above ``fail_on``, else 3 for what could not be examined."""
    if report.at_least(fail_on):
        return ExitCode.CONDITION
    return ExitCode.COMPLETE if report.complete or allow_incomplete else ExitCode.INCOMPLETE


# --- accepted findings ---------------------------------------------------------------------------


def _read_baseline(path: Path | None) -> list[dict[str, str]]:
    """Return the accepted findings: ``fingerprint``, ``reason`` and ``expires`` (a date) each."""
    if path is None:
        return []
    with open_regular(path) as file:
        raw = file.read(16 << 20)
    try:
        entries = json.loads(raw)["accepted"]
        for entry in entries:
            if not entry["reason"].strip() or not re.fullmatch(
                r"[0-9a-f]{64}", entry["fingerprint"]
            ):
                raise ValueError("an entry without reason or fingerprint")
            datetime.date.fromisoformat(entry["expires"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        form = '{"accepted": [{"fingerprint": ..., "reason": ..., "expires": "YYYY-MM-DD"}]}'
        raise InputError(f"{shown(path)}: not of the form {form} ({shown(error)})") from None
    return list(entries)


def _accept(
    findings: list[Finding], accepted: list[dict[str, str]]
) -> tuple[list[Finding], list[dict[str, Any]]]:
    """Return the findings that remain, and those that the baseline accepts with its reasons."""
    today = datetime.date.today()
    valid = {
        e["fingerprint"]: e for e in accepted if datetime.date.fromisoformat(e["expires"]) >= today
    }
    taken = [
        {**each.as_dict(), "fingerprint": each.fingerprint, **valid[each.fingerprint]}
        for each in findings
        if each.fingerprint in valid and each.status is Status.FOUND
    ]
    gone = {entry["fingerprint"] for entry in taken}
    kept = [each for each in findings if each.fingerprint not in gone]
    for entry in accepted:
        if entry["fingerprint"] not in valid:
            title = "an accepted finding has expired"
            kept.append(found("BL-01", Severity.LOW, title, dict(entry)))
    return kept, taken


# --- two reports ---------------------------------------------------------------------------------


def diff(before: Report, after: Report) -> dict[str, Any]:
    """Return what changed between two reports; a finding gone with its check is no repair."""

    def keyed(report: Report) -> dict[tuple[str, str, str], Finding]:
        return {(each.check, each.location, each.title): each for each in report.problems}

    old, new = keyed(before), keyed(after)
    ran = {each.check for each in after.findings if each.status is not Status.NOT_EXAMINED}
    left = before.inputs.get("files", {}).keys() - after.inputs.get("files", {}).keys()
    gone = [old[key] for key in sorted(old.keys() - new.keys())]
    checked = {id(e) for e in gone if e.check in ran or e.location.partition("#")[0] in left}
    return {
        "new": [new[key].as_dict() for key in sorted(new.keys() - old.keys())],
        "gone": [each.as_dict() for each in gone if id(each) in checked],
        "no_longer_examined": [each.as_dict() for each in gone if id(each) not in checked],
        "changed": [
            {"before": old[key].as_dict(), "after": new[key].as_dict()}
            for key in sorted(old.keys() & new.keys())
            if old[key].fingerprint != new[key].fingerprint
        ],
        "files": _changed(before.inputs.get("files", {}), after.inputs.get("files", {})),
        "base_changed": before.inputs.get("base") != after.inputs.get("base"),
        "tool_changed": before.tool != after.tool,
        "coverage": {"before": before.coverage, "after": after.coverage},
    }


def _changed(old: dict[str, str], new: dict[str, str]) -> dict[str, list[str]]:
    return {
        "changed": sorted(name for name in old.keys() & new.keys() if old[name] != new[name]),
        "added": sorted(new.keys() - old.keys()),
        "removed": sorted(old.keys() - new.keys()),
    }
