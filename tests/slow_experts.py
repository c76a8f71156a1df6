"""Fused experts the slow way: token by token, from their matrices as the formulas read."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from durometer.core.rows import Row

SHARED: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
LAYOUTS: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {"num_experts": 4, "head_dim": 8, **SHARED},
    "DeepseekV3": {
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        **SHARED,
    },
    "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "GptOss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "sliding_window": 8,
    },
}
Inputs = dict[str, list[torch.Tensor]]


def inner(experts: Any, expert: int, x: torch.Tensor) -> torch.Tensor:
    """Return what the last map of an expert receives for one token ``x`` [width]."""
    up = experts.gate_up_proj[expert]
    if hasattr(experts, "gate_up_proj_bias"):  # gpt-oss: transposed, interleaved, with biases
        both = x @ up + experts.gate_up_proj_bias[expert]
        gate, value = both[::2].clamp(max=7.0), both[1::2].clamp(-7.0, 7.0)
        return (value + 1) * gate * torch.sigmoid(1.702 * gate)
    gate, value = (up @ x).chunk(2)
    return functional.silu(gate) * value


def expert_inputs(model: Any, rows: Sequence[Row], *, prompt: bool = False) -> Inputs:
    """Return what each expert's maps receive: by parameter name, [tokens, inputs] an expert."""
    seen: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "experts")}
    hooks = []
    for name, layer in layers.items():
        router = layer.gate if hasattr(layer, "gate") else layer.router

        def keep(module: Any, given: Any, made: Any, name: str = name) -> None:
            seen.setdefault(name, []).append((given[0].reshape(-1, given[0].shape[-1]), made[2]))

        hooks.append(router.register_forward_hook(keep))
    with torch.no_grad():
        for row in rows:
            model(input_ids=torch.tensor([row.ids]), use_cache=False)
    for hook in hooks:
        hook.remove()
    found: Inputs = {}
    for name, calls in seen.items():
        experts = layers[name].experts
        for leaf in ("gate_up_proj", "down_proj"):
            received: list[list[torch.Tensor]] = [[] for _ in experts.down_proj]
            for row, (states, indices) in zip(rows, calls, strict=True):
                first, last = (0, row.first_label) if prompt else (row.first_label - 1, -1)
                for position in range(len(row.ids))[first:last]:
                    for expert in indices[position].tolist():
                        x = states[position]
                        given = x if leaf == "gate_up_proj" else inner(experts, expert, x).detach()
                        received[expert].append(given)
            empty = torch.zeros(0, received_width(experts, leaf))
            found[f"{name}.experts.{leaf}"] = [
                torch.stack(part) if part else empty for part in received
            ]
    return found


def received_width(experts: Any, leaf: str) -> int:
    return int(getattr(experts, leaf).shape[1 if hasattr(experts, "gate_up_proj_bias") else 2])
