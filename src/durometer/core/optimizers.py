"""The optimisers an attacker may choose from, by name."""

from collections.abc import Callable, Iterable
from typing import Any, Literal, cast

import torch
from torch import nn

OptimizerName = Literal[
    "adamw",
    "adam",
    "sgd",
    "sgd_momentum",
    "sgd_nesterov",
    "adagrad",
    "adadelta",
    "adafactor",
    "rmsprop",
    "schedule_free_adamw",
    "sign_sgd",
]
Factory = Callable[[list[nn.Parameter], float, float], torch.optim.Optimizer]


class SignSGD(torch.optim.Optimizer):
    """Update by the sign of the gradient (arXiv 1802.04434), with decoupled weight decay."""

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Make one update."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
                parameter.sub_(parameter.grad.sign(), alpha=group["lr"])


def _schedule_free(
    parameters: list[nn.Parameter], rate: float, decay: float
) -> torch.optim.Optimizer:
    from schedulefree import AdamWScheduleFree

    optimizer = AdamWScheduleFree(parameters, lr=rate, weight_decay=decay)
    optimizer.train()  # it refuses to step otherwise
    return cast(torch.optim.Optimizer, optimizer)


_FACTORIES: dict[str, Factory] = {
    "adamw": lambda p, lr, wd: torch.optim.AdamW(p, lr=lr, weight_decay=wd, fused=True),
    "adam": lambda p, lr, wd: torch.optim.Adam(p, lr=lr, weight_decay=wd, fused=True),
    "sgd": lambda p, lr, wd: torch.optim.SGD(p, lr=lr, weight_decay=wd),
    "sgd_momentum": lambda p, lr, wd: torch.optim.SGD(p, lr=lr, momentum=0.9, weight_decay=wd),
    "sgd_nesterov": lambda p, lr, wd: torch.optim.SGD(
        p, lr=lr, momentum=0.9, nesterov=True, weight_decay=wd
    ),
    "adagrad": lambda p, lr, wd: torch.optim.Adagrad(p, lr=lr, weight_decay=wd),
    "adadelta": lambda p, lr, wd: torch.optim.Adadelta(p, lr=lr, weight_decay=wd),
    "adafactor": lambda p, lr, wd: torch.optim.Adafactor(p, lr=lr, weight_decay=wd),
    "rmsprop": lambda p, lr, wd: torch.optim.RMSprop(p, lr=lr, weight_decay=wd),
    "schedule_free_adamw": _schedule_free,
    "sign_sgd": lambda p, lr, wd: SignSGD(p, lr=lr, weight_decay=wd),
}


def make_optimizer(
    name: OptimizerName, parameters: list[nn.Parameter], rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Return the named optimiser over ``parameters`` (fp32, requiring gradients)."""
    return _FACTORIES[name](parameters, rate, weight_decay)


def has_averages(optimizer: torch.optim.Optimizer) -> bool:
    """Say whether the optimiser is schedule-free: measured at an average of its iterates."""
    return callable(getattr(optimizer, "eval", None))


def switch_iterate(optimizer: torch.optim.Optimizer, *, averaged: bool) -> None:
    """Show the averaged iterate of a schedule-free optimiser, or its training iterate again.

    Without the switch the raw iterate would be measured (a trap of released code). Other
    optimisers have one iterate only, and nothing happens.
    """
    switch = getattr(optimizer, "eval" if averaged else "train", None)
    if callable(switch):
        switch()
