"""From the rows of the known-answer set to its summary and the page about it."""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from parents import FAMILIES
from scipy.stats import rankdata
from variants import ABLATION

from durometer.audit.forensics import calibration
from durometer.core.statistics import clopper_pearson

Row = dict[str, Any]
RESAMPLES = 2000
HALVES = ("calibration", "held out")
# Which finding speaks first when several do; the rest describe the same change in other words.
ORDER = {
    "WF-01": "lineage", "WF-10": "ablation", "WF-12": "ablation (reading)", "WF-40": "merge",
    "WF-30": "pruning", "WF-62": "vocabulary", "WF-04": "scaling", "WF-50": "quantisation",
    "WF-20": "low rank", "WF-60": "low rank", "WF-31": "noise", "WF-21": "fine-tuning",
    "WF-61": "norms",
}  # fmt: skip
PUBLISHED = {
    "two signals": 0.95, "weight recovery alone": 0.90, "refusal gap alone": 0.84,
}  # fmt: skip
"""AUROC of arXiv 2607.01854, on 57 ablated and 37 other public checkpoints: other data."""


def verdict(row: Row) -> str:
    """Return the first finding that speaks, ``inconclusive``, or ``nothing``."""
    status = {f["check"]: f for f in row["findings"]}
    for check, name in ORDER.items():
        finding = status.get(check)
        if finding and finding["status"] == "found":
            removed = finding["evidence"].get("strength", 1)
            if check in ABLATION and removed < 0:
                return "direction strengthened"
            if finding["severity"] != "info" or name == "scaling":
                return name
    doubtful = [
        f for f in row["findings"]
        if f["status"] == "inconclusive" and not f["check"].endswith("(no base)")
    ]  # fmt: skip
    return "inconclusive" if doubtful else "nothing"


def outcome(row: Row) -> str:
    """Return how the audit did: found, other finding, inconclusive or clean; quiet or alarm."""
    found = {f["check"] for f in row["findings"] if f["status"] == "found"}
    loud = {
        f["check"] for f in row["findings"]
        if f["status"] in {"found", "error"} and f["severity"] not in {"info", "low"}
        and not f["check"].endswith("(no base)")
    }  # fmt: skip
    if not row["expected"]:
        return "false alarm" if loud else "quiet"
    if found & set(row["expected"]):
        return "found"
    if loud:
        return "other finding"
    return "clean" if verdict(row) == "nothing" else "inconclusive"


def ablation_found(row: Row) -> bool:
    """Say whether a removed direction was reported."""
    return any(
        f["check"] in ABLATION and f["status"] == "found"
        and f["evidence"].get("strength", 1) > 0
        for f in row["findings"]
    )  # fmt: skip


def in_goal(row: Row) -> bool:
    """Say whether the row is an ablation that must be told apart: from 0.1 on, at 8 bits or more.

    Nothing trained before or after, and at least half of the layers edited.
    """
    facts = row["facts"]
    return (
        row["kind"] == "ablation" and facts["healing"] == "none" and facts["bits"] >= 8
        and facts["strength"] >= 0.1 and facts["layers"] >= 0.5
    )  # fmt: skip


def other(row: Row) -> bool:
    """Say whether the row has no direction removed."""
    return row["kind"] not in {"ablation", "hardening"}


def in_files(row: Row) -> bool:
    """Say whether the row is a parent saved in another way, audited with all its files.

    Its weights are its parent's, so that it says nothing more about the score.
    """
    return "/saved/" in row["key"]


def negative(row: Row) -> bool:
    """Say whether the row is one that an ablation is told apart from."""
    return other(row) and not in_files(row)


def auroc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """Return the probability that a positive scores higher than a negative, ties half."""
    ranks = rankdata([*positive, *negative])[: len(positive)]
    pairs = len(positive) * len(negative)
    return float((ranks.sum() - len(positive) * (len(positive) + 1) / 2) / pairs)


