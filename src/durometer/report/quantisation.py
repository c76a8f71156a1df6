"""Behaviour that appears only after quantising: quantised trials against step 0, item by item."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from durometer.domains.base import Split
from durometer.trials.behaviour import BEHAVIOURS, behaviour_gaps, verdict
from durometer.trials.quantisation_gap import LabelGap
from durometer.trials.record import COUNTED, CheckpointRecord, SubjectRole, TrialRecord

QUANTISES = "quantize_"
# A screen opens report at a coarse precision only after a high select rate or at the end; with it
# an ordinary subject alarms at most one and a half times as often as the level says.
SPLITS = (Split.SELECT, Split.REPORT)
CONTROLS: tuple[SubjectRole, ...] = ("undefended", "reference")


@dataclass(frozen=True)
class Rounded:
    """One subject at one precision."""

    trial: TrialRecord
    checkpoint: CheckpointRecord
    precision: str


def quantisation_section(
    trials: Sequence[TrialRecord],
    baselines: dict[SubjectRole, TrialRecord],
    label: Callable[[str, dict[str, Any]], str],
) -> list[dict[str, Any]]:
    """Return one entry a precision of every quantisation of the subject; empty without any.

    Of the seeds of a configuration the first that counted is read, so that items pair up.

    Args:
        trials: every trial of the run.
        baselines: zero-step controls.
        label: short readable name of a tamper with its settings.
    """
    mine = list(_rounded(trials, "subject"))
    if "subject" not in baselines:
        return []
    start = baselines["subject"].checkpoints[0]
    rows = []
    for one in mine:
        found = _gaps(start, one, len(mine))
        spec = one.trial.spec
        rows.append(
            {
                "tamper": spec.tamper,
                "label": label(spec.tamper, spec.settings),
                "configuration": spec.configuration,
                "precision": one.precision,
                "strength": one.checkpoint.strength,
                "seed": spec.seed,
                "verdict": verdict(found, start, one.checkpoint),
                "changes": _changes(found),
                "controls": {
                    role: _changes(_gaps(baselines[role].checkpoints[0], other, len(mine)))
                    for role in CONTROLS
                    if role in baselines and (other := _same(trials, role, one)) is not None
                },
            }
        )
    return rows


def _gaps(start: CheckpointRecord, one: Rounded, precisions: int) -> dict[str, LabelGap]:
    return behaviour_gaps(
        start, one.checkpoint, precision=one.precision, precisions=precisions, splits=SPLITS
    )


def _changes(gaps: dict[str, LabelGap]) -> dict[str, Any]:
    return {
        name: asdict(gaps[name].difference) | {"alarm": gaps[name].alarm} if name in gaps else None
        for name in BEHAVIOURS
    }


def _rounded(trials: Sequence[TrialRecord], role: SubjectRole) -> Iterator[Rounded]:
    seen = set[str]()
    for trial in trials:
        spec = trial.spec
        if spec.role != role or spec.purpose == "fresh" or not spec.tamper.startswith(QUANTISES):
            continue
        noise = spec.settings.get("control") == "noise"
        if noise or trial.status not in COUNTED or spec.configuration in seen:
            continue
        seen.add(spec.configuration)
        for checkpoint in trial.valid:
            if checkpoint.strength:
                yield Rounded(trial, checkpoint, _precision(trial, checkpoint))


def _precision(trial: TrialRecord, checkpoint: CheckpointRecord) -> str:
    """Return what the trial recorded of the precision of a checkpoint: type, or bits."""
    facts = trial.realised.get("facts", {}).get("precisions", [])
    for told in facts:
        if told.get("strength") == checkpoint.strength:
            return str(told["type"]) if "type" in told else f"{told.get('bits', '?')} bits"
    return f"strength {checkpoint.strength:g}"


def _same(trials: Sequence[TrialRecord], role: SubjectRole, one: Rounded) -> Rounded | None:
    for other in _rounded(trials, role):
        same = other.trial.spec.configuration == one.trial.spec.configuration
        if same and other.checkpoint.strength == one.checkpoint.strength:
            return other
    return None


def quantisation_line(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return one line about all precisions, '' without any."""
    if not rows:
        return ""
    alarms = [row for row in rows if row["verdict"] == "alarm"]
    told = "; ".join(f"{row['label']} at {row['precision']} ({_changed(row)})" for row in alarms)
    if alarms:
        line = f"Quantising: alarm at {len(alarms)} of {_count(len(rows))}: {told}"
    else:
        line = f"Quantising: no alarm at {_count(len(rows))}"
    for name, said in (("damage", "damaged"), ("not_measured", "not judged")):
        if count := sum(row["verdict"] == name for row in rows):
            line += f"; {count} {said}"
    return line


def _changed(row: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name.replace('_', '-')} {100 * change['value']:+.0f} points"
        for name, change in row["changes"].items()
        if change is not None and change["alarm"]
    )


def _count(precisions: int) -> str:
    return f"{precisions} precision{'s' * (precisions != 1)}"
