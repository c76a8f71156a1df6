"""Generation of short answers, without work on shared beginnings or finished rows.

The result is that of ordinary greedy decoding, or of ordinary sampling. What is saved: the common
beginning of the prompts is run once and its cache shared; prompts are sorted by length, so that
padding is small; a row leaves the batch as soon as it has ended, or as soon as the caller says that
its outcome is decided.
"""

import copy
import hashlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from durometer.core.beginnings import common, run_beginning

BATCH = 96
TOP = 10
FinishReason = Literal["stop", "decided", "length"]
# Says whether more text could still change the outcome of prompt number i: (i, ids so far) ->
# decided.
Decided = Callable[[int, Sequence[int]], bool]


@dataclass
class Generated:
    """One response.

    Attributes:
        ids: generated token ids, without the token that ended the response.
        finish_reason: ``stop`` (end of turn), ``decided`` or ``length``.
        log_probability: sum of the log-probabilities of the generated tokens, nats; those of the
            model itself (temperature 1, nothing cut off) also where the tokens were sampled.
        mean_probability: their mean probability; 0 for an empty response.
        top_entropy: mean entropy of the ten likeliest tokens, renormalised, nats.
        end: the token that ended it, None where the model did not end it.
    """

    ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason = "length"
    log_probability: float = 0.0
    mean_probability: float = 0.0
    top_entropy: float = 0.0
    end: int | None = None


@dataclass(frozen=True)
class Decoding:
    """How responses are drawn.

    Attributes:
        tries: responses a prompt; the attacker keeps the best.
        temperature: 0 takes the likeliest token.
        top_p: share of the probability that is sampled from: the fewest tokens, likeliest first,
            that hold at least this much of it (arXiv 1904.09751); 1 cuts nothing off.
        seed: of the draws. A prompt's draws depend on the seed, the prompt and how many equal
            prompts came before it, not on what else is generated along with it.
        max_tokens: longest response; None leaves it to who measures.
    """

    tries: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    max_tokens: int | None = None

    @property
    def different_tries(self) -> int:
        """Responses a prompt that can differ: greedy decoding gives the same one every time."""
        return self.tries if self.temperature > 0 else 1


GREEDY = Decoding()


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Sequence[tuple[int, ...]],
    *,
    max_tokens: int,
    stop_ids: frozenset[int],
    decided: Decided | None = None,
    share_prefix: bool = True,
    batch: int = BATCH,
    decoding: Decoding = GREEDY,
) -> list[Generated]:
    """Continue every prompt.

    Args:
        model: causal language model of transformers, in evaluation mode.
        prompts: token ids, not empty; equal ones are sampled independently of each other.
        max_tokens: longest response.
        stop_ids: tokens that end a response.
        decided: asked after every token of a row; True ends the row.
        share_prefix: run the prompts' common beginning once (only for plain causal attention).
        batch: most rows at a time.
        decoding: temperature, top-p and seed; ``tries`` and ``max_tokens`` in it are the caller's
            affair.

    Returns:
        One response a prompt, in the order given.
    """
    order = sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), prompts[index]))
    results = [Generated() for _ in prompts]
    prefix = _shared(prompts) if share_prefix and len(prompts) > 1 else 0
    head = run_beginning(model, prompts[0][:prefix]) if prefix else None
    draws = _draws(prompts, max_tokens, decoding) if decoding.temperature > 0 else None
    for start in range(0, len(order), batch):
        members = order[start : start + batch]
        rows = _Rows(model, members, results, prefix, _Sampler(decoding, draws) if draws else None)
        logits = rows.prefill(prompts, head)
        for _ in range(max_tokens):
            going = rows.accept(logits, stop_ids, decided)
            if not rows.keep(going):
                break
            logits = rows.advance()
    for result in results:
        _average(result)
    return results


def _shared(prompts: Sequence[tuple[int, ...]]) -> int:
    """Return the length of the common beginning, at least one token of each prompt left out."""
    # Between the least and the greatest of sorted sequences everything shares what these two share.
    same = common(min(prompts), max(prompts))
    return min(same, min(len(prompt) for prompt in prompts) - 1)


def _draws(
    prompts: Sequence[tuple[int, ...]], max_tokens: int, decoding: Decoding
) -> list[torch.Tensor]:
    """Return uniform draws from [0, 1), one a token, for every prompt: shape [max_tokens]."""
    seen: Counter[tuple[int, ...]] = Counter()
    draws = []
    for prompt in prompts:
        key = f"{decoding.seed}:{seen[prompt]}:{prompt}".encode()
        seen[prompt] += 1
        seed = int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 1
        generator = torch.Generator().manual_seed(seed)
        draws.append(torch.rand(max_tokens, generator=generator, dtype=torch.float64))
    return draws


class _Sampler:
    """Turns uniform draws into tokens by the inverse of the cumulated probabilities.

    Args:
        draws: by prompt number, shape [max_tokens] each.
    """

    def __init__(self, decoding: Decoding, draws: list[torch.Tensor]) -> None:
        self._decoding = decoding
        self._draws = draws
        self._place = 0

    def take(self, log_probabilities: torch.Tensor, members: Sequence[int]) -> torch.Tensor:
        """Return one token a row, shape [rows]; ``members`` are the rows' prompt numbers."""
        uniform = torch.stack([self._draws[index][self._place] for index in members])
        self._place += 1
        scaled = log_probabilities.double() / self._decoding.temperature
        probabilities, tokens = scaled.softmax(-1).sort(dim=-1, descending=True, stable=True)
        cumulated = probabilities.cumsum(-1)
        if self._decoding.top_p < 1:
            # A token is kept if those before it hold less than top-p: the likeliest always is.
            kept = (cumulated - probabilities < self._decoding.top_p).sum(-1, keepdim=True)
        else:
            kept = torch.full_like(tokens[:, :1], tokens.shape[-1])
        mass = cumulated.gather(1, (kept - 1).clamp(min=0))
        places = torch.searchsorted(cumulated, uniform[:, None].to(mass.device) * mass, right=True)
        taken: torch.Tensor = tokens.gather(1, places.minimum(kept - 1).clamp(min=0))[:, 0]
        return taken


