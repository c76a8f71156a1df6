"""Function-preserving moves between neighbouring weights, found by what the model does.

Whether a map's output is passed on linearly is tried (doubling it must double what the next map
receives), so that no family's names are needed and gates, norms and caps are not mistaken.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from durometer.core.edits import Restoration
from durometer.core.structure import blocks, width

PROBE_TOKENS = 8
# Relative to the largest entry of what is compared; half precision rounds the value/output move.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.03}
_SAME = 1e-3


@dataclass
class _Call:
    """One recorded call of a module."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


@dataclass
class Pair:
    """A map whose rows ``rows`` reach the inputs of ``second`` linearly; both may have biases."""

    first: nn.Linear
    rows: torch.Tensor
    second: nn.Linear


class Rebalancer:
    """Re-balances a model in place, move by move; call inside a restoration of all weights.

    Args:
        model: in eval mode.
        restoration: told of every changed weight.
    """

    def __init__(self, model: nn.Module, restoration: Restoration) -> None:
        self._model = model
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._restoration = restoration
        self._width = width(model)
        self._blocks = blocks(model)
        self.blocks = len(self._blocks)
        self.dtype = next(model.parameters()).dtype

    @torch.no_grad()
    def logits(self) -> torch.Tensor:
        """Return the logits of a fixed text, fp32."""
        embedding: Any = self._model.get_input_embeddings()  # type: ignore[operator]
        vocabulary = embedding.num_embeddings
        ids = [(index * 7919) % vocabulary for index in range(3, 3 + PROBE_TOKENS)]
        batch = torch.tensor([ids], device=embedding.weight.device)
        logits: torch.Tensor = self._model(input_ids=batch, use_cache=False).logits
        return logits.float()

    @torch.no_grad()
    def up_down(self) -> int:
        """Give row j of the up and column j of the down map equal norms; return blocks done."""
        done = 0
        for pairs in self.pairs(attention=False):
            for pair in pairs:
                self._balance(pair)
            done += bool(pairs)
        return done

    @torch.no_grad()
    def value_output(self) -> int:
        """Give the value and output maps of each group of heads one spectrum; return blocks."""
        done = 0
        for pairs in self.pairs(attention=True):
            for pair in pairs:
                self._balance_heads(pair)
            done += bool(pairs)
        return done

    @torch.no_grad()
    def norm_gains(self) -> int:
        """Fold the gain of norms into the maps that they alone feed; return norms done."""
        return sum(
            self._fold(norm, maps, block, call) for norm, maps, block, call in self._fed_maps()
        )

    @torch.no_grad()
    def pairs(self, *, attention: bool) -> Iterator[list[Pair]]:
        """Yield the pairs of each block: value and output maps, or up and down maps."""
        calls = self._recorded(list(self._model.modules()))
        for name, block in self._blocks:
            yield list(self._linear_pairs(name, block, calls, attention=attention))

    def head_groups(self, pair: Pair) -> list[tuple[torch.Tensor, slice]]:
        """Return the rows of the value map and columns of the output map of each group of heads.

        The query heads of a group share one value head, whose rows feed several runs of columns.
        """
        size = pair.second.in_features // self._heads()
        groups = len(pair.rows) // size
        run = pair.second.in_features // groups
        return [
            (pair.rows[g * size : (g + 1) * size], slice(g * run, (g + 1) * run))
            for g in range(groups)
        ]

    def announce(self, parameters: Sequence[torch.Tensor]) -> None:
        """Have the restoration keep weights that are about to be changed."""
        self._restoration.writable([self._names[id(p)] for p in parameters])

    def _linear_pairs(
        self, name: str, block: nn.Module, calls: dict[int, _Call], *, attention: bool
    ) -> Iterator[Pair]:
        """Yield the pairs of a block that pass a map's output on linearly, as tried."""
        order = {identity: place for place, identity in enumerate(calls)}
        for inner, parent in block.named_modules():
            maps = [m for m in parent.children() if isinstance(m, nn.Linear) and id(m) in calls]
            backs = [m for m in maps if m.out_features == self._width]
            path = f"{name}.{inner}".lower()
            if not backs or ("attn" in path or "attention" in path) != attention:
                continue
            # The map back to the residual stream is the last that runs; queries have its shape.
            second = max(backs, key=lambda m: order[id(m)])
            for first in maps:
                if first is second or first.in_features != self._width:
                    continue
                rows = self._linear_rows(parent, calls[id(parent)], first, second, attention)
                if rows is not None:
                    yield Pair(first, rows, second)
                    break

    def _linear_rows(
        self, parent: nn.Module, call: _Call, first: nn.Linear, second: nn.Linear, attention: bool
    ) -> torch.Tensor | None:
        """Return the rows of ``first`` that double the input of ``second`` when doubled."""
        plain = _input_of(second, parent, call)
        layouts = self._head_layouts(first, second) if attention else _halves(first, second)
        for rows in layouts:
            tensors = [first.weight] if first.bias is None else [first.weight, first.bias]
            self.announce(tensors)
            for tensor in tensors:
                tensor[rows] *= 2
            doubled = _input_of(second, parent, call)
            for tensor in tensors:
                tensor[rows] /= 2
            if (doubled - 2 * plain).abs().max() <= self._slack(plain):
                return rows
        return None

    def _slack(self, plain: torch.Tensor) -> torch.Tensor:
        return max(_SAME, TOLERANCE.get(self.dtype, 0.1) / 10) * plain.abs().max()

    def _heads(self) -> int:
        config: Any = self._model.config
        if hasattr(config, "get_text_config"):
            config = config.get_text_config()
        return int(config.num_attention_heads)

    def _head_layouts(self, first: nn.Linear, second: nn.Linear) -> Iterator[torch.Tensor]:
        """Yield where the value rows may be: all, the last of q|k|v, or the last of each head."""
        heads = self._heads()
        size = second.in_features // heads
        if not size or second.in_features % heads or first.out_features % size:
            return
        rows = torch.arange(first.out_features, device=first.weight.device)
        count = first.out_features // size
        groups, odd = divmod(count - heads, 2)
        if heads % count == 0:
            yield rows
        elif groups > 0 and not odd and heads % groups == 0:
            yield rows[-groups * size :]
            if heads == groups:
                yield rows.view(heads, 3, size)[:, 2].flatten()

    def _balance(self, pair: Pair) -> None:
        """Multiply row j of the first map by ``c_j`` and divide column j of the second by it."""
        first, rows, second = pair.first, pair.rows, pair.second
        self.announce([first.weight, second.weight, *_bias(first)])
        ups = first.weight[rows].double().norm(dim=1)
        downs = second.weight.double().norm(dim=0)
        factors = (downs / ups).sqrt()
        factors[(ups == 0) | (downs == 0)] = 1.0
        factors = self._rounded(factors)
        first.weight[rows] = _times(first.weight[rows], factors[:, None])
        for bias in _bias(first):
            bias[rows] = _times(bias[rows], factors)
        second.weight.copy_(_times(second.weight, 1 / factors))

    def _balance_heads(self, pair: Pair) -> None:
        """Split the spectrum of ``W_o W_v`` evenly; queries of a group share one ``W_v``."""
        self.announce([pair.first.weight, pair.second.weight, *_bias(pair.first)])
        for rows, columns in self.head_groups(pair):
            # [residual, sharing * size] -> [residual * sharing, size], one block a query head.
            stacked = pair.second.weight[:, columns].double().unflatten(1, (-1, len(rows)))
            outputs = stacked.transpose(0, 1).flatten(0, 1)
            biases = [bias[rows].double() for bias in _bias(pair.first)]
            moved = _even_spectrum(outputs, pair.first.weight[rows].double(), biases)
            if moved is None:
                continue
            outputs, values, biases = moved
            sharing = stacked.shape[1]
            back = outputs.unflatten(0, (sharing, -1)).transpose(0, 1).flatten(1)
            pair.second.weight[:, columns] = back.to(self.dtype)
            pair.first.weight[rows] = values.to(self.dtype)
            for bias, new in zip(_bias(pair.first), biases, strict=True):
                bias[rows] = new.to(self.dtype)

    def _fed_maps(
        self,
    ) -> Iterator[tuple[nn.Module, list[nn.Linear], nn.Module, _Call]]:
        """Yield each norm of the blocks with the maps fed by it, where nothing else seems to be."""
        for _, block in self._blocks:
            leaves = [m for m in block.modules() if not list(m.children())]
            calls = self._recorded([block, *leaves])
            for norm in leaves:
                own = dict(norm.named_parameters())
                if own.keys() != {"weight"} or own["weight"].dim() != 1 or id(norm) not in calls:
                    continue
                made = calls[id(norm)].output
                fed = [m for m in leaves if id(m) in calls and _is_input(made, calls[id(m)])]
                maps = [m for m in fed if isinstance(m, nn.Linear)]
                if maps and len(maps) == len(fed):
                    yield norm, maps, block, calls[id(block)]

    def _fold(self, norm: nn.Module, maps: list[nn.Linear], block: nn.Module, call: _Call) -> bool:
        """Fold one gain; take it back when the block notices (something else is fed, too)."""
        gain = norm.get_parameter("weight")
        probe = torch.linspace(-1, 1, len(gain), device=gain.device, dtype=gain.dtype)[None, None]
        self.announce([gain, *(m.weight for m in maps)])
        before = [p.clone() for p in (gain, *(m.weight for m in maps))]
        gain.zero_()
        # Some families write the gain as 1 + weight: a weight of zero then silences nothing.
        offset = 1.0 if norm(probe).abs().max() > 0 else 0.0
        factors = before[0].double() + offset
        factors[factors == 0] = 1.0
        if not offset:
            factors = self._rounded(factors)
        gain.copy_((before[0].double() + offset) / factors - offset)
        for linear in maps:
            linear.weight.copy_(_times(linear.weight, factors))
        wanted = _first_tensor(call.output)
        noticed = (_first_tensor(block(*call.args, **call.kwargs)) - wanted).abs().max()
        if noticed <= TOLERANCE.get(self.dtype, 0.1) * wanted.abs().max():
            return True
        for parameter, old in zip((gain, *(m.weight for m in maps)), before, strict=True):
            parameter.copy_(old)
        return False

    def _rounded(self, factors: torch.Tensor) -> torch.Tensor:
        """Return powers of two in half precision, where any other factor would round."""
        if self.dtype == torch.float32:
            return factors
        return factors.sign() * factors.abs().log2().round().exp2()

    def _recorded(self, modules: list[nn.Module]) -> dict[int, _Call]:
        """Run the probe once and return each module's call, by identity, in order of their ends."""
        calls: dict[int, _Call] = {}

        def keep(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            calls[id(module)] = _Call(args, kwargs, output)

        hooks = [m.register_forward_hook(keep, with_kwargs=True) for m in modules]
        try:
            self.logits()
        finally:
            for hook in hooks:
                hook.remove()
        return calls


def _even_spectrum(
    outputs: torch.Tensor, values: torch.Tensor, biases: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]] | None:
    """Return ``U S^1/2``, ``S^1/2 V^T`` of ``outputs @ values``, and biases moved along.

    Args:
        outputs: shape [residual * sharing, size].
        values: shape [size, residual].

    Returns:
        None when a bias cannot move: part of it is seen by no output direction.
    """
    left, inner_left = torch.linalg.qr(outputs)
    right, inner_right = torch.linalg.qr(values.T)
    u, s, vh = torch.linalg.svd(inner_left @ inner_right.T)
    if biases and s[-1] <= 1e-9 * s[0]:
        return None
    root = s.sqrt()
    # The values' coordinates change by T = S^-1/2 U^T R_o, and the bias with them.
    moved = [(u.T @ (inner_left @ bias)) / root for bias in biases]
    return left @ u * root, root[:, None] * (vh @ right.T), moved


