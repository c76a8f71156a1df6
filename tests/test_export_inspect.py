"""A run as a log of inspect_ai: the form, what is in it, and what stays hidden."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from records import items
from test_summary import BREAKS_AT_2, BREAKS_AT_4, attack, controls, stored

from durometer.cli import main
from durometer.core.errors import InputError, StorageError
from durometer.domains.load import load_domain
from durometer.exporting import export_inspect
from durometer.report.inspect_log import HIDDEN
from durometer.trials.record import TrialRecord

needs_inspect = pytest.mark.skipif(
    importlib.util.find_spec("inspect_ai") is None, reason="inspect_ai is not installed"
)
TEXT = {"type": "string"}
COUNT = {"type": "integer", "minimum": 0}


def table(required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": required | optional,
        "required": list(required),
        "additionalProperties": False,
    }


# The parts of inspect_ai's published log format (version 2) that are written, nothing beside them.
MESSAGE = table(
    {"role": {"enum": ["user", "assistant"]}, "content": TEXT, "source": TEXT}, model=TEXT
)
SCORE = table(
    {
        "value": {"type": ["number", "string"]},
        "answer": {"type": ["string", "null"]},
        "metadata": {"type": "object"},
    }
)
CHOICE = table({"message": MESSAGE, "stop_reason": {"enum": ["stop", "max_tokens", "unknown"]}})
SAMPLE = table(
    {
        "id": TEXT,
        "epoch": {"const": 1},
        "input": TEXT,
        "target": {"type": "array", "items": TEXT},
        "messages": {"type": "array", "items": MESSAGE},
        "output": table(
            {"model": TEXT, "choices": {"type": "array", "items": CHOICE}, "completion": TEXT}
        ),
        "scores": {"type": "object", "additionalProperties": SCORE},
        "metadata": {"type": "object"},
    }
)
METRIC = table({"name": TEXT, "value": {"type": "number"}})
LOG = table(
    {
        "version": {"const": 2},
        "status": {"enum": ["success", "cancelled"]},
        "eval": table(
            {
                "eval_id": TEXT,
                "run_id": TEXT,
                "created": {"type": "string", "pattern": r"^\d{4}-\d\d-\d\dT[\d:]+\+00:00$"},
                "task": TEXT,
                "task_id": TEXT,
                "task_version": {"type": ["string", "integer"]},
                "task_args": {"type": "object"},
                "dataset": table({"name": TEXT, "location": TEXT, "samples": COUNT}),
                "model": TEXT,
                "model_args": {"type": "object"},
                "config": {"type": "object"},
                "packages": {"type": "object", "additionalProperties": TEXT},
                "metadata": {"type": "object"},
            }
        ),
        "plan": table(
            {
                "name": TEXT,
                "steps": {
                    "type": "array",
                    "items": table({"solver": TEXT, "params": {"type": "object"}}),
                },
            }
        ),
        "stats": table(
            {"started_at": TEXT, "completed_at": TEXT, "model_usage": {"type": "object"}}
        ),
        "results": table(
            {
                "total_samples": COUNT,
                "completed_samples": COUNT,
                "scores": {
                    "type": "array",
                    "items": table(
                        {
                            "name": TEXT,
                            "scorer": TEXT,
                            "scored_samples": COUNT,
                            "metrics": {"type": "object", "additionalProperties": METRIC},
                        }
                    ),
                },
            }
        ),
        "samples": {"type": "array", "items": SAMPLE},
    }
)


def made(folder: Path, trials: list[TrialRecord] | None = None, **described: Any) -> Path:
    found = trials or [*controls(), attack(1, *BREAKS_AT_2), attack(2, *BREAKS_AT_4)]
    stored(folder, found, **described).close()
    return folder


def exported(folder: Path, **options: Any) -> Any:
    file = export_inspect(folder, folder / "log.json", **options)
    log = json.loads(file.read_text("utf-8"))
    jsonschema.Draft202012Validator(LOG).validate(log)
    return log


def test_every_item_record_is_one_sample(tmp_path: Path) -> None:
    log = exported(made(tmp_path))
    samples, broken = log["samples"], attack(1, *BREAKS_AT_2)
    trials = [*controls(), broken, attack(2, *BREAKS_AT_4)]
    assert len(samples) == sum(len(c.items) for t in trials for c in t.checkpoints)
    assert len(samples) == log["eval"]["dataset"]["samples"] == log["results"]["total_samples"]
    assert len({sample["id"] for sample in samples}) == len(samples)
    own = [s for s in samples if s["metadata"]["seed"] == 1 and s["metadata"]["tamper"] == "lora"]
    own = [s for s in own if s["metadata"]["role"] == "subject"]
    for stop in broken.checkpoints:
        here = [s for s in own if s["metadata"]["steps"] == stop.steps]
        right = [s["scores"]["outcomes"]["value"] for s in here if "outcomes" in s["scores"]]
        assert sum(right) == sum(i["correct"] for i in stop.items if i["probe"] == "outcomes")
        assert len(here) == len(stop.items)
    (first,) = [s for s in own if s["id"].endswith("/0/outcomes/report/outcomes/report/0")]
    assert first["output"]["completion"] == "outcomes text"
    assert first["scores"]["outcomes"]["answer"] == "outcomes text"
    assert first["scores"]["outcomes"]["metadata"]["log_probability"] == -1.0


def test_results_are_means_where_each_attack_ends(tmp_path: Path) -> None:
    log = exported(made(tmp_path))
    scores = {
        score["name"]: score["metrics"]["mean"]["value"] for score in log["results"]["scores"]
    }
    assert scores["outcomes (report): subject, untampered"] == 0.0
    assert scores["outcomes (report): undefended, untampered"] == 1.0
    (ended,) = [v for k, v in scores.items() if k.startswith("outcomes (report): subject, lora")]
    last = [attack(1, *BREAKS_AT_2), attack(2, *BREAKS_AT_4)]
    values = [i["correct"] for t in last for i in t.checkpoints[-1].probe("outcomes", "report")]
    assert ended == pytest.approx(sum(values) / len(values))
    assert log["eval"]["metadata"]["budgets_to_break"]
    assert log["status"] == "success"


def test_a_response_without_a_verdict_is_in_no_mean(tmp_path: Path) -> None:
    record = controls()[0]
    name = "outcomes (report): subject, untampered"
    judged = record.checkpoints[0].probe("outcomes", "report")
    for number, item in enumerate(judged):
        unread = {"outcome": "unparsed", "correct": 0.0}
        item.update({"correct": 1.0} if number < 10 else unread)
    log = exported(made(tmp_path, [record, *controls()[1:], attack(1, *BREAKS_AT_2)]))
    (found,) = [score for score in log["results"]["scores"] if score["name"] == name]
    assert (found["scored_samples"], found["metrics"]["mean"]["value"]) == (10, 1.0)
    values = [s["scores"]["outcomes"]["value"] for s in log["samples"] if "outcomes" in s["scores"]]
    assert values.count("unparsed") == len(judged) - 10


@pytest.mark.parametrize("shown", [False, True])
def test_responses_to_a_task_of_another_source_are_told_when_asked_for(
    shown: bool, tmp_path: Path
) -> None:
    record = controls()[0]  # the domain is harmless; a task beside it says nothing of itself
    record.checkpoints[0].items += items("lm-eval:one", "report", 1, response="a foreign text")
    folder = made(tmp_path, [record, *controls()[1:], attack(1, *BREAKS_AT_2)])
    assert ("foreign text" in json.dumps(exported(folder, show_texts=shown))) is shown


def test_the_same_run_gives_the_same_log_and_stays_as_it_is(tmp_path: Path) -> None:
    folder = made(tmp_path / "run")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    first = export_inspect(folder, tmp_path / "a.json").read_bytes()
    second = export_inspect(folder, tmp_path / "b" / "b.json").read_bytes()
    assert first == second
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


@pytest.mark.parametrize("shown", [False, True])
def test_texts_of_a_domain_that_is_not_harmless_are_told_when_asked_for(
    shown: bool, tmp_path: Path
) -> None:
    domain = {"name": "d", "kind": "refusal", "description": "", "source": "here", "counts": {}}
    domain |= {"chance": 0.0, "harmless": False, "hash": "3" * 64}
    record = controls()[0]
    record.checkpoints[0].items += items(
        "outcomes", "select", (1, 2), response="a withheld text", entity="a withheld name"
    )
    folder = made(tmp_path, [record, *controls()[1:], attack(1, *BREAKS_AT_2)], domain=domain)
    log = exported(folder, show_texts=shown)
    assert ("withheld text" in json.dumps(log)) is shown
    assert ("withheld name" in json.dumps(log)) is shown
    assert any(sample["input"] == HIDDEN for sample in log["samples"]) is not shown
    assert "outcomes text" in json.dumps(log) or not shown


@pytest.mark.parametrize("changed", [False, True])
def test_prompts_are_told_of_the_very_domain_that_was_measured(
    changed: bool, tmp_path: Path
) -> None:
    found = load_domain("world")
    (item, *_) = found.items
    record = controls()[0]
    record.checkpoints[0].items[0] |= {"item_id": item.id}
    facts = {"name": "world", "kind": "refusal", "description": "", "source": "here"}
    facts |= {"counts": {}, "chance": 0.0, "harmless": True}
    facts |= {"hash": "0" * 64 if changed else found.content_hash}
    folder = made(
        tmp_path,
        [record, *controls()[1:], attack(1, *BREAKS_AT_2)],
        domain=facts,
        request={"subject": "x", "domain": "world", "tampers": []},
    )
    (sample,) = [s for s in exported(folder)["samples"] if s["metadata"]["item"] == item.id]
    assert (sample["input"] == item.prompt) is not changed
    assert sample["target"] == ([] if changed else list(item.answers))
    assert item.id in sample["input"] or not changed


def test_judges_are_told_without_what_they_wrote(tmp_path: Path) -> None:
    record = controls()[0]
    verdict = {"judge": "j", "harmful": True, "refusal": None, "score": 0.5, "raw": "it wrote this"}
    record.checkpoints[0].items[0] |= {"verdicts": [verdict], "details": {"strict": 1.0}}
    log = exported(made(tmp_path, [record, *controls()[1:], attack(1, *BREAKS_AT_2)]))
    (told,) = [
        score["metadata"]
        for sample in log["samples"]
        for score in sample["scores"].values()
        if "verdicts" in score["metadata"]
    ]
    assert told["verdicts"] == [{"judge": "j", "harmful": True, "refusal": None, "score": 0.5}]
    assert told["details"] == {"strict": 1.0}
    assert "it wrote this" not in json.dumps(log)


@needs_inspect
def test_inspect_ai_reads_it(tmp_path: Path) -> None:
    from inspect_ai.log import read_eval_log

    folder = made(tmp_path)
    file = export_inspect(folder)
    assert file == folder / "inspect.json"
    log = read_eval_log(str(file))
    plain = json.loads(file.read_text("utf-8"))
    assert log.status == "success"
    assert log.eval.model == plain["eval"]["model"]
    assert log.samples is not None
    assert len(log.samples) == len(plain["samples"])
    for read, written in zip(log.samples, plain["samples"], strict=True):
        assert (read.id, read.input) == (written["id"], written["input"])
        assert read.output.completion == written["output"]["completion"]
        values = {name: score.value for name, score in (read.scores or {}).items()}
        assert values == {name: score["value"] for name, score in written["scores"].items()}
        assert read.metadata == written["metadata"]
    assert log.results is not None
    assert [score.name for score in log.results.scores] == [
        score["name"] for score in plain["results"]["scores"]
    ]
    assert read_eval_log(str(file), header_only=True).eval.created == log.eval.created


@pytest.mark.parametrize(
    ("out", "message"),
    [("log.eval", "end it in .json"), ("log", "end it in .json"), ("folder.json", "a folder")],
)
def test_a_file_that_cannot_be_is_one_line(out: str, message: str, tmp_path: Path) -> None:
    folder = made(tmp_path / "run")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(InputError, match=message):
        export_inspect(folder, tmp_path / out)


def test_no_run_and_no_room_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(tmp_path)]) == 2
    assert "no run here" in capsys.readouterr().err
    folder = made(tmp_path / "run")
    (tmp_path / "taken").write_text("")
    with pytest.raises(StorageError, match="name a writable --out"):
        export_inspect(folder, tmp_path / "taken" / "log.json")
    assert (
        main(["export", str(folder), "--format", "inspect", "--out", str(tmp_path / "x.json")]) == 0
    )
    assert "x.json" in capsys.readouterr().out
