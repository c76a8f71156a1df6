"""Teacher-forced passes that compute logits at labelled positions only.

A model whose attention is plain and causal takes a whole batch as one tree pack (see ``rows``).
Whether it does is not read off its name but tried once: both layouts must give the same logits. Any
other model gets ordinary padded batches.
"""

import copy
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from durometer.core.beginnings import Beginnings, run_beginning, spans
from durometer.core.rows import (
    NODES_PER_PACK,
    NODES_PER_SCORING_PACK,
    NODES_PER_WHOLE_PACK,
    Row,
    TreePack,
    tree_packs,
    tree_size,
)

PADDED_ROWS = 16
# Mean difference of logits between the two layouts, in standard deviations of the logits.
LAYOUT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.03}
# The same for the logits of one branch when another changes, which rounding does not touch.
LEAK_TOLERANCE = 1e-5
# How configurations call the distance that (some) layers attend back; no pack is longer.
WINDOWS = ("sliding_window", "attention_chunk_size", "window_size")


@dataclass(frozen=True)
class Labelled:
    """Logits of a few rows at their labelled positions.

    Attributes:
        logits: shape [labels, vocabulary], in the model's dtype.
        targets: shape [labels].
        rows: index of each label's row in the list given, shape [labels].
        members: the rows of this pass, as indices into the list given.
        predictors: position of each label's prediction in the flattened input, shape [labels].
        reach: which positions of the flattened input each row reads, all its tokens but the last
            one, shape [members, positions], bool.
    """

    logits: torch.Tensor
    targets: torch.Tensor
    rows: torch.Tensor
    members: tuple[int, ...]
    predictors: torch.Tensor
    reach: torch.Tensor


@dataclass(frozen=True)
class RowScore:
    """What one teacher-forced pass says of one row's labels.

    Attributes:
        log_probability: sum over the labels, nats.
        mean_probability: mean probability of the labels.
        labels: number of labelled tokens.
        greedy: whether every label is the arg-max, that is, greedy decoding would give them all.
    """

    log_probability: float
    mean_probability: float
    labels: int
    greedy: bool


