"""A lock of the optimiser: the same function, written so that it can hardly be trained."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import torch

from durometer.core.edits import Restoration
from durometer.core.errors import NotApplicableError
from durometer.core.rebalance import TOLERANCE, Pair, Rebalancer
from durometer.core.settings import Settings, setting
from durometer.domains.base import Domain
from durometer.safeguards.base import Safeguard, make_safeguard, safeguard
from durometer.safeguards.bench import Bench
from durometer.safeguards.data import DefenceData
from durometer.subjects.base import Subject


class InflateSettings(Settings):
    """Settings of ``inflate``."""

    stage1: Literal["auto", "random_mapping", "refusal", "none"] = setting(
        "auto", "plain safeguard that is locked; auto: that of the domain's kind"
    )
    stage1_preset: str = setting("", "preset of the first stage")
    # A power of two is exact in every floating-point format.
    alpha: float = setting(1024.0, "factor of the scaled singular values", gt=1)
    share: float = setting(
        0.5,
        "share of the singular values of each value head, and of the rows of each up map, that "
        "are scaled: the largest",
        gt=0,
        le=1,
    )
    targets: Literal["all", "up_down", "value_output"] = setting(
        "all",
        "pairs of maps: value and output of every group of heads, up and down of every block "
        "(through a gate only whole rows can be scaled), or both",
    )


@safeguard("inflate", aliases=("spectral_deformation", "spec_def"))
class Inflate(Safeguard[InflateSettings]):
    """Scale singular values of one map by alpha and undo it in the map behind it.

    The function is the same; gradients with respect to the second map grow by alpha, and the
    largest stable learning rate of plain gradient descent falls with its square. The negative
    control of a suite: who re-balances neighbouring weights first (``rescale``) undoes it, and so
    does a search over learning rates.
    """

    summary = "negative control: inflate singular values and undo it in the next map"
    cost = "0 passes; one SVD a group of heads"
    source = "arXiv 2602.18868 (SpecDef; no code was released)"
    cannot_show = (
        "durability: it slows an optimiser that does not look; where it counts as durable, no "
        "adaptive attack was run"
    )
    settings_class = InflateSettings
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"tiny": {}}

    def __init__(self, settings: InflateSettings) -> None:
        super().__init__(settings)
        self._facts: dict[str, Any] = {}

    def stages(self, domain: Domain) -> list[Safeguard[Any]]:
        """Return the plain safeguard, and the lock on it."""
        first: str = self.settings.stage1
        if first == "none":
            return [self]
        if first == "auto":
            first = "random_mapping" if domain.kind == "knowledge" else "refusal"
        return [make_safeguard(first, self.settings.stage1_preset), self]

    def require(self, subject: Subject, data: DefenceData) -> None:
        """Look for pairs of neighbouring maps.

        Raises:
            NotApplicableError: there are none.
        """
        maps = Rebalancer(subject.model, Restoration(subject.model))
        if not any(pairs for _, pairs in self._pairs(maps)):
            raise self._nothing()

    @torch.no_grad()
    def edit(self, bench: Bench) -> None:
        """Inflate every pair found, and check that the model computes what it did.

        Raises:
            NotApplicableError: no pair was found, or the logits are not what they were; then the
                weights are.
        """
        restoration = Restoration(bench.subject.model)
        maps = Rebalancer(bench.subject.model, restoration)
        before = maps.logits()
        done = self._inflated(maps)
        if not any(done.values()):
            raise self._nothing()
        change = float((maps.logits() - before).abs().max() / before.abs().max())
        if not change <= TOLERANCE.get(maps.dtype, 0.1):
            restoration.restore()
            raise NotApplicableError(
                f"inflating changed the logits by {change:.1e} of the largest ({done})"
            )
        self._facts = {"pairs": done, "blocks": maps.blocks, "logits_changed": change}

    def _inflated(self, maps: Rebalancer) -> dict[str, int]:
        """Inflate every pair, and return how many of each kind there were."""
        done = {"value_output": 0, "up_down": 0}
        for name, pairs in self._pairs(maps):
            for pair in pairs:
                self._heads(maps, pair) if name == "value_output" else self._rows(maps, pair)
            done[name] += len(pairs)
        return done

    def _pairs(self, maps: Rebalancer) -> Iterator[tuple[str, list[Pair]]]:
        """Yield the pairs of each block, with the name of their kind."""
        for name, attention in (("value_output", True), ("up_down", False)):
            if self.settings.targets in ("all", name):
                for pairs in maps.pairs(attention=attention):
                    yield name, pairs

    def _nothing(self) -> NotApplicableError:
        return NotApplicableError(
            f"no pair of neighbouring maps found for targets={self.settings.targets}"
        )

    def facts(self) -> dict[str, Any]:
        """Return how many pairs were inflated, and by how much the logits changed."""
        return self._facts

    def _factors(self, sizes: torch.Tensor) -> torch.Tensor:
        """Return alpha for the largest entries and 1 for the others, in fp64."""
        count = max(round(self.settings.share * len(sizes)), 1)
        factors = torch.ones_like(sizes, dtype=torch.float64)
        factors[sizes.argsort(descending=True)[:count]] = self.settings.alpha
        return factors

    def _rows(self, maps: Rebalancer, pair: Pair) -> None:
        """Scale rows of the first map, and the columns of the second that they reach."""
        first, rows, second = pair.first, pair.rows, pair.second
        biases = [] if first.bias is None else [first.bias]
        maps.announce([first.weight, second.weight, *biases])
        factors = self._factors(first.weight[rows].double().norm(dim=1))
        first.weight[rows] = (first.weight[rows].double() * factors[:, None]).to(maps.dtype)
        for bias in biases:
            bias[rows] = (bias[rows].double() * factors).to(maps.dtype)
        second.weight.copy_((second.weight.double() / factors).to(maps.dtype))

    def _heads(self, maps: Rebalancer, pair: Pair) -> None:
        """Turn every value head to its singular directions, and scale the first of them.

        Of ``W_v = U S V^T`` and ``W_o`` it makes ``D S V^T`` and ``W_o U D^-1``: a row a singular
        value, so that rounding is relative to each.
        """
        first, second = pair.first, pair.second
        biases = [] if first.bias is None else [first.bias]
        maps.announce([first.weight, second.weight, *biases])
        for rows, columns in maps.head_groups(pair):
            values = first.weight[rows].double()
            left, sizes, _ = torch.linalg.svd(values, full_matrices=False)
            factors = self._factors(sizes)
            turn = factors[:, None] * left.T
            first.weight[rows] = (turn @ values).to(maps.dtype)
            for bias in biases:
                bias[rows] = (turn @ bias[rows].double()).to(maps.dtype)
            stacked = second.weight[:, columns].double().unflatten(1, (-1, len(rows)))
            back = (stacked @ left) / factors
            second.weight[:, columns] = back.flatten(1).to(maps.dtype)
