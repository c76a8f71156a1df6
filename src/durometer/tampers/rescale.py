"""Re-balancing before fine-tuning: what an attacker does who knows that curvature was inflated."""

from collections.abc import Iterator
from typing import Literal

from torch import nn

from durometer.core.budget import Budget
from durometer.core.errors import NotApplicableError
from durometer.core.rebalance import TOLERANCE, Rebalancer
from durometer.core.seeds import Seeds
from durometer.core.settings import Levels, setting
from durometer.core.training import Update
from durometer.domains.base import Domain
from durometer.subjects.base import Subject
from durometer.tampers.base import OnCheckpoint, Realised, tamper
from durometer.tampers.finetune import FineTuneSettings, FineTuning


class RescaleSettings(FineTuneSettings):
    """Settings of ``rescale``."""

    moves: Literal["all", "up_down", "value_output", "norm_gains"] = setting(
        "all",
        "what is re-balanced first: every pair found, or one kind that must be in every block",
        search=Levels(("all", "up_down", "value_output", "norm_gains")),
    )


@tamper("rescale", aliases=("refactor",))
class Rescale(FineTuning[RescaleSettings]):
    """Balance neighbouring weights without changing the function, then train all weights.

    Against safeguards that inflate singular values of some maps and make up for it in a neighbour:
    the same function with so high a curvature that only tiny learning rates are stable.
    """

    summary = "re-balance neighbouring weights (same function), then full fine-tuning"
    cost = "6 N T and one SVD a group of heads"
    source = "arXiv 2602.18868 (the limit result); the moves are durometer's own"
    cannot_show = "durability against an attacker who re-factors in other ways"
    settings_class = RescaleSettings
    full = True

    def run(
        self,
        subject: Subject,
        data: Domain,
        budget: Budget,
        seeds: Seeds,
        on_checkpoint: OnCheckpoint,
    ) -> Realised:
        """Re-balance, then fine-tune along the budget's rungs; see ``Tamper.run``."""
        self._facts: dict[str, object] = {}
        realised = super().run(subject, data, budget, seeds, on_checkpoint)
        realised.facts |= self._facts
        return realised

    def steps(
        self, subject: Subject, data: Domain, budget: Budget, seeds: Seeds
    ) -> Iterator[Update]:
        """Yield after each update; a budget of none leaves the weights as they are."""
        if budget.steps:
            yield from super().steps(subject, data, budget, seeds)

    def prepare(self, subject: Subject, seeds: Seeds) -> list[nn.Parameter]:
        """Re-balance the subject, check that it computes the same, and return all weights.

        Raises:
            NotApplicableError: no move was found, or the logits are not what they were.
        """
        names = [name for name, _ in subject.model.named_parameters()]
        parameters = subject.restoration.writable(names)
        self._facts = self._rebalance(subject)
        for parameter in parameters:
            parameter.requires_grad_(True)
        return parameters

    def _rebalance(self, subject: Subject) -> dict[str, object]:
        rebalancer = Rebalancer(subject.model, subject.restoration)
        moves = {
            "up_down": rebalancer.up_down,
            "value_output": rebalancer.value_output,
            "norm_gains": rebalancer.norm_gains,
        }
        wanted = self.settings.moves
        before = rebalancer.logits()
        done = {name: move() for name, move in moves.items() if wanted in ("all", name)}
        if not any(done.values()):
            raise NotApplicableError(f"no pair of neighbouring weights found for moves={wanted}")
        if wanted != "all" and done[wanted] < rebalancer.blocks:
            raise NotApplicableError(
                f"{wanted} was found {done[wanted]} times in {rebalancer.blocks} blocks"
            )
        change = float((rebalancer.logits() - before).abs().max() / before.abs().max())
        if not change <= TOLERANCE.get(rebalancer.dtype, 0.1):
            raise NotApplicableError(
                f"re-balancing changed the logits by {change:.1e} of the largest ({done})"
            )
        return {"moves": done, "blocks": rebalancer.blocks, "logits_changed": change}
