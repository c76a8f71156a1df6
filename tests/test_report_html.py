"""The report page: escaped, self-contained, honest about what is missing, equal to the summary."""

import copy
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import durometer.catalogue  # noqa: F401  (fills the registries)
from durometer.measures.outcomes import Outcome
from durometer.report import figures
from durometer.report.html import commands, hardness, heat_maps, not_begun, render_html
from durometer.report.summary import build_summary
from durometer.trials.record import CheckpointRecord, TrialRecord, TrialSpec
from durometer.trials.store import Store

ENTITIES = 24
OTHERS = [str(outcome) for outcome in Outcome if outcome != Outcome.HARMFUL_USEFUL]
SECRET = "zqx-secret"
HOSTILE = (
    "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>{{ 7 * 191 }}{% raw %}"
    '</style></title></svg><!--" style="background:url(http://evil.example)" ]]>&lt;'
)
VOID = {"meta", "wbr", "br", "img", "link", "input"}


# --- a small run, written as the runner writes it ---


def item(probe: str, split: str, number: int, **fields: Any) -> dict[str, Any]:
    return {
        "probe": probe,
        "split": split,
        "item_id": f"{SECRET}/{split}/{number}",
        "entity": f"{SECRET} entity {split} {number}",
        "suite": ("colours", "sums")[number % 2],
        "prompt_hash": "p",
        "text_hash": "t",
        "response": f"{SECRET} response {number}",
        "outcome": "",
        "correct": None,
        "log_probability": -1.0,
        "mean_probability": 0.5,
        "top_entropy": None,
        "tokens": 3,
        "finish_reason": "stop",
        "parse_status": "parsed",
        "gate": [],
        "refuses_at_first_tokens": False,
    } | fields


def items(
    share: float, retain: float = 1.0, others: list[str] | None = None
) -> list[dict[str, Any]]:
    """Return item records: ``share`` of the restricted ones right, the rest as in ``others``."""
    others = others or ["refusal"]
    found = []
    for split in ("select", "report"):
        for n in range(ENTITIES):
            right = n < share * ENTITIES
            outcome = "harmful_useful" if right else others[n % len(others)]
            found.append(item("outcomes", split, n, outcome=outcome, correct=float(right)))
    found += [
        item("retain", "report", n, correct=float(n < retain * 40), response="") for n in range(40)
    ]
    return found


def trial(
    role: str, tamper: str, seed: int, shares: dict[int, float], **fields: Any
) -> TrialRecord:
    """Return a trial whose success on either split is given by step."""
    purpose = fields.pop("purpose", "screen" if role == "subject" else "control")
    status, others = fields.pop("status", "done"), fields.pop("others", None)
    settings = {} if tamper == "none" else {"learning_rate": 0.002, "steps": 4}
    checkpoints = [
        CheckpointRecord(
            steps,
            {
                "steps": steps,
                "examples": 8.0 * steps,
                "tokens": 90.0 * steps,
                "flops": 1.5e9 * steps,
            },
            None,
            items(share, others=others),
        )
        for steps, share in shares.items()
    ]
    realised = {
        "losses": [2.0, 1.0, 0.5],
        "learning_rates": [0.002, 0.001],
        "changed": {"a": 3.0, "b": 4.0, "c": 0.0},
        "data_order_hash": "feedfacecafe0123",
        "label_sample": [[["ask", False], [f"{SECRET} token", True]]],
        "spent": {"steps": max(shares, default=0)},
    }
    return TrialRecord(
        f"{role}-{tamper}-{seed}-{purpose}",
        TrialSpec(role, tamper, settings, seed, purpose, tuple(shares)),  # type: ignore[arg-type]
        status,
        checkpoints=checkpoints,
        realised={} if tamper == "none" else realised,
        environment={"versions": {"torch": "2"}},
        seconds=1.5,
        **fields,
    )


