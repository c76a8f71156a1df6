"""What safeguards share that train against inner attacks: settings, attacked points and replays."""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar

import torch
from pydantic import field_validator

from durometer.core.errors import InputError
from durometer.core.optimizers import OptimizerName
from durometer.core.settings import setting
from durometer.safeguards.attacks import (
    Adversary,
    Delta,
    InnerAttack,
    InnerWeights,
    whole_delta,
)
from durometer.safeguards.banks import perturbed
from durometer.safeguards.base import Safeguard, TrainingSettings, Visit
from durometer.safeguards.train import Step
from durometer.subjects.base import Subject

ATTACKED = "attacked"
BETA_MEAN = 2 / 3
Card = tuple[Adversary, InnerWeights, str, float]
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
    draws: Literal["independent", "dealt"] = setting(
        "independent",
        "how inner attacks are drawn: each by itself, or dealt like cards, so that every "
        "combination of adversary, rate, optimiser and weights comes equally often in every seed",
    )
    inner_rank: int = setting(16, "rank of an inner attack's adapter", ge=1)
    inner_batch: int = setting(32, "rows of an inner batch", ge=1)
    inner_weight_decay: float = setting(0.0, "decoupled weight decay of inner attacks", ge=0)
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


class OneLossSettings(InnerSettings):
    """Settings of safeguards whose restricted loss is taken under attack alone."""

    rows: Literal["restricted", "held_out_restricted"] = setting(
        "restricted", "restricted rows of the outer loss: all, or those no inner attack trains on"
    )
    inner_steps: int = setting(16, "updates of an inner attack (K)", ge=1)
    weighting: Literal["exponential", "flat", "normalised"] = setting(
        "normalised",
        "weights of the visits: exp(4 (k - K) / K), 1 / K each, or exponential ones that sum to 1",
    )
    adversaries: tuple[Adversary, ...] = setting(
        ("restricted",),
        "inner attacks, drawn with equal chances: on restricted rows, retain then restricted ones, "
        "both mixed, retain alone; with + between",
    )


class AgainstAttacks(Safeguard[A]):
    """Base of safeguards with terms that are evaluated at ``ATTACKED`` weights."""

    def __init__(self, settings: A) -> None:
        super().__init__(settings)
        self._replay: list[Delta] = []

    def require_fit(self, subject: Subject) -> None:
        """Check that the attacks can be made and replayed on the subject's weights.

        Raises:
            InputError: they cannot, with what to set instead.
        """
        if self.settings.train == "adapter" and "adapter" in self.settings.inner_weights:
            raise InputError(
                f"safeguard '{self.name}': with train=adapter an attacker's adapter would sit on "
                "that of the safeguard; use inner_weights=slice or inner_weights=all"
            )
        if self.settings.refresh > 1 and subject.dtype != "float32":
            raise InputError(
                f"safeguard '{self.name}': replayed attacks need more than {subject.dtype} "
                "resolves; use --dtype float32, or refresh=1"
            )

    def attacked(self, step: Step) -> Iterator[Visit]:
        """Yield points along new inner attacks, or a kept one in between."""
        # Nothing is kept where an attack diverged before its first point: then one is made anew.
        if self.turn(step.number) % self.settings.refresh == 0 or not self._replayable():
            self._replay.clear()
            for number in range(self.settings.tampers):
                yield from self._attack(step, number)
        else:
            yield from self._replayed(step)

    def _attack(self, step: Step, number: int) -> Iterator[Visit]:
        settings = self.settings
        attack = self._drawn(step, number)
        weights = visit_weights(settings)
        for update in step.attacks.run(attack, step.seed(f"attack seed {number}")):
            weight = weights.get(update.step)
            if weight is None:
                continue
            if settings.refresh > 1:
                self._replay = [*self._replay, step.attacks.delta()][-settings.kept :]
            yield Visit(ATTACKED, weight / settings.tampers)

    def _drawn(self, step: Step, number: int) -> InnerAttack:
        settings, generator = self.settings, step.random(f"attack {number}")
        if settings.draws == "independent":
            return drawn(settings, generator)
        turn = self.turn(step.number) // settings.refresh * settings.tampers + number
        card = dealt(settings, turn, lambda deal: step.seed("deal", deal))
        return made(settings, card, switch_point(generator))

    def _replayed(self, step: Step) -> Iterator[Visit]:
        """Yield one kept point of the last inner attack, moved along with the weights."""
        generator = step.random("replay")
        delta = self._replay[int(torch.randint(len(self._replay), (), generator=generator))]
        device = step.subject.forward.device
        with perturbed(step.subject, whole_delta(delta, device)):
            yield Visit(ATTACKED, sum(visit_weights(self.settings).values()))

    def _replayable(self) -> bool:
        return self.settings.refresh == 1 or bool(self._replay)

    def turn(self, number: int) -> int:
        """Return how many updates against attacks come before update ``number``, from 0."""
        return number

    def can_resume(self, step: int) -> bool:
        """Between two inner attacks a resumed run would lack the kept points."""
        return self.turn(step) % self.settings.refresh == 0

    def trained_against(self) -> list[str]:
        """Return the digests of all attacks that may be drawn."""
        return [attack.digest for attack in possible(self.settings)]

    def facts(self) -> dict[str, Any]:
        """Return the configurations that it was trained against."""
        return {"trained_against": self.trained_against()}


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
    switch = switch_point(generator)
    parts = (
        values[int(torch.randint(len(values), (), generator=generator))]
        for values in _choices(settings)
    )
    return made(settings, tuple(parts), switch)


def switch_point(generator: torch.Generator) -> float:
    """Return a share of an attack's updates, from Beta(6, 3)."""
    # Beta(6, 3) is the sixth smallest of eight uniform numbers.
    drawn_share = float(torch.rand(8, generator=generator).sort().values[5])
    return min(max(drawn_share, 1e-3), 1 - 1e-3)


def combinations(settings: InnerSettings) -> list[Card]:
    """Return every combination that may be drawn, as often as its values are named."""
    return list(itertools.product(*_choices(settings)))


def dealt(settings: InnerSettings, turn: int, seed: Callable[[int], int]) -> Card:
    """Return the combination of a turn, from 0: each comes once before any comes again.

    Args:
        seed: of the order of each deal.
    """
    cards = combinations(settings)
    deal, place = divmod(turn, len(cards))
    order = torch.Generator().manual_seed(seed(deal))
    return cards[int(torch.randperm(len(cards), generator=order)[place])]


def possible(settings: InnerSettings) -> list[InnerAttack]:
    """Return every inner attack that may be drawn, once, the switch at its mean."""
    return [made(settings, card) for card in dict.fromkeys(combinations(settings))]


def made(settings: InnerSettings, card: Card, switch: float = BETA_MEAN) -> InnerAttack:
    """Return the inner attack of an adversary, weights, an optimiser and a rate."""
    adversary, weights, optimizer, rate = card
    return InnerAttack(
        adversary,
        weights,
        optimizer,
        rate,
        settings.inner_batch,
        settings.inner_steps,
        switch,
        settings.inner_rank,
        settings.inner_weight_decay,
    )


def _choices(settings: InnerSettings) -> tuple[tuple[Any, ...], ...]:
    return (
        settings.adversaries,
        settings.inner_weights,
        settings.inner_optimizers,
        settings.inner_rates,
    )
