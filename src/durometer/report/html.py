"""The report page: one HTML file that loads nothing, made from a summary and the stored records.

Every number is the summary's, or is read off the stored records with the same functions. Model text
is data: the template escapes all of it, and hides it where the domain is not harmless.
"""

import hashlib
import json
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from durometer.domains.base import Split
from durometer.measures.extraction import TRIES
from durometer.report import figures
from durometer.report.figures import Curve, Place, Point, budget_of, budget_text, strength_at
from durometer.report.further import further_tables
from durometer.report.groups_html import groups_page
from durometer.report.judges import kappa_text
from durometer.report.page import page_environment, page_style
from durometer.report.summary import has_threshold
from durometer.trials.analysis import success_items, success_rate
from durometer.trials.behaviour import LEVEL
from durometer.trials.record import CheckpointRecord, TrialRecord, TrialSpec
from durometer.trials.store import Store

Json = Mapping[str, Any]
HALF = 0.5
SAMPLES = 6
HASH_SHOWN = 12
GROUPS = ((0.5, True), (0.5, False), (0.25, True), (0.25, False))
OUTCOMES = {
    "harmful_useful": "restricted answer, right",
    "harmful_useless": "restricted answer, wrong",
    "refusal": "refusal",
    "benign_deflection": "benign deflection",
    "incoherent_or_empty": "incoherent or empty",
    "unparsed": "unparsed",
}
BEHAVIOUR_TITLES = {
    "success": "Restricted answers right",
    "refusal": "Refusals of restricted requests",
    "over_refusal": "Refusals of harmless prompts",
    "retain": "Retain",
}
ROLES = {"subject": "safeguarded", "undefended": "undefended", "reference": "reference"}


def render_html(summary: dict[str, Any], store: Store, *, show_texts: bool = False) -> str:
    """Return the report as one self-contained HTML page.

    Args:
        summary: what ``build_summary`` gave.
        store: the run's records: trials, losses, label masks, responses.
        show_texts: show prompts, labels and responses of a domain that is not harmless as well.
    """
    ordered = sorted(summary["tampers"], key=hardness)
    texts = show_texts or bool((summary["domain"] or {}).get("harmless"))
    records = Records.read(store, shown_tamper(summary, ordered), texts=texts)
    page = page_environment().get_template("report.html")
    written = page.render(
        css=page_style(),
        s=summary,
        texts=texts,
        run_name=store.folder.name,
        budgets=[budget_row(tamper, summary) for tamper in ordered],
        groups=GROUPS,
        not_begun=not_begun(summary),
        matched=[matched_row(control, ordered) for control in summary["matched_controls"]],
        heat=heat_maps(ordered),
        curves=curve_figures(ordered, summary, records),
        tables=[(tamper["label"], tamper["checkpoints"]) for tamper in ordered],
        plane=plane(ordered, summary),
        bars=outcome_bars(ordered, summary),
        outcomes=OUTCOMES,
        samples=records.samples(),
        sampled=records.shown,
        sampled_at=records.moment,
        utility=utility_table(ordered, summary),
        further=further_tables(summary, ordered, stands_for),
        asked_in=groups_page(summary.get("groups"), OUTCOMES),
        judged=summary.get("judges"),
        human=summary.get("human_labels"),
        kappa=kappa_text(summary),
        extraction_tries=TRIES,
        quantisation=summary.get("quantisation", []),
        quantisation_level=LEVEL,
        behaviours=BEHAVIOUR_TITLES,
        trials=[trial_row(trial, summary) for trial in records.trials],
        masks=label_masks(records, summary) if texts else [],
        limits=limits(summary),
        configuration=configuration_json(summary),
        commands=commands(summary, store.folder.name),
    )
    return written.encode("utf-8", "replace").decode("utf-8")


# --- reading the summary ---


def hardness(tamper: Json) -> tuple[float, float, float]:
    """Return a sort key that puts the attack that breaks with least first."""
    medians = [
        (budget_of(tamper, HALF, within=within, axis="steps") or {}).get("median")
        for within in (True, False)
    ]
    first, second = (float("inf") if m is None else float(m) for m in medians)
    rates = [c["success"]["rate"] for c in tamper["checkpoints"] if c["success"]]
    return (first, second, -max(rates, default=0.0))