def describe(store: Store, **changes: Any) -> None:
    brief = {
        "name": "tiny-refusal",
        "fingerprint": "f" * 64,
        "subject_fingerprint": "e" * 64,
        "parameters": 1234567,
        "dtype": "float32",
        "source": {"kind": "builtin", "location": "tiny", "revision": ""},
        "notes": [],
    }
    described: dict[str, Any] = {
        "subjects": {"subject": brief, "undefended": brief | {"name": "tiny"}},
        "domain": {
            "name": "toys",
            "kind": "refusal",
            "description": "names of toys",
            "source": "",
            "counts": {},
            "chance": 0.0,
            "harmless": True,
            "hash": "h",
        },
        "suite": {
            "name": "quick",
            "claim_grade": False,
            "seeds": 3,
            "control_seeds": 1,
            "fresh_seeds": 1,
            "steps": 4,
            "plan": {"utility_limit": 10.0},
            "attacks": [{"tamper": name, "settings": {}} for name in ("lora", "finetune")],
            "digest": "d",
        },
        "not_tested": ["expert routing"],
        "request": {"subject": "tiny-refusal", "domain": "toys", "tampers": [], "seeds": None},
        "planned": 10,
        "wall_seconds": 75.0,
    }
    for name, value in (described | changes).items():
        store.describe(name, value)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(tmp_path / "my run")
    yield opened
    opened.close()


def fill(store: Store, **changes: Any) -> dict[str, Any]:
    """Record ten trials: lora breaks at 2, 2 and 4 steps, finetune never does."""
    describe(store, **changes)
    store.add(trial("subject", "none", 1, {0: 0.0}, purpose="control"))
    store.add(trial("undefended", "none", 1, {0: 1.0}))
    for name in ("lora", "finetune"):
        store.add(trial("undefended", name, 1, {1: 1.0, 4: 1.0}))
    for seed, shares in enumerate(
        ({1: 0.1, 2: 0.9}, {1: 0.2, 2: 0.8}, {1: 0.1, 2: 0.3, 4: 0.8}), 1
    ):
        store.add(trial("subject", "lora", seed, shares, others=OTHERS))
    for seed in (1, 2):
        store.add(trial("subject", "finetune", seed, {1: 0.0, 2: 0.05, 4: 0.05}))
    store.add(
        trial(
            "subject", "finetune", 3, {1: 0.0}, status="diverged", reason="the loss is not finite"
        )
    )
    return build_summary(store)


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails on a tag that is not closed."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.style = ""
        self.stack: list[str] = []
        self.feed(page)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.stack and self.stack[-1] == "style":
            self.style += data
        else:
            self.text += data

    def all(self) -> str:
        return self.text + " ".join(value or "" for _, value in self.attributes)


def assert_harmless_markup(page: Page) -> None:
    assert not {"script", "img", "link", "iframe", "object", "embed", "base", "image", "use"} & set(
        page.tags
    )
    for name, value in page.attributes:
        assert not name.startswith("on"), name
        assert name not in ("src", "srcset", "xlink:href", "action", "formaction")
        assert name != "href" or (value or "").startswith("#")
        assert name != "style" or (value or "").startswith("--v:")
    assert "url(" not in page.style
    assert "@import" not in page.style
    assert page.tags.count("style") == 1


def poison(value: Any) -> Any:
    """Return ``value`` with every free text in it replaced by hostile text."""
    if isinstance(value, dict):
        return {k: v if k in ("status", "axis", "config") else poison(v) for k, v in value.items()}
    if isinstance(value, list):
        return [poison(v) for v in value]
    return HOSTILE if isinstance(value, str) else value


# --- what is safe to open and to pass on ---


def test_page_loads_nothing(store: Store) -> None:
    page = Page(render_html(fill(store), store))
    assert_harmless_markup(page)
    assert "default-src 'none'" in page.all()


def test_hostile_text_stays_text(store: Store) -> None:
    summary = fill(store)
    keep = {t["configuration"] for t in summary["tampers"]}
    hostile = poison(summary)
    for tamper, original in zip(hostile["tampers"], summary["tampers"], strict=True):
        assert original["configuration"] in keep
        tamper["configuration"] = original["configuration"]
        for row, first in zip(tamper["budgets"], original["budgets"], strict=True):
            row["axis"] = first["axis"]
    page = Page(render_html(hostile, store))
    assert_harmless_markup(page)
    assert HOSTILE in page.text
    assert "1337" not in page.all()  # 7 * 191: no template in data is run


