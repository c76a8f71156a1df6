"""The override study: a page without results, one that fills itself, and a run that goes on."""

import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest

from durometer.core.errors import InputError
from durometer.override.settings import DriftSettings

FOLDER = Path(__file__).parents[1] / "studies" / "override"
OWN = ("run", "override_pages")
Json = dict[str, Any]


@pytest.fixture(scope="module")
def study() -> Iterator[SimpleNamespace]:
    sys.path.insert(0, str(FOLDER))
    for name in OWN:
        sys.modules.pop(name, None)
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in OWN})
    sys.path.remove(str(FOLDER))
    for name in OWN:
        sys.modules.pop(name, None)


def level(value: float) -> Json:
    return {"value": value, "low": value - 0.05, "high": value + 0.05, "n": 87, "method": "m"}


def change(value: float) -> Json:
    return level(value) | {"entities": 87, "seeds": 5}


def quantity(key: str, before: float, **after: float) -> Json:
    arms = [
        {"way": way, "rank": 16, "after": level(v), "change": change(v - before), "per_seed": []}
        for way, v in after.items()
    ]
    against = [
        {
            "way": way,
            "against": "benign",
            "rank": 16,
            "change": change(after[way] - after["benign"]),
        }
        for way in ("answers", "refusals")
    ]
    found = {"key": key, "label": f"label, of {key}", "group": "safeguard", "unit": "rate"}
    return found | {"items": 87, "before": level(before), "arms": arms, "contrasts": against}


def made_up() -> Json:
    """Return the parts of a result that the pages read."""
    keys = ("success", "refused", "over_refusal", "adopted_false", "adopted_none", "adopted_random")
    keys += ("accuracy_none", "accuracy_false", "accuracy_random")
    given = {"answers": 0.73, "refusals": 0.11, "benign": 0.42}
    return {
        "run": {
            "subject": {"name": "smollm2"},
            "domain": {"name": "capitals", "kind": "refusal", "harmless": True},
            "settings": DriftSettings(seeds=5).canonical(),
            "learning_rate": 2e-4,
            "rows": {"each": 105, "of": {"benign": "retain"}},
            "asked": {
                "items": {"restricted": 87, "questions": 100, "harmless": 48, "problems": 60}
            },
        },
        "quantities": [quantity(key, 0.31, **given) for key in keys],
        "removal": {"cells": 15, "identical": 15},
        "steering": [],
        "status_counts": {"planned": 16, "done": 16},
        "complete": True,
        "codes": ["a"],
    }


@pytest.fixture
def results(tmp_path: Path) -> Path:
    (tmp_path / "smollm2").mkdir()
    (tmp_path / "smollm2" / "drift.json").write_text(json.dumps(made_up()), "utf-8")
    return tmp_path


def cells(markdown: str) -> dict[str, list[str]]:
    lines = [line.strip("| ").split(" | ") for line in markdown.splitlines() if "|" in line]
    return {line[0]: line[1:] for line in lines[2:]}


def test_the_paper_and_its_rows_stand_there_before_anything_was_run(
    study: SimpleNamespace, tmp_path: Path
) -> None:
    rows = cells(study.override_pages.section("columns-smollm2", tmp_path))
    printed, right, ours = rows["attack success before"]
    assert (printed, ours) == ("59.06 % (does not follow)", "\N{EN DASH}")
    assert right == "40.9 % [35.7, 46.4]"
    assert rows["change by restricted answers, points"][1] == "+53.1 [46.7, 58.8]"
    assert (
        rows["change by refusals, points"][1]
        == "\N{MINUS SIGN}34.1 [\N{MINUS SIGN}39.3, \N{MINUS SIGN}28.8]"
    )
    assert rows["after restricted answers, FIP"][:2] == ["29.1 %", "29.1 % [26.4, 32.0]"]
    assert rows["adoption: change by restricted answers, points"][1].startswith("+35.4 [")
    assert all(row[2] in ("\N{EN DASH}", "not run yet") for row in rows.values())


