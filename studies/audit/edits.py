"""What is done to the parents: every edit of the known-answer set, on arrays in memory."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from parents import State, Workshop
from torch import nn

from durometer.core import masks, merging, quantisation
from durometer.core.writers import edit_weights, writers

READING = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


def layer_of(name: str) -> int:
    """Return the block a weight stands in, -1 outside of blocks."""
    return int(name.split(".")[2]) if ".layers." in name else -1


def each(state: State, change: Callable[[str, torch.Tensor], torch.Tensor]) -> State:
    """Return ``state`` with every matrix changed."""
    return {
        name: change(name, torch.from_numpy(value)).numpy() if value.ndim == 2 else value
        for name, value in state.items()
    }


def in_blocks(
    state: State, change: Callable[[str, torch.Tensor], torch.Tensor], roles: Sequence[str] = ()
) -> State:
    """Return ``state`` with the matrices of the blocks changed, of some roles alone if named."""
    return {
        name: change(name, torch.from_numpy(value)).numpy()
        if value.ndim == 2 and layer_of(name) >= 0 and (not roles or name.split(".")[-2] in roles)
        else value
        for name, value in state.items()
    }


# ---- directions ----------------------------------------------------------------------------


def ablated(
    shop: Workshop,
    state: State,
    basis: np.ndarray[Any, Any],
    strength: float,
    *,
    layers: Sequence[int] | None = None,
    keep_norms: bool = False,
    tables: bool = True,
) -> State:
    """Return ``state`` with directions taken out of what writes into the residual stream."""
    chosen = [
        writer
        for writer in writers(shop.model)
        if (tables or not writer.embedding)
        and (layers is None or layer_of(writer.weight) in layers)
    ]
    parameters = {w.weight: nn.Parameter(torch.from_numpy(state[w.weight].copy())) for w in chosen}
    edit_weights(chosen, parameters, torch.from_numpy(basis), strength, keep_norms=keep_norms)
    return state | {name: p.detach().numpy() for name, p in parameters.items()}


def ablated_by_layer(shop: Workshop, state: State, strength: float, seed: int) -> State:
    """Return ``state`` with a direction of its own taken out of every matrix."""
    generator = np.random.default_rng(seed)
    for writer in writers(shop.model):
        if not writer.embedding:
            v = _unit(generator, len(state[writer.weight]))
            state = state | {writer.weight: _without(state[writer.weight], v, strength)}
    return state


def ablated_reading(state: State, direction: np.ndarray[Any, Any], strength: float) -> State:
    """Return ``state`` with a direction taken out of what the blocks read."""
    return in_blocks(
        state,
        lambda _, w: torch.from_numpy(_without(w.numpy().T, direction, strength).T.copy()),
        READING,
    )


def _unit(generator: np.random.Generator, size: int) -> np.ndarray[Any, Any]:
    v = generator.standard_normal(size)
    return (v / np.linalg.norm(v)).astype(np.float32)


def _without(matrix: Any, v: Any, strength: float) -> Any:
    return (matrix - strength * np.outer(v, v @ matrix)).astype(np.float32)


# ---- number formats ------------------------------------------------------------------------


def cast(state: State, *dtypes: torch.dtype) -> State:
    """Return ``state`` rounded to each dtype in turn, matrices and vectors."""
    result = {}
    for name, value in state.items():
        tensor = torch.from_numpy(value)
        for dtype in dtypes:
            tensor = tensor.to(dtype).float()
        result[name] = tensor.numpy()
    return result


def gguf(state: State, kind: str) -> State:
    """Return ``state`` with every matrix in a GGUF type."""
    return each(state, lambda _, w: quantisation.gguf(w, kind))


def to_bits(state: State, bits: int) -> State:
    """Return ``state`` as it is stored at 16, 8 or 4 bits."""
    if bits == 16:
        return cast(state, torch.bfloat16)
    return gguf(state, "Q8_0" if bits == 8 else "Q4_0")


def rtn(state: State, bits: int, group: int | None, scheme: Any) -> State:
    """Return ``state`` with the blocks' matrices rounded to plain grids."""
    return in_blocks(state, lambda _, w: quantisation.round_to_nearest(w, bits, group, scheme))


def nf4(state: State) -> State:
    """Return ``state`` with the blocks' matrices in NF4."""
    return in_blocks(state, lambda _, w: quantisation.nf4(w))


# ---- everything else -----------------------------------------------------------------------


def pruned(state: State, share: float, granularity: masks.Granularity = "tensor") -> State:
    """Return ``state`` with the smallest weights of the blocks' matrices set to zero."""

    def prune(_: str, weight: torch.Tensor) -> torch.Tensor:
        scores = masks.in_groups(weight.abs(), granularity)
        gone = masks.lowest(scores, share).reshape(weight.shape)
        return torch.where(gone, 0.0, weight)

    return in_blocks(state, prune)


def without_neurons(state: State, count: int) -> State:
    """Return ``state`` with some feed-forward neurons of one block zeroed on both sides."""

    def zero(name: str, weight: torch.Tensor) -> torch.Tensor:
        weight = weight.clone()
        if layer_of(name) == 1:
            (weight if "up_proj" in name else weight.T)[:count] = 0
        return weight

    return in_blocks(state, zero, ("up_proj", "down_proj"))


