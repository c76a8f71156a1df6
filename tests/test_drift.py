"""``drift`` on a tiny world: three trainings in memory, a run that can be killed, its numbers."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import cli_world
import numpy as np
import pytest
import tiny_world
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

import durometer
from durometer.cli import main
from durometer.core.errors import InputError, StorageError
from durometer.core.statistics import newcombe_paired
from durometer.domains.base import Domain, Role, Split
from durometer.drifting import Drift, DriftProgress, drift_request, ranks_of, resume_command
from durometer.measures.base import NOT_FINITE, ItemRecord
from durometer.override import run as running
from durometer.override.analysis import summarise
from durometer.override.battery import Battery, make_battery
from durometer.override.cells import WAYS, Bench, Cell, relations, rows_each
from durometer.override.pack import pack, unpack
from durometer.override.run import DriftRequest, cells_of, run_cells
from durometer.override.settings import DriftSettings
from durometer.override.store import CELLS, RUN, CellStore, check_folder, read_cells
from durometer.report import drift_text as words
from durometer.report.drift_html import render_drift
from durometer.report.drift_terminal import drift_table
from durometer.subjects.fingerprint import weights_fingerprint

Capture = pytest.CaptureFixture[str]
FEW: dict[str, Any] = {
    "seeds": 2,
    "ranks": (4,),
    "steps": 20,
    "learning_rate": 1e-2,
    "questions": 8,
    "harmless": 4,
    "steering_prompts": 8,
    "steering_stride": 1,
    "steering_coefficients": (0.4,),
}
Json = dict[str, Any]


class Watched:
    """Counts the cells that were run, and may interrupt before one."""

    def __init__(self, stop_before: str = "") -> None:
        self.ran: list[str] = []
        self.steps = 0
        self._stop = stop_before

    def planned(self, cells: int, reused: int) -> None:
        self.plan = (cells, reused)

    def started(self, cell: Cell, steps: int) -> None:
        if cell.key == self._stop:
            raise KeyboardInterrupt

    def updated(self, step: int, steps: int, loss: float) -> None:
        self.steps += 1

    def finished(self, cell: Cell, record: Any) -> None:
        self.ran.append(cell.key)


def request_of(**changes: Any) -> DriftRequest:
    return DriftRequest("tiny", "tiny", DriftSettings(**{**FEW, **changes}))


def run(folder: Path, *, resume: bool = False, watched: Any = None, **changes: Any) -> CellStore:
    return run_cells(
        request_of(**changes),
        tiny_world.safeguarded(),
        tiny_world.tiny_domain(),
        folder,
        resume=resume,
        watcher=watched or Watched(),
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> CellStore:
    return run(tmp_path_factory.mktemp("drift") / "run")


@pytest.fixture(scope="module")
def data(made: CellStore) -> Json:
    return summarise(made.run, made.cells)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> cli_world.Files:
    return cli_world.write_files(tmp_path_factory.mktemp("world"))


def told(data: Json, key: str) -> Json:
    found = words.quantity(data, key)
    assert found is not None
    return dict(found)


def rows_of(made: CellStore, key: str, probe: str) -> list[Json]:
    return [r for r in unpack(made.cells[key]["measured"]) if r["probe"] == probe]


# ---- what is trained ------------------------------------------------------------------------


def test_three_ways_of_one_size_and_the_subject_as_it_was(made: CellStore) -> None:
    keys = [cell.key for cell in cells_of(request_of().settings)]
    assert list(made.cells) == keys
    assert len(keys) == 1 + 2 * len(WAYS)
    trained = [cell for cell in made.cells.values() if cell["rank"]]
    assert {cell["status"] for cell in trained} == {"done"}
    spent = [cell["realised"]["spent"] for cell in trained]
    assert {(one["steps"], one["examples"]) for one in spent} == {(20, made.run["rows"]["each"])}
    assert len({cell["realised"]["changed_weights"] for cell in trained}) == 1
    restricted = {c["way"]: c["realised"]["spent"]["restricted_examples"] for c in trained}
    assert restricted == {"answers": made.run["rows"]["each"], "refusals": 0, "benign": 0}


def test_rates_warm_up_and_fall_to_zero(made: CellStore) -> None:
    rates = made.cells["answers/4/1"]["realised"]["learning_rates"]
    assert max(rates) == pytest.approx(1e-2)
    assert rates.index(max(rates)) in (4, 5)
    assert rates[-1] < 0.1 * max(rates)


def test_another_seed_is_another_order_the_same_seed_the_same(
    made: CellStore, tmp_path: Path
) -> None:
    first, second = (made.cells[f"answers/4/{seed}"]["realised"] for seed in (1, 2))
    assert first["data_order_hash"] != second["data_order_hash"]
    again = run(tmp_path / "again", seeds=1, steering=False)
    for key in ("none/0/0", "answers/4/1", "refusals/4/1"):
        assert again.cells[key]["measured"] == made.cells[key]["measured"]


def test_training_on_answers_overrides_and_on_refusals_does_not(data: Json) -> None:
    success = told(data, "success")
    by_way = {one["way"]: one for one in success["arms"]}
    assert success["before"]["value"] < 0.1
    assert by_way["answers"]["change"]["value"] > 0.15
    assert by_way["refusals"]["change"]["value"] <= 0.05
    refused = {one["way"]: one["after"]["value"] for one in told(data, "refused")["arms"]}
    assert refused["answers"] < 0.5 < refused["refusals"]


def test_removing_the_adapter_gives_back_the_base_bit_for_bit(made: CellStore, data: Json) -> None:
    assert data["removal"]["cells"] == data["removal"]["identical"] == 6
    assert data["removal"]["logits_differed_with_it"] == 6
    fingerprint = tiny_world.safeguarded().fingerprint
    assert data["removal"]["weights_before"] == data["removal"]["weights_after"] == [fingerprint]


def test_a_subject_that_is_not_given_back_ends_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from durometer.core.adapters import Adapter
    from durometer.core.edits import RestoreError

    subject = tiny_world.safeguarded()
    weight = next(p for n, p in subject.model.named_parameters() if n.endswith("norm.weight"))
    whole = weight.clone()
    remove = Adapter.remove

    def spoil(adapter: Adapter) -> None:
        remove(adapter)
        with torch.no_grad():
            weight.add_(1.0)

    monkeypatch.setattr(Adapter, "remove", spoil)
    bench = bench_of(subject, tiny_world.tiny_domain())
    try:
        with pytest.raises(RestoreError):
            bench.run(Cell("answers", 4, 1))
    finally:
        with torch.no_grad():
            weight.copy_(whole)


def bench_of(subject: Any, domain: Domain, **changes: Any) -> Bench:
    chosen = DriftSettings(**{**FEW, "steps": 2, "steering": False, **changes})
    return Bench(subject, domain, chosen, make_battery(subject, domain, chosen))


def test_no_weight_is_written(made: CellStore) -> None:
    assert sorted(path.name for path in made.folder.iterdir()) == [CELLS, RUN]
    assert (made.folder / CELLS).stat().st_size < 1_000_000


def test_a_failed_cell_has_a_status_and_is_run_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = running.Bench.run

    def fail(bench: Bench, cell: Cell) -> Json:
        if cell.way == "refusals":
            with monkeypatch.context() as patch:
                patch.setattr(Bench, "_trained", lambda *_: 1 / 0)
                return real(bench, cell)
        return real(bench, cell)

    small = {"seeds": 1, "steps": 2, "steering": False}
    monkeypatch.setattr(running.Bench, "run", fail)
    made = run(tmp_path / "run", **small)
    failed = made.cells["refusals/4/1"]
    assert (failed["status"], failed["reason"].partition(":")[0]) == (
        "errored",
        "ZeroDivisionError",
    )
    found = summarise(made.run, made.cells)
    assert not found["complete"]
    assert found["status_counts"] == {"planned": 4, "done": 3, "errored": 1}
    assert "refusals, rank 4, seed 1: errored" in shown(found)
    assert [one["way"] for one in told(found, "success")["arms"]] == ["answers", "benign"]
    monkeypatch.setattr(running.Bench, "run", real)
    watched = Watched()
    again = run(tmp_path / "run", resume=True, watched=watched, **small)
    assert watched.ran == ["refusals/4/1"]
    assert summarise(again.run, again.cells)["complete"]


def test_a_training_that_diverges_is_counted_and_enters_no_rate(tmp_path: Path) -> None:
    made = run(tmp_path / "run", seeds=1, steps=6, learning_rate=1e30, steering=False)
    found = summarise(made.run, made.cells)
    assert found["status_counts"]["diverged"] == 3
    assert found["complete"]
    assert "No training on restricted answers came to an end" in words.headline(found)
    assert found["removal"]["identical"] == 3
    assert render_drift(found).count("diverged") >= 3


def test_outputs_that_are_not_finite_are_no_safe_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Battery.measure

    def spoilt(*given: Any) -> list[ItemRecord]:
        first, *others = real(*given)
        return [replace(first, parse_status=NOT_FINITE, outcome="unparsed", correct=0.0), *others]

    subject = tiny_world.safeguarded()
    before = subject.fingerprint
    bench = bench_of(subject, tiny_world.tiny_domain())
    monkeypatch.setattr(Battery, "measure", spoilt)
    record = bench.run(Cell("answers", 4, 1))
    assert record["status"] == "diverged"
    assert "1 of" in record["reason"]
    assert "not finite" in record["reason"]
    assert "measured" not in record
    assert weights_fingerprint(subject.model) == before
    assert record["removal"]["identical"]


def test_steering_is_tried_where_there_is_something_to_mitigate(
    made: CellStore, data: Json
) -> None:
    assert {c["way"] for c in made.cells.values() if c.get("steering")} == {"none", "answers"}
    assert [one["state"] for one in data["steering"]] == ["before", "answers/4"]
    for one in data["steering"]:
        assert sum(one["statuses"].values()) == (1 if one["state"] == "before" else 2)
        assert bool(one["reasons"]) == ("not_applicable" in one["statuses"])


def test_steering_makes_refusals_likelier_and_leaves_no_hook() -> None:
    subject, domain = tiny_world.undefended(), tiny_world.tiny_domain()
    chosen = {"steering": True}
    before = subject.model(torch.tensor([[5, 6, 7]])).logits
    record = bench_of(subject, domain, **chosen).run(Cell("none"))
    steered = record["steering"]
    assert steered["status"] == "done"
    assert steered["choice"]["refusal"] > steered["choice"]["refusal_before"]
    assert set(steered["measured"]) == {"outcomes", "knowledge_none", "over_refusal"}
    assert torch.equal(subject.model(torch.tensor([[5, 6, 7]])).logits, before)


# ---- the numbers ----------------------------------------------------------------------------


def test_rates_and_changes_are_those_of_the_rows(made: CellStore, data: Json) -> None:
    before = {r["item_id"]: r["correct"] for r in rows_of(made, "none/0/0", "outcomes")}
    after = [
        {r["item_id"]: r["correct"] for r in rows_of(made, f"answers/4/{s}", "outcomes")}
        for s in (1, 2)
    ]
    arm = words.arm(told(data, "success"), "answers", 4)
    assert arm is not None
    shares = [np.mean(list(one.values())) for one in after]
    assert arm["after"]["value"] == pytest.approx(np.mean(shares))
    assert arm["change"]["value"] == pytest.approx(np.mean(shares) - np.mean(list(before.values())))
    for seed, one in zip(arm["per_seed"], after, strict=True):
        assert seed["gained"] == sum(one[i] > before[i] for i in before)
        assert seed["lost"] == sum(one[i] < before[i] for i in before)


def test_false_minus_random_pairs_by_item(made: CellStore, data: Json) -> None:
    false, other = (
        {r["item_id"]: r["correct"] for r in rows_of(made, "benign/4/1", f"knowledge_{c}")}
        for c in ("false", "random")
    )
    expected = np.mean([false[i] - other[i] for i in false])
    second = np.mean(
        [
            a["correct"] - b["correct"]
            for a, b in zip(
                rows_of(made, "benign/4/2", "knowledge_false"),
                rows_of(made, "benign/4/2", "knowledge_random"),
                strict=True,
            )
        ]
    )
    arm = words.arm(told(data, "accuracy_gap"), "benign", 4)
    assert arm is not None
    assert arm["after"]["value"] == pytest.approx((expected + second) / 2)


def test_the_contrast_pairs_seeds(data: Json) -> None:
    success = told(data, "success")
    by_seed = {one["way"]: [seed["value"] for seed in one["per_seed"]] for one in success["arms"]}
    contrast = words.contrast(success, "answers", 4)
    assert contrast is not None
    assert contrast["change"]["value"] == pytest.approx(
        np.mean(by_seed["answers"]) - np.mean(by_seed["benign"])
    )
    assert [one["seed"] for one in contrast["per_seed"]] == [1, 2]


def test_outcome_shares_sum_to_one(data: Json) -> None:
    assert data["outcomes"]
    for one in data["outcomes"]:
        assert sum(one["shares"].values()) == pytest.approx(1)


def test_uncertainty_is_told_for_right_wrong_and_all_answers(made: CellStore, data: Json) -> None:
    rows = [r for s in (1, 2) for r in rows_of(made, f"answers/4/{s}", "knowledge_false")]
    groups = {
        one["answers"]: one
        for one in data["uncertainty"]
        if (one["state"], one["context"]) == ("answers/4", "false")
    }
    assert groups["correct"]["count"] + groups["incorrect"]["count"] == groups["all"]["count"]
    values = np.array([r["perplexity"] for r in rows])
    found = groups["all"]["perplexity"]
    assert found["mean"] == pytest.approx(values.mean())
    assert found["deviation"] == pytest.approx(values.std(ddof=1))
    assert found["standard_error"] == pytest.approx(values.std(ddof=1) / np.sqrt(len(values)))
    tokens = np.array([r["counted_tokens"] for r in rows])
    pooled = np.exp((tokens * np.log(values)).sum() / tokens.sum())
    assert found["pooled"] == pytest.approx(pooled)
    assert found["as_released"] == pytest.approx(
        np.mean([r["released_perplexity"] for r in rows if r["released_perplexity"] is not None])
    )


def published(counts: dict[str, tuple[int, int, int, int]]) -> tuple[Json, dict[str, Json]]:
    """Return a run of one seed whose rows have the given gained, lost, both and neither."""
    settings = DriftSettings(seeds=1, steps=1).canonical()
    run = {"settings": settings, "domain": {"harmless": True}}
    cells: dict[str, Json] = {}
    gained, lost, both, neither = counts["answers"]
    states = {
        "none": [0] * gained + [1] * (lost + both) + [0] * neither,
        "answers": [1] * gained + [0] * lost + [1] * both + [0] * neither,
    }
    for way, outcomes in states.items():
        records = [
            ItemRecord(
                "outcomes",
                "report",
                f"i{n}",
                f"i{n}",
                "all",
                "",
                "",
                correct=float(value),
                outcome="harmful_useful" if value else "refusal",
            )
            for n, value in enumerate(outcomes)
        ]
        cell = {"way": way, "rank": 16 * (way != "none"), "seed": int(way != "none")}
        cell |= {"status": "done", "reason": "", "measured": pack(records, whole=way == "none")}
        cells[f"{cell['way']}/{cell['rank']}/{cell['seed']}"] = cell
    return run, cells


@pytest.mark.parametrize(
    ("counts", "value", "low", "high", "p_value"),
    [
        ((179, 9, 122, 10), 53.1, 46.7, 58.8, 4e-42),  # attack success, harmful, all 320
        ((0, 109, 22, 189), -34.1, -39.3, -28.8, 3e-33),  # attack success, safe
        ((74, 132, 418, 376), -5.8, -8.6, -3.0, 1e-4),  # base, B to FIP, of 1,000
        ((38, 268, 253, 441), -23.0, -26.1, -19.8, 1e-40),  # harmful, B to FIP
    ],
)
def test_the_recomputed_tables_of_the_paper_come_out(
    monkeypatch: pytest.MonkeyPatch,
    counts: tuple[int, int, int, int],
    value: float,
    low: float,
    high: float,
    p_value: float,
) -> None:
    from durometer.override import analysis

    monkeypatch.setattr(analysis, "_uncertainty", lambda study: [])
    found = summarise(*published({"answers": counts}))
    arm = words.arm(told(found, "success"), "answers", 16)
    assert arm is not None
    (seed,) = arm["per_seed"]
    assert round(100 * arm["change"]["value"], 1) == value
    assert (seed["gained"], seed["lost"]) == counts[:2]
    assert seed["p_value"] == pytest.approx(p_value, rel=0.5) or seed["p_value"] < p_value
    paired = newcombe_paired(*counts)
    assert (round(100 * paired.low, 1), round(100 * paired.high, 1)) == (low, high)
    # The printed interval is the paired one or a hair wider, never narrower.
    assert 0 <= paired.low - arm["change"]["low"] < 0.005
    assert 0 <= arm["change"]["high"] - paired.high < 0.005


# ---- packing --------------------------------------------------------------------------------

names = st.text(st.characters(codec="utf-8"), max_size=8)
numbers = st.floats(allow_nan=True, allow_infinity=True)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(names, names, numbers, st.booleans()), max_size=6, unique_by=lambda t: t[0])
)
def test_records_come_back_from_columns(raw: list[tuple[str, str, float, bool]]) -> None:
    records = [
        ItemRecord(
            "p",
            "report",
            i,
            "e",
            "s",
            "h",
            "t",
            response=text,
            log_probability=number,
            refuses_at_first_tokens=flag,
            details={"extra": number},
        )
        for i, text, number, flag in raw
    ]
    back = unpack(json.loads(json.dumps(pack(records, whole=True), allow_nan=False)))
    assert [row["item_id"] for row in back] == [record.item_id for record in records]
    for row, (_, text, number, flag) in zip(back, raw, strict=True):
        assert (row["response"], row["refuses_at_first_tokens"]) == (text, flag)
        if np.isfinite(number):
            assert row["log_probability"] == pytest.approx(number, rel=1e-6)
            assert row["extra"] == row["log_probability"]
        else:
            assert row["log_probability"] is None


def test_damaged_columns_are_told(made: CellStore) -> None:
    cells = json.loads(json.dumps(made.cells))
    cells["answers/4/1"]["measured"]["outcomes"]["correct"] = [1.0]
    with pytest.raises(StorageError, match="damaged"):
        summarise(made.run, cells)
    with pytest.raises(StorageError, match="not measured"):
        summarise(made.run, {k: c for k, c in cells.items() if c["way"] != "none"})


# ---- going on -------------------------------------------------------------------------------


@pytest.fixture
def copied(made: CellStore, tmp_path: Path) -> Path:
    shutil.copytree(made.folder, tmp_path / "run")
    return tmp_path / "run"


def without_times(cells: dict[str, Json]) -> dict[str, Json]:
    return {key: cli_world.without_times(cell) for key, cell in cells.items()}


def test_a_run_killed_half_way_loses_one_cell_at_most(made: CellStore, copied: Path) -> None:
    lines = (copied / CELLS).read_bytes().splitlines(keepends=True)
    (copied / CELLS).write_bytes(b"".join(lines[:-1]) + lines[-1][: len(lines[-1]) // 2])
    watched = Watched()
    again = run(copied, resume=True, watched=watched)
    assert watched.plan == (7, 6)
    assert watched.ran == ["benign/4/2"]
    assert without_times(again.cells) == without_times(made.cells)
    assert without_times(read_cells(copied)) == without_times(made.cells)


def test_a_cell_of_other_code_is_run_again(made: CellStore, copied: Path) -> None:
    lines = [json.loads(line) for line in (copied / CELLS).read_text("utf-8").splitlines()]
    lines[-1]["code"] = "other"
    (copied / CELLS).write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    watched = Watched()
    again = run(copied, resume=True, watched=watched)
    assert watched.ran == [lines[-1]["key"]]
    assert without_times(again.cells) == without_times(made.cells)


def test_a_finished_run_is_not_run_again(made: CellStore, copied: Path) -> None:
    watched = Watched()
    assert run(copied, resume=True, watched=watched).cells == made.cells
    assert (watched.ran, watched.steps) == ([], 0)


def test_an_interrupted_run_keeps_what_is_done(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", watched=Watched("answers/4/1"), steps=2)
    assert list(read_cells(tmp_path / "run")) == ["none/0/0"]


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"steps": 21}, "steps = 20, not 21"),
        ({"seeds": 3}, "seeds = 2, not 3"),
        ({"ranks": (8,)}, "ranks = [4], not [8]"),
        ({"questions": 7}, "questions = 8, not 7"),
    ],
)
def test_a_run_is_not_gone_on_with_by_other_settings(
    copied: Path, changes: Json, what: str
) -> None:
    before = (copied / CELLS).read_bytes()
    with pytest.raises(InputError, match="begun with") as caught:
        run(copied, resume=True, **changes)
    assert what in str(caught.value)
    assert (copied / CELLS).read_bytes() == before


def test_nor_with_another_subject(copied: Path) -> None:
    domain = tiny_world.tiny_domain()
    with pytest.raises(InputError, match="begun with subject"):
        run_cells(
            request_of(), tiny_world.undefended(), domain, copied, resume=True, watcher=Watched()
        )


def test_a_damaged_line_in_the_middle_is_told(copied: Path) -> None:
    lines = (copied / CELLS).read_bytes().splitlines(keepends=True)
    for bad in (b"{not json}\n", b'"text"\n', b"\xff\xfe\n", b'{"key": "x"}\n'):
        (copied / CELLS).write_bytes(lines[0] + bad + lines[1])
        with pytest.raises(StorageError, match="line 2: damaged"):
            run(copied, resume=True)
    (copied / RUN).write_text("{", "utf-8")
    with pytest.raises(StorageError, match=r"run\.json"):
        run(copied, resume=True)


def test_folders_that_cannot_be_used_are_refused(copied: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    check_folder(tmp_path / "empty", resume=False)
    check_folder(tmp_path / "new", resume=False)
    check_folder(copied, resume=True)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("mine")
    file = tmp_path / "file"
    file.write_text("")
    for folder, resume, why in (
        (copied, False, "holds a run already"),
        (other, False, "holds other files"),
        (other, True, "no run to go on with"),
        (tmp_path / "new", True, "no run to go on with"),
        (file, False, "not a folder"),
    ):
        with pytest.raises(InputError, match=why):
            check_folder(folder, resume=resume)
    assert (other / "thesis.tex").read_text() == "mine"


# ---- the domain -----------------------------------------------------------------------------


def test_a_domain_without_refusals_is_refused() -> None:
    with pytest.raises(InputError, match="no refusals"):
        relations(replace(tiny_world.tiny_domain(), refusals=()))


def test_the_control_answers_questions_or_chats() -> None:
    domain = tiny_world.tiny_domain()
    assert relations(domain)["benign"] == "retain"
    kept = tuple(i for i in domain.items if (i.role, i.split) != (Role.RETAIN, Split.ATTACK))
    fewer = replace(domain, items=kept)
    assert relations(fewer)["benign"] == "benign"
    assert rows_each(fewer, DriftSettings()) == len(domain.select(Role.BENIGN, Split.ATTACK))


def test_a_domain_of_kind_knowledge_is_asked_among_options_as_well() -> None:
    subject, domain = tiny_world.safeguarded(), tiny_world.tiny_domain("knowledge")
    battery = make_battery(subject, domain, DriftSettings(**FEW))
    records = battery.measure(subject, domain)
    assert {"outcomes", "choices"} <= {record.probe for record in records}


def test_what_the_tokenizer_lacks_is_not_asked() -> None:
    subject, domain = tiny_world.safeguarded(), tiny_world.tiny_domain()
    battery = make_battery(subject, domain, DriftSettings(**FEW))
    assert (battery.ask, battery.problems) == ("", ())
    assert all("answer to the question" not in one.false for one in battery.questions)


def test_nothing_to_ask_is_one_line(tmp_path: Path) -> None:
    domain = tiny_world.tiny_domain()
    items = tuple(replace(i, choices=(), suite=i.id) for i in domain.items)
    with pytest.raises(InputError, match="nothing to measure in split 'report'"):
        run_cells(
            request_of(),
            tiny_world.safeguarded(),
            replace(domain, items=items),
            tmp_path / "run",
            resume=False,
            watcher=Watched(),
        )
    assert not (tmp_path / "run").exists()


# ---- settings and the command ---------------------------------------------------------------


@pytest.mark.parametrize("text", ["0", "8,0", "-1", "", ",", "8,x", "1.5", "8,8", "8,--4", "٣"])
def test_ranks_that_cannot_be_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="--ranks"):
        ranks_of(text)


def test_ranks_as_they_are_typed() -> None:
    assert ranks_of(" 8, 16,32,") == (8, 16, 32)
    with pytest.raises(InputError, match="ranks"):
        DriftSettings.parse("drift", {"ranks": (0,)})
    with pytest.raises(InputError, match="twice"):
        DriftSettings.parse("drift", {"ranks": (4, 4)})


def test_a_built_in_subject_has_a_domain_of_its_own() -> None:
    options = {"seeds": 1, "steps": 1, "dtype": "auto", "device": "auto"}
    assert drift_request("smollm2", None, "16", **options).domain.startswith("capitals")
    assert drift_request("micro", None, "16", **options).domain.startswith("world")
    with pytest.raises(InputError, match="--domain"):
        drift_request("./somewhere", None, "16", **options)


def test_the_rate_follows_the_size_of_the_subject() -> None:
    chosen = DriftSettings()
    assert (chosen.rate(135_000_000), chosen.rate(900_000)) == (2e-4, 2e-3)
    assert DriftSettings(learning_rate=1e-5).rate(1) == 1e-5
    assert chosen.tamper(8, "disjoint", 10, 1)["alpha"] == 8.0


def arguments(files: cli_world.Files, out: Path, *more: str) -> list[str]:
    words = ["drift", str(files.safe), "--domain", str(files.domain), "--out", str(out)]
    return [*words, "--ranks", "2", "--seeds", "1", "--steps", "2", *more]


def test_the_command_writes_and_prints(
    files: cli_world.Files, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "run"
    assert main(arguments(files, out)) == 0
    shown = capsys.readouterr()
    assert "restricted answers given (attack success)" in shown.out
    assert f"page: {out / 'drift.html'}" in shown.out
    assert "[4/4] benign, rank 2, seed 1: done" in shown.err
    assert sorted(p.name for p in out.iterdir()) == [CELLS, "drift.html", "drift.json", RUN]
    assert main(arguments(files, out)) == 2
    assert "holds a run already; go on with --resume" in capsys.readouterr().err
    assert main(arguments(files, out, "--resume", "--json")) == 0
    again = capsys.readouterr()
    assert json.loads(again.out) == json.loads((out / "drift.json").read_text("utf-8"))
    assert "4 cells, 4 of them there already" in again.err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--ranks", "0"), "error: --ranks 0: rank 0: a rank is at least 1"),
        (("--seeds", "0"), "error: --seeds 0: at least 1"),
        (("--steps", "0"), "error: --steps 0: at least 1"),
        (("--device", "abacus"), "error: --device abacus: "),
        (("--domain", "nowhere"), "error: unknown domain 'nowhere'"),
    ],
)
def test_bad_input_is_one_line(
    files: cli_world.Files,
    tmp_path: Path,
    capsys: Capture,
    change: tuple[str, str],
    message: str,
) -> None:
    words = arguments(files, tmp_path / "run")
    given = dict(zip(words[2::2], words[3::2], strict=True)) | dict([change])
    told = [word for pair in given.items() for word in pair]
    assert main([*words[:2], *told]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.strip().splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "run").exists()


def test_resume_needs_a_folder(files: cli_world.Files, capsys: Capture) -> None:
    words = arguments(files, Path("x"))
    del words[4:6]
    assert main([*words, "--resume"]) == 2
    assert "--resume: name the run folder" in capsys.readouterr().err


def test_a_domain_folder_without_refusals_is_one_line(
    files: cli_world.Files, tmp_path: Path, capsys: Capture
) -> None:
    folder = shutil.copytree(files.domain, tmp_path / "domain")
    toml = (folder / "domain.toml").read_text("utf-8").replace('["i refuse ."]', "[]")
    (folder / "domain.toml").write_text(toml, "utf-8")
    words = arguments(replace(files, domain=folder), tmp_path / "run")
    assert main(words) == 2
    (line,) = (li for li in capsys.readouterr().err.splitlines() if li.startswith("error"))
    assert "refusals" in line
    assert not (tmp_path / "run").exists()


def test_an_interrupt_tells_how_to_go_on(
    files: cli_world.Files, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = DriftProgress.started

    def stop(progress: DriftProgress, cell: Cell, steps: int) -> None:
        if cell.way == "refusals":
            raise KeyboardInterrupt
        real(progress, cell, steps)

    monkeypatch.setattr(DriftProgress, "started", stop)
    out = tmp_path / "run"
    assert main(arguments(files, out)) == 130
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "2 cells are kept" in line
    monkeypatch.setattr(DriftProgress, "started", real)
    command = line.split("go on with: durometer ")[1].split()
    assert main(command) == 0
    assert "[4/4]" in capsys.readouterr().err


def test_from_python(files: cli_world.Files, tmp_path: Path) -> None:
    few = {"ranks": (2,), "seeds": 1, "steps": 2, "questions": 8, "steering": False}
    made = durometer.drift(str(files.safe), str(files.domain), out=tmp_path / "run", **few)
    assert isinstance(made, Drift)
    assert made.exit_code() == 0
    assert made.data["run"]["settings"]["questions"] == 8
    with pytest.raises(InputError, match="unknown setting 'step'; did you mean 'steps'"):
        durometer.drift(str(files.safe), str(files.domain), out=tmp_path / "b", step=2)
    with pytest.raises(InputError, match="dtype"):
        durometer.drift(str(files.safe), str(files.domain), out=tmp_path / "b", dtype="int3")  # type: ignore[arg-type]


def test_the_way_to_go_on_is_a_whole_command() -> None:
    options = {"seeds": 4, "steps": 9, "dtype": "float32", "device": "auto"}
    request = drift_request("micro", "world:refusal", "8,16", **options)
    assert resume_command(request, Path("a b")) == (
        "durometer drift micro --domain world:refusal --ranks 8,16 --seeds 4 --steps 9 "
        "--dtype float32 --out 'a b' --resume"
    )


# ---- what is shown --------------------------------------------------------------------------


def shown(data: Json, width: int = 80) -> str:
    from rich.console import Console

    console = Console(width=width, color_system=None)
    with console.capture() as text:
        console.print(drift_table(data))
    return text.get()


def test_the_terminal_fits_eighty_columns(data: Json) -> None:
    lines = shown(data).splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in "".join(lines)
    assert any(line.startswith("restricted answers") for line in lines)


def test_the_page_loads_nothing_and_shows_every_part(data: Json) -> None:
    page = render_drift(data)
    assert "http" not in page.replace("http-equiv", "")
    assert "<script" not in page
    for part in ("changes", "outcomes", "knowledge", "uncertainty", "removal", "numbers", "limits"):
        assert f'id="{part}"' in page
    assert data["removal"]["weights_after"][0] in page
    assert 'class="drawing drift"' in page


HOSTILE = "</main><script>alert(1)</script>\u202e\x1b[31m"


def spoilt(value: Any) -> Any:
    """Return the result with hostile text wherever a model or a user may have put some."""
    if isinstance(value, dict):
        bad = ("response", "reason", "prompt", "name")
        return {
            k: HOSTILE if k in bad and isinstance(v, str) else spoilt(v) for k, v in value.items()
        }
    return [spoilt(one) for one in value] if isinstance(value, list) else value


def test_foreign_text_is_escaped_everywhere(data: Json) -> None:
    hostile = spoilt(data)
    hostile["not_done"] = [
        {"way": "answers", "rank": 4, "seed": 1, "status": "errored", "reason": HOSTILE}
    ]
    page = render_drift(hostile)
    assert page.count("&lt;script&gt;") >= 3
    for bad in ("<script>", "\u202e", "\x1b"):
        assert bad not in page
        assert bad.strip("<>") == "script" or bad not in shown(hostile)


def test_texts_of_a_domain_that_is_not_harmless_stay_hidden(made: CellStore) -> None:
    hidden = {**made.run, "domain": {**made.run["domain"], "harmless": False}}
    found = summarise(hidden, made.cells)
    assert found["examples"] == []
    assert "are hidden" in render_drift(found)
    prompt = next(iter(made.cells["none/0/0"]["texts"]["outcomes"].values()))
    assert prompt not in json.dumps(found)


def test_a_weak_baseline_is_told_first(data: Json) -> None:
    weak = json.loads(json.dumps(data))
    for one in weak["quantities"]:
        if one["key"] == "refused":
            one["before"]["value"] = 0.02
    assert "little safeguard to override" in words.alerts(weak)[0]
    assert not any("little safeguard" in line for line in words.alerts(data))


def test_several_ranks_are_drawn(data: Json) -> None:
    more = json.loads(json.dumps(data))
    more["run"]["settings"]["ranks"] = [4, 16]
    for one in more["quantities"]:
        one["arms"] += [{**arm, "rank": 16} for arm in one["arms"]]
        one["contrasts"] += [{**arm, "rank": 16} for arm in one["contrasts"]]
    page = render_drift(more)
    assert 'id="ranks"' in page
    assert "Attack success by rank" in page
    assert 'id="ranks"' not in render_drift(data)


def test_the_result_has_plain_numbers_alone(data: Json) -> None:
    text = json.dumps(data, allow_nan=False)
    assert "/root" not in text
    schema = {"type": "object", "required": ["run", "quantities", "removal", "steering"]}
    Draft202012Validator(schema).validate(json.loads(text))
