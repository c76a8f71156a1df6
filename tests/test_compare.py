"""`compare`: a scoreboard computed from stored records, apart from its controls, never wider."""

import copy
import json
import re
import shutil
import zlib
from pathlib import Path
from typing import Any

import cli_world
import pytest
import records
from cli_world import Files
from records import Share, checkpoint
from rich.console import Console
from test_report_html import HOSTILE, Page, assert_harmless_markup

import durometer
from durometer.cli import main
from durometer.core.errors import InputError, StorageError
from durometer.report.comparison import build_comparison
from durometer.report.comparison_html import render_comparison
from durometer.report.comparison_terminal import comparison_table
from durometer.subjects.base import Source
from durometer.subjects.record import RECORD, facts_of
from durometer.trials.record import CheckpointRecord, TrialRecord
from durometer.trials.store import FILE, Store
from durometer.trials.suites import MeasuringPlan

Capture = pytest.CaptureFixture[str]
STEPS = (1, 2, 4, 8, 16)
BREAKS = dict[str, tuple[int | None, ...]]
KEPT: dict[str, Any] = {"steps": 120, "all_passes": 240, "tokens": 9000, "seconds": 12.5}


# ---- runs and models, as they lie on disk -------------------------------------------------------


def stops(at: int | None, retain: Share, steps: tuple[int, ...] = STEPS) -> list[CheckpointRecord]:
    """Return checkpoints of which the first break is at ``at`` steps (90 % back), None: never."""
    return [
        checkpoint(
            step, 36 if at and step >= at else 0, 36 if at and step >= at else 0, retain=retain
        )
        for step in steps
    ]


def start(right: int, retain: Share, over_refusals: int = 0) -> CheckpointRecord:
    made = checkpoint(0, right, right, retain=retain, never=2)
    refused = records.items("over_refusal", "report", over_refusals)
    outcomes = ["refusal"] * over_refusals + ["benign_deflection"] * (40 - over_refusals)
    for item, outcome in zip(refused, outcomes, strict=True):
        item["outcome"] = outcome
    made.items += refused
    return made


def subject(name: str, digit: str, folder: Path | None = None) -> dict[str, Any]:
    source = {"kind": "builtin", "location": name, "revision": "", "undefended": ""}
    if folder is not None:
        source |= {"kind": "folder", "location": str(folder)}
    return {
        "name": name,
        "fingerprint": digit * 64,
        "subject_fingerprint": digit * 64,
        "parameters": 900_000,
        "dtype": "float32",
        "source": source | {"reference": ""},
        "notes": [],
    }


def run(
    place: Path,
    name: str,
    breaks: BREAKS,
    *,
    digit: str = "a",
    model: Path | None = None,
    reference: BREAKS | None = None,
    retain: int = 40,
    over_refusals: int = 0,
    zero: int = 0,
    **changes: Any,
) -> Path:
    """Write a finished run; ``breaks`` has the step of the break for every seed of a tamper."""
    store = Store(place)
    subjects = {"subject": subject(name, digit, model), "undefended": subject("bare", "0")}
    if reference is not None:
        subjects["reference"] = subject("plain", "9")
    trials: list[TrialRecord] = [
        records.trial(start(zero, retain, over_refusals), purpose="control", tamper="none"),
        records.trial(
            start(40, 40), role="undefended", purpose="control", tamper="none", status="done"
        ),
    ]
    if reference is not None:
        begun = start(0, 40)
        trials.append(records.trial(begun, role="reference", purpose="control", tamper="none"))
    for tamper, seeds in breaks.items():
        after = checkpoint(16, 40, 40, retain=40)
        trials.append(records.trial(after, role="undefended", purpose="control", tamper=tamper))
        for seed, at in enumerate(seeds, 1):
            trials.append(records.trial(*stops(at, retain), seed=seed, tamper=tamper))
    for tamper, seeds in (reference or {}).items():
        for seed, at in enumerate(seeds, 1):
            made = stops(at, 40)
            trials.append(records.trial(*made, seed=seed, tamper=tamper, role="reference"))
    described: dict[str, Any] = {
        "request": {"subject": name, "domain": "toys", "tampers": []},
        "subjects": subjects,
        "domain": {
            "name": "toys",
            "kind": "refusal",
            "description": "names of toys",
            "chance": 0.0,
            "harmless": True,
            "hash": "h" * 64,
        },
        "suite": {
            "name": "quick",
            "claim_grade": False,
            "seeds": len(next(iter(breaks.values()))),
            "steps": 16,
            "plan": MeasuringPlan(utility_limit=10.0).canonical(),
            "attacks": [{"tamper": tamper, "settings": {}} for tamper in breaks],
        },
        "planned": len(trials),
    }
    for key, value in (described | changes).items():
        store.describe(key, value)
    for number, trial in enumerate(trials):
        trial.key = f"{number}"
        store.add(trial)
    store.close()
    return place


