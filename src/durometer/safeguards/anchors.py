"""Anchor rows: ordinary rows recombined, to keep what is like them and no row at hand is about."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch

from durometer.core.rows import Row
from durometer.safeguards.data import Unit

Partners = Mapping[int, Sequence[Row]]


def partners(rows: Iterable[Row]) -> Partners:
    """Return the rows by the length of their prompt: those of one length can be recombined."""
    found = defaultdict[int, list[Row]](list)
    for row in rows:
        found[row.first_label].append(row)
    return dict(found)


def recombined(
    units: Sequence[Unit], others: Partners, share: float, generator: torch.Generator
) -> list[Unit]:
    """Return rows whose prompt tokens are, each with chance ``share``, those of another row.

    The other one is drawn among the rows with a prompt of the same length, and its tokens keep
    their places: question words meet the names of other questions. Labels stay as they are.
    """
    return [tuple(_recombined(row, others, share, generator) for row in unit) for unit in units]


def _recombined(row: Row, others: Partners, share: float, generator: torch.Generator) -> Row:
    same = others.get(row.first_label, (row,))
    other = same[int(torch.randint(len(same), (), generator=generator))]
    hits = torch.rand(row.first_label, generator=generator) < share
    ids = list(row.ids)
    for place in hits.nonzero()[:, 0].tolist():
        ids[place] = other.ids[place]
    return replace(row, ids=tuple(ids))
