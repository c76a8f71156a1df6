"""How sure a subject is of an answer: perplexity, entropy of ten tokens, token probability.

For the tokens y_1 .. y_T of an answer to a prompt x (after arXiv 2409.07085):

* perplexity ``exp(-(1/T) sum_t log p(y_t | y_<t, x))``
* entropy ``-(1/T) sum_t sum_i q_t(i) log q_t(i)`` over the ten likeliest tokens, whose
  probabilities ``q_t`` are renormalised
* token probability ``(1/T) sum_t p(y_t | y_<t, x)``

in nats, from one teacher-forced pass over what was answered, the token that ended it included. The
code released with arXiv 2409.19476 computes something else (``RELEASED``); each difference is a
switch of ``Convention``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from durometer.core.forward import Forward
from durometer.core.generation import TOP, Generated
from durometer.core.rows import NODES_PER_SCORING_PACK, Row

__all__ = [
    "RELEASED",
    "Convention",
    "Spread",
    "Uncertainty",
    "answer_row",
    "pooled",
    "spread",
    "token_uncertainty",
    "uncertainties",
]


@dataclass(frozen=True)
class Convention:
    """Which tokens count, and how.

    Attributes:
        tokens: the probability of the token that was emitted, or of the likeliest one.
        last: whether the last token of an answer counts.
        renormalised: whether the probabilities of the ten likeliest tokens sum to 1.
    """

    tokens: Literal["emitted", "top_1"] = "emitted"
    last: Literal["kept", "dropped"] = "kept"
    renormalised: bool = True


PLAIN = Convention()
RELEASED = Convention("top_1", "dropped", renormalised=False)
"""What the code released with arXiv 2409.19476 computes."""


@dataclass(frozen=True)
class Uncertainty:
    """Sums over the tokens of one answer, so that answers can be pooled.

    Attributes:
        tokens: T, at least 1.
        log_probability: sum of log-probabilities, nats.
        entropy_sum: sum of entropies, nats.
        probability_sum: sum of probabilities.
    """

    tokens: int
    log_probability: float
    entropy_sum: float
    probability_sum: float

    @property
    def perplexity(self) -> float:
        """Perplexity, at least 1; infinite where it is too large for a float."""
        mean = -self.log_probability / self.tokens
        return math.exp(mean) if mean < 700 else math.inf

    @property
    def entropy(self) -> float:
        """Mean entropy of the ten likeliest tokens, nats."""
        return self.entropy_sum / self.tokens

    @property
    def probability(self) -> float:
        """Mean token probability."""
        return self.probability_sum / self.tokens


def answer_row(prompt: Sequence[int], answer: Generated) -> Row | None:
    """Return the row whose labels are an answer with the token that ended it; None without any."""
    labels = [*answer.ids, *([] if answer.end is None else [answer.end])]
    return Row((*prompt, *labels), len(prompt)) if labels else None


def token_uncertainty(
    logits: torch.Tensor, targets: torch.Tensor, convention: Convention = PLAIN
) -> Uncertainty | None:
    """Return the uncertainty of one answer; None where the convention leaves no token.

    Args:
        logits: shape [tokens, vocabulary]; computed on in fp32.
        targets: the tokens that were emitted, shape [tokens].
    """
    if convention.last == "dropped":
        logits, targets = logits[:-1], targets[:-1]
    if not len(targets):
        return None
    exact = logits.float().log_softmax(-1)
    top = exact.topk(min(TOP, exact.shape[-1]), dim=-1).values
    chosen = exact.gather(1, targets[:, None])[:, 0]
    if convention.tokens == "top_1":
        chosen = top[:, 0]
    shares = top - top.logsumexp(-1, keepdim=True) if convention.renormalised else top
    entropies = -(shares.exp() * shares.clamp_min(-1e4)).sum(-1)
    return Uncertainty(
        len(targets),
        float(chosen.double().sum()),
        float(entropies.double().sum()),
        float(chosen.double().exp().sum()),
    )


@torch.no_grad()
def uncertainties(
    forward: Forward, rows: Sequence[Row], *conventions: Convention
) -> list[tuple[Uncertainty | None, ...]]:
    """Return the uncertainty of every row's labels under each convention, in the order given."""
    chosen = conventions or (PLAIN,)
    order = sorted(range(len(rows)), key=lambda index: rows[index].ids)
    found: dict[int, tuple[Uncertainty | None, ...]] = {}
    for part in forward.labelled([rows[index] for index in order], NODES_PER_SCORING_PACK):
        for row in sorted(set(part.rows.tolist())):
            own = part.rows == row
            logits, targets = part.logits[own], part.targets[own]
            found[order[row]] = tuple(token_uncertainty(logits, targets, c) for c in chosen)
    return [found[index] for index in range(len(rows))]


def pooled(answers: Sequence[Uncertainty]) -> Uncertainty | None:
    """Return the uncertainty over the tokens of all answers, long ones counting for more."""
    if not answers:
        return None
    return Uncertainty(
        sum(one.tokens for one in answers),
        math.fsum(one.log_probability for one in answers),
        math.fsum(one.entropy_sum for one in answers),
        math.fsum(one.probability_sum for one in answers),
    )


@dataclass(frozen=True)
class Spread:
    """The mean of single values with both of what is easily taken for each other.

    Attributes:
        n: values.
        mean: their mean.
        deviation: standard deviation of single values (n - 1); None for one value.
        standard_error: of the mean, ``deviation / sqrt(n)``; None for one value.
    """

    n: int
    mean: float
    deviation: float | None
    standard_error: float | None


def spread(values: Sequence[float]) -> Spread | None:
    """Return the mean of finite values with deviation and standard error; None without any."""
    kept = [value for value in values if math.isfinite(value)]
    if not kept:
        return None
    mean = math.fsum(kept) / len(kept)
    if len(kept) == 1:
        return Spread(1, mean, None, None)
    variance = math.fsum((value - mean) ** 2 for value in kept) / (len(kept) - 1)
    deviation = math.sqrt(variance)
    return Spread(len(kept), mean, deviation, deviation / math.sqrt(len(kept)))
