"""Tasks of lm-eval on a subject: the harness's own backend as reference, names, files, faults."""

import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import durometer.catalogue  # noqa: F401  (fills the registries)
from durometer.core.errors import InputError, UnsafeInputError
from durometer.domains.base import Role
from durometer.measures.base import (
    ItemRecord,
    Measure,
    family_registry,
    find_measure,
    measure_names,
    role_of,
)
from durometer.measures.harness import tasks
from durometer.measures.harness.spec import HarnessSpec, parse_harness
from durometer.report.further import further_lines, further_tables, reading
from durometer.subjects.base import Source, Subject
from durometer.subjects.chat import ChatFormat
from durometer.trials.campaign import further_measures
from durometer.trials.record import CheckpointRecord
from durometer.trials.runner import probes
from durometer.trials.suites import make_suite

installed = importlib.util.find_spec("lm_eval") is not None
needs_harness = pytest.mark.skipif(
    not installed, reason="lm-eval is not installed: pip install 'durometer[benchmarks]'"
)
ROWS = [
    {
        "asked": " ".join(f"w{(7 * n + at) % 60}" for at in range(6 + n % 5)),
        "options": [f"w{60 + (n + k) % 30} w{k}" if k % 2 else f"w{61 + n}" for k in range(4)],
        "answer": n % 4,
        "told": f"w{70 + n % 9} w{n}",
    }
    for n in range(14)
]
CHOICE = """
output_type: multiple_choice
doc_to_text: "{{asked}} w3"
doc_to_choice: options
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
SINGLE = """
output_type: loglikelihood
doc_to_text: "{{asked}}"
doc_to_target: "{{told}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
ROLLING = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{asked}} {{told}}"
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
  - {metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
"""
GENERATED = """
output_type: generate_until
doc_to_text: "{{asked}}"
doc_to_target: "{{told}}"
generation_kwargs: {until: ["w7", "w9"], max_gen_toks: 12, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
KINDS = {"choice": CHOICE, "single": SINGLE, "rolling": ROLLING, "generated": GENERATED}


def write_task(folder: Path, name: str, body: str, rows: Any = ROWS) -> Path:
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    source = f"dataset_kwargs: {{data_files: {{test: {data}}}}}"
    head = f"task: {name}\ndataset_path: json\n{source}\ntest_split: test\n"
    file = folder / f"{name}.yaml"
    file.write_text(head + body, "utf-8")
    return file


@pytest.fixture(scope="module")
def subject(make_model: Callable[..., Any], tiny_tokenizer: Any) -> Subject:
    chat = ChatFormat.of(tiny_tokenizer)
    return Subject("tiny", make_model("Llama", seed=3), chat, Source("folder", "tiny"))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if installed:
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def measured(subject: Subject, text: str) -> tuple[str, list[ItemRecord]]:
    (name,) = measure_names(f"lm-eval:{text}")
    found = find_measure(name)
    assert found.own_items is not None
    return name, found.run(subject, None, found.own_items(0))  # type: ignore[arg-type]


def read(records: list[ItemRecord], name: str) -> Any:
    found = CheckpointRecord(0, {}, None, [record.as_dict() for record in records])
    return json.loads(json.dumps(reading([found], name), allow_nan=False))


def theirs(subject: Subject, file: Path, **options: Any) -> Any:
    """Return what the harness's own backend for transformers finds on the same weights."""
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = HFLM(pretrained=subject.model, tokenizer=subject.chat.tokenizer, batch_size=3)
    manager = TaskManager(include_defaults=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluator, "add_env_info", lambda results: None)  # asks the machine for 7 s
        return evaluator.simple_evaluate(
            model, tasks=[str(file)], task_manager=manager, bootstrap_iters=0, **options
        )


@needs_harness
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *((kind, {}) for kind in KINDS),
        ("choice", {"num_fewshot": 2}),
        ("choice", {"apply_chat_template": True}),
        ("generated", {"num_fewshot": 1, "apply_chat_template": True}),
    ],
)
def test_results_are_those_of_the_harness(
    kind: str, options: dict[str, Any], subject: Subject, tmp_path: Path
) -> None:
    file = write_task(tmp_path, f"tiny_{kind}", KINDS[kind])
    settings = {"num_fewshot": ",shots={}", "apply_chat_template": ",chat=yes"}
    named = "".join(settings[key].format(value) for key, value in options.items())
    name, records = measured(subject, f"{file}{named}")
    expected = theirs(subject, file, **options)
    figures = {
        key.removesuffix(",none"): value
        for key, value in expected["results"][f"tiny_{kind}"].items()
        if key.endswith(",none") and "stderr" not in key
    }
    assert figures
    found = read(records, name)["metrics"]
    assert found == pytest.approx(figures, rel=1e-4, abs=1e-9)
    samples = {sample["doc_id"]: sample for sample in expected["samples"][f"tiny_{kind}"]}
    assert len(samples) == len(records) == len(ROWS)
    for record in records:
        sample = samples[int(record.item_id.rpartition("/")[2])]
        place = sample["target"] if kind == "choice" else 0
        if kind == "generated":
            assert record.response == sample["resps"][0][0]
            continue
        response = sample["resps"][place][0]
        log_probability = response if kind == "rolling" else response[0]
        assert record.log_probability == pytest.approx(log_probability, rel=1e-4, abs=1e-4)
        assert record.details.get("acc") == sample.get("acc")
        assert record.correct == (None if kind == "rolling" else sample["acc"])


