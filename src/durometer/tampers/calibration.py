"""The two texts that attacks on safety weights compare: refusals, and harmless answers."""

from collections.abc import Sequence
from typing import Literal

from durometer.core.adapters import Targets
from durometer.core.budget import Spent
from durometer.core.rows import Row
from durometer.core.seeds import Seeds
from durometer.core.settings import Levels, Settings, setting
from durometer.domains.base import Domain
from durometer.subjects.base import Subject
from durometer.tampers.data import make_rows, training_items

Selection = Literal["difference", "safety_only", "random"]


class CalibrationSettings(Settings):
    """What attacks that compare safety with utility share."""

    selection: Selection = setting(
        "difference",
        "what is removed: what serves safety but not utility; what serves safety; or, as a "
        "control, as much drawn by chance as the difference has",
        search=Levels(("difference", "safety_only", "random")),
    )
    utility: Literal["benign", "retain"] = setting(
        "benign", "rows whose answers stand for utility", search=Levels(("benign", "retain"))
    )
    examples: int = setting(128, "rows of each of the two texts", search=Levels((32, 128)), ge=1)
    targets: Targets = setting(
        "all", "matrices that are edited", search=Levels(("all", "attention", "mlp"))
    )
    max_length: int = setting(512, "longest row in tokens", ge=8)


def calibration_rows(
    subject: Subject, data: Domain, settings: CalibrationSettings, seeds: Seeds
) -> tuple[list[Row], list[Row]]:
    """Return refusals to restricted prompts, and harmless answers; responses are the labels."""
    made = []
    for relation in ("refusals", settings.utility):
        chosen = training_items(data, relation, settings.examples, seeds)
        made.append(
            make_rows(chosen, subject.chat, label_prompt=False, max_length=settings.max_length)
        )
    return made[0], made[1]


def book_rows(rows: Sequence[Row], spent: Spent) -> int:
    """Add the rows of a calibration to ``spent``, FLOPs left out; return their tokens."""
    tokens = sum(len(row.ids) for row in rows)
    spent.examples += len({row.item_id for row in rows})
    spent.restricted_examples += len({row.item_id for row in rows if row.restricted})
    spent.tokens += tokens
    return tokens
