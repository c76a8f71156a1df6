"""Short trainings of every registered safeguard on the tiny world."""

from dataclasses import replace
from typing import Any

import tiny_world

import durometer.catalogue  # noqa: F401  (fills the registries)
from durometer.core.seeds import Seeds
from durometer.domains.base import Domain, Kind
from durometer.safeguards.base import (
    Safeguard,
    Term,
    TrainingSettings,
    make_safeguard,
    safeguard_registry,
)
from durometer.safeguards.bench import Bench
from durometer.safeguards.data import DefenceData
from durometer.safeguards.passes import Reference
from durometer.safeguards.train import Outcome, TrainingRun
from durometer.subjects.base import Subject

SEEDS = Seeds.derive(7)
COMMON: dict[str, Any] = {
    "steps": 4,
    "batch_size": 6,
    "learning_rate": 3e-3,
    "optimizer": "adamw",
    "schedule": "constant",
    "warmup_steps": 0,
    "train": "all",
}
# What a safeguard needs besides to be short.
SHORT: dict[str, dict[str, Any]] = {
    "tar": {
        "stage1": "none",
        "loss": "entropy",
        "inner_steps": 4,
        "stride": 2,
        "inner_rates": (1e-2,),
        "inner_batch": 6,
        "adversaries": ("restricted", "mix"),
    },
    "booster": {"weight_decay": 0.0},
    "ctrap": {"weight_decay": 0.0},
    "mlac": {"inner_steps": 3, "stride": 2, "inner_rates": (1e-2,), "inner_batch": 6},
    "sophon": {"inner_steps": 3, "inner_rates": (1e-2,), "inner_batch": 6, "normal_steps": 1},
}
TRAINED = [
    (name, kind)
    for name, entry in safeguard_registry
    for kind in entry.kinds
    if issubclass(entry.settings_class, TrainingSettings)
]


def short(name: str, **settings: Any) -> Safeguard[Any]:
    return make_safeguard(name, **{**COMMON, **SHORT.get(name, {}), **settings})


# Settings of those that only edit.
EDITED: dict[str, dict[str, Any]] = {}


def short_edit(name: str, **settings: Any) -> Safeguard[Any]:
    return make_safeguard(name, **{**EDITED.get(name, {}), **settings})


def edit(made: Safeguard[Any], subject: Subject, kind: Kind = "knowledge") -> Bench:
    """Let a safeguard edit the subject; its frozen reference is the undefended model."""
    data = DefenceData(subject, tiny_world.tiny_domain(kind))
    base = tiny_world.undefended()
    reference = Reference(base.model, tree=base.tree) if made.reference else None
    bench = Bench(subject, data, SEEDS, reference)
    made.edit(bench)
    return bench


def prepare(
    made: Safeguard[Any], kind: Kind = "knowledge", **options: Any
) -> tuple[TrainingRun, Subject, DefenceData]:
    subject = options.pop("subject", None) or tiny_world.undefended()
    domain: Domain = options.pop("domain", None) or tiny_world.tiny_domain(kind)
    data = DefenceData(subject, domain)
    reference = Reference(subject.model, tree=subject.tree) if made.reference else None
    seeds = options.pop("seeds", SEEDS)
    return (
        TrainingRun(made, subject, data, seeds, reference=reference, **options),
        subject,
        data,
    )


def trained(
    made: Safeguard[Any], kind: Kind = "knowledge", **options: Any
) -> tuple[Subject, Outcome]:
    run, subject, _ = prepare(made, kind, **options)
    return subject, run.run()


def without(made: Safeguard[Any], *names: str) -> Safeguard[Any]:
    """Return the safeguard with the coefficients of these terms set to 0, the rest as it is."""
    terms = made.terms

    def fewer(subject: Subject, data: DefenceData) -> list[Term]:
        return [
            replace(term, coefficient=0.0) if term.name in names else term
            for term in terms(subject, data)
        ]

    made.terms = fewer  # type: ignore[method-assign]
    return made


def term_names(made: Safeguard[Any], kind: Kind) -> list[str]:
    subject = tiny_world.undefended()
    data = DefenceData(subject, tiny_world.tiny_domain(kind))
    data.add(made.pools(data))
    return [term.name for term in made.terms(subject, data) if term.weight(0, 4)]
