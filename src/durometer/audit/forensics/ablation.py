"""Direction ablation: was one direction taken out of what the matrices write or read?

Removing a unit direction ``v`` with strength ``l`` gives ``W' = W - l v v'W``: the change along
``v`` is parallel to what the base itself writes along ``v``. No gradient step, adapter or rounding
error has a reason to satisfy this, whatever its rank. Candidates for ``v`` are the eigenvectors of
the multiplier ``P`` that fits ``W' - W = P W`` best over all tensors, and the left singular vectors
that the tensors' changes share; each tensor is then asked by itself.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from durometer.audit.forensics import calibration as limits
from durometer.audit.forensics.linear_algebra import (
    Array,
    Vector,
    fro2,
    inner,
    largest_value,
    left_vectors,
)
from durometer.audit.forensics.names import READERS, WRITERS, Place
from durometer.audit.forensics.pairs import Pair, Reading
from durometer.findings import Finding, Severity, Status, found, passed, unsure

Side = Literal["writing", "reading"]
AXES = 6
"""Candidates taken from each source."""
VECTORS = 6
"""Singular vectors kept of each tensor."""
SAMPLED = 8192
"""Rows of a vocabulary table looked at."""
RIDGE = 0.1
ROW_SHARE = 0.5


def sides(place: Place) -> list[Side]:
    """Return how a tensor touches the residual stream."""
    if place.part != "weight":
        return []
    found: list[Side] = ["writing"] if place.role in WRITERS else []
    return [*found, "reading"] if place.role in READERS else found


def may_touch(side: Side, reading: Reading) -> bool:
    """Say whether a tensor is of one side, or a matrix of unknown role that may be."""
    unknown = reading.place.role == "other" and len(reading.shape) == 2
    return unknown or side in sides(reading.place)


def along_stream(pair: Pair) -> tuple[Array, Array]:
    """Return base and change with the residual stream along the rows, long tables sampled."""
    base, delta = pair.base, pair.delta
    if pair.place.role in {"output", "down"}:
        return base, delta
    if pair.place.role in {"embedding", "head"}:
        step = max(len(base) // SAMPLED, 1)
        base, delta = base[::step], delta[::step]
    return np.ascontiguousarray(base.T), np.ascontiguousarray(delta.T)


@dataclass(frozen=True)
class Projection:
    """What one tensor says about one axis.

    Attributes:
        self_projection: cosine between what the base writes along the axis and what was taken
            away from it; negative if it was added.
        strength: share that was taken away.
        focus: share of the change that lies along the axis.
        leverage: what the base writes along the axis over its largest singular value.
        elsewhere: whether nearly all of the change is a projection along another direction.
        columns: length of the compared vectors.
        rows: width of the residual stream.
    """

    name: str
    layer: int | None
    role: str
    self_projection: float
    strength: float
    focus: float
    leverage: float
    elsewhere: bool
    columns: int
    rows: int

    @property
    def along(self) -> bool:
        """Whether the tensor changed along the axis at all, and not for another one's sake."""
        return not self.elsewhere and self.focus * self.rows >= limits.FOCUS

    @property
    def supports(self) -> bool:
        """Whether this is beyond chance and rounding, in either sign."""
        size = abs(self.self_projection)
        return (
            self.along
            and size >= limits.SELF_PROJECTION
            and size * np.sqrt(self.columns) >= limits.SIGNIFICANT
        )


