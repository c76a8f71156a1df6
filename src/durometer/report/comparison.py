"""A scoreboard of safeguards x tampers, computed from the stored records of finished runs.

Every figure is one of a run's summary, rebuilt from its records; nothing is measured here.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from durometer import __version__
from durometer.core.errors import InputError
from durometer.report.comparison_coverage import coverage, gaps
from durometer.report.comparison_differences import differences
from durometer.report.comparison_order import ranked
from durometer.report.comparison_origin import is_plain, origin
from durometer.report.comparison_removal import AXES, first_broken, removal
from durometer.report.comparison_runs import (
    Read,
    described,
    read_run,
    require_one_domain,
)
from durometer.report.figures import unit_of
from durometer.report.html import stands_for
from durometer.report.summary import has_threshold

Json = Mapping[str, Any]
SCHEMA_VERSION = 1
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
EQUAL = "the same weights as the undefended model"
# Of a group's rows only those of ``safeguards`` are put in an order.
GROUPS = ("safeguards", "open", "controls", "api", "unknown")


def build_comparison(folders: Sequence[Path], failed: Sequence[Json] = ()) -> dict[str, Any]:
    """Return the scoreboard of the runs in ``folders``.

    Args:
        folders: run folders of ``stress``, or hardened models whose ``stress`` folder holds one.
        failed: ``subject`` and ``reason`` of what was to be attacked and could not be.

    Raises:
        InputError: a folder without a finished run, a record that cannot be read, or runs on
            different domains.
    """
    if not folders:
        raise InputError("name the folders to compare: durometer compare DIR [DIR ...]")
    runs = [read_run(folder) for folder in dict.fromkeys(folders)]
    require_one_domain(runs)
    flat = _unique([row for run in runs for row in described(run, lambda run=run: _rows(run))])  # type: ignore[misc]
    _name_apart(flat)
    groups: dict[str, list[dict[str, Any]]] = {group: [] for group in GROUPS}
    for row in flat:
        groups[_group_of(row)].append(row)
    groups["safeguards"], ranking = ranked(groups["safeguards"])
    domain = runs[0].summary["domain"]
    return {
        "schema_version": SCHEMA_VERSION,
        "tool_version": __version__,
        "domain": {key: domain[key] for key in ("name", "kind", "description", "hash")},
        "differences": differences(runs),
        "attacks": _attacks(flat),
        "coverage": coverage(runs),
        "ranking": ranking,
        **groups,
        "failed": [dict(one) for one in failed],
    }


# --- rows ---


def _rows(run: Read) -> list[dict[str, Any]]:
    """Return the rows that one run gives: its subject, its reference, the undefended subject."""
    rows = [_subject_row(run)]
    if not run.attacked:  # nothing was done to the others either
        return rows
    reference, undefended = run.summary["reference"], run.summary["undefended"]
    if reference:
        rows.append(_reference_row(run, reference))
    if undefended:
        rows.append(_undefended_row(run, undefended))
    return rows


def _subject_row(run: Read) -> dict[str, Any]:
    summary, start = run.summary, run.start
    gains = {
        gain["configuration"]: gain
        for gain in summary["durability_gain"].get("by_configuration", [])
    }
    cost: Json = next((c for c in summary["controls"] if c["name"] == "cost_of_safeguard"), {})
    cells = {t["configuration"]: _cell(t, gains) for t in summary["tampers"]}
    found = removal(cells)
    return {
        **_head(run, "subject", summary["subject"]),
        "zero_step": _zero_step(start),
        "cost": _cost(cost.get("utility_loss"), start, summary, run.record),
        "cells": cells,
        "removal": found,
        "first_broken": first_broken(found),
        "gain": {
            name: summary["durability_gain"].get(name)
            for name in ("reference", "value", "low", "high", "reason")
        },
    }


def _reference_row(run: Read, reference: Json) -> dict[str, Any]:
    start = reference["start"]
    cells = {t["configuration"]: _cell(t, {}) for t in run.reference_tables["tampers"]}
    reason = "it is what the gain is measured against"
    found = removal(cells)
    return {
        **_head(run, "reference", reference["subject"]),
        "zero_step": _zero_step(start),
        "cost": _cost(
            run.reference_tables["utility_loss"], start, run.summary, run.reference_record
        ),
        "cells": cells,
        "removal": found,
        "first_broken": first_broken(found),
        "gain": {"reference": None, "value": None, "low": None, "high": None, "reason": reason},
    }


def _undefended_row(run: Read, undefended: Json) -> dict[str, Any]:
    start = undefended["start"]
    after = {t["configuration"]: _after(t) for t in undefended["tampers"]}
    return {
        **_head(run, UNDEFENDED, undefended["subject"]),
        "zero_step": _zero_step(start),
        "cost": _cost(None, start, None, {}),
        "cells": {key: _empty_cell(value) for key, value in after.items()},
        "removal": removal({}),
        "first_broken": None,
        "gain": {
            "reference": None,
            "value": None,
            "low": None,
            "high": None,
            "reason": "never safeguarded: its budget is 0",
        },
    }


def _head(run: Read, role: str, subject: Json) -> dict[str, Any]:
    stages = run.facts(role).get("safeguards", [])
    names = [stage["name"] for stage in stages]
    suite = run.summary["suite"]
    control = _control(role, names, subject)
    nothing = role == "subject" and not run.attacked
    equal = nothing and not run.open
    plain = not stages and is_plain(subject["source"], run.origins.get(role, {}))
    return {
        "name": "+".join(names) or str(subject["name"]),
        "folder": str(run.folder),
        "role": role,
        "origin": origin(role, subject, run.origins.get(role, {})),
        "safeguards": names,
        "access": "weights" if plain else _access(stages),
        "control": control or (EQUAL if equal else ""),
        "nothing_to_break": nothing,
        "open": nothing and run.open,
        "outcomes": run.outcomes.get(role, {}),
        "gaps": gaps(run, role),
        "subject": {k: subject[k] for k in ("name", "fingerprint", "parameters", "dtype")},
        "suite": suite["name"],
        "claim_grade": suite["claim_grade"],
        "seeds": suite["seeds"],
        "utility_limit": suite["plan"]["utility_limit"],
    }


def _access(stages: Sequence[Json]) -> str | None:
    """Return ``weights`` or ``api``, None where nothing tells how a model came about."""
    told = {stage["access"] for stage in stages}
    if "api" in told:
        return "api"
    return "weights" if told == {"weights"} else None


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
        "losses": [
            {"steps": c["steps"], "utility_loss": c["utility_loss"]}
            for c in tamper["checkpoints"]
            if c["steps"] and c["utility_loss"]
        ],
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
        "losses": [],
        "gain": None,
    }


def _after(tamper: Json) -> dict[str, Any] | None:
    """Return success and retain points lost where the attack broke the model, or at its end."""
    found = stands_for({"budgets": [], "broke": False} | dict(tamper), "success_report")
    if found is None:
        return None
    return {name: found[name] for name in ("steps", "success_report", "utility_loss")}


# --- putting rows together ---


def _unique(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leave out a control of one run that is the subject, or a control, of another."""
    # A model with nothing to break was not attacked, so that it stands for no other row.
    subjects = {
        row["subject"]["fingerprint"]
        for row in rows
        if row["role"] == "subject" and not row["nothing_to_break"]
    }
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
    if row["open"]:
        return "open"
    return {"api": "api", "weights": "safeguards"}.get(row["access"], "unknown")


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
