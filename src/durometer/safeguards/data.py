"""What a safeguard may learn from: pools of rows of the defence split, and nothing else."""

import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import torch

from durometer.core.errors import InputError
from durometer.core.rows import Row
from durometer.core.seeds import Seeds
from durometer.domains.base import Domain, Item, Role, Split, deal_splits
from durometer.subjects.base import Subject
from durometer.tampers.data import make_rows, order_hash, shuffled_batches

# Rows that belong together and are drawn together: mostly one, or a preferred and another answer.
Unit = tuple[Row, ...]
MAX_LENGTH = 512
HELD_OUT_SHARE = 0.2


class DefenceData:
    """Pools of rows made from the ``defence`` split of a domain.

    ``restricted`` (answers), ``refusals`` (the same prompts refused), ``retain`` (harmless rows
    answered as usual), ``pairs`` (refusal, answer), ``sft`` (the supervised rows of the domain's
    kind); with ``held_out_`` before the first, third and fourth of the restricted ones only those
    entities that no inner attack trains on, with ``inner_`` only the others.

    Args:
        subject: its chat format makes the rows.
        domain: whose defence split is used.
        share: share of the restricted entities that is held out from inner attacks.
    """

    def __init__(self, subject: Subject, domain: Domain, share: float = HELD_OUT_SHARE) -> None:
        self.domain = domain
        self._chat = subject.chat
        self._share = share
        self._pools: dict[str, list[Unit]] = {}

    def add(self, pools: Mapping[str, list[Unit]]) -> None:
        """Make further pools known."""
        self._pools.update(pools)

    def pool(self, name: str) -> list[Unit]:
        """Return the units of a pool.

        Raises:
            InputError: the domain has nothing to make them from.
        """
        if name not in self._pools:
            self._pools[name] = self._make(name)
        if not self._pools[name]:
            advice = _ADVICE.get(name.rsplit("_", maxsplit=1)[-1], "")
            raise InputError(
                f"domain '{self.domain.name}': nothing for the safeguard's '{name}' rows in split "
                f"'{Split.DEFENCE}'; add items there{advice}"
            )
        return self._pools[name]

    def rows(self, chosen: Sequence[tuple[Item, str]], *, label_prompt: bool = False) -> list[Row]:
        """Return the tokenised rows of items with the responses to train on."""
        return make_rows(chosen, self._chat, label_prompt=label_prompt, max_length=MAX_LENGTH)

    def restricted_items(self, part: str = "") -> list[Item]:
        """Return the restricted items: all, or those of the part ``inner`` or ``held_out``."""
        items = self.domain.select(Role.RESTRICTED, Split.DEFENCE, training=True)
        if not part:
            return items
        return [item for item in items if (item.entity in self.held_out) == (part == "held_out")]

    def harmless_items(self) -> list[Item]:
        """Return the retain and benign items."""
        return [
            item
            for role in (Role.RETAIN, Role.BENIGN)
            for item in self.domain.select(role, Split.DEFENCE, training=True)
        ]

    @cached_property
    def held_out(self) -> frozenset[str]:
        """The restricted entities that no inner attack trains on."""
        entities = {item.entity for item in self.restricted_items()}
        shares = {Split.ATTACK: 1 - self._share, Split.SELECT: self._share}
        dealt = deal_splits(entities, shares, "held out from inner attacks")
        return frozenset(e for e, split in dealt.items() if split == Split.SELECT)

    @cached_property
    def attackers_view(self) -> Domain:
        """The domain as inner attackers have it.

        Their ``attack`` split is the part of the defence split that is not held out; nothing of any
        other split is in it, so no inner attack can read what an evaluation measures.
        """
        own = {item.id for item in (*self.restricted_items("inner"), *self.harmless_items())}
        items = tuple(
            replace(item, split=Split.ATTACK) for item in self.domain.items if item.id in own
        )
        return replace(self.domain, items=items)

    def _make(self, name: str) -> list[Unit]:
        if name == "retain":
            return units(self.rows([(item, item.response) for item in self.harmless_items()]))
        if name == "sft":
            refusals = self.pool("refusals") if self.domain.kind == "refusal" else []
            return [*refusals, *self.pool("retain")]
        part, _, what = name.rpartition("_")
        makers: dict[str, Callable[[list[Item]], list[Unit]]] = {
            "restricted": lambda items: units(self.rows([(i, i.response) for i in items])),
            "refusals": lambda items: units(self.rows(self._refused(items))),
            "pairs": self._pairs,
        }
        if what not in makers or part not in ("", "inner", "held_out"):
            raise KeyError(f"no pool '{name}'")
        return makers[what](self.restricted_items(part))

    def _refused(self, items: Sequence[Item]) -> list[tuple[Item, str]]:
        return [(item, self.domain.refusal_for(item)) for item in items if self.domain.refusals]

    def _pairs(self, items: Sequence[Item]) -> list[Unit]:
        refusals = self.rows(self._refused(items))
        answers = self.rows([(item, item.response) for item in items])
        return list(zip(refusals, answers, strict=False))


