"""What an attack may spend, and what it spent."""

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from durometer.core.errors import InputError
from durometer.core.routing import idle_entries


@dataclass(frozen=True)
class Budget:
    """Upper limits of one attack; None means unlimited on that axis.

    Attributes:
        steps: optimiser updates.
        rungs: updates after which the subject is measured, ascending, 0 left out.
    """

    steps: int
    rungs: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise InputError(f"budget: steps = {self.steps} must not be negative")

    def within(self, rungs: tuple[int, ...]) -> "Budget":
        """Return the budget with those of ``rungs`` that it can reach, the last step included."""
        reachable = {rung for rung in rungs if 0 < rung <= self.steps}
        if self.steps:
            reachable.add(self.steps)
        return Budget(self.steps, tuple(sorted(reachable)))


@dataclass
class Spent:
    """What an attack has spent so far.

    Attributes:
        steps: optimiser updates.
        examples: unique training examples seen.
        restricted_examples: unique restricted examples among them.
        tokens: tokens processed, as they would be without any sharing of prefixes.
        flops: floating-point operations by the closed formula (see ``training_flops``).
        seconds: wall-clock seconds of the attack itself, measuring excluded.
    """

    steps: int = 0
    examples: int = 0
    restricted_examples: int = 0
    tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0

    def as_dict(self) -> dict[str, float]:
        """Return the counters by name."""
        return asdict(self)


def matrix_entries(model: nn.Module) -> int:
    """Return N: the matrix entries that one token meets, embeddings and output head left out.

    Of routed experts those that it goes to are counted (see ``idle_entries``), shared ones fully.

    The output head is counted apart (``2 d V`` a position), since a head tied to the embedding
    would otherwise be counted twice. Adapter matrices are left out.
    """
    find_head: Any = getattr(model, "get_output_embeddings", lambda: None)
    head = find_head()
    skip = {id(head.weight)} if head is not None else set()
    skip |= {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    held = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.dim() >= 2 and id(parameter) not in skip and "lora_" not in name
    )
    return held - idle_entries(model)


def training_flops(
    entries: int, tokens: int, head_entries: int, labels: int, *, full: bool
) -> float:
    """Return the FLOPs of one forward and backward pass.

    ``6 N T`` when all weights get gradients, ``4 N T`` when only adapters do (frozen matrices need
    no weight gradient); the head costs ``2 d V`` a labelled position forward, as much again back to
    the hidden states, and once more when it is trained. Attention scores are left out (small at
    the lengths used here).

    Args:
        entries: N, see ``matrix_entries``.
        tokens: T, tokens processed.
        head_entries: ``d V``, entries of the output head.
        labels: positions at which logits are computed.
        full: whether all weights are trained.
    """
    passes = 3 if full else 2
    return 2.0 * passes * (entries * tokens + head_entries * labels)
