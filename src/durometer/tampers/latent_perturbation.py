"""A universal latent perturbation: one bounded vector added to the residual stream."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import field_validator
from torch import nn

from durometer.core.budget import Spent
from durometer.core.errors import NotApplicableError
from durometer.core.rows import Row
from durometer.core.seeds import Seeds
from durometer.core.settings import Between, Levels, Settings, setting
from durometer.core.structure import blocks
from durometer.domains.base import Domain
from durometer.subjects.base import Subject
from durometer.tampers.base import Access, Realised, tamper
from durometer.tampers.data import make_rows, shuffled_batches, training_items
from durometer.tampers.ladder import Ladder, Strengths
from durometer.tampers.ledger import Ledger

Site = Literal["embedding", "quarter", "half", "three_quarters"]
DEPTHS: dict[Site, float] = {
    "embedding": 0.0,
    "quarter": 0.25,
    "half": 0.5,
    "three_quarters": 0.75,
}


class LatentPerturbationSettings(Settings):
    """Where the perturbation is added, how long it may be, and how it is trained."""

    strengths: Strengths = setting(
        (0.05, 0.1, 0.25, 0.5),
        "largest norms of the perturbation, in median norms of the residual stream at the site",
    )
    site: Site = setting(
        "half",
        "depth at which it is added",
        search=Levels(("embedding", "quarter", "half", "three_quarters")),
    )
    delta: Literal["trained", "random"] = setting(
        "trained", "trained, or, as a control, a random direction of the same norm"
    )
    steps: int = setting(16, "PGD updates a strength", search=Levels((8, 16, 32, 100)), ge=1)
    step_size: float = setting(
        0.25,
        "length of one update, in largest norms",
        search=Between(0.02, 1.0, log=True),
        gt=0,
    )
    away: float = setting(
        0.0,
        "weight of moving away from the refusal; the answer gets the rest",
        search=Levels((0.0, 0.5)),
        ge=0,
        lt=1,
    )
    batch_size: int = setting(8, "rows an update", search=Levels((4, 8, 16)), ge=1)
    examples: int = setting(64, "unique training examples", search=Levels((8, 64)), ge=1)
    max_length: int = setting(512, "longest row in tokens", ge=8)

    @field_validator("strengths")
    @classmethod
    def _are_norms(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not value or any(not math.isfinite(norm) or norm < 0 for norm in value):
            raise ValueError("a norm must be finite and not negative")
        return tuple(sorted(value))


def site_module(model: nn.Module, site: Site) -> nn.Module:
    """Return the module whose output is the residual stream at ``site``.

    Raises:
        NotApplicableError: fewer than two blocks, which have no inside, or none found.
    """
    if site == "embedding":
        embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
        return embedding
    found = blocks(model)
    if len(found) < 2:
        raise NotApplicableError(f"a model of {len(found)} block has no site '{site}'")
    # Between two blocks: the output of the one before the depth asked for.
    place = min(max(round(DEPTHS[site] * len(found)), 1), len(found) - 1)
    return found[place - 1][1]


def _with_stream(
    output: Any, change: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor | tuple[Any, ...]:
    """Apply ``change`` to the hidden states of a module's output, alone or first in a tuple."""
    if isinstance(output, tuple):
        return (change(output[0]), *output[1:])
    return change(output)


def add_everywhere(module: nn.Module, delta: torch.Tensor) -> Callable[[], None]:
    """Add ``delta`` [width] to the output of ``module`` at all positions; return how to stop."""

    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        return _with_stream(output, lambda stream: stream + delta.to(stream))

    return module.register_forward_hook(hook).remove


@torch.no_grad()
def median_norm(subject: Subject, module: nn.Module, rows: Sequence[Row]) -> tuple[float, int]:
    """Return the median norm of the stream out of ``module`` over ``rows``, and its width."""
    seen: list[torch.Tensor] = []

    def keep(stream: torch.Tensor) -> torch.Tensor:
        seen.append(stream[0].float())
        return stream

    device = next(subject.model.parameters()).device
    handle = module.register_forward_hook(lambda m, i, output: _with_stream(output, keep))
    try:
        for row in rows:
            subject.model(input_ids=torch.tensor([row.ids], device=device), use_cache=False)
    finally:
        handle.remove()
    if not seen:
        raise NotApplicableError("the site is never reached by a forward pass")
    stream = torch.cat(seen)
    return float(stream.norm(dim=-1).median()), int(stream.shape[-1])


