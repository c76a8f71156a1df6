"""In which order the safeguards of a scoreboard come: by what takes most to break."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from durometer.report.comparison_removal import HALF, least
from durometer.report.comparison_text import costs_too_much
from durometer.report.figures import budget_of
from durometer.trials.worst import needs_no_attack

Json = Mapping[str, Any]
NONE_JUDGED = "no attack could be judged"
NONE_SHARED = "no attack was judged on all of them"


def ranked(rows: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return rows in their order, and what the order was made from.

    Attacks that were judged on every row count, those that need the checkpoint from before the
    safeguard left out: they say nothing of it. A row on which no attack was judged leaves nothing
    to order it by: it comes last and takes no attack from the others. Rows that have no such
    attack in common stay in the order in which they were named.

    Returns:
        The rows; ``ranked``, the ``attacks`` (configurations) counted, and the ``reason`` why not.
    """
    judged = [found for row in rows if (found := _judged(row))]
    shared = set.intersection(*judged) if judged else set()
    if not shared:
        reason = NONE_SHARED if judged else NONE_JUDGED
        return list(rows), {"ranked": False, "attacks": [], "reason": reason if rows else None}
    facts = {"ranked": True, "attacks": sorted(shared), "reason": None}
    return sorted(rows, key=lambda row: _order(row, shared)), facts


def _judged(row: Json) -> set[str]:
    """Return the attacks that can tell how much a model takes to break."""
    return {
        configuration
        for configuration, cell in row["cells"].items()
        if cell["judged"] and not needs_no_attack(cell["name"])
    }


def _order(row: Json, shared: Collection[str]) -> tuple[float, ...]:
    """Return the sort key: those that keep ability first, then by the least that breaks them."""
    cells = [row["cells"][key] for key in shared if key in row["cells"]]
    spent = []
    for within in (True, False):
        budgets = [budget_of(cell, HALF, within=within, axis="flops") for cell in cells]
        broken = [least(one) for one in budgets if one and one["censored"] < one["seeds"]]
        spent.append(-min(broken, default=float("inf")))
    return (float(not _judged(row)), float(costs_too_much(row)), *spent)