def merged(first: State, second: State, rule: Callable[[Any, Any], torch.Tensor]) -> State:
    """Return the merge of two states by a rule on tensors."""
    return {
        name: rule(torch.from_numpy(value), torch.from_numpy(second[name])).float().numpy()
        for name, value in first.items()
    }


def averaged(first: State, second: State, weight: float) -> State:
    """Return the weighted average of two states."""
    return merged(first, second, lambda a, b: merging.linear((a, b), (1 - weight, weight)))


def arc(first: State, second: State, t: float) -> State:
    """Return the point at ``t`` between two states (SLERP)."""
    return merged(first, second, lambda a, b: merging.slerp(a, b, t))


def noisy(state: State, size: float, seed: int) -> State:
    """Return ``state`` with Gaussian noise of ``size`` times each matrix's deviation."""
    generator = torch.Generator().manual_seed(seed)
    return in_blocks(
        state,
        lambda _, w: w + size * w.std() * torch.randn(w.shape, generator=generator),
    )


def with_adapter(
    state: State, rank: int, size: float, seed: int, *, shared: bool = False, only: str = ""
) -> State:
    """Return ``state`` plus a random change of ``rank`` and relative ``size`` a matrix.

    Args:
        shared: all changes have the same left vector where the shapes allow it.
        only: changes matrices whose name holds this.
    """
    generator = torch.Generator().manual_seed(seed)
    left: dict[int, torch.Tensor] = {}

    def add(name: str, weight: torch.Tensor) -> torch.Tensor:
        if only not in name:
            return weight
        up = torch.randn(weight.shape[0], rank, generator=generator)
        if shared:
            up = left.setdefault(weight.shape[0], up)
        change = up @ torch.randn(rank, weight.shape[1], generator=generator)
        changed: torch.Tensor = weight + size * weight.norm() / change.norm() * change
        return changed

    return in_blocks(state, add)


def truncated(base: State, trained: State, rank: int) -> State:
    """Return ``base`` plus the leading part of what training changed in the blocks."""

    def cut(name: str, weight: torch.Tensor) -> torch.Tensor:
        left, values, right = torch.linalg.svd(
            torch.from_numpy(trained[name]) - weight, full_matrices=False
        )
        return weight + (left[:, :rank] * values[:rank]) @ right[:rank]

    return in_blocks(base, cut)


def scaled(state: State, seed: int, kind: str) -> State:
    """Return ``state`` with rows, columns or whole matrices scaled by 2 %."""
    generator = np.random.default_rng(seed)
    same = generator.standard_normal(4096).astype(np.float32)

    def scale(name: str, weight: torch.Tensor) -> torch.Tensor:
        if kind == "global":
            return weight * 0.98
        axis = 1 if kind == "columns" else 0
        size = weight.shape[axis]
        draws = same[:size] if kind == "same rows" else generator.standard_normal(size)
        factors = torch.from_numpy(1 + 0.02 * np.asarray(draws, dtype=np.float32))
        return weight * (factors[None] if axis else factors[:, None])

    return in_blocks(state, scale)


def rebalanced(state: State, seed: int) -> State:
    """Return ``state`` with factors that cancel between up and down maps: the same function."""
    generator = np.random.default_rng(seed)
    factors = {}

    def move(name: str, weight: torch.Tensor) -> torch.Tensor:
        if "up_proj" in name:
            drawn = np.exp(0.2 * generator.standard_normal(len(weight))).astype(np.float32)
            factors[layer_of(name)] = torch.from_numpy(drawn)
            return weight * factors[layer_of(name)][:, None]
        return weight / factors[layer_of(name)][None]

    first = in_blocks(state, move, ("up_proj",))
    return in_blocks(first, move, ("down_proj",))


def leading_shrunk(state: State, share: float) -> State:
    """Return ``state`` with the leading singular pair of every writing matrix made smaller."""

    def shrink(_: str, weight: torch.Tensor) -> torch.Tensor:
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        return weight - share * values[0] * torch.outer(left[:, 0], right[0])

    return in_blocks(state, shrink, ("o_proj", "down_proj"))


def gains_changed(state: State, seed: int) -> State:
    """Return ``state`` with other gains of the norms and nothing else."""
    generator = np.random.default_rng(seed)
    return {
        name: (value * (1 + 0.05 * generator.standard_normal(value.shape))).astype(np.float32)
        if value.ndim == 1
        else value
        for name, value in state.items()
    }


def rows_changed(state: State, kind: str) -> State:
    """Return ``state`` with rows of the embedding swapped, replaced or appended."""
    name = next(name for name in state if "embed_tokens" in name)
    table = state[name].copy()
    if kind == "swapped":
        table[[10, 20]] = table[[20, 10]]
    elif kind == "replaced":
        table[[7, 9, 11]] = table[30:60].mean(0)
    else:
        table = np.concatenate([table, np.repeat(table.mean(0, keepdims=True), 8, 0)])
    return state | {name: table}
