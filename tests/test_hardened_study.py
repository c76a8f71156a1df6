"""The study of hardened models: rows that give every figure again, its tables, going on."""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cli_world
import pytest
import records
import tiny_world
from records import checkpoint

from durometer.cli import main
from durometer.report.summary import build_summary, reference_tables
from durometer.safeguards.base import safeguard_registry
from durometer.safeguards.harden import parse_safeguards
from durometer.subjects.record import RECORD
from durometer.trials.record import TrialRecord
from durometer.trials.store import Store
from durometer.trials.suites import MeasuringPlan

Json = dict[str, Any]
FOLDER = Path(__file__).parents[1] / "studies" / "hardened"
OWN = ("hardened_plan", "hardened_rows", "hardened_summary", "hardened_pages", "run", "common")
STEPS = (2, 4, 8)
COST = {
    "steps": 80,
    "passes": {"weights": 160},
    "all_passes": 160,
    "reference_forwards": 80,
    "tokens": 9000,
    "attacks": 0,
    "diverged_attacks": 0,
    "seconds": 61.5,
    "peak_memory": 2_500_000_000,
}


@pytest.fixture(scope="module")
def study() -> Iterator[SimpleNamespace]:
    """The study's modules; they are scripts, so their folder is no package."""
    sys.path.insert(0, str(FOLDER))
    for name in OWN:
        sys.modules.pop(name, None)
    yield SimpleNamespace(**{name: __import__(name) for name in OWN})
    sys.path.remove(str(FOLDER))
    for name in OWN:
        sys.modules.pop(name, None)


# ---- made-up runs --------------------------------------------------------------------------


def subject(name: str, digit: str) -> Json:
    source = {"kind": "folder", "location": name, "undefended": "", "reference": ""}
    prints = {"fingerprint": digit * 64, "subject_fingerprint": digit * 64}
    about = {"name": name, "parameters": 900_000, "dtype": "bfloat16", "notes": []}
    return {**about, **prints, "source": source | {"revision": ""}}


def trials_of(breaks: dict[str, Sequence[int | None]], retain: int) -> list[TrialRecord]:
    """Return trials of which every seed breaks at the step given, None: never."""
    made = [
        records.zero(select=0, report=0, retain=retain),
        records.zero(role="undefended", select=40, report=40, retain=40),
        records.zero(role="reference", select=0, report=0, retain=40),
    ]
    for tamper, seeds in breaks.items():
        end = checkpoint(8, 40, 40, retain=40)
        made.append(records.trial(end, role="undefended", purpose="control", tamper=tamper))
        for seed, at in enumerate(seeds, 1):
            stops = [
                checkpoint(s, *[36 if at and s >= at else 0] * 2, retain=retain) for s in STEPS
            ]
            made.append(records.trial(*stops, seed=seed, tamper=tamper))
            early = [checkpoint(s, 36, 36, retain=40) for s in STEPS]
            made.append(records.trial(*early, seed=seed, tamper=tamper, role="reference"))
    for number, trial in enumerate(made):
        trial.key, trial.environment = str(number), {"threads": 2, "dtype": "bfloat16"}
    return made


