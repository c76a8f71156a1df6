"""The whole comparison: one tensor at a time, exact hypotheses first, then directions."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from durometer.audit.forensics import (
    ablation,
    difference,
    fine_tuning,
    low_rank,
    merging,
    noise,
    precision,
    quantisation,
    scaling,
    sparsity,
    spectral_gap,
    vocabulary,
)
from durometer.audit.forensics.calibration import NEW_ZEROS_ON_GRID
from durometer.audit.forensics.grids import BY_NAME, Grid
from durometer.audit.forensics.linear_algebra import Array
from durometer.audit.forensics.names import WRITERS, place_of, shared_names
from durometer.audit.forensics.pairs import Pair, Reading, read_pair, squeezed
from durometer.audit.tensors import TensorSource
from durometer.core.errors import InputError
from durometer.findings import Finding, Status

Progress = Callable[[int, int], None]
MOSTLY = 0.5
"""Share of a tensor's change along a removed direction from which it counts as explained."""


def compare(
    subject: TensorSource,
    base: TensorSource,
    also: Sequence[TensorSource] = (),
    *,
    progress: Progress | None = None,
) -> list[Finding]:
    """Return what was done to the base to get the subject.

    Args:
        also: models that may have been merged into the subject.
        progress: called with tensors done and tensors in all.
    """
    return Comparison(subject, base, also, progress).run()


class Comparison:
    """One comparison and what it has gathered.

    Attributes:
        readings: one for each compared tensor.
        evidence: of direction ablation, by side of the residual stream.
        projections: what each tensor says about each candidate direction, by side.
    """

    def __init__(
        self,
        subject: TensorSource,
        base: TensorSource,
        also: Sequence[TensorSource] = (),
        progress: Progress | None = None,
    ) -> None:
        self._subject, self._base, self._also, self._progress = subject, base, also, progress
        self.readings: list[Reading] = []
        self._unread: dict[str, str] = {}
        self._there = shared_names(subject.names(), base.names())
        width = stream_width(base)
        self.evidence: dict[ablation.Side, ablation.Evidence] = {
            "writing": ablation.Evidence(width),
            "reading": ablation.Evidence(width),
        }
        self.projections: dict[ablation.Side, list[list[ablation.Projection]]] = {}
        self._asked: dict[ablation.Side, list[Reading]] = {"writing": [], "reading": []}
        self._regressions: list[merging.Regression] = []

    def run(self) -> list[Finding]:
        """Read every tensor once, those with an open difference twice, and decide."""
        for done, (name, there) in enumerate(sorted(self._there.items()), 1):
            try:
                pair = read_pair(self._subject, self._base, name, there)
            except InputError as error:
                self._unread[name] = str(error)
                pair = None
            if pair is not None:
                self.readings.append(self._read(pair))
            # Before the next tensors are read.
            del pair
            if self._progress is not None:
                self._progress(done, len(self._there))
        for side in self.evidence:
            self.projections[side] = self._ask(side)
        return self._findings()

    def _read(self, pair: Pair) -> Reading:
        reading = Reading(
            pair.name, pair.place, pair.base.shape, pair.stored, difference.measure(pair)
        )
        reading.finite = difference.finite(pair)
        if reading.difference.equal == 1:
            reading.explained = "identical"
        if reading.explained or not reading.finite:
            return reading
        explain(pair, reading)
        if reading.open and pair.matrix:
            self._look_closer(pair, reading)
        return reading

    def _look_closer(self, pair: Pair, reading: Reading) -> None:
        """Ask what shape the open difference of a matrix has."""
        if reading.zeros is not None:
            pair = without_pruned(pair)
        error = quantisation.error(pair, reading.grid) if reading.grid is not None else 0.0
        reading.spread = low_rank.measure(pair, error)
        for side in ablation.sides(pair.place):
            if self.evidence[side].add(pair):
                self._asked[side].append(reading)
        if self._also:
            regression = merging.measure(pair, self._subject, self._also)
            if regression is not None:
                self._regressions.append(regression)

    def _ask(self, side: ablation.Side) -> list[list[ablation.Projection]]:
        """Read the open tensors of one side again; return their projections axis by axis."""
        axes = self.evidence[side].axes()
        by_tensor = [self._project(side, reading, axes) for reading in self._asked[side]]
        return [list(found) for found in zip(*by_tensor, strict=True)]

    def _project(
        self, side: ablation.Side, reading: Reading, axes: Array
    ) -> list[ablation.Projection]:
        pair = read_pair(self._subject, self._base, reading.name, self._there[reading.name])
        assert pair is not None
        if reading.zeros is not None:
            pair = without_pruned(pair)
        base, delta = ablation.along_stream(pair)
        evidence = self.evidence[side]
        return ablation.project(
            reading.name,
            reading.place,
            base,
            delta,
            axes,
            evidence.tops[reading.name],
            evidence.alone.get(reading.name),
        )

    def _findings(self) -> list[Finding]:
        readings = self.readings
        merge = merging.finding(self._regressions) if self._also else None
        combined = merge is not None and merge.status is Status.FOUND
        open_by_side = {
            side: sum(r.open and ablation.may_touch(side, r) for r in readings)
            for side in self.evidence
        }
        directions = [
            ablation.finding(side, self.projections[side], self.evidence[side], open_by_side[side])
            for side in self.evidence
        ]
        self._mark_directions(directions)
        found: list[Finding | None] = [
            difference.lineage(readings, self._subject, self._base),
            difference.finding(readings),
            difference.not_finite(readings),
            difference.unread(self._unread),
            precision.finding(readings),
            quantisation.finding(readings),
            sparsity.finding(readings),
            scaling.finding(readings),
            scaling.norms(readings),
            vocabulary.finding(readings, self._subject, self._base),
            *directions,
            low_rank.finding(readings),
            merge,
            noise.finding(readings),
            fine_tuning.finding(readings, combined),
        ]
        return [finding for finding in found if finding is not None]

    def _mark_directions(self, directions: Sequence[Finding]) -> None:
        """Take tensors that lost a direction and little else out of the search for adapters."""
        named = {
            tensor["name"]
            for finding in directions
            if finding.status is Status.FOUND
            for tensor in finding.evidence["tensors"]
            if tensor["focus"] >= MOSTLY
        }
        for reading in self.readings:
            if reading.name in named:
                reading.explained = "direction"


