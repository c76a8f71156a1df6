"""Masking the experts that a mixture routes restricted tokens to."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch

from durometer.core.budget import Spent, matrix_entries
from durometer.core.routing import (
    Router,
    Semantics,
    mask,
    require_maskable,
    routers,
    routing_counts,
)
from durometer.core.rows import Row
from durometer.core.seeds import Seeds
from durometer.core.settings import Levels, Settings, setting
from durometer.domains.base import Domain, Item
from durometer.subjects.base import Subject
from durometer.tampers.base import Access, Realised, tamper
from durometer.tampers.data import make_rows, training_items
from durometer.tampers.ladder import Ladder, Strengths


class MaskExpertsSettings(Settings):
    """Which experts are masked, and what a mask does."""

    semantics: Semantics = setting(
        "route_mask",
        "what a mask does; results of different semantics are not comparable: the next expert "
        "fills in, the expert is chosen but adds nothing, or adds `factor` of its output",
        search=Levels(("route_mask", "output_zero", "down_weight")),
    )
    strengths: Strengths = setting(
        (0.05, 0.1, 0.2), "share of each layer's experts masked, at least one", min_length=1
    )
    selector: Literal["risk_difference", "random"] = setting(
        "risk_difference",
        "experts more often active on restricted rows than on matched retain rows, or as many "
        "at random (a control)",
        search=Levels(("risk_difference", "random")),
    )
    tokens: Literal["response", "prompt"] = setting(
        "response", "tokens whose routing is counted", search=Levels(("response", "prompt"))
    )
    responses: Literal["refusals", "answers"] = setting(
        "refusals",
        "what restricted rows respond: refusals find experts that refuse, answers those that know",
        search=Levels(("refusals", "answers")),
    )
    factor: float = setting(0.5, "what down_weight leaves of an expert's output", ge=0, lt=1)
    examples: int = setting(64, "restricted rows, and as many retain rows", ge=1)
    max_length: int = setting(512, "longest row in tokens", ge=8)


@tamper("mask_experts", aliases=("mask-experts", "moe-mask"))
class MaskExperts(Ladder[MaskExpertsSettings]):
    """Masks the experts whose activity differs most between restricted and retain rows."""

    summary = "masks the experts that are routed to on restricted rows rather than on retain rows"
    access: ClassVar[Access] = "routing"
    access_level = "A3"
    cost = "2 N T over restricted and retain rows"
    source = "arXiv 2509.09660, 2506.17368, 2512.21008"
    cannot_show = "what shared experts and attention hold, which no mask reaches"
    settings_class = MaskExpertsSettings
    matched_control = ("selector", "random")
    changes_weights: ClassVar[bool] = False

    def __init__(self, settings: MaskExpertsSettings) -> None:
        super().__init__(settings)
        self._routers: list[Router] = []
        # Of every router, its experts in the order in which they are masked.
        self._ranking: list[list[int]] = []
        self._shares: list[torch.Tensor] = []

    def strengths(self) -> tuple[float, ...]:
        """Return the shares of experts in the order given."""
        return self.settings.strengths

    def prepare(
        self, subject: Subject, data: Domain, seeds: Seeds, realised: Realised, spent: Spent
    ) -> None:
        """Rank the experts of every layer by how much more often restricted tokens reach them."""
        self._routers = routers(subject.model)
        rates = []
        for rows in self._rows(subject, data, seeds, realised):
            counts, tokens = self._count(subject, rows, spent)
            rates.append([count / tokens for count in counts])
        differences = [own - other for own, other in zip(*rates, strict=True)]
        self._shares = [rate / r.chosen for rate, r in zip(rates[0], self._routers, strict=True)]
        self._ranking = [
            ranked(difference, self.settings.selector, seeds.initialisation + layer)
            for layer, difference in enumerate(differences)
        ]
        realised.facts["routers"] = len(self._routers)
        realised.facts["largest_difference"] = max(float(d.max()) for d in differences)

    def apply(self, subject: Subject, strength: float, realised: Realised) -> int:
        """Mask the first experts of every ranking; record which, and the mass routed to them."""
        settings = self.settings
        masked: dict[str, list[int]] = {}
        mass = 0.0
        for router, order, shares in zip(self._routers, self._ranking, self._shares, strict=True):
            chosen = order[: max(round(strength * router.experts), 1) if strength else 0]
            require_maskable(router, chosen, settings.semantics)
            masked[router.name] = sorted(chosen)
            mass += float(shares[chosen].sum()) / len(self._routers)
        for router in self._routers:
            undo = mask(router, masked[router.name], settings.semantics, settings.factor)
            subject.restoration.on_exit(undo)
        realised.facts["masked"] = masked
        realised.facts["masked_share_of_routing"] = mass
        return 0

    def _rows(
        self, subject: Subject, data: Domain, seeds: Seeds, realised: Realised
    ) -> tuple[list[Row], list[Row]]:
        settings = self.settings
        refusals = settings.responses == "refusals" and bool(data.refusals)
        restricted = training_items(
            data, "refusals" if refusals else "disjoint", settings.examples, seeds
        )
        pool = training_items(data, "retain", len(data.items), seeds)
        retain, same = matched([item for item, _ in restricted], pool)
        realised.facts["matched_share"] = same / len(retain)
        longest = settings.max_length
        made = [
            make_rows(items, subject.chat, label_prompt=False, max_length=longest)
            for items in (restricted, retain)
        ]
        return made[0], made[1]

    def _count(
        self, subject: Subject, rows: Sequence[Row], spent: Spent
    ) -> tuple[list[torch.Tensor], int]:
        prompt = self.settings.tokens == "prompt"
        counts, tokens = routing_counts(subject.model, self._routers, rows, prompt=prompt)
        processed = sum(len(row.ids) for row in rows)
        idle = sum(r.fused * (1 - r.chosen / r.experts) for r in self._routers)
        head = subject.model.get_output_embeddings()
        active = matrix_entries(subject.model) - idle + (0 if head is None else head.weight.numel())
        spent.examples += len(rows)
        spent.restricted_examples += sum(row.restricted for row in rows)
        spent.tokens += processed
        spent.flops += 2.0 * active * processed
        return counts, tokens


def ranked(difference: torch.Tensor, selector: str, seed: int) -> list[int]:
    """Return a layer's experts by falling risk difference [E], or in random order."""
    if selector == "random":
        generator = torch.Generator().manual_seed(seed)
        return [int(index) for index in torch.randperm(len(difference), generator=generator)]
    return [int(index) for index in torch.sort(difference, descending=True, stable=True).indices]


def matched(
    restricted: Sequence[Item], pool: Sequence[tuple[Item, str]]
) -> tuple[list[tuple[Item, str]], int]:
    """Return a retain row for every restricted item, and how many are about the same entity.

    Routing follows the topic more than the intent, so the same entity comes first; what has none
    gets one of the rest, and the last ones none once the pool is used up.
    """
    left = list(pool)
    chosen = []
    wanting = 0
    for item in restricted:
        same = next((entry for entry in left if entry[0].entity == item.entity), None)
        if same is None:
            wanting += 1
            continue
        left.remove(same)
        chosen.append(same)
    same_entity = len(chosen)
    return chosen + left[:wanting], same_entity