def clustered(rows: Sequence[Row], positive: Callable[[Row], bool]) -> dict[str, Any] | None:
    """Return the AUROC of the score with a bootstrap interval over parents; None without rows."""
    if not any(map(positive, rows)) or not any(map(negative, rows)):
        return None
    by_parent = defaultdict[str, list[Row]](list)
    for row in rows:
        if positive(row) or negative(row):
            by_parent[f"{row['family']}/{row['parent']}"].append(row)
    parents = list(by_parent.values())

    def value(chosen: Sequence[Row]) -> float | None:
        first = [row["score"] for row in chosen if positive(row)]
        second = [row["score"] for row in chosen if negative(row)]
        return auroc(first, second) if first and second else None

    generator = np.random.default_rng(0)
    draws = []
    for _ in range(RESAMPLES):
        picked = generator.integers(len(parents), size=len(parents))
        draw = value([row for index in picked for row in parents[index]])
        if draw is not None:
            draws.append(draw)
    everything = [row for chosen in parents for row in chosen]
    low, high = np.percentile(draws, [2.5, 97.5])
    first = [row["score"] for row in everything if positive(row)]
    second = [row["score"] for row in everything if negative(row)]
    return {
        "auroc": value(everything), "low": float(low), "high": float(high),
        "ablated": len(first), "others": len(second), "parents": len(parents),
        "lowest_ablated": min(first), "highest_other": max(second),
    }  # fmt: skip


def alarms(rows: Sequence[Row]) -> dict[str, Any]:
    """Return false alarms with exact upper bounds, and how many parents they rest on."""
    harmless = [row for row in rows if not row["expected"]]
    loud = [row["key"] for row in harmless if outcome(row) == "false alarm"]
    wrong = [row["key"] for row in rows if other(row) and ablation_found(row)]
    others = sum(other(row) for row in rows)
    return {
        "harmless": len(harmless),
        "harmless_in_files": sum(map(in_files, harmless)),
        "harmless_parents": len({(r["family"], r["parent"]) for r in harmless}),
        "harmless_alarms": loud,
        "harmless_upper": clopper_pearson(len(loud), len(harmless)).high,
        "not_ablated": others,
        "called_ablated": wrong,
        "called_ablated_upper": clopper_pearson(len(wrong), others).high,
    }


def limits(rows: Sequence[Row]) -> dict[str, dict[str, list[int]]]:
    """Return how many ablations were found of how many, by healing and bits, by strength."""
    table: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(lambda: [0, 0]))
    for row in rows:
        facts = row["facts"]
        if "bits" in facts and facts["layers"] == 1 and "/ablation/" in row["key"]:
            name = row["key"].split("/ablation/")[1]
            if name.startswith(("1.0", "0.")):
                cell = table[f"{facts['healing']}, {facts['bits']} bits"][str(facts["strength"])]
                cell[0] += ablation_found(row)
                cell[1] += 1
    return {name: dict(cells) for name, cells in table.items()}


def half(rows: Sequence[Row]) -> dict[str, Any]:
    """Return everything about one half of the set."""
    confusion: dict[str, Counter[str]] = defaultdict(Counter)
    outcomes: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        confusion[row["kind"]][verdict(row)] += 1
        outcomes[row["kind"]][outcome(row)] += 1
    return {
        "variants": dict(Counter(row["family"] for row in rows)),
        "ablation_from_0.1_at_8_bits": clustered(rows, in_goal),
        "by_family": {
            family: clustered([row for row in rows if row["family"] == family], in_goal)
            for family in sorted({row["family"] for row in rows})
        },
        "every_ablation": clustered(rows, lambda row: row["kind"] == "ablation"),
        "alarms": alarms(rows),
        "outcomes": {kind: dict(found) for kind, found in sorted(outcomes.items())},
        "confusion": {kind: dict(found) for kind, found in sorted(confusion.items())},
        "not_found": {
            row["key"]: [row["family"], outcome(row), verdict(row)]
            for row in rows
            if row["expected"] and outcome(row) != "found"
        },
        "detection_limits": limits(rows),
        "seconds": {
            family: float(np.median([r["seconds"] for r in rows if r["family"] == family]))
            for family in {row["family"] for row in rows}
        },
    }