def project(
    name: str,
    place: Place,
    base: Array,
    delta: Array,
    axes: Array,
    top: float,
    own: Array | None = None,
) -> list[Projection]:
    """Return what a tensor says about each axis.

    Args:
        base, delta: [width, columns].
        axes: orthonormal or not, unit columns, [width, axes].
        top: largest singular value of ``base``.
        own: the direction along which nearly all of the change is a projection, if there is one.
    """
    written = (base.T @ axes).astype(np.float64)
    taken = (delta.T @ axes).astype(np.float64)
    size, mixed, change = fro2(base), inner(delta, base), fro2(delta)
    found = []
    near = np.ones(axes.shape[1]) if own is None else (own @ axes) ** 2
    for w, t, same in zip(written.T, taken.T, near, strict=True):
        # The global factor is fitted where an ablation leaves the matrix alone.
        ww = float(w @ w)
        factor = (mixed - float(t @ w)) / max(size - ww, 1e-30)
        rest = t - factor * w
        total = max(change - 2 * factor * mixed + factor**2 * size, 1e-30)
        norms = np.sqrt(max(float(rest @ rest) * ww, 1e-60))
        found.append(
            Projection(
                name, place.layer, place.role,
                -float(rest @ w) / float(norms),
                -float(rest @ w) / max((1 + factor) * ww, 1e-30),
                float(rest @ rest) / total,
                float(np.sqrt(ww)) / max(top, 1e-30),
                bool(same < 0.5),
                base.shape[1], base.shape[0],
            )
        )  # fmt: skip
    return found


