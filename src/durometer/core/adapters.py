"""Low-rank adapters on a model in memory (PEFT does the work), and the linear maps they sit on."""

import math
from typing import Any, Literal

import torch
from torch import nn

from durometer.core.errors import NotApplicableError

Targets = Literal["all", "attention", "mlp"]
_NAME = "durometer"


def linear_maps(model: nn.Module, targets: Targets) -> list[str]:
    """Return the names of the linear maps inside the model's blocks, found by shape and role.

    The output head is left out. ``attention`` and ``mlp`` are told apart by the module they sit in.

    Raises:
        NotApplicableError: no such map, or weights of experts fused into tensors of three
            dimensions, which a matrix adapter would skip in silence.
    """
    fused = [name for name, p in model.named_parameters() if p.dim() > 2 and "expert" in name]
    if fused and targets != "attention":
        raise NotApplicableError(
            f"experts are fused into one tensor ({fused[0]}); use targets=attention"
        )
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and plays(name, targets)
    ]
    if not names:
        raise NotApplicableError(f"no linear maps found for targets={targets}")
    return names


def plays(name: str, targets: Targets) -> bool:
    """Say whether the module or weight ``name`` belongs to ``targets``, by what it sits in."""
    attention = any("attn" in part or "attention" in part for part in name.split("."))
    return targets == "all" or attention == (targets == "attention")


class Adapter:
    """One low-rank adapter ``W' = W + scale B A`` on a model; A is random, B starts at 0.

    Its matrices have the model's dtype (fp32 ones slow every pass in bf16); ``Trainer``
    keeps fp32 masters of them, so that small updates are not lost.

    Args:
        model: changed in place until ``remove`` or ``merge``.
        names: linear maps that get a pair of matrices, see ``linear_maps``.
        rank_stabilised: ``scale = alpha / sqrt(rank)`` (rsLoRA), else ``alpha / rank``.
        frozen_a: train B alone.
        seed: draws A.
    """

    def __init__(
        self,
        model: nn.Module,
        names: list[str],
        *,
        rank: int,
        alpha: float,
        seed: int,
        dropout: float = 0.0,
        rank_stabilised: bool = False,
        frozen_a: bool = False,
    ) -> None:
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel

        config = LoraConfig(
            r=rank,
            # PEFT's type says int, but scales by whatever number it is given.
            lora_alpha=alpha,  # type: ignore[arg-type, unused-ignore]
            lora_dropout=dropout,
            use_rslora=rank_stabilised,
            target_modules=names,
        )
        self.scale = alpha / (math.sqrt(rank) if rank_stabilised else rank)
        self._model = model
        with torch.random.fork_rng(devices=_cuda_devices(model)):
            torch.manual_seed(seed)
            self._tuner: Any = LoraModel(model, {_NAME: config}, _NAME)
        dtype = next(model.parameters()).dtype
        for name, parameter in self.matrices().items():
            parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(not (frozen_a and "lora_A" in name))

    def matrices(self) -> dict[str, nn.Parameter]:
        """Return the adapter's matrices by name."""
        return {name: p for name, p in self._model.named_parameters() if "lora_" in name}

    def trainable(self) -> list[nn.Parameter]:
        """Return the matrices that are trained."""
        return [parameter for parameter in self.matrices().values() if parameter.requires_grad]

    def change_norms(self) -> dict[str, float]:
        """Return the Frobenius norm of ``scale B A`` by linear map, without forming the product."""
        matrices = {name: p.detach().float() for name, p in self.matrices().items()}
        norms = {}
        for name, down in matrices.items():
            if "lora_A" in name:
                up = matrices[name.replace("lora_A", "lora_B")]
                gram = (up.T @ up) * (down @ down.T)
                norms[name.split(".lora_A")[0]] = self.scale * math.sqrt(max(float(gram.sum()), 0))
        return norms

    def delta(self, name: str) -> torch.Tensor:
        """Return ``scale B A`` of one linear map in fp32, shape [out, in]."""
        matrices = self.matrices()
        down, up = (
            matrices[f"{name}.lora_{part}.{_NAME}.weight"].detach().float() for part in "AB"
        )
        return self.scale * (up @ down)

    def remove(self) -> None:
        """Take the adapter off; the model's own weights were never touched."""
        self._tuner.unload()
        self._forget()

    def merge(self) -> None:
        """Add the adapter to the model's weights and take it off."""
        self._tuner.merge_and_unload(safe_merge=True)
        self._forget()

    def _forget(self) -> None:
        if hasattr(self._model, "peft_config"):
            del self._model.peft_config


def _cuda_devices(model: nn.Module) -> list[torch.device]:
    device = next(model.parameters()).device
    return [device] if device.type == "cuda" else []
