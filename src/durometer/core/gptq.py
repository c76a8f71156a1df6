"""GPTQ (arXiv 2210.17323): rounding column by column, the error moved to later columns."""

import torch
from torch import Tensor

from durometer.core.quantisation import Grid, Scheme

DAMPING = 0.01
"""Share of the Hessian's mean diagonal that is added to it."""

# Columns whose updates of later ones are applied together (of a row that shares one scale).
_BATCH = 128


def damped_hessian(moments: Tensor, damping: float = DAMPING) -> Tensor:
    """Return ``H = 2 X Xᵀ + damping * mean(diag) I`` in fp64.

    Args:
        moments: ``sum x xᵀ``, shape ``[inputs, inputs]``, see ``core.capture.input_moments``.
        damping: 0.01 in the paper. Inputs that were always zero make H the identity.
    """
    hessian = 2 * moments.double()
    mean = hessian.diagonal().mean()
    hessian.diagonal().add_(torch.where(mean > 0, damping * mean, 1.0))
    return hessian


def gptq(
    weight: Tensor,
    moments: Tensor,
    bits: int,
    group: int | None = None,
    scheme: Scheme = "symmetric",
    damping: float = DAMPING,
) -> Tensor:
    """Return ``weight [outputs, inputs]`` quantised so that its outputs change little (fp32).

    Column j is rounded, and its error ``(w_j - q_j) / U_jj`` times ``U_j`` is taken off the later
    columns, U being the upper Cholesky factor of the inverse Hessian. A group's grid is fitted to
    its columns as updated so far when its first column's turn comes.

    Args:
        moments: ``sum x xᵀ`` of the inputs, shape ``[inputs, inputs]``.
        group: inputs that share a grid; None for the whole row, fitted before any update.

    Raises:
        InputError: ``bits`` outside 2 to 16.
        torch.linalg.LinAlgError: moments that are not those of any finite inputs.
    """
    factor = _inverse_factor(damped_hessian(moments, damping))
    rest = weight.double().clone()
    inputs = weight.shape[1]
    # Updates are batched by group, so that a grid is always fitted to columns that are up to date.
    grid = Grid.fit(rest, bits, scheme) if group is None else None
    size = group or _BATCH
    quantised = torch.empty_like(rest)
    for start in range(0, inputs, size):
        end = min(start + size, inputs)
        columns = rest[:, start:end]
        used = grid or Grid.fit(columns, bits, scheme)
        quantised[:, start:end], errors = _round_columns(
            columns, factor[start:end, start:end], used
        )
        rest[:, end:] -= errors @ factor[start:end, end:]
    return quantised.float()


def _round_columns(columns: Tensor, factor: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Round ``columns [outputs, n]`` from left to right, updating them in place.

    Returns the rounded columns and the errors that later batches must take up, both of that shape.
    """
    quantised, errors = torch.empty_like(columns), torch.empty_like(columns)
    for column in range(columns.shape[1]):
        values = columns[:, column : column + 1]
        nearest = grid.nearest(values)
        error = (values - nearest) / factor[column, column]
        columns[:, column + 1 :] -= error * factor[column, column + 1 :]
        quantised[:, column : column + 1], errors[:, column : column + 1] = nearest, error
    return quantised, errors


def _inverse_factor(hessian: Tensor) -> Tensor:
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor


def output_error(before: Tensor, after: Tensor, moments: Tensor) -> float:
    """Return ``‖(after - before) X‖²`` summed over the inputs that ``moments`` sums.

    Args:
        before: ``[..., outputs, inputs]``.
        after: of the same shape.
        moments: ``sum x xᵀ``, shape ``[..., inputs, inputs]``.
    """
    change = (after.float() - before.float()).to(moments.dtype)
    return float(((change @ moments) * change).sum())
