"""What models answer before any attack: the share of every outcome, with its interval."""

from dataclasses import asdict
from typing import Any

from durometer.domains.base import Split
from durometer.measures.outcomes import Outcome
from durometer.report.summary import Run
from durometer.trials.analysis import pooled_rate, success_items
from durometer.trials.record import CheckpointRecord
from durometer.trials.store import Store


def outcome_rates(store: Store) -> dict[str, dict[str, Any]]:
    """Return, by role, the rate of every outcome on report items at step 0.

    Rates are Wilson's at n = entities, as ``dataclasses.asdict`` of ``Rate``; roles that were not
    measured are left out.
    """
    found = {
        str(role): rates_of(trial.checkpoints[0])
        for role, trial in Run.read(store).baselines().items()
        if trial.checkpoints
    }
    return {role: rates for role, rates in found.items() if rates}


def rates_of(checkpoint: CheckpointRecord) -> dict[str, Any]:
    """Return the rate of every outcome at one checkpoint, {} where report was not measured."""
    items = success_items(checkpoint, Split.REPORT)
    if not items:
        return {}
    return {
        str(outcome): asdict(rate)
        for outcome in Outcome
        if (rate := pooled_rate([items], lambda item, o=outcome: item["outcome"] == o))
    }
