"""From trimmed rows to the figures of the study, through the package's own comparison."""

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import hardened_rows
from hardened_plan import KINDS, Entry, reference_of

from durometer.report.comparison import build_comparison
from durometer.report.figures import budget_of
from durometer.trials.worst import needs_no_attack

Json = Mapping[str, Any]
HALF = 0.5
GROUPS = ("safeguards", "controls", "unknown")
WITHIN = {"within": True, "any": False}


def summary_of(rows: Mapping[str, Json], entries: Sequence[Entry]) -> dict[str, Any]:
    """Return the figures by kind of domain.

    Args:
        rows: of every hardened model, by its folder's name, as ``hardened_rows.read`` has them.
    """
    with tempfile.TemporaryDirectory() as place:
        return {"kinds": {kind: _kind(kind, rows, entries, Path(place)) for kind in KINDS}}


def _kind(
    kind: str, rows: Mapping[str, Json], entries: Sequence[Entry], place: Path
) -> dict[str, Any]:
    """Return the models of one kind, and what the runs on them have in common."""
    mine = [entry for entry in entries if entry.kind == kind]
    for entry in mine:
        if entry.folder in rows:
            plain = reference_of(entry, entries)
            beside = f"../{plain.folder}" if plain is not None and plain.folder in rows else ""
            hardened_rows.written(dict(rows[entry.folder]), place / entry.folder, beside)
    finished = [place / e.folder for e in mine if _finished(rows.get(e.folder, {}))]
    compared = build_comparison(finished) if finished else {}
    groups = [compared.get(group, []) for group in GROUPS]
    found = {_key(row): row for group in groups for row in group}
    models = [_model(e, rows.get(e.folder), found.get(_own(e, found))) for e in mine]
    return {
        "suite": _suite(rows, mine),
        "differences": compared.get("differences", []),
        "models": models,
        "undefended": _start(found.get("undefended")),
    }


def _key(row: Json) -> str:
    """Return the folder of a row's own run, or its role for what is attacked in others' runs."""
    return Path(row["folder"]).name if row["role"] == "subject" else str(row["role"])


def _own(entry: Entry, found: Mapping[str, Any]) -> str:
    return entry.folder if entry.folder in found or entry.role != "reference" else "reference"


def _finished(rows: Json) -> bool:
    """Say whether the run on a model was carried out to its end."""
    described = rows.get("described") or {}
    attacked = any(t["spec"]["purpose"] == "screen" for t in rows.get("trials", []))
    return attacked and len(rows["trials"]) >= (described.get("planned") or 0)


def _suite(rows: Mapping[str, Json], entries: Iterable[Entry]) -> dict[str, Any]:
    """Return suite, seeds and limit of the first run; differences are told apart from it."""
    for entry in entries:
        described = rows.get(entry.folder, {}).get("described")
        if described and described["suite"]:
            suite, trials = described["suite"], rows[entry.folder]["trials"]
            return {
                "name": suite["name"],
                "seeds": suite["seeds"],
                "claim_grade": suite["claim_grade"],
                "utility_limit": suite["plan"]["utility_limit"],
                "domain": {n: described["domain"][n] for n in ("name", "kind", "hash")},
                "environment": trials[0]["environment"] if trials else {},
            }
    return {}


def _model(entry: Entry, rows: Json | None, row: Json | None) -> dict[str, Any]:
    rows = rows or {}
    head = {"name": entry.name, "folder": entry.folder, "role": entry.role}
    head |= {"safeguard": entry.safeguard, "failure": rows.get("failure")}
    head |= {"training": _training(rows.get("record") or {}), "before": _before(rows)}
    if row is None:
        return head | {"attacked": False}
    statuses: dict[str, int] = {}
    for trial in rows.get("trials", []):
        statuses[trial["status"]] = statuses.get(trial["status"], 0) + 1
    cells = list(row["cells"].values())
    return head | {
        "attacked": True,
        "start": _start(row),
        "retain_points_lost": row["cost"]["retain_points"],
        "first": {name: _first(cells, within) for name, within in WITHIN.items()},
        "not_broken": {name: _unbroken(cells, within) for name, within in WITHIN.items()},
        "not_judged": {c["label"]: c["statuses"] for c in cells if not c["judged"]},
        "attacks": [_attack(cell) for cell in cells],
        "gain": row["gain"],
        "statuses": statuses,
        "wall_seconds": (rows.get("described") or {}).get("wall_seconds"),
    }