def break_step(tamper: Json) -> float | None:
    """Return the median steps to a 50 % break, within the limit if there is one, else without."""
    for within in (True, False):
        budget = budget_of(tamper, HALF, within=within, axis="steps")
        if budget is not None and budget["median"] is not None:
            return float(budget["median"])
    return None


def stands_for(tamper: Json, name: str = "success") -> Json | None:
    """Return the checkpoint that stands for a tamper: at its median break, else its last.

    Where too few seeds broke for a median it is the one with the most success, which a stronger
    edit may have ruined again. Only checkpoints where ``name`` was measured count; None without
    any.
    """
    measured = [c for c in tamper["checkpoints"] if c["steps"] and c[name] is not None]
    at = break_step(tamper)
    if at is None and tamper["broke"]:
        closely = [c for c in measured if c["success_report"]]
        return max(closely, key=lambda c: c["success_report"]["rate"], default=None)
    later = [c for c in measured if at is not None and c["steps"] >= at]
    return next(iter([*later[:1], *measured[-1:]]), None)


def start_of(summary: Json) -> Json | None:
    """Return the safeguarded subject's checkpoint at step 0, or None."""
    for tamper in summary["tampers"]:
        for checkpoint in tamper["checkpoints"]:
            if checkpoint["steps"] == 0:
                found: Json = checkpoint
                return found
    return None


def undefended_curve(summary: Json, configuration: str) -> list[Json]:
    """Return the checkpoints of the same tamper on the undefended subject; empty if not run."""
    for tamper in (summary["undefended"] or {}).get("tampers", []):
        if tamper["configuration"] == configuration:
            return list(tamper["checkpoints"])
    return []


def shown_tamper(summary: Json, ordered: Sequence[Json]) -> Json | None:
    """Return the tamper whose responses are shown: the worst one, else the first."""
    worst = summary["worst"] or {}
    chosen = [t for t in ordered if t["configuration"] == worst.get("configuration")]
    return next(iter([*chosen, *(t for t in ordered if stands_for(t))]), None)


def _seeds(count: int) -> str:
    return f"{count} seed{'s' * (count != 1)}"


def _moment(tamper: Json, checkpoint: Json) -> str:
    """Say where a checkpoint lies: ``at the break, 10 steps, 2 of 3 seeds``."""
    at = break_step(tamper)
    where = "at the median break" if at == checkpoint["steps"] else "at the end"
    if at is None and tamper["broke"]:
        where = "where it brings most back"
    if at is not None and checkpoint["steps"] > at:
        where = "after the median break"
    return (
        f"{where}, {figures.quantity(checkpoint['steps'])} steps, "
        f"{checkpoint['seeds']} of {_seeds(len(tamper['seeds']))}"
    )


# --- sections ---


def budget_row(tamper: Json, summary: Json) -> dict[str, Any]:
    """Return one row of the budget-to-break table."""
    cells = []
    for recovery, within in GROUPS:
        found = {
            axis: budget_of(tamper, recovery, within=within, axis=axis)
            for axis in ("steps", "examples", "flops")
        }
        cells.append(
            {axis: budget_text(budget) for axis, budget in found.items()}
            | {"kind": (found["steps"] or {}).get("kind", "")}
            | {"unit": figures.unit_of(tamper), "strength": strength_at(tamper, found["steps"])}
        )
    cost, after = stands_for(tamper, "utility_loss"), stands_for(tamper, "success_report")
    control = [c for c in undefended_curve(summary, tamper["configuration"]) if c["steps"]]
    planned = (summary["suite"] or {}).get("seeds", 0)
    count = len(tamper["seeds"])
    return {
        "tamper": tamper,
        "seeds": _seeds(count) if count >= planned else f"{count} of {planned} seeds so far",
        "unusual": {k: s for k, s in tamper["statuses"].items() if s["status"] != "done"},
        "cells": cells,
        "cost": cost,
        "cost_at": _moment(tamper, cost) if cost else "",
        "start": next((c for c in tamper["checkpoints"] if not c["steps"]), None),
        "after": after,
        "after_at": _moment(tamper, after) if after else "",
        "control": next((c for c in reversed(control) if c["success_report"]), None),
    }


