"""The frozen base of a low-rank adapter at few bits, as QLoRA trains on it (arXiv 2305.14314)."""

from typing import Any

import torch
from torch import nn

from durometer.core.errors import NotApplicableError
from durometer.core.quantisation import round_to_nearest
from durometer.subjects.base import Subject

GROUP = 64


def round_to_grid(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Return ``weight`` [..., in] on a symmetric grid per group of ``GROUP`` inputs (fp32)."""
    return round_to_nearest(weight.detach(), bits, GROUP)


def base_weights(model: nn.Module) -> list[str]:
    """Return the names of all matrices of linear maps, fused experts included, the head left out.

    Raises:
        NotApplicableError: the model has none.
    """
    find_head: Any = getattr(model, "get_output_embeddings", lambda: None)
    head = find_head()
    names = [
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    ]
    names += [name for name, p in model.named_parameters() if p.dim() > 2 and "expert" in name]
    if not names:
        raise NotApplicableError("no linear maps found to round")
    return names


class RoundedBase:
    """Rounds the linear maps of a subject in place until the subject is restored.

    Attributes:
        errors: what rounding added to each weight, by name (kept to report the whole change).
    """

    def __init__(self, subject: Subject, bits: int) -> None:
        self._bits = bits
        self.errors: dict[str, torch.Tensor] = {}
        names = base_weights(subject.model)
        with torch.no_grad():
            for name, weight in zip(names, subject.restoration.writable(names), strict=True):
                before = weight.detach().clone()
                weight.copy_(round_to_grid(before, bits))
                self.errors[name] = weight.detach() - before

    def facts(self) -> dict[str, Any]:
        """Return bits, group size, method, and the number of weights that were rounded."""
        return {
            "base_bits": self._bits,
            "base_group": GROUP,
            "base_method": "symmetric round to nearest",
            "rounded_weights": sum(error.numel() for error in self.errors.values()),
        }
