"""Short trainings of every registered safeguard on the tiny world."""

from collections.abc import Callable
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
    "weight_decay": 0.0,
    "gradient_clip": 0.0,
}
# What a safeguard needs besides to be short.
SHORT: dict[str, dict[str, Any]] = {
    "tar": {
        "stage1": "none",
        "anchor": 0.5,
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
    "llmu": {"sft": 1.0},
    "sdd": {"sft": 1.0},
    "extended_refusal": {"sft": 1.0, "overview": "{prompt}", "rationale": "{refusal}"},
    "undo": {"sft": 1.0},
    "r2d2": {
        "pool": 4,
        "cases": 2,
        "search_steps": 1,
        "candidates": 8,
        "top_k": 8,
        "suffix_tokens": 3,
        "initial": "",
    },
    "sophon": {"inner_steps": 3, "inner_rates": (1e-2,), "inner_batch": 6, "normal_steps": 1},
    "rmu": {"first_block": 0.0, "last_block": 1.0, "sft": 1.0},
    "circuit_breakers": {"first_block": 0.0, "last_block": 1.0, "sft": 1.0},
    "crl": {"sft": 1.0},
    "vaccine": {"sft": 1.0},
    "t_vaccine": {"sft": 1.0, "layers": 0.5, "redraw": 2, "reweigh": 3, "probe_rows": 8},
    "latent_adversarial": {"pgd_steps": 2, "reuse": 2, "unit": "median", "radius": 0.3},
    "refat": {"refresh": 2, "prompts": 6},
    "mudman": {"sft": 1.0, "fork_every": 2},
    "cir": {
        "sft": 1.0,
        "refit": 2,
        "retain_limit": 0.0,
        "last_block": 1.0,
        "input_directions": 3,
        "gradient_directions": 3,
    },
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
EDITED: dict[str, dict[str, Any]] = {
    "steering": {"stage1": "none", "layer_stride": 1, "keep": 0.01},
    "rep_select": {"batch_size": 14, "rate": 1.0, "retain_kl": 0.1, "bisections": 2},
}
# What such an edit starts from, where it is not the undefended model.
EDIT_START: dict[str, Callable[[], Subject]] = {"lox": tiny_world.safeguarded}
# Settings with which what is done before training changes nothing.
NEUTRAL: dict[str, dict[str, Any]] = {"undo": {"noise_share": 0.0}}


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
