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

    def new_nodes(self, ids: Sequence[int]) -> int:
        """Return how many nodes ``ids`` would add."""
        parent, depth = -1, 0
        while depth < len(ids) and (child := self.children.get((parent, ids[depth]))) is not None:
            parent, depth = child, depth + 1
        return len(ids) - depth

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
        size = len(self.tokens)
        visible = torch.eye(size, dtype=torch.bool)
        depths = [0] * size
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                visible[node] |= visible[parent]
                depths[node] = depths[parent] + 1
        predictors: list[int] = []
        targets: list[int] = []
        owners: list[int] = []
        for index, (row, path) in enumerate(zip(rows, self.paths, strict=True)):
            predictors += path[row.first_label - 1 : -1]
            targets += row.labels
            owners += [index] * len(row.labels)
        return TreePack(
            torch.tensor(self.tokens),
            torch.tensor(depths),
            visible,
            torch.tensor(predictors, dtype=torch.long),
            torch.tensor(targets, dtype=torch.long),
            torch.tensor(owners, dtype=torch.long),
        )


def tree_packs(
    rows: Sequence[Row], nodes: int = NODES_PER_PACK
) -> Iterator[tuple[list[int], TreePack]]:
    """Yield packs of at most ``nodes`` nodes (or one row), with the indices of their rows.

    The order of ``rows`` is kept; sort them by ids first to share the most.
    """
    tree, members = _Tree(), list[int]()
    for index, row in enumerate(rows):
        if members and len(tree.tokens) + tree.new_nodes(row.ids) > nodes:
            yield members, tree.pack([rows[i] for i in members])
            tree, members = _Tree(), []
        tree.add(row.ids)
        members.append(index)
    if members:
        yield members, tree.pack([rows[i] for i in members])