def test_hostile_records_stay_text(store: Store) -> None:
    bad = trial("subject", "lora", 9, {2: 0.9}, others=[HOSTILE], reason=HOSTILE, status="diverged")
    for checkpoint in bad.checkpoints:
        for record in checkpoint.items:
            record.update(response=HOSTILE, suite=HOSTILE, entity=HOSTILE + record["entity"])
    bad.realised["label_sample"] = [[[HOSTILE, True]]]
    bad.realised["data_order_hash"] = HOSTILE
    store.add(bad)
    summary = fill(store)
    page = Page(render_html(summary, store))
    assert_harmless_markup(page)
    assert page.text.count("<script>alert(1)</script>") > 5
    assert "1337" not in page.all()


def test_direction_and_control_characters_are_written_out(store: Store) -> None:
    summary = fill(store)
    summary["subject"]["name"] = "a\u202eb\x1b[31m\ud800"
    page = render_html(summary, store)
    page.encode("utf-8")
    assert "a\\u202eb\\u001b[31m\\ud800" in page
    assert "\u202e" not in page
    assert "\x1b" not in page


@pytest.mark.parametrize("domain", [{"harmless": False}, {}])
def test_texts_of_a_domain_that_is_not_harmless_are_hidden(
    store: Store, domain: dict[str, Any]
) -> None:
    summary = fill(store)
    del summary["domain"]["harmless"]
    summary["domain"] |= domain
    hidden = render_html(summary, store)
    assert SECRET not in hidden
    assert "--show-texts" in hidden
    shown = Page(render_html(summary, store, show_texts=True)).text
    assert f"{SECRET} response" in shown
    assert f"{SECRET} token" in shown


def test_without_a_domain_texts_are_hidden(store: Store) -> None:
    summary = fill(store)
    summary["domain"] = None
    assert SECRET not in render_html(summary, store)


# --- what it says ---


def test_numbers_are_the_summary_s(store: Store) -> None:
    summary = fill(store)
    text = " ".join(Page(render_html(summary, store)).text.split())
    assert summary["verdict"] in text
    for tamper in summary["tampers"]:
        for budget in tamper["budgets"]:
            if budget["axis"] != "tokens":
                assert figures.budget_text(budget).value in text
        for checkpoint in tamper["checkpoints"]:
            for name in ("success", "success_report", "retain"):
                rate = checkpoint[name]
                assert f"{figures.rate_text(rate)} n {rate['n']}" in text
            assert figures.points_text(checkpoint["utility_loss"]) in text
    for control in summary["controls"]:
        assert control["detail"] in text


def test_break_is_the_first_row_and_censored_keeps_its_sign(store: Store) -> None:
    summary = fill(store)
    text = " ".join(Page(render_html(summary, store)).text.split())
    rows = text[text.index("How little it takes") : text.index("Success is the share")]
    lora, finetune = rows.index("2 steps (1, 4] 16 examples 3.00 GFLOP"), rows.index("> 4 steps")
    assert lora < finetune
    assert "3 of 3 seeds broke" in rows
    assert "0 of 3 seeds broke" in rows
    assert "> 32 examples > 6.00 GFLOP" in rows


def test_all_six_outcomes_are_drawn(store: Store) -> None:
    page = render_html(fill(store), store)
    for outcome in Outcome:
        assert f'class="outcome {outcome}"' in page
        assert f"outcome-{outcome}" in page


def test_failed_trials_are_visible_at_the_top(store: Store) -> None:
    text = " ".join(Page(render_html(fill(store), store)).text.split())
    head = text[: text.index("How little it takes")]
    assert "1 diverged" in head
    assert "seed 3: the loss is not finite" in head


def test_interrupted_run(store: Store) -> None:
    text = Page(render_html(fill(store, planned=14), store)).text
    assert "interrupted: 10 of 14 planned trials" in text
    assert "Not chosen: the run ended" in text


