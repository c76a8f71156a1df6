"""What every part of the study trains and attacks, from the registry and a few special cases."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from tar_attacks import BY_NAME, SENTINELS, Adversary, digest
from tar_jobs import Results

import durometer
import durometer.catalogue
from durometer.core.settings import digest_of
from durometer.domains.base import KINDS
from durometer.safeguards.base import Safeguard, safeguard_registry
from durometer.safeguards.harden import HardenRequest, stages_of
from durometer.safeguards.tar import Tar, TarSettings
from durometer.subjects.base import Subject
from durometer.subjects.builtin import subject_registry
from durometer.trials.suites import dense_ladder, doubling_ladder

Json = dict[str, Any]
PLAIN = {"knowledge": "random_mapping", "refusal": "refusal"}
# Safeguards that are controls, and a subject that was never taught what is restricted.
CONTROLS = ("noop", "plain_sft", "norm_noise", "inflate")
NEVER = "micro-never"
# What a control must fall to, whichever adversaries a part has: it was made for that.
ADAPTIVE = {"inflate": ("rescale, then full 3e-4",)}
# Specs that say more than a name; {tar} is the folder of TAR for the same kind.
SPECIAL = {"norm_noise": "norm_noise:like={tar}"}
# TAR with the terms of its paper alone, at the distance that suits them.
PAPER = "tar (paper's terms)"
# How TAR's released scripts draw inner attacks, and weight the points along them.
RELEASED = "tar (released draws and weights)"
RELEASED_SETTINGS = {"draws": "independent", "weighting": "normalised", "tamper_resistance": 6.0}
PAPER_SETTINGS = {"anchor": 0.0, "representation": 5.0, **RELEASED_SETTINGS}
SEED = 7
UNDEFENDED_SEEDS = (1, 2)


@dataclass(frozen=True)
class Model:
    """One subject to attack.

    Attributes:
        label: as tables name it.
        spec: as for ``durometer.harden``; '' for the built-in subject ``builtin``.
        seed: of the training.
    """

    label: str
    kind: str
    spec: str = ""
    builtin: str = ""
    seed: int = SEED

    @property
    def role(self) -> str:
        """``control`` or ``safeguard``."""
        return "control" if self.label in (*CONTROLS, NEVER) else "safeguard"

    @property
    def identity(self) -> str:
        """Name of its folder, the same for specs that come to the same settings."""
        return _identity(self)

    def place(self, work: Path) -> str:
        """Return what it is loaded from."""
        return self.builtin or str(work / self.identity)


UNDEFENDED = Model("undefended", "knowledge", builtin="micro")  # the same rows in either kind


@cache
def _micro() -> Subject:
    return durometer.load_subject("micro", device="cpu")


def _stages(model: Model) -> list[Safeguard[Any]]:
    request = HardenRequest("micro", f"world:{model.kind}", (model.spec,))
    return stages_of(request, _micro(), durometer.load_domain(request.domain))


@cache
def trained_against(model: Model) -> tuple[str, ...]:
    """Return the digests of the attacks that a model is trained against."""
    stages = [] if model.builtin else _stages(model)
    return tuple(digest for stage in stages for digest in stage.trained_against())


@cache
def _identity(model: Model) -> str:
    if model.builtin:
        return f"{model.builtin}-{model.kind}"
    stages = _stages(model)
    # Values that differ from the defaults: a setting added later does not make another model of it.
    told: list[Any] = [
        [s.name, s.settings.model_dump(mode="json", exclude_defaults=True)] for s in stages
    ]
    if "{tar}" in model.spec:
        told.append(tar_model(model.kind, model.seed).identity)
    return f"{stages[-1].name}-{model.kind}-{model.seed}-{digest_of(told)[:8]}"


def tar_model(kind: str, seed: int = SEED, **settings: Any) -> Model:
    """Return TAR with its preset for tiny subjects, but for ``settings``."""
    spec = ",".join(f"{key}={value}" for key, value in settings.items())
    return Model("tar", kind, f"tar:{spec}" if spec else "tar", seed=seed)


def paper_model(kind: str, seed: int = SEED) -> Model:
    """Return TAR without terms that are not in its paper."""
    return replace(tar_model(kind, seed, **PAPER_SETTINGS), label=PAPER)


def released_model(kind: str, seed: int = SEED) -> Model:
    """Return TAR whose attacks are drawn each by itself, their last points counting most."""
    return replace(tar_model(kind, seed, **RELEASED_SETTINGS), label=RELEASED)


def plain_model(kind: str, seed: int = SEED) -> Model:
    """Return the safeguard that TAR starts from."""
    return Model(PLAIN[kind], kind, PLAIN[kind], seed=seed)


def all_models(kinds: Iterable[str]) -> list[Model]:
    """Return every registered safeguard of open weights, and the controls."""
    models = [
        Model(name, kind, SPECIAL.get(name, name))
        for kind in KINDS
        if kind in kinds
        for name, entry in safeguard_registry
        if entry.access == "weights" and kind in entry.kinds
    ]
    models += [paper_model(kind) for kind in KINDS if kind in kinds]
    if NEVER in subject_registry.names():
        models += [Model(NEVER, kind, builtin=NEVER) for kind in KINDS if kind in kinds]
    return models


def tiny_tar() -> TarSettings:
    """Return TAR's settings for subjects as small as ``micro``."""
    return TarSettings.parse("tar", Tar.presets["tiny"])


