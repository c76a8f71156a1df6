"""Languages and framings as the report page shows them."""

from collections.abc import Mapping
from typing import Any

from durometer.report import figures
from durometer.report.groups import remark

Json = Mapping[str, Any]


def groups_page(section: Json | None, names: Mapping[str, str]) -> dict[str, Any] | None:
    """Return what the page needs of the section ``groups`` of a summary, None without.

    Args:
        names: readable name by outcome.
    """
    if not section:
        return None
    groups = [group for row in section["rows"] for group in row["groups"]]
    return {
        "rows": [
            {**row, "entries": [_entry(row, group, names) for group in row["groups"]]}
            for row in section["rows"]
        ],
        "least_known": section["least_known"],
        "small": section["small"],
        "unanswerable": any(group["answerable"] is False for group in groups),
        "unknown": any(group["answerable"] is None for group in groups),
    }


def _entry(row: Json, group: Json, names: Mapping[str, str]) -> dict[str, Any]:
    shares = {outcome: rate["rate"] for outcome, rate in group["outcomes"].items()}
    ranked = row["order"].index(group["name"]) if group["name"] in row["order"] else None
    place = (
        "" if ranked is None or len(row["order"]) < 2 else f"{ranked + 1}. of {len(row['order'])}"
    )
    return {
        "group": group,
        "bar": figures.stacked_bar(
            shares, names, f"{row['label']}, {group['name']}", written=figures.NARROW
        ),
        "remark": remark(group),
        "short": _short(group),
        "place": f"least guarded: {place}" if place == f"1. of {len(row['order'])}" else place,
    }


def _short(group: Json) -> str:
    if group["answerable"] is None:
        return "not known"
    return "small" if group["answerable"] else "cannot answer"
