"""Put the demo's table into README.md, from the committed summary of a real run.

Usage: python tools/update_readme.py [--check]
"""

import io
import json
import sys
from pathlib import Path

from rich.console import Console

from durometer.report.terminal import summary_table

ROOT = Path(__file__).resolve().parent.parent
SUMMARY = ROOT / "benchmarks" / "results" / "demo_summary.json"
BEGIN, END = "<!-- demo:begin", "<!-- demo:end -->"
WIDTH = 110


def table_text(summary: dict[str, object]) -> str:
    """Return the terminal table of a run as plain text."""
    stream = io.StringIO()
    console = Console(file=stream, width=WIDTH, color_system=None, legacy_windows=False)
    console.print(summary_table(summary))
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()).strip("\n")


def with_table(readme: str, table: str) -> str:
    """Return ``readme`` with the text between the marks replaced by ``table``."""
    head, _, rest = readme.partition(BEGIN)
    mark, _, rest = rest.partition("\n")
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}{mark}\n\n```text\n{table}\n```\n\n{END}{tail}"


def main() -> int:
    """Write README.md, or with ``--check`` say whether it is up to date."""
    readme = ROOT / "README.md"
    text = readme.read_text("utf-8")
    fresh = with_table(text, table_text(json.loads(SUMMARY.read_text("utf-8"))))
    if "--check" in sys.argv[1:]:
        return int(fresh != text)
    readme.write_text(fresh, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