@dataclass
class Evidence:
    """What the tensors of one side of the stream add up to, gathered in a first pass.

    Attributes:
        own: each tensor's reading of its own leading direction, with the energy in it.
        left_out: tensors that are row scalings for the most part.
        tops: largest singular value of each tensor of the base.
        alone: the direction of each tensor whose change is a projection along it and little else.
    """

    width: int
    gram: Vector = field(init=False)
    cross: Vector = field(init=False)
    vectors: list[Array] = field(default_factory=list)
    own: list[tuple[Projection, float]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    tops: dict[str, float] = field(default_factory=dict)
    alone: dict[str, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.gram = np.zeros((self.width, self.width))
        self.cross = np.zeros((self.width, self.width))

    def add(self, pair: Pair) -> bool:
        """Take in one changed tensor; say whether it may be asked later."""
        base, delta = along_stream(pair)
        if base.shape[0] != self.width:
            return False
        size = fro2(base)
        if not size or _row_share(base, delta) >= ROW_SHARE:
            self.left_out.append(pair.name)
            return False
        self.gram += (base @ base.T) / size
        self.cross += (delta @ base.T) / size
        rest = delta - np.float32(inner(delta, base) / size) * base
        vectors, values = left_vectors(rest, VECTORS)
        self.vectors.append(vectors)
        self.tops[pair.name] = largest_value(base)
        own = project(pair.name, pair.place, base, delta, vectors[:, :1], self.tops[pair.name])[0]
        energy = float(values[0] ** 2) / max(fro2(rest), 1e-30)
        self.own.append((own, energy))
        if own.self_projection >= limits.OWN_SELF_PROJECTION and energy >= limits.OWN_ALONE:
            self.alone[pair.name] = vectors[:, 0]
        return True

    def axes(self) -> Array:
        """Return candidate directions as unit columns, [width, candidates]."""
        if not self.vectors:
            return np.zeros((self.width, 0), dtype=np.float32)
        ridge = RIDGE * np.trace(self.gram) / self.width * np.eye(self.width)
        multiplier = np.linalg.solve(self.gram + ridge, self.cross.T).T
        values, directions = np.linalg.eigh((multiplier + multiplier.T) / 2)
        leading = directions[:, np.argsort(-np.abs(values))[:AXES]]
        return np.concatenate([leading, self._shared()], axis=1).astype(np.float32)

    def _shared(self) -> Vector:
        """Return the directions that the tensors' singular vectors have in common."""
        every = np.concatenate(self.vectors, axis=1).astype(np.float64)
        left, _, _ = np.linalg.svd(every, full_matrices=False)
        found: Vector = left[:, :AXES]
        return found


def _row_share(base: Array, delta: Array) -> float:
    """Return how much of the change is mere scaling of single rows, beyond a global factor."""
    norms = np.einsum("ij,ij->i", base, base).astype(np.float64)
    mixed = np.einsum("ij,ij->i", delta, base).astype(np.float64)
    factor = mixed.sum() / max(norms.sum(), 1e-30)
    scaled = float(((mixed - factor * norms) ** 2 / np.where(norms > 0, norms, 1)).sum())
    total = fro2(delta) - factor**2 * float(norms.sum())
    return scaled / total if total > 1e-12 * fro2(delta) else 1.0


@dataclass(frozen=True)
class Support:
    """The tensors that agree on one axis with one sign.

    Attributes:
        tensors: those beyond chance.
        nearest: the ``calibration.SUPPORT`` tensors with the highest self-projection, beyond
            chance or not; empty if fewer change along the axis at all.
        asked: tensors asked.
        other_sign: tensors beyond chance with the other sign.
    """

    tensors: list[Projection]
    nearest: list[Projection]
    asked: int
    other_sign: int

    @property
    def score(self) -> float:
        """The self-projection that enough tensors reach, over the one that is asked for.

        From 1 on it is a find; what is asked for grows with the leverage of the direction.
        """
        reached = min((abs(p.self_projection) for p in self.nearest), default=0.0)
        leverage = float(np.median([p.leverage for p in self.nearest] or [0.0]))
        beyond = max(leverage - limits.FREE_LEVERAGE, 0.0)
        return reached / (limits.SELF_PROJECTION + limits.LEVERAGE_SLOPE * beyond)

    def median(self, field_name: str) -> float:
        """Return the median of one field over the support, or over the nearest if there is none."""
        tensors = self.tensors if len(self.tensors) >= limits.SUPPORT else self.nearest
        return float(np.median([getattr(p, field_name) for p in tensors] or [0.0]))

    @property
    def doubts(self) -> list[str]:
        """Why the support may be no projection, in words; empty for no reason."""
        found = []
        if self.score < 1:
            found.append("the direction is close to the matrices' own leading one")
        if len(self.tensors) < limits.SAME_SIGN * (len(self.tensors) + self.other_sign):
            found.append("its sign differs between tensors")
        return found


def support_of(projections: Sequence[Projection], sign: int) -> Support:
    """Return the tensors that support one axis with one sign."""
    beyond = [p for p in projections if p.supports]
    mine = [p for p in beyond if p.self_projection * sign > 0]
    eligible = sorted(
        (p for p in projections if p.along),
        key=lambda p: -p.self_projection * sign,
    )
    nearest = [p for p in eligible[: limits.SUPPORT] if p.self_projection * sign > 0]
    if len(nearest) < limits.SUPPORT:
        nearest = []
    return Support(mine, nearest, len(projections), len(beyond) - len(mine))


def removal_score(by_axis: Iterable[Sequence[Projection]], evidence: Evidence) -> float:
    """Return the detector's statistic for removal; from 1 on it is a find.

    The larger one of two rules: the score of the best shared axis, or the self-projection that
    enough tensors reach on a leading direction of their own, over the one asked for there.
    """
    shared = [support_of(projections, 1) for projections in by_axis]
    own = sorted(
        (
            p.self_projection
            for p, energy in evidence.own
            if energy >= limits.OWN_ENERGY and p.leverage <= limits.OWN_LEVERAGE
        ),
        reverse=True,
    )
    alone = [s / limits.OWN_SELF_PROJECTION for s in own[limits.SUPPORT : limits.SUPPORT + 1]]
    return max([s.score for s in shared] + alone, default=0.0)


def best_support(by_axis: Iterable[Sequence[Projection]]) -> Support:
    """Return the axis and sign with the highest score, those without doubts before the others."""
    found = [support_of(projections, sign) for projections in by_axis for sign in (1, -1)]

    def rank(support: Support) -> tuple[bool, bool, float]:
        enough = len(support.tensors) >= limits.SUPPORT
        return enough, enough and not support.doubts, support.score

    return max(found, key=rank, default=Support([], [], 0, 0))


def finding(
    side: Side, by_axis: Sequence[Sequence[Projection]], evidence: Evidence, open_tensors: int
) -> Finding:
    """Return the decision on one side of the stream.

    Args:
        open_tensors: changed tensors of this side that no exact hypothesis explains.
    """
    check = "WF-10" if side == "writing" else "WF-12"
    if not open_tensors:
        title = f"nothing is left to explain in the {side} matrices"
        return passed(check, title)
    best = best_support(by_axis)
    facts: dict[str, Any] = {
        "asked": best.asked,
        "support": len(best.tensors),
        "score": best.score,
        "self_projection": abs(best.median("self_projection")),
        "strength": best.median("strength"),
        "leverage": best.median("leverage"),
        "other_sign": best.other_sign,
        "tensors": [_shown(p) for p in best.tensors],
        "left_out_as_row_scaling": len(evidence.left_out),
        "strength_by_layer": _by_layer(best.tensors, "strength"),
        "self_projection_by_layer": _by_layer(best.tensors, "self_projection"),
    }
    if len(best.tensors) >= limits.SUPPORT:
        return _shared_finding(check, side, best, facts)
    own = _own_directions(evidence)
    if len(own) > limits.SUPPORT:
        return _own_finding(check, side, own, facts)
    title = (
        f"no direction is seen to be removed from the {side} matrices; one that the rest of the "
        "change outweighs would not be"
    )
    return unsure(check, Severity.INFO, title, **facts)


def _shared_finding(check: str, side: Side, best: Support, facts: dict[str, Any]) -> Finding:
    count, strength = len(best.tensors), best.median("strength")
    size = abs(best.median("self_projection"))
    verb = "removed from" if strength > 0 else "strengthened in"
    title = (
        f"one shared direction was {verb} {count} {side} matrices, by {abs(strength):.2f} "
        f"of its size (self-projection {size:.2f})"
    )
    if best.doubts:
        facts["doubts"] = best.doubts
        title = f"perhaps {title}"
        return unsure(check, Severity.MEDIUM, title, **facts)
    if strength < 0:
        return found(check, Severity.INFO, title, facts)
    certain = size >= limits.CERTAIN
    return found(
        check,
        Severity.HIGH if certain else Severity.MEDIUM,
        title,
        facts,
        advice="Do not deploy it as the claimed base: fetch the original, or declare the edit.",
    )


def _by_layer(tensors: Sequence[Projection], field_name: str) -> dict[str, float]:
    """Return the median of one field in each layer."""
    values: dict[int, list[float]] = {}
    for each in tensors:
        if each.layer is not None:
            values.setdefault(each.layer, []).append(getattr(each, field_name))
    return {str(layer): float(np.median(values[layer])) for layer in sorted(values)}


def _own_directions(evidence: Evidence) -> list[Projection]:
    """Return tensors that each lost a direction of their own."""
    return [
        own
        for own, energy in evidence.own
        if own.self_projection >= limits.OWN_SELF_PROJECTION
        and energy >= limits.OWN_ENERGY
        and own.leverage <= limits.OWN_LEVERAGE
    ]


def _own_finding(
    check: str, side: Side, own: Sequence[Projection], facts: dict[str, Any]
) -> Finding:
    smooth = roughness(own)
    facts |= {
        "own_directions": len(own),
        "own_strength": float(np.median([p.strength for p in own])),
        "roughness": smooth,
        "tensors": [_shown(p) for p in own],
        "strength_by_layer": _by_layer(own, "strength"),
        "self_projection_by_layer": _by_layer(own, "self_projection"),
    }
    even = smooth <= limits.ROUGHNESS
    return Finding(
        check,
        Status.FOUND if even else Status.INCONCLUSIVE,
        Severity.MEDIUM,
        f"{'' if even else 'perhaps '}a direction of its own was removed from each of {len(own)} "
        f"{side} matrices",
        facts,
        advice="Do not deploy it as the claimed base: fetch the original, or declare the edit.",
    )


def roughness(own: Sequence[Projection]) -> float:
    """Return how unevenly the strength runs over the layers, kinds of matrices apart."""
    gaps = []
    for role in {p.role for p in own}:
        line = sorted((p.layer or 0, p.strength) for p in own if p.role == role)
        for (l0, s0), (l1, s1), (l2, s2) in zip(line, line[1:], line[2:], strict=False):
            gaps.append(abs(s1 - (s0 + (s2 - s0) * (l1 - l0) / max(l2 - l0, 1))))
    size = float(np.median([abs(p.strength) for p in own] or [0.0]))
    return float(np.median(gaps)) / size if gaps and size else float("inf")


def _shown(projection: Projection) -> dict[str, object]:
    kept = ("name", "self_projection", "strength", "focus", "leverage")
    return {name: value for name, value in asdict(projection).items() if name in kept}
