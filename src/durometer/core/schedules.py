"""Learning-rate schedules as plain functions of the step; what they return is what is used.

No scheduler object: the callback that returned a rate where a multiplier was wanted, and the
schedule advanced once a process, both trained at a billionth of the declared rate in published
work.
"""

import math
from typing import Literal

Schedule = Literal["constant", "linear", "cosine", "restarts"]
RESTART_PERIOD = 100


def learning_rate(
    schedule: Schedule, step: int, *, peak: float, total: int, warmup: int, floor: float = 0.0
) -> float:
    """Return the learning rate of update ``step``.

    Args:
        step: updates made before this one.
        schedule: ``restarts`` is SGDR (arXiv 1608.03983) with a period of 100 updates.
        peak: the highest rate.
        total: updates of the whole plan.
        warmup: updates over which the rate rises linearly to the peak.
        floor: lowest rate of the cosine schedules.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    done, length = step - warmup, max(total - warmup, 1)
    if schedule == "linear":
        return peak * max(1.0 - done / length, 0.0)
    if schedule == "cosine":
        return _cosine(peak, floor, min(done / length, 1.0))
    if schedule == "restarts":
        return _cosine(peak, floor, done % RESTART_PERIOD / RESTART_PERIOD)
    return peak


def depends_on_total(schedule: Schedule) -> bool:
    """Say whether the rate at a step depends on the planned number of steps.

    If so, a run stopped early is not a run with that budget, and each rung needs a run of its own.
    """
    return schedule in ("linear", "cosine")


def _cosine(peak: float, floor: float, share: float) -> float:
    low = min(floor, peak)
    return low + 0.5 * (peak - low) * (1.0 + math.cos(math.pi * share))
