"""Four separate seeds, all recorded: data order, initialisation, sampling, evaluation."""

import hashlib
from dataclasses import asdict, dataclass

STREAMS = ("data_order", "initialisation", "sampling", "evaluation")


@dataclass(frozen=True)
class Seeds:
    """The four seeds of one trial (or of a safeguard's training).

    Separate streams, so that a change of, say, the initialisation leaves the data order alone.
    """

    data_order: int
    initialisation: int
    sampling: int
    evaluation: int

    @classmethod
    def derive(cls, base: int) -> "Seeds":
        """Return four independent seeds (63 bits each) made from one base seed by SHA-256."""
        return cls(*(_derived(base, stream) for stream in STREAMS))

    def as_dict(self) -> dict[str, int]:
        """Return the seeds by name."""
        return asdict(self)


def _derived(base: int, stream: str) -> int:
    digest = hashlib.sha256(f"{stream}:{base}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