@tamper("latent_perturbation", aliases=("latent-perturbation", "latent"))
class LatentPerturbation(Ladder[LatentPerturbationSettings]):
    """Train one vector by PGD on restricted rows and add it at every position, for all prompts.

    Utility is measured with the vector added, too: an attacker cannot tell what it will be asked.
    """

    summary = "add a trained vector of bounded norm to the residual stream at every position"
    access: ClassVar[Access] = "activations"
    access_level = "A3"
    cost = "4 N T"
    source = "arXiv 2403.05030, 2407.15549, 2502.05209"
    cannot_show = "what a perturbation fitted to each prompt or each position would do"
    settings_class = LatentPerturbationSettings
    matched_control = ("delta", "random")
    changes_weights = False

    # Set by `prepare`.
    _rows: tuple[list[Row], list[Row]]
    _seeds: Seeds
    _module: nn.Module
    _norm: float
    _width: int
    _ledger: Ledger
    _ever: bool

    def strengths(self) -> tuple[float, ...]:
        """Return the largest norms, smallest first."""
        return self.settings.strengths

    def prepare(
        self, subject: Subject, data: Domain, seeds: Seeds, realised: Realised, spent: Spent
    ) -> None:
        """Take the rows and the stream's median norm at the site.

        Raises:
            NotApplicableError: there is no such site, or the domain has no refusals to leave.
        """
        settings = self.settings
        _ = subject.tree  # tried on the model as it is, before anything is hooked
        if settings.away and not data.refusals:
            raise NotApplicableError(f"domain '{data.name}' has no refusals to move away from")
        answers = training_items(data, "disjoint", settings.examples, seeds)
        away = training_items(data, "refusals", settings.examples, seeds) if settings.away else []
        made = [
            make_rows(chosen, subject.chat, label_prompt=False, max_length=settings.max_length)
            for chosen in (answers, away)
        ]
        self._rows = (made[0], made[1])
        self._seeds, self._ever = seeds, False
        self._ledger = Ledger(subject, spent, full=False)
        self._module = site_module(subject.model, settings.site)
        sample = made[0][: settings.batch_size]
        self._norm, self._width = median_norm(subject, self._module, sample)
        self._ledger.book(sample, passes=0.5)
        realised.facts |= {"site": settings.site, "median_norm": self._norm, "by_strength": {}}

    def apply(self, subject: Subject, strength: float, realised: Realised) -> int:
        """Train (or draw) the vector for this norm and leave it hooked in."""
        radius = strength * self._norm
        facts = realised.facts["by_strength"][f"{strength:g}"] = {"largest_norm": radius}
        if not radius:
            return 0
        delta = torch.zeros(self._width, device=subject.forward.device, requires_grad=True)
        subject.restoration.on_exit(add_everywhere(self._module, delta))
        if self.settings.delta == "random":
            generator = torch.Generator().manual_seed(self._seeds.initialisation)
            drawn = torch.randn(self._width, generator=generator)
            delta.data.copy_(radius * drawn / drawn.norm())
        else:
            facts |= self._train(subject, delta, radius, realised)
        delta.requires_grad_(False)
        facts["norm"] = float(delta.norm())
        return 0

    def _train(
        self, subject: Subject, delta: torch.Tensor, radius: float, realised: Realised
    ) -> dict[str, float]:
        """Train ``delta`` in place; return the loss of the first batch before and after."""
        length = self.settings.step_size * radius
        batches = list(itertools.islice(self._batches(), self.settings.steps))
        losses = []
        for rows in batches:
            losses.append(self._loss(subject, *rows, train=True))
            gradient = delta.grad
            if gradient is None or not (
                math.isfinite(losses[-1]) and torch.isfinite(gradient).all()
            ):
                realised.status, realised.reason = "diverged", "the loss is not finite"
                break
            descend(delta, gradient, length, radius)
            delta.grad = None
        after = self._loss(subject, *batches[0], train=False)
        realised.losses += losses
        realised.learning_rates += [length] * len(losses)
        used = batches[: len(losses)]
        realised.item_ids += [tuple(row.item_id for row in rows) for rows, _ in used]
        self._ever = self._ever or after < losses[0]
        return {"loss_before": losses[0], "loss_after": after}

    def _batches(self) -> Iterator[tuple[list[Row], list[Row]]]:
        answers, refusals = self._rows
        size = self.settings.batch_size
        toward = shuffled_batches(answers, (), size, 0.0, self._seeds)
        if not refusals:
            return ((rows, []) for rows in toward)
        return zip(toward, shuffled_batches(refusals, (), size, 0.0, self._seeds), strict=False)

    def _loss(
        self, subject: Subject, answers: list[Row], refusals: list[Row], *, train: bool
    ) -> float:
        """Return the weighted mean loss over the labels; add its gradient if ``train``."""
        total = 0.0
        share = self.settings.away
        for rows, weight in ((answers, 1.0 - share), (refusals, -share)):
            labels = sum(len(row.labels) for row in rows)
            with torch.set_grad_enabled(train):
                for part in subject.forward.loss_sums(rows):
                    scaled = part * (weight / labels)
                    if train:
                        scaled.backward()
                    total += float(scaled.detach())
            self._ledger.book(rows, passes=1.0 if train else 0.5)
        return total

    def _audit(self, subject: Subject, realised: Realised, strength: float) -> None:
        """Call a trained perturbation that lowered the loss at no strength so far no effect."""
        if realised.status == "diverged":
            return
        super()._audit(subject, realised, strength)
        if strength and self.settings.delta == "trained" and not self._ever:
            realised.status, realised.reason = "no_effect", "the loss did not fall"


@torch.no_grad()
def descend(delta: torch.Tensor, gradient: torch.Tensor, step: float, radius: float) -> None:
    """Go ``step`` against the gradient's direction and back into the ball of ``radius``."""
    length = gradient.norm()
    if length > 0:
        delta.sub_(gradient * (step / length))
    norm = delta.norm()
    if norm > radius:
        delta.mul_(radius / norm)
