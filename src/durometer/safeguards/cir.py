"""CIR, collapse of irrelevant representations: updates without what all tokens have in common."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional

from durometer.core.optimizers import OptimizerName
from durometer.core.settings import Between, setting
from durometer.core.structure import blocks
from durometer.safeguards.banks import added
from durometer.safeguards.base import (
    ReferencePoint,
    Safeguard,
    Scope,
    Term,
    TrainingSettings,
    Visit,
    safeguard,
    supervised,
)
from durometer.safeguards.bench import Bench
from durometer.safeguards.data import DefenceData
from durometer.safeguards.passes import Pass, evaluating
from durometer.safeguards.train import Step
from durometer.subjects.base import Subject

RECORDED = "recorded"
# Rounds of subspace iteration; the released code makes 16 and gains digits that nothing needs.
ROUNDS = 4
Gradients = list[torch.Tensor | None]


class CirSettings(TrainingSettings):
    """Settings of ``cir``; depths are shares of the blocks, of 16 in the released configuration."""

    steps: int = setting(600, "updates", ge=1)
    learning_rate: float = setting(1.0, "multiplies every update", gt=0)
    optimizer: OptimizerName = setting("sgd", "optimiser; any other changes the norm below")
    batch_size: int = setting(32, "rows of each pool an update", ge=1)
    train: Scope = setting("mlp", "trained weights; the method is made for linear maps of MLPs")
    last_block: float = setting(
        0.75, "share of the blocks, from below, up to the last trained one", gt=0, le=1
    )
    sft: float = setting(0.0, "coefficient of the cross-entropy on the supervised rows", ge=0)
    overlap: float = setting(
        0.2,
        "norm of the unlearning update; its loss is the overlap of the MLPs' outputs on restricted "
        "rows with what they were",
        search=Between(1e-2, 1.0, log=True),
        ge=0,
    )
    first_read: float = setting(0.375, "depth above which outputs of MLPs are read", ge=0, lt=1)
    last_read: float = setting(0.75, "depth up to which outputs of MLPs are read", gt=0, le=1)
    retention: float = setting(
        3e-4,
        "coefficient of the distance of activations on supervised rows from what they were, "
        "relative to their norm",
        ge=0,
    )
    retain_depth: float = setting(0.75, "depth at which that distance is taken", ge=0, le=1)
    input_directions: int = setting(
        24, "directions taken out of the inputs of a map: their mean and top components", ge=0
    )
    gradient_directions: int = setting(
        36, "directions taken out of the output gradients of a map", ge=0
    )
    refit: int = setting(
        0, "updates between two fits of these directions; 0: one epoch of the restricted rows", ge=0
    )
    retain_limit: float = setting(
        1.001,
        "after a fit, stop once the cross-entropy on all retain rows is above this times what it "
        "was at first; 0 never",
        ge=0,
    )


class TokenBank:
    """Inputs and output gradients of linear maps at chosen positions, of backward passes.

    Attributes:
        keep: positions of the flattened input that count in the pass under way, bool.
        products: ``sum g a^T`` over the tokens since ``clear_products``, fp32, shape [out, in].
        inputs, gradients: the tokens themselves since ``clear``, on the host, a tensor a pass.
    """

    def __init__(self, maps: Mapping[str, nn.Module]) -> None:
        self._maps = dict(maps)
        self.keep: torch.Tensor | None = None
        self.products: dict[str, torch.Tensor] = {}
        self.inputs: dict[str, list[torch.Tensor]] = {}
        self.gradients: dict[str, list[torch.Tensor]] = {}

    def clear(self) -> None:
        """Forget all tokens."""
        self.inputs.clear()
        self.gradients.clear()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record every pass inside that is gone back through, and begin new products."""
        self.products.clear()
        with ExitStack() as stack:
            for name, module in self._maps.items():
                stack.callback(module.register_forward_hook(self._taker(name)).remove)
            yield

    def _taker(self, name: str) -> Any:
        def take(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if output.requires_grad:
                came = inputs[0].detach()
                output.register_hook(lambda gradient: self._add(name, came, gradient.detach()))

        return take

    def _add(self, name: str, came: torch.Tensor, gradient: torch.Tensor) -> None:
        a, g = came.flatten(0, -2)[self.keep], gradient.flatten(0, -2)[self.keep]
        product = g.float().T @ a.float()
        before = self.products.get(name)
        self.products[name] = product if before is None else before.add_(product)
        self.inputs.setdefault(name, []).append(a.cpu())
        self.gradients.setdefault(name, []).append(g.cpu())


@safeguard("cir", aliases=("CIR",))
class Cir(Safeguard[CirSettings]):
    """Unlearning in which common directions of inputs and gradients take no part.

    The gradient of a linear map is the sum over tokens of output gradient times input. The mean and
    the top principal components of both, which carry what all tokens share, are projected out of
    every token before the sum. They are fitted anew each epoch; the first epoch only collects.
    Tokens that rows of a batch share as a prefix count once in the fit.
    """

    summary = "push MLP outputs away from what they were, along rare directions alone"
    cost = "2 passes and 2 reference forwards a step; one epoch's tokens on the host"
    source = "arXiv 2509.11816; filyp/unlearning"
    cannot_show = "resistance beyond short fine-tuning at one rate, all that its authors tried"
    kinds = ("knowledge",)
    settings_class = CirSettings
    separate = True
    # A domain of one relation has little but common directions, so few are taken out.
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "tiny": {
            "steps": 80,
            "schedule": "linear",
            "train": "mlp_out",
            "last_block": 1.0,
            "sft": 0.3,
            "overlap": 0.6,
            "first_read": 0.75,
            "last_read": 1.0,
            "input_directions": 2,
            "gradient_directions": 2,
            "retain_limit": 0.0,
        },
    }

    def __init__(self, settings: CirSettings) -> None:
        super().__init__(settings)
        self._bank: TokenBank | None = None
        self._bases: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._start = 0.0
        self._epoch = settings.refit

    @property
    def reference(self) -> ReferencePoint | None:
        """The weights at the start, whose activations the terms compare with."""
        settings = self.settings
        return "stage_start" if settings.overlap or settings.retention else None

    def terms(self, subject: Subject, data: DefenceData) -> list[Term]:
        """Return the supervised loss, the distance on its rows, and the overlap."""
        settings = self.settings
        if not self._epoch:
            self._epoch = -(-len(data.pool("restricted")) // settings.batch_size)
        count = len(blocks(subject.model))
        first, last = int(settings.first_read * count), round(settings.last_read * count)
        read = slice(min(first, last - 1), last)
        depth = round(settings.retain_depth * count)
        return [
            supervised(settings),
            Term(
                "retention",
                settings.retention,
                "sft",
                lambda p: distance(p, depth),
                per="token",
                reads=("residual",),
                whole=True,
                may_rest=True,
            ),
            Term(
                "overlap",
                settings.overlap,
                "restricted",
                lambda p: self._overlap(p, read),
                per="token",
                at=RECORDED,
                reads=("mlp",),
                whole=True,
                may_rest=True,
            ),
        ]

    def _overlap(self, one: Pass, read: slice) -> torch.Tensor:
        row, place = one.token_places
        later = torch.ones_like(row, dtype=torch.bool)
        later[0] = False
        later[1:] = row[1:] == row[:-1]
        if self._bank is not None:
            keep = torch.zeros_like(one.labelled.reach[0])
            keep[place[later]] = True
            self._bank.keep = keep
        return overlap(one, read, later)

    def begin(self, bench: Bench) -> None:
        """Note the cross-entropy on the retain rows, by which training is stopped."""
        if self.settings.retain_limit:
            self._start = retain_loss(bench.subject, bench.data)

    def visits(self, step: Step) -> Iterator[Visit]:
        """Yield the weights with the tokens recorded, then as they are."""
        if self.settings.overlap:
            if self._bank is None:
                self._bank = TokenBank(linear_maps_of(step.subject.model, step.names))
            with self._bank.recording():
                yield Visit(RECORDED)
        yield Visit()

    def transform(self, step: Step) -> Gradients:
        """Return the other terms' gradient plus the filtered one of the overlap."""
        rest = step.bank.combined({n: 1.0 for n in step.bank.names() if n != "overlap"})
        if "overlap" not in step.bank.names() or self._bank is None:
            return rest
        filtered = self._filtered() if self._bases else {}
        norm = sum(float((g**2).sum()) for g in filtered.values()) ** 0.5
        scale = self.settings.overlap / norm if norm else 0.0
        if self._fits_after(step.number):
            self._refit(self._bank)
        maps = [name.removesuffix(".weight") for name in step.names]
        return [
            added(other, scale * filtered[name] if name in filtered else None)
            for other, name in zip(rest, maps, strict=True)
        ]

    def _filtered(self) -> dict[str, torch.Tensor]:
        """Return what is left of each map's gradient without the common directions.

        To project every token and then sum is to project the sum: both are linear.
        """
        assert self._bank is not None
        left = {}
        for name, product in self._bank.products.items():
            came, out = (basis.to(product.device) for basis in self._bases[name])
            rest = product - out @ (out.T @ product)
            left[name] = rest - (rest @ came) @ came.T
        return left

    def _fits_after(self, number: int) -> bool:
        return (number + 1) % self._epoch == 0

    def _refit(self, bank: TokenBank) -> None:
        settings = self.settings
        for name in bank.products:
            self._bases[name] = (
                self._fitted(bank.inputs[name], bank.products[name], settings.input_directions),
                self._fitted(
                    bank.gradients[name], bank.products[name], settings.gradient_directions
                ),
            )
        bank.clear()

    def _fitted(self, tokens: list[torch.Tensor], like: torch.Tensor, count: int) -> torch.Tensor:
        found = common_directions(torch.cat(tokens).to(like.device).float(), count)
        # Laid out as a checkpoint brings them back: products round by the layout.
        return found.cpu().contiguous()

    def stop(self, step: Step, losses: Mapping[str, float]) -> str:
        """Stop after a fit where the retain rows have suffered."""
        limit = self.settings.retain_limit
        if limit and self._fits_after(step.number):
            ratio = retain_loss(step.subject, step.data) / self._start
            if ratio > limit:
                return f"cross-entropy on retain rows {ratio:.4g} times that of the start"
        return super().stop(step, losses)

    def can_resume(self, step: int) -> bool:
        """Only at a fit: the tokens collected since are not kept."""
        return step % self._epoch == 0

    def state(self) -> Mapping[str, torch.Tensor]:
        """Return the directions and the retain loss at the start."""
        kept = {"start": torch.tensor(self._start, dtype=torch.float64)}
        for name, (came, out) in self._bases.items():
            kept |= {f"input.{name}": came, f"gradient.{name}": out}
        return kept

    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Go on with these directions."""
        self._start = float(tensors["start"])
        for key, came in tensors.items():
            kind, _, name = key.partition(".")
            if kind == "input":
                self._bases[name] = came, tensors[f"gradient.{name}"]


def overlap(one: Pass, read: slice, counted: torch.Tensor) -> torch.Tensor:
    """Return the overlap of MLP outputs with the reference's, the mean of the blocks read.

    A token's is ``relu(<m, m0>)`` over the square of the mean norm of ``m0``.

    Args:
        read: which blocks.
        counted: tokens that count, bool, shape [tokens]; a row's first one has activations unlike
            all others. The others get 0, and the mean over all is that of the counted ones.
    """
    values = []
    pairs = zip(one.states("mlp")[read], one.reference.states("mlp")[read], strict=True)
    for now, before in pairs:
        norm = before[counted].norm(dim=-1).mean()
        values.append(functional.relu((now * before).sum(-1)) / norm**2)
    share = counted.float().mean()
    found: torch.Tensor = torch.stack(values).mean(0) * counted / share
    return found


def distance(one: Pass, depth: int) -> torch.Tensor:
    """Return the distance of the residual stream after ``depth`` blocks from the reference's.

    Relative to the mean norm there; shape [tokens].
    """
    now, before = one.states()[depth], one.reference.states()[depth]
    # The library's norm has a gradient of 0 at 0; a square root by hand has none there.
    found = torch.linalg.vector_norm(now - before, dim=-1)
    relative: torch.Tensor = found / before.norm(dim=-1).mean()
    return relative


@torch.no_grad()
def common_directions(tokens: torch.Tensor, count: int) -> torch.Tensor:
    """Return an orthonormal basis of the mean of ``tokens`` and their top components.

    The released code projects them out one after the other, which is no projection where the mean
    is not at right angles to the components.

    Args:
        tokens: shape [tokens, width].
        count: directions, the mean's included.

    Returns:
        shape [width, directions]; never all of the width.
    """
    number, width = tokens.shape
    count = min(count, number, width - 1)
    if count == 0:
        return tokens.new_zeros(width, 0)
    found = [tokens.mean(0)[:, None]]
    if count > 1:
        devices = [tokens.device] if tokens.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)
            found.append(torch.pca_lowrank(tokens, count - 1, niter=ROUNDS)[2])
    basis: torch.Tensor = torch.linalg.qr(torch.cat(found, 1)).Q
    return basis


@torch.no_grad()
def retain_loss(subject: Subject, data: DefenceData) -> float:
    """Return the mean cross-entropy of the labels of all retain rows of the defence split, nats."""
    rows = [unit[0] for unit in data.pool("retain")]
    with evaluating(subject.model):
        total = sum(float(part) for part in subject.forward.loss_sums(rows))
    return total / sum(len(row.labels) for row in rows)


def linear_maps_of(model: nn.Module, weights: list[str]) -> dict[str, nn.Module]:
    """Return the linear maps among whose weights these are, by name."""
    maps = {name.removesuffix(".weight") for name in weights}
    return {
        name: module
        for name, module in model.named_modules()
        if name in maps and isinstance(module, nn.Linear)
    }