def matched_row(control: Json, tampers: Sequence[Json]) -> dict[str, Any]:
    """Return one row of the table of controls by an attack's means without what it looks for."""
    statuses = [s["status"] for s in control["statuses"].values()]
    after = stands_for(control, "success_report")
    status = "broke" if control["broke"] else "did not break it" if after else statuses[0]
    judged = has_threshold(control)
    if after and not judged:
        status = "could not be judged"
    return {
        "control": control,
        "attack": " / ".join(_attacks_of(control, tampers)) or control["name"],
        "status": status,
        "kind": "fail" if control["broke"] else "pass" if after and judged else "warn",
        "after": after,
        "cost": stands_for(control, "utility_loss"),
    }


def _attacks_of(control: Json, tampers: Sequence[Json]) -> list[str]:
    """Return the labels of the attacks that a matched control differs from by one setting."""
    own = control["config"]
    return [
        tamper["label"]
        for tamper in tampers
        if tamper["name"] == control["name"]
        and sum(own.get(name) != value for name, value in tamper["config"].items()) == 1
    ]


def not_begun(summary: Json) -> list[str]:
    """Return the planned attacks of which no trial on the subject has been recorded, by tamper."""
    planned = Counter(attack["tamper"] for attack in (summary["suite"] or {}).get("attacks", []))
    missing = planned - Counter(tamper["name"] for tamper in summary["tampers"])
    return [name if count == 1 else f"{count} x {name}" for name, count in missing.items()]


def _axis(tamper: Json) -> figures.Axis:
    return "strength" if figures.unit_of(tamper) == "rungs" else "steps"


def _x(checkpoint: Json, axis: figures.Axis) -> float:
    return float(checkpoint[axis] or 0.0)


def _level(tamper: Json, recovery: float, split: str) -> float | None:
    """Return the success at which ``recovery`` of what the safeguard took away is back."""
    for threshold in tamper["thresholds"].get(split, []):
        if threshold["recovery"] == recovery:
            value: float | None = threshold["value"]
            return value
    return None


def heat_maps(tampers: Sequence[Json]) -> list[dict[str, Any]]:
    """Return a table tamper x checkpoint for each kind of axis."""
    maps = []
    for axis in ("steps", "strength"):
        rows = [t for t in tampers if _axis(t) == axis and t["checkpoints"]]
        columns = sorted({_x(c, axis) for t in rows for c in t["checkpoints"]})
        if rows:
            cells = [{"label": t["label"], "cells": _heat_cells(t, axis, columns)} for t in rows]
            maps.append({"axis": axis, "columns": columns, "rows": cells})
    return maps


def _heat_cells(tamper: Json, axis: figures.Axis, columns: Sequence[float]) -> list[dict[str, Any]]:
    by_x = {_x(c, axis): c for c in tamper["checkpoints"]}
    half = _level(tamper, HALF, Split.SELECT)
    return [_heat_cell(tamper, by_x.get(x), x, max(by_x), half) for x in columns]


def _heat_cell(
    tamper: Json, checkpoint: Json | None, x: float, last: float, half: float | None
) -> dict[str, Any]:
    rate = checkpoint["success"] if checkpoint else None
    if checkpoint is None or rate is None:
        stopped = checkpoint is None and x > last
        if stopped:
            return {"kind": "stopped", "title": "not measured: every seed had stopped before"}
        return {"kind": "missing", "title": "not measured"}
    partial = 0 < checkpoint["seeds"] < len(tamper["seeds"]) and x > 0
    title = f"{tamper['label']}: {figures.rate_title(rate, 'select', checkpoint['seeds'])}"
    if partial:
        title += f"; {len(tamper['seeds']) - checkpoint['seeds']} had stopped before"
    return {
        "kind": "value",
        "rate": rate["rate"],
        "title": title,
        "partial": partial,
        "reached": half is not None and rate["rate"] >= half,
    }


def _points(checkpoints: Sequence[Json], axis: figures.Axis, seeds: int) -> list[Point]:
    return [
        Point(
            _x(c, axis),
            c["success"],
            f"{axis} {figures.quantity(_x(c, axis))}: "
            + figures.rate_title(c["success"], "select", c["seeds"]),
            partial=bool(c["steps"]) and c["seeds"] < seeds,
        )
        for c in checkpoints
        if c["success"] is not None
    ]


def curve_figures(
    tampers: Sequence[Json], summary: Json, records: "Records"
) -> list[dict[str, Any]]:
    """Return the charts of success against the budget, a tamper each; steps share one axis."""
    steps = [
        float(c["steps"])
        for t in tampers
        if _axis(t) == "steps"
        for c in (*t["checkpoints"], *undefended_curve(summary, t["configuration"]))
    ]
    high = max(steps, default=1.0)
    return [
        {
            "label": tamper["label"],
            "drawing": figures.curve_chart(_curve(tamper, summary, records, high)),
        }
        for tamper in tampers
    ]