def write_model(
    folder: Path,
    spec: str,
    breaks: dict[str, Sequence[int | None]] | None,
    *,
    digit: str = "a",
    retain: int = 40,
) -> None:
    """Write the record of a hardened model, and a finished run on it."""
    folder.mkdir(parents=True)
    rate = {"restricted": {"rate": 0.01, "items": 80}, "retain": {"rate": 0.8, "items": 100}}
    record = {
        "domain": {"spec": "toys"},
        "dtype": "float32",
        "threads": 2,
        "fingerprint": digit * 64,
        "reference": "",
        "request": {"safeguards": [spec], "seed": 7},
        "safeguards": [{"name": spec.partition(":")[0], "access": "weights", "cost": COST}],
        "before_any_tamper": {"undefended": rate, "hardened": rate},
    }
    (folder / RECORD).write_text(json.dumps(record), "utf-8")
    if breaks is None:
        return
    trials = trials_of(breaks, retain)
    store = Store(folder / "stress")
    names = {"subject": (str(folder), digit), "undefended": ("bare", "0"), "reference": ("p", "9")}
    domain = {"name": "toys", "kind": "knowledge", "description": "", "chance": 0.0}
    described: Json = {
        "request": {"subject": str(folder), "domain": "toys", "tampers": []},
        "subjects": {role: subject(*about) for role, about in names.items()},
        "domain": domain | {"harmless": True, "hash": "h" * 64},
        "suite": {
            "name": "quick",
            "claim_grade": False,
            "seeds": 3,
            "steps": 8,
            "plan": MeasuringPlan(utility_limit=10.0).canonical(),
            "attacks": [{"tamper": tamper, "settings": {}} for tamper in breaks],
        },
        "planned": len(trials),
        "wall_seconds": 12.0,
    }
    for name, value in described.items():
        store.describe(name, value)
    for trial in trials:
        store.add(trial)
    store.close()


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder with three models; what was hardened by ``rep_select`` has no run."""
    folder = tmp_path_factory.mktemp("work")
    light = "preset=light"
    write_model(folder / "knowledge-random_mapping", f"random_mapping:{light}", None, digit="9")
    write_model(
        folder / "knowledge-rmu",
        f"rmu:{light}",
        {"lora": (4, 8), "finetune": (None, None, 2), "benign_finetune": (None,)},
    )
    write_model(folder / "knowledge-tar", f"tar:{light}", {"lora": (8,)}, digit="b", retain=0)
    write_model(
        folder / "knowledge-rep_select",
        "rep_select:directions_of=retain,measured_rows=64",
        None,
        digit="c",
    )
    failure = {"command": "stress", "exit_code": 2, "said": "error: nothing to break"}
    (folder / "failures.json").write_text(json.dumps({"knowledge-rep_select": failure}), "utf-8")
    return folder


@pytest.fixture(scope="module")
def results(study: SimpleNamespace, work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    study.run.Study(work).collect(folder)
    study.run.recompute(folder, {"cpu": "made up", "memory_gib": 1})
    return folder


def summary_in(results: Path) -> Json:
    found: Json = json.loads((results / "summary.json").read_text("utf-8"))
    return found


def model(results: Path, name: str) -> Json:
    models = summary_in(results)["kinds"]["knowledge"]["models"]
    return next(dict(m) for m in models if m["name"] == name)


# ---- rows ----------------------------------------------------------------------------------


def test_rows_give_what_the_run_itself_gives(
    study: SimpleNamespace, work: Path, results: Path, tmp_path: Path
) -> None:
    rows = json.loads((results / "rows" / "knowledge-rmu.json").read_text("utf-8"))
    study.hardened_rows.written(rows, tmp_path / "again", "")
    found = []
    for folder in (work / "knowledge-rmu", tmp_path / "again"):
        store = Store.open(folder / "stress")
        found.append((build_summary(store), reference_tables(store)))
        store.close()
    (original, tables), (again, tables_again) = found
    assert tables_again == tables
    looked = ("tampers", "controls", "undefended", "reference", "durability_gain", "suite")
    for name in (*looked, "status_counts", "verdict", "worst", "wall_seconds", "complete"):
        expected, given = original[name], again[name]
        if name in ("undefended", "reference"):
            expected, given = ({**x, "subject": None} for x in (expected, given))
        assert given == expected, name


def test_rows_hold_no_text_and_no_path_of_the_machine(work: Path, results: Path) -> None:
    for path in results.rglob("*.json"):
        text = path.read_text("utf-8")
        assert str(work) not in text
        assert "outcomes text" not in text


def test_too_many_readings_are_refused(study: SimpleNamespace) -> None:
    made = records.zero(select=40)
    made.checkpoints[0].items = [
        {**item, "correct": number / 100}
        for number, item in enumerate(made.checkpoints[0].items * 2)
    ]
    with pytest.raises(ValueError, match="letters"):
        study.hardened_rows.trimmed([made])


# ---- figures -------------------------------------------------------------------------------


def test_what_broke_first_and_what_did_not(results: Path) -> None:
    rmu = model(results, "rmu")
    first = rmu["first"]["within"]
    # One seed of three broke under finetune at 2 steps: less computation than lora's median.
    assert first["label"] == "finetune"
    assert (first["steps"]["censored"], first["steps"]["seeds"]) == (2, 3)
    assert [a["label"] for a in rmu["not_broken"]["within"]] == ["benign_finetune"]
    lora = next(a for a in rmu["attacks"] if a["label"] == "lora")
    row = next(b for b in lora["budgets"] if b["recovery"] == 0.5 and b["within_limit"])
    assert row["intervals"] == [[2.0, 4.0], [4.0, 8.0]]
    assert rmu["training"]["passes"] == 160
    assert rmu["training"]["peak_memory"] == 2_500_000_000
    assert rmu["start"]["success"]["rate"] == 0
    assert rmu["retain_points_lost"]["value"] == 0


def test_a_ruined_model_breaks_without_the_limit_alone(results: Path) -> None:
    tar = model(results, "tar")
    assert tar["retain_points_lost"]["value"] == 100
    assert tar["first"]["within"] is None
    assert tar["first"]["any"]["steps"]["median"] == 8
    assert [a["label"] for a in tar["not_broken"]["within"]] == ["lora"]


def test_the_reference_is_shown_from_the_runs_of_the_others(results: Path) -> None:
    plain = model(results, "random_mapping")
    assert plain["attacked"]
    assert plain["first"]["within"]["steps"]["median"] == 2
    assert plain["training"]["seconds"] == 61.5


def test_every_figure_comes_from_the_rows_alone(
    study: SimpleNamespace, results: Path, tmp_path: Path
) -> None:
    """The summary of one changed row differs from the one before in that figure alone."""
    (tmp_path / "rows").mkdir()
    text = (results / "rows" / "knowledge-tar.json").read_text("utf-8")
    changed = text.replace('"seconds": 61.5', '"seconds": 99.0')
    (tmp_path / "rows" / "knowledge-tar.json").write_text(changed, "utf-8")
    (tmp_path / "summary.json").write_text('{"machine": {"cpu": "kept"}}', "utf-8")
    assert study.run.main(["--recompute", "--results", str(tmp_path)]) == 0
    expected = model(results, "tar")
    expected["training"]["seconds"] = 99.0
    assert model(tmp_path, "tar") == expected
    assert summary_in(tmp_path)["machine"] == {"cpu": "kept"}


def test_the_page_shows_what_was_found_and_what_was_not_run(
    study: SimpleNamespace, results: Path
) -> None:
    section = study.hardened_pages.section
    text = section(summary_in(results), "knowledge")
    assert "| `rmu` | 62 | 160 | 2.5 |" in text
    assert "`finetune`: > 8 steps (0, > 8), 1 of 3 seeds" in text
    assert "`random_mapping` (plain)" in text
    assert "`stress` ended with exit code 2: error: nothing to break" in text
    assert "`benign_finetune` (to 8 steps)" in text
    for summary in (summary_in(results), {}):
        assert section(summary, "refusal") == study.hardened_pages.NOT_RUN


def row_of(text: str, name: str) -> list[str]:
    """Return the cells of a model in the table of what broke first."""
    lines = text[text.index("broken first within") :].splitlines()
    line = next(line for line in lines if line.startswith(f"| `{name}`"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_where_no_break_could_be_seen_the_page_does_not_say_unbroken(
    study: SimpleNamespace, results: Path
) -> None:
    section = study.hardened_pages.section
    summary = summary_in(results)
    text = section(summary, "knowledge")
    # Ruined by its own safeguard: nothing can break it within the limit.
    assert row_of(text, "tar")[-2:] == [
        "costs more than the limit",
        "`lora`: 8 steps (4, 8], 1 of 1 seed",
    ]
    assert "`tar`, not broken within the limit: nothing can be said: costs more" in text
    (rmu,) = [m for m in summary["kinds"]["knowledge"]["models"] if m["name"] == "rmu"]
    rmu["first"] = dict.fromkeys(rmu["first"])
    assert row_of(section(summary, "knowledge"), "rmu")[-2:] == ["not broken"] * 2
    for attack in rmu["attacks"]:
        attack["judged"] = False
    rmu["not_broken"] = {"within": [], "any": []}
    text = section(summary, "knowledge")
    assert row_of(text, "rmu")[-2:] == ["not judged"] * 2
    assert "`rmu`, not broken within the limit: nothing can be said: not judged." in text
    assert "`rmu`, not broken without it: nothing can be said: not judged." in text


def test_a_reference_without_rows_of_its_own_is_still_shown(
    study: SimpleNamespace, results: Path
) -> None:
    """The comparison does not know then what it is, but the study does."""
    folder = "knowledge-rmu"
    rows = {folder: json.loads((results / "rows" / f"{folder}.json").read_text("utf-8"))}
    summary = study.hardened_summary.summary_of(rows, study.hardened_plan.ENTRIES)
    found = {m["name"]: m["attacked"] for m in summary["kinds"]["knowledge"]["models"]}
    assert found["rmu"]
    assert found["random_mapping"]


# ---- running -------------------------------------------------------------------------------


def test_names_choose_entries_and_their_reference(study: SimpleNamespace) -> None:
    plan = study.hardened_plan
    folders = [entry.folder for entry in plan.chosen("rmu")]
    assert folders == ["knowledge-random_mapping", "knowledge-rmu"]
    assert [e.folder for e in plan.chosen("refusal-tar")] == ["refusal-refusal", "refusal-tar"]
    assert plan.chosen("") == list(plan.ENTRIES)
    with pytest.raises(ValueError, match="nonsense"):
        plan.chosen("nonsense,rmu")


def test_the_settings_of_every_entry_are_known(study: SimpleNamespace) -> None:
    for entry in study.hardened_plan.ENTRIES:
        parse_safeguards([entry.safeguard])
        assert entry.kind in safeguard_registry.get(entry.name).kinds


def test_another_safeguard_in_a_folder_is_not_taken_for_this_one(
    study: SimpleNamespace, tmp_path: Path
) -> None:
    write_model(tmp_path / "knowledge-random_mapping", "random_mapping:steps=3", None)
    with pytest.raises(SystemExit, match="steps=3"):
        study.run.main(["--work", str(tmp_path), "--only", "rmu"], command=None)


def test_a_failure_is_kept_and_forgotten_when_it_is_mended(
    study: SimpleNamespace, tmp_path: Path
) -> None:
    answers = iter([(3, "error: diverged"), (0, "")])
    (entry,) = [e for e in study.hardened_plan.ENTRIES if e.folder == "refusal-refusal"]
    one = study.run.Study(tmp_path, command=lambda words: next(answers))
    one.run([entry])
    expected = {"command": "harden", "exit_code": 3, "said": "error: diverged"}
    assert one.failures() == {entry.folder: expected}
    one.run([entry])
    assert one.failures() == {}


def test_the_study_end_to_end_on_a_tiny_world(study: SimpleNamespace, tmp_path: Path) -> None:
    base = cli_world.write_model(tmp_path / "base", tiny_world.undefended().model)
    domain = cli_world.write_domain(tmp_path / "domain", tiny_world.tiny_domain())
    plan = study.hardened_plan
    rates = "learning_rate=1e-2,rank=8,batch_size=16"
    entries = (
        plan.Entry("refusal", "refusal", f"steps=60,{rates}", "reference", attacked=False),
        plan.Entry("refusal", "plain_sft", f"steps=50,train=adapter,{rates}", "control"),
    )
    said: list[list[str]] = []

    def command(words: Sequence[str]) -> tuple[int, str]:
        said.append(list(words))
        return main(words), ""

    made = study.run.Study(
        tmp_path / "work",
        str(base),
        str(domain),
        suite="quick",
        seeds=1,
        tampers=("lora:learning_rate=1e-2,steps=2,rank=4",),
        command=command,
        entries=entries,
    )
    made.run(entries)
    assert [words[0] for words in said] == ["harden", "harden", "stress"]
    assert made.failures() == {}
    made.collect(tmp_path)
    summary = study.run.recompute(tmp_path, {}, entries)
    plain, control = summary["kinds"]["refusal"]["models"]
    assert plain["attacked"]
    assert control["attacked"]
    assert control["training"]["steps"] == 50
    assert control["statuses"]["done"] > 3
    assert "`plain_sft` (control)" in study.hardened_pages.section(summary, "refusal")
    # Again: nothing is trained, and the run is only looked through.
    made.run(entries)
    assert [words[0] for words in said[3:]] == ["stress"]
