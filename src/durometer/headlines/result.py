"""The result of checking every headline against a table, as plain data."""

from collections.abc import Sequence
from typing import Any

from durometer.headlines.hypotheses import HYPOTHESES, PrintedRates
from durometer.headlines.right import difference_of, rate_of
from durometer.headlines.search import Search, search
from durometer.headlines.settings import KINDS, PAIRED_KINDS, Headline, Settings
from durometer.headlines.table import ALL, Scope, Table

__all__ = ["ORDER", "check_headlines"]

Json = dict[str, Any]
ORDER = {"undefined": 0, "unexplained": 1, "explained": 1, "rounding": 2, "follows": 3}
"""Verdicts, worst first; those that do not follow are sorted by how far off they are."""


def check_headlines(table: Table, settings: Settings, source: str) -> Json:
    """Return the contents of ``recompute.json``.

    Args:
        table: what was observed.
        settings: the headlines, and what to call the whole.
        source: name of the file.

    Raises:
        InputError: a headline cannot be read, or names what the table does not have.
    """
    headlines = [Headline.of(entry, table) for entry in settings.headline]
    printed = _printed_rates(headlines)
    found = [_headline(headline, table, printed) for headline in headlines]
    found.sort(key=lambda one: (ORDER[one["verdict"]], -abs(one["gap"] or 0.0)))
    shown = [scope for scope in table.scopes() if _is_shown(scope, table)]
    pairs = dict.fromkeys(h.arms for h in headlines if h.kind in PAIRED_KINDS)
    return {
        "title": settings.title or source,
        "source": source,
        "about": settings.source,
        "table": _described(table),
        "headlines": found,
        "all_follow": all(one["verdict"] == "follows" for one in found),
        "rates": _known(rate_of(table, arm, scope) for arm in table.arms for scope in shown),
        "differences": _known(
            difference_of(table, pair, scope) for pair in pairs for scope in shown
        ),
        "hypotheses": HYPOTHESES,
    }


def _known(found: Any) -> list[Json]:
    return [one for one in found if one is not None]


def _is_shown(scope: Scope, table: Table) -> bool:
    """Whether a scope is reported: all, single categories, and what one scorer serves."""
    held = [each.categories for each in table.scorer_scopes()]
    return scope.name == ALL or len(scope.categories) == 1 or scope.categories in held


def _described(table: Table) -> Json:
    return {
        "arms": table.arms,
        "categories": [name for name in table.categories if name],
        "scorers": {name: scorer for name, scorer in table.scorers.items() if scorer},
        "outcomes": sum(counts.n for counts in table.counts.values()),
        "unparsed": sum(counts.unparsed for counts in table.counts.values()),
        "by_item": bool(table.items),
        "clustered": table.clustered,
    }


def _printed_rates(headlines: Sequence[Headline]) -> PrintedRates:
    return {(h.arms[0], h.scope.name): h.printed for h in headlines if h.kind == "rate"}


def _headline(headline: Headline, table: Table, printed: PrintedRates) -> Json:
    found = search(headline, table, printed)
    entry = headline.entry
    right = None if found.right is None else float(found.right)
    value = float(headline.printed.value)
    by_size = headline.kind in PAIRED_KINDS and not headline.printed.signed
    compared = abs(right) if right is not None and by_size else right
    return {
        "printed": entry.printed,
        "value": value,
        "kind": entry.kind,
        "means": KINDS[entry.kind],
        "arms": list(headline.arms),
        "scope": headline.scope.name,
        "note": entry.note,
        "verdict": found.verdict,
        "right": right,
        "gap": None if compared is None else value - compared,
        "by_size": by_size,
        "rates": _known(rate_of(table, arm, headline.scope) for arm in headline.arms),
        "difference": difference_of(table, headline.arms, headline.scope)
        if headline.kind in PAIRED_KINDS
        else None,
        "explanations": [
            {
                "hypotheses": list(dict.fromkeys(one.departures)),
                "text": one.text,
                "arithmetic": one.arithmetic,
                "value": float(one.value),
            }
            for one in found.explanations
        ],
        "search": _search(found),
        "remarks": _remarks(headline, table, found),
    }


def _search(found: Search) -> Json:
    return {
        "one_step": found.tried[0],
        "one_step_by_chance": found.by_chance[0],
        "two_steps": found.tried[1],
        "two_steps_by_chance": found.by_chance[1],
        "too_coarse": found.too_coarse,
    }


def _remarks(headline: Headline, table: Table, found: Search) -> list[str]:
    """Return what a reader must know beside the verdict."""
    said = []
    scorers = table.pooled_scorers(headline.scope)
    if scorers:
        said.append(f"pools categories that need different scorers ({', '.join(scorers)})")
    unread = [a for a in headline.arms if table.of(a, headline.scope).unparsed]
    if unread:
        said.append(f"some outcomes of {', '.join(unread)} could not be read; none is a success")
    if headline.kind in PAIRED_KINDS and not headline.printed.signed:
        said.append("printed without a sign: sizes are compared")
    if headline.kind == "difference" and headline.printed.unit == "percent":
        said.append("points printed as per cent: say points")
    if found.verdict == "undefined":
        said.append("a rate that it rests on has no rows or is 0")
    return said
