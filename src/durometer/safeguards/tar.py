"""TAR, tamper-resistant safeguards: trained against simulated fine-tuning attacks."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch

from durometer.core.optimizers import OptimizerName
from durometer.core.settings import Levels, setting
from durometer.domains.base import Domain
from durometer.safeguards.activations import distance
from durometer.safeguards.anchors import Partners, partners, recombined
from durometer.safeguards.base import (
    ReferencePoint,
    Safeguard,
    Term,
    Visit,
    make_safeguard,
    safeguard,
    supervised,
)
from durometer.safeguards.data import DefenceData, Unit
from durometer.safeguards.inner import ATTACKED, AgainstAttacks, InnerSettings
from durometer.safeguards.likelihoods import preference
from durometer.safeguards.passes import Pass, passes
from durometer.safeguards.train import Step
from durometer.subjects.base import Subject

ANCHORS, HELD_OUT, ALL_TOKENS = "anchors", "held_out_restricted", "held_out_tokens"
DPO_BETA = 0.1


class TarSettings(InnerSettings):
    """Settings of ``tar``; with preset ``faithful`` those of the released scripts."""

    stage1: Literal["auto", "random_mapping", "refusal", "none"] = setting(
        "auto", "safeguard it starts from; auto: random mapping for knowledge, refusal training"
    )
    stage1_preset: str = setting("", "preset of the first stage")
    steps: int = setting(750, "outer updates", ge=1)
    learning_rate: float = setting(2e-5, "outer learning rate", gt=0)
    optimizer: OptimizerName = setting("schedule_free_adamw", "outer optimiser")
    warmup_steps: int = setting(32, "outer updates of linear warm-up", ge=0)
    batch_size: int = setting(64, "rows of an outer batch", ge=1)
    tamper_resistance: float = setting(
        4.0,
        "coefficient of the tamper-resistance loss",
        search=Levels((0.25, 1.0, 4.0, 16.0)),
        ge=0,
    )
    loss: Literal["auto", "entropy", "cross_entropy", "dpo"] = setting(
        "auto",
        "tamper-resistance loss on held-out restricted rows under attack: minus the entropy, minus "
        "the cross-entropy, or preferring refusals (DPO); auto: entropy for knowledge, else DPO",
    )
    tokens: Literal["labels", "all"] = setting(
        "labels",
        "where a tamper-resistance loss other than DPO is taken: at the tokens of the answer, or "
        "at all tokens of a restricted row (the released code)",
    )
    entropy_floor: float = setting(
        0.0,
        "tamper-resistance gradients are dropped once the loss of a visit, without weights, is "
        "below this, nats; 0 never (the released scripts)",
        le=0,
    )
    representation: float = setting(
        1.0, "coefficient of the distance of retain activations from the reference's", ge=0
    )
    distance: Literal["norm", "square"] = setting(
        "norm", "distance of activations: the plain norm (released code) or its square (paper)"
    )
    anchor: float = setting(
        0.0,
        "coefficient of the same distance on retain rows recombined with one another: it keeps "
        "what is like them and no row is about (durometer's own; 0 in the paper)",
        ge=0,
    )
    recombined: float = setting(
        0.5, "chance of a prompt token of such a row to come from another row", gt=0, le=1
    )
    retain_reference: Literal["auto", "original", "stage_start"] = setting(
        "auto",
        "reference: the subject before any safeguard, or at the start of this stage (always so "
        "with DPO, which compares with it, too); auto: before any safeguard for knowledge, at the "
        "start of this stage for refusals, which the subject does not give before",
    )


# The blocks alone: flattening predictions would move every row of an embedding tied to the head,
# those of entities that no retain row is about among them. Long inner attacks on small batches
# resist better than short ones on large batches at the same cost. Attacks are dealt: of
# three seeds that drew each by itself the one with the fewest strong ones was broken by them in a
# fifth of the updates. Visits count alike: a strong attack breaks in its first dozen updates, which
# count for little where late ones count most. Recombined rows let both terms of distance be small,
# so that what is retained and resistance need not be traded for one another.
SMALL: dict[str, Any] = {
    "steps": 120,
    "learning_rate": 3e-3,
    "optimizer": "adamw",
    "schedule": "linear",
    "gradient_clip": 1.0,
    "train": "blocks",
    "loss": "entropy",
    "tamper_resistance": 24.0,
    "weighting": "flat",
    "representation": 2.0,
    "anchor": 2.0,
    "warmup_steps": 5,
    "batch_size": 48,
    "inner_steps": 64,
    "inner_rates": (3e-3, 1e-3, 3e-4),
    "inner_batch": 8,
    "adversaries": ("restricted", "switch", "mix"),
    "draws": "dealt",
}


@safeguard("tar", aliases=("TAR",))
class Tar(AgainstAttacks[TarSettings]):
    """First a plain safeguard, then training against inner attacks (first-order, straight-through).

    The gradient of the tamper-resistance loss is taken at the attacked weights and applied to the
    clean ones.
    """

    summary = "train against simulated fine-tuning attacks so that restricted content stays away"
    cost = "K + K / stride + 1 passes an outer step: 81 at K = 64; one more with recombined rows"
    source = "arXiv 2408.00761; rishub-tamirisa/tamper-resistance"
    cannot_show = "resistance to attacks that are longer than, or unlike, those it is trained with"
    settings_class = TarSettings
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "faithful": {"tokens": "all", "inner_weight_decay": 0.01},
        # Activations of such models are large: at a coefficient of 1 their distance has a gradient
        # a hundred times that of the tamper-resistance loss.
        "light": {
            "stage1_preset": "light",
            "steps": 60,
            "learning_rate": 5e-5,
            "optimizer": "adamw",
            "schedule": "linear",
            "warmup_steps": 4,
            "gradient_clip": 1.0,
            "train": "blocks",
            "representation": 0.1,
            "inner_steps": 16,
            "inner_weights": ("adapter",),
            "inner_rates": (2.5e-4, 8e-4),
            "adversaries": ("restricted", "switch", "mix"),
            "draws": "dealt",
            "inner_batch": 8,
            "batch_size": 8,
            "refresh": 4,
            "weighting": "normalised",
        },
        "tiny": SMALL,
        "ci": {**SMALL, "steps": 50, "learning_rate": 2e-3, "inner_steps": 16, "batch_size": 32},
    }

    def __init__(self, settings: TarSettings) -> None:
        super().__init__(settings)
        self._partners: Partners | None = None

    @property
    def reference(self) -> ReferencePoint | None:
        """The model that retain activations are kept near to; for DPO, the start of this stage."""
        if self.settings.loss == "dpo":
            return "stage_start"
        if not (self.settings.representation or self.settings.anchor):
            return None
        return "stage_start" if self.settings.retain_reference == "stage_start" else "original"

    def stages(self, domain: Domain) -> list[Safeguard[Any]]:
        """Return the plain safeguard that it starts from, and the training against attacks."""
        settings, knowledge = self.settings, domain.kind == "knowledge"
        chosen = {
            "loss": "entropy" if knowledge else "dpo",
            "retain_reference": "original" if knowledge else "stage_start",
        }
        told = {name: value for name, value in chosen.items() if getattr(settings, name) == "auto"}
        this = type(self)(settings.model_copy(update=told)) if told else self
        first = settings.stage1
        if first == "auto":
            first = "random_mapping" if knowledge else "refusal"
        return [this] if first == "none" else [make_safeguard(first, settings.stage1_preset), this]

    def terms(self, subject: Subject, data: DefenceData) -> list[Term]:
        """Return the retain loss and, at attacked weights, the tamper-resistance loss.

        Raises:
            InputError: attacks are to be replayed on weights that are too coarse for it.
        """
        settings = self.settings
        self.require_fit(subject)
        near = Term(
            "representation",
            settings.representation,
            "sft",
            self._distance,
            per="token",
            reads=("residual",),
            may_rest=True,
        )
        anchor = replace(near, name="anchor", coefficient=settings.anchor, rows=ANCHORS, at=ANCHORS)
        return [supervised(settings), near, anchor, resistance(settings)]

    def pools(self, data: DefenceData) -> Mapping[str, list[Unit]]:
        """Return the held-out rows with all tokens as labels, and the rows to be recombined."""
        pools = {ANCHORS: data.pool("retain")} if self.settings.anchor else {}
        if self.settings.tamper_resistance and resistance(self.settings).rows == ALL_TOKENS:
            held_out = data.pool(HELD_OUT)
            pools[ALL_TOKENS] = [tuple(replace(r, first_label=1) for r in u) for u in held_out]
        return pools

    def _distance(self, one: Pass) -> torch.Tensor:
        if self.settings.distance == "norm":
            return distance(one)
        pairs = zip(one.states(), one.reference.states(), strict=True)
        return torch.stack([((h - r) ** 2).sum(-1) for h, r in pairs]).mean(0)

    def visits(self, step: Step) -> Iterator[Visit]:
        """Yield points along inner attacks, then the weights themselves."""
        if self.settings.tamper_resistance:
            yield from (visit for visit in self.attacked(step) if not self._flat(step))
        if self.settings.anchor:
            self._anchor(step)
            yield Visit(ANCHORS)
        yield Visit()

    @torch.no_grad()
    def _flat(self, step: Step) -> bool:
        """Say whether the loss of the visit, as a whole, has passed the floor."""
        settings = self.settings
        if not settings.entropy_floor or settings.loss == "dpo":
            return False
        rows, away = step.rows(away_rows(settings)), away_from(settings)
        found = passes(step.subject.forward, rows, (), None, whole=False)
        losses = torch.cat([away(one) for one in found])
        return float(losses.mean()) < settings.entropy_floor

    def _anchor(self, step: Step) -> None:
        if self._partners is None:
            rows = (row for unit in step.data.pool("retain") for row in unit)
            self._partners = partners(rows)
        units, generator = step.units(ANCHORS), step.random(ANCHORS)
        step.put(ANCHORS, recombined(units, self._partners, self.settings.recombined, generator))


def resistance(settings: TarSettings) -> Term:
    """Return the tamper-resistance term on held-out restricted rows."""
    if settings.loss == "dpo":
        pairs = "held_out_pairs"
        return Term(ATTACKED, settings.tamper_resistance, pairs, preferred, "pair", ATTACKED)
    rows, loss = away_rows(settings), away_from(settings)
    rest = bool(settings.entropy_floor)
    return Term(ATTACKED, settings.tamper_resistance, rows, loss, at=ATTACKED, may_rest=rest)


def away_rows(settings: TarSettings) -> str:
    """Return the pool of the rows whose answers are to stay away."""
    return ALL_TOKENS if settings.tokens == "all" else HELD_OUT


def away_from(settings: TarSettings) -> Callable[[Pass], torch.Tensor]:
    """Return the tamper-resistance loss of each label: minus its entropy, or its cross-entropy."""
    if settings.loss == "cross_entropy":
        return lambda one: -one.cross_entropy()
    return lambda one: -one.entropy()


def preferred(one: Pass) -> torch.Tensor:
    """Return the DPO loss of refusals over answers, shape [pairs]."""
    return preference(one, DPO_BETA)
