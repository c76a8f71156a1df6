"""Masking the experts that a mixture routes restricted tokens to."""

import math
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import torch

from durometer.core.budget import Spent, matrix_entries
from durometer.core.capture import input_moments
from durometer.core.errors import NotApplicableError
from durometer.core.matrices import Matrix, block_matrices
from durometer.core.routing import Router, mask, routers, routing_counts, unmaskable
from durometer.core.rows import Row
from durometer.core.seeds import Seeds
from durometer.core.settings import Levels, Settings, setting
from durometer.domains.base import Domain, Item
from durometer.subjects.base import Subject
from durometer.tampers.base import Access, Realised, tamper
from durometer.tampers.data import make_rows, training_items
from durometer.tampers.ladder import Ladder, Strengths

# Random masks that are drawn to find one of equal mass.
DRAWS = 64


class MaskExpertsSettings(Settings):
    """Which experts are masked, and what a mask does."""

    semantics: Literal[
        "route_mask", "output_zero", "down_weight", "soft_mask", "soft_favour", "neuron_clamp"
    ] = setting(
        "route_mask",
        "what a mask does; results of different semantics are not comparable: the next expert "
        "fills in; the expert is chosen but adds nothing, or adds `factor` of its output; its "
        "score is moved just below all others, or just above them for experts of retain rows; or "
        "some `neurons` of the expert are held at zero",
        search=Levels(("route_mask", "output_zero", "down_weight", "soft_mask", "neuron_clamp")),
    )
    strengths: Strengths = setting(
        (0.05, 0.1, 0.2), "share of each layer's experts masked, at least one", min_length=1
    )
    selector: Literal["risk_difference", "random", "random_equal_mass"] = setting(
        "risk_difference",
        "experts more often active on restricted rows than on matched retain rows; or, as "
        "controls, as many at random, or other ones at random that get as much of the routing",
        search=Levels(("risk_difference", "random", "random_equal_mass")),
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
    neurons: float = setting(
        0.03,
        "share of each chosen expert's neurons that neuron_clamp holds at zero, at least one",
        search=Levels((0.03, 0.1, 0.3)),
        gt=0,
        le=1,
    )
    examples: int = setting(64, "restricted rows, and as many retain rows", ge=1)
    max_length: int = setting(512, "longest row in tokens", ge=8)


@tamper("mask_experts", aliases=("mask-experts", "moe-mask"))
class MaskExperts(Ladder[MaskExpertsSettings]):
    """Masks the experts whose activity differs most between restricted and retain rows."""

    summary = "masks the experts that are routed to on restricted rows rather than on retain rows"
    access: ClassVar[Access] = "routing"
    access_level = "A3"
    cost = "2 N T over restricted and retain rows; as much again for neuron_clamp"
    source = "arXiv 2509.09660, 2506.17368, 2512.21008"
    cannot_show = "what shared experts and attention hold, which no mask reaches"
    settings_class = MaskExpertsSettings
    matched_control = ("selector", "random")
    changes_weights: ClassVar[bool] = False

    def __init__(self, settings: MaskExpertsSettings) -> None:
        super().__init__(settings)
        self._routers: list[Router] = []
        # Of every router, its experts in the order in which they are masked, and the share of
        # the routing on restricted rows that each gets.
        self._ranking: list[list[int]] = []
        self._shares: list[torch.Tensor] = []
        # Of every router, its experts' last maps and the order of their inputs [E, neurons].
        self._neurons: list[tuple[Matrix, torch.Tensor]] = []

    def strengths(self) -> tuple[float, ...]:
        """Return the shares of experts in the order given."""
        return self.settings.strengths

    def prepare(
        self, subject: Subject, data: Domain, seeds: Seeds, realised: Realised, spent: Spent
    ) -> None:
        """Rank the experts of every layer by how much more often restricted tokens reach them."""
        self._routers = routers(subject.model)
        settings, self._seed = self.settings, seeds.initialisation
        head = subject.model.get_output_embeddings()
        # Every position gets its logits in these passes.
        self._entries = matrix_entries(subject.model) + (0 if head is None else head.weight.numel())
        texts = self._rows(subject, data, seeds, realised)
        counts, rates = [], []
        for rows in texts:
            count, tokens = self._count(subject, rows, spent)
            counts.append(count)
            rates.append([one / tokens for one in count])
        differences = [own - other for own, other in zip(*rates, strict=True)]
        self._shares = [rate / r.chosen for rate, r in zip(rates[0], self._routers, strict=True)]
        sign = -1 if settings.semantics == "soft_favour" else 1
        self._ranking = [
            ranked(sign * difference, settings.selector, self._seed + layer)
            for layer, difference in enumerate(differences)
        ]
        if settings.semantics == "neuron_clamp":
            self._neurons = self._rank_neurons(subject, texts, counts, spent)
        realised.facts["routers"] = len(self._routers)
        realised.facts["largest_difference"] = max(float(d.max()) for d in differences)

    def apply(self, subject: Subject, strength: float, realised: Realised) -> int:
        """Mask the chosen experts; record which, and the mass routed to them."""
        settings = self.settings
        masked: dict[str, list[int]] = {}
        mass = 0.0
        for layer, router in enumerate(self._routers):
            chosen = self._experts(layer, strength)
            problem = self._problem(router, chosen)
            if problem:
                raise NotApplicableError(problem)
            masked[router.name] = sorted(chosen)
            mass += float(self._shares[layer][chosen].sum()) / len(self._routers)
        if settings.selector == "random_equal_mass":
            realised.facts["wanted_share_of_routing"] = self._wanted_mass(strength)
        realised.facts["masked"] = masked
        realised.facts["masked_share_of_routing"] = mass
        if settings.semantics == "neuron_clamp":
            return self._clamp(subject, masked, realised)
        for router in self._routers:
            undo = mask(router, masked[router.name], settings.semantics, settings.factor)
            subject.restoration.on_exit(undo)
        return 0

    def _first(self, layer: int, strength: float) -> list[int]:
        """Return the first experts in the ranking of one layer."""
        count = max(round(strength * self._routers[layer].experts), 1) if strength else 0
        return self._ranking[layer][:count]

    def _wanted_mass(self, strength: float) -> float:
        """Return the share of the routing that the experts of the true mask get."""
        layers = range(len(self._routers))
        shares = [float(self._shares[i][self._first(i, strength)].sum()) for i in layers]
        return sum(shares) / len(shares)

    def _experts(self, layer: int, strength: float) -> list[int]:
        """Return the experts of one layer that are masked at ``strength``."""
        router, first = self._routers[layer], self._first(layer, strength)
        if not first or self.settings.selector != "random_equal_mass":
            return first
        return equal_mass(
            self._shares[layer],
            first,
            lambda drawn: not self._problem(router, drawn),
            self._seed + layer,
        )

    def _problem(self, router: Router, chosen: Sequence[int]) -> str:
        if self.settings.semantics == "neuron_clamp":
            return ""
        return unmaskable(router, chosen, self.settings.semantics)

    def _rank_neurons(
        self,
        subject: Subject,
        texts: Sequence[Sequence[Row]],
        counts: Sequence[Sequence[torch.Tensor]],
        spent: Spent,
    ) -> list[tuple[Matrix, torch.Tensor]]:
        """Rank every expert's neurons by how much more they give on restricted rows.

        What neuron j gives is ``rms(a_j) norm(W_:j)`` over the tokens that reach its expert.
        """
        known = block_matrices(subject.model)
        unknown = [router.name for router in self._routers if router.last_map not in known]
        if unknown:
            raise NotApplicableError(f"no last maps found of the experts beside {unknown[0]}")
        maps = {router.last_map: known[router.last_map] for router in self._routers}
        sizes = []
        for rows, count in zip(texts, counts, strict=True):
            tokens = self.settings.tokens
            moments = input_moments(subject.model, rows, maps, tokens=tokens)
            spent.flops += 2.0 * self._entries * sum(len(row.ids) for row in rows)
            means = [
                m / n.clamp(min=1)[:, None].to(m)
                for m, n in zip(moments.values(), count, strict=True)
            ]
            sizes.append([mean.sqrt() for mean in means])
        ranking = []
        for layer, (matrix, own, other) in enumerate(zip(maps.values(), *sizes, strict=True)):
            score = ((own - other) * matrix.maps().float().norm(dim=1)).cpu()
            if self.settings.selector != "risk_difference":
                generator = torch.Generator().manual_seed(self._seed + layer)
                score = torch.rand(score.shape, generator=generator)
            ranking.append((matrix, score.sort(dim=1, descending=True, stable=True).indices))
        return ranking

    @torch.no_grad()
    def _clamp(self, subject: Subject, masked: dict[str, list[int]], realised: Realised) -> int:
        """Set the columns of the first neurons of every masked expert to zero."""
        edited = clamped = 0
        for router, (matrix, order) in zip(self._routers, self._neurons, strict=True):
            count = max(round(self.settings.neurons * order.shape[1]), 1)
            subject.restoration.writable([matrix.name])
            maps = matrix.maps()
            for expert in masked[router.name]:
                maps[expert, :, order[expert, :count].to(maps.device)] = 0.0
                clamped, edited = clamped + count, edited + count * maps.shape[1]
        realised.facts["clamped_neurons"] = clamped
        return edited

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
        spent.examples += len(rows)
        spent.restricted_examples += sum(row.restricted for row in rows)
        spent.tokens += processed
        spent.flops += 2.0 * self._entries * processed
        return counts, tokens


def ranked(difference: torch.Tensor, selector: str, seed: int) -> list[int]:
    """Return a layer's experts by falling risk difference [E], or in random order."""
    if selector == "random":
        generator = torch.Generator().manual_seed(seed)
        return [int(index) for index in torch.randperm(len(difference), generator=generator)]
    return [int(index) for index in torch.sort(difference, descending=True, stable=True).indices]


def equal_mass(
    shares: torch.Tensor,
    wanted: Sequence[int],
    allowed: Callable[[list[int]], bool],
    seed: int,
) -> list[int]:
    """Return other experts, drawn by chance, that get about as much routing as ``wanted``.

    Of several draws, each filled up in random order as long as that brings it closer, the closest.

    Args:
        shares: share of the routing that each expert gets, shape [E].
        allowed: whether a set of experts may be masked.

    Raises:
        NotApplicableError: no draw gave another set that is allowed.
    """
    generator = torch.Generator().manual_seed(seed)
    target = float(shares[list(wanted)].sum())
    best, closest = list[int](), math.inf
    for _ in range(DRAWS):
        drawn, gap = list[int](), target
        # Without one of the wanted, or few experts would be filled up to them every time.
        left = wanted[int(torch.randint(len(wanted), (), generator=generator))]
        for expert in torch.randperm(len(shares), generator=generator).tolist():
            if expert == left:
                continue
            after = gap - float(shares[expert])
            if abs(after) < abs(gap) and allowed([*drawn, expert]):
                drawn, gap = [*drawn, expert], after
        if drawn and abs(gap) < closest:
            best, closest = drawn, abs(gap)
    if not best:
        raise NotApplicableError(
            f"no other experts get about {target:.2f} of a layer's routing and may be masked; use "
            "selector=random or another share"
        )
    return best


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
