"""The frozen base of a low-rank adapter at few bits, as QLoRA trains on it (arXiv 2305.14314)."""

from typing import Any

import torch

from durometer.core.matrices import block_matrices
from durometer.core.quantisation import round_to_nearest
from durometer.subjects.base import Subject

GROUP = 64


def round_to_grid(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Return ``weight`` [..., in] on a symmetric grid per group of ``GROUP`` inputs (fp32)."""
    return round_to_nearest(weight.detach(), bits, GROUP)


class RoundedBase:
    """Rounds the matrices of a subject's blocks in place until the subject is restored."""

    def __init__(self, subject: Subject, bits: int) -> None:
        self._bits = bits
        matrices = block_matrices(subject.model)
        self._count = sum(matrix.parameter.numel() for matrix in matrices.values())
        subject.restoration.writable(matrices)
        with torch.no_grad():
            for matrix in matrices.values():
                matrix.maps().copy_(round_to_grid(matrix.maps(), bits))

    def facts(self) -> dict[str, Any]:
        """Return bits, group size, method, and the number of weights that were rounded."""
        return {
            "base_bits": self._bits,
            "base_group": GROUP,
            "base_method": "symmetric round to nearest",
            "rounded_weights": self._count,
        }