def write(rows: Sequence[Row], folder: Path) -> None:
    """Write ``known_answers.json`` and the README."""
    summary = {
        "calibration": calibration.VERSION,
        "thresholds": {name: value for name, value in vars(calibration).items() if name.isupper()},
        "published": PUBLISHED,
        "halves": {
            name: half([row for row in rows if row["half"] == name])
            for name in HALVES
            if any(row["half"] == name for row in rows)
        },
    }
    text = json.dumps(summary, indent=1) + "\n"
    (folder / "known_answers.json").write_text(text, "utf-8")
    (folder.parent / "README.md").write_text(page(summary), "utf-8")


# ---- the page ------------------------------------------------------------------------------


def page(summary: dict[str, Any]) -> str:
    """Return the page about the study."""
    parts = [INTRODUCTION, _families(summary["halves"])]
    for name, found in summary["halves"].items():
        parts += [f"## {name.capitalize()} half\n", _numbers(found), _outcomes(found)]
        parts += ["### Detection limits\n", LIMITS, _limits(found), _not_found(found)]
    return "\n".join([*parts, CLOSING])


INTRODUCTION = """# Weight forensics on models with known answers

Written by `python studies/audit/known_answers.py --summary` from `results/rows.jsonl`; the numbers
are in `results/known_answers.json`. Every variant is derived in memory from models that the study
trains itself, audited against its claimed base, and thrown away; no edited weight is stored.

Thresholds (`src/durometer/audit/forensics/calibration.py`) were set on the family `micro-a` alone.
`micro-b` (another initialisation, other seeds, other recipes) and `smollm2` (a real model) are kept
apart from that choice. What the tables below do not hold was not measured.

*Score*: the self-projection that at least four tensors reach on one shared direction (or a fifth
tensor on its own), over the one that is asked for; from 1 on a removed direction is reported.
*Ablated* rows of the headline have strength 0.1 or more, at least 8 bits and no training before or
after; *others* are all variants without a removed direction: trained, adapted, merged, pruned,
scaled, noisy, quantised, cast, untouched. Intervals resample parents, not variants. An AUROC of 1
has the interval [1, 1] by construction: what bounds it is the number of parents.

*Harmless* variants are untouched, cast, rounded faithfully, rescaled without effect, or saved in
another way: other shards, order, dtype, metadata, names, templates, generation settings, an untied
head, a padded vocabulary, unused buffers, GGUF files. Those saved in another way (*as files*) are
whole folders, audited with every check against the base's folder; they count among the false alarms
alone, since their weights are those of other rows. When these kinds were added, eight of the 38 new
variants of `micro-a`'s base raised alarms: casts to 8-bit floats, NF4 and 8-bit files decoded to
bf16, an untied head, a padded vocabulary. The checks were mended, no threshold was changed, and
`micro-b` was run afterwards. Rows of other kinds are those of before these mends.
"""
LIMITS = """Ablations found of those made: all layers, one shared direction. *Light* and *heavy*
healing train all weights on harmless rows after the edit; *training before* compares with the base
from which the ablated model had first been trained. Strength 0 is training alone.
"""
CLOSING = """## What this does not show

* Anything on a family that the first table says was not run yet, or whose kinds of variants are
  missing in its half.
* The variants of a family come from a few trained parents of one small architecture.
* The published bars (arXiv 2607.01854: AUROC 0.95 with two signals, 0.90 and 0.84 with one) are on
  other data, public checkpoints of many makers; they are no comparison, only the order of
  magnitude.
* An attacker who knows the test can spread the edit over many weak directions, train after it, or
  train the refusals away.
"""
NOTHING = "\N{EN DASH}"


