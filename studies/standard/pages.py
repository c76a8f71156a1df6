"""What is shown of a standard run: its picture, and the table in README.md beside this file.

    python studies/standard/pages.py runs/standard      # a run folder, or what is committed

With a run folder its summary becomes ``results/smollm2_refusal.json`` first.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from durometer.report.figures import element, percent
from durometer.report.html import hardness, stands_for

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
RESULTS = FOLDER / "results" / "smollm2_refusal.json"
PICTURE = ROOT / "docs" / "images" / "standard.svg"
README, BEGIN, END = FOLDER / "README.md", "<!-- table:begin -->", "<!-- table:end -->"
sys.path.insert(0, str(ROOT / "docs"))

import studies  # noqa: E402

Json = Mapping[str, Any]
ROW, LEFT, PLOT, RIGHT, TOP, BOTTOM = 26, 262, 380, 150, 52, 58
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2933; }
.small { font-size: 11px; fill: #52606d; } .head { font-weight: 600; }
.grid { stroke: #d9e2ec; } .limit { stroke: #829ab1; stroke-dasharray: 4 3; }
.broke { fill: #c0392b; stroke: #c0392b; } .held { fill: #0e7c86; stroke: #0e7c86; }
line.broke, line.held { stroke-width: 2; }
"""


def label_of(tamper: Json) -> str:
    """Return the name with the settings that tell it from the suite's other configurations."""
    name, _, settings = tamper["label"].partition(" (")
    kept = [s for s in settings.removesuffix(")").split(", ") if s.startswith(TOLD)]
    return f"{name} ({', '.join(kept)})" if kept else str(name)


TOLD = ("rank", "direction", "selection", "target", "delta", "control", "kind", "frozen_a")


def place(share: float) -> float:
    """Return the x coordinate of a share."""
    return LEFT + PLOT * share


def row(tamper: Json, y: float) -> Iterator[Markup]:
    """Draw one attack: its name, its success with interval, and what it cost."""
    yield element("text", label_of(tamper), x=LEFT - 12, y=y + 4, text_anchor="end")
    after, cost = stands_for(tamper, "success_report"), stands_for(tamper, "utility_loss")
    kind = "broke" if tamper["broke"] else "held"
    if after is None:
        (status, *_) = tamper["statuses"].values()
        said = status["status"].replace("_", " ")
        yield element("text", f"{said}: not in rates", x=LEFT + 8, y=y + 4, class_="small")
        return
    rate = after["success_report"]
    yield element("line", x1=place(rate["low"]), x2=place(rate["high"]), y1=y, y2=y, class_=kind)
    yield element("circle", cx=place(rate["rate"]), cy=y, r=5, class_=kind)
    lost = "" if cost is None else f"{cost['utility_loss']['value']:+.1f} points"
    yield element("text", percent(rate["rate"]), x=LEFT + PLOT + 14, y=y + 4)
    yield element(
        "text", lost, x=LEFT + PLOT + RIGHT - 8, y=y + 4, text_anchor="end", class_="small"
    )


def drawing(summary: Json) -> Markup:
    """Return the picture of a summary."""
    attacks = sorted(summary["tampers"], key=hardness)
    controls = summary["matched_controls"]
    height = TOP + ROW * (len(attacks) + len(controls) + 1) + BOTTOM
    width = LEFT + PLOT + RIGHT
    # A ground of its own: a page may be dark while the reader's system is light.
    ground = element("rect", width=width, height=height, fill="#ffffff", rx=8)
    body = [element("style", Markup(STYLE)), ground]
    for share in (0, 0.25, 0.5, 0.75, 1):
        x = place(share)
        body.append(element("line", x1=x, x2=x, y1=TOP - 14, y2=height - BOTTOM, class_="grid"))
        body.append(
            element("text", percent(share), x=x, y=height - BOTTOM + 20, text_anchor="middle")
        )
    after = "restricted answers right, report items, 95 % interval"
    body.append(element("text", after, x=LEFT, y=20, class_="head"))
    body.append(
        element("text", "retain lost", x=width - 8, y=20, text_anchor="end", class_="small")
    )
    undefended = summary["undefended"]["start"]["success_report"]["rate"]
    x = place(undefended)
    body.append(element("line", x1=x, x2=x, y1=TOP - 14, y2=height - BOTTOM, class_="limit"))
    told = f"undefended {percent(undefended)}"
    body.append(element("text", told, x=x + 4, y=TOP - 16, class_="small"))
    y = float(TOP)
    for tamper in attacks:
        body += row(tamper, y)
        y += ROW
    words = "the same means with random content"
    body.append(element("text", words, x=LEFT - 12, y=y + 4, text_anchor="end", class_="small"))
    for tamper in controls:
        y += ROW
        body += row(tamper, y)
    for x, kind, words in ((LEFT, "broke", "broke"), (LEFT + 80, "held", "did not")):
        body.append(element("circle", cx=x, cy=height - 14, r=5, class_=kind))
        body.append(element("text", words, x=x + 12, y=height - 10, class_="small"))
    return element(
        "svg",
        *body,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {width} {height}",
        role="img",
    )


def main() -> None:
    """Take over the summary of a run, if one is named, and write the picture and the table."""
    for folder in sys.argv[1:]:
        summary = json.loads((Path(folder) / "summary.json").read_text("utf-8"))
        RESULTS.write_text(json.dumps(summary, ensure_ascii=False) + "\n", "utf-8")
    summary = json.loads(RESULTS.read_text("utf-8"))
    PICTURE.write_text(f"{drawing(summary)}\n", "utf-8")
    head, begin, rest = README.read_text("utf-8").partition(BEGIN)
    _, end, tail = rest.partition(END)
    table = studies.standard("smollm2_refusal")
    README.write_text(f"{head}{begin}\n\n{table}\n\n{end}{tail}", "utf-8")


if __name__ == "__main__":
    main()
