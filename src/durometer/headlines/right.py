"""The right figures with their intervals: rates, and differences of paired or separate rows."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from durometer.core.statistics import (
    mcnemar_exact,
    newcombe_paired,
    newcombe_unpaired,
    paired_difference,
    seed_level_rate,
    wilson,
)
from durometer.headlines.table import Scope, Table

__all__ = ["difference_of", "rate_of"]

CLUSTERED = "clustered by entity"


def rate_of(table: Table, arm: str, scope: Scope) -> dict[str, Any] | None:
    """Return an arm's rate with Wilson's interval, None where the scope has no rows.

    ``high_with_unparsed`` is the rate if every unparsed outcome were a success. Where items name an
    entity the interval is Wilson's at n = entities.
    """
    counts = table.of(arm, scope)
    if not counts.n:
        return None
    rate = wilson(counts.success, counts.n)
    if table.clustered:
        rows = [item for item in table.items[arm].values() if item.category in scope.categories]
        values = np.array([[float(item.success) for item in rows]])
        rate = seed_level_rate(values, [item.entity for item in rows])
    return {
        "arm": arm,
        "scope": scope.name,
        "rate": rate.rate,
        "low": rate.low,
        "high": rate.high,
        "successes": counts.success,
        "unparsed": counts.unparsed,
        "n": counts.n,
        "high_with_unparsed": (counts.success + counts.unparsed) / counts.n,
        "method": f"Wilson, {CLUSTERED}" if table.clustered else "Wilson",
    }


def difference_of(table: Table, arms: Sequence[str], scope: Scope) -> dict[str, Any] | None:
    """Return the difference of two rates, after minus before; None where an arm has no rows.

    Paired by item where both arms have the same items, or where gains and losses were told; else
    Newcombe's interval of two separate samples, without a test.
    """
    before, after = arms
    first, second = table.of(before, scope), table.of(after, scope)
    if not first.n or not second.n:
        return None
    told = _paired(table, before, after, scope)
    if told is None:
        interval = newcombe_unpaired((first.success, first.n), (second.success, second.n))
        told = {
            "low": interval.low,
            "high": interval.high,
            "gained": None,
            "lost": None,
            "p_value": None,
            "paired": False,
            "method": "Newcombe, unpaired: which items changed is not known",
        }
    value = second.success / second.n - first.success / first.n
    head = {"before": before, "after": after, "scope": scope.name, "value": value}
    return head | told | {"n": [first.n, second.n]}


def _paired(table: Table, before: str, after: str, scope: Scope) -> dict[str, Any] | None:
    rows = _common(table, before, after, scope)
    if rows is not None and table.clustered:
        values, entities = rows
        found = paired_difference(values[0], values[1], entities)
        method = f"Newcombe, paired, {CLUSTERED}; exact McNemar over entities"
        changed = found.gained, found.lost
        return _told(found.low, found.high, changed, found.p_value, method)
    if rows is not None:
        first, second = rows[0]
        changed = int((second > first).sum()), int((second < first).sum())
    else:
        known = table.gained_and_lost(before, after, scope.categories)
        if known is None:
            return None
        changed = known
    counts = table.of(before, scope)
    both = counts.success - changed[1]
    neither = counts.n - both - sum(changed)
    found = newcombe_paired(*changed, both, neither)
    method = "Newcombe, paired; exact McNemar"
    return _told(found.low, found.high, changed, mcnemar_exact(*changed), method)


def _told(
    low: float, high: float, changed: tuple[int, int], p_value: float, method: str
) -> dict[str, Any]:
    gained, lost = changed
    return {
        "low": low,
        "high": high,
        "gained": gained,
        "lost": lost,
        "p_value": p_value,
        "paired": True,
        "method": method,
    }


def _common(
    table: Table, before: str, after: str, scope: Scope
) -> tuple[list[Any], list[str]] | None:
    """Return outcomes ``[arms][items]`` and entities of items, None unless arms share them all."""
    arms = [
        {
            name: item
            for name, item in table.items.get(arm, {}).items()
            if item.category in scope.categories
        }
        for arm in (before, after)
    ]
    if not arms[0] or arms[0].keys() != arms[1].keys():
        return None
    names = list(arms[0])
    values = [np.array([float(held[name].success) for name in names]) for held in arms]
    return values, [arms[0][name].entity for name in names]
