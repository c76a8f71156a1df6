"""``durometer audit`` and its Python form; neither loads torch unless behaviour is asked for."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, Group
from rich.text import Text

from durometer.audit.run import AuditRequest, audit, diff, exit_code
from durometer.console import say, show
from durometer.core.errors import ExitCode, InputError, StorageError
from durometer.findings import Report, Severity
from durometer.formats.safetensors import open_regular, shown

__all__ = ["audit_model", "run_audit"]

DIFF = "diff"


def audit_model(
    target: str | Path,
    *,
    base: str | Path | None = None,
    also: Sequence[str | Path] = (),
    signature: str | None = None,
    claim: str | None = None,
    manifest: str | Path | None = None,
    baseline: str | Path | None = None,
    behaviour: str | None = None,
) -> Report:
    """Audit a downloaded model without loading it; the same as ``durometer audit``.

    Args:
        target: model or adapter folder, GGUF or safetensors file.
        base: the model that it claims to come from.
        also: further models that may have been merged in.
        signature: model-signing bundle, ``FILE:key=PUBLIC_KEY`` and the like.
        claim: ``ORG/NAME@COMMIT`` that it is said to be.
        manifest: SHA-256 manifest to hold the files against; written if it does not exist.
        baseline: file of accepted findings.
        behaviour: domain on which model and base are compared; this loads both.

    Raises:
        InputError: one of the inputs cannot be used as it is.
    """
    return audit(
        AuditRequest(
            target=Path(target),
            base=Path(base) if base is not None else None,
            also=tuple(Path(each) for each in also),
            signature=signature,
            claim=claim,
            manifest=Path(manifest) if manifest is not None else None,
            baseline=Path(baseline) if baseline is not None else None,
            behaviour=behaviour,
        )
    )


def run_audit(
    words: Sequence[str],
    request: AuditRequest,
    *,
    form: str,
    fail_on: str,
    allow_incomplete: bool,
    out: Path | None,
) -> int:
    """Audit, or compare two reports, print or write the result and return the exit code.

    Args:
        words: the command's arguments: the target, or ``diff`` and two JSON reports.
    """
    if words[0] == DIFF:
        return _run_diff(words[1:])
    if len(words) > 1:
        raise InputError(f"audit: one model at a time, not also {shown(words[1])}")
    severity = Severity.of(fail_on)
    report = _audit(request)
    if form == "text" and out is None:
        from durometer.audit.terminal import report_table

        show(report_table(report))
    else:
        _put(_written(report, form), out)
    return exit_code(report, severity, allow_incomplete=allow_incomplete)


def _audit(request: AuditRequest) -> Report:
    """Return the report, and show on a terminal what is being done meanwhile."""
    console = Console(stderr=True)
    if not console.is_terminal:
        return audit(request)
    with console.status("") as status:
        return audit(request, progress=status.update)


def _written(report: Report, form: str) -> str:
    """Return the report in one of the forms that are text."""
    if form == "json":
        return report.to_json()
    if form == "sarif":
        from durometer.audit.sarif import to_sarif

        return to_sarif(report)
    if form == "cyclonedx":
        from durometer.audit.bom import to_cyclonedx

        return to_cyclonedx(report)
    if form == "html":
        from durometer.audit.html import to_html

        return to_html(report)
    return _plain(report)


def _plain(report: Report) -> str:
    from durometer.audit.terminal import report_table

    console = Console(width=160, color_system=None)
    with console.capture() as text:
        console.print(report_table(report))
    return "\n".join(line.rstrip() for line in text.get().splitlines())


def _put(text: str, out: Path | None) -> None:
    if out is None:
        print(text)
        return
    try:
        out.write_text(text + "\n", "utf-8")
    except OSError as error:
        raise StorageError(f"{shown(out)}: cannot be written ({error.strerror})") from None
    say(f"written: {shown(out)}")


def _run_diff(paths: Sequence[str]) -> int:
    if len(paths) != 2:
        raise InputError("audit diff: name two JSON reports, made with --format json")
    reports = []
    for path in paths:
        with open_regular(Path(path)) as file:
            text = file.read(256 << 20).decode("utf-8", "replace")
        reports.append(Report.from_json(text, shown(path)))
    changes = diff(*reports)
    lines = [
        Text(f"{kind.replace('_', ' ')}: {each['severity']} {each['check']} {shown(each['title'])}")
        for kind in ("new", "gone", "no_longer_examined")
        for each in changes[kind]
    ]
    lines += [Text(f"changed: {shown(each['after']['title'])}") for each in changes["changed"]]
    lines += [
        Text(f"files {kind}: {', '.join(map(shown, names))}")
        for kind, names in changes["files"].items()
        if names
    ]
    flags = {"base_changed": "another base, or one more", "tool_changed": "another durometer"}
    lines += [Text(f"not alike: {text}") for name, text in flags.items() if changes[name]]
    show(Group(*(lines or [Text("No difference.")])))
    return ExitCode.CONDITION if changes["new"] else ExitCode.COMPLETE