class Forward:
    """The forward pass of one model, in the faster of two layouts that it supports.

    Args:
        model: a causal language model of transformers, adapters on it included.
        tree: whether tree packs are right for it, see ``supports_tree``.
    """

    def __init__(self, model: nn.Module, *, tree: bool) -> None:
        self.model = model
        self.tree = tree
        self._window = attention_window(model)

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        return next(self.model.parameters()).device

    def labelled(
        self,
        rows: Sequence[Row],
        nodes: int = NODES_PER_PACK,
        *,
        whole: bool = False,
        unit: int = 1,
    ) -> Iterator[Labelled]:
        """Yield the logits of ``rows`` at their labels, a pack at a time (gradients flow).

        Args:
            nodes: most nodes of a pack.
            whole: all rows in one pass whatever they take.
            unit: so many rows that follow each other are never in different passes.
        """
        unit = max(len(rows), 1) if whole else unit
        if self._fit_trees(rows, unit):
            for members, pack in tree_packs(rows, min(nodes, self._window), unit):
                yield self._tree_pass(members, pack)
        else:
            size = max(PADDED_ROWS // unit, 1) * unit
            for start in range(0, len(rows), size):
                yield self._padded_pass(rows[start : start + size], start)

    def _fit_trees(self, rows: Sequence[Row], unit: int) -> bool:
        """Say whether every unit of ``rows`` can be, and is better, one tree."""
        if not self.tree or any(len(row.ids) > self._window for row in rows):
            return False
        most = min(self._window, NODES_PER_WHOLE_PACK)
        return unit == 1 or all(
            tree_size(rows[start : start + unit]) <= most for start in range(0, len(rows), unit)
        )

    def loss_sums(self, rows: Sequence[Row]) -> Iterator[torch.Tensor]:
        """Yield, a pack at a time, the summed cross-entropy over the labels (fp32, nats)."""
        for part in self.labelled(rows):
            yield functional.cross_entropy(part.logits.float(), part.targets, reduction="sum")

    @torch.no_grad()
    def score(self, rows: Sequence[Row]) -> list[RowScore]:
        """Return one score a row, in the order given.

        Beginnings that rows share are computed once, see ``beginnings``; rows that are padded are
        of like length.
        """
        trees = self._fit_trees(rows, 1)
        order = sorted(
            range(len(rows)), key=lambda i: rows[i].ids if trees else (len(rows[i].ids),)
        )
        arranged = [rows[index] for index in order]
        scores: dict[int, RowScore] = {}
        for part in self._begun(arranged) if trees else self.labelled(arranged):
            log_probabilities = part.logits.float().log_softmax(-1)
            chosen = log_probabilities.gather(1, part.targets[:, None])[:, 0]
            greedy = log_probabilities.argmax(-1) == part.targets
            for row in sorted(set(part.rows.tolist())):
                own = part.rows == row
                scores[order[row]] = RowScore(
                    float(chosen[own].sum()),
                    float(chosen[own].exp().mean()),
                    int(own.sum()),
                    bool(greedy[own].all()),
                )
        return [scores[index] for index in range(len(rows))]

    def _begun(self, rows: Sequence[Row]) -> Iterator[Labelled]:
        """Yield the logits of sorted rows, packs that begin alike behind one cache."""
        nodes = min(NODES_PER_SCORING_PACK, self._window)
        beginnings = Beginnings(self.model)
        for span in spans(rows, nodes):
            head = beginnings.behind(rows[span.start].ids, span.shared)
            tails = _behind(rows[span.start : span.stop], span.length)
            # What lies behind the window of some layer is seen by no pack.
            for members, pack in tree_packs(tails, min(nodes, self._window - span.length)):
                places = [span.start + member for member in members]
                yield self._tree_pass(places, pack, copy.deepcopy(head), span.length)

    def _tree_pass(
        self, members: list[int], pack: TreePack, head: Any = None, shared: int = 0
    ) -> Labelled:
        """Run one pack, behind the cache ``head`` of ``shared`` tokens if there is one."""
        device = self.device
        dtype = next(self.model.parameters()).dtype
        hidden = torch.zeros(pack.visible.shape, dtype=dtype)
        hidden.masked_fill_(~pack.visible, torch.finfo(dtype).min)
        hidden = functional.pad(hidden, (shared, 0))  # the beginning is seen by all
        keep, inverse = torch.unique(pack.predictors, return_inverse=True)
        cached = {} if head is None else {"past_key_values": head}
        logits = self.model(
            input_ids=pack.ids[None].to(device),
            position_ids=pack.positions[None].to(device) + shared,
            attention_mask=hidden[None, None].to(device),
            use_cache=head is not None,
            logits_to_keep=keep.to(device),
            **cached,
        ).logits[0]
        owners = torch.tensor(members)[pack.rows]
        last = torch.cat([pack.rows[1:] != pack.rows[:-1], torch.tensor([True])])
        return Labelled(
            logits[inverse.to(device)],
            pack.targets.to(device),
            owners.to(device),
            tuple(members),
            pack.predictors.to(device),
            pack.visible[pack.predictors[last]].to(device),
        )

    def _padded_pass(self, rows: Sequence[Row], start: int) -> Labelled:
        length = max(len(row.ids) for row in rows)
        ids = torch.zeros(len(rows), length, dtype=torch.long)
        mask = torch.zeros_like(ids)
        where: list[tuple[int, int]] = []
        for index, row in enumerate(rows):
            ids[index, : len(row.ids)] = torch.tensor(row.ids)
            mask[index, : len(row.ids)] = 1
            where += [(index, position - 1) for position in range(row.first_label, len(row.ids))]
        device = self.device
        logits = self.model(
            input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False
        ).logits
        owners, positions = torch.tensor(where).T.to(device)
        targets = torch.tensor([label for row in rows for label in row.labels], device=device)
        reach = torch.zeros(len(rows), len(rows), length, dtype=torch.bool)
        for index, row in enumerate(rows):
            reach[index, index, : len(row.ids) - 1] = True
        return Labelled(
            logits[owners, positions],
            targets,
            owners + start,
            tuple(range(start, start + len(rows))),
            owners * length + positions,
            reach.flatten(1).to(device),
        )


def attention_window(model: nn.Module) -> int:
    """Return how many tokens back the model's most short-sighted layer attends (huge: all)."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    stated = [getattr(config, name, None) for name in WINDOWS]
    return min((w for w in stated if isinstance(w, int) and w > 0), default=sys.maxsize)


@torch.no_grad()
def supports_tree(model: nn.Module) -> bool:
    """Try tree packs on three short rows and say whether they are right for the model.

    Both layouts must give the same logits, and a branch must not notice that another changes:
    bf16 rounding can hide a recurrent layer from the first test, but not from the second. Behind
    a cached beginning the logits must be the same, too. A changed mask convention shows here,
    whatever the model is called.
    """
    vocabulary = int(model.get_input_embeddings().num_embeddings)  # type: ignore[operator]
    ids = [(index * 7919) % vocabulary for index in range(3, 31)]
    rows = [Row((*ids[:9], *ids[start : start + 4]), 7) for start in (9, 13, 17, 21)]
    labels = len(rows[0].labels)
    training = model.training
    model.eval()
    try:
        tree = _tree_logits(model, rows[:3])
        other = _tree_logits(model, [rows[0], rows[3], rows[2]])
        cached = _tree_logits(model, rows[:3], shared=5)
    except (TypeError, ValueError, RuntimeError, IndexError):
        return False
    else:
        padded = next(Forward(model, tree=False).labelled(rows[:3])).logits.float()
    finally:
        model.train(training)
    noticed = (tree - other).abs()
    noticed[labels : 2 * labels] = 0.0
    tolerance = LAYOUT_TOLERANCE.get(next(model.parameters()).dtype, 1e-3)
    same = all((x - padded).abs().mean() <= tolerance * padded.std() for x in (tree, cached))
    return bool(same and noticed.max() <= LEAK_TOLERANCE * padded.std())


def _tree_logits(model: nn.Module, rows: Sequence[Row], shared: int = 0) -> torch.Tensor:
    """Return the logits of one pack, the first ``shared`` tokens in a cache."""
    head = run_beginning(model, rows[0].ids[:shared]) if shared else None
    ((members, pack),) = tree_packs(_behind(rows, shared))
    return Forward(model, tree=True)._tree_pass(members, pack, head, shared).logits.float()


def _behind(rows: Sequence[Row], shared: int) -> list[Row]:
    """Return the rows without the tokens of their beginning."""
    return [Row(row.ids[shared:], row.first_label - shared) for row in rows]
