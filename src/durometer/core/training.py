"""The one training loop: safeguards, tampers and a safeguard's inner adversary all drive it."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

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
        self.begin()
        labels = sum(len(row.labels) for row in rows)
        loss = 0.0
        for part in self._forward.loss_sums(rows):
            (part / labels).backward()
            loss += float(part.detach()) / labels
        return self.finish(rows, loss)

    def begin(self) -> None:
        """Make ready for the gradients of one update, whoever computes them."""
        self._forward.model.train()
        self._clear_gradients()  # of an update that was broken off, by lack of memory for one

    def finish(
        self,
        rows: Sequence[Row],
        loss: float,
        gradients: Sequence[torch.Tensor | None] | None = None,
    ) -> Update:
        """Make the update that ``begin`` announced.

        Args:
            rows: what the loss was computed on, for the record.
            loss: its value before the update.
            gradients: fp32, one a parameter, in place of those that the parameters hold.

        Raises:
            DivergedError: the loss or the gradient is not finite; the weights stay as they were.
        """
        rate = self._rate()
        if gradients is not None:
            self._clear_gradients()
            for master, gradient in zip(self._masters, gradients, strict=True):
                master.grad = gradient
        self._apply(rate, loss)
        self._step += 1
        labels = sum(len(row.labels) for row in rows)
        return Update(
            self._step,
            loss,
            rate,
            sum(len(row.ids) for row in rows),
            labels,
            tuple(row.item_id for row in rows),
            sum(row.restricted for row in rows),
        )

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return all that a later trainer needs to go on: tensors by name, and plain values."""
        saved = self._optimizer.state_dict()
        tensors = {f"weights.{i}": m.detach() for i, m in enumerate(self._masters)}
        plain: dict[str, Any] = {"step": self._step, "groups": saved["param_groups"], "state": {}}
        for index, values in saved["state"].items():
            for name, value in values.items():
                if isinstance(value, torch.Tensor):
                    tensors[f"state.{index}.{name}"] = value
                else:
                    plain["state"].setdefault(str(index), {})[name] = value
        return tensors, plain

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, torch.Tensor], plain: Mapping[str, Any]) -> None:
        """Go on from what ``state`` returned, bit for bit."""
        state: dict[int, dict[str, Any]] = {
            int(index): dict(values) for index, values in plain["state"].items()
        }
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "weights":
                self._masters[int(rest)].copy_(tensor)
            else:
                index, _, key = rest.partition(".")
                state.setdefault(int(index), {})[key] = tensor
        groups = [
            {
                key: tuple(v) if isinstance(v, list) and key != "params" else v
                for key, v in g.items()
            }
            for g in plain["groups"]
        ]
        self._optimizer.load_state_dict({"state": state, "param_groups": groups})
        self._step = int(plain["step"])
        self._write_back()

    def release(self) -> None:
        """Leave the weights as they are to be used: the averaged iterate, where there is one."""
        if has_averages(self._optimizer):
            switch_iterate(self._optimizer, averaged=True)
            self._write_back()

    @contextmanager
    def parked(self) -> Iterator[None]:
        """Keep what only updates read in the host's memory while something else needs the device.

        That is the optimiser's state and the masters of narrow weights; no update is made inside.
        """
        states = [value for values in self._optimizer.state.values() for value in values.values()]
        tensors = [value for value in states if isinstance(value, torch.Tensor)]
        pairs = zip(self._masters, self._parameters, strict=True)
        tensors += [master for master, parameter in pairs if master is not parameter]
        moved = [(tensor, tensor.device) for tensor in tensors if tensor.device.type != "cpu"]
        for tensor, _ in moved:
            tensor.data = tensor.data.cpu()
        try:
            yield
        finally:
            for tensor, device in moved:
                tensor.data = tensor.data.to(device)

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
