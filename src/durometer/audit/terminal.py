"""A report in a terminal: worst first, then what was covered and what was not examined."""

from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from durometer.findings import Finding, Report, Severity, Status
from durometer.formats.safetensors import shown

__all__ = ["CLEAN", "CLOSING", "SHOWN", "coverage_line", "report_table", "summary_of"]

CLOSING = (
    "No audit can exclude every backdoor: behaviour that only a secret trigger brings out may "
    "leave no trace in files or weights."
)
_STYLES = {
    Severity.CRITICAL: "bold red", Severity.HIGH: "red", Severity.MEDIUM: "yellow",
    Severity.LOW: "cyan", Severity.INFO: "dim",
}  # fmt: skip
SHOWN = (Status.FOUND, Status.ERROR, Status.INCONCLUSIVE)
CLEAN = (Status.PASSED, Status.NOT_APPLICABLE)


def report_table(report: Report) -> RenderableType:
    """Return the report for a terminal; nothing out of the model is obeyed as markup."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for column in ("severity", "status", "check", "finding", "where"):
        table.add_column(column, overflow="fold", no_wrap=column in ("severity", "check"))
    for each in report.findings:
        if each.status in SHOWN:
            table.add_row(*_row(each))
    parts: list[RenderableType] = [Text(f"Audit of {shown(report.target)}", style="bold"), Text()]
    parts.append(table if table.row_count else Text("Nothing found.", style="green"))
    parts += [Text(), Text(coverage_line(report))]
    for base in [report.inputs.get("base")]:
        if base:
            parts.append(Text(f"Base: {shown(base['path'])}; its hashes are in the JSON report."))
    if report.accepted:
        parts.append(Text(f"Accepted by the baseline: {len(report.accepted)} findings."))
    parts += _left_out(report)
    return Group(*parts, Text(), Text(CLOSING, style="dim"))


def _row(finding: Finding) -> tuple[Text, ...]:
    style = _STYLES[finding.severity] if finding.status is Status.FOUND else ""
    title = finding.title
    if finding.status is Status.ERROR:
        title = f"{title}: {finding.evidence.get('reason', '')}"
    return (
        Text(finding.severity.label, style=style),
        Text(finding.status.value),
        Text(finding.check),
        Text(shown(title)),
        Text(shown(finding.location)),
    )


def summary_of(report: Report) -> dict[str, int]:
    """Return the number of problems by severity, worst first."""
    levels = sorted(Severity, reverse=True)
    return {s.label: sum(each.severity is s for each in report.problems) for s in levels}


def coverage_line(report: Report) -> str:
    """Return one line on what was examined."""
    cover: dict[str, Any] = report.coverage
    counts = ", ".join(f"{count} {label}" for label, count in summary_of(report).items() if count)
    share = cover.get("compared_share")
    compared = "" if share is None else f" ({share:.1%} of the parameters against the base's)"
    return (
        f"Examined {cover.get('files', 0)} files ({cover.get('bytes', 0):,} bytes), "
        f"{cover.get('tensors', 0)} tensors{compared}, {cover.get('checks', 0)} checks. "
        f"Findings: {counts or 'none'}."
    )


def _left_out(report: Report) -> list[RenderableType]:
    if not report.not_examined:
        return [Text("Everything was examined.")]
    lines = [f"  {e['check']}  {shown(e['what'])}: {shown(e['why'])}" for e in report.not_examined]
    return [Text(), Text("Not examined:"), *(Text(line) for line in lines)]
