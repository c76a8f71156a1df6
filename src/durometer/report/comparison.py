"""A scoreboard of safeguards x tampers, computed from the stored records of finished runs.

Every figure is one of a run's summary, rebuilt from its records; nothing is measured here.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from durometer import __version__
from durometer.core.errors import InputError, StorageError
from durometer.report.figures import budget_of, unit_of
from durometer.report.html import stands_for, start_of
from durometer.report.summary import build_summary, has_threshold, reference_tables
from durometer.subjects.record import RECORD, read_record
from durometer.trials.store import FILE, Store
from durometer.trials.worst import needs_no_attack

Json = Mapping[str, Any]
SCHEMA_VERSION = 1
STRESS = "stress"
HALF = 0.5
AXES = ("steps", "examples", "flops")
# Stages that make a control of a model, each with what must come of it.
CONTROLS = {
    "noop": "nothing was done",
    "plain_sft": "the data without a method",
    "norm_noise": "noise of the same norm",
    "inflate": "must break under rescale",
}
PLAIN = ("random_mapping", "refusal")
NEVER_TAUGHT = "micro-never"
UNDEFENDED = "undefended"


@dataclass(frozen=True)
class Read:
    """One finished run and the record of the model that it attacked.

    Attributes:
        folder: as it was named.
        record: ``hardening.json`` of the attacked model, {} where there is none.
        reference_record: the same of the plain safeguard it is compared with.
        reference_tables: what was found of the reference, see ``summary.reference_tables``.
    """

    folder: Path
    summary: dict[str, Any]
    record: dict[str, Any]
    reference_record: dict[str, Any]
    reference_tables: dict[str, Any]


def build_comparison(folders: Sequence[Path]) -> dict[str, Any]:
    """Return the scoreboard of the runs in ``folders``.

    Args:
        folders: run folders of ``stress``, or hardened models whose ``stress`` folder holds one.

    Raises:
        InputError: a folder without a finished run, a record that cannot be read, or runs on
            different domains.
    """
    if not folders:
        raise InputError("name the folders to compare: durometer compare DIR [DIR ...]")
    runs = [read_run(folder) for folder in dict.fromkeys(folders)]
    _require_one_domain(runs)
    rows = [_described(run, lambda run=run: _rows(run)) for run in runs]  # type: ignore[misc]
    flat = _unique([row for group in rows for row in group])
    _name_apart(flat)
    groups: dict[str, list[dict[str, Any]]] = {"safeguards": [], "controls": [], "api": []}
    for row in flat:
        groups[_group_of(row)].append(row)
    shared = _shared(runs)
    groups["safeguards"].sort(key=lambda row: _order(row, shared))
    domain = runs[0].summary["domain"]
    return {
        "schema_version": SCHEMA_VERSION,
        "tool_version": __version__,
        "domain": {key: domain[key] for key in ("name", "kind", "description", "hash")},
        "differences": differences(runs),
        "attacks": _attacks(flat),
        **groups,
    }


# --- reading ---


def read_run(folder: Path) -> Read:
    """Return the finished run in ``folder`` and the records that belong to it.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    place, model = _place(folder)
    try:
        store = Store.open(place)
        try:
            if not store.begun:
                raise InputError(f"{folder}: the run in it ended before anything was measured")
            summary = build_summary(store)
            tables = reference_tables(store)
        finally:
            store.close()
    except StorageError as error:
        raise InputError(str(error)) from error
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise _unreadable(place / FILE, error) from error
    if not summary["complete"] or not summary["subject"] or not summary["tampers"]:
        raise InputError(f"{folder}: the run is not finished; go on with it (stress ... --resume)")
    record = _record_of(folder, model, summary)
    home = model or Path(summary["subject"]["source"]["location"])
    plain = record.get("reference") or ""
    reference = read_record(home / plain) if isinstance(plain, str) and plain else {}
    return Read(folder, summary, record, reference, tables)


def _place(folder: Path) -> tuple[Path, Path | None]:
    """Return the run folder, and the folder of the hardened model around it."""
    if (folder / RECORD).is_file():
        if not (folder / STRESS / FILE).is_file():
            raise InputError(
                f"{folder}: a hardened model without a run in {STRESS}/; make one with: durometer "
                f"stress {folder} --out {folder / STRESS}"
            )
        return folder / STRESS, folder
    if not (folder / FILE).is_file():
        raise InputError(f"{folder}: no finished run here ({FILE} is missing)")
    around = folder.resolve().parent
    return folder, around if (around / RECORD).is_file() and folder.name == STRESS else None