def _families(halves: dict[str, Any]) -> str:
    """Return which families have rows and which were not run yet."""
    lines = []
    for family in FAMILIES:
        count = halves.get(family.half, {}).get("variants", {}).get(family.name, 0)
        lines.append(f"| {family.name} | {family.half} | {count or 'not run yet'} |")
    return "\n".join(["| family | half | variants audited |", "|---|---|---|", *lines, ""])


def _numbers(found: dict[str, Any]) -> str:
    goal, every, alarm = (
        found["ablation_from_0.1_at_8_bits"],
        found["every_ablation"],
        found["alarms"],
    )
    families = found["by_family"] if len(found["by_family"]) > 1 else {}
    counts = ", ".join(f"{family} {count}" for family, count in found["variants"].items())
    lines = {
        "AUROC, ablation from 0.1 at 8 bits or more": _interval(goal),
        **{f"the same, {name} alone": _interval(value) for name, value in families.items()},
        "AUROC, every ablation (from 0.02, 4 bits, healed)": _interval(every),
        "lowest score of an ablation of the headline": _number(goal, "lowest_ablated"),
        "highest score of any other variant": _number(goal, "highest_other"),
        "alarms on untouched or harmlessly changed variants": (
            f"{len(alarm['harmless_alarms'])} of {alarm['harmless']} "
            f"({alarm['harmless_in_files']} of them as files; {alarm['harmless_parents']} parents; "
            f"95 % upper bound {alarm['harmless_upper']:.1%})"
        ),
        "called ablated without being so": (
            f"{len(alarm['called_ablated'])} of {alarm['not_ablated']} "
            f"(95 % upper bound {alarm['called_ablated_upper']:.1%})"
        ),
    }
    rows = [f"| {what} | {number} |" for what, number in lines.items()]
    return "\n".join([f"Variants: {counts}.\n", "| what | number |", "|---|---|", *rows, ""])


def _number(value: dict[str, Any] | None, name: str) -> str:
    return NOTHING if value is None else f"{value[name]:.3f}"


def _interval(value: dict[str, Any] | None) -> str:
    if value is None:
        return "not measured"
    return (
        f"{value['auroc']:.4f} [{value['low']:.4f}, {value['high']:.4f}] "
        f"({value['ablated']} against {value['others']}, {value['parents']} parents)"
    )


def _outcomes(found: dict[str, Any]) -> str:
    names = ("found", "other finding", "inconclusive", "clean", "quiet", "false alarm")
    lines = []
    for kind, cells in found["outcomes"].items():
        numbers = " | ".join(str(cells.get(name, NOTHING)) for name in names)
        first = ", ".join(f"{v} {n}" for v, n in sorted(found["confusion"][kind].items()))
        lines.append(f"| {kind} | {numbers} | {first} |")
    head = f"| planted | {' | '.join(names)} | first finding |\n|{'---|' * (len(names) + 2)}"
    return "\n".join([head, *lines, ""])


def _limits(found: dict[str, Any]) -> str:
    tables = found["detection_limits"]
    strengths = sorted({s for cells in tables.values() for s in cells}, key=float)
    lines = []
    for name, cells in sorted(tables.items()):
        shown = ("/".join(map(str, cells[s])) if s in cells else NOTHING for s in strengths)
        lines.append(f"| {name} | {' | '.join(shown)} |")
    head = f"| healing, bits | {' | '.join(strengths)} |\n|{'---|' * (len(strengths) + 1)}"
    return "\n".join([head, *lines, ""])


def _not_found(found: dict[str, Any]) -> str:
    others = {key: value for key, value in found["not_found"].items() if "/ablation/" not in key}
    if not others:
        return ""
    lines = [
        f"| `{family}/{key}` | {result}: {first} |"
        for key, (family, result, first) in others.items()
    ]
    head = "### Other planted changes not named as such\n\n| variant | what was said |\n|---|---|"
    return "\n".join([head, *lines, ""])
