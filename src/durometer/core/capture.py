"""What flows into linear maps: second moments of their inputs over response tokens."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from durometer.core.errors import NotApplicableError
from durometer.core.rows import Row


@torch.no_grad()
def input_moments(
    model: nn.Module, rows: Sequence[Row], names: Sequence[str], *, full: bool = False
) -> dict[str, torch.Tensor]:
    """Return the summed second moments of each named linear map's inputs (fp32).

    Only positions that predict a label count, so that prompts do not leak into scores.

    Args:
        names: linear maps, see ``core.adapters.linear_maps``.
        full: ``sum x xᵀ``, shape [inputs, inputs]; else ``sum x²``, shape [inputs].

    Raises:
        NotApplicableError: a map was never reached (an expert that no token was routed to).
    """
    modules = dict(model.named_modules())
    sums: dict[str, torch.Tensor] = {}
    span = slice(0)

    def hook(name: str) -> Any:
        def add(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            chosen = inputs[0].reshape(-1, inputs[0].shape[-1])[span].float()
            moment = chosen.T @ chosen if full else (chosen**2).sum(0)
            sums[name] = sums[name] + moment if name in sums else moment

        return add

    handles = [modules[name].register_forward_pre_hook(hook(name)) for name in names]
    device = next(model.parameters()).device
    try:
        for row in rows:
            span = slice(row.first_label - 1, len(row.ids) - 1)
            model(input_ids=torch.tensor([row.ids], device=device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    missing = [name for name in names if name not in sums]
    if missing:
        raise NotApplicableError(f"no token reached {missing[0]} and {len(missing) - 1} more maps")
    return sums
