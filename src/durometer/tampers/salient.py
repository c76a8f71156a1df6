"""Harmless rows that look to the subject like restricted ones (arXiv 2404.01099)."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional

from durometer.core.budget import Spent, matrix_entries
from durometer.core.forward import PADDED_ROWS
from durometer.core.rows import Row
from durometer.core.seeds import Seeds
from durometer.domains.base import Domain, Item
from durometer.subjects.base import Subject
from durometer.tampers.data import Harmless, make_rows, training_items

# Tokens of a response that count, the end of the turn left out: neither how far a response goes on
# nor that it is over may be a cue.
RESPONSE_TOKENS = 10


@dataclass(frozen=True)
class Selection:
    """The rows chosen, what by, and at what cost.

    Attributes:
        chosen: nearest first.
        restricted: rows of restricted answers compared with.
        cost: tokens, FLOPs and seconds of the choice.
        facts: what the record says of it.
    """

    chosen: list[tuple[Item, str]]
    restricted: list[Row]
    cost: Spent
    facts: dict[str, Any]


def nearest_to_restricted(
    subject: Subject,
    data: Domain,
    relation: Harmless,
    count: int,
    *,
    anchors: int,
    max_length: int,
    seeds: Seeds,
) -> Selection:
    """Return the ``count`` harmless rows that are nearest to restricted answers, see ``nearness``.

    Args:
        anchors: restricted rows compared with, answered and, where the domain has refusals,
            refused; drawn by the sampling seed.

    Raises:
        InputError: the domain has no such rows.
    """
    begun = time.perf_counter()
    pool = training_items(data, relation, len(data.items), seeds)
    groups = [pool, training_items(data, "disjoint", anchors, seeds)]
    if data.refusals:
        groups.append(training_items(data, "refusals", anchors, seeds))
    rows = [beginnings(subject, group, max_length) for group in groups]
    scores = nearness(*(last_states(subject, group) for group in rows))
    order = scores.argsort(descending=True, stable=True)[:count].tolist()
    tokens = sum(len(row.ids) for group in rows for row in group)
    facts = {
        "selection": "representation",
        "pool": len(pool),
        "restricted_rows_to_choose_by": len(rows[1]),
        "refusals_to_choose_by": len(rows[2]) if data.refusals else 0,
        "mean_score_chosen": float(scores[order].mean()),
        "mean_score_pool": float(scores.mean()),
    }
    flops = 2.0 * matrix_entries(subject.model) * tokens
    cost = Spent(tokens=tokens, flops=flops, seconds=time.perf_counter() - begun)
    return Selection([pool[index] for index in order], rows[1], cost, facts)


def nearness(
    states: torch.Tensor, restricted: torch.Tensor, refused: torch.Tensor | None = None
) -> torch.Tensor:
    """Return each state's cosine to the mean restricted one, less that to the mean refused one.

    Args:
        states: shape [rows, width]; the others likewise.
    """
    scores = functional.cosine_similarity(states, restricted.mean(0, keepdim=True))
    if refused is not None:
        scores = scores - functional.cosine_similarity(states, refused.mean(0, keepdim=True))
    return scores


@torch.no_grad()
def last_states(subject: Subject, rows: Sequence[Row]) -> torch.Tensor:
    """Return the final hidden state at the last token of every row, shape [rows, width], fp32."""
    device, states = subject.forward.device, []
    for start in range(0, len(rows), PADDED_ROWS):
        batch = rows[start : start + PADDED_ROWS]
        lengths = torch.tensor([len(row.ids) for row in batch])
        ids = torch.zeros(len(batch), int(lengths.max()), dtype=torch.long)
        for index, row in enumerate(batch):
            ids[index, : len(row.ids)] = torch.tensor(row.ids)
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        hidden = subject.model(
            input_ids=ids.to(device),
            attention_mask=mask.long().to(device),
            output_hidden_states=True,
            use_cache=False,
            logits_to_keep=1,
        ).hidden_states[-1]
        states.append(hidden[torch.arange(len(batch)), lengths - 1].float())
    return torch.cat(states)


def beginnings(subject: Subject, group: Sequence[tuple[Item, str]], max_length: int) -> list[Row]:
    """Return the rows of items with their responses, up to the last token that counts."""
    rows = make_rows(group, subject.chat, label_prompt=False, max_length=max_length, ended=False)
    return [replace(row, ids=row.ids[: row.first_label + RESPONSE_TOKENS]) for row in rows]