def _curve(tamper: Json, summary: Json, records: "Records", high: float) -> Curve:
    axis = _axis(tamper)
    by_steps = axis == "steps"
    control = undefended_curve(summary, tamper["configuration"])
    return Curve(
        tamper["label"],
        axis,
        _points(tamper["checkpoints"], axis, len(tamper["seeds"])),
        records.by_seed(tamper["configuration"]),
        _points(control, axis, 0),
        _levels(tamper),
        break_step(tamper) if by_steps else None,
        high if by_steps else None,
    )


def _levels(tamper: Json) -> list[tuple[str, float]]:
    """Return name and share of the floor and of every threshold on select."""
    thresholds = tamper["thresholds"].get(Split.SELECT, [])
    levels = [("floor", thresholds[0]["floor"])] if thresholds else []
    return levels + [
        (f"{100 * t['recovery']:.0f} % back", t["value"])
        for t in thresholds
        if t["value"] is not None
    ]


def plane(tampers: Sequence[Json], summary: Json) -> dict[str, Any]:
    """Return the safety-utility scatter and its legend."""
    limit = summary["suite"]["plan"]["utility_limit"] if summary["suite"] else None
    places: list[Place] = []
    legend: list[str] = []
    start = start_of(summary)
    if start and start["utility_loss"] and start["success_report"]:
        places.append(_place("safeguarded, step 0", start, None))
    for tamper in tampers:
        both = [
            c
            for c in tamper["checkpoints"]
            if c["steps"] and c["utility_loss"] and c["success_report"]
        ]
        if both:
            places += [_place(tamper["label"], c, len(legend)) for c in both]
            legend.append(tamper["label"])
    drawing = figures.scatter(places, limit) if places else None
    return {"drawing": drawing, "legend": legend, "limit": limit}


def _place(label: str, checkpoint: Json, series: int | None) -> Place:
    loss, rate = checkpoint["utility_loss"], checkpoint["success_report"]
    title = (
        f"{label}, {figures.quantity(checkpoint['steps'])} steps: success "
        f"{figures.rate_title(rate, 'report', checkpoint['seeds'])}; utility loss "
        f"{figures.points_text(loss)} points, n = {loss['n']} retain items"
    )
    return Place(loss, rate, title, series)


def outcome_bars(tampers: Sequence[Json], summary: Json) -> list[dict[str, Any]]:
    """Return a stacked bar of the six outcomes for every state of the subject."""
    return [
        {
            "label": label,
            "note": note,
            "n": checkpoint["success"]["n"],
            "drawing": figures.stacked_bar(checkpoint["outcomes"], OUTCOMES, label),
        }
        for label, note, checkpoint in _states(tampers, summary, "success")
    ]


def utility_table(tampers: Sequence[Json], summary: Json) -> dict[str, Any]:
    """Return retain scores by suite, a row a state of the subject."""
    states = _states(tampers, summary, "retain")
    suites = sorted({name for _, _, c in states for name in c["retain_suites"]})
    return {"suites": suites, "rows": states}


def _states(tampers: Sequence[Json], summary: Json, name: str) -> list[tuple[str, str, Json]]:
    """Return label, moment and checkpoint: untampered subjects, then every tamper at its break.

    States where ``name`` was not measured are left out.
    """
    undefended = (summary["undefended"] or {}).get("start")
    untampered = [("undefended", undefended), ("safeguarded", start_of(summary))]
    states = [
        (f"{who}, untampered", "step 0", checkpoint)
        for who, checkpoint in untampered
        if checkpoint and checkpoint[name]
    ]
    for tamper in tampers:
        found = stands_for(tamper, name)
        if found is not None:
            states.append((tamper["label"], _moment(tamper, found), found))
    return states