def without_pruned(pair: Pair) -> Pair:
    """Return the pair with the base zero where the subject was pruned."""
    return pair.against(np.where(sparsity.mask_of(pair), 0, pair.base))


def explain(pair: Pair, reading: Reading) -> None:
    """Try the exact hypotheses in order; the first that accounts for everything is kept."""
    reading.precision = precision.measure(pair)
    if reading.precision:
        reading.explained = "cast"
        return
    if not pair.matrix:
        if pair.place.role == "norm":
            reading.scaling = scaling.measure_norm(pair)
        return
    if pair.place.role in {"embedding", "head"}:
        reading.rows = vocabulary.measure(pair)
        if reading.rows is not None:
            reading.explained = "rows"
            return
    zeros = sparsity.measure(pair)
    if zeros is not None and zeros.rest_equal:
        reading.zeros, reading.explained = zeros, "pruned"
        return
    reading.scaling = scaling.measure(pair)
    if reading.scaling.kind:
        reading.explained = "scaled"
        return
    reading.grid = quantisation.measure(pair)
    if reading.grid is not None and reading.grid.faithful:
        reading.explained = "quantised"
    elif zeros is not None:
        reading.zeros = zeros if reading.grid is None else _beyond_grid(pair, reading.grid.grid)


def _beyond_grid(pair: Pair, grid: str) -> sparsity.Zeros | None:
    """Return the zeros that are not there when the base is rounded to the grid."""
    known = BY_NAME.get(grid)
    base = known.nearest(pair.base) if known else pair.base
    return sparsity.measure(pair.against(base), NEW_ZEROS_ON_GRID)


def stream_width(source: TensorSource) -> int:
    """Return the width of the residual stream, the commonest one if sources disagree; 0 for none.

    Read off the shapes of the maps that write into it.
    """
    widths = Counter[int]()
    for name in source.names():
        shape = squeezed(source.shape(name))
        role = place_of(name).role
        if len(shape) == 2 and role in WRITERS:
            widths[shape[1] if role == "embedding" else shape[0]] += 1
    return widths.most_common(1)[0][0] if widths else 0


def alone(subject: TensorSource) -> list[Finding]:
    """Return what a model's numbers show without a base."""
    zeros: dict[str, float] = {}
    grids: list[tuple[str, str, Grid]] = []
    unread: dict[str, str] = {}
    gram, count = spectral_gap.writing_gram(_writing(subject, zeros, grids, unread))
    found = [
        spectral_gap.finding(gram, count),
        sparsity.finding_alone(zeros),
        quantisation.grid_alone(grids),
        difference.unread(unread),
    ]
    return [finding for finding in found if finding is not None]


def _writing(
    subject: TensorSource,
    zeros: dict[str, float],
    grids: list[tuple[str, str, Grid]],
    unread: dict[str, str],
) -> Iterator[Array]:
    """Yield the writing matrices of the blocks, noting zeros and grids of all matrices."""
    for name in subject.names():
        shape = squeezed(subject.shape(name))
        if len(shape) != 2 or min(shape) < 2:
            continue
        try:
            matrix = subject.read(name).reshape(shape)
        except InputError as error:
            unread[name] = str(error)
            continue
        stored = subject.dtype(name)
        grid = quantisation.grid_of(matrix) if stored in {"F32", "F16", "BF16"} else None
        if grid is not None:
            grids.append((name, stored, grid))
        elif stored in {"F32", "F16", "BF16"}:
            # Coarse grids hold zeros of their own.
            zeros[name] = float((matrix == 0).mean())
        if place_of(name).role in {"output", "down"}:
            yield matrix
        # Before the next one is read.
        del matrix
