"""The weight matrices of a model's blocks, experts that are fused into one tensor included."""

from typing import Any

import torch
from torch import nn

from durometer.core.adapters import Targets, plays
from durometer.core.errors import NotApplicableError
from durometer.core.structure import blocks


def block_matrices(model: nn.Module, targets: Targets) -> dict[str, nn.Parameter]:
    """Return the weights of linear maps and fused experts inside the blocks, by parameter name.

    Embeddings, norms, biases, routers of transformers' own kind and the output head are none. A
    map is [outputs, inputs], fused experts are [experts, outputs, inputs], see ``as_maps``.

    Raises:
        NotApplicableError: there are none.
    """
    modules = dict(model.named_modules())
    prefixes = tuple(f"{name}." for name, _ in blocks(model))
    found = {}
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        linear = isinstance(modules[owner], nn.Linear) and leaf == "weight"
        expert = parameter.dim() == 3 and "expert" in name
        if (linear or expert) and name.startswith(prefixes) and plays(name, targets):
            found[name] = parameter
    if not found:
        raise NotApplicableError(f"no weight matrices found in the blocks for targets={targets}")
    return found


def as_maps(model: nn.Module, name: str, weights: torch.Tensor) -> torch.Tensor:
    """Return a view of ``weights`` as [..., outputs, inputs].

    Some families keep fused experts as [experts, inputs, outputs]; their module says so.
    """
    owner: Any = model.get_submodule(name.rpartition(".")[0])
    swapped = weights.dim() == 3 and bool(getattr(owner, "is_transposed", False))
    return weights.mT if swapped else weights


def refuse_experts(weights: dict[str, nn.Parameter], method: str) -> None:
    """Refuse fused experts, whose inputs no hook sees.

    Raises:
        NotApplicableError: with the name of the first such tensor.
    """
    fused = [name for name, parameter in weights.items() if parameter.dim() > 2]
    if fused:
        raise NotApplicableError(
            f"{method}: experts are fused into one tensor ({fused[0]}), their inputs cannot be "
            "captured; use targets=attention"
        )
