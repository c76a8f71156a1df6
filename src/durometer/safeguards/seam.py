"""SEAM: learning harmful answers is coupled to unlearning harmless ones."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch

from durometer.core.schedules import Schedule
from durometer.core.settings import Between, setting
from durometer.safeguards.banks import added, perturbed
from durometer.safeguards.base import (
    Safeguard,
    Term,
    TrainingSettings,
    Visit,
    safeguard,
    supervised,
)
from durometer.safeguards.data import DefenceData
from durometer.safeguards.lens import logit_lens, unlearning
from durometer.safeguards.passes import Pass
from durometer.safeguards.probes import applied, norm_of
from durometer.safeguards.train import Step
from durometer.subjects.base import Subject

HARMFUL, HARMLESS = "harmful", "harmless"
MOVED = " moved"
COSINE = "self_destruct"


class SeamSettings(TrainingSettings):
    """Settings of ``seam``; defaults are the published ones."""

    steps: int = setting(2000, "updates; published: one epoch of 8,000 pairs", ge=1)
    learning_rate: float = setting(2e-5, "peak learning rate", gt=0)
    schedule: Schedule = setting("cosine", "learning-rate schedule")
    batch_size: int = setting(4, "rows of each pool an update", ge=1)
    unlearn: float = setting(
        1.0, "coefficient of minus the log-loss of harmful answers at all depths", ge=0
    )
    self_destruct: float = setting(
        0.01,
        "coefficient of the cosine of the harmful and the harmless gradient (beta)",
        search=Between(1e-3, 1.0, log=True),
        ge=0,
    )
    epsilon: float = setting(1e-3, "norm of the probes' steps, relative to unit gradients", gt=0)


@safeguard("seam")
class Seam(Safeguard[SeamSettings]):
    """Refusal training with gradients of harmful and of harmless rows that point opposite ways.

    The loss is ``L(S) - log(1 + mean over depths of CE(H)) + beta cos(g_H, g_R)``. With c the
    cosine and u unit gradients, the gradient of the last is taken by differences:
    ``[(g_H(theta + eps (u_R - c u_H)) - g_H) / |g_H| + (the same, H and R exchanged)] / eps``.
    Refusals and harmful answers share nothing but the prompt, which has no labels, so that no mask
    of shared tokens is needed.
    """

    summary = "refusal training in which a step towards harmful answers is one away from all others"
    cost = "5 passes a step, 4 more gradients kept"
    source = "arXiv 2505.12186; ZJUWYH/seam"
    cannot_show = (
        "resistance to an attacker who mixes in harmless rows or projects their gradient out"
    )
    kinds = ("refusal",)
    settings_class = SeamSettings
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "tiny": {
            "steps": 120,
            "learning_rate": 3e-3,
            "schedule": "linear",
            "warmup_steps": 12,
            "batch_size": 16,
            "train": "adapter",
            "unlearn": 0.3,
        }
    }
    separate = True

    def terms(self, subject: Subject, data: DefenceData) -> list[Term]:
        """Return the supervised loss, unlearning, and what the cosine's gradient is made of."""
        settings = self.settings
        needed = 1.0 if settings.self_destruct else 0.0
        pools = {HARMFUL: "restricted", HARMLESS: "retain"}
        lens = logit_lens(subject, "unlearn") if settings.unlearn else None

        def unlearn(one: Pass) -> torch.Tensor:
            assert lens is not None
            return unlearning(lens, one.states(tokens=False), one.labelled.targets)

        def part(name: str, moved: str = "") -> Term:
            at = name + moved if moved else Visit.place
            return Term(name + moved, needed, pools[name], lambda p: p.cross_entropy(), at=at)

        return [
            supervised(settings),
            Term(
                "unlearn",
                settings.unlearn,
                "restricted",
                unlearn,
                per="batch",
                reads=("residual",),
                whole=True,
            ),
            *(part(name) for name in pools),
            *(part(name, MOVED) for name in pools),
        ]

    def visits(self, step: Step) -> Iterator[Visit]:
        """Yield the weights, then a probe for each of the two gradients."""
        yield Visit()
        if not (norm_of(step, HARMFUL) and norm_of(step, HARMLESS)):
            return
        cosine = step.bank.cosine(HARMFUL, HARMLESS)
        for name, other in ((HARMFUL, HARMLESS), (HARMLESS, HARMFUL)):
            epsilon = self.settings.epsilon
            ways = {
                other: epsilon / norm_of(step, other),
                name: -epsilon * cosine / norm_of(step, name),
            }
            with perturbed(step.subject, step.by_name(step.bank.combined(ways))):
                yield Visit(name + MOVED)

    def transform(self, step: Step) -> list[torch.Tensor | None]:
        """Return the gradient of the losses with that of the cosine, whose value is noted."""
        parts = (HARMFUL, HARMLESS, HARMFUL + MOVED, HARMLESS + MOVED)
        rest = applied(step, *parts)
        if not all(norm_of(step, name) for name in parts):
            return rest
        weight = self.settings.self_destruct
        step.losses[COSINE] = weight * step.bank.cosine(HARMFUL, HARMLESS)
        ways: dict[str, float] = {}
        for name in (HARMFUL, HARMLESS):
            ways[name + MOVED] = weight / (self.settings.epsilon * norm_of(step, name))
            ways[name] = -ways[name + MOVED]
        pairs = zip(rest, step.bank.combined(ways), strict=True)
        return [added(one, other) for one, other in pairs]
