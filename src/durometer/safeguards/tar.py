"""TAR, tamper-resistant safeguards: trained against simulated fine-tuning attacks."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal, TypeVar

import torch
from pydantic import field_validator
from torch.nn import functional

from durometer.core.errors import InputError
from durometer.core.optimizers import OptimizerName
from durometer.core.settings import Levels, setting
from durometer.domains.base import Domain
from durometer.safeguards.anchors import anchors, replaceable
from durometer.safeguards.attacks import (
    Adversary,
    Delta,
    InnerAttack,
    InnerWeights,
    whole_delta,
)
from durometer.safeguards.banks import perturbed
from durometer.safeguards.base import (
    ReferencePoint,
    Safeguard,
    Term,
    TrainingSettings,
    Visit,
    make_safeguard,
    safeguard,
    supervised,
)
from durometer.safeguards.data import DefenceData, Unit
from durometer.safeguards.passes import Pass
from durometer.safeguards.train import Step
from durometer.subjects.base import Subject

ATTACKED, ANCHORS = "attacked", "anchors"
DPO_BETA = 0.1
A = TypeVar("A", bound="InnerSettings")


class InnerSettings(TrainingSettings):
    """Settings of training against inner attacks."""

    inner_steps: int = setting(64, "updates of an inner attack (K)", ge=1)
    stride: int = setting(4, "inner updates between two tamper-resistance gradients", ge=1)
    tampers: int = setting(1, "inner attacks an outer update", ge=1)
    visits: Literal["trajectory", "last"] = setting(
        "trajectory",
        "take gradients all along an inner attack (released code), or at its end alone "
        "(the paper's Algorithm 1, with independent attacks)",
    )
    weighting: Literal["exponential", "flat", "normalised"] = setting(
        "exponential",
        "weights of the visits: exp(4 (k - K) / K) as the released scripts have it, 1 / K each as "
        "the paper, or exponential ones that sum to 1",
    )
    adversaries: tuple[Adversary, ...] = setting(
        ("restricted", "switch"),
        "inner attacks, drawn with equal chances (name one twice to draw it twice as often): on "
        "restricted rows, retain then restricted ones, both mixed, retain alone; with + between",
    )
    inner_rates: tuple[float, ...] = setting(
        (2e-6, 2e-5, 4e-5),
        "learning rates of inner attacks, drawn with equal chances",
        min_length=1,
    )
    inner_optimizers: tuple[OptimizerName, ...] = setting(
        ("adamw",), "optimisers of inner attacks, drawn with equal chances", min_length=1
    )
    inner_weights: tuple[InnerWeights, ...] = setting(
        ("all",),
        "what inner attacks train, drawn with equal chances: all weights, an adapter, or a slice "
        "of the MLP matrices",
        min_length=1,
    )
    inner_rank: int = setting(16, "rank of an inner attack's adapter", ge=1)
    inner_batch: int = setting(32, "rows of an inner batch", ge=1)
    refresh: int = setting(
        1, "outer updates between two inner attacks; in between, kept ones are replayed", ge=1
    )
    kept: int = setting(4, "attacked points that are kept for replay", ge=1)

    @field_validator(
        "adversaries", "inner_rates", "inner_optimizers", "inner_weights", mode="before"
    )
    @classmethod
    def _listed(cls, value: Any) -> Any:
        """Accept ``a+b`` as the command line has it."""
        return tuple(value.split("+")) if isinstance(value, str) else value


class TarSettings(InnerSettings):
    """Settings of ``tar``; defaults are those of the released scripts."""

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
        "coefficient of the same distance on retain rows in which random tokens stand in place of "
        "prompt tokens: it keeps what no retain row is about (durometer's own; 0 in the paper)",
        ge=0,
    )
    replaced: float = setting(
        0.3, "chance of a prompt token of an anchor row to be replaced", gt=0, le=1
    )
    retain_reference: Literal["auto", "original", "stage_start"] = setting(
        "auto",
        "reference: the subject before any safeguard, or at the start of this stage (always so "
        "with DPO, which compares with it, too); auto: before any safeguard for knowledge, at the "
        "start of this stage for refusals, which the subject does not give before",
    )


# The blocks alone: flattening predictions would move every row of an embedding tied to the head,
# those of entities that no retain row is about among them. Long inner attacks on small batches
# resist better than short ones on large batches at the same cost.
SMALL: dict[str, Any] = {
    "steps": 120,
    "learning_rate": 3e-3,
    "optimizer": "adamw",
    "schedule": "linear",
    "gradient_clip": 1.0,
    "train": "blocks",
    "loss": "entropy",
    "tamper_resistance": 6.0,
    "weighting": "normalised",
    "representation": 5.0,
    "warmup_steps": 5,
    "batch_size": 48,
    "inner_steps": 64,
    "inner_rates": (3e-3, 1e-3, 3e-4),
    "inner_batch": 8,
    "adversaries": ("restricted", "switch", "mix"),
}


class AgainstAttacks(Safeguard[A]):
    """Base of safeguards with terms that are evaluated at ``ATTACKED`` weights."""

    def __init__(self, settings: A) -> None:
        super().__init__(settings)
        self._replay: list[Delta] = []

    def require_fine(self, subject: Subject) -> None:
        """Check that attacks can be replayed on the subject's weights, where that is wanted.

        Raises:
            InputError: the weights are too coarse for it.
        """
        if self.settings.refresh > 1 and subject.dtype != "float32":
            raise InputError(
                f"safeguard '{self.name}': replayed attacks need more than {subject.dtype} "
                "resolves; use --dtype float32, or refresh=1"
            )

    def attacked(self, step: Step) -> Iterator[Visit]:
        """Yield points along new inner attacks, or a kept one in between."""
        if step.number % self.settings.refresh == 0:
            self._replay.clear()
            for number in range(self.settings.tampers):
                yield from self._attack(step, number)
        else:
            yield from self._replayed(step)

    def _attack(self, step: Step, number: int) -> Iterator[Visit]:
        settings = self.settings
        attack = drawn(settings, step.random(f"attack {number}"))
        weights = visit_weights(settings)
        for update in step.attacks.run(attack, step.seed(f"attack seed {number}")):
            weight = weights.get(update.step)
            if weight is None:
                continue
            if settings.refresh > 1:
                self._replay = [*self._replay, step.attacks.delta()][-settings.kept :]
            yield Visit(ATTACKED, weight / settings.tampers)

    def _replayed(self, step: Step) -> Iterator[Visit]:
        """Yield one kept point of the last inner attack, moved along with the weights."""
        generator = step.random("replay")
        delta = self._replay[int(torch.randint(len(self._replay), (), generator=generator))]
        device = step.subject.forward.device
        with perturbed(step.subject, whole_delta(delta, device), host=device.type != "cpu"):
            yield Visit(ATTACKED, sum(visit_weights(self.settings).values()))

    def can_resume(self, step: int) -> bool:
        """Between two inner attacks a resumed run would lack the kept points."""
        return step % self.settings.refresh == 0

    def facts(self) -> dict[str, Any]:
        """Return the configurations that it was trained against."""
        return {"trained_against": [attack.digest for attack in possible(self.settings)]}


@safeguard("tar", aliases=("TAR",))
class Tar(AgainstAttacks[TarSettings]):
    """First a plain safeguard, then training against inner attacks (first-order, straight-through).

    The gradient of the tamper-resistance loss is taken at the attacked weights and applied to the
    clean ones.
    """

    summary = "train against simulated fine-tuning attacks so that restricted content stays away"
    cost = "K + K / stride + 1 passes an outer step: 81 at K = 64"
    source = "arXiv 2408.00761; rishub-tamirisa/tamper-resistance"
    cannot_show = "resistance to attacks that are longer than, or unlike, those it is trained with"
    settings_class = TarSettings
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "faithful": {},
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
            "inner_rates": (3e-4, 1e-3),
            "adversaries": ("restricted", "switch", "mix"),
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
        self._replaceable: list[int] = []

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
        self.require_fine(subject)
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
        """Return the retain rows that anchor rows are made from, step by step."""
        return {ANCHORS: data.pool("retain")} if self.settings.anchor else {}

    def _distance(self, one: Pass) -> torch.Tensor:
        pairs = zip(one.states(), one.reference.states(), strict=True)
        if self.settings.distance == "square":
            return torch.stack([((h - r) ** 2).sum(-1) for h, r in pairs]).mean(0)
        # The library's norm has a gradient of 0 at 0; a square root by hand has none there.
        return torch.stack([torch.linalg.vector_norm(h - r, dim=-1) for h, r in pairs]).mean(0)

    def visits(self, step: Step) -> Iterator[Visit]:
        """Yield points along inner attacks, then the weights themselves."""
        if self.settings.tamper_resistance:
            yield from self.attacked(step)
        if self.settings.anchor:
            self._anchor(step)
            yield Visit(ANCHORS)
        yield Visit()

    def _anchor(self, step: Step) -> None:
        pool = step.units(ANCHORS)
        if not self._replaceable:
            subject, data = step.subject, step.data
            kept, avoided = (
                [row for unit in data.pool(name) for row in unit]
                for name in ("retain", "restricted")
            )
            size = int(subject.model.get_input_embeddings().num_embeddings)
            self._replaceable = replaceable(subject.chat.tokenizer, size, kept, avoided)
        made = anchors(pool, self._replaceable, self.settings.replaced, step.random(ANCHORS))
        step.put(ANCHORS, made)


def resistance(settings: TarSettings) -> Term:
    """Return the tamper-resistance term on held-out restricted rows."""
    if settings.loss == "dpo":
        loss, rows = preference, "held_out_pairs"
        return Term(ATTACKED, settings.tamper_resistance, rows, loss, "batch", ATTACKED, whole=True)
    flatten = settings.loss != "cross_entropy"

    def away(one: Pass) -> torch.Tensor:
        values = one.entropy() if flatten else one.cross_entropy()
        if settings.entropy_floor and float(-values.detach().mean()) < settings.entropy_floor:
            return -values * 0
        return -values

    return Term(
        ATTACKED,
        settings.tamper_resistance,
        "held_out_restricted",
        away,
        at=ATTACKED,
        may_rest=bool(settings.entropy_floor),
    )


def preference(one: Pass) -> torch.Tensor:
    """Return the DPO loss of refusals over answers (arXiv 2305.18290), one value for the pass."""
    now, before = one.row_log_likelihood(), one.reference.row_log_likelihood()
    gain = now - before
    return -functional.logsigmoid(DPO_BETA * (gain[0::2] - gain[1::2])).mean()


def visit_weights(settings: InnerSettings) -> dict[int, float]:
    """Return the weight of the visit after each inner update that has one, counted from 1."""
    total = settings.inner_steps
    if settings.visits == "last":
        return {total: 1.0}
    steps = [k for k in range(1, total + 1) if k % min(settings.stride, total) == 0]
    if settings.weighting == "flat":
        return dict.fromkeys(steps, 1 / total)
    weights = {k: math.exp(4 / total * (k - total)) for k in steps}
    if settings.weighting == "normalised":
        return {k: weight / sum(weights.values()) for k, weight in weights.items()}
    return weights


def drawn(settings: InnerSettings, generator: torch.Generator) -> InnerAttack:
    """Draw one inner attack; the switch comes after Beta(6, 3) of its updates."""

    def one(values: tuple[Any, ...]) -> Any:
        return values[int(torch.randint(len(values), (), generator=generator))]

    # Beta(6, 3) is the sixth smallest of eight uniform numbers.
    switch = float(torch.rand(8, generator=generator).sort().values[5])
    return InnerAttack(
        one(settings.adversaries),
        one(settings.inner_weights),
        one(settings.inner_optimizers),
        one(settings.inner_rates),
        settings.inner_batch,
        settings.inner_steps,
        min(max(switch, 1e-3), 1 - 1e-3),
        settings.inner_rank,
    )


def possible(settings: InnerSettings) -> list[InnerAttack]:
    """Return every inner attack that may be drawn, the switch at its mean."""
    return [
        InnerAttack(
            adversary,
            weights,
            optimizer,
            rate,
            settings.inner_batch,
            settings.inner_steps,
            rank=settings.inner_rank,
        )
        for adversary in dict.fromkeys(settings.adversaries)
        for weights in dict.fromkeys(settings.inner_weights)
        for optimizer in dict.fromkeys(settings.inner_optimizers)
        for rate in dict.fromkeys(settings.inner_rates)
    ]
