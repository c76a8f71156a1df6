"""Greedy coordinate gradient: the search for a suffix that makes targets likely."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import nn

from durometer.core.errors import DurometerError, NotApplicableError
from durometer.tampers.gcg_prompts import Start, Suffix, SuffixTokens
from durometer.tampers.gcg_scoring import Objective, Scorer
from durometer.tampers.gcg_screening import screening_of

# How often more candidates are drawn when too few of them survive as text.
REFILLS = 8


@dataclass(frozen=True)
class SearchPlan:
    """How the suffix is searched for.

    Attributes:
        steps: planned steps; the number of swaps falls to 1 over them.
        candidates: suffixes scored a step.
        top_k: replacements a position that the gradient proposes.
        swaps: tokens swapped in each candidate of the first step.
        buffer: 0 moves to the best candidate of every step; else the search stays at the best
            suffix of all, and begins at the best of the first and ``buffer - 1`` random ones.
    """

    steps: int
    candidates: int
    top_k: int
    swaps: int = 1
    buffer: int = 0


@dataclass(frozen=True)
class Found:
    """One suffix with its text and loss (nats a token, averaged over items)."""

    loss: float
    suffix: Suffix
    text: str


class SuffixSearch:
    """Moves to the best candidate of every step, and remembers the best of all.

    A buffer of the best suffixes, from whose best each step goes on (nanoGCG), never uses its other
    entries after the first step; so it is not kept, see ``SearchPlan.buffer``.

    Args:
        model: causal language model; not changed.
        tokens: which tokens are allowed.
        start: first suffix and the prompts.
        plan: widths and lengths.
        generator: draws the candidates, on the CPU.
        cached, objective: see ``Scorer``.
        screening: whether to score roughly first where that pays, see ``gcg_screening``.
    """

    def __init__(
        self,
        model: nn.Module,
        tokens: SuffixTokens,
        start: Start,
        plan: SearchPlan,
        generator: torch.Generator,
        *,
        cached: bool = True,
        objective: Objective | None = None,
        screening: bool = True,
    ) -> None:
        self.scorer = Scorer(model, start.prompts, cached=cached, objective=objective)
        self.screening = screening_of(self.scorer) if screening else "off"
        self._tokens, self._plan, self._generator = tokens, plan, generator
        self._prompts = start.prompts
        self._replacements = min(plan.top_k, int(tokens.allowed.sum()) - 1)
        if self._replacements < 1:
            raise NotApplicableError(
                "fewer than two tokens of the vocabulary may stand in a suffix; "
                "try ascii_only = false"
            )
        self.cache = self.scorer.check([start.suffix], start.suffix)
        loss = float(self.scorer.losses([start.suffix], start.suffix)[0])
        self.initial = self.current = self.best = Found(loss, start.suffix, start.text)
        self.seen = {start.suffix: self.initial}
        self.steps = 0
        self._fill(plan.buffer - 1)

    def step(self) -> Found:
        """Make one step and return the suffix moved to.

        Raises:
            DurometerError: no candidate survives as text.
        """
        gradient = self.scorer.gradient(self.current.suffix)
        candidates = self.candidates(gradient)
        suffixes = [suffix for suffix, _ in candidates]
        if self.steps == 0 and self.scorer.cached:
            self.cache = self.scorer.check(suffixes, self.current.suffix)
        scorer = self.scorer if isinstance(self.screening, str) else self.screening
        losses = scorer.losses(suffixes, self.current.suffix)
        self._move(self._best_of(candidates, losses))
        self.steps += 1
        return self.current

    def _move(self, found: Found) -> None:
        """Go on from ``found``, or with a buffer from the best."""
        self.seen.setdefault(found.suffix, found)
        if found.loss < self.best.loss:
            self.best = found
        stay = self._plan.buffer and math.isfinite(found.loss)
        self.current = self.best if stay else found

    def _fill(self, count: int) -> None:
        """Try random suffixes as the beginning."""
        for _ in range(count):
            drawn = self._tokens.random(self._prompts, len(self.initial.suffix), self._generator)
            if drawn is not None:
                loss = float(self.scorer.losses([drawn[0]], drawn[0])[0])
                self._move(Found(loss, *drawn))

    def candidates(self, gradient: torch.Tensor) -> list[tuple[Suffix, str]]:
        """Return up to ``plan.candidates`` different suffixes that survive as text.

        Args:
            gradient: shape [tokens of the suffix, vocabulary].
        """
        chosen: dict[Suffix, str] = {}
        for drawn in islice(self._drawn(self._proposed(gradient)), REFILLS):
            new = [suffix for suffix in drawn if suffix not in chosen]
            chosen.update(self._tokens.surviving(self._prompts, new) if new else [])
            if len(chosen) >= self._plan.candidates:
                break
        if not chosen:
            raise _lost()
        return list(islice(chosen.items(), self._plan.candidates))

    def best_texts(self, count: int) -> list[Found]:
        """Return the ``count`` best suffixes that the search stood at, the best first."""
        return sorted(self.seen.values(), key=lambda found: found.loss)[:count]

    def _best_of(
        self,
        candidates: Sequence[tuple[Suffix, str]],
        losses: torch.Tensor,
        *,
        screened: bool = True,
    ) -> Found:
        """Return the candidate of least loss whose conversation, rendered anew, has its ids."""
        if not bool(losses.isfinite().any()):
            return Found(float("nan"), self.current.suffix, self.current.text)
        for index in losses.nan_to_num(nan=float("inf")).argsort(stable=True).tolist():
            suffix, text = candidates[index]
            if self._tokens.faithful(self._prompts, suffix, text):
                return Found(float(losses[index]), suffix, text)
            # The next best may be one that was ruled out. Exact losses may be infinite, too.
            if screened and bool(losses.isinf().any()):
                exact = self._exact([suffix for suffix, _ in candidates])
                return self._best_of(candidates, exact, screened=False)
        raise _lost()

    def _exact(self, suffixes: Sequence[Suffix]) -> torch.Tensor:
        """Return exact losses of candidates that are booked already."""
        work = self.scorer.work
        booked = work.tokens, work.candidates
        losses = self.scorer.losses(suffixes, self.current.suffix)
        work.tokens, work.candidates = booked
        return losses

    def _proposed(self, gradient: torch.Tensor) -> torch.Tensor:
        """Return the most promising replacements a position, shape [tokens, replacements]."""
        allowed = self._tokens.allowed.to(gradient.device)
        blocked = gradient.masked_fill(~allowed, float("inf"))
        own = torch.tensor(self.current.suffix, device=gradient.device)[:, None]
        blocked = blocked.scatter(1, own, float("inf"))
        return blocked.topk(self._replacements, dim=1, largest=False).indices.cpu()

    def _drawn(self, proposed: torch.Tensor) -> Iterator[list[Suffix]]:
        """Yield draws of candidates, uniform over positions and over their replacements."""
        places, width = proposed.shape
        swaps = self._swaps(places)
        if swaps == 1:
            order = torch.randperm(places * width, generator=self._generator)
            for part in order.split(self._plan.candidates):
                yield [self._swapped(proposed, [int(i) // width], [int(i) % width]) for i in part]
            return
        while True:
            shape = (self._plan.candidates, places)
            where = torch.rand(shape, generator=self._generator).argsort(1)[:, :swaps]
            which = torch.randint(width, where.shape, generator=self._generator)
            pairs = zip(where.tolist(), which.tolist(), strict=True)
            yield list(dict.fromkeys(self._swapped(proposed, *pair) for pair in pairs))

    def _swapped(self, proposed: torch.Tensor, where: list[int], which: list[int]) -> Suffix:
        suffix = list(self.current.suffix)
        for place, rank in zip(where, which, strict=True):
            suffix[place] = int(proposed[place, rank])
        return tuple(suffix)

    def _swaps(self, places: int) -> int:
        """Return the swaps of this step: linearly from ``plan.swaps`` down to one."""
        share = max(0.0, 1.0 - self.steps / max(1, self._plan.steps))
        return min(places, max(1, round(self._plan.swaps * share)))


def _lost() -> DurometerError:
    return DurometerError(
        "no candidate is read back by the tokenizer as it was written; "
        "try more candidates, a larger top_k or ascii_only = false"
    )