@needs_harness
def test_long_texts_lose_their_beginning_as_in_the_harness(
    make_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model = make_model("Llama", seed=3, max_position_embeddings=9)
    short = Subject("short", model, ChatFormat.of(tiny_tokenizer), Source("folder", "short"))
    for kind in ("single", "rolling"):
        file = write_task(tmp_path, f"long_{kind}", KINDS[kind])
        name, records = measured(short, str(file))
        figures = theirs(short, file)["results"][f"long_{kind}"]
        metric = "perplexity" if kind == "single" else "word_perplexity"
        found = read(records, name)["metrics"][metric]
        assert found == pytest.approx(figures[f"{metric},none"], rel=1e-4)


@needs_harness
def test_rows_are_drawn_always_the_same_and_told_apart(subject: Subject, tmp_path: Path) -> None:
    file = write_task(tmp_path, "drawn", CHOICE)
    name, records = measured(subject, f"{file},limit=5")
    _, again = measured(subject, f"{file},limit=5")
    _, everything = measured(subject, str(file))
    assert records == again
    assert len(records) == 5
    whole = {record.item_id: record for record in everything}
    for record in records:
        full = whole[record.item_id]
        assert (record.details, record.prompt_hash) == (full.details, full.prompt_hash)
        assert record.log_probability == pytest.approx(full.log_probability, abs=1e-4)
    assert {record.probe for record in records} == {name}
    assert {record.suite for record in records} == {"drawn"}
    assert len({record.text_hash for record in everything}) == len(ROWS)


@needs_harness
def test_a_collapsed_subject_is_never_right(
    make_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model = make_model("Llama")
    model.lm_head.weight.data.fill_(math.nan)
    lost = Subject("lost", model, ChatFormat.of(tiny_tokenizer), Source("folder", "lost"))
    _, records = measured(lost, str(write_task(tmp_path, "lost", CHOICE)))
    assert {record.parse_status for record in records} == {"non-finite likelihood"}
    assert {record.correct for record in records} == {0.0}
    json.dumps([record.as_dict() for record in records], allow_nan=False)


@needs_harness
@pytest.mark.parametrize(
    ("body", "rows", "message"),
    [
        (CHOICE.replace("{{asked}}", "{{question}}"), ROWS, "column .* missing.*'question'"),
        (CHOICE.replace("answer", "label"), ROWS, "doc_to_target names column 'label'.*asked"),
        (CHOICE.replace("options", "choices"), ROWS, "doc_to_choice names column 'choices'"),
        (CHOICE, [], "has no rows"),
        (CHOICE, [ROWS[0], {**ROWS[1], "answer": 7}], "row 2: its right answer is not among its 4"),
        (CHOICE, [{**ROWS[0], "answer": 7}, ROWS[1]], "cannot be loaded"),
        (CHOICE, [ROWS[0], {**ROWS[1], "answer": None}], "row 2: its right answer is not among"),
        (CHOICE.replace("acc_norm", "their_own"), ROWS, "metric 'their_own' is none of lm-eval's"),
        (CHOICE.replace("multiple_choice", "choosing"), ROWS, "output_type 'choosing'"),
        ("doc_to_text: [", ROWS, "cannot be read as a task"),
    ],
)
def test_a_task_that_cannot_be_used_is_one_line(
    body: str, rows: list[Any], message: str, tmp_path: Path
) -> None:
    file = write_task(tmp_path, "broken", body, rows)
    with pytest.raises(InputError, match=message) as caught:
        find_measure(f"lm-eval:{file}")
    assert "\n" not in str(caught.value)
    assert str(file) in str(caught.value)


@needs_harness
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("process_docs: !function code.change", "names Python code"),
        ("include: other.yaml", "names Python code"),
        ("class: code.Task", "names Python code"),
        ("unsafe_code: true", "names Python code"),
    ],
)
def test_no_code_of_a_task_file_is_run(line: str, message: str, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (tmp_path / "code.py").write_text(f"open({str(ran)!r}, 'w')\ndef change(x): return x\n")
    (tmp_path / "other.yaml").write_text("process_docs: !function code.change\n")
    file = write_task(tmp_path, "coded", f"{CHOICE}\n{line}\n")
    with pytest.raises(UnsafeInputError, match=message):
        find_measure(f"lm-eval:{file}")
    assert not ran.exists()


@needs_harness
def test_templates_of_a_task_file_are_rendered_in_a_sandbox(tmp_path: Path) -> None:
    attack = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    file = write_task(tmp_path, "reaching", CHOICE.replace("{{asked}}", attack))
    with pytest.raises(InputError, match="SecurityError"):
        find_measure(f"lm-eval:{file}")


@needs_harness
def test_nothing_is_fetched_unasked(tmp_path: Path) -> None:
    body = CHOICE.replace("output_type", "# output_type", 1)
    file = tmp_path / "far.yaml"
    file.write_text(f"task: far\ndataset_path: nobody/nothing\ntest_split: test\n{CHOICE}", "utf-8")
    with pytest.raises(InputError, match="not on this machine; hub=yes fetches it"):
        find_measure(f"lm-eval:{file}")
    far = "dataset_path: json\ndataset_kwargs: {data_files: {test: https://127.0.0.1:9/x.jsonl}}"
    file.write_text(f"task: far\n{far}\ntest_split: test\n{body}", "utf-8")
    with pytest.raises(InputError, match="lies on the network; hub=yes fetches it"):
        find_measure(f"lm-eval:{file}")


@needs_harness
def test_a_misspelt_name_is_told_with_the_nearest_one(monkeypatch: pytest.MonkeyPatch) -> None:
    known = SimpleNamespace(all_tasks=["arc_easy", "piqa"])  # the whole index takes seconds
    monkeypatch.setattr(tasks, "_manager", lambda *, defaults: known)
    with pytest.raises(InputError, match=r"unknown task of lm-eval 'arc_eazy'; .*'arc_easy'"):
        find_measure("lm-eval:arc_eazy")


@needs_harness
def test_a_plan_draws_rows_and_a_file_that_changed_is_another_measure(tmp_path: Path) -> None:
    from tiny_world import tiny_domain

    file = write_task(tmp_path, "planned", CHOICE, ROWS * 40)
    plan = make_suite("quick", 1).plan
    (name,) = further_measures([f"lm-eval:{file}"], "refusal")
    (probe,) = probes(tiny_domain(), plan, "further", [name])
    assert 0 < len(probe.items) == plan.retain_report < 40 * len(ROWS)
    first = find_measure(name).identity
    other = write_task(tmp_path, "other", CHOICE, ROWS[:-1])
    assert find_measure(f"lm-eval:{other}").identity != first


@needs_harness
def test_metrics_that_are_no_number_of_a_row_are_refused(subject: Subject, tmp_path: Path) -> None:
    body = CHOICE.partition("metric_list")[0] + "metric_list:\n  - {metric: mcc}\n"
    file = write_task(tmp_path, "corpus", body)
    with pytest.raises(InputError, match=r"none of the metrics of 'corpus' \(mcc\)"):
        measured(subject, str(file))


def test_tasks_are_named_with_settings() -> None:
    assert parse_harness("arc_easy, piqa,limit=50,shots=0,chat=yes,hub=yes") == tuple(
        HarnessSpec(task, 50, 0, chat=True, hub=True) for task in ("arc_easy", "piqa")
    )
    assert measure_names("lm-eval:piqa,limit=5,piqa,arc_easy") == (
        "lm-eval:piqa,limit=5",
        "lm-eval:arc_easy,limit=5",
    )
    assert parse_harness("x")[0].path is None
    assert parse_harness("./x.yaml")[0].path == Path("x.yaml")
    for name in measure_names("lm-eval:./a.yaml,b,shots=3,hub=yes"):
        assert measure_names(name) == (name,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "name a task"),
        ("limit=4", "name a task"),
        ("piqa,limt=4", "unknown setting of lm-eval 'limt'; did you mean 'limit'"),
        ("piqa,limit=many", "limit=many: a whole number"),
        ("piqa,shots=-1", "shots=-1: a whole number"),
        ("piqa,chat=1", "chat=1: yes or no"),
    ],
)
def test_a_spec_that_cannot_be_read_is_one_line(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        measure_names(f"lm-eval:{text}")


def test_without_the_extra_one_line_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match=r"lm_eval' is not installed; pip install 'durometer\[b"):
        find_measure("lm-eval:missing_extra")