def trial_row(trial: "TrialView", summary: Json) -> dict[str, Any]:
    """Return one row of the table of trials."""
    labels = {t["configuration"]: t["label"] for t in summary["tampers"]}
    record, realised = trial.record, trial.record.realised
    rates = realised.get("learning_rates") or []
    changed = [norm or 0.0 for norm in (realised.get("changed") or {}).values()]
    losses = realised.get("losses") or []
    return {
        "label": labels.get(record.spec.configuration, record.spec.tamper),
        "role": ROLES.get(record.spec.role, record.spec.role),
        "purpose": record.spec.purpose,
        "seed": record.spec.seed,
        "status": record.status,
        "reason": record.reason,
        "steps": trial.last_step,
        "losses": figures.sparkline(losses, _loss_title(losses)),
        "loss_title": _loss_title(losses),
        "rates": (rates[0], rates[-1]) if rates else None,
        "changed": sum(norm > 0 for norm in changed),
        "tensors": len(changed),
        "norm": sum(norm**2 for norm in changed) ** 0.5,
        "order": realised.get("data_order_hash", ""),
        "seeds": record.seeds,
        "seconds": record.seconds,
    }


def _loss_title(losses: Sequence[float | None]) -> str:
    shown = [value for value in losses if value is not None]
    if not shown:
        return "no updates"
    return f"training loss {shown[0]:.3g} to {shown[-1]:.3g} nats a token in {len(losses)} updates"


def label_masks(records: "Records", summary: Json) -> list[dict[str, Any]]:
    """Return the first decoded training example of every configuration, token by token."""
    masks = []
    for tamper in summary["tampers"]:
        for trial in records.of(tamper["configuration"]):
            sample = trial.record.realised.get("label_sample") or []
            if sample:
                masks.append({"label": tamper["label"], "tokens": sample[0]})
                break
    return masks


def limits(summary: Json) -> list[str]:
    """Return what the result does not show, one sentence each."""
    suite, counts = summary["suite"] or {}, summary["status_counts"]
    said = []
    if suite.get("claim_grade"):
        said.append(
            "Claim-grade: it may support a statement about these attacks up to these budgets, and "
            "about nothing else."
        )
    else:
        said.append(
            "A screen: it can show a break. That it finds none is no evidence of resistance."
        )
    said.append(
        "Access level A4: the attacker holds the weights and may change them. Attackers who also "
        "hold the checkpoint from before the safeguard (A5) are not covered by the headline."
    )
    seeds = suite.get("seeds", 0)
    if seeds:
        seen = 1 - 0.1 ** (1 / seeds)
        said.append(
            f"{_seeds(seeds)} an attack: one that breaks in fewer than {figures.percent(seen)} of "
            "its runs is missed with a probability of more than 10 %."
        )
        said.append(
            f"Attacks of at most {figures.quantity(suite['steps'])} steps: an attacker with more "
            "data, more steps or other settings may need less than what is printed here."
        )
    if (summary["domain"] or {}).get("harmless"):
        said.append(
            "The domain is a benign proxy: how hard it is to break here does not carry over to "
            "hazardous knowledge or to another safeguard."
        )
    lost = [
        f"{n} {name.replace('_', ' ')}" for name, n in counts.items() if name in UNMEASURED and n
    ]
    if lost:
        said.append(f"Not every trial was measured: {', '.join(lost)}.")
    if not summary["complete"]:
        said.append("The run is not complete: what is missing may change every figure above.")
    return said


UNMEASURED = ("diverged", "out_of_memory", "errored", "interrupted")


def configuration_json(summary: Json) -> list[tuple[str, str]]:
    """Return name and indented JSON of whatever shaped the run."""
    parts = {
        "request": summary["request"],
        "subject": summary["subject"],
        "undefended subject": (summary["undefended"] or {}).get("subject"),
        "reference subject": (summary["reference"] or {}).get("subject"),
        "domain": summary["domain"],
        "suite and measuring plan": summary["suite"],
        "attacks, every setting": [
            {"label": t["label"], "configuration": t["configuration"], "settings": t["config"]}
            for t in summary["tampers"]
        ],
        "environment": summary["environment"],
    }
    return [(name, json.dumps(value, indent=2)) for name, value in parts.items() if value]


def commands(summary: Json, folder: str) -> list[str]:
    """Return the commands that make the run, and this page, again."""
    request = summary["request"]
    report = f"durometer report {shlex.quote(folder)}"
    if not request:
        return [report]
    words = ["durometer", "stress", request["subject"]]
    options = {k: v for k, v in request.items() if k != "subject" and v not in ("", None, "auto")}
    for name, value in options.items():
        repeated = isinstance(value, list)  # named in the plural, given one by one
        flag = f"--{(name.removesuffix('s') if repeated else name).replace('_', '-')}"
        for one in value if repeated else [value]:
            words += [flag, str(one)]
    return [shlex.join([*words, "--out", folder]), report]


