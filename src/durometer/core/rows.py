"""Tokenised examples, and packing them into a tree of shared prefixes.

Rows of one batch begin alike: a system prompt, a user header, often most of the question. A *tree
pack* holds every distinct prefix once. Each node attends to its ancestors alone and its position is
its depth, so hidden states, losses and gradients are those of the separate rows, without padding
and without computing a shared token twice.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

# Larger packs save little of a shared prefix and pay for it in attention between branches.
NODES_PER_PACK = 384
NODES_PER_SCORING_PACK = 256
# The mask and the attention of a pack grow with the square of its nodes. Rows that must be in one
# pass take no more as a tree than this; padded, each attends to itself alone.
NODES_PER_WHOLE_PACK = 2048


@dataclass(frozen=True)
class Row:
    """One tokenised example.

    Attributes:
        ids: token ids of prompt and response.
        first_label: index of the first token that is predicted; all later ones are, too. At least
            1, and less than the length: a row without a label teaches and measures nothing.
        item_id: which item of the domain the row came from.
        restricted: whether it teaches restricted content (counted in the budget).
    """

    ids: tuple[int, ...]
    first_label: int
    item_id: str = ""
    restricted: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.first_label < len(self.ids):
            raise ValueError(f"first_label {self.first_label} of a row of {len(self.ids)} tokens")

    @property
    def labels(self) -> tuple[int, ...]:
        """The tokens that are predicted."""
        return self.ids[self.first_label :]


@dataclass(frozen=True)
class TreePack:
    """Rows laid out as one sequence of tree nodes.

    Attributes:
        ids: token of each node, shape [nodes].
        positions: depth of each node, shape [nodes].
        visible: whether node i attends to node j, shape [nodes, nodes], bool.
        predictors: node whose output predicts each label, shape [labels].
        targets: the labels, row by row, shape [labels].
        rows: index of the row (within the pack) of each label, shape [labels].
    """

    ids: torch.Tensor
    positions: torch.Tensor
    visible: torch.Tensor
    predictors: torch.Tensor
    targets: torch.Tensor
    rows: torch.Tensor


@dataclass
class _Tree:
    """A tree of token prefixes under construction."""

    children: dict[tuple[int, int], int] = field(default_factory=dict)
    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    paths: list[list[int]] = field(default_factory=list)

    def add(self, ids: Sequence[int]) -> None:
        parent, path = -1, []
        for token in ids:
            node = self.children.get((parent, token))
            if node is None:
                node = len(self.tokens)
                self.children[parent, token] = node
                self.tokens.append(token)
                self.parents.append(parent)
            path.append(node)
            parent = node
        self.paths.append(path)

    def pack(self, rows: Sequence[Row]) -> TreePack:
        """Return the layout of the first ``rows`` added, without what was added later."""
        paths = self.paths[: len(rows)]
        size = 1 + max(path[-1] for path in paths)
        visible = torch.eye(size, dtype=torch.bool)
        depths = [0] * size
        for node, parent in enumerate(self.parents[:size]):
            if parent >= 0:
                visible[node] |= visible[parent]
                depths[node] = depths[parent] + 1
        predictors: list[int] = []
        targets: list[int] = []
        owners: list[int] = []
        for index, (row, path) in enumerate(zip(rows, paths, strict=True)):
            predictors += path[row.first_label - 1 : -1]
            targets += row.labels
            owners += [index] * len(row.labels)
        return TreePack(
            torch.tensor(self.tokens[:size]),
            torch.tensor(depths),
            visible,
            torch.tensor(predictors, dtype=torch.long),
            torch.tensor(targets, dtype=torch.long),
            torch.tensor(owners, dtype=torch.long),
        )


def _tree_of(rows: Sequence[Row]) -> _Tree:
    tree = _Tree()
    for row in rows:
        tree.add(row.ids)
    return tree


def tree_size(rows: Sequence[Row]) -> int:
    """Return how many nodes one tree of all ``rows`` has."""
    return len(_tree_of(rows).tokens)


def tree_packs(
    rows: Sequence[Row], nodes: int = NODES_PER_PACK, unit: int = 1
) -> Iterator[tuple[list[int], TreePack]]:
    """Yield packs of at most ``nodes`` nodes (or one unit), with the indices of their rows.

    The order of ``rows`` is kept; sort them by ids first to share the most.

    Args:
        unit: so many rows that follow each other are never in different packs.
    """
    tree, members = _Tree(), list[int]()
    for start in range(0, len(rows), unit):
        own = rows[start : start + unit]
        for row in own:
            tree.add(row.ids)
        if members and len(tree.tokens) > nodes:
            yield members, tree.pack([rows[i] for i in members])
            tree, members = _tree_of(own), []
        members.extend(range(start, start + len(own)))
    if members:
        yield members, tree.pack([rows[i] for i in members])