def record(value: float | None, details: dict[str, float | None]) -> ItemRecord:
    head = ("lm-eval:t", "report", f"t/{len(details)}{value}", "e", "t", "0", "1")
    return ItemRecord(*head, correct=value, details=details, tokens=2, log_probability=-3.0)


def test_metrics_are_read_from_the_records_alone() -> None:
    rows = [
        record(
            1.0,
            {"acc": 1.0, "perplexity": -1.0, "bits_per_byte": -4.0, "bits_per_byte_weight": 2.0},
        ),
        record(
            0.0,
            {"acc": 0.0, "perplexity": -3.0, "bits_per_byte": -2.0, "bits_per_byte_weight": 4.0},
        ),
    ]
    found = read(
        [*rows[:1], ItemRecord(**{**rows[1].__dict__, "item_id": "t/2", "entity": "f"})],
        "lm-eval:t",
    )
    assert found["metrics"] == pytest.approx(
        {"acc": 0.5, "perplexity": math.exp(2), "bits_per_byte": 1 / math.log(2)}
    )
    assert found["report"]["rate"] == 0.5
    assert role_of("lm-eval:anything") == Role.RETAIN


def test_a_measure_without_right_or_wrong_is_shown_by_its_first_metric() -> None:
    rows = [record(None, {"word_perplexity": -6.0, "word_perplexity_weight": 3.0})]
    start = {"subject": read(rows, "lm-eval:t")}
    told = {"measures": [{"name": "lm-eval:t", "start": start, "tampers": []}]}
    assert list(further_lines(told)) == [f"lm-eval:t: word_perplexity {math.exp(2):.4g} untampered"]
    (table,) = further_tables(told, [], lambda *_: None)
    assert table["metrics"] is True
    assert table["notes"] == []


