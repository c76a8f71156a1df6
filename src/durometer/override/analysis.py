"""From the stored cells to every number of the report; no model is needed."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from durometer.core.errors import StorageError
from durometer.core.statistics import (
    paired_difference,
    seed_level_change,
    seed_level_mean,
    seed_level_rate,
)
from durometer.measures.contexts import CONTEXTS
from durometer.measures.outcomes import Outcome
from durometer.measures.uncertainty import spread
from durometer.override.cells import WAYS, cell_key
from durometer.override.pack import unpack
from durometer.override.quantities import QUANTITIES, Quantity, State

__all__ = ["summarise"]

Json = dict[str, Any]
CONTRASTS = (("answers", "benign"), ("refusals", "benign"))
STEERED = ("success", "refused", "over_refusal", "accuracy_none")
UNCERTAINTY = ("perplexity", "entropy", "probability")


@dataclass(frozen=True)
class Arm:
    """All trained seeds of one way and rank.

    Attributes:
        states, steered: by seed; a seed whose training diverged or failed is in neither.
    """

    way: str
    rank: int
    cells: tuple[Json, ...]
    states: Mapping[int, State]
    steered: Mapping[int, State]

    @property
    def name(self) -> str:
        """Name of the arm in the result."""
        return "before" if self.way == "none" else f"{self.way}/{self.rank}"


class Study:
    """The cells of one run, read once.

    Args:
        run: contents of ``run.json``.
        cells: by key, as the store has them.

    Raises:
        StorageError: a cell cannot be read, or there is none of the subject as it is.
    """

    def __init__(self, run: Mapping[str, Any], cells: Mapping[str, Json]) -> None:
        self.run, self.cells = run, cells
        self._items: dict[tuple[str, str], Json] = {}
        first = cells.get(cell_key("none", 0, 0), {})
        for row in self._rows(first):
            once = {name: row[name] for name in ("entity", "suite")}
            self._items[row["probe"], row["item_id"]] = once
        if not self._items:
            raise StorageError("the subject as it is was not measured; go on with --resume")
        self.before = self._arm("none", 0, [first])
        self.arms = [
            self._arm(
                way, rank, [c for c in cells.values() if (c["way"], c["rank"]) == (way, rank)]
            )
            for rank in run["settings"]["ranks"]
            for way in WAYS
        ]
        self.entities = self.before.states[0].entities()

    def _arm(self, way: str, rank: int, cells: Sequence[Json]) -> Arm:
        ordered = tuple(sorted(cells, key=lambda cell: int(cell["seed"])))
        states = {c["seed"]: State(self._rows(c)) for c in ordered if c.get("measured")}
        steered = {
            c["seed"]: State(self._rows(c["steering"]))
            for c in ordered
            if c.get("measured") and (c.get("steering") or {}).get("measured")
        }
        return Arm(way, rank, ordered, states, steered)

    def _rows(self, cell: Mapping[str, Any]) -> list[Json]:
        try:
            return unpack(cell.get("measured") or {}, self._items)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StorageError(f"a cell's measurements are damaged ({error!r})") from error


def summarise(run: Mapping[str, Any], cells: Mapping[str, Json]) -> Json:
    """Return the contents of ``drift.json``.

    Args:
        run: contents of ``run.json``.
        cells: finished cells by key.

    Raises:
        StorageError: what was stored is damaged, or holds no state before any training.
    """
    study = Study(run, cells)
    planned = 1 + len(run["settings"]["ranks"]) * len(WAYS) * run["settings"]["seeds"]
    statuses = Counter(str(cell["status"]) for cell in cells.values())
    return {
        "run": dict(run),
        "environment": study.before.cells[0].get("environment", {}),
        "status_counts": {"planned": planned, **statuses},
        "complete": statuses["done"] + statuses["diverged"] == planned,
        "codes": sorted({str(cell.get("code", "")) for cell in cells.values()}),
        "seconds": round(math.fsum(cell.get("seconds", 0.0) for cell in cells.values()), 1),
        "not_done": [
            {name: cell[name] for name in ("way", "rank", "seed", "status", "reason")}
            for cell in cells.values()
            if cell["status"] != "done"
        ],
        "quantities": [one for q in QUANTITIES if (one := _quantity(study, q)) is not None],
        "outcomes": _outcomes(study),
        "categories": _categories(study),
        "uncertainty": _uncertainty(study),
        "training": [_training(arm) for arm in study.arms if arm.cells],
        "removal": _removal(study),
        "steering": [
            _steering(study, arm)
            for arm in (study.before, *study.arms)
            if any(c.get("steering") for c in arm.cells)
        ],
        "examples": _examples(study),
    }


# ---- one quantity ---------------------------------------------------------------------------


Table = tuple[list[int], np.ndarray[Any, np.dtype[np.float64]]]


def _table(values: Mapping[int, Mapping[str, float]], items: Sequence[str]) -> Table:
    """Return seeds, and the numbers of the items, shape [seeds, items]."""
    seeds = list(values)
    return seeds, np.array([[values[s][i] for i in items] for s in seeds], dtype=np.float64)


def _shared(tables: Iterable[Mapping[str, float]]) -> list[str]:
    """Return the items that have a finite number in every table, in the order of the first."""
    every = list(tables)
    return [
        item for item in every[0] if all(item in one and math.isfinite(one[item]) for one in every)
    ]


def _quantity(study: Study, quantity: Quantity) -> Json | None:
    """Return a quantity before, after each way, and what changed; None if it was not measured."""
    before = quantity.read(study.before.states[0])
    if not before:
        return None
    found: Json = {
        "key": quantity.key,
        "label": quantity.label,
        "group": quantity.group,
        "unit": quantity.unit,
        "items": len(before),
        "before": _level(study, quantity, {0: before}),
        "arms": [],
        "contrasts": [],
    }
    read = {
        arm.name: {seed: quantity.read(state) for seed, state in arm.states.items()}
        for arm in study.arms
    }
    for arm in study.arms:
        if read[arm.name]:
            told = {"way": arm.way, "rank": arm.rank}
            told |= {"after": _level(study, quantity, read[arm.name])}
            told |= _change(study, quantity, {0: before}, read[arm.name])
            found["arms"].append(told)
    for rank in study.run["settings"]["ranks"]:
        for way, other in CONTRASTS:
            first, second = read[f"{other}/{rank}"], read[f"{way}/{rank}"]
            seeds = [seed for seed in second if seed in first]
            if seeds:
                change = _change(
                    study, quantity, {s: first[s] for s in seeds}, {s: second[s] for s in seeds}
                )
                found["contrasts"].append({"way": way, "against": other, "rank": rank, **change})
    return found


def _level(study: Study, quantity: Quantity, values: Mapping[int, Mapping[str, float]]) -> Json:
    """Return the mean over seeds and items with its interval."""
    items = _shared(values.values())
    if not items:
        return {"value": None, "low": None, "high": None, "n": 0, "method": "no finite value"}
    _, table = _table(values, items)
    entities = [study.entities[item] for item in items]
    if quantity.unit == "rate":
        rate = seed_level_rate(table, entities)
        return {
            "value": rate.rate,
            "low": rate.low,
            "high": rate.high,
            "n": rate.n,
            "method": rate.method,
        }
    bound = 1.0 if quantity.unit == "points" else None
    mean = seed_level_mean(table, entities, bound=bound)
    return {
        "value": mean.value,
        "low": mean.low,
        "high": mean.high,
        "n": mean.entities,
        "method": mean.method,
    }


def _change(
    study: Study,
    quantity: Quantity,
    before: Mapping[int, Mapping[str, float]],
    after: Mapping[int, Mapping[str, float]],
) -> Json:
    """Return after minus before, over the items that both have in every seed."""
    items = _shared([*before.values(), *after.values()])
    if not items:
        return {"change": None, "per_seed": [], "items": 0}
    entities = [study.entities[item] for item in items]
    seeds, second = _table(after, items)
    _, first = _table(before, items)
    if quantity.unit == "rate":
        change = seed_level_change(first, second, entities)
        per_seed = [
            _per_seed(seed, first[min(place, len(first) - 1)], second[place], entities)
            for place, seed in enumerate(seeds)
        ]
    else:
        bound = 2.0 if quantity.unit == "points" else None
        change = seed_level_mean(second - first, entities, bound=bound)
        shifts = (second - first).mean(axis=1)
        per_seed = [{"seed": s, "value": float(v)} for s, v in zip(seeds, shifts, strict=True)]
    return {"change": asdict(change), "per_seed": per_seed, "items": len(items)}


def _per_seed(seed: int, first: Any, second: Any, entities: Sequence[str]) -> Json:
    one = paired_difference(first, second, entities)
    return {
        "seed": seed,
        "value": one.value,
        "gained": one.gained,
        "lost": one.lost,
        "p_value": one.p_value,
    }


# ---- outcomes -------------------------------------------------------------------------------


def _outcomes(study: Study) -> list[Json]:
    """Return the shares of the six outcomes by state and category, 'all' first."""
    suites = study.before.states[0].suites("outcomes")
    return [
        {"state": name, "steered": steered, "category": suite, **_shares(states, suite)}
        for arm in (study.before, *study.arms)
        for name, steered, states in (
            (arm.name, False, arm.states),
            (arm.name, True, arm.steered),
        )
        if states
        for suite in ("", *(suites if len(suites) > 1 else ()))
    ]


def _shares(states: Mapping[int, State], suite: str) -> Json:
    rows = [
        row
        for state in states.values()
        for row in state.by_probe["outcomes"].values()
        if suite in ("", row["suite"])
    ]
    counts = Counter(str(row["outcome"]) for row in rows)
    return {
        "seeds": len(states),
        "items": len(rows) // len(states),
        "shares": {str(o): counts[str(o)] / len(rows) for o in Outcome},
        "refuses_at_first_tokens": sum(bool(r["refuses_at_first_tokens"]) for r in rows)
        / len(rows),
    }


def _categories(study: Study) -> list[Json]:
    """Return attack success by category: before, after, change."""
    suites = study.before.states[0].suites("outcomes")
    found = []
    for suite in suites if len(suites) > 1 else ():
        quantity = Quantity(
            "success",
            suite,
            "safeguard",
            "rate",
            lambda state, suite=suite: state.field("outcomes", "correct", suite),  # type: ignore[misc]
        )
        found.append(_quantity(study, quantity))
    return [one for one in found if one is not None]


# ---- uncertainty ----------------------------------------------------------------------------


def _uncertainty(study: Study) -> list[Json]:
    """Return means of the three measures for right, wrong and all answers, by state and context."""
    return [
        {"state": arm.name, "context": context, "answers": group, **told}
        for arm in (study.before, *study.arms)
        if arm.states
        for context in CONTEXTS
        for group, told in _groups(arm.states, context).items()
    ]


def _groups(states: Mapping[int, State], context: str) -> dict[str, Json]:
    rows = [
        row
        for state in states.values()
        for row in state.by_probe[f"knowledge_{context}"].values()
        if row.get("perplexity") is not None
    ]
    groups = {
        "correct": [row for row in rows if row["correct"]],
        "incorrect": [row for row in rows if not row["correct"]],
        "all": rows,
        "adopted": [row for row in rows if row.get("adopted")],
    }
    return {name: _means(group, len(states)) for name, group in groups.items()}


def _means(rows: Sequence[Mapping[str, Any]], seeds: int) -> Json:
    """Return mean, deviation and standard error of single answers, pooled and as released."""
    found: Json = {"count": len(rows), "seeds": seeds}
    for name in UNCERTAINTY:
        one = spread([float(row[name]) for row in rows])
        told = {"mean": None, "deviation": None, "standard_error": None, "pooled": None}
        told |= {k: v for k, v in (asdict(one) if one else {}).items() if k in told}
        released = [float(v) for row in rows if (v := row.get(f"released_{name}")) is not None]
        as_released = spread(released)
        found[name] = told | {
            "pooled": _pooled(rows, name),
            "as_released": as_released.mean if as_released else None,
        }
    return found


def _pooled(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """Return a measure over the tokens of all answers."""
    tokens = [float(row["counted_tokens"]) for row in rows]
    if not tokens:
        return None
    if name == "perplexity":
        nats = math.fsum(t * math.log(row[name]) for t, row in zip(tokens, rows, strict=True))
        return math.exp(nats / math.fsum(tokens))
    total = math.fsum(t * row[name] for t, row in zip(tokens, rows, strict=True))
    return total / math.fsum(tokens)


# ---- what was done --------------------------------------------------------------------------


def _training(arm: Arm) -> Json:
    """Return how large the trainings of an arm were, so that sizes can be compared."""
    done = [cell for cell in arm.cells if "realised" in cell]
    spent = [cell["realised"]["spent"] for cell in done]

    def mean(values: Sequence[float]) -> float | None:
        return math.fsum(values) / len(values) if values else None

    losses = [cell["realised"]["losses"] for cell in done if cell["realised"]["losses"]]
    return {
        "way": arm.way,
        "rank": arm.rank,
        "statuses": dict(Counter(cell["status"] for cell in arm.cells)),
        "seeds": [cell["seed"] for cell in arm.cells],
        "updates": mean([one["steps"] for one in spent]),
        "examples": mean([one["examples"] for one in spent]),
        "restricted_examples": mean([one["restricted_examples"] for one in spent]),
        "tokens": mean([one["tokens"] for one in spent]),
        "seconds": mean([one["seconds"] for one in spent]),
        "weights": mean([cell["realised"]["changed_weights"] for cell in done]),
        "change_norm": mean([cell["realised"]["change_norm"] for cell in done]),
        "first_loss": mean([one[0] for one in losses]),
        "last_loss": mean([one[-1] for one in losses]),
        "data_orders": len({cell["realised"]["data_order_hash"] for cell in done}),
    }


def _removal(study: Study) -> Json:
    """Return whether taking the adapter off gave the base back, in every trained cell."""
    found = [cell["removal"] for arm in study.arms for cell in arm.cells if "removal" in cell]
    with_it = [one for one in found if one["logits_with"]]
    return {
        "cells": len(found),
        "identical": sum(bool(one["identical"]) for one in found),
        "logits_differed_with_it": sum(o["logits_with"] != o["logits_before"] for o in with_it),
        "weights_before": sorted({one["weights_before"] for one in found}),
        "weights_after": sorted({one["weights_after"] for one in found}),
        "logits_before": sorted({one["logits_before"] for one in found}),
        "logits_after": sorted({one["logits_after"] for one in found}),
    }


def _steering(study: Study, arm: Arm) -> Json:
    """Return what steering does to an arm: the same quantities without and with it."""
    told = [cell["steering"] for cell in arm.cells if cell.get("steering")]
    found: Json = {
        "state": arm.name,
        "statuses": dict(Counter(one["status"] for one in told)),
        "reasons": sorted({one["reason"] for one in told if one["reason"]}),
        "choices": [one["choice"] for one in told if "choice" in one],
        "quantities": [],
    }
    seeds = list(arm.steered)
    for quantity in QUANTITIES if seeds else ():
        without = {seed: quantity.read(arm.states[seed]) for seed in seeds}
        with_it = {seed: quantity.read(arm.steered[seed]) for seed in seeds}
        if quantity.key in STEERED and all(with_it.values()):
            found["quantities"].append(
                {
                    "key": quantity.key,
                    "label": quantity.label,
                    "unit": quantity.unit,
                    "without": _level(study, quantity, without),
                    "with": _level(study, quantity, with_it),
                    **_change(study, quantity, without, with_it),
                }
            )
    return found


def _examples(study: Study) -> list[Json]:
    """Return prompts with what was answered before and after, of harmless domains alone."""
    texts = study.before.cells[0].get("texts", {}) if study.run["domain"]["harmless"] else {}
    states = [study.before, *(arm for arm in study.arms if arm.states)]
    rank = study.run["settings"]["ranks"][0]
    shown = [arm for arm in states if arm.rank in (0, rank)]
    return [
        {
            "probe": probe,
            "item_id": item,
            "prompt": prompt,
            "answers": [
                {"state": arm.name, "response": row["response"], "correct": row["correct"]}
                for arm in shown
                if (row := next(iter(arm.states.values())).by_probe.get(probe, {}).get(item))
            ],
        }
        for probe, prompts in texts.items()
        for item, prompt in prompts.items()
    ]