def _halves(first: nn.Linear, second: nn.Linear) -> Iterator[torch.Tensor]:
    """Yield where the rows of the up map may be: all, or either half of a fused gate and up."""
    rows = torch.arange(first.out_features, device=first.weight.device)
    if len(rows) == second.in_features:
        yield rows
    elif len(rows) == 2 * second.in_features:
        yield from (rows[second.in_features :], rows[: second.in_features])


def _bias(linear: nn.Linear) -> list[torch.Tensor]:
    return [] if linear.bias is None else [linear.bias]


def _times(tensor: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    return (tensor.double() * factors).to(tensor.dtype)


def _first_tensor(output: Any) -> torch.Tensor:
    chosen: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return chosen


def _is_input(made: Any, call: _Call) -> bool:
    given = call.args[0] if call.args else None
    return (
        isinstance(made, torch.Tensor)
        and isinstance(given, torch.Tensor)
        and given.data_ptr() == made.data_ptr()
        and given.numel() == made.numel()
    )


def _input_of(second: nn.Module, parent: nn.Module, call: _Call) -> torch.Tensor:
    """Repeat a recorded call of ``parent`` and return what ``second`` receives, fp32."""
    seen: list[torch.Tensor] = []
    hook = second.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].float()))
    try:
        parent(*call.args, **call.kwargs)
    finally:
        hook.remove()
    return seen[-1]
