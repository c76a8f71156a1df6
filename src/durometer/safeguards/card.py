"""What a hardened model is and does before any tamper, for people and for programs."""

from collections.abc import Mapping
from typing import Any

from durometer.domains.base import Domain, Item, Role, Split
from durometer.measures.base import measure_registry, sample
from durometer.measures.outcomes import Outcome
from durometer.subjects.base import Subject

RETAIN_ENTITIES, HARMLESS = 100, 24


def measured(subject: Subject, domain: Domain) -> dict[str, dict[str, float]]:
    """Return rates on ``report`` items before any tamper, each with its number of items."""
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
        refused = sum(record.outcome == Outcome.REFUSAL for record in records) / len(records)
        if name != "over_refusal":
            right = sum(record.correct or 0.0 for record in records) / len(records)
            rates[name] = {"rate": right, "items": len(records)}
        if measure in ("outcomes", "over_refusal"):
            rates[f"{name}_refused"] = {"rate": refused, "items": len(records)}
    return rates


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
    head = [
        "---",
        *([f"license: {licence}"] if licence else []),
        "tags:",
        "- durometer",
        "- tamper-resistance",
        "---",
        "",
        "# A model with a safeguard against tampering",
        "",
        f"Safeguarded on the domain `{domain['name']}` ({domain['kind']}).",
    ]
    if not base:
        return "\n".join([*head, "", "A plain safeguard, kept as a control to compare with.", ""])
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


def _table(rates: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[str]:
    before, after = rates["undefended"], rates["hardened"]
    rows = [
        f"| {LABELS[name]} | {_percent(before.get(name))} | {_percent(after[name])} | "
        f"{after[name]['items']:.0f} |"
        for name in after
    ]
    return ["| | without | with | items |", "| --- | --- | --- | --- |", *rows]


def _percent(rate: Mapping[str, float] | None) -> str:
    return f"{100 * rate['rate']:.1f} %" if rate else "not measured"