_ADVICE = {"refusals": " and refusals to the domain", "pairs": " and refusals to the domain"}


def units(rows: Sequence[Row]) -> list[Unit]:
    """Return every row as a unit of its own."""
    return [(row,) for row in rows]


class Streams:
    """Endless shuffled batches of every pool, each in an order of its own that can be gone on with.

    A pool that is not drawn from changes nothing for the others, so that a term that is off leaves
    the rest bit for bit as it is.
    """

    def __init__(self, data: DefenceData, seeds: Seeds, batch: int, harmless_share: float) -> None:
        self._data, self._seeds = data, seeds
        self._batch, self._share = batch, harmless_share
        self._streams: dict[str, Iterator[list[Unit]]] = {}
        self.drawn: dict[str, int] = {}
        self.first_epoch: dict[str, list[str]] = {}

    def next(self, pool: str) -> list[Unit]:
        """Return the next batch of ``pool``."""
        if pool not in self._streams:
            self._streams[pool] = self._open(pool)
        self.drawn[pool] = self.drawn.get(pool, 0) + 1
        batch = next(self._streams[pool])
        ids = self.first_epoch.setdefault(pool, [])
        if (self.drawn[pool] - 1) * self._batch < len(self._data.pool(pool)):
            ids += [row.item_id for unit in batch for row in unit]
        return batch

    def skip(self, drawn: Mapping[str, int]) -> None:
        """Go on where a run stood that had drawn so many batches of every pool."""
        for pool, count in drawn.items():
            for _ in range(count):
                self.next(pool)

    def order_hashes(self) -> dict[str, str]:
        """Return the hash of the item ids of each pool's first epoch, in order."""
        return {pool: order_hash(ids) for pool, ids in self.first_epoch.items()}

    def _open(self, pool: str) -> Iterator[list[Unit]]:
        if pool == "sft":
            return self._supervised()
        generator = torch.Generator().manual_seed(self._seed(pool))
        return _batches(self._data.pool(pool), self._batch, generator)

    def _supervised(self) -> Iterator[list[Unit]]:
        rows = {pool: [u[0] for u in self._data.pool(pool)] for pool in ("retain",)}
        if self._data.domain.kind == "knowledge":
            mixed = shuffled_batches(rows["retain"], [], self._batch, 0.0, self._seeds)
        else:
            refusals = [u[0] for u in self._data.pool("refusals")]
            mixed = shuffled_batches(
                refusals, rows["retain"], self._batch, self._share, self._seeds
            )
        return map(units, mixed)

    def _seed(self, pool: str) -> int:
        digest = hashlib.sha256(f"{pool}:{self._seeds.data_order}".encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1


def _batches(pool: Sequence[Unit], batch: int, generator: torch.Generator) -> Iterator[list[Unit]]:
    def endless() -> Iterator[Unit]:
        while True:
            for index in torch.randperm(len(pool), generator=generator).tolist():
                yield pool[index]

    stream = endless()
    while True:
        yield list(itertools.islice(stream, batch))