def _record_of(folder: Path, model: Path | None, summary: Json) -> dict[str, Any]:
    """Return the record of the attacked model, {} where none is known to belong to it."""
    subject = summary["subject"]
    source = subject["source"]
    home = model or (Path(source["location"]) if source["kind"] == "folder" else None)
    record = read_record(home) if home is not None and home.is_dir() else {}
    same = record.get("dtype") != subject["dtype"] or (
        record.get("fingerprint") == subject["fingerprint"]
    )
    if record and "fingerprint" in record and not same:
        if model is None:
            return {}  # another model has taken its place since
        raise InputError(f"{folder}: {STRESS}/ is a run on other weights than the model's")
    return record


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(
        f"{path}: a record cannot be read ({type(error).__name__}: {error}); restore a copy of it, "
        "or run again"
    )


def _described(run: Read, make: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return what ``make`` does with a run, or name the file that does not hold what it should."""
    try:
        return make()
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise _unreadable(run.folder / RECORD, error) from error


def _require_one_domain(runs: Sequence[Read]) -> None:
    found: dict[tuple[str, ...], Path] = {}
    for run in runs:
        domain = run.summary["domain"]
        found.setdefault((domain["name"], domain["kind"], domain["hash"]), run.folder)
    if len(found) > 1:
        alike = len({key[:2] for key in found}) == 1
        told = [
            f"{name}:{kind}{f' {digest[:8]}' if alike else ''} ({folder})"
            for (name, kind, digest), folder in found.items()
        ]
        raise InputError(f"runs on different domains cannot be compared: {', '.join(told)}")


# --- rows ---


def _rows(run: Read) -> list[dict[str, Any]]:
    """Return the rows that one run gives: its subject, its reference, the undefended subject."""
    summary = run.summary
    rows = [_subject_row(run)]
    reference, undefended = summary["reference"], summary["undefended"]
    if reference:
        rows.append(_reference_row(run, reference))
    if undefended:
        rows.append(_undefended_row(run, undefended))
    return rows


def _subject_row(run: Read) -> dict[str, Any]:
    summary, start = run.summary, start_of(run.summary)
    gains = {
        gain["configuration"]: gain
        for gain in summary["durability_gain"].get("by_configuration", [])
    }
    cost: Json = next((c for c in summary["controls"] if c["name"] == "cost_of_safeguard"), {})
    cells = {t["configuration"]: _cell(t, gains) for t in summary["tampers"]}
    return {
        **_head(run, "subject", summary["subject"], run.record),
        "zero_step": _zero_step(start),
        "cost": _cost(cost.get("utility_loss"), start, summary, run.record),
        "cells": cells,
        "first_broken": _first_broken(cells),
        "gain": {
            name: summary["durability_gain"].get(name)
            for name in ("reference", "value", "low", "high", "reason")
        },
    }


def _reference_row(run: Read, reference: Json) -> dict[str, Any]:
    start = reference["start"]
    cells = {t["configuration"]: _cell(t, {}) for t in run.reference_tables["tampers"]}
    reason = "it is what the gain is measured against"
    return {
        **_head(run, "reference", reference["subject"], run.reference_record),
        "zero_step": _zero_step(start),
        "cost": _cost(
            run.reference_tables["utility_loss"], start, run.summary, run.reference_record
        ),
        "cells": cells,
        "first_broken": _first_broken(cells),
        "gain": {"reference": None, "value": None, "low": None, "high": None, "reason": reason},
    }


def _undefended_row(run: Read, undefended: Json) -> dict[str, Any]:
    start = undefended["start"]
    after = {t["configuration"]: _after(t) for t in undefended["tampers"]}
    return {
        **_head(run, UNDEFENDED, undefended["subject"], {}),
        "zero_step": _zero_step(start),
        "cost": _cost(None, start, None, {}),
        "cells": {key: _empty_cell(value) for key, value in after.items()},
        "first_broken": None,
        "gain": {
            "reference": None,
            "value": None,
            "low": None,
            "high": None,
            "reason": "never safeguarded: its budget is 0",
        },
    }


def _head(run: Read, role: str, subject: Json, record: Json) -> dict[str, Any]:
    stages = [s if isinstance(s, dict) else {"name": s} for s in record.get("safeguards", [])]
    names = [str(stage["name"]) for stage in stages]
    suite = run.summary["suite"]
    return {
        "name": "+".join(names) or str(subject["name"]),
        "folder": str(run.folder),
        "role": role,
        "safeguards": names,
        "access": "api" if any(s.get("access") == "api" for s in stages) else "weights",
        "control": _control(role, names, subject),
        "subject": {k: subject[k] for k in ("name", "fingerprint", "parameters", "dtype")},
        "suite": suite["name"],
        "claim_grade": suite["claim_grade"],
        "seeds": suite["seeds"],
        "utility_limit": suite["plan"]["utility_limit"],
    }


def _control(role: str, names: Sequence[str], subject: Json) -> str:
    """Return what kind of control a row is, '' for a safeguard."""
    if role == UNDEFENDED:
        return "never safeguarded"
    if subject["name"] == NEVER_TAUGHT:
        return "never taught: must hold"
    known = [name for name in names if name in CONTROLS]
    if known and all(name in CONTROLS or name in PLAIN for name in names):
        return CONTROLS[known[-1]]
    return ""


def _zero_step(start: Json | None) -> dict[str, Any]:
    if start is None:
        return dict.fromkeys(("success", "refusal", "retain", "over_refusal", "never_taught"))
    return {
        "success": start["success_report"],
        "refusal": start["refusal"] if start["success"] else None,
        "retain": start["retain"],
        "over_refusal": start["over_refusal"],
        "never_taught": start["never_taught"],
    }


def _cost(
    retain: Json | None, start: Json | None, summary: Json | None, record: Json
) -> dict[str, Any]:
    """Return what the safeguard costs: points of retain score, over-refusal, training."""
    undefended = ((summary or {}).get("undefended") or {}).get("start") or {}
    spent = [s["cost"] for s in record.get("safeguards", []) if isinstance(s, dict) and "cost" in s]
    totals = {
        "passes": sum(int(cost["all_passes"]) for cost in spent) if spent else None,
        "steps": sum(int(cost["steps"]) for cost in spent) if spent else None,
        "seconds": sum(float(cost["seconds"]) for cost in spent) if spent else None,
    }
    return {
        "retain_points": retain,
        "over_refusal": start["over_refusal"] if start else None,
        "over_refusal_undefended": undefended.get("over_refusal"),
        **totals,
    }


def _cell(tamper: Json, gains: Json) -> dict[str, Any]:
    """Return what one attack did to one model."""
    measured = any(c["steps"] for c in tamper["checkpoints"])
    return {
        "name": tamper["name"],
        "label": tamper["label"],
        "unit": unit_of(tamper),
        "broke": tamper["broke"],
        "judged": measured and has_threshold(tamper),
        "statuses": sorted({s["status"] for s in tamper["statuses"].values()}),
        "budgets": [row for row in tamper["budgets"] if row["axis"] in AXES] if measured else [],
        "break_probability": tamper["break_probability"],
        "after": _after(tamper),
        "gain": gains.get(tamper["configuration"]),
    }


def _empty_cell(after: Json | None) -> dict[str, Any]:
    return {
        "name": "",
        "label": "",
        "unit": "steps",
        "broke": False,
        "judged": False,
        "statuses": [],
        "budgets": [],
        "break_probability": None,
        "after": after,
        "gain": None,
    }


def _after(tamper: Json) -> dict[str, Any] | None:
    """Return success and retain points lost where the attack broke the model, or at its end."""
    found = stands_for({"budgets": [], "broke": False} | dict(tamper), "success_report")
    if found is None:
        return None
    return {name: found[name] for name in ("steps", "success_report", "utility_loss")}


def _first_broken(cells: Mapping[str, Json]) -> dict[str, Any] | None:
    """Return the attack that breaks with the least computation: within the limit, else without."""
    for within in (True, False):
        found = []
        for configuration, cell in cells.items():
            if not cell["judged"]:
                continue
            rows = {axis: budget_of(cell, HALF, within=within, axis=axis) for axis in AXES}
            steps = rows["steps"]
            if steps is None or steps["censored"] >= steps["seeds"]:
                continue
            spent = {axis: row and _least(row) for axis, row in rows.items()}
            order = (needs_no_attack(cell["name"]), spent["flops"] or 0.0, spent["steps"] or 0.0)
            facts = {"label": cell["label"], "unit": cell["unit"], "within_limit": within}
            seeds = {"seeds_broken": steps["seeds"] - steps["censored"], "seeds": steps["seeds"]}
            found.append((order, {"configuration": configuration, **facts, **seeds, **spent}))
        if found:
            return min(found, key=lambda entry: entry[0])[1]
    return None


def _least(row: Json) -> float:
    """Return the median, or where most seeds held, the budget of the first that broke."""
    if row["median"] is not None:
        return float(row["median"])
    return float(min(high for _, high in row["intervals"] if high is not None))


# --- putting rows together ---


def _unique(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leave out a control of one run that is the subject, or a control, of another."""
    subjects = {row["subject"]["fingerprint"] for row in rows if row["role"] == "subject"}
    kept, seen = [], set(subjects)
    for row in rows:
        print_ = row["subject"]["fingerprint"]
        if row["role"] == "subject":
            kept.append(row)
        elif print_ not in seen:
            seen.add(print_)
            kept.append(row)
    return kept


def _name_apart(rows: Sequence[dict[str, Any]]) -> None:
    """Add the folder to names that would be the same."""
    names = [row["name"] for row in rows]
    for row in rows:
        if names.count(row["name"]) > 1:
            row["name"] += f" ({Path(row['folder']).name or row['folder']})"
    again = [row["name"] for row in rows]
    for number, row in enumerate(rows, 1):
        if again.count(row["name"]) > 1:
            row["name"] += f" [{number}]"


def _group_of(row: Json) -> str:
    if row["control"]:
        return "controls"
    return "api" if row["access"] == "api" else "safeguards"


def _shared(runs: Sequence[Read]) -> set[str]:
    """Return the attacks that every run made, those of the first where there are none."""
    attacks = [{t["configuration"] for t in run.summary["tampers"]} for run in runs]
    return set.intersection(*attacks) or attacks[0]


def _order(row: Json, shared: set[str]) -> tuple[float, ...]:
    """Return the sort key: those that keep ability first, then by the least that breaks them."""
    lost = row["cost"]["retain_points"]
    ruined = lost is not None and lost["value"] > row["utility_limit"]
    cells = {key: cell for key, cell in row["cells"].items() if key in shared}
    least = []
    for within in (True, False):
        rows = [budget_of(cell, HALF, within=within, axis="flops") for cell in cells.values()]
        broken = [_least(one) for one in rows if one and one["censored"] < one["seeds"]]
        least.append(-min(broken, default=float("inf")))
    return (float(ruined), *least)


def _attacks(rows: Iterable[Json]) -> list[dict[str, Any]]:
    """Return every attack of any row, in the order in which they are met."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        for configuration, cell in row["cells"].items():
            if cell["label"]:
                facts = {name: cell[name] for name in ("name", "label", "unit")}
                known = found.setdefault(configuration, {"configuration": configuration, **facts})
                if cell["judged"]:
                    known["unit"] = cell["unit"]
    return list(found.values())


def differences(runs: Sequence[Read]) -> list[str]:
    """Return in what the runs differ besides their subjects, one phrase each."""
    looked: tuple[tuple[str, Callable[[Read], Any]], ...] = (
        ("suites", lambda run: run.summary["suite"]["name"]),
        ("attacks", lambda run: f"{len(run.summary['tampers'])} of them"),
        ("seeds", lambda run: run.summary["suite"]["seeds"]),
        ("utility limits", lambda run: f"{run.summary['suite']['plan']['utility_limit']:g} points"),
        ("measuring plans", lambda run: run.summary["suite"]["plan"]),
        ("undefended subjects", _base),
        ("number formats", lambda run: run.summary["subject"]["dtype"]),
        ("versions", lambda run: run.summary["environment"].get("versions") or {}),
    )
    told = []
    for what, look in looked:
        values = [look(run) for run in runs]
        if all(value == values[0] for value in values):
            continue
        if isinstance(values[0], dict):
            told.append(what)
        else:
            told.append(f"{what} ({', '.join(_by_value(values, runs))})")
    return told + _other_attacks(runs)


def _by_value(values: Sequence[Any], runs: Sequence[Read]) -> list[str]:
    """Return every value with the runs that have it; what most have goes without their names."""
    named: dict[Any, list[str]] = {}
    for value, run in zip(values, runs, strict=True):
        named.setdefault(value, []).append(run.folder.name or str(run.folder))
    usual = max(named, key=lambda value: len(named[value]))
    if len(named[usual]) == 1:
        return [f"{value}: {' '.join(folders)}" for value, folders in named.items()]
    rest = [f"{value}: {' '.join(folders)}" for value, folders in named.items() if value != usual]
    return [f"mostly {usual}", *rest]


def _base(run: Read) -> str:
    subject = (run.summary["undefended"] or {}).get("subject")
    return f"{subject['name']} {subject['fingerprint'][:8]}" if subject else "none"


def _other_attacks(runs: Sequence[Read]) -> list[str]:
    """Say how many attacks not every run made, where their number alone does not tell."""
    sets = [{t["configuration"] for t in run.summary["tampers"]} for run in runs]
    odd = set.union(*sets) - set.intersection(*sets)
    same_number = len({len(one) for one in sets}) == 1
    return [f"{len(odd)} attacks were not made on all"] if odd and same_number else []
