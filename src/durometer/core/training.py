"""The one training loop: safeguards, tampers and a safeguard's inner adversary all drive it."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from durometer.core.errors import DurometerError
from durometer.core.forward import Forward
from durometer.core.optimizers import OptimizerName, has_averages, make_optimizer, switch_iterate
from durometer.core.rows import Row
from durometer.core.schedules import Schedule, learning_rate


class DivergedError(DurometerError):
    """Loss or weights became non-finite; what was measured before stays valid."""


@dataclass(frozen=True)
class OptimisationPlan:
    """How weights are updated.

    Attributes:
        steps: planned updates; schedules that decay depend on it.
        gradient_clip: largest gradient norm; 0 clips nothing.
        floor: lowest rate of the cosine schedules.
    """

    optimizer: OptimizerName
    learning_rate: float
    steps: int
    schedule: Schedule = "constant"
    warmup: int = 0
    floor: float = 0.0
    weight_decay: float = 0.0
    gradient_clip: float = 0.0


@dataclass(frozen=True)
class Update:
    """What one optimiser update did.

    Attributes:
        step: number of updates made so far, this one included.
        loss: mean cross-entropy over the labelled tokens of the batch, before the update, nats.
        learning_rate: the rate really used.
        tokens: tokens of the batch, counted row by row (shared prefixes in full).
        labels: labelled tokens of the batch.
        item_ids: items of the batch, in order.
        restricted: how many of the rows were restricted.
    """

    step: int
    loss: float
    learning_rate: float
    tokens: int
    labels: int
    item_ids: tuple[str, ...]
    restricted: int


class Trainer:
    """Updates the given parameters of one model, batch by batch.

    Parameters in a narrow dtype get fp32 masters: bf16 storage swallows small updates almost whole.

    Args:
        forward: the model's forward pass, with any adapter already on it.
        parameters: what is trained; everything else is left alone.
        plan: optimiser, rate and schedule.
    """

    def __init__(
        self, forward: Forward, parameters: Sequence[nn.Parameter], plan: OptimisationPlan
    ) -> None:
        self._forward = forward
        self._plan = plan
        self._parameters = list(parameters)
        self._masters = [
            p if p.dtype == torch.float32 else nn.Parameter(p.detach().float())
            for p in self._parameters
        ]
        self._optimizer = make_optimizer(
            plan.optimizer, self._masters, plan.learning_rate, plan.weight_decay
        )
        self._step = 0

    def update(self, rows: Sequence[Row]) -> Update:
        """Make one update on ``rows``.

        Raises:
            DivergedError: the loss or the gradient is not finite; the weights stay as they were.
        """
        self._forward.model.train()
        self._clear_gradients()  # of an update that was broken off, by lack of memory for one
        labels = sum(len(row.labels) for row in rows)
        loss = 0.0
        for part in self._forward.loss_sums(rows):
            (part / labels).backward()
            loss += float(part.detach()) / labels
        rate = self._rate()
        self._apply(rate, loss)
        self._step += 1
        return Update(
            self._step,
            loss,
            rate,
            sum(len(row.ids) for row in rows),
            labels,
            tuple(row.item_id for row in rows),
            sum(row.restricted for row in rows),
        )

    def reset_optimizer(self) -> None:
        """Forget the optimiser's moments and averages; weights, steps and schedule go on."""
        if has_averages(self._optimizer):
            switch_iterate(self._optimizer, averaged=True)
        plan = self._plan
        self._optimizer = make_optimizer(
            plan.optimizer, self._masters, plan.learning_rate, plan.weight_decay
        )
        self._write_back()

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Show the weights as they would be released: evaluation mode, averaged iterate.

        The training iterate comes back bit for bit, so measuring more often changes no run.
        """
        self._forward.model.eval()
        if not has_averages(self._optimizer):
            yield
            return
        kept = [master.detach().clone() for master in self._masters]
        switch_iterate(self._optimizer, averaged=True)
        self._write_back()
        try:
            yield
        finally:
            switch_iterate(self._optimizer, averaged=False)
            with torch.no_grad():
                for master, copy in zip(self._masters, kept, strict=True):
                    master.copy_(copy)
            self._write_back()

    def _rate(self) -> float:
        plan = self._plan
        return learning_rate(
            plan.schedule,
            self._step,
            peak=plan.learning_rate,
            total=plan.steps,
            warmup=plan.warmup,
            floor=plan.floor,
        )

    def _apply(self, rate: float, loss: float) -> None:
        self._collect_gradients()
        norm = self._clipped_norm()
        if not (torch.isfinite(norm) and math.isfinite(loss)):
            self._clear_gradients()
            raise DivergedError(f"loss {loss:g}, gradient norm {float(norm):g}")
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._write_back()
        self._clear_gradients()

    def _clipped_norm(self) -> torch.Tensor:
        """Return the norm of the whole gradient, clipped afterwards if the plan says so."""
        gradients = [master.grad for master in self._masters if master.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if self._plan.gradient_clip:
            nn.utils.clip_grads_with_norm_(self._masters, self._plan.gradient_clip, norm)
        return norm

    def _collect_gradients(self) -> None:
        for parameter, master in zip(self._parameters, self._masters, strict=True):
            if master is not parameter and parameter.grad is not None:
                master.grad = parameter.grad.float()
                parameter.grad = None

    def _clear_gradients(self) -> None:
        for parameter in (*self._parameters, *self._masters):
            parameter.grad = None

    @torch.no_grad()
    def _write_back(self) -> None:
        for parameter, master in zip(self._parameters, self._masters, strict=True):
            if master is not parameter:
                parameter.copy_(master)
