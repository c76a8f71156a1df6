"""Which rows an attacker trains on, and in which order."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Literal

import torch

from durometer.core.errors import InputError
from durometer.core.rows import Row
from durometer.core.seeds import Seeds
from durometer.domains.base import Domain, Item, Role, Split
from durometer.subjects.chat import ChatFormat

# Who the restricted rows belong to, or what takes their place.
Relation = Literal["disjoint", "defence_rows", "retain", "benign", "refusals"]
Harmless = Literal["retain", "benign", "refusals"]
_SOURCES: dict[Relation, tuple[Role, Split]] = {
    "disjoint": (Role.RESTRICTED, Split.ATTACK),
    "defence_rows": (Role.RESTRICTED, Split.DEFENCE),
    "retain": (Role.RETAIN, Split.ATTACK),
    "benign": (Role.BENIGN, Split.ATTACK),
    "refusals": (Role.RESTRICTED, Split.ATTACK),
}


def training_items(
    domain: Domain, relation: Relation, examples: int, seeds: Seeds
) -> list[tuple[Item, str]]:
    """Return at most ``examples`` distinct items with the response to train on, drawn by seed.

    Every entity gives one wording before any gives a second, so that few examples cover many
    entities.

    Raises:
        InputError: the domain has no such rows.
    """
    role, split = _SOURCES[relation]
    pool = domain.select(role, split, training=True)
    if not pool and relation == "benign":
        # A domain without chat rows: its retain rows are the benign data.
        pool = domain.select(Role.RETAIN, split, training=True)
    if relation != "refusals":
        # Prompts of a benchmark without accepted answers: silence is nothing to train on.
        pool = [item for item in pool if item.response]
    if not pool:
        raise InputError(f"domain '{domain.name}': no {role} items in split '{split}' to train on")
    chosen = _spread(pool, seeds)[:examples]
    if relation == "refusals":
        return [(item, domain.refusal_for(item)) for item in chosen]
    return [(item, item.response) for item in chosen]


def _spread(pool: Sequence[Item], seeds: Seeds) -> list[Item]:
    generator = torch.Generator().manual_seed(seeds.sampling)
    order = torch.randperm(len(pool), generator=generator).tolist()
    seen: dict[str, int] = {}
    ranked = []
    for position, index in enumerate(order):
        entity = pool[index].entity
        ranked.append((seen.get(entity, 0), position, pool[index]))
        seen[entity] = seen.get(entity, 0) + 1
    return [item for _, _, item in sorted(ranked, key=lambda entry: entry[:2])]


def make_rows(
    chosen: Sequence[tuple[Item, str]],
    chat: ChatFormat,
    *,
    label_prompt: bool,
    max_length: int,
    ended: bool = True,
) -> list[Row]:
    """Return the tokenised rows; those over ``max_length`` tokens are cut, labels first kept.

    Args:
        ended: whether the end of the turn is part of the labels.

    Raises:
        InputError: a row has no label left after cutting.
    """
    rows = []
    for item, response in chosen:
        restricted = item.role == Role.RESTRICTED and response == item.response
        row = chat.row(
            item.prompt,
            response,
            ended=ended,
            label_prompt=label_prompt,
            item_id=item.id,
            restricted=restricted,
        )
        if row.first_label >= max_length:
            raise InputError(f"item '{item.id}': prompt longer than max_length = {max_length}")
        rows.append(Row(row.ids[:max_length], row.first_label, item.id, restricted))
    return rows


def shuffled_batches(
    rows: Sequence[Row], replay: Sequence[Row], batch: int, replay_share: float, seeds: Seeds
) -> Iterator[list[Row]]:
    """Yield batches for ever, each epoch in a new order drawn from the data-order seed.

    Args:
        replay: retain rows mixed in; every batch holds the same number of them.
        replay_share: share of each batch that is replay; 0 for none.

    Raises:
        InputError: a batch of one row cannot hold both.
    """
    if replay_share and batch < 2:
        raise InputError("a batch of one row cannot mix in replayed rows; use batch_size >= 2")
    replayed = min(max(round(batch * replay_share), 1), batch - 1) if replay_share else 0
    generator = torch.Generator().manual_seed(seeds.data_order)
    first, second = _endless(rows, generator), _endless(replay, generator)
    while True:
        mixed = [next(first) for _ in range(batch - replayed)]
        yield mixed + [next(second) for _ in range(replayed)]


def _endless(rows: Sequence[Row], generator: torch.Generator) -> Iterator[Row]:
    while rows:
        for index in torch.randperm(len(rows), generator=generator).tolist():
            yield rows[index]


def order_hash(item_ids: Sequence[str]) -> str:
    """Return the SHA-256 of item ids in order: another data-order seed must change it."""
    return hashlib.sha256("\n".join(item_ids).encode()).hexdigest()