def hardened(
    folder: Path,
    stages: list[Any],
    breaks: BREAKS | None,
    *,
    digit: str = "a",
    **options: Any,
) -> Path:
    """Write a hardened model's record, and the run on it in ``stress``."""
    folder.mkdir(parents=True)
    record = {
        "domain": {"spec": "toys"},
        "dtype": "float32",
        "fingerprint": digit * 64,
        "reference": "",
        "safeguards": [
            {"name": s, "access": "weights", "cost": KEPT} if isinstance(s, str) else s
            for s in stages
        ],
    }
    (folder / RECORD).write_text(json.dumps(record), "utf-8")
    if breaks is not None:
        run(folder / "stress", folder.name, breaks, digit=digit, model=folder, **options)
    return folder


WEAK: BREAKS = {"lora": (2, 2, 4), "finetune": (4, 4, None)}
STRONG: BREAKS = {"lora": (8, 16, 16), "finetune": (None, None, None)}
SHORT: BREAKS = {"lora": (2,)}


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two safeguards and a lock, compared with the same plain safeguard."""
    root = tmp_path_factory.mktemp("three")
    return [
        hardened(root / "weak", ["refusal", "lat"], WEAK, digit="a", reference=WEAK),
        hardened(root / "strong", ["refusal", "tar"], STRONG, digit="b", reference=WEAK),
        hardened(root / "lock", ["refusal", "inflate"], STRONG, digit="c", reference=WEAK),
    ]


@pytest.fixture
def one(tmp_path: Path) -> Path:
    """One hardened model with a short run."""
    return hardened(tmp_path / "one", ["refusal", "tar"], SHORT, digit="a")


@pytest.fixture(scope="module")
def board(three: list[Path]) -> dict[str, Any]:
    """The scoreboard of the three; tests leave it as it is."""
    return build_comparison(three)


def cell(row: dict[str, Any], tamper: str) -> dict[str, Any]:
    (found,) = [c for c in row["cells"].values() if c["name"] == tamper]
    return dict(found)


def budget(row: dict[str, Any], tamper: str, within: bool = True, axis: str = "steps") -> Any:
    wanted = (0.5, within, axis)
    return next(
        b
        for b in cell(row, tamper)["budgets"]
        if (b["recovery"], b["within_limit"], b["axis"]) == wanted
    )


# ---- the figures --------------------------------------------------------------------------------


def test_every_figure_is_that_of_the_records(board: dict[str, Any]) -> None:
    names = [row["name"] for row in board["safeguards"]]
    assert names == ["refusal+tar", "refusal+lat", "plain"]
    strong, weak, plain = board["safeguards"]
    # Seeds broke in (4, 8], (8, 16], (8, 16]; none did in finetune.
    assert budget(strong, "lora")["median"] == 16
    assert budget(strong, "lora")["intervals"] == [[4.0, 8.0], [8.0, 16.0], [8.0, 16.0]]
    assert budget(strong, "finetune")["median"] is None
    assert budget(strong, "finetune")["largest_tried"] == 16
    assert budget(weak, "lora", axis="examples")["median"] == 20
    assert weak["first_broken"] | {"configuration": ""} == {
        "configuration": "",
        "label": "lora",
        "unit": "steps",
        "within_limit": True,
        "seeds_broken": 3,
        "seeds": 3,
        "steps": 2.0,
        "examples": 20.0,
        "flops": 2000.0,
    }
    assert strong["zero_step"]["success"]["rate"] == 0
    assert strong["zero_step"]["never_taught"]["rate"] == 0.05
    assert strong["cost"]["passes"] == 480
    assert strong["cost"]["seconds"] == 25.0
    # The reference is the plain safeguard: it has the budgets that the gain is measured against.
    assert budget(plain, "lora")["median"] == 2
    assert strong["gain"]["reference"] == "plain"
    assert cell(strong, "lora")["gain"]["value"] == pytest.approx(8.0)
    assert cell(strong, "finetune")["gain"]["value"] is None
    assert cell(strong, "finetune")["gain"]["censored"]
    assert board["differences"] == []


def test_controls_and_provider_side_safeguards_stand_apart(tmp_path: Path) -> None:
    api = {"name": "antidote", "access": "api", "cost": KEPT}
    folders = [
        hardened(tmp_path / "a", ["tar"], SHORT, digit="a"),
        hardened(tmp_path / "b", ["refusal", "inflate"], SHORT, digit="b"),
        hardened(tmp_path / "c", ["plain_sft"], SHORT, digit="c"),
        hardened(tmp_path / "d", ["norm_noise"], SHORT, digit="d"),
        hardened(tmp_path / "e", ["noop"], SHORT, digit="e"),
        hardened(tmp_path / "f", ["refusal", api], SHORT, digit="f"),
        run(tmp_path / "never", "micro-never", SHORT, digit="1"),
    ]
    board = build_comparison(folders)
    assert [row["name"] for row in board["safeguards"]] == ["tar"]
    assert [row["name"] for row in board["api"]] == ["refusal+antidote"]
    told = {row["name"]: row["control"] for row in board["controls"]}
    assert told == {
        "refusal+inflate": "must break under rescale",
        "plain_sft": "the data without a method",
        "norm_noise": "noise of the same norm",
        "noop": "nothing was done",
        "micro-never": "never taught: must hold",
        "bare": "never safeguarded",
    }
    page = render_comparison(board)
    open_weights = page[page.index('<section id="safeguards">') : page.index('id="controls"')]
    assert "antidote" not in open_weights
    assert "inflate" not in open_weights
    text = shown(board, 120)
    first = text[: text.index("Controls")]
    assert "antidote" not in first
    assert "inflate" not in first


def test_an_undefended_subject_has_no_budget_and_counts_once(board: dict[str, Any]) -> None:
    (bare,) = [row for row in board["controls"] if row["role"] == "undefended"]
    assert bare["zero_step"]["success"]["rate"] == 1
    assert bare["first_broken"] is None
    assert not any(c["budgets"] for c in bare["cells"].values())
    assert all(c["after"]["success_report"]["rate"] == 1 for c in bare["cells"].values())


def test_a_model_that_is_ruined_comes_last_and_is_marked(tmp_path: Path) -> None:
    ruined: BREAKS = {"lora": (16, 16, 16), "finetune": (None, None, None)}
    folders = [
        hardened(tmp_path / "a", ["broken"], ruined, digit="a", retain=30, over_refusals=10),
        hardened(tmp_path / "b", ["weak"], WEAK, digit="b"),
    ]
    board = build_comparison(folders)
    assert [row["name"] for row in board["safeguards"]] == ["weak", "broken"]
    broken = board["safeguards"][1]
    assert broken["cost"]["retain_points"]["value"] == pytest.approx(25.0)
    assert broken["cost"]["retain_points"]["low"] < 25 < broken["cost"]["retain_points"]["high"]
    assert broken["cost"]["over_refusal"]["rate"] == 0.25
    # Nothing keeps ability within the limit any more, so the break shows only without it.
    assert budget(broken, "lora")["median"] is None
    assert budget(broken, "lora", within=False)["median"] == 16
    assert broken["first_broken"]["within_limit"] is False
    page = render_comparison(board)
    assert "costs more than the limit" in page
    assert "costs more than the limit" in flat(shown(board, 120))
    assert "outside the limit" in flat(shown(board, 120))
    # What it holds against within the limit is not shown as held.
    glance = page[page.index('id="matrix"') : page.index('id="attacks"')]
    kinds = re.findall(r'<td class="(\w+)"', glance)
    assert kinds == ["broke", "broke", "ruined", "missing", "open", "open"]


def test_what_differs_is_said_in_one_line(tmp_path: Path) -> None:
    other = {
        "suite": {
            "name": "standard",
            "claim_grade": False,
            "seeds": 1,
            "steps": 16,
            "plan": MeasuringPlan(utility_limit=5.0).canonical(),
            "attacks": [{"tamper": "lora", "settings": {}}],
        }
    }
    folders = [
        hardened(tmp_path / "a", ["tar"], STRONG, digit="a"),
        hardened(tmp_path / "b", ["lat"], {"lora": (2,)}, digit="b", **other),
    ]
    board = build_comparison(folders)
    told = board["differences"]
    assert "suites (quick: a, standard: b)" in told
    assert "seeds (3: a, 1: b)" in told
    assert "attacks (2 of them: a, 1 of them: b)" in told
    assert "utility limits (10 points: a, 5 points: b)" in told
    line = [x for x in shown(board, 1000).splitlines() if x.startswith("Not like for like")]
    assert len(line) == 1
    lat = next(row for row in board["safeguards"] if row["name"] == "lat")
    assert {c["name"] for c in lat["cells"].values()} == {"lora"}
    third = hardened(tmp_path / "c", ["sam"], SHORT, digit="c", **other)
    told = build_comparison([*folders, third])["differences"]
    assert "suites (mostly standard, quick: a)" in told


def test_the_same_safeguard_twice_is_told_apart(tmp_path: Path) -> None:
    folders = [
        hardened(tmp_path / "one", ["tar"], SHORT, digit="a"),
        hardened(tmp_path / "two", ["tar"], SHORT, digit="b"),
    ]
    names = {row["name"] for row in build_comparison([*folders, folders[0]])["safeguards"]}
    assert names == {"tar (one)", "tar (two)"}


def test_a_reference_that_was_attacked_itself_is_shown_once(tmp_path: Path) -> None:
    own = hardened(tmp_path / "own", ["refusal"], SHORT, digit="9")
    other = hardened(tmp_path / "tar", ["tar"], SHORT, digit="a", reference=SHORT)
    board = build_comparison([other, own])
    assert [row["name"] for row in board["safeguards"]] == ["tar", "refusal"]


def test_a_run_folder_finds_the_record_of_its_model(tmp_path: Path) -> None:
    model = hardened(tmp_path / "model", ["tar"], None, digit="a")
    apart = run(tmp_path / "apart", "model", SHORT, digit="a", model=model)
    (row,) = build_comparison([apart])["safeguards"]
    assert (row["name"], row["cost"]["passes"]) == ("tar", 240)
    # The folder now holds other weights: what it says is not about those that were attacked.
    late = run(tmp_path / "late", "model", SHORT, digit="b", model=model)
    (row,) = build_comparison([late])["unknown"]
    assert (row["name"], row["cost"]["passes"]) == ("model", None)
    inside = hardened(tmp_path / "again", ["lat"], SHORT, digit="c")
    (row,) = build_comparison([inside / "stress"])["safeguards"]
    assert row["name"] == "lat"


# ---- where a model comes from -------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["inflate", "antidote"])
def test_a_control_without_its_record_is_no_safeguard(tmp_path: Path, stage: str) -> None:
    api = {"name": "antidote", "access": "api", "cost": KEPT}
    model = hardened(
        tmp_path / "model", [api if stage == "antidote" else stage], STRONG, reference=WEAK
    )
    other = hardened(tmp_path / "other", ["tar"], SHORT, digit="b")
    shutil.move(model / "stress", tmp_path / "run")
    shutil.move(model, tmp_path / "elsewhere")
    board = build_comparison([tmp_path / "run", other])
    assert [row["name"] for row in board["safeguards"]] == ["plain", "tar"]
    (row,) = board["unknown"]
    assert (row["name"], row["access"]) == ("model", None)
    page, text = render_comparison(board), shown(board, 120)
    for told in map(flat, (Page(page).all(), text)):
        assert "Origin unknown" in told
        assert "Move the hardened model's folder back to where the run found it" in told
    assert '<section id="unknown">' in page
    assert "Origin unknown by attack" in text
    # With its folder in place again it is what it was.
    shutil.move(tmp_path / "elsewhere", model)
    board = build_comparison([tmp_path / "run", other])
    assert board["unknown"] == []
    assert [r["safeguards"] for r in board["controls"] + board["api"] if r["safeguards"]] == [
        [stage]
    ]


def test_what_the_run_kept_of_its_model_stands_in_for_the_record(tmp_path: Path) -> None:
    kept = {"safeguards": [{"name": "inflate", "access": "weights"}], "unchanged": False}
    plain = {"safeguards": [{"name": "refusal", "access": "weights"}], "unchanged": False}
    folder = run(
        tmp_path / "run",
        "gone",
        SHORT,
        model=tmp_path / "gone",
        reference=SHORT,
        hardening={"subject": kept, "reference": plain, "undefended": {}},
    )
    board = build_comparison([folder])
    assert board["unknown"] == []
    assert [row["name"] for row in board["safeguards"]] == ["refusal"]
    assert [row["name"] for row in board["controls"]] == ["inflate", "bare"]


@pytest.mark.parametrize(
    ("record", "facts"),
    [
        ({"safeguards": 3}, {}),
        ({"safeguards": [{"access": "api"}]}, {}),
        ({"safeguards": [], "fingerprint": "a", "base": "x"}, {}),
        ({"fingerprint": "b", "dtype": "float32"}, {}),  # of other weights
        (
            {"safeguards": ["lat", {"name": "tar", "access": ["api"]}]},
            {
                "safeguards": [{"name": "lat", "access": None}, {"name": "tar", "access": None}],
                "unchanged": False,
            },
        ),
    ],
)
def test_a_record_of_somebody_else_stops_no_run(
    tmp_path: Path, record: dict[str, Any], facts: dict[str, Any]
) -> None:
    (tmp_path / RECORD).write_text(json.dumps({"domain": {}} | record), "utf-8")
    assert facts_of(Source("folder", str(tmp_path)), "a", "float32") == facts
    assert facts_of(Source("hub", str(tmp_path)), "a", "float32") == {}


def test_a_reference_is_known_by_a_record_of_its_own_weights_alone(tmp_path: Path) -> None:
    plain = hardened(tmp_path / "plain", ["refusal"], None, digit="9")
    about = subject("plain", "9", plain)
    for digit, group in (("9", "safeguards"), ("8", "unknown")):
        roles = {
            "subject": subject("tar", "a"),
            "undefended": subject("bare", "0"),
            "reference": about | {"fingerprint": digit * 64},
        }
        folder = run(tmp_path / digit, "tar", SHORT, reference=SHORT, subjects=roles)
        (row,) = [r for r in build_comparison([folder])[group] if r["role"] == "reference"]
        assert row["cost"]["passes"] == (240 if group == "safeguards" else None)


# ---- the order of the safeguards ----------------------------------------------------------------


def unmeasured(folder: Path, name: str, tampers: BREAKS, digit: str) -> Path:
    """Write a hardened model whose every attack ran out of memory, and the run on it."""
    made = hardened(folder, [name], tampers, digit=digit)
    with Store(made / "stress")._connection as connection:
        rows = connection.execute("select key, record from trials").fetchall()
        for key, blob in rows:
            trial = json.loads(zlib.decompress(blob))
            if trial["spec"]["purpose"] == "screen":
                trial |= {"status": "out_of_memory", "checkpoints": []}
                text = zlib.compress(json.dumps(trial).encode())
                words = "update trials set record = ?, status = 'out_of_memory' where key = ?"
                connection.execute(words, (text, key))
    return made


def test_a_model_on_which_nothing_was_judged_comes_last(tmp_path: Path) -> None:
    ruined: BREAKS = {"lora": (16, 16, 16), "finetune": (None, None, None)}
    folders = [
        unmeasured(tmp_path / "a", "unseen", STRONG, "a"),
        hardened(tmp_path / "b", ["weak"], WEAK, digit="b"),
        hardened(tmp_path / "c", ["ruined"], ruined, digit="c", retain=30),
        hardened(tmp_path / "d", ["strong"], STRONG, digit="d"),
    ]
    board = build_comparison(folders)
    names = [row["name"] for row in board["safeguards"]]
    assert names == ["strong", "weak", "ruined", "unseen"]
    assert board["ranking"]["ranked"]
    assert len(board["ranking"]["attacks"]) == 2
    text = shown(board, 120)
    by_model = text[: text.index("Controls")]
    assert "not judged" in by_model[by_model.index("unseen") :]
    assert "not judged" not in by_model[: by_model.index("unseen")]
    page = render_comparison(board)
    assert "over the attacks judged on all of them (2);" in page
    table = page[page.index('<section id="safeguards">') : page.index('<section id="controls">')]
    assert table.count("not judged") == 1


def test_only_attacks_that_were_judged_on_all_count_for_the_order(tmp_path: Path) -> None:
    # finetune breaks the first at once, but nobody tried it on the second.
    folders = [
        hardened(tmp_path / "a", ["one"], {"lora": (8,), "finetune": (1,)}, digit="a"),
        hardened(tmp_path / "b", ["two"], {"lora": (4,)}, digit="b"),
    ]
    board = build_comparison(folders)
    assert [row["name"] for row in board["safeguards"]] == ["one", "two"]
    (counted,) = board["ranking"]["attacks"]
    assert board["safeguards"][0]["cells"][counted]["name"] == "lora"


def test_the_checkpoint_from_before_the_safeguard_orders_nothing(tmp_path: Path) -> None:
    folders = [
        hardened(tmp_path / "a", ["one"], {"lora": (2,), "base_reversion": (4,)}, digit="a"),
        hardened(tmp_path / "b", ["two"], {"lora": (8,), "base_reversion": (1,)}, digit="b"),
    ]
    board = build_comparison(folders)
    assert [row["name"] for row in board["safeguards"]] == ["two", "one"]
    assert len(board["ranking"]["attacks"]) == 1


@pytest.mark.parametrize("unseen", [False, True])
def test_without_an_attack_in_common_nothing_is_ranked(tmp_path: Path, unseen: bool) -> None:
    tampers: tuple[BREAKS, BREAKS] = ({"lora": (2,)}, {"finetune": (8,)})
    names = ("one", "two")
    if unseen:
        folders = [
            unmeasured(tmp_path / n, n, t, d) for n, t, d in zip(names, tampers, "ab", strict=True)
        ]
    else:
        folders = [
            hardened(tmp_path / n, [n], t, digit=d)
            for n, t, d in zip(names, tampers, "ab", strict=True)
        ]
    reason = "no attack could be judged" if unseen else "no attack was judged on all of them"
    for order in (folders, folders[::-1]):
        board = build_comparison(order)
        assert [row["name"] for row in board["safeguards"]] == [path.name for path in order]
        assert board["ranking"] == {"ranked": False, "attacks": [], "reason": reason}
        assert f"Not ranked: {reason}" in shown(board, 120)
        page = render_comparison(board)
        assert reason in page
        assert "comes first" not in page


# ---- nothing to break ---------------------------------------------------------------------------


def idle(place: Path, digit: str, *, undefended: str = "", right: int = 36, **changes: Any) -> Path:
    """Write the run on a model that gives the answers before any attack; it planned more."""
    store = Store(place)
    subjects = {"subject": subject("idle", digit, place.parent)}
    trials = [records.trial(start(right, 40), purpose="control", tamper="none")]
    if undefended:
        subjects["undefended"] = subject("bare", undefended)
        begun = start(36, 40)
        trials.append(records.trial(begun, role="undefended", purpose="control", tamper="none"))
    run(place.parent / "other", "x", SHORT)
    with_attacks = Store.open(place.parent / "other")
    for name in ("request", "domain", "suite"):
        store.describe(name, with_attacks.description(name))
    with_attacks.close()
    for name, value in ({"subjects": subjects, "planned": 9} | changes).items():
        store.describe(name, value)
    for number, trial in enumerate(trials):
        trial.key = str(number)
        store.add(trial)
    store.close()
    return place


def recorded(folder: Path, stage: str, digit: str, base: str) -> None:
    hardened(folder, [stage], None, digit=digit)
    record = json.loads((folder / RECORD).read_text("utf-8"))
    record["base"] = {"fingerprint": base * 64}
    (folder / RECORD).write_text(json.dumps(record), "utf-8")


@pytest.mark.parametrize("known_by", ["record", "run", "kept"])
def test_an_unchanged_model_is_a_control_with_nothing_to_break(
    tmp_path: Path, known_by: str
) -> None:
    model = tmp_path / "model"
    if known_by == "record":
        recorded(model, "noop", "0", "0")
    kept = {"safeguards": [{"name": "noop", "access": "weights"}], "unchanged": True}
    more = {"hardening": {"subject": kept}} if known_by == "kept" else {}
    place = idle(model / "stress", "0", undefended="0" if known_by == "run" else "", **more)
    other = hardened(tmp_path / "tar", ["tar"], SHORT, digit="a")
    board = build_comparison([place, other])
    noop, bare = board["controls"]
    assert noop["name"] == ("idle" if known_by == "run" else "noop")
    words = "the same weights as the undefended model"
    assert noop["control"] == (words if known_by == "run" else "nothing was done")
    assert noop["zero_step"]["success"]["rate"] == pytest.approx(0.9)
    # It was not attacked, so that the undefended model of the other run keeps its own row.
    assert (bare["role"], len(bare["cells"])) == ("undefended", 1)
    assert [row["name"] for row in board["safeguards"]] == ["tar"]
    assert board["differences"] == []
    assert "nothing to break" in flat(shown(board, 120))
    assert "nothing to break" in Page(render_comparison(board)).all()
    alone = build_comparison([place])
    assert [row["nothing_to_break"] for row in alone["controls"]] == [True]
    assert alone["ranking"]["reason"] is None
    assert "Not ranked" not in shown(alone, 120)


def test_an_unchanged_model_that_refuses_already_is_a_control_too(tmp_path: Path) -> None:
    recorded(tmp_path / "noop", "noop", "0", "0")
    idle(tmp_path / "noop" / "stress", "0", undefended="0", right=2)
    (row,) = build_comparison([tmp_path / "noop"])["controls"]
    assert (row["name"], row["nothing_to_break"]) == ("noop", True)
    assert row["zero_step"]["success"]["rate"] == pytest.approx(0.05)


def test_other_runs_without_an_attack_are_refused(tmp_path: Path) -> None:
    recorded(tmp_path / "sft", "plain_sft", "a", "0")
    changed = idle(tmp_path / "sft" / "stress", "a", undefended="0")
    with pytest.raises(InputError, match="nothing to break, and it is not known to equal"):
        build_comparison([changed])
    # It is safeguarded, so that the run was merely interrupted before its first attack.
    recorded(tmp_path / "noop", "noop", "0", "0")
    early = idle(tmp_path / "noop" / "stress", "0", right=4)
    with pytest.raises(InputError, match="the run is not finished"):
        build_comparison([early])


# ---- terminal, page, files ----------------------------------------------------------------------


def shown(board: dict[str, Any], width: int) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as text:
        console.print(comparison_table(board))
    return text.get()


def flat(text: str) -> str:
    return re.sub(r"\s+", " ", text)


@pytest.mark.parametrize("width", [80, 120])
def test_the_terminal_shows_all_of_it(width: int, board: dict[str, Any]) -> None:
    text = shown(board, width)
    assert max(map(len, text.splitlines())) <= width
    for words in ("Safeguards of open weights", "Controls", "> 16", "(4, 16]", "8.00 x"):
        assert words in text
    assert "…" not in text
    by_attack = text[text.index("Safeguards by attack") :]
    assert re.search(r"lora\s*\n\s+refusal\s+16 .* 8.00 x\s*\n\s+\+tar", by_attack)


def test_long_names_crowd_out_no_figure(board: dict[str, Any]) -> None:
    crowded = copy.deepcopy(board)
    for row in crowded["safeguards"]:
        row["name"] = "+".join(["a_safeguard_with_a_long_name"] * 3)
        row["first_broken"]["label"] = "lora (learning_rate=0.0003, rank=16, frozen_a=True)"
    lines = shown(crowded, 80).splitlines()
    assert max(map(len, lines)) <= 80
    headings = [line for line in lines if re.match(r"(model|attack, model)", line)]
    assert len(headings) == 4
    assert all(line.rstrip().endswith("gain") for line in headings)
    assert sum(bool(re.search(r"(\d x|none)\s*$", line)) for line in lines) >= 9


def test_the_page_is_harmless_and_holds_the_figures(board: dict[str, Any]) -> None:
    page = Page(render_comparison(board))
    assert_harmless_markup(page)
    for words in ("refusal+tar", "2,000 FLOP", "20 examples", "> 16", "8.00 x", "480 passes"):
        assert words.replace("2,000 FLOP", "2.00 kFLOP") in page.all()


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    stage = {"name": HOSTILE, "access": "weights", "cost": KEPT}
    folder = hardened(tmp_path / "x", [stage], SHORT, digit="a")
    board = build_comparison([folder])
    page = Page(render_comparison(board))
    assert_harmless_markup(page)
    assert HOSTILE in page.text
    assert "\x1b" not in shown(board | {"differences": ["\x1b[31m"]}, 80)


def test_files_are_written_where_asked_and_json_is_alone(
    one: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "out"
    words = ["compare", str(one)]
    assert main([*words, "--out", str(out)]) == 0
    first = capsys.readouterr().out
    assert f"page: {out / 'comparison.html'}" in first
    assert sorted(path.name for path in out.iterdir()) == ["comparison.html", "comparison.json"]
    assert main([*words, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((out / "comparison.json").read_text("utf-8"))
    made = durometer.compare([one], out=out)
    assert made.data == printed
    assert made.folder == out
    assert durometer.compare(str(one)).folder is None


def test_nothing_in_the_folders_changes(one: Path) -> None:
    def state() -> dict[str, bytes]:
        files = [path for path in one.rglob("*") if path.is_file()]
        return {str(path): path.read_bytes() for path in files if path.name != f"{FILE}-shm"}

    before = state()
    build_comparison([one])
    assert state() == before


# ---- what cannot be compared --------------------------------------------------------------------


def test_bad_input_is_one_line(tmp_path: Path, capsys: Capture) -> None:
    good = hardened(tmp_path / "good", ["tar"], SHORT, digit="a")
    untouched = hardened(tmp_path / "untouched", ["tar"], None)
    half = hardened(tmp_path / "half", ["tar"], SHORT, digit="a", planned=99)
    store = Store(tmp_path / "begun")
    store.close()
    (tmp_path / "empty").mkdir()
    swapped = hardened(tmp_path / "swapped", ["tar"], SHORT, digit="a")
    record = json.loads((swapped / RECORD).read_text("utf-8"))
    (swapped / RECORD).write_text(json.dumps(record | {"fingerprint": "7" * 64}), "utf-8")
    garbled = hardened(tmp_path / "garbled", ["tar"], SHORT, digit="a")
    (garbled / RECORD).write_text("{", "utf-8")
    odd = hardened(tmp_path / "odd", ["tar"], SHORT, digit="a")
    (odd / RECORD).write_text(json.dumps(record | {"safeguards": [{"cost": 3}]}), "utf-8")
    kind = {"name": "toys", "kind": "knowledge", "description": "", "chance": 0.0, "hash": "h" * 64}
    mixed = hardened(tmp_path / "mixed", ["tar"], SHORT, digit="a", domain=kind)
    newer = hardened(
        tmp_path / "newer",
        ["tar"],
        SHORT,
        digit="a",
        domain=kind | {"kind": "refusal", "hash": "i" * 64},
    )
    cases = [
        ([tmp_path / "empty"], "no finished run here"),
        ([tmp_path / "nowhere"], "no finished run here"),
        ([tmp_path / "begun"], "ended before anything was measured"),
        ([untouched], "a hardened model without a run in stress/"),
        ([good, half], "the run is not finished"),
        ([swapped], "a run on other weights"),
        ([garbled], "cannot be read"),
        ([odd], "cannot be read"),
        ([good, mixed], "toys:refusal (.*good), toys:knowledge (.*mixed)"),
        ([good, newer], "runs on different domains cannot be compared"),
    ]
    for folders, message in cases:
        assert main(["compare", *map(str, folders)]) == 2, folders
        told = capsys.readouterr()
        assert told.out == ""
        assert told.err.count("\n") == 1
        assert re.search(message.replace("(", r"\(").replace(")", r"\)"), told.err), told.err
    assert main(["compare"]) == 2


def test_a_damaged_store_is_one_line(tmp_path: Path, capsys: Capture) -> None:
    place = run(tmp_path / "r", "x", SHORT)
    for damage in ("page", "record", "field"):
        copied = shutil.copytree(place, tmp_path / damage)
        if damage == "page":
            (copied / FILE).write_bytes(b"SQLite format 3\x00" + b"\x07" * 4096)
        else:
            blob = zlib.compress(b"{}") if damage == "record" else _without_items(place)
            store = Store(copied)
            store._connection.execute("update trials set record = ? where key = '0'", (blob,))
            store.close()
        assert main(["compare", str(copied)]) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1
        assert str(copied) in told


def _without_items(place: Path) -> bytes:
    store = Store(place)
    plain = next(store.trials()).as_dict()
    store.close()
    plain["checkpoints"][0]["items"] = [{"probe": "retain"}]
    return zlib.compress(json.dumps(plain).encode())


def test_a_place_that_cannot_be_written_is_told(one: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", "utf-8")
    with pytest.raises(InputError, match="not a folder"):
        durometer.compare([one], out=tmp_path / "file")
    with pytest.raises(StorageError):
        durometer.compare([one], out=tmp_path / "file" / "inside")
    with pytest.raises(InputError, match="name the folders"):
        durometer.compare([])


# ---- for real -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return cli_world.write_files(tmp_path_factory.mktemp("files"))


def test_a_real_run_gives_the_figures_of_its_own_summary(
    files: Files, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "run"
    stage = {"name": "refusal", "access": "weights", "cost": KEPT}
    record = {"domain": {}, "safeguards": [stage]}
    (files.safe / RECORD).write_text(json.dumps(record), "utf-8")
    assert cli_world.stress(files, out) == 0
    (files.safe / RECORD).unlink()  # what the run kept of it is enough
    capsys.readouterr()
    assert main(["compare", str(out), "--json"]) == 0
    board = json.loads(capsys.readouterr().out)
    summary = json.loads((out / "summary.json").read_text("utf-8"))
    (row,) = board["safeguards"]
    (tamper,) = summary["tampers"]
    found = row["cells"][tamper["configuration"]]
    assert found["budgets"] == [b for b in tamper["budgets"] if b["axis"] != "tokens"]
    assert row["zero_step"]["success"] == tamper["checkpoints"][0]["success_report"]
    assert row["first_broken"]["steps"] == tamper["budget_to_break"]["steps"]
    assert (row["name"], row["access"], row["cost"]["passes"]) == ("refusal", "weights", None)


def test_a_real_run_on_an_unchanged_model_is_a_control(
    files: Files, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "run"
    words = ["stress", str(files.base), "--domain", str(files.domain), "--out", str(out)]
    assert main([*words, "--tamper", cli_world.BREAKING, "--seeds", "1"]) == 2
    assert "nothing to break" in capsys.readouterr().err
    # Nobody hardened it: that it answers is what there is to say of it.
    (row,) = build_comparison([out])["open"]
    assert (row["name"], row["control"], row["open"]) == ("base", "", True)
    assert row["zero_step"]["success"]["rate"] > 0.5
    assert "answers at once" in flat(shown(build_comparison([out]), 120))
    store = Store.open(out)
    about = store.description("subjects")["subject"]
    store.close()
    record = {
        "domain": {},
        "dtype": about["dtype"],
        "fingerprint": about["fingerprint"],
        "base": {"fingerprint": about["fingerprint"]},
        "safeguards": [{"name": "noop", "access": "weights", "cost": KEPT}],
    }
    (files.base / RECORD).write_text(json.dumps(record), "utf-8")
    try:
        (row,) = build_comparison([out])["controls"]
    finally:
        (files.base / RECORD).unlink()
    assert (row["name"], row["nothing_to_break"]) == ("noop", True)
