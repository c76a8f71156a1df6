"""What writes into the residual stream, and taking directions out of everything it writes.

A writer is a map whose output is added to the residual stream: the last map of every attention and
feed-forward part, the experts' last maps and the embedding tables. ``x - strength U (Uᵀ x)`` on
every writer's output takes the span of ``U`` (orthonormal columns, shape [width, rank]) out of the
whole stream. It can be written into the weights, or hung on the writers as forward hooks that add
two rank-k products: the same function, put on and taken off without touching a weight.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from durometer.core.errors import NotApplicableError
from durometer.core.structure import blocks, width

# What the last map of a part is called; the shape must fit as well, and `require_complete` finds
# out whether one was missed.
ATTENTION_LAST = frozenset({"o_proj", "out_proj", "c_proj", "dense", "wo"})
MLP_LAST = frozenset({"down_proj", "dense_4h_to_h", "fc2", "fc_out", "w2"})
LAST_MAPS = ATTENTION_LAST | MLP_LAST
FUSED_LAST_MAPS = frozenset({"down_proj", "w2"})
FUSED_FIRST_MAPS = frozenset({"gate_up_proj", "gate_proj", "up_proj", "w1", "w3", "w13"})
# Largest share of a hidden state that may be left along a direction that was taken out.
LEFTOVER = {torch.float32: 1e-4, torch.float64: 1e-8}
HALF_LEFTOVER = 0.03
PROBE_TOKENS = 12
Edit = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Writer:
    """One weight tensor whose products are added to the residual stream.

    Attributes:
        module: name of the module whose output it shapes.
        weight, bias: names of the parameters; '' for no bias.
        axis: axis of the weight that lies along the residual stream.
        embedding: whether it is a table of rows rather than a linear map.
        gain: factor by which a norm between the writer and the residual addition multiplies each
            component, shape [width]; None where there is no such norm.
    """

    module: str
    weight: str
    bias: str
    axis: int
    embedding: bool = False
    gain: torch.Tensor | None = None

    def seen_from(self, basis: torch.Tensor) -> torch.Tensor:
        """Return what to take out of this writer so that ``basis`` is gone after its norm.

        ``rᵀ diag(gain) W x`` vanishes when ``W`` has no component along ``gain * r``.
        """
        if self.gain is None:
            return basis
        return orthonormal(self.gain[:, None].to(basis) * basis)


def orthonormal(columns: torch.Tensor) -> torch.Tensor:
    """Return an orthonormal basis of the columns' span, shape [width, rank], fp32.

    A single vector of shape [width] counts as one column.
    """
    matrix = columns[:, None] if columns.dim() == 1 else columns
    q, r = torch.linalg.qr(matrix.double())
    # QR leaves signs open; keep those of the columns.
    aligned: torch.Tensor = q * torch.sign(torch.diagonal(r))
    return aligned.float()


def take_out(states: torch.Tensor, basis: torch.Tensor, strength: float) -> torch.Tensor:
    """Return ``x - strength U (Uᵀ x)`` for vectors along the last axis, in their dtype."""
    exact = states.float()
    basis = basis.to(exact.device)
    return (exact - strength * ((exact @ basis) @ basis.T)).to(states.dtype)


def take_out_keeping_norms(
    weight: torch.Tensor, basis: torch.Tensor, strength: float
) -> torch.Tensor:
    """Return ``weight`` with the directions taken out and every row back at its norm.

    The closed form of projecting, then rescaling: DoRA with ``A = Uᵀ W``, ``B = -strength U`` and
    the rows' own norms as magnitudes; no matrix is decomposed.

    Args:
        weight: shape [..., width, inputs].
        basis: shape [width, rank].
    """
    matrix = weight.float()
    basis = basis.to(matrix.device)
    down = basis.T @ matrix
    along = matrix @ down.mT
    norms = (matrix**2).sum(-1)
    crossed = (basis * along).sum(-1)
    gram = down @ down.mT
    squared = ((basis @ gram) * basis).sum(-1)
    after = norms - 2 * strength * crossed + strength**2 * squared
    # A row that is nothing but the directions has nothing left to be scaled up.
    alive = after > 1e-10 * norms
    scale = torch.where(alive, (norms / after.where(alive, norms.new_ones(()))).sqrt(), 1.0)
    return (scale[..., None] * (matrix - strength * (basis @ down))).to(weight.dtype)


def writers(model: nn.Module) -> list[Writer]:
    """Return everything that writes into the residual stream, found by role and shape.

    Raises:
        NotApplicableError: a block without a map of that role, experts in an unknown layout, or an
            embedding of another width.
    """
    gains = _norms_behind_parts(model)
    found = _tables(model)
    for name, block in blocks(model):
        own = [w for w in _in_block(name, block, width(model)) if w is not None]
        if not own:
            raise NotApplicableError(f"no map that writes into the residual stream in {name}")
        for writer in own:
            gain = next((g for part, g in gains.items() if _inside(writer.module, part)), None)
            found.append(Writer(**(vars(writer) | {"gain": gain})))
    known = {name for name, _ in model.named_parameters()}
    missing = [writer.weight for writer in found if writer.weight not in known]
    if missing:
        raise NotApplicableError(f"{missing[0]} is shared with another weight and not the table")
    return found


def _inside(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")


def _tables(model: nn.Module) -> list[Writer]:
    """Return the token table, and learned position tables beside the list of blocks."""
    table: Any = model.get_input_embeddings()  # type: ignore[operator]
    size = width(model)
    if not isinstance(table, nn.Embedding) or table.embedding_dim != size:
        raise NotApplicableError("the token embedding is not a table of the residual width")
    place = blocks(model)[0][0].rpartition(".")[0].rpartition(".")[0]
    beside = model.get_submodule(place)
    return [
        Writer(name, f"{name}.weight", "", axis=1, embedding=True)
        for name, module in model.named_modules()
        if module is table
        or (
            isinstance(module, nn.Embedding)
            and module.embedding_dim == size
            and any(module is child for child in beside.children())
        )
    ]


def _in_block(block_name: str, block: nn.Module, size: int) -> Iterator[Writer]:
    for part, module in block.named_modules():
        name = f"{block_name}.{part}" if part else block_name
        axis = _output_axis(module)
        role = part.rpartition(".")[2]
        if axis is not None and role in LAST_MAPS:
            weight: Any = module.weight
            if weight.dim() == 2 and weight.shape[axis] == size:
                bias = "" if getattr(module, "bias", None) is None else f"{name}.bias"
                yield Writer(name, f"{name}.weight", bias, axis)
        elif "expert" in part:
            yield from _fused(name, module, size)


def _output_axis(module: nn.Module) -> int | None:
    if isinstance(module, nn.Linear):
        return 0
    # GPT-2's Conv1D keeps its matrix transposed.
    return 1 if type(module).__name__ == "Conv1D" else None


def _fused(name: str, module: nn.Module, size: int) -> Iterator[Writer]:
    """Yield the last maps of experts fused into one tensor, [experts, out, in] or transposed."""
    fused = [role for role, p in module.named_parameters(recurse=False) if p.dim() == 3]
    strange = set(fused) - FUSED_LAST_MAPS - FUSED_FIRST_MAPS
    if strange or (fused and not FUSED_LAST_MAPS & set(fused)):
        raise NotApplicableError(f"experts of an unknown layout in {name}: {sorted(fused)}")
    if getattr(module, "has_post_expert_norm", False):
        raise NotApplicableError(f"a norm behind each expert of {name}")
    for role in FUSED_LAST_MAPS & set(fused):
        weight: Any = getattr(module, role)
        axis = 2 if getattr(module, "is_transposed", weight.shape[1] != size) else 1
        if weight.shape[axis] != size:
            raise NotApplicableError(f"experts of an unknown layout in {name}.{role}")
        bias = f"{name}.{role}_bias" if hasattr(module, f"{role}_bias") else ""
        yield Writer(name, f"{name}.{role}", bias, axis)


@torch.no_grad()
def _norms_behind_parts(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the gain of each norm whose input is the very output of an attention or MLP part.

    What a norm is called says nothing (`post_attention_layernorm` stands behind the residual
    addition in Llama and before it in Gemma-2), so one short pass shows which tensor it is given.
    """
    size = width(model)
    outputs: dict[int, tuple[str, torch.Tensor]] = {}
    behind: dict[str, nn.Module] = {}

    def remember(part: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            first = output if isinstance(output, torch.Tensor) else output[0]
            outputs[id(first)] = (part, first)

        return hook

    def look(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs and id(inputs[0]) in outputs:
            behind[outputs[id(inputs[0])][0]] = module

    handles = []
    for name, block in blocks(model):
        for child_name, child in block.named_children():
            weight = getattr(child, "weight", None)
            if isinstance(weight, nn.Parameter) and weight.shape == (size,):
                handles.append(child.register_forward_pre_hook(look))
            elif next(child.parameters(), None) is not None:
                handles.append(child.register_forward_hook(remember(f"{name}.{child_name}")))
    try:
        _probe(model)
    finally:
        for handle in handles:
            handle.remove()
    return {part: _gain(norm, size) for part, norm in behind.items()}


def _gain(norm: nn.Module, size: int) -> torch.Tensor:
    """Return the factor that ``norm`` applies to each component, whatever it stores (fp32).

    A vector of alternating signs has mean 0 and norm 1, and its negative cancels any bias.
    """
    weight: Any = norm.weight
    dtype = weight.dtype if isinstance(norm, nn.LayerNorm) else torch.float32
    signs = torch.ones(size, dtype=dtype, device=weight.device)
    signs[1::2] = -1
    gain: torch.Tensor = signs * (norm(signs[None]) - norm(-signs[None]))[0] / 2
    return gain.float().cpu()


def _probe(model: nn.Module) -> None:
    table: Any = model.get_input_embeddings()  # type: ignore[operator]
    ids = (torch.arange(PROBE_TOKENS, device=table.weight.device) * 7919 + 3) % table.num_embeddings
    model(input_ids=ids[None], use_cache=False)


def hook_block_input(block: nn.Module, edit: Edit) -> Any:
    """Have ``edit`` change the hidden states that flow into ``block``; return the hook's handle."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (edit(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": edit(kwargs["hidden_states"])}

    return block.register_forward_pre_hook(hook, with_kwargs=True)


def _output_hook(edit: Edit) -> Any:
    def hook(module: nn.Module, inputs: Any, output: Any) -> torch.Tensor:
        if not isinstance(output, torch.Tensor):
            raise NotApplicableError(f"{type(module).__name__} returns no plain tensor")
        return edit(output)

    return hook


@contextmanager
def low_rank_edit(
    model: nn.Module,
    basis: torch.Tensor,
    strength: float = 1.0,
    found: Sequence[Writer] | None = None,
) -> Iterator[None]:
    """Take directions out of every writer's output inside the context; no weight is touched.

    Gives the logits of ``edit_weights`` to rounding, tied output heads included.

    Args:
        basis: orthonormal columns, shape [width, rank], or one unit vector, shape [width].
        found: the model's ``writers``, where they are known already.

    Raises:
        NotApplicableError: see ``writers``.
    """
    basis = orthonormal(basis)
    handles = []
    by_module = {w.module: w for w in (writers(model) if found is None else found)}

    def edit(columns: torch.Tensor) -> Edit:
        return lambda states: take_out(states, columns, strength)

    device = next(model.parameters()).device
    for name, writer in by_module.items():
        columns = writer.seen_from(basis).to(device)
        handles.append(model.get_submodule(name).register_forward_hook(_output_hook(edit(columns))))
    table: Any = model.get_input_embeddings()  # type: ignore[operator]
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None and head.weight is table.weight:
        # The weight form edits a tied table's rows, and with them what the head reads.
        change = edit(basis.to(device))
        handles.append(head.register_forward_pre_hook(lambda _, inputs: (change(inputs[0]),)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def edit_weights(
    found: Sequence[Writer],
    parameters: dict[str, nn.Parameter],
    basis: torch.Tensor,
    strength: float,
    *,
    keep_norms: bool = False,
) -> int:
    """Write the edit into the weights in place; return how many weights were edited.

    Args:
        found: the model's ``writers``.
        parameters: every weight and bias that they name, see ``edited_names``.
        keep_norms: bring the rows of linear maps back to their norms (tables are edited plainly).
    """
    basis, edited = orthonormal(basis), 0
    for writer in found:
        columns, weight = writer.seen_from(basis), parameters[writer.weight]
        if keep_norms and not writer.embedding:
            aligned = weight.movedim(writer.axis, -2)
            changed = take_out_keeping_norms(aligned, columns, strength).movedim(-2, writer.axis)
        else:
            aligned = weight.movedim(writer.axis, -1)
            changed = take_out(aligned, columns, strength).movedim(-1, writer.axis)
        weight.copy_(changed)
        edited += weight.numel()
        if writer.bias:
            bias = parameters[writer.bias]
            bias.copy_(take_out(bias, columns, strength))
            edited += bias.numel()
    return edited


def edited_names(found: Sequence[Writer]) -> list[str]:
    """Return the names of all weights and biases of ``found``."""
    return [name for writer in found for name in (writer.weight, writer.bias) if name]


@torch.no_grad()
def leftover(model: nn.Module, basis: torch.Tensor) -> float:
    """Return the largest share of a hidden state that lies in the span of ``basis``.

    Looked at before and after every block, over the positions of one short pass.
    """
    basis = orthonormal(basis)
    shares: list[float] = []

    def see(states: torch.Tensor) -> torch.Tensor:
        exact = states.float()
        along = (exact @ basis.to(exact.device)).norm(dim=-1)
        shares.append(float((along / exact.norm(dim=-1).clamp_min(1e-30)).max()))
        return states

    def see_output(module: nn.Module, inputs: Any, output: Any) -> None:
        see(output if isinstance(output, torch.Tensor) else output[0])

    chain = [block for _, block in blocks(model)]
    handles = [hook_block_input(block, see) for block in chain]
    handles.append(chain[-1].register_forward_hook(see_output))
    try:
        _probe(model)
    finally:
        for handle in handles:
            handle.remove()
    return max(shares)


def require_complete(model: nn.Module, found: Sequence[Writer], basis: torch.Tensor) -> float:
    """Return what is left along ``basis`` when every writer is edited in full.

    Raises:
        NotApplicableError: too much is left, so something else writes into the residual stream
            (a norm behind the embedding, say); editing a part of the writers would pass in silence.
    """
    with low_rank_edit(model, basis, 1.0, found):
        share = leftover(model, basis)
    allowed = LEFTOVER.get(next(model.parameters()).dtype, HALF_LEFTOVER)
    if not share <= allowed:
        raise NotApplicableError(
            f"{share:.1e} of a hidden state is left along the direction: not every map that writes "
            "into the residual stream was found"
        )
    return share
