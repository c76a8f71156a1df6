"""Gradients that only show a probe or a ``transform`` the way, and are not applied themselves."""

import torch

from durometer.safeguards.train import Step

PROBE = "probe"


def norm_of(step: Step, name: str) -> float:
    """Return the norm of a term's gradient in this step, 0 where it was not computed."""
    return step.bank.norm(name) if name in step.bank.names() else 0.0


def applied(step: Step, *guides: str) -> list[torch.Tensor | None]:
    """Return the sum of all gradients but those of ``guides``, whose losses are no part either."""
    for name in guides:
        step.losses.pop(name, None)
    return step.bank.combined({name: 1.0 for name in step.bank.names() if name not in guides})
