"""RepSelect: one edit along the forget gradient, without its dominant directions."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from durometer.core.errors import DurometerError, InputError
from durometer.core.rows import Row
from durometer.core.settings import Between, Levels, Settings, setting
from durometer.safeguards.attacks import InnerAttack
from durometer.safeguards.banks import GradientBank, perturbed
from durometer.safeguards.base import ReferencePoint, Safeguard, TrainingSettings, safeguard
from durometer.safeguards.bench import Bench
from durometer.safeguards.passes import passes
from durometer.safeguards.train import trained_maps

Pool = Literal["restricted", "retain"]
Collapse = Literal["soft", "quadratic", "hard"]
# A gradient of lower rank than asked for has no further directions.
LEAST_SINGULAR_VALUE = 1e-6
MOST_RAISED = 4.0


class RepSelectSettings(Settings):
    """Settings of ``rep_select``; defaults are those of the paper's runs."""

    rate: float = setting(
        0.05,
        "share of the filtered gradient that is taken off the weights, at first: it is raised "
        "until retain_kl is passed, then bisected",
        search=Between(0.005, 0.5, log=True),
        gt=0,
    )
    retain_kl: float = setting(
        0.01,
        "largest divergence KL(before || after) of the predictions on the defence split's retain "
        "rows, nats a label",
        search=Between(1e-3, 1.0, log=True),
        gt=0,
    )
    measured_rows: int = setting(
        256, "retain rows on which the divergence is measured, drawn once", ge=1
    )
    raises: int = setting(
        16,
        "most raises of the rate: to where the limit lies if the divergence grows with the "
        "square, at least to twice as much",
        ge=0,
    )
    bisections: int = setting(6, "bisections between the last two rates", ge=0)
    directions: float = setting(
        0.125,
        "share of the narrower side of a matrix in top singular directions that are collapsed: 512 "
        "of 4096",
        search=Between(0.0, 0.5),
        ge=0,
        le=1,
    )
    collapse: Collapse = setting(
        "soft",
        "divide a top direction by its singular value over the smallest one collapsed, by the "
        "square of that, or leave it out",
        search=Levels(("soft", "quadratic", "hard")),
    )
    directions_of: Pool = setting(
        "restricted",
        "whose gradient has these directions: that of restricted rows, or of retain rows",
        search=Levels(("restricted", "retain")),
    )
    elicit_rate: float = setting(
        0.01,
        "learning rate (SGD) of the attack with an adapter behind which gradients are taken; 0: at "
        "the weights themselves",
        ge=0,
    )
    elicit_epochs: int = setting(1, "epochs of that attack", ge=1)
    elicit_rank: int = setting(8, "rank of its adapter", ge=1)
    batch_size: int = setting(
        16,
        "rows of a batch, of the attack and of the gradient: the sum of the batches' means",
        ge=1,
    )
    first_block: float = setting(
        0.0, "share of the blocks, from below, before the first edited one", ge=0, lt=1
    )
    last_block: float = setting(
        1.0, "share of the blocks, from below, up to the last edited one", gt=0, le=1
    )


