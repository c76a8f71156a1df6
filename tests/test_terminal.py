"""The terminal summary: whole numbers at 80 columns, budget first, no markup out of names."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from test_report_html import SECRET, describe, fill, store

from durometer.report.figures import budget_text
from durometer.report.summary import build_summary
from durometer.report.terminal import summary_table
from durometer.trials.store import Store

__all__ = ["store"]  # the fixture


def shown(summary: dict[str, Any], width: int = 80, folder: Path | None = None) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None).print(summary_table(summary, folder))
    return stream.getvalue()


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize(("low", "high"), [(9.0, 10.0), (1023.0, 1024.0), (10_000.0, 20_000.0)])
def test_no_number_is_cut(store: Store, width: int, low: float, high: float) -> None:
    summary = fill(store)
    for tamper in summary["tampers"]:
        tamper["label"] = f"{tamper['name']} (learning_rate=0.00066667, optimizer=sgd_nesterov)"
        for row in tamper["budgets"]:
            row.update(low=low, high=high, intervals=[[low, None], [low, high], [low, high]])
            row.update(high=None, largest_tried=high if row["median"] is None else None)
    text = shown(summary, width)
    assert "…" not in text
    assert all(len(line) <= width for line in text.splitlines())
    for tamper in summary["tampers"]:
        for row in tamper["budgets"]:
            if row["recovery"] == 0.5 and row["axis"] == "steps":
                words = budget_text(row)
                assert f"{words.value} steps" in text
                for end in words.interval.strip("[]").split(", "):
                    assert end in text
        assert "0.00066667" in text
    rows = [line for line in text.splitlines() if line.startswith(("lora", "finetune"))]
    assert all(row.rstrip().endswith(" 100 %") for row in rows)


def test_budget_to_break_comes_first(store: Store) -> None:
    summary = fill(store)
    lines = shown(summary).splitlines()
    assert lines[0].startswith("Budget-to-break")
    text = "\n".join(lines)
    assert text.index("2 steps") < text.index("> 4 steps") < text.index("Broken: lora")
    assert text.index("Broken: lora") < text.index("zero steps") < text.index("Worst case")
    assert "16 ex." in text
    assert "1 diverged" in text


def test_before_and_after_and_the_undefended_subject(store: Store) -> None:
    summary = fill(store)
    (lora,) = (line for line in shown(summary).splitlines() if line.startswith("lora"))
    start, *_, undefended = (word for word in lora.replace(" %", "%").split() if "%" in word)
    assert (start, undefended) == ("0%", "100%")


def test_files_are_named(store: Store) -> None:
    text = shown(fill(store), 120, store.folder)
    assert "report.html, summary.json, trials.jsonl in" in text
    assert "my run" in text


def test_names_are_literal_and_model_text_is_absent(store: Store) -> None:
    summary = fill(store)
    summary["subject"]["name"] = "[bold red]x[/] \x1b[31m\u202e"
    summary["controls"][0]["detail"] = "[link=http://evil.example]y[/link]"
    text = shown(summary, 120)
    assert "[bold red]x[/] \\u001b[31m\\u202e" in text
    assert "[link=http://evil.example]y[/link]" in text
    assert SECRET not in text


def test_interrupted_and_empty_runs(store: Store) -> None:
    describe(store)
    text = shown(build_summary(store))
    assert "no attack recorded" in text
    assert "10 of 10 planned trials are missing" in " ".join(text.split())
    assert "Worst case: not chosen" in text


def test_what_was_not_measured_is_not_a_zero(store: Store) -> None:
    summary = fill(store)
    summary["undefended"] = summary["durability_gain"] = summary["suite"] = None
    for tamper in summary["tampers"]:
        tamper["budgets"] = []
        for checkpoint in tamper["checkpoints"]:
            checkpoint.update(success=None, success_report=None, utility_loss=None)
    text = shown(summary)
    assert "not measured" in text
    assert "n/a" in text
    assert " 0 %" not in text.split("Median over")[0]
