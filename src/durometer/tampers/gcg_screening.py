"""Scoring in bfloat16 first, and exactly whatever may be the best.

A processor with bfloat16 arithmetic multiplies matrices more than twice as fast in it as in fp32,
but the losses then carry an error. It is measured on the fly: some candidates are scored both ways
every step, and a candidate is ruled out only if its rough loss lies above the least exact one by
more than ``MARGIN`` times the largest error that the search has seen.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from durometer.tampers.gcg_prompts import Suffix
from durometer.tampers.gcg_scoring import Scorer

# Fewer candidates than this are scored exactly at once.
SCREENED_FROM = 48
# The least by rough loss that are scored exactly anyway, and others spread over all candidates:
# many on the first step, since the errors of a few say little of the largest.
LEAST, SPREAD_FIRST, SPREAD = 4, 16, 2
MARGIN = 2.0


class Bfloat16Products(TorchFunctionMode):
    """Within it, products with fp32 weights are made in bfloat16; all else stays fp32.

    The model is not touched. Copies of the weights are kept, half their size, from first use on.
    """

    def __init__(self) -> None:
        super().__init__()
        self._copies: dict[nn.Parameter, torch.Tensor] = {}
        self._given = self._rounded = torch.empty(0)
        self._version = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Replace ``linear`` where its weight is an fp32 parameter; see the class."""
        weight = args[1] if func is functional.linear and len(args) > 1 else None
        if not isinstance(weight, nn.Parameter) or weight.dtype != torch.float32:
            return func(*args, **(kwargs or {}))
        if weight not in self._copies:
            self._copies[weight] = weight.detach().bfloat16()
        given, _, *bias = args
        # Queries, keys and values share one input; the version tells whether it was written to.
        if given is not self._given or given._version != self._version:
            self._given, self._version = given, given._version
            self._rounded = given.bfloat16()
        rough = func(self._rounded, self._copies[weight]).float()
        return rough if not bias or bias[0] is None else rough + bias[0]


class Screening:
    """Finds the least exact loss of many while scoring few exactly.

    Attributes:
        error: largest deviation of a rough loss from its exact one, the step's median removed.
        screened, rescored: candidates scored roughly, and those scored exactly after that.
        widened: how often an exact loss was farther off than any before it in the search, the
            first step's not counted.
    """

    def __init__(self, scorer: Scorer) -> None:
        self._scorer, self._products = scorer, Bfloat16Products()
        self.error = 0.0
        self.screened = self.rescored = self.widened = 0

    def losses(self, suffixes: Sequence[Suffix], current: Suffix) -> torch.Tensor:
        """Return exact losses, infinite where ruled out; shape [suffixes], fp32 on the CPU."""
        if len(suffixes) < SCREENED_FROM:
            return self._scorer.losses(suffixes, current)
        self._scorer.extend(current)  # exactly, for the rough and the exact losses alike
        with self._products:
            rough = self._scorer.losses(suffixes, current)
        work = self._scorer.work
        booked = work.tokens, work.candidates
        exact = self._exact(rough, suffixes, current)
        # Scoring a candidate twice costs twice, but it is one candidate.
        work.tokens, work.candidates = booked
        self.screened += len(suffixes)
        return exact

    def summary(self) -> str:
        """Return what was spared and how far the rough losses were off."""
        return (
            f"{self.rescored} of {self.screened} candidates scored again exactly; "
            f"errors up to {self.error:.1e}, widened {self.widened} times"
        )

    def _exact(
        self, rough: torch.Tensor, suffixes: Sequence[Suffix], current: Suffix
    ) -> torch.Tensor:
        exact = torch.full_like(rough, float("inf"))
        known = torch.zeros(len(rough), dtype=torch.bool)
        asked = self._first(rough)
        while len(asked):
            again = self._scorer.losses([suffixes[i] for i in asked.tolist()], current)
            exact[asked], known[asked] = again, True
            asked = self._near(rough, exact, known)
        self.rescored += int(known.sum())
        return exact

    def _first(self, rough: torch.Tensor) -> torch.Tensor:
        """Return the least, and some evenly spread by rough loss; all where one is not finite."""
        if not bool(rough.isfinite().all()):
            return torch.arange(len(rough))
        order = rough.argsort(stable=True)
        count = SPREAD if self.screened else SPREAD_FIRST
        spread = torch.linspace(LEAST, len(order) - 1, count).long()
        chosen: torch.Tensor = torch.cat([order[:LEAST], order[spread]]).unique()
        return chosen

    def _near(self, rough: torch.Tensor, exact: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        """Return those not yet known that may be the best by what is known of the errors."""
        errors = (exact - rough)[known]
        # What all rough losses of a step are off by does not change their order.
        shift = errors.median()
        error = float((errors - shift).abs().max())
        self.widened += bool(self.screened) and error > self.error
        self.error = max(self.error, error)
        bound = exact[known].min() - shift + MARGIN * self.error
        return (~known & (rough <= bound)).nonzero()[:, 0]


def screening_of(scorer: Scorer) -> Screening | str:
    """Return a screening for fp32 weights on a device with bfloat16 arithmetic, or why none."""
    dtype, device = scorer.dtype, scorer.device
    if dtype != torch.float32:
        return f"off: the subject is in {str(dtype).removeprefix('torch.')}"
    if not has_bfloat16(device):
        return f"off: {device.type} has no bfloat16 arithmetic"
    return Screening(scorer)


def has_bfloat16(device: torch.device) -> bool:
    """Return whether the device's arithmetic units take bfloat16, rather than emulate it."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    check = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return bool(check())