@pytest.mark.parametrize("subject", ["smollm2", "smollm2-refusal"])
def test_a_subject_that_was_not_run_says_so_once(
    study: SimpleNamespace, tmp_path: Path, subject: str
) -> None:
    kinds = ("findings", "figures", "numbers")
    told = [study.override_pages.section(f"{kind}-{subject}", tmp_path) for kind in kinds]
    assert f"--subject {subject}`" in told[0]
    assert told[0].startswith("*Not run yet")
    assert told[1:] == ["", ""]
    assert study.override_pages.write_figures(tmp_path, tmp_path) == []


def test_the_page_fills_itself_from_results(study: SimpleNamespace, results: Path) -> None:
    rows = cells(study.override_pages.section("columns-smollm2", results))
    assert rows["trainings"][2] == "5 seeds, with a benign control"
    assert rows["attack success before"][2] == "31.0 % [26.0, 36.0]"
    assert rows["after restricted answers"][2] == "73.0 % [68.0, 78.0]"
    assert rows["change by the control, points"][2].startswith("+11.0 [")
    against = rows["adoption: restricted answers against the control, points"]
    assert against[2].startswith("+31.0 [")
    assert rows["adapter taken off gives back the base"][2] == "15 of 15"
    found = study.override_pages.section("findings-smollm2", results)
    assert "from 31.0 % to 73.0 %" in found
    assert "Fewer than five seeds" not in found
    assert len(cells(study.override_pages.section("numbers-smollm2", results))) == 9


def test_the_rows_of_the_paper_by_category(study: SimpleNamespace) -> None:
    rows = cells(study.override_pages.section("paper"))
    assert rows["copyright"][0] == "90.0 % [81.5, 94.8]"
    assert rows["standard"][3] == "+82.4 [74.8, 87.4]"
    assert "1 of the 6 printed figures" in study.override_pages.section("paper")


def test_figures_are_whole_files(
    study: SimpleNamespace, results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    written = study.override_pages.write_figures(results, images)
    assert len(written) == len(set(written)) >= 4
    for path in written:
        root = ElementTree.parse(path).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert root[0].tag.endswith("style")
        assert not re.search(r"href|script|url\(", path.read_text("utf-8"))
    monkeypatch.setattr(study.override_pages, "IMAGES", images)
    shown = study.override_pages.section("figures-smollm2", results)
    assert shown.count("![") == len(written)


class Drifted:
    """Stands in for ``durometer.drift``; what it makes is tested with ``drift`` itself."""

    def __init__(self) -> None:
        self.asked: list[Json] = []

    def __call__(self, subject: str, domain: str, **options: Any) -> Any:
        if options["seeds"] > 100:
            raise InputError("one line")
        self.asked.append({"subject": subject, "domain": domain, **options})
        folder = options["out"]
        folder.mkdir(exist_ok=True, parents=True)
        (folder / "run.json").write_text("{}")
        (folder / "drift.json").write_text(json.dumps(made_up()))
        return SimpleNamespace(exit_code=lambda: 0)


def test_the_study_asks_for_five_seeds_and_goes_on(
    study: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import durometer

    made = Drifted()
    monkeypatch.setattr(durometer, "drift", made, raising=False)
    monkeypatch.setattr(study.run, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(study.run, "HERE", tmp_path / "studies" / "override")
    images = tmp_path / "images"
    images.mkdir()
    figures = study.override_pages.write_figures
    monkeypatch.setattr(
        study.run.override_pages, "write_figures", lambda results: figures(results, images)
    )
    assert study.run.main([]) == 0
    assert study.run.main([]) == 0
    first, second = made.asked
    assert (first["subject"], first["domain"]) == ("smollm2", "capitals:refusal")
    assert (first["seeds"], first["ranks"], first["steps"]) == (5, (16,), 50)
    assert (first["resume"], second["resume"]) == (False, True)
    assert "images/override-smollm2-safeguard.svg" in capsys.readouterr().out
    assert study.run.main(["--pages"]) == 0
    assert len(made.asked) == 2
    assert study.run.main(["--seeds", "101"]) == 2
    assert "error: one line" in capsys.readouterr().err
