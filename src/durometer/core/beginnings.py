"""Beginnings that many rows share: run once, and kept as keys and values.

A tree pack computes a shared prefix once a pack. Where rows that begin alike fill several packs, or
where a beginning is longer than a pack (a few-shot prompt, the question behind many choices), its
keys and values are computed once for all of these packs.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from durometer.core.rows import Row

# A pass of its own costs as much as this many more tokens in a pack, or less.
LEAST = 32


@dataclass(frozen=True)
class Span:
    """Neighbouring rows, and how many tokens they share that are worth a pass of their own.

    Attributes:
        start, stop: of the rows, as indices into the sorted list.
        shared: lengths of the beginnings that are run apart, each behind the one before it, the
            last one shared by all the rows; empty where the rows fit one pack or share nothing.
    """

    start: int
    stop: int
    shared: tuple[int, ...] = ()

    @property
    def length(self) -> int:
        """Tokens that are run apart from the rows."""
        return self.shared[-1] if self.shared else 0


class Beginnings:
    """Caches of keys and values for the spans of sorted rows, one after the other.

    Args:
        model: causal language model of transformers.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._kept: list[tuple[tuple[int, ...], Any]] = []

    def behind(self, ids: Sequence[int], shared: Sequence[int]) -> Any:
        """Return the cache of the last beginning of ``ids`` that ``shared`` names, or None.

        It is not to be changed: copy it. What the rows before had in common with these is not run
        again.
        """
        wanted = [tuple(ids[:length]) for length in shared]
        kept = [prefix for prefix, _ in self._kept]
        same = next((i for i, (a, b) in enumerate(zip(kept, wanted, strict=False)) if a != b), None)
        del self._kept[len(wanted) if same is None else same :]
        for prefix in wanted[len(self._kept) :]:
            before = self._kept[-1] if self._kept else ((), None)
            cache = run_beginning(self._model, prefix[len(before[0]) :], before[1])
            self._kept.append((prefix, cache))
        return self._kept[-1][1] if self._kept else None


def run_beginning(model: nn.Module, ids: Sequence[int], behind: Any = None) -> Any:
    """Return the cache of keys and values of ``ids``, one row, behind another cache if given."""
    from transformers import DynamicCache

    config: Any = model.config
    cache = DynamicCache(config=config) if behind is None else copy.deepcopy(behind)
    tensor = torch.tensor([list(ids)], device=next(model.parameters()).device)
    model(input_ids=tensor, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def common(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens two rows have in common at their beginning."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def spans(rows: Sequence[Row], nodes: int, least: int = LEAST) -> Iterator[Span]:
    """Yield spans that together are all ``rows``, in their order.

    Args:
        rows: sorted by ids, so that rows that begin alike are neighbours.
        nodes: most nodes of a pack; rows that fit one share their beginning in it already.
        least: shorter beginnings are not worth a pass.
    """
    yield from _Division(rows, nodes, least).parts(Span(0, len(rows)))


class _Division:
    """Sorted rows, and what each has in common with the one before it."""

    def __init__(self, rows: Sequence[Row], nodes: int, least: int) -> None:
        self._nodes, self._least = nodes, least
        self._alike = [0, *(common(a.ids, b.ids) for a, b in pairwise(rows))]
        self._lengths = [len(row.ids) for row in rows]
        # The token that predicts the first label is not run apart.
        given = [row.first_label - 1 for row in rows]
        self._apart = [0, *map(min, self._alike[1:], given, given[1:])]

    def parts(self, span: Span) -> Iterator[Span]:
        """Yield the parts of ``span``: rows that share more and need several packs stand alone."""
        plain = span.start
        for start, stop in self._runs(span):
            if self._size(start, stop) - span.length <= self._nodes:
                continue
            if plain < start:
                yield Span(plain, start, span.shared)
            shared = min(self._apart[start + 1 : stop])
            yield from self.parts(Span(start, stop, (*span.shared, shared)))
            plain = stop
        if plain < span.stop:
            yield Span(plain, span.stop, span.shared)

    def _runs(self, span: Span) -> Iterator[tuple[int, int]]:
        """Yield the longest runs of rows whose neighbours share so much more than the span."""
        start = span.start
        for at in range(span.start + 1, span.stop + 1):
            if at == span.stop or self._apart[at] < span.length + self._least:
                if at - start > 1:
                    yield start, at
                start = at

    def _size(self, start: int, stop: int) -> int:
        """Return how many nodes one tree of the rows has."""
        new = (self._lengths[i] - self._alike[i] for i in range(start + 1, stop))
        return self._lengths[start] + sum(new)
