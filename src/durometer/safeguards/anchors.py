"""Anchor rows: ordinary rows with random tokens in place, to keep what no row at hand is about."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from durometer.core.rows import Row
from durometer.safeguards.data import Unit


def replaceable(
    tokenizer: Any, size: int, kept: Iterable[Row], avoided: Iterable[Row]
) -> list[int]:
    """Return the tokens that may stand in anchor rows.

    These are all but special ones and those that ``avoided`` (restricted) rows have and ``kept``
    rows do not: an anchor on them would hold on to what is to go.

    Args:
        size: of the vocabulary.
    """
    known = {token for row in kept for token in row.ids}
    out = {token for row in avoided for token in row.ids} - known
    out |= set(tokenizer.all_special_ids)
    return [token for token in range(size) if token not in out]


def anchors(
    units: Sequence[Unit], tokens: Sequence[int], share: float, generator: torch.Generator
) -> list[Unit]:
    """Return the rows with each prompt token replaced by a random one with chance ``share``.

    Special tokens are left where they are, so that the layout of the chat is kept.

    Args:
        tokens: what may be replaced and may take a place.
    """
    known = set(tokens)
    return [
        tuple(_replaced(row, tokens, known, share, generator) for row in unit) for unit in units
    ]


def _replaced(
    row: Row, tokens: Sequence[int], known: set[int], share: float, generator: torch.Generator
) -> Row:
    ids = list(row.ids)
    hits = torch.rand(row.first_label, generator=generator) < share
    new = torch.randint(len(tokens), (row.first_label,), generator=generator).tolist()
    for place in hits.nonzero()[:, 0].tolist():
        if ids[place] in known:
            ids[place] = tokens[new[place]]
    return replace(row, ids=tuple(ids))