# --- reading the store ---


@dataclass(frozen=True)
class TrialView:
    """One trial without its item records, which may be many.

    Attributes:
        curve: (steps or strength, success on select) by checkpoint.
    """

    record: TrialRecord
    curve: list[tuple[float, float]]
    last_step: int


@dataclass
class Records:
    """What a report takes from the stored records.

    Attributes:
        shown: the tamper whose responses are shown, or None.
        items: report items by what they show: undefended, safeguarded, tampered.
        moment: where the tampered ones were measured.
    """

    shown: Json | None
    trials: list[TrialView] = field(default_factory=list)
    items: dict[str, dict[str, Json]] = field(default_factory=dict)
    moment: str = ""

    @classmethod
    def read(cls, store: Store, shown: Json | None, *, texts: bool) -> "Records":
        """Read the store once, one trial in memory at a time."""
        records = cls(shown)
        for trial in store.trials():
            if texts:
                records._keep_items(trial)
            records.trials.append(_without_items(trial))
        return records

    def of(self, configuration: str) -> Iterator[TrialView]:
        """Yield the trials of one configuration on the subject that chose the worst."""
        for trial in self.trials:
            spec = trial.record.spec
            if _chooses(spec) and spec.configuration == configuration:
                yield trial

    def by_seed(self, configuration: str) -> dict[int, list[tuple[float, float]]]:
        """Return the curve of every seed, from the subject's step 0 on."""
        start = [
            t.curve[0]
            for t in self.trials
            if t.record.spec.role == "subject" and t.record.spec.tamper == "none" and t.curve
        ]
        return {t.record.spec.seed: [*start[:1], *t.curve] for t in self.of(configuration)}

    def samples(self) -> list[dict[str, Any]]:
        """Return a few items with the responses of every state of the subject, side by side.

        One for every outcome that the tampered subject gave, then by hash: never hand-picked.
        """
        tampered = self.items.get("tampered", {})
        ids = sorted(tampered, key=lambda i: hashlib.sha256(i.encode("utf-8", "replace")).digest())
        seen: set[str] = set()
        first = [i for i in ids if _new(tampered[i]["outcome"], seen)]
        chosen = [*first, *(i for i in ids if i not in first)][:SAMPLES]
        states = ("undefended", "safeguarded", "tampered")
        return [
            {
                "id": item,
                "entity": tampered[item]["entity"],
                "responses": [(state, self.items.get(state, {}).get(item)) for state in states],
            }
            for item in chosen
        ]

    def _keep_items(self, trial: TrialRecord) -> None:
        spec = trial.spec
        if spec.tamper == "none" and spec.role in ("subject", "undefended") and trial.checkpoints:
            state = ROLES[spec.role]
            self.items[state] = _by_id(trial.checkpoints[0])
        if self.shown is None or spec.configuration != self.shown["configuration"]:
            return
        if not _chooses(spec):
            return
        found = _breaking(trial, break_step(self.shown))
        if found is not None and "tampered" not in self.items:
            self.items["tampered"] = _by_id(found)
            self.moment = f"{figures.quantity(found.steps)} steps, seed {spec.seed}"


def _chooses(spec: TrialSpec) -> bool:
    """Say whether the worst case is chosen among trials like this."""
    return (spec.role, spec.purpose) == ("subject", "screen")


def _new(outcome: str, seen: set[str]) -> bool:
    fresh = outcome not in seen
    seen.add(outcome)
    return fresh


def _breaking(trial: TrialRecord, at: float | None) -> CheckpointRecord | None:
    """Return the first checkpoint at or after the median break with report items, else the last."""
    measured = [c for c in trial.checkpoints if success_items(c, Split.REPORT)]
    later = [c for c in measured if at is not None and c.steps >= at]
    return next(iter([*later[:1], *measured[-1:]]), None)


def _by_id(checkpoint: CheckpointRecord) -> dict[str, Json]:
    return {item["item_id"]: item for item in success_items(checkpoint, Split.REPORT)}


def _without_items(trial: TrialRecord) -> TrialView:
    curve = [
        (float(c.steps if c.strength is None else c.strength), rate.rate)
        for c in trial.checkpoints
        if (rate := success_rate([c], Split.SELECT))
    ]
    last = trial.checkpoints[-1].steps if trial.checkpoints else 0
    trial.checkpoints = []
    return TrialView(trial, curve, last)
