"""Linear combinations of known parents: least squares on the changes (task vectors)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from durometer.audit.forensics.calibration import MERGE_RESIDUAL, MERGE_SPREAD
from durometer.audit.forensics.linear_algebra import Array, inner
from durometer.audit.forensics.pairs import Pair, read_pair
from durometer.audit.tensors import ArraySource, TensorSource
from durometer.findings import Finding, Severity, found, left_out, unsure


@dataclass(frozen=True)
class Regression:
    """One tensor as ``(1 + scale - sum w) base + sum w_i parent_i``.

    Attributes:
        weights: of the parents.
        scale: total weight minus 1; about 0 for averages, above 0 for arcs (SLERP).
        left: share of the change's energy that is left.
        energy: squared norm of the change.
    """

    name: str
    weights: NDArray[np.float64]
    scale: float
    left: float
    energy: float


def measure(
    pair: Pair, subject: TensorSource, parents: Sequence[TensorSource]
) -> Regression | None:
    """Return the regression of one matrix, None where a parent lacks the tensor."""
    changes: list[Array] = []
    for parent in parents:
        known = {name: name for name in parent.names()}
        if pair.name not in known:
            return None
        other = read_pair(parent, ArraySource({pair.name: pair.base}), pair.name, pair.name)
        if other is None or other.base.shape != pair.base.shape:
            return None
        changes.append(other.delta)
    return _solve(pair, [pair.base, *changes])


def _solve(pair: Pair, regressors: Sequence[Array]) -> Regression:
    gram = np.array([[inner(a, b) for b in regressors] for a in regressors])
    target = np.array([inner(pair.delta, a) for a in regressors])
    # Parents that did not change this tensor have no weight in it.
    sizes = np.sqrt(np.diag(gram))
    safe = np.where(sizes > 0, sizes, 1)
    solution = np.linalg.lstsq(gram / np.outer(safe, safe), target / safe, rcond=1e-10)[0] / safe
    explained = 2 * float(solution @ target) - float(solution @ gram @ solution)
    left = max(1 - explained / max(pair.changed, 1e-30), 0.0)
    return Regression(pair.name, solution[1:], float(solution[0]), left, pair.changed)


def finding(regressions: Sequence[Regression]) -> Finding:
    """Return whether the subject is a combination of the parents."""
    if not regressions:
        reason = "no matrix with an open difference is in all of the given parents"
        return left_out("WF-40", "combination of the given parents", reason)
    energies = np.array([r.energy for r in regressions])
    left = float(np.average([r.left for r in regressions], weights=energies))
    weights = np.array([r.weights for r in regressions])
    median = np.median(weights, axis=0)
    spread = float(np.median(np.abs(weights - median), axis=0).max())
    evidence: dict[str, Any] = {
        "weights": [float(w) for w in median],
        "weight_of_base": float(1 - median.sum()),
        "spread_over_tensors": spread,
        "total_weight": 1 + float(np.median([r.scale for r in regressions])),
        "share_left": left,
        "tensors": len(regressions),
    }
    shown = ", ".join(f"{w:.2f}" for w in median)
    if left > MERGE_RESIDUAL:
        close = left < 0.5
        title = (
            f"the given parents account for {1 - left:.0%} of the change, with weights {shown}"
            if close
            else "no combination of the given parents accounts for the change"
        )
        return unsure("WF-40", Severity.INFO, title, **evidence)
    varied = "" if spread <= MERGE_SPREAD else ", which vary over the tensors"
    return found(
        "WF-40",
        Severity.MEDIUM,
        f"a combination of the given parents with weights {shown}{varied}",
        evidence,
        advice="Audit the parents: what one of them lost, the merge may have lost.",
    )
