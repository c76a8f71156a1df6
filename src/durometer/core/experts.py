"""Experts fused into tensors, as transformers 5 computes them: what each one's last map receives.

``transformers.integrations.moe`` has every such module declare its layout (``has_gate``,
``has_bias``, ``is_transposed``) and call its tensors ``gate_up_proj`` or ``up_proj``, and
``down_proj``. Which of several kernels runs is the configuration's choice, so inner activations are
computed again from the declared layout, and the result is compared with the layer's own.
"""

from typing import Any

import torch
from torch import nn

from durometer.core.errors import NotApplicableError

LAST_MAP = "down_proj"
# Largest difference from the layer's own output, relative to its largest entry.
_SAME = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.03}


def require_declared(path: str, experts: nn.Module) -> None:
    """Refuse experts that do not declare how they compute.

    Raises:
        NotApplicableError: with the path of the module.
    """
    gated = getattr(experts, "has_gate", None)
    tensors = {name for name, p in experts.named_parameters(recurse=False) if p.dim() == 3}
    if gated is None or tensors != {first_map(experts), LAST_MAP}:
        raise NotApplicableError(
            f"the experts {path} do not declare how they compute, so that their inputs cannot be "
            "captured; use targets=attention or a method without calibration text"
        )


def first_map(experts: Any) -> str:
    """Return the name of the tensor that reads the layer's own inputs."""
    return "gate_up_proj" if getattr(experts, "has_gate", True) else "up_proj"


def inner_states(experts: Any, states: torch.Tensor, expert: int) -> torch.Tensor:
    """Return what the last map of one expert receives.

    Args:
        states: the layer's inputs that are routed to the expert, shape [tokens, width].

    Returns:
        Shape [tokens, inner width].
    """
    first = _linear(experts, first_map(experts), states, expert)
    inner: torch.Tensor = experts._apply_gate(first) if experts.has_gate else experts.act_fn(first)
    return inner


def require_same(path: str, experts: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Refuse experts whose output is not what their declared layout gives.

    Args:
        inputs: states [tokens, width], indices and weights [tokens, chosen] that the module got.
        output: what it made of them, [tokens, width].

    Raises:
        NotApplicableError: with the path of the module.
    """
    if _routed(inputs) and output.shape == inputs[0].shape:
        states, indices, weights = inputs
        total = torch.zeros_like(states, dtype=torch.float32)
        for expert in indices.unique().tolist():
            here = indices == expert
            own = here.any(-1)
            inner = inner_states(experts, states[own], expert)
            made = _linear(experts, LAST_MAP, inner, expert)
            if experts.has_post_expert_norm:
                made = experts.post_expert_norm(made)
            total[own] += (weights.float() * here).sum(-1, keepdim=True)[own] * made.float()
        allowed = _SAME.get(states.dtype, 1e-3) * total.abs().max()
        if (total - output.float()).abs().max() <= allowed:
            return
    raise NotApplicableError(f"the experts {path} do not compute what their module declares")


def _routed(inputs: tuple[Any, ...]) -> bool:
    """Say whether a module was given states, indices and weights, a row a token each."""
    if len(inputs) != 3 or not all(part.dim() == 2 for part in inputs):
        return False
    states, indices, weights = inputs
    return bool(indices.shape == weights.shape and len(indices) == len(states))


def _linear(experts: Any, name: str, states: torch.Tensor, expert: int) -> torch.Tensor:
    weight = getattr(experts, name)[expert]
    product: torch.Tensor = states @ (weight if experts.is_transposed else weight.T)
    return product + getattr(experts, f"{name}_bias")[expert] if experts.has_bias else product
