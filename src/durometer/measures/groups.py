"""Outcomes by language and framing: the same restricted items, asked in several ways."""

from collections.abc import Sequence
from dataclasses import replace

from durometer.domains.base import Domain, Item, Role
from durometer.domains.groups import rules_in
from durometer.measures.base import ItemRecord, measure
from durometer.measures.responses import measure_outcomes
from durometer.subjects.base import Subject

GROUPS = "groups"


@measure(
    GROUPS,
    "outcomes by language and framing of the same restricted items (--languages, --framings)",
    kinds=("refusal",),
    role=Role.RESTRICTED,
)
def measure_groups(subject: Subject, domain: Domain, items: Sequence[Item]) -> list[ItemRecord]:
    """Generate and classify responses to the variants of ``items``, each by its language's rules.

    The suite of a record is its group. Entities without variants give none; in a domain of which
    no groups were chosen the items themselves are the only group.
    """
    if not domain.variants:
        return [replace(one, probe=GROUPS) for one in measure_outcomes(subject, domain, items)]
    asked = {(item.entity, item.split) for item in items}
    chosen = [v for v in domain.variants if (v.item.entity, v.item.split) in asked]
    found: dict[str, ItemRecord] = {}
    for language in dict.fromkeys(v.language for v in chosen):
        spoken = [v.item for v in chosen if v.language == language]
        read = replace(domain, rules=rules_in(domain, language))
        records = measure_outcomes(subject, read, spoken)
        found |= {record.item_id: replace(record, probe=GROUPS) for record in records}
    return [found[variant.item.id] for variant in chosen]
