"""The weight matrices of a model's blocks, experts that are fused into one tensor included."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from durometer.core.adapters import Targets, plays
from durometer.core.errors import NotApplicableError
from durometer.core.structure import blocks

# Most of the blocks' matrix entries that may be in modules of no known kind.
_MOST_UNKNOWN = 0.1


@dataclass(frozen=True)
class Matrix:
    """A parameter that holds one linear map, or one an expert.

    Attributes:
        name: as in ``named_parameters``.
        parameter: ``[outputs, inputs]``, or ``[experts, outputs, inputs]``.
        transposed: the last two dimensions are the other way round.
    """

    name: str
    parameter: nn.Parameter
    transposed: bool = False

    def turned(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a view of ``tensor`` from the parameter's layout to [..., outputs, inputs].

        It turns back what it turned, too.
        """
        return tensor.mT if self.transposed else tensor

    def maps(self) -> torch.Tensor:
        """Return a view of the weights, without gradient, as [..., outputs, inputs]."""
        return self.turned(self.parameter.detach())

    def each(self) -> torch.Tensor:
        """Return a view of the weights as [maps, outputs, inputs]: one map, or one an expert."""
        maps = self.maps()
        return maps if maps.dim() > 2 else maps[None]


def block_matrices(model: nn.Module, targets: Targets = "all") -> dict[str, Matrix]:
    """Return the linear maps and fused experts inside the blocks, by parameter name.

    Embeddings, norms, biases, routers of transformers' own kind and the output head are none; a
    parameter used twice is returned once.

    Raises:
        NotApplicableError: of ``targets`` there are none, experts do not declare their layout, or
            more than a tenth of the entries are in modules of no known kind.
    """
    found, others = _sorted(model, targets)
    size = sum(matrix.parameter.numel() for matrix in found.values())
    unknown = sum(parameter.numel() for parameter in others.values())
    if found and unknown > _MOST_UNKNOWN * (size + unknown):
        raise NotApplicableError(
            f"{unknown} of {size + unknown} matrix entries are in modules of no known kind "
            f"({next(iter(others))}){_advice(model, targets)}"
        )
    if not found:
        raise NotApplicableError(f"no weight matrices found in the blocks for targets={targets}")
    return found


def left_out(model: nn.Module) -> list[str]:
    """Return the blocks' parameters of two dimensions or more that ``block_matrices`` leaves.

    These are routers, which runtimes keep at full precision, too.
    """
    return list(_sorted(model)[1])


def vocabulary_matrices(model: nn.Module) -> dict[str, Matrix]:
    """Return embedding and output head by parameter name, one where they are tied."""
    wanted = [model.get_input_embeddings(), model.get_output_embeddings()]  # type: ignore[operator]
    ids = {id(module.weight) for module in wanted if module is not None}
    return {name: Matrix(name, p) for name, p in model.named_parameters() if id(p) in ids}


def experts_unreached(scores: Mapping[str, torch.Tensor], matrices: Mapping[str, Matrix]) -> int:
    """Count the fused experts' maps whose scores or moments are all zero: no token came by.

    Args:
        scores: by parameter name, [experts, ...] where the matrix is fused.
    """
    return sum(
        int((~reached(scores[name])).sum())
        for name, matrix in matrices.items()
        if matrix.parameter.dim() > 2
    )


def reached(scores: torch.Tensor) -> torch.Tensor:
    """Say of each entry of the first dimension whether anything in it is not 0, bool [entries]."""
    return (scores != 0).flatten(1).any(1)


def _sorted(
    model: nn.Module, targets: Targets = "all"
) -> tuple[dict[str, Matrix], dict[str, nn.Parameter]]:
    """Return the matrices of the blocks, and what else has two dimensions or more, by name."""
    modules = dict(model.named_modules())
    prefixes = tuple(f"{name}." for name, _ in blocks(model))
    known, others = dict[str, Matrix](), dict[str, nn.Parameter]()
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or not name.startswith(prefixes) or not plays(name, targets):
            continue
        owner, _, leaf = name.rpartition(".")
        if isinstance(modules[owner], nn.Linear) and leaf == "weight":
            known[name] = Matrix(name, parameter)
        elif parameter.dim() == 3 and "expert" in name:
            turned = getattr(modules[owner], "is_transposed", None)
            if turned is None:
                raise NotApplicableError(
                    f"the layout of the fused experts {name} is not declared"
                    f"{_advice(model, targets)}"
                )
            known[name] = Matrix(name, parameter, bool(turned))
        else:
            others[name] = parameter
    return known, others


def _advice(model: nn.Module, targets: Targets) -> str:
    """Return the advice to edit attention alone, where ``targets`` is more and that works."""
    if targets == "attention":
        return ""
    try:
        block_matrices(model, "attention")
    except NotApplicableError:
        return ""
    return "; use targets=attention, or a method that has this setting"
