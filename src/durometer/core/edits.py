"""Changing a model in memory and taking the change back, bit for bit."""

from collections.abc import Callable, Iterable

import torch
from torch import nn

from durometer.core.errors import DurometerError


class RestoreError(DurometerError):
    """A model is not what it was before a tamper; nothing after it may be trusted."""


class Restoration:
    """Undoes whatever was done to a model since this object was made.

    Weights are copied only when somebody announces to change them (``writable``), so a restore
    costs at most one extra copy of the changed weights; adapters and hooks register how to take
    them off (``on_exit``).

    Args:
        model: the model that is about to be changed.
        host: keep the copies in the host's memory, so that the device holds no second copy.
    """

    def __init__(self, model: nn.Module, *, host: bool = False) -> None:
        self._model = model
        self._host = host
        # By identity: while an adapter is on, the same weights go by other names.
        self._parameters = dict(model.named_parameters())
        self._copies: dict[str, torch.Tensor] = {}
        self._callbacks: list[Callable[[], None]] = []
        self._flags = {name: p.requires_grad for name, p in self._parameters.items()}
        self._training = model.training

    def writable(self, names: Iterable[str]) -> list[nn.Parameter]:
        """Return the named parameters, ready to be changed in place; each is copied once.

        Raises:
            KeyError: the model has no such parameter.
        """
        chosen = [(name, self._parameters[name]) for name in names]
        for name, parameter in chosen:
            if name not in self._copies:
                weight = parameter.detach()
                self._copies[name] = weight.to("cpu", copy=True) if self._host else weight.clone()
        return [parameter for _, parameter in chosen]

    def on_exit(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` when the model is restored, the last registered first."""
        self._callbacks.append(callback)

    def changes(self) -> dict[str, float]:
        """Return the Frobenius norm of the change of each announced weight, by name."""
        return {name: float(self.change(name).norm()) for name in self._copies}

    def change(self, name: str) -> torch.Tensor:
        """Return by how much an announced weight was changed, fp32."""
        # One fp32 tensor at a time: a table of embeddings is large beside the rest of an attack.
        change = self._parameters[name].detach().to(torch.float32, copy=True)
        return change.sub_(self._copies[name].to(change.device))

    def copied_bytes(self) -> int:
        """Return the size of the copies held: at most one of every changed weight."""
        return sum(copy.numel() * copy.element_size() for copy in self._copies.values())

    @torch.no_grad()
    def undo(self) -> None:
        """Take back every change so far and stay ready for the next (a ladder of strengths)."""
        while self._callbacks:
            self._callbacks.pop()()
        for name, copy in self._copies.items():
            self._parameters[name].copy_(copy)

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back: adapters off, weights, gradient flags, mode."""
        while self._callbacks:
            self._callbacks.pop()()
        parameters = dict(self._model.named_parameters())
        if parameters.keys() != self._flags.keys():
            raise RestoreError("the model's parameters are not the ones it had before the tamper")
        for name, parameter in parameters.items():
            if name in self._copies:
                parameter.copy_(self._copies[name])
            parameter.grad = None
            parameter.requires_grad_(self._flags[name])
        self._copies.clear()
        self._model.train(self._training)
