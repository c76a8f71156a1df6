"""A report as one HTML page that loads nothing."""

import json
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from durometer.audit.terminal import CLEAN, CLOSING, SHOWN, coverage_line, summary_of
from durometer.findings import Report
from durometer.formats.safetensors import shown

__all__ = ["to_html"]


def to_html(report: Report) -> str:
    """Return the page; all text out of the model is escaped and shown as data."""
    environment = Environment(
        loader=PackageLoader("durometer.audit"), autoescape=True, undefined=StrictUndefined
    )
    environment.filters["shown"] = lambda text: shown(text, 2000)
    environment.filters["evidence"] = _evidence
    return environment.get_template("audit.html").render(
        report=report,
        problems=[each for each in report.findings if each.status in SHOWN],
        passed=[each for each in report.findings if each.status in CLEAN],
        counts=summary_of(report),
        coverage=coverage_line(report),
        closing=CLOSING,
        plots=_plots(report),
    )


def _evidence(value: Any) -> str:
    text = json.dumps(value, indent=1, ensure_ascii=True, default=str)
    return text if len(text) < 6000 else f"{text[:6000]}\n..."


def _plots(report: Report) -> list[dict[str, Any]]:
    """Return bars of the numbers by layer or role in the evidence of weight findings."""
    plots = []
    for each in report.findings:
        for key, values in each.evidence.items():
            if not key.endswith(("_by_layer", "_by_role")) or not values:
                continue
            numbers = [float(value) for value in values.values()]
            top = max(map(abs, numbers)) or 1.0
            bars = [
                {"name": name, "value": f"{number:.4g}", "height": round(60 * abs(number) / top, 1)}
                for name, number in zip(values, numbers, strict=True)
            ]
            title = f"{each.check}: {key.replace('_', ' ')}, at most {max(numbers, key=abs):.3g}"
            plots.append({"title": title, "bars": bars})
    return plots