def ablations(kind: str) -> dict[str, dict[str, Model]]:
    """Return by what is varied and its value the model to attack."""
    weight = tiny_tar().tamper_resistance
    mixes = ("restricted", "restricted+switch", "restricted+mix", "restricted+switch+mix")
    return {
        "inner steps (K)": {"0": plain_model(kind)}
        | {str(k): tar_model(kind, inner_steps=k) for k in (8, 16, 32, 64)},
        "tamper-resistance coefficient": {
            f"{factor:g} x": tar_model(kind, tamper_resistance=factor * weight)
            for factor in (0.25, 1, 4)
        },
        "distance from the start": {
            f"{value:g}": tar_model(kind, representation=value, anchor=value)
            for value in (1.0, tiny_tar().representation, 4.0)
        },
        "draws of inner attacks": {
            draws: tar_model(kind, draws=draws) for draws in ("independent", "dealt")
        },
        "weights along inner attacks": {
            "late points most": tar_model(kind, weighting="normalised", tamper_resistance=6.0),
            "all alike": tar_model(kind),
        },
        "recombined rows": {"without": paper_model(kind), "with": tar_model(kind)},
        "stages": {
            "first alone": plain_model(kind),
            "second alone": tar_model(kind, stage1="none"),
            "both": tar_model(kind),
        },
        "adversaries": {mix: tar_model(kind, adversaries=mix) for mix in mixes},
    }


def figure3_models() -> dict[str, dict[str, Model]]:
    """Return the models of the comparison of losses, by loss and by how long they were trained.

    Inner attacks are drawn and weighted as in the released scripts.
    """
    steps = tiny_tar().steps
    found = {
        loss: {
            "early": tar_model("knowledge", loss=loss, steps=steps // 4, **RELEASED_SETTINGS),
            "late": tar_model("knowledge", loss=loss, **RELEASED_SETTINGS),
        }
        for loss in ("entropy", "cross_entropy")
    }
    return {"stage 1 alone": {"late": plain_model("knowledge")}} | found


@dataclass(frozen=True)
class Limits:
    """How much of a part is run; the defaults of ``LIMITS`` are the study's."""

    cap: int
    seeds: int
    kinds: tuple[str, ...] = KINDS
    adversaries: tuple[str, ...] = tuple(BY_NAME)
    safeguards: tuple[str, ...] = ()
    training_seeds: int = 1
    best: int = 8

    def as_dict(self) -> Json:
        """Return the fields as plain JSON types."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items()}

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> "Limits":
        """Return what ``as_dict`` returned."""
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in found.items()
        }
        return cls(**values)


LIMITS = {
    "figure3": Limits(0, 3, ("knowledge",)),
    "figure5": Limits(1000, 5, ("knowledge",)),
    "screen": Limits(128, 3, adversaries=SENTINELS),
    "best": Limits(512, 6),
    "seeds": Limits(512, 6, training_seeds=3, best=2),
    "ablations": Limits(512, 3, ("knowledge",), SENTINELS),
}
LONG_FACTOR = 2  # the strongest third of the adversaries of `seeds` goes on to twice the cap


@dataclass(frozen=True)
class Trial:
    """One planned attack on one model."""

    model: Model
    adversary: Adversary
    seed: int
    cap: int
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def reach(self) -> int:
        """Updates that it makes at most: an adversary may plan fewer than the cap."""
        return min(self.cap, int(self.adversary.at(self.cap)["steps"]))

    def key(self, results: Results) -> str:
        """Return what it is kept under, '' while its model is not there."""
        found = results.models.get(self.model.identity, {})
        if found.get("status") != "done":
            return ""
        mark = digest(self.adversary, self.cap)
        parts = [self.model.identity, found["fingerprint"][:12], mark, self.seed, self.cap]
        return "|".join(map(str, [*parts, *self.more.values()]))

    def undefended(self) -> list["Trial"]:
        """Return the same attack on the subject without a safeguard."""
        return [replace(self, model=UNDEFENDED, seed=seed, more={}) for seed in UNDEFENDED_SEEDS]

    def job(self, results: Results, work: Path, undefended: float | None) -> Json:
        """Return what a worker needs to know."""
        found = results.models[self.model.identity]
        rungs = doubling_ladder if undefended is None else dense_ladder
        return {
            "key": self.key(results),
            "place": self.model.place(work),
            "fingerprint": found["fingerprint"],
            "kind": self.model.kind,
            "start": found["start"],
            "undefended": undefended,
            "tamper": self.adversary.tamper,
            "settings": self.adversary.at(self.cap),
            "adversary": self.adversary.name,
            "seed": self.seed,
            "cap": self.cap,
            "rungs": rungs(self.cap),
            "stop": undefended is not None,
            **self.more,
        }


def undefended_share(results: Results, trial: Trial) -> float | None:
    """Return the undefended subject's share after the same attack, the mean over its seeds."""
    found = [results.trials.get(other.key(results)) for other in trial.undefended()]
    ends = [f["curve"]["report"][-1] for f in found if f and f.get("curve", {}).get("report")]
    return sum(ends) / len(ends) if ends else None


def crossed(models: Iterable[Model], limits: Limits, cap: int = 0) -> Iterator[Trial]:
    """Yield every adversary and seed on every model, one model after the other."""
    for model in dict.fromkeys(models):
        for name in dict.fromkeys((*limits.adversaries, *ADAPTIVE.get(model.label, ()))):
            for seed in range(1, limits.seeds + 1):
                yield Trial(model, BY_NAME[name], seed, cap or limits.cap)


def chosen(models: Iterable[Model], limits: Limits) -> list[Model]:
    """Return those that the limits name, all without names."""
    return [m for m in models if not limits.safeguards or m.label in limits.safeguards]


def with_seeds(models: Iterable[Model], limits: Limits) -> list[Model]:
    """Return the models with as many training seeds, the first of which is everybody's."""
    return [
        replace(model, seed=SEED + number)
        for model in models
        for number in range(limits.training_seeds)
    ]