def test_killed_run_does_not_guess_how_much_is_missing(store: Store) -> None:
    text = Page(render_html(fill(store, planned=None), store)).text
    assert "interrupted: 10 trials recorded" in text
    assert "The run is not complete" in text


def test_empty_run(store: Store) -> None:
    describe(store)
    page = Page(render_html(build_summary(store), store))
    assert_harmless_markup(page)
    assert "No attack on the subject has been recorded." in page.text
    assert "No trial has been recorded." in page.text
    assert "Not measured" in page.text
    assert not_begun(build_summary(store)) == ["lora", "finetune"]


def test_nothing_measured_reads_as_nothing_measured(store: Store) -> None:
    summary = fill(store)
    for name in ("undefended", "worst", "durability_gain", "request", "subject", "suite"):
        summary[name] = None
    for tamper in summary["tampers"]:
        tamper["thresholds"], tamper["budgets"] = {}, []
        for checkpoint in tamper["checkpoints"]:
            names = ("success", "success_report", "never_taught", "retain", "utility_loss")
            checkpoint.update(dict.fromkeys((*names, "over_refusal", "perplexity")))
    page = Page(render_html(summary, store))
    assert_harmless_markup(page)
    budget = page.text[page.text.index("How little") : page.text.index("Success is the share")]
    assert "not measured" in budget
    assert "%" not in budget.split("same report")[1]
    assert "GFLOP" not in budget
    assert "None" not in page.text.replace("None is given", "")
    assert "nan" not in page.text.lower().split()


def test_worst_case_and_its_optimism_gap(store: Store) -> None:
    summary = fill(store)
    rate = summary["tampers"][0]["checkpoints"][-1]["success"]
    summary["worst"] = {
        "tamper": "lora",
        "label": "lora",
        "config": {},
        "configuration": summary["tampers"][0]["configuration"],
        "steps": 2,
        "select": 0.75,
        "report": rate,
        "fresh_seeds": [1001],
        "fresh_select": rate,
        "optimism_gap": 0.125,
        "configurations_tried": 2,
        "expected_excess_sd": 0.56,
        "utility_loss": None,
    }
    text = Page(render_html(summary, store)).text
    assert "75.0 %" in text
    assert "Optimism gap: 12.5 points" in text
    assert "partly luck" in text


@pytest.mark.parametrize(
    ("gain", "said"),
    [
        ({"value": 2.5, "low": 1.25, "high": None, "reason": ""}, "2.50 \u00d7"),
        ({"value": None, "low": 3.0, "high": None, "reason": "not broken"}, "At least 3.00 \u00d7"),
        ({"value": None, "low": None, "high": None, "reason": "no reference"}, "no reference"),
    ],
)
def test_durability_gain_or_its_reason(store: Store, gain: dict[str, Any], said: str) -> None:
    summary = fill(store)
    summary["durability_gain"] = {"reference": "plain"} | gain
    assert said in Page(render_html(summary, store)).text


def test_sample_responses_show_every_state_and_outcome(store: Store) -> None:
    text = Page(render_html(fill(store), store)).text
    shown = text[text.index("Sample responses") : text.index("Utility by suite")]
    assert shown.count(f"{SECRET} response") == 18
    attacked = {"restricted answer, right", "benign deflection", "incoherent or empty"}
    assert {name for name in attacked if name in shown} == attacked


# --- parts ---


def test_heat_map_tells_stopped_from_not_measured(store: Store) -> None:
    tampers = sorted(fill(store)["tampers"], key=hardness)
    (heat,) = heat_maps(tampers)
    assert heat["columns"] == [0, 1, 2, 4]
    lora = heat["rows"][0]["cells"]
    assert [cell.get("reached") for cell in lora] == [False, False, True, True]
    assert [cell["partial"] for cell in lora] == [False, False, False, True]
    shorter = copy.deepcopy(tampers)
    del shorter[0]["checkpoints"][3], shorter[0]["checkpoints"][1]
    kinds = [cell["kind"] for cell in heat_maps(shorter)[0]["rows"][0]["cells"]]
    assert kinds == ["value", "missing", "value", "stopped"]


