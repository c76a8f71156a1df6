"""Which tensors differ from the base, by how much, and whether it is their base at all."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from durometer.audit.forensics.calibration import RELATED
from durometer.audit.forensics.names import shared_names
from durometer.audit.forensics.pairs import Pair, Reading, cosine
from durometer.audit.tensors import TensorSource
from durometer.findings import Finding, Severity, Status, failed, found, passed

LISTED = 12
PACKED = (".qweight", ".weight_packed", ".weight_quantized")
"""Ends of names of tensors that hold several values in one number."""


@dataclass(frozen=True)
class Difference:
    """Size of the change of one tensor.

    Attributes:
        relative: norm of the change over the norm of the base.
        equal: share of values that are equal bit for bit.
        cosine: between subject and base.
        size: number of values.
    """

    relative: float
    equal: float
    cosine: float
    size: int


def measure(pair: Pair) -> Difference:
    """Return how far the subject's tensor is from the base's."""
    equal = float(np.count_nonzero(pair.subject == pair.base)) / max(pair.base.size, 1)
    if equal == 1.0:
        return Difference(0.0, 1.0, 1.0, pair.base.size)
    if not finite(pair):
        return Difference(0.0, min(equal, 1 - 1e-12), 0.0, pair.base.size)
    relative = float(np.sqrt(pair.changed / max(pair.energy, 1e-30)))
    return Difference(relative, equal, cosine(pair), pair.base.size)


def finite(pair: Pair) -> bool:
    """Say whether neither side holds NaN or infinite values."""
    return bool(np.isfinite(pair.subject).all() and np.isfinite(pair.base).all())


def not_finite(readings: Sequence[Reading]) -> Finding | None:
    """Return the tensors that hold NaN or infinite values, None if there are none."""
    names = [reading.name for reading in readings if not reading.finite]
    if not names:
        return None
    title = f"{len(names)} tensors hold NaN or infinite values and were not looked at further"
    evidence: dict[str, Any] = {"tensors": names[:LISTED]}
    return found("WF-00", Severity.MEDIUM, title, evidence)


def unread(reasons: Mapping[str, str]) -> Finding | None:
    """Return that tensors could not be read as numbers, None if all could; ``reasons`` by name."""
    if not reasons:
        return None
    title = f"{len(reasons)} tensors could not be read as numbers"
    return failed("WF-00", title, next(iter(reasons.values())), next(iter(reasons)))


def finding(readings: Sequence[Reading]) -> Finding:
    """Return the map of differences: one line a role, the largest changes, all layers."""
    changed = [r for r in readings if r.difference.equal < 1 or not r.finite]
    if not readings:
        return Finding("WF-03", Status.INCONCLUSIVE, Severity.INFO, "no tensor could be compared")
    if not changed:
        title = f"all {len(readings)} compared tensors equal the base's bit for bit"
        return passed("WF-03", title)
    largest = sorted(changed, key=lambda r: -r.difference.relative)[:LISTED]
    evidence = {
        "tensors": len(readings),
        "changed": len(changed),
        "relative_change_by_role": _by_role(changed),
        "relative_change_by_layer": _by_layer(changed),
        "explained_by": _explained(changed),
        "largest": {r.name: r.difference.relative for r in largest},
    }
    title = f"{len(changed)} of {len(readings)} compared tensors differ from the base"
    return found("WF-03", Severity.INFO, title, evidence)


def _by_role(readings: Sequence[Reading]) -> dict[str, float]:
    values = defaultdict[str, list[float]](list)
    for reading in readings:
        values[reading.place.role].append(reading.difference.relative)
    return {role: float(np.median(found)) for role, found in sorted(values.items())}


def _by_layer(readings: Sequence[Reading]) -> dict[str, float]:
    values = defaultdict[int, list[float]](list)
    for reading in readings:
        if reading.place.layer is not None:
            values[reading.place.layer].append(reading.difference.relative)
    return {str(layer): float(np.median(found)) for layer, found in sorted(values.items())}


def _explained(readings: Sequence[Reading]) -> dict[str, int]:
    counts = defaultdict[str, int](int)
    for reading in readings:
        counts[reading.explained or "not by an exact hypothesis"] += 1
    return dict(counts)


def lineage(readings: Sequence[Reading], subject: TensorSource, base: TensorSource) -> Finding:
    """Return whether the subject's tensors come from this base, and what was not compared."""
    matched = shared_names(subject.names(), base.names())
    compared = {reading.name for reading in readings}
    evidence: dict[str, Any] = {
        "compared_share": _share(subject, compared),
        "only_in_subject": sorted(set(subject.names()) - set(matched))[:LISTED],
        "only_in_base": sorted(set(base.names()) - set(matched.values()))[:LISTED],
        "other_shape": sorted(set(matched) - compared)[:LISTED],
    }
    cosines = [r.difference.cosine for r in readings if len(r.shape) == 2 and r.finite]
    if not cosines:
        packed = [name for name in subject.names() if name.endswith(PACKED)]
        if packed:
            reason = "values are packed (GPTQ, AWQ or alike): there is no way to unpack them here"
            return failed("WF-01", "the weights against the base", reason, packed[0])
        title = "no matrix has the name and shape of one of the base's"
        return found("WF-01", Severity.HIGH, title, evidence)
    evidence["median_cosine"] = float(np.median(cosines))
    if evidence["median_cosine"] < RELATED:
        return found(
            "WF-01",
            Severity.HIGH,
            f"not this base: the median cosine of matching matrices is {np.median(cosines):.2f}",
            evidence,
            advice="Compare with the right base; nothing else in this comparison means anything.",
        )
    whole = not (evidence["only_in_subject"] or evidence["only_in_base"] or evidence["other_shape"])
    return Finding(
        "WF-01",
        Status.PASSED if whole else Status.INCONCLUSIVE,
        Severity.INFO,
        f"the weights come from the base (median cosine {np.median(cosines):.4f})"
        + ("" if whole else "; some tensors have no counterpart"),
        evidence,
    )


def _share(subject: TensorSource, compared: set[str]) -> float:
    sizes = {name: int(np.prod(subject.shape(name))) for name in subject.names()}
    return sum(sizes[name] for name in compared) / max(sum(sizes.values()), 1)
