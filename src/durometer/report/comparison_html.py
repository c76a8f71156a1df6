"""The scoreboard as one HTML file that loads nothing; whatever a record holds is escaped."""

from collections.abc import Mapping, Sequence
from typing import Any

from durometer.report import comparison_text as words
from durometer.report import figures
from durometer.report.comparison_removal import HALF, NOT_JUDGED
from durometer.report.figures import budget_of, budget_text
from durometer.report.html import OUTCOMES
from durometer.report.page import page_environment, page_style

Json = Mapping[str, Any]


def render_comparison(comparison: Json) -> str:
    """Return the page.

    Args:
        comparison: what ``build_comparison`` gave.
    """
    rows = {group: [_row(row) for row in comparison[group]] for group in words.TITLES}
    parts = [(group, comparison[group]) for group in words.TITLES if comparison[group]]
    everyone = [row for _, members in parts for row in members]
    attacks = comparison["attacks"]
    page = page_environment().get_template("comparison.html")
    written = page.render(
        css=page_style(),
        c=comparison,
        titles=words.TITLES,
        rows=rows,
        headings=words.HEADINGS,
        matrix={group: [_matrix_row(row, attacks) for row in members] for group, members in parts},
        attacks=[
            {
                "attack": attack,
                "parts": {group: _attack_rows(attack, members) for group, members in parts},
            }
            for attack in attacks
        ],
        levels=words.LEVELS,
        differences=words.differences_line(comparison),
        unranked=words.unranked_line(comparison),
        what_to_do=words.WHAT_TO_DO,
        limits=sorted({row["utility_limit"] for row in everyone}),
        outcome_names=OUTCOMES,
        outcome_spoken=list(OUTCOMES.values()),
        outcomes=[_outcomes(row) for row in everyone],
        removals=[_removals(row) for row in everyone if _judged(row)],
        coverage=_coverage(comparison),
        gaps=[row for row in everyone if row["gaps"]],
    )
    return written.encode("utf-8", "replace").decode("utf-8")


def _row(row: Json) -> dict[str, Any]:
    return {
        "row": row,
        "notes": [note for note in words.notes(row) if note != words.TOO_DEAR],
        "ruined": words.costs_too_much(row),
        "first": words.first_text(row),
        "gain": words.gain_text(row["gain"]),
        "gain_title": _gain_title(row["gain"]),
    }


def _outcomes(row: Json) -> dict[str, Any]:
    """Return what a model answers before any attack: a bar, and every share with its interval."""
    rates = row["outcomes"]
    shares = {outcome: rate["rate"] for outcome, rate in rates.items()}
    return {
        "row": row,
        "bar": figures.stacked_bar(shares, OUTCOMES, row["name"], written=figures.NARROW)
        if rates
        else "",
        "rates": [rates.get(outcome) for outcome in OUTCOMES],
    }


def _judged(row: Json) -> bool:
    return any(found["state"] != NOT_JUDGED for found in row["removal"].values())


def _removals(row: Json) -> dict[str, Any]:
    """Return what undoes a safeguard with least, within the limit and without it."""
    ruined = words.costs_too_much(row)
    ends = []
    for name in ("within", "without"):
        found = row["removal"][name]
        budget, attack = words.removal_text(found)
        held = "missing" if ruined and name == "within" else found["state"]
        ends.append({"budget": budget, "attack": attack, "state": held, "found": found})
    return {"row": row, "ends": ends}


def _coverage(comparison: Json) -> list[dict[str, Any]]:
    """Return the tampers by way of access, with how many were tested on every model."""
    found = []
    for access, names in comparison["coverage"]["tampers"].items():
        total = sum(map(len, names.values()))
        found.append({"access": words.ACCESS[access], "total": total, **_named(names)})
    return found


def _named(names: Json) -> dict[str, Any]:
    # "all" and "none" are words of the templates' language.
    return {"on_all": names["all"], "on_some": names["some"], "on_none": names["none"]}


def _gain_title(gain: Json) -> str:
    if gain["value"] is None and not gain["low"]:
        return str(gain["reason"] or "not computed")
    high = "no upper bound" if gain["high"] is None else f"{gain['high']:.2f}"
    against = f" against {gain['reference']}" if gain.get("reference") else ""
    return f"[{gain['low'] or 0.0:.2f}, {high}]{against}"


def _matrix_row(row: Json, attacks: Sequence[Json]) -> dict[str, Any]:
    ruined = words.costs_too_much(row)
    found = [row["cells"].get(attack["configuration"]) for attack in attacks]
    return {"row": row, "cells": [_matrix_cell(cell, ruined=ruined) for cell in found]}


def _matrix_cell(cell: Json | None, *, ruined: bool) -> dict[str, str]:
    """Return how one attack ended on one model: text, class and the longer story.

    One seed that broke refutes. A model that costs more than the limit cannot break within it, so
    that it never counts as one that held.
    """
    if cell is None:
        return {"text": "\u2013", "few": "", "kind": "missing", "title": "this attack was not made"}
    if not cell["judged"]:
        kind = "missing" if cell["label"] else "open"
        said = words.unjudged(cell)
        return {"text": said, "few": "", "kind": kind, "title": "no budget to a break"}
    inside, outside = (budget_of(cell, HALF, within=one, axis="steps") for one in (True, False))
    within, without = budget_text(inside), budget_text(outside)
    title = f"50 % back within the limit: {within.value} {cell['unit']} {within.interval}, "
    title += f"{within.broken} broke; without the limit: {without.value} {without.interval}"
    kind = "missing" if ruined else "held"
    if _seeds_broken(inside) or _seeds_broken(outside):
        kind = "broke" if _seeds_broken(inside) else "ruined"
    few = within.broken if within.censored and kind == "broke" else ""
    return {"text": within.value, "few": few, "kind": kind, "title": title}


def _seeds_broken(budget: Json | None) -> int:
    return budget["seeds"] - budget["censored"] if budget else 0


def _attack_rows(attack: Json, rows: list[Json]) -> list[dict[str, Any]]:
    made = []
    for row in rows:
        cell = row["cells"].get(attack["configuration"])
        if cell is not None:
            gain = cell["gain"]
            made.append(
                {
                    "row": row,
                    "cell": cell,
                    "budgets": [_budgets(cell, *level) for level in words.LEVELS],
                    "unjudged": words.unjudged(cell),
                    "gain": words.gain_text(gain) if gain else "",
                    "gain_title": _gain_title(gain) if gain else "",
                }
            )
    return made


def _budgets(cell: Json, recovery: float, within: bool) -> dict[str, figures.BudgetText]:
    return {
        axis: budget_text(budget_of(cell, recovery, within=within, axis=axis))
        for axis in ("steps", "examples", "flops")
    }