def test_heat_cells_carry_their_step_for_narrow_screens(store: Store) -> None:
    page = render_html(fill(store), store)
    cells = re.findall(r'<td class="(?:value|stopped|missing)[^>]*>', page)
    assert cells
    assert all(re.search(r'data-at="[^"]+"', cell) for cell in cells)
    assert 'data-axis="small figures: steps"' in page


def test_tampers_without_steps_have_a_map_and_an_axis_of_their_own(store: Store) -> None:
    summary = fill(store)
    for checkpoint in summary["tampers"][0]["checkpoints"]:
        checkpoint["strength"] = checkpoint["steps"] / 8 if checkpoint["steps"] else None
    maps = heat_maps(summary["tampers"])
    assert [heat["axis"] for heat in maps] == ["steps", "strength"]
    assert maps[1]["columns"] == [0, 0.125, 0.25, 0.5]
    assert "against strength" in render_html(summary, store)


def budget(
    median: float | None, intervals: list[list[float | None]], **more: Any
) -> dict[str, Any]:
    highs = [high for _, high in intervals]
    return {
        "axis": "steps",
        "intervals": intervals,
        "median": median,
        "low": min(low if high is None else high for low, high in intervals),  # type: ignore[type-var]
        "high": None if None in highs else max(h for h in highs if h is not None),
        "censored": highs.count(None),
        "seeds": len(intervals),
        "largest_tried": None if median else 64.0,
    } | more


@pytest.mark.parametrize(
    ("row", "value", "interval", "broken"),
    [
        (budget(10.0, [[8, 9], [9, 10], [10, 11]]), "10", "(8, 11]", "3 of 3 seeds"),
        (budget(10.0, [[8, 9], [9, 10], [64, None]]), "10", "(8, > 64)", "2 of 3 seeds"),
        (budget(10.0, [[4, None], [9, 10], [9, 10]]), "10", "(4, > 10)", "2 of 3 seeds"),
        (budget(None, [[64, None], [64, None]]), "> 64", "", "0 of 2 seeds"),
        (budget(1024.0, [[512, 1024]]), "1,024", "(512, 1,024]", "1 of 1 seed"),
        (None, "not measured", "", ""),
    ],
)
def test_budget_in_words(
    row: dict[str, Any] | None, value: str, interval: str, broken: str
) -> None:
    text = figures.budget_text(row)
    assert (text.value, text.interval, text.broken) == (value, interval, broken)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.00 FLOP"),
        (999.4, "999 FLOP"),
        (999.6, "1.00 kFLOP"),
        (3_318_128_640.0, "3.32 GFLOP"),
        (1_706_110_746_624.0, "1.71 TFLOP"),
        (99_960_000.0, "100 MFLOP"),
        (None, "not measured"),
    ],
)
def test_flops_in_words(value: float | None, text: str) -> None:
    assert figures.flops_text(value) == text


def test_decimals_have_a_real_minus_and_no_negative_zero() -> None:
    assert figures.decimal(-7.04) == "\u22127.0"
    assert figures.decimal(-0.04) == "0.0"
    assert figures.quantity(12345.0) == "12,345"
    assert figures.quantity(10.5) == "10.5"
    assert figures.seconds_text(3900) == "1 h 05 min"


def test_a_sparkline_leaves_out_what_is_not_finite() -> None:
    drawn = figures.sparkline([1.0, None, float("nan"), 0.5], "loss")
    assert "nan" not in drawn
    assert figures.sparkline([1.0], "loss") == ""


def test_commands_are_quoted_for_a_shell(store: Store) -> None:
    summary = fill(store)
    summary["request"] |= {"subject": "a; rm -rf ~", "tampers": ["lora:rank=1"], "seeds": 2}
    stress, report = commands(summary, store.folder.name)
    assert "'a; rm -rf ~'" in stress
    assert "lora:rank=1" in stress
    assert "--seeds 2" in stress
    assert report == "durometer report 'my run'"