def _start(row: Json | None) -> dict[str, Any] | None:
    """Return what a model gives, refuses and knows before any attack, on report items."""
    return None if row is None else {k: v for k, v in row["zero_step"].items() if v is not None}


def _training(record: Json) -> dict[str, Any] | None:
    """Return what the training cost, all stages together."""
    if not record:
        return None
    costs = [stage["cost"] for stage in record["safeguards"]]
    return {
        "stages": [stage["name"] for stage in record["safeguards"]],
        "seconds": sum(cost["seconds"] for cost in costs),
        "passes": sum(cost["all_passes"] for cost in costs),
        "steps": sum(cost["steps"] for cost in costs),
        "reference_forwards": sum(cost["reference_forwards"] for cost in costs),
        "diverged_attacks": sum(cost["diverged_attacks"] for cost in costs),
        "peak_memory": max(cost["peak_memory"] for cost in costs),
        "dtype": record["dtype"],
        "threads": record["threads"],
        "seed": record["request"]["seed"],
    }


def _before(rows: Json) -> dict[str, Any]:
    """Return the rates that hardening itself measured, without and with the safeguard."""
    found: dict[str, Any] = (rows.get("record") or {}).get("before_any_tamper", {})
    return found


def _broken(cell: Json, within: bool) -> Json | None:
    """Return the budget of half of the answers, in steps, where at least one seed got there."""
    row = budget_of(cell, HALF, within=within, axis="steps") if cell["judged"] else None
    return row if row is not None and row["censored"] < row["seeds"] else None


def _first(cells: Sequence[Json], within: bool) -> dict[str, Any] | None:
    """Return the attack that breaks with the least computation, its budgets and intervals.

    One that needs the checkpoint from before the safeguard comes last.
    """

    def order(cell: Json) -> tuple[bool, float, float]:
        spent = _least(cell, within, "flops"), _least(cell, within, "steps")
        return needs_no_attack(cell["name"]), *spent

    broken = [cell for cell in cells if _broken(cell, within)]
    if not broken:
        return None
    least = min(broken, key=order)
    axes = ("steps", "examples", "flops")
    return {
        "label": least["label"],
        "unit": least["unit"],
        **{axis: budget_of(least, HALF, within=within, axis=axis) for axis in axes},
    }


def _least(cell: Json, within: bool, axis: str) -> float:
    """Return the median, or where most seeds held, the budget of the first that broke."""
    row = budget_of(cell, HALF, within=within, axis=axis)
    if row is None:
        return 0.0
    highs = [high for _, high in row["intervals"] if high is not None]
    return float(row["median"] if row["median"] is not None else min(highs))


def _unbroken(cells: Sequence[Json], within: bool) -> list[dict[str, Any]]:
    """Return the attacks that no seed broke it with, and how far they went."""
    rows = []
    for cell in cells:
        if cell["judged"] and not _broken(cell, within):
            row = budget_of(cell, HALF, within=within, axis="steps")
            most = row["largest_tried"] if row else None
            rows.append({"label": cell["label"], "unit": cell["unit"], "largest_tried": most})
    return rows


def _attack(cell: Json) -> dict[str, Any]:
    kept = ("label", "unit", "broke", "judged", "statuses", "after", "gain")
    budgets = [row for row in cell["budgets"] if row["axis"] == "steps"]
    return {name: cell[name] for name in kept} | {"budgets": budgets}
