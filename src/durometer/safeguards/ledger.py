"""What a safeguard's training costs."""

import resource
import sys
from dataclasses import asdict, dataclass, field

import torch


@dataclass
class Ledger:
    """Counted while a safeguard trains; a pass is one forward and backward of one batch.

    Attributes:
        steps: updates of the safeguard.
        passes: passes by place: ``weights``, ``attacked``, a probe's name, ``inner`` (updates of
            inner attacks).
        reference_forwards: forwards of the frozen reference, counted apart.
        tokens: tokens of all passes, rows counted in full.
        attacks: inner attacks begun.
        diverged_attacks: those that ended early since they diverged.
        seconds: wall-clock seconds.
        peak_memory: bytes, of the device where it tells, else of the process.
    """

    steps: int = 0
    passes: dict[str, int] = field(default_factory=dict)
    reference_forwards: int = 0
    tokens: int = 0
    attacks: int = 0
    diverged_attacks: int = 0
    seconds: float = 0.0
    peak_memory: int = 0

    @property
    def all_passes(self) -> int:
        """Passes of all places."""
        return sum(self.passes.values())

    def count(self, place: str, tokens: int) -> None:
        """Count one pass."""
        self.passes[place] = self.passes.get(place, 0) + 1
        self.tokens += tokens

    def close(self, device: torch.device) -> None:
        """Note the peak memory."""
        if device.type == "cuda":
            self.peak_memory = torch.cuda.max_memory_allocated(device)
            return
        unit = 1 if sys.platform == "darwin" else 1024
        self.peak_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def as_dict(self) -> dict[str, object]:
        """Return the counters by name."""
        return asdict(self) | {"all_passes": self.all_passes}