@safeguard("rep_select", aliases=("RepSelect", "repselect"))
class RepSelect(Safeguard[RepSelectSettings]):
    """One step up the loss on restricted rows, along what only they use.

    A short attack with an adapter draws the knowledge out first; like every inner attack it leaves
    out the held-out fifth of the entities. The gradient at that point, that of all restricted rows,
    is filtered by its own singular vectors, on the side of the inputs, then on that of the outputs:
    its large directions are what any text would move. Every trial edit starts from the stored
    weights, so that rounding does not pile up.
    """

    summary = "one edit against the restricted gradient, its dominant directions collapsed"
    cost = "2 sweeps over the restricted rows, a decomposition a matrix, some 20 forwards of retain"
    source = "arXiv 2606.17168; filyp/RepSelect"
    cannot_show = "resistance to adapters or adaptive attacks; its authors tried one relearning"
    kinds = ("knowledge",)
    settings_class = RepSelectSettings
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "tiny": {
            "rate": 500.0,
            "retain_kl": 0.1,
            "first_block": 0.5,
            "directions": 0.6,
            "collapse": "quadratic",
            "directions_of": "retain",
        },
    }

    def __init__(self, settings: RepSelectSettings) -> None:
        super().__init__(settings)
        self._facts: dict[str, Any] = {}

    @property
    def reference(self) -> ReferencePoint | None:
        """The model before the edit, whose predictions on retain rows are to stay."""
        return "stage_start"

    def edit(self, bench: Bench) -> None:
        """Edit the MLPs.

        Raises:
            InputError: no edit stays within ``retain_kl``.
            DurometerError: the attack diverged, or the weights' number format is too coarse.
        """
        edit = self._filtered(self._gradients(bench))
        rate, divergence = self._largest(bench, edit)
        if not rate:
            raise InputError(
                f"safeguard 'rep_select': even the smallest edit tried changes the predictions on "
                f"retain rows by more than retain_kl={self.settings.retain_kl:g}; raise it, or "
                "lower rate"
            )
        self._apply(bench, edit, rate)
        self._facts = {"applied_rate": rate, "retain_kl": divergence}

    def facts(self) -> dict[str, Any]:
        """Return the rate that was applied and the divergence that it caused."""
        return dict(self._facts)

    # ---- gradients at the elicited weights -----------------------------------------------------

    def _gradients(self, bench: Bench) -> dict[Pool, dict[str, torch.Tensor]]:
        """Return the gradient of the loss of each pool that is needed, by weight."""
        names = edited_weights(bench.subject.model, self.settings)
        parameters = [bench.subject.model.get_parameter(name) for name in names]
        bank = GradientBank(parameters)
        pools: list[Pool] = list(dict.fromkeys(("restricted", self.settings.directions_of)))
        for _ in self._elicited(bench):
            for pool in pools:
                self._collect(bench, bank, pool)
        if not bank.names():
            raise DurometerError(
                "safeguard 'rep_select': the eliciting attack diverged; lower elicit_rate"
            )
        return {
            pool: {n: g for n, g in zip(names, bank.gradients(pool), strict=True) if g is not None}
            for pool in pools
        }

    def _elicited(self, bench: Bench) -> Iterator[None]:
        """Yield once, behind the attack; its adapter is on meanwhile."""
        settings = self.settings
        if not settings.elicit_rate:
            yield
            return
        rows = len(bench.data.pool("inner_restricted"))
        steps = settings.elicit_epochs * -(-rows // settings.batch_size)
        attack = InnerAttack(
            "restricted",
            "adapter",
            "sgd",
            settings.elicit_rate,
            settings.batch_size,
            steps,
            rank=settings.elicit_rank,
        )
        for update in bench.attacks.run(attack, bench.seeds.initialisation):
            if update.step == steps:
                yield

    def _collect(self, bench: Bench, bank: GradientBank, pool: Pool) -> None:
        rows, size = [unit[0] for unit in bench.data.pool(pool)], self.settings.batch_size
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            labels = sum(len(row.labels) for row in batch)
            bench.ledger.count("elicited", sum(len(row.ids) for row in batch))
            with bank.collecting(pool):
                for one in passes(bench.subject.forward, batch, (), None, whole=False):
                    (one.cross_entropy().sum() / labels).backward()

    def _filtered(
        self, gradients: Mapping[Pool, Mapping[str, torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        """Return the gradient of the restricted loss, filtered: the way up is the edit's."""
        settings = self.settings
        return {
            name: filtered(
                gradient,
                gradients[settings.directions_of][name],
                settings.directions,
                settings.collapse,
            )
            for name, gradient in gradients["restricted"].items()
        }

    # ---- how far --------------------------------------------------------------------------------

    def _largest(self, bench: Bench, edit: Mapping[str, torch.Tensor]) -> tuple[float, float]:
        """Return the largest rate tried within the limit (0: none), and its divergence."""
        settings = self.settings
        within, beyond, least = 0.0, settings.rate, 0.0
        for _ in range(settings.raises + 1):
            divergence = self._divergence(bench, edit, beyond)
            if divergence > settings.retain_kl:
                break
            within, least = beyond, divergence
            beyond *= _raise(settings.retain_kl, divergence)
        else:
            return within, least
        for _ in range(settings.bisections):
            middle = (within + beyond) / 2
            divergence = self._divergence(bench, edit, middle)
            if divergence > settings.retain_kl:
                beyond = middle
            else:
                within, least = middle, divergence
        return within, least

    def _divergence(self, bench: Bench, edit: Mapping[str, torch.Tensor], rate: float) -> float:
        deltas = {name: rate * delta for name, delta in edit.items()}
        # A first rate may be below what the number format resolves; the last one may not.
        with perturbed(bench.subject, deltas, least_cosine=-1.0):
            return retain_divergence(bench, self.settings.measured_rows)

    @torch.no_grad()
    def _apply(self, bench: Bench, edit: Mapping[str, torch.Tensor], rate: float) -> None:
        """Make the edit, once it is known that the weights' number format can hold it."""
        deltas = {name: rate * delta for name, delta in edit.items()}
        with perturbed(bench.subject, deltas):
            pass
        for name, delta in deltas.items():
            weight = bench.subject.model.get_parameter(name)
            weight.copy_(weight.float() + delta)


def _raise(limit: float, divergence: float) -> float:
    """Return by how much to raise a rate, as if the divergence grew with its square.

    Where the model is sure of itself it grows far quicker once it does, so never by much.
    """
    return min(max(math.sqrt(limit / max(divergence, 1e-12)), 2.0), MOST_RAISED)


def edited_weights(model: nn.Module, settings: RepSelectSettings) -> list[str]:
    """Return the names of the weights of the MLPs' linear maps in the blocks that are edited."""
    chosen = TrainingSettings(
        train="mlp", first_block=settings.first_block, last_block=settings.last_block
    )
    return [f"{name}.weight" for name in trained_maps(model, chosen)]


def filtered(
    gradient: torch.Tensor, source: torch.Tensor, share: float, collapse: Collapse
) -> torch.Tensor:
    """Return ``gradient`` with the top singular directions of ``source`` made small, fp32.

    Args:
        gradient, source: shape [out, in].
        share: how many directions, as a share of the narrower side.
        collapse: how small, see ``RepSelectSettings``.
    """
    count = round(share * min(source.shape))
    if not count:
        return gradient
    left, values, right = top_directions(source, count)
    ratios = values / values[-1]
    kept = {"soft": 1 / ratios, "quadratic": 1 / ratios**2, "hard": torch.zeros_like(ratios)}
    removed = 1 - kept[collapse]
    exact = gradient.double()
    exact = exact - (exact @ right * removed) @ right.T
    exact = exact - left @ (removed[:, None] * (left.T @ exact))
    return exact.float()


def top_directions(
    matrix: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the top singular vectors and values of ``matrix``, fp64: left, values, right.

    By way of the smaller Gram matrix, which is far quicker than a decomposition of the whole.
    Directions without weight are left out, so there may be fewer than ``count``.

    Raises:
        DurometerError: the matrix is zero.
    """
    exact = matrix.double()
    wide = exact.shape[0] <= exact.shape[1]
    squares, vectors = torch.linalg.eigh(exact @ exact.T if wide else exact.T @ exact)
    values = squares.clamp(min=0).sqrt().flip(0)[:count]
    kept = values > LEAST_SINGULAR_VALUE * values[0]
    if not kept.any():
        raise DurometerError("a gradient is zero and has no directions")
    values, near = values[kept], vectors.flip(1)[:, :count][:, kept]
    far = (exact.T @ near if wide else exact @ near) / values
    return (near, values, far) if wide else (far, values, near)


@torch.no_grad()
def retain_divergence(bench: Bench, most: int) -> float:
    """Return the mean KL(reference || now) over the labels of retain rows, nats.

    Args:
        bench: its reference is what is compared with.
        most: rows that are looked at, the same ones every time.
    """
    assert bench.reference is not None
    generator = torch.Generator().manual_seed(bench.seeds.sampling)
    pool = bench.data.pool("retain")
    chosen = sorted(torch.randperm(len(pool), generator=generator)[:most].tolist())
    rows: list[Row] = sorted((pool[index][0] for index in chosen), key=lambda row: row.ids)
    total = 0.0
    for one in passes(bench.subject.forward, rows, (), bench.reference, whole=False):
        before, now = one.reference.log_probabilities, one.log_probabilities
        total += float((before.exp() * (before - now)).sum())
    return total / sum(len(row.labels) for row in rows)
