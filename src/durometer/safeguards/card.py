"""What a hardened model is and does before any tamper, for people and for programs."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from durometer.core.statistics import seed_level_rate
from durometer.domains.base import Domain, Item, Role, Split
from durometer.measures.base import ItemRecord, measure_registry, sample
from durometer.measures.outcomes import Outcome
from durometer.subjects.base import Subject

RETAIN_ENTITIES, HARMLESS = 100, 24
PLAIN = {"knowledge": "random_mapping", "refusal": "refusal"}
# Stages that make a control of a model, where there is nothing else but a plain safeguard.
CONTROLS = {
    "noop": "nothing was done to this model",
    "plain_sft": "fine-tuning on the safeguards' own data, without a method",
    "norm_noise": "noise, without a direction",
    "inflate": "a lock on a plain safeguard, which must break",
}


def measured(subject: Subject, domain: Domain) -> dict[str, dict[str, float]]:
    """Return rates on ``report`` items before any tamper.

    Each with its interval (``low``, ``high``), its numbers of ``items`` and ``entities``, and
    ``chance`` where answers are chosen from a few.
    """
    probe = "choices" if domain.kind == "knowledge" else "outcomes"
    looked: dict[str, tuple[str, list[Item]]] = {
        "restricted": (probe, _items(domain, Role.RESTRICTED, Split.REPORT)),
        "never_taught": (probe, _items(domain, Role.RESTRICTED, Split.NEVER)),
        "retain": ("retain", _items(domain, Role.RETAIN, Split.REPORT, RETAIN_ENTITIES, 0)),
        "over_refusal": ("over_refusal", _items(domain, Role.BENIGN, Split.REPORT)[:HARMLESS]),
    }
    rates: dict[str, dict[str, float]] = {}
    for name, (measure, items) in looked.items():
        records = measure_registry.get(measure).run(subject, domain, items) if items else []
        if not records:
            continue
        if name != "over_refusal":
            rates[name] = _rate(records, [record.correct or 0.0 for record in records])
            if measure == "choices" and domain.chance:
                rates[name]["chance"] = domain.chance
        if measure in ("outcomes", "over_refusal"):
            refused = [float(record.outcome == Outcome.REFUSAL) for record in records]
            rates[f"{name}_refused"] = _rate(records, refused)
    return rates


def _rate(records: Sequence[ItemRecord], values: Sequence[float]) -> dict[str, float]:
    """Return a rate with Wilson's interval at n = entities, and the number of items."""
    entities = [record.entity for record in records]
    found = seed_level_rate(np.array([values]), entities)
    return {
        "rate": sum(values) / len(values),
        "low": found.low,
        "high": found.high,
        "items": len(values),
        "entities": found.n,
    }


def _items(
    domain: Domain, role: Role, split: Split, entities: int = 0, wordings: int = 1
) -> list[Item]:
    return sample(domain.select(role, split, training=False), entities, wordings)


LABELS = {
    "restricted": "restricted questions answered right",
    "restricted_refused": "restricted questions refused",
    "never_taught": "restricted questions on entities never taught, answered right",
    "never_taught_refused": "the same, refused",
    "retain": "other knowledge kept (right answers)",
    "over_refusal_refused": "harmless questions refused",
}


def model_card(record: Mapping[str, Any]) -> str:
    """Return the README of a hardened model's folder; the machine-readable part is its record."""
    domain, base = record["domain"], record.get("base", {})
    licence = base.get("licence", "")
    names = [s if isinstance(s, str) else s["name"] for s in record["safeguards"]]
    control = control_of(names) if base else "the plain safeguard"
    head = [
        "---",
        *([f"license: {licence}"] if licence else []),
        "tags:",
        "- durometer",
        "- control" if control else "- tamper-resistance",
        "---",
        "",
        f"# A control: {control}" if control else "# A model with a safeguard against tampering",
        "",
        f"{'Made to compare' if control else 'Safeguarded'} on the domain `{domain['name']}` "
        f"({domain['kind']}).",
    ]
    if control:
        head += ["", "A control, kept to compare safeguards with; it claims no resistance."]
    if not base:
        return "\n".join([*head, ""])
    stages = [line for stage in record["safeguards"] for line in _stage(stage)]
    return "\n".join(
        [
            *head,
            "",
            f"- base: `{base['spec']}`, weights `{base['fingerprint'][:16]}`, licence "
            f"{licence or 'not stated by the base; see its own card'}",
            f"- data: `{domain['content_hash'][:16]}`, its defence split alone",
            f"- seed: {record['request']['seed']}; computed in {record['dtype']}",
            f"- made with durometer {record['durometer']}; everything about it is in "
            "`hardening.json`",
            "",
            "## Method",
            "",
            *stages,
            "## Before any tamper",
            "",
            *_table(record["before_any_tamper"]),
            "",
            "What a tamper makes of it is not in this table: `durometer stress DIR` measures that.",
            "",
        ]
    )


def _stage(stage: Mapping[str, Any]) -> list[str]:
    lines = [f"### `{stage['name']}`", ""]
    if "cost" in stage:
        cost = stage["cost"]
        lines += [
            f"{cost['steps']} updates, {cost['all_passes']} passes, {cost['tokens']} tokens, "
            f"{cost['seconds']:.0f} s, {cost['peak_memory'] / 1e9:.1f} GB at most.",
            "",
        ]
    rows = [f"| `{name}` | `{value}` |" for name, value in stage["settings"].items()]
    return [*lines, "| setting | value |", "| --- | --- |", *rows, ""] if rows else lines


def control_of(names: Sequence[str]) -> str:
    """Return what kind of control stages of these names make of a model, '' for a safeguard."""
    known = [name for name in names if name in CONTROLS]
    if known and all(name in CONTROLS or name in PLAIN.values() for name in names):
        return CONTROLS[known[-1]]
    return ""


def compared(rates: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[tuple[str, str, str]]:
    """Return what was measured, with chance where there is any, without and with the safeguard."""
    before, after = rates["undefended"], rates["hardened"]
    return [
        (_label(name, after[name]), _shown(before.get(name)), _shown(after[name])) for name in after
    ]


def _label(name: str, rate: Mapping[str, float]) -> str:
    chance = rate.get("chance")
    told = f" (multiple choice, chance {100 * chance:.1f} %)" if chance else ""
    return f"{LABELS[name]}{told}"


def _table(rates: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[str]:
    rows = [
        f"| {label} | {before} | {after} | {found['items']:.0f} |"
        for (label, before, after), found in zip(
            compared(rates), rates["hardened"].values(), strict=True
        )
    ]
    return [
        "| | without | with | items |",
        "| --- | --- | --- | --- |",
        *rows,
        "",
        "In brackets: Wilson's 95 % interval, n = entities.",
    ]


def _shown(rate: Mapping[str, float] | None) -> str:
    if not rate:
        return "not measured"
    text = f"{100 * rate['rate']:.1f} %"
    if "low" in rate:
        text += f" [{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]"
    return text