def test_of_what_is_to_be_kept_the_lowest_reading_is_told() -> None:
    found = [read([record(value, {"acc": value})], "lm-eval:t") for value in (1.0, 0.0, 1.0)]
    attacks = [{"label": "lora", "configuration": "c", "readings": found[1:]}]
    told = {"measures": [{"name": "lm-eval:t", "start": {"subject": found[0]}, "tampers": attacks}]}
    (line,) = further_lines(told)
    assert line.endswith("100 % untampered, at least 0 % after an attack: lora")


def test_the_family_is_listed() -> None:
    from durometer.listing import listed

    entry = family_registry.get("lm-eval")
    assert entry.usage.startswith("lm-eval:TASK")
    assert listed("measures", "") is not None
    assert Measure.__dataclass_fields__["own_items"].default is None


@needs_harness
def test_a_stress_test_takes_a_task_and_reports_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import cli_world

    rows = [
        {"asked": f"e{n:02d}", "options": ["fruit1", "fruit2"], "answer": n % 2} for n in (1, 2)
    ]
    file = write_task(tmp_path, "stressed", CHOICE.replace(" w3", ""), rows * 10)
    files = cli_world.write_files(tmp_path / "world")
    code = cli_world.stress(files, tmp_path / "run", "--measure", f"lm-eval:{file}")
    assert code == 0, capsys.readouterr().err
    (entry,) = json.loads((tmp_path / "run/summary.json").read_text())["measures"]
    assert entry["name"] == f"lm-eval:{file}"
    assert entry["start"]["subject"]["report"]["n"] == 20
    assert set(entry["start"]["undefended"]["metrics"]) == {"acc", "acc_norm"}
    assert entry["tampers"][0]["readings"]
    page = (tmp_path / "run/report.html").read_text()
    assert "acc_norm" in page
    wrong = cli_world.stress(files, tmp_path / "none", "--measure", f"lm-eval:{tmp_path}/no.yaml")
    assert wrong == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].endswith("no.yaml: no such file")
    assert not (tmp_path / "none").exists()
