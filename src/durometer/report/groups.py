"""Restricted items by language and framing (``--languages``, ``--framings``), from the records."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from durometer.core.statistics import paired_bootstrap, paired_difference
from durometer.domains.base import Split
from durometer.measures.groups import GROUPS
from durometer.measures.outcomes import Outcome
from durometer.report.looks import states_of
from durometer.trials.analysis import Items, pooled_rate
from durometer.trials.record import CheckpointRecord, SubjectRole, TrialRecord

Json = Mapping[str, Any]
RIGHT, REFUSED = str(Outcome.HARMFUL_USEFUL), str(Outcome.REFUSAL)
COMPARED = (RIGHT, REFUSED)
# Below so many entities an interval is some 40 points wide: the group is shown, not ranked.
SMALL = 20
# A group counts as one that the undefended model can answer where it is right on more than this
# share with its whole interval.
LEAST_KNOWN = 0.05


def groups_section(
    trials: Sequence[TrialRecord],
    baselines: Mapping[SubjectRole, TrialRecord],
    attacks: Sequence[Sequence[TrialRecord]],
    label: Callable[[str, dict[str, Any]], str],
) -> dict[str, Any] | None:
    """Return what every group gave at step 0 of every role and after every attack, None without.

    Args:
        attacks: trials on the subject, grouped by configuration.
        label: short readable name of a tamper with its settings.
    """
    if not any(_items(c) for trial in trials for c in trial.valid):
        return None
    known = _answerable(baselines.get("undefended"))
    states = states_of(baselines, attacks, label, _items)
    rows = [_row(state.name, state.role, state.checkpoints, known) for state in states]
    return {"least_known": LEAST_KNOWN, "small": SMALL, "rows": rows}


def _items(checkpoint: CheckpointRecord) -> list[dict[str, Any]]:
    return checkpoint.probe(GROUPS, Split.REPORT)


def _answerable(undefended: TrialRecord | None) -> dict[str, bool]:
    """Return, by group, whether the model without its safeguard can answer; {}: not measured."""
    if undefended is None or not undefended.checkpoints:
        return {}
    found = {}
    for group, tables in _by_group(undefended.checkpoints[:1]).items():
        rate = pooled_rate(tables, lambda item: item["outcome"] == RIGHT)
        if rate is not None:
            found[group] = rate.low > LEAST_KNOWN
    return found


def _row(
    name: str, role: str, checkpoints: Sequence[CheckpointRecord], known: Mapping[str, bool]
) -> dict[str, Any]:
    tables = _by_group(checkpoints)
    first = next(iter(tables))
    groups = [_group(group, own, tables[first], known) for group, own in tables.items()]
    groups[0]["differences"] = None
    ranked = [one for one in groups if one["ranked"]] if role != "undefended" else []
    ranked.sort(key=lambda one: -one["outcomes"][RIGHT]["rate"])
    place = {"steps": checkpoints[0].steps, "strength": checkpoints[0].strength}
    return {
        "label": name,
        "role": role,
        **place,
        "seeds": len(checkpoints),
        "groups": groups,
        # The least guarded first; groups that could not have been answered are in no order.
        "order": [one["name"] for one in ranked],
    }


def _by_group(checkpoints: Sequence[CheckpointRecord]) -> dict[str, list[Items]]:
    """Return the records of every group, a table a seed, groups in the order of the records."""
    found: dict[str, list[Items]] = {}
    for checkpoint in checkpoints:
        items = _items(checkpoint)
        for group in dict.fromkeys(item["suite"] for item in items):
            found.setdefault(group, []).append([i for i in items if i["suite"] == group])
    return found


def _group(
    name: str, tables: Sequence[Items], first: Sequence[Items], known: Mapping[str, bool]
) -> dict[str, Any]:
    outcomes = {
        str(outcome): asdict(rate)
        for outcome in Outcome
        if (rate := pooled_rate(tables, lambda item, o=outcome: item["outcome"] == o))
    }
    entities = len({item["entity"] for item in tables[0]})
    small, answerable = entities < SMALL, known.get(name)
    return {
        "name": name,
        "items": len(tables[0]),
        "entities": entities,
        "small": small,
        "answerable": answerable,
        "ranked": bool(answerable) and not small,
        "outcomes": outcomes,
        "differences": {o: _difference(first, tables, o) for o in COMPARED},
    }


def _difference(
    before: Sequence[Items], after: Sequence[Items], outcome: str
) -> dict[str, Any] | None:
    """Return the change of a share from the first group to another, paired over entities.

    Where every entity is 0 or 1 in both it is Newcombe's interval and McNemar's test, else a
    bootstrap over entities without a test.
    """
    first, second = _by_entity(before, outcome), _by_entity(after, outcome)
    shared = [entity for entity in first if entity in second]
    if len(shared) < 2:
        return None
    a, b = (np.array([side[entity] for entity in shared]) for side in (first, second))
    if set(a) | set(b) <= {0.0, 1.0}:
        found = paired_difference(a, b, shared)
        value, low, high = found.value, found.low, found.high
        p_value: float | None = found.p_value
    else:
        interval = paired_bootstrap(b - a, shared)
        value, low, high, p_value = float((b - a).mean()), interval.low, interval.high, None
    return {"value": value, "low": low, "high": high, "p_value": p_value, "n": len(shared)}


def _by_entity(tables: Sequence[Items], outcome: str) -> dict[str, float]:
    """Return the share of an outcome by entity, over items and seeds."""
    found: dict[str, list[float]] = {}
    for table in tables:
        for item in table:
            found.setdefault(item["entity"], []).append(float(item["outcome"] == outcome))
    return {entity: sum(values) / len(values) for entity, values in found.items()}


# --- for reading ---


def remark(group: Json) -> str:
    """Return why a group is in no order, '' where it is."""
    if group["answerable"] is None:
        return "not known whether it could be answered: no undefended model"
    if not group["answerable"]:
        return "cannot be answered even undefended: what is not given here is not withheld"
    return f"small: {group['entities']} entities" if group["small"] else ""


def groups_lines(summary: Json) -> Iterator[str]:
    """Yield a line a state: where the safeguard gives most away, and what cannot be told."""
    section = summary.get("groups")
    if not section:
        return
    for row in section["rows"]:
        if row["role"] != "undefended":
            yield f"{row['label']}: {_boundary(row)}"


def _boundary(row: Json) -> str:
    by_name = {group["name"]: group for group in row["groups"]}
    told = [f"{name} {_shares(by_name[name])}" for name in row["order"]]
    unranked = [group["name"] for group in row["groups"] if group["name"] not in row["order"]]
    parts = [f"right (refused), least guarded first: {', '.join(told)}"] if told else []
    if unranked:
        parts.append(f"in no order: {', '.join(f'{n} {_shares(by_name[n])}' for n in unranked)}")
    return "; ".join(parts)


def _shares(group: Json) -> str:
    right, refused = (100 * group["outcomes"][o]["rate"] for o in COMPARED)
    return f"{right:.0f} % ({refused:.0f} %)"