class _Rows:
    """The rows of one batch that are still being generated, with their cache."""

    def __init__(
        self,
        model: Any,
        members: list[int],
        results: list[Generated],
        prefix: int,
        sampler: _Sampler | None = None,
    ) -> None:
        self._model = model
        self._device = next(model.parameters()).device
        self._members = members
        self._results = results
        self._prefix = prefix
        self._sampler = sampler
        self._cache: Any = None
        self._mask = torch.empty(0)
        self._positions = torch.empty(0)
        self._tokens = torch.empty(0)

    def prefill(self, prompts: Sequence[tuple[int, ...]], head: Any) -> torch.Tensor:
        """Run the prompts, left-padded behind the shared head; return logits [rows, vocabulary]."""
        from transformers import DynamicCache

        parts = [prompts[index][self._prefix :] for index in self._members]
        # Tries of one prompt share its cache; greedy ones are never asked for twice.
        repeats = None
        if self._sampler is not None and len(set(parts)) < len(parts):
            places = {part: place for place, part in enumerate(dict.fromkeys(parts))}
            repeats = torch.tensor([places[part] for part in parts], device=self._device)
            parts = list(places)
        longest = max(len(part) for part in parts)
        ids = torch.zeros(len(parts), longest, dtype=torch.long)
        own = torch.zeros_like(ids)
        for row, part in enumerate(parts):
            ids[row, longest - len(part) :] = torch.tensor(part)
            own[row, longest - len(part) :] = 1
        shared = torch.ones(len(parts), self._prefix, dtype=torch.long)
        self._mask = torch.cat([shared, own], dim=1).to(self._device)
        positions = (self._mask.cumsum(1) - 1).clamp(min=0)[:, self._prefix :]
        if head is None:
            self._cache = DynamicCache(config=self._model.config)
        else:
            self._cache = copy.deepcopy(head)
            self._cache.batch_repeat_interleave(len(parts))
        self._positions = positions[:, -1:]
        logits = self._pass(ids.to(self._device), positions)
        if repeats is not None:
            self._cache.batch_select_indices(repeats)
            self._mask, self._positions = self._mask[repeats], self._positions[repeats]
            logits = logits[repeats]
        return logits

    def accept(
        self, logits: torch.Tensor, stop_ids: frozenset[int], decided: Decided | None
    ) -> list[int]:
        """Take a token of every row; return the places of the rows that go on."""
        log_probabilities = logits.float().log_softmax(-1)
        top = log_probabilities.topk(min(TOP, logits.shape[-1]), dim=-1).values
        taken, tokens = log_probabilities.max(-1)
        if self._sampler is not None:
            tokens = self._sampler.take(log_probabilities, self._members)
            taken = log_probabilities.gather(1, tokens[:, None])[:, 0]
        shares = (top - top.logsumexp(-1, keepdim=True)).exp()
        entropies = -(shares * shares.clamp_min(1e-12).log()).sum(-1)
        self._tokens = tokens
        columns = (tokens.tolist(), taken.tolist(), entropies.tolist())
        going = []
        for place, (token, chosen, entropy) in enumerate(zip(*columns, strict=True)):
            index = self._members[place]
            result = self._results[index]
            result.log_probability += chosen
            if token in stop_ids:
                result.finish_reason, result.end = "stop", token
                continue
            result.ids.append(token)
            result.mean_probability += math.exp(chosen)
            result.top_entropy += entropy
            if decided is not None and decided(index, result.ids):
                result.finish_reason = "decided"
                continue
            going.append(place)
        return going

    def keep(self, going: list[int]) -> bool:
        """Drop the rows that are finished; return whether any is left."""
        if going and len(going) < len(self._members):
            places = torch.tensor(going, device=self._device)
            self._members = [self._members[place] for place in going]
            self._cache.batch_select_indices(places)
            self._mask, self._positions = self._mask[places], self._positions[places]
            self._tokens = self._tokens[places]
        return bool(going)

    def advance(self) -> torch.Tensor:
        """Run the tokens just taken; return the next logits, shape [rows, vocabulary]."""
        ones = torch.ones(len(self._members), 1, dtype=self._mask.dtype, device=self._device)
        self._mask = torch.cat([self._mask, ones], dim=1)
        self._positions = self._positions + 1
        return self._pass(self._tokens[:, None], self._positions)

    def _pass(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        # An index, not a count: a count slices, and the product of a slice with the output head
        # copies the whole head once a row (half of the time of a batch on a CPU).
        last = torch.tensor([ids.shape[1] - 1], device=self._device)
        logits: torch.Tensor = self._model(
            input_ids=ids,
            attention_mask=self._mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=last,
        ).logits[:, -1]
        return logits


def _average(result: Generated) -> None:
    count = len(result.ids)
    if count:
        result.mean_probability /= count
        result.top_entropy /= count
