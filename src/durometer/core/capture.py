"""What flows into the blocks' matrices: second moments of their inputs over chosen tokens."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from durometer.core.errors import NotApplicableError
from durometer.core.experts import LAST_MAP, inner_states, require_declared, require_same
from durometer.core.matrices import Matrix
from durometer.core.rows import Row

Tokens = Literal["response", "prompt"]


@torch.no_grad()
def input_moments(
    model: nn.Module,
    rows: Sequence[Row],
    matrices: Mapping[str, Matrix],
    *,
    full: bool = False,
    tokens: Tokens = "response",
) -> dict[str, torch.Tensor]:
    """Return the summed second moments of each matrix's inputs (fp32), by parameter name.

    Of fused experts each has moments of its own, over the tokens that are routed to it; of an
    expert that no token reaches they are zero.

    Args:
        matrices: see ``core.matrices.block_matrices``.
        full: ``sum x xᵀ``, shape [inputs, inputs]; else ``sum x²``, shape [inputs]; experts first.
        tokens: positions that count: those that predict a label, so that prompts do not leak into
            scores, or those of the prompt.

    Raises:
        NotApplicableError: a linear map was never reached, or experts do not compute what their
            module declares.
    """
    sums = _Sums(full)
    device = next(model.parameters()).device
    handles = _watch(model, matrices, sums)
    try:
        for row in rows:
            first = row.first_label
            sums.span = slice(0, first) if tokens == "prompt" else slice(first - 1, -1)
            model(input_ids=torch.tensor([row.ids], device=device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    missing = [name for name in matrices if name not in sums.moments]
    if missing:
        raise NotApplicableError(f"no token reached {missing[0]} and {len(missing) - 1} more maps")
    return {name: sums.moments[name] for name in matrices}


class _Sums:
    """Moments as they add up.

    Attributes:
        span: positions of the present row that count.
    """

    def __init__(self, full: bool) -> None:
        self._full = full
        self.span = slice(0)
        self.moments: dict[str, torch.Tensor] = {}

    def add(self, name: str, inputs: torch.Tensor) -> None:
        """Add the moment of ``inputs`` [tokens, width]."""
        moment = self._moment(inputs)
        self.moments[name] = self.moments[name] + moment if name in self.moments else moment

    def add_expert(self, name: str, inputs: torch.Tensor, expert: int, experts: int) -> None:
        """Add the moment of what reached one expert."""
        moment = self._moment(inputs)
        if name not in self.moments:
            self.moments[name] = moment.new_zeros(experts, *moment.shape)
        self.moments[name][expert] += moment

    def _moment(self, inputs: torch.Tensor) -> torch.Tensor:
        exact = inputs.float()
        return exact.T @ exact if self._full else (exact**2).sum(0)


def _watch(model: nn.Module, matrices: Mapping[str, Matrix], sums: _Sums) -> list[Any]:
    """Have every matrix's inputs added to ``sums``; return the hooks' handles."""
    handles, fused = [], dict[str, list[str]]()
    for name, matrix in matrices.items():
        path, _, leaf = name.rpartition(".")
        if matrix.parameter.dim() > 2:
            fused.setdefault(path, []).append(leaf)
    for path in fused:
        require_declared(path, model.get_submodule(path))
    for name, matrix in matrices.items():
        if matrix.parameter.dim() == 2:
            module = model.get_submodule(name.rpartition(".")[0])
            handles.append(module.register_forward_pre_hook(_map_hook(name, sums)))
    for path, leaves in fused.items():
        experts = model.get_submodule(path)
        handles.append(experts.register_forward_hook(_experts_hook(path, leaves, sums)))
    return handles


def _map_hook(name: str, sums: _Sums) -> Any:
    def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        sums.add(name, inputs[0].reshape(-1, inputs[0].shape[-1])[sums.span])

    return hook


def _experts_hook(path: str, leaves: Sequence[str], sums: _Sums) -> Any:
    tried = False

    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        nonlocal tried
        if not tried:
            require_same(path, module, inputs, output)
            tried = True
        states, indices = inputs[0][sums.span], inputs[1][sums.span]
        experts = len(module.get_parameter(LAST_MAP))
        for expert in indices.unique().tolist():
            given = states[(indices == expert).any(-1)]
            for leaf in leaves:
                received = inner_states(module, given, expert) if leaf == LAST_MAP else given
                sums.add_expert(f"{path}.{leaf}", received, expert, experts)

    return hook
