"""The trained models that the known-answer set is derived from, trained in memory from seeds."""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal
from unittest import mock

import numpy as np
import torch
from torch import nn

from durometer.core.adapters import Adapter, linear_maps
from durometer.core.budget import Spent
from durometer.core.cache import cached_folder
from durometer.core.rows import Row
from durometer.core.seeds import Seeds
from durometer.core.training import OptimisationPlan, Trainer
from durometer.core.writers import orthonormal, writers
from durometer.domains import capitals, world  # noqa: F401  (they register themselves)
from durometer.domains.base import Domain
from durometer.domains.load import load_domain
from durometer.safeguards.refusal import refusal_rows
from durometer.subjects import micro
from durometer.subjects.base import Subject
from durometer.subjects.load import load_subject
from durometer.tampers.data import Relation, make_rows, shuffled_batches, training_items
from durometer.tampers.directions import DirectionSearch, DirectionSettings, NothingFoundError

State = dict[str, np.ndarray[Any, np.dtype[np.float32]]]
SECOND_SEED = 7


@dataclass(frozen=True)
class Recipe:
    """How one parent is trained from its family's base.

    Attributes:
        data: ``safeguard`` (refusals and harmless rows), ``sft`` (answers), ``retain``.
        rank: of the merged adapter; 0 trains all weights.
    """

    name: str
    data: Literal["safeguard", "sft", "retain"]
    rank: int
    steps: int
    rate: float
    seed: int
    batch: int = 16


@dataclass(frozen=True)
class Family:
    """A base and the parents trained from it.

    Attributes:
        half: whether its variants set thresholds or test them.
    """

    name: str
    half: Literal["calibration", "held out"]
    domain: str
    parents: tuple[Recipe, ...]


FAMILIES = (
    Family(
        "micro-a",
        "calibration",
        "world",
        (
            Recipe("safeguard-1", "safeguard", 16, 120, 3e-3, 1),
            Recipe("safeguard-dense", "safeguard", 0, 60, 3e-4, 2),
            Recipe("sft-1", "sft", 0, 48, 3e-4, 3),
            Recipe("lora-4", "sft", 4, 48, 3e-3, 4),
            Recipe("lora-64", "sft", 64, 48, 3e-3, 5),
        ),
    ),
    Family(
        "micro-b",
        "held out",
        "world",
        (
            Recipe("safeguard-2", "safeguard", 16, 120, 3e-3, 11),
            Recipe("safeguard-dense", "safeguard", 0, 60, 3e-4, 12),
            Recipe("sft-2", "sft", 0, 48, 3e-4, 13),
            Recipe("lora-1", "sft", 1, 48, 3e-3, 14),
            Recipe("lora-16", "retain", 16, 48, 3e-3, 15),
        ),
    ),
    Family(
        "smollm2",
        "held out",
        "capitals",
        (
            Recipe("safeguard-1", "safeguard", 16, 40, 1e-3, 21, 8),
            Recipe("sft-1", "sft", 0, 8, 2e-5, 22, 8),
        ),
    ),
)


class Workshop:
    """One family's model in memory: loads states into it, trains, and hands states out."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.domain: Domain = load_domain(family.domain)
        self.subject: Subject = load_subject(_spec(family.name), dtype="float32")
        self.base = self.state()

    @property
    def model(self) -> Any:
        """The model, in whatever state it was last put."""
        return self.subject.model

    def state(self) -> State:
        """Return a copy of all weights, tied ones once, fp32."""
        return {n: p.detach().float().numpy().copy() for n, p in self.model.named_parameters()}

    @torch.no_grad()
    def load(self, state: State) -> None:
        """Put the model into ``state``."""
        for name, parameter in self.model.named_parameters():
            parameter.copy_(torch.from_numpy(state[name]))

    def train(self, start: State, recipe: Recipe) -> State:
        """Return ``start`` trained by ``recipe``."""
        self.load(start)
        seeds = Seeds.derive(recipe.seed)
        rows, replay = self._rows(recipe, seeds)
        adapter = self._adapter(recipe, seeds) if recipe.rank else None
        parameters: list[nn.Parameter] = (
            adapter.trainable() if adapter else list(self.model.parameters())
        )
        for parameter in parameters:
            parameter.requires_grad_(True)
        plan = OptimisationPlan("adamw", recipe.rate, recipe.steps, "linear", recipe.steps // 10)
        trainer = Trainer(self.subject.forward, parameters, plan)
        share = 0.5 if replay else 0.0
        batches = shuffled_batches(rows, replay, recipe.batch, share, seeds)
        for batch in itertools.islice(batches, recipe.steps):
            trainer.update(batch)
        if adapter is not None:
            adapter.merge()
        self.model.requires_grad_(False).eval()
        return self.state()

    def _adapter(self, recipe: Recipe, seeds: Seeds) -> Adapter:
        names = linear_maps(self.model, "all")
        alpha = 2.0 * recipe.rank
        return Adapter(self.model, names, rank=recipe.rank, alpha=alpha, seed=seeds.initialisation)

    def _rows(self, recipe: Recipe, seeds: Seeds) -> tuple[Sequence[Row], Sequence[Row]]:
        if recipe.data == "safeguard":
            return refusal_rows(self.subject, self.domain)
        relation: Relation = "disjoint" if recipe.data == "sft" else "retain"
        items = training_items(self.domain, relation, 256, seeds)
        return make_rows(items, self.subject.chat, label_prompt=False, max_length=512), []

    def direction(self, state: State, seed: int) -> tuple[np.ndarray[Any, Any], str]:
        """Return the direction that undoes refusals best, or a random one, and which it is."""
        self.load(state)
        settings = DirectionSettings(kl_bound=1e9, induce_bound=-1e9, layer_stride=1)
        try:
            search = DirectionSearch(self.subject, settings, writers(self.model), Spent())
            found = search.run(self.domain, Seeds.derive(seed)).basis
            return found[:, 0].numpy(), "found"
        except NothingFoundError:
            generator = torch.Generator().manual_seed(seed)
            width = self.model.config.hidden_size
            return orthonormal(torch.randn(width, generator=generator))[:, 0].numpy(), "random"


def _spec(family: str) -> str:
    if family == "micro-b":
        return str(cached_folder("micro-study", str(SECOND_SEED), _second_micro))
    return family.removesuffix("-a")


def _second_micro(folder: Any) -> None:
    """Train another ``micro`` with other seeds."""
    made = functools.partial(micro.make_model, SECOND_SEED)
    with (
        mock.patch.object(micro, "make_model", made),
        mock.patch.object(micro, "SEED", SECOND_SEED),
    ):
        micro.train_micro(folder)
