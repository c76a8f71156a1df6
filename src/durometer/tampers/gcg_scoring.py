"""Losses of many suffixes that differ little, and the gradient that proposes them.

All candidates of a step share the prompt before the suffix and the suffix up to the first swapped
token. Both are run once and kept as keys and values; candidates are sorted by their first swap, so
that each runs only what follows it. Logits are computed at the target alone. None of this changes
a loss beyond rounding, and ``Scorer.check`` tries that on the first step.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional

from durometer.tampers.gcg_prompts import Suffix, SuffixPrompt

# Tokens a pass: a new one is begun at a new first swap once the old one keeps the device busy.
ENOUGH_TOKENS = {"cpu": 192, "other": 2048}
MOST_TOKENS = {"cpu": 1024, "other": 16384}
# Entries of the logits of one pass (256 MiB in fp32).
MOST_LOGITS = 2**26
ObjectiveName = Literal["cross_entropy", "mellowmax", "margin"]
# Largest difference of losses with and without the cache, relative to the loss.
CACHE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.02}
CHECKED = 4


@dataclass
class Work:
    """What the passes cost.

    Attributes:
        tokens: tokens as they would be without any sharing.
        forward_tokens, forward_labels: tokens really run, and positions with logits.
        gradient_tokens, gradient_labels: the same of passes with a gradient.
        candidates: sequences scored.
        halvings: how often a pass was out of memory and was made in halves.
    """

    tokens: int = 0
    forward_tokens: int = 0
    forward_labels: int = 0
    gradient_tokens: int = 0
    gradient_labels: int = 0
    candidates: int = 0
    halvings: int = 0

    def flops(self, entries: int, head_entries: int) -> float:
        """Return ``2 N T`` forward and ``4 N T`` with a gradient to the inputs, heads added."""
        forward = entries * self.forward_tokens + head_entries * self.forward_labels
        gradient = entries * self.gradient_tokens + head_entries * self.gradient_labels
        return 2.0 * forward + 4.0 * gradient


@dataclass(frozen=True)
class Objective:
    """What a suffix is scored by; all are least where the target is likely.

    ``cross_entropy`` is the mean over the target's tokens, in nats. ``mellowmax`` is a soft maximum
    of the same cross-entropies, ``log(mean(exp(alpha x))) / alpha``, so that the least likely token
    counts most (arXiv 1612.05628; nanoGCG takes it of the negated logits instead). ``margin`` is
    the mean of how far the target's logit lies below the best other, 0 once greedy decoding gives
    the target (arXiv 1608.04644).
    """

    name: ObjectiveName = "cross_entropy"
    alpha: float = 1.0

    def __call__(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the loss of each row, shape [rows], fp32.

        Args:
            logits: shape [rows, target, vocabulary].
            target: token ids, shape [target].
        """
        labels = target.repeat(len(logits))
        if self.name == "margin":
            return self._margin(logits.float(), labels.view(len(logits), -1, 1))
        flat = functional.cross_entropy(logits.flatten(0, 1).float(), labels, reduction="none")
        tokens = flat.view(len(logits), -1)
        if self.name == "mellowmax":
            return ((self.alpha * tokens).logsumexp(1) - math.log(len(target))) / self.alpha
        return tokens.mean(1)

    def _margin(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        own = logits.gather(2, labels)[..., 0]
        others = logits.scatter(2, labels, float("-inf")).amax(2)
        return (others - own).clamp_min(0.0).mean(1)


class Scorer:
    """Scores suffixes by how far the targets are from likely, averaged over items.

    Args:
        model: causal language model of transformers in evaluation mode; it is not changed.
        prompts: where the suffix stands, one an item.
        cached: whether to keep keys and values of shared beginnings, see ``check``.
        objective: the loss.
    """

    def __init__(
        self,
        model: nn.Module,
        prompts: Sequence[SuffixPrompt],
        *,
        cached: bool = True,
        objective: Objective | None = None,
    ) -> None:
        self._model: Any = model
        self._objective = objective or Objective()
        self.prompts = list(prompts)
        weight = next(model.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self._kind = "cpu" if self.device.type == "cpu" else "other"
        self._embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
        self._heads: dict[int, Any] = {}
        self._extensions: dict[int, tuple[Suffix, Any]] = {}
        self._most_tokens: int | None = None
        self.cached = cached
        self.work = Work()

    @property
    def vocabulary(self) -> int:
        """Number of rows of the embedding table."""
        return int(self._embedding.weight.shape[0])

    @torch.no_grad()
    def losses(self, suffixes: Sequence[Suffix], current: Suffix) -> torch.Tensor:
        """Return the loss of every suffix, shape [suffixes], fp32 on the CPU.

        Args:
            current: suffix with which they share their beginnings.
        """
        total = torch.zeros(len(suffixes))
        for prompt in self.prompts:
            total += self._item_losses(prompt, suffixes, current)
        self.work.candidates += len(suffixes) * len(self.prompts)
        return total / len(self.prompts)

    @torch.no_grad()
    def extend(self, current: Suffix) -> None:
        """Run ``current`` now, so that the next losses share its keys and values."""
        for prompt in self.prompts if self.cached else ():
            self._extended(prompt, current)

    def gradient(self, suffix: Suffix) -> torch.Tensor:
        """Return the gradient of the loss at the one-hot rows of ``suffix``.

        Shape [tokens of the suffix, vocabulary], fp32; over several items, the sum of each one's
        gradient divided by its norm, so that no item drowns the others.
        """
        table = self._table()
        total = torch.zeros(len(suffix), table.shape[0], device=self.device)
        for prompt in self.prompts:
            own = self._embedding_gradient(prompt, suffix) @ table.T
            total += own / own.norm().clamp_min(1e-30) if len(self.prompts) > 1 else own
        return total

    @torch.no_grad()
    def check(self, suffixes: Sequence[Suffix], current: Suffix) -> str:
        """Compare a few losses with and without the cache; switch it off if they differ.

        Returns:
            ``exact`` with the largest relative difference, or why the cache is off.
        """
        if not self.cached:
            return "off"
        order = sorted(suffixes, key=lambda suffix: first_swap(suffix, current))
        few = order[:: max(1, len(order) // CHECKED)]
        work, self.work = self.work, Work()
        try:
            with_cache = self.losses(few, current)
        except (TypeError, ValueError, RuntimeError, LookupError, AttributeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            self.cached, reason = False, f"off: {type(error).__name__} with a shared prefix"
        else:
            self.cached = False
            without = self.losses(few, current)
            apart = float(((with_cache - without).abs() / without.abs().clamp_min(1e-6)).max())
            self.cached = apart <= CACHE_TOLERANCE.get(self.dtype, 1e-3)
            reason = f"{'exact' if self.cached else 'off'}: losses differ by {apart:.1e}"
        work.halvings += self.work.halvings
        self.work = work
        return reason

    def _item_losses(
        self, prompt: SuffixPrompt, suffixes: Sequence[Suffix], current: Suffix
    ) -> torch.Tensor:
        losses = torch.empty(len(suffixes))
        cache = self._extended(prompt, current) if self.cached else None
        for first, members in self._passes(prompt, suffixes, current):
            kept = len(prompt.before) + first if self.cached else 0
            rows = [prompt.ids(suffixes[index])[kept:-1] for index in members]
            losses[members] = self._rows_losses(prompt, cache, kept, rows)
            self.work.tokens += len(rows) * (len(prompt.ids(current)) - 1)
        return losses

    def _rows_losses(
        self, prompt: SuffixPrompt, cache: Any, kept: int, rows: Sequence[Suffix]
    ) -> torch.Tensor:
        """Return the loss of each row in one pass, or in halves where memory is short."""
        ids = torch.tensor(rows, device=self.device)
        try:
            own = _view(cache, kept, len(rows)) if cache is not None else None
            losses = self._loss(prompt, self._logits(prompt, own, input_ids=ids)).cpu()
        except torch.OutOfMemoryError:
            if len(rows) == 1:
                raise
        else:
            self.work.forward_tokens += ids.numel()
            self.work.forward_labels += len(rows) * len(prompt.target)
            return losses
        # Outside the handler and without its keys and values: nothing of the failed pass is held.
        own = None
        self.work.halvings += 1
        self._most_tokens = ids.numel() // 2
        half = len(rows) // 2
        parts = (rows[:half], rows[half:])
        return torch.cat([self._rows_losses(prompt, cache, kept, part) for part in parts])

    def _passes(
        self, prompt: SuffixPrompt, suffixes: Sequence[Suffix], current: Suffix
    ) -> Iterator[tuple[int, list[int]]]:
        """Yield the least first swap and the members of each pass, sorted by first swap."""
        firsts = [first_swap(suffix, current) if self.cached else 0 for suffix in suffixes]
        rest = len(prompt.after) + len(prompt.target) - 1 + len(current)
        rest += 0 if self.cached else len(prompt.before)
        most_rows = max(1, MOST_LOGITS // (len(prompt.target) * self.vocabulary))
        members, start = list[int](), 0
        for index in sorted(range(len(suffixes)), key=firsts.__getitem__):
            tokens = len(members) * (rest - start)
            fresh = bool(members) and firsts[index] > firsts[members[-1]]
            most = MOST_TOKENS[self._kind]
            most = min(most, self._most_tokens or most)  # may fall from pass to pass
            full = tokens + rest - start > most or len(members) >= most_rows
            if members and (full or (fresh and tokens >= ENOUGH_TOKENS[self._kind])):
                yield start, members
                members = []
            if not members:
                start = firsts[index]
            members.append(index)
        if members:
            yield start, members

    def _logits(self, prompt: SuffixPrompt, cache: Any, **inputs: Any) -> torch.Tensor:
        """Return logits at the target, shape [rows, target, vocabulary]."""
        (given,) = inputs.values()
        length, labels = given.shape[1], len(prompt.target)
        keep = torch.arange(length - labels, length, device=self.device)
        logits: torch.Tensor = self._model(
            **inputs, past_key_values=cache, use_cache=cache is not None, logits_to_keep=keep
        ).logits
        return logits

    def _loss(self, prompt: SuffixPrompt, logits: torch.Tensor) -> torch.Tensor:
        """Return the loss of each row, shape [rows], fp32."""
        return self._objective(logits, torch.tensor(prompt.target, device=self.device))

    def _head(self, prompt: SuffixPrompt) -> Any:
        """Return keys and values of what stands before the suffix, run once a search."""
        key = self.prompts.index(prompt)
        if key not in self._heads:
            self._heads[key] = self._run_cache(None, prompt.before)
        return self._heads[key]

    def _extended(self, prompt: SuffixPrompt, current: Suffix) -> Any:
        """Return keys and values up to the end of the current suffix, run once a suffix."""
        key = self.prompts.index(prompt)
        suffix, cache = self._extensions.get(key, (None, None))
        if suffix != current:
            head = _view(self._head(prompt), len(prompt.before), 1)
            cache = self._run_cache(head, current)
            self._extensions[key] = current, cache
        return cache

    @torch.no_grad()
    def _run_cache(self, cache: Any, ids: Suffix) -> Any:
        from transformers import DynamicCache

        # Without a configuration every layer keeps everything; a sliding window is left to the
        # mask, so that the cache can be cut at any token.
        cache = DynamicCache() if cache is None else cache
        tensor = torch.tensor([ids], device=self.device)
        last = torch.tensor([len(ids) - 1], device=self.device)
        self._model(input_ids=tensor, past_key_values=cache, use_cache=True, logits_to_keep=last)
        self.work.forward_tokens += len(ids)
        return cache

    def _embedding_gradient(self, prompt: SuffixPrompt, suffix: Suffix) -> torch.Tensor:
        """Return the gradient at the embeddings of the suffix, shape [tokens, width], fp32."""
        kept = len(prompt.before) if self.cached else 0
        ids = torch.tensor([prompt.ids(suffix)[kept:-1]], device=self.device)
        start = len(prompt.before) - kept
        with torch.enable_grad():
            embedded = self._embedding(ids).detach()
            own = embedded[:, start : start + len(suffix)].clone().requires_grad_(True)
            parts = (embedded[:, :start], own, embedded[:, start + len(suffix) :])
            cache = _view(self._head(prompt), kept, 1) if self.cached else None
            logits = self._logits(prompt, cache, inputs_embeds=torch.cat(parts, dim=1))
            loss = self._loss(prompt, logits).sum()
            (gradient,) = torch.autograd.grad(loss, own)
        self.work.gradient_tokens += ids.numel()
        self.work.gradient_labels += len(prompt.target)
        self.work.tokens += len(prompt.ids(suffix)) - 1
        own_gradient: torch.Tensor = gradient[0].float()
        return own_gradient

    @torch.no_grad()
    def _table(self) -> torch.Tensor:
        """Return what each token is embedded as, shape [vocabulary, width], fp32.

        Some models scale their embeddings, so that this is not always the weight.
        """
        if type(self._embedding) is nn.Embedding:
            table: torch.Tensor = self._embedding.weight.detach()
        else:
            table = self._embedding(torch.arange(self.vocabulary, device=self.device))
        return table.float()


def first_swap(suffix: Suffix, current: Suffix) -> int:
    """Return the first place where two suffixes differ; the last place if nowhere."""
    pairs = enumerate(zip(suffix, current, strict=True))
    return next((place for place, (a, b) in pairs if a != b), len(current) - 1)


def _view(cache: Any, length: int, rows: int) -> Any:
    """Return the first ``length`` tokens of a one-row cache for ``rows`` rows."""
    from transformers import DynamicCache

    view = DynamicCache()
    for index, layer in enumerate(cache.layers):
        keys, values = (
            part[:, :, :length].expand(rows, -1, -1, -1) for part in (layer.keys, layer.values)
        )
        view.update(keys, values, index)
    return view
