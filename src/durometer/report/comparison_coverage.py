"""What the models of a scoreboard were tested on, and what of it is missing for one of them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from durometer.measures.base import measure_registry
from durometer.report.comparison_removal import HALF
from durometer.report.comparison_runs import Read
from durometer.tampers.base import tamper_registry
from durometer.trials.record import COUNTED
from durometer.trials.runner import PLANNED

Json = Mapping[str, Any]
NOT_IN_RUN = " (not in this run)"
RESULTS = (*COUNTED, "no_effect")
NO_UNDEFENDED = (
    "no undefended model: recovery is measured towards all answers right, utility against the "
    "model itself"
)
UNKNOWING = (
    "it refuses {share:.0f} % of restricted prompts, and without an undefended model nothing tells "
    "whether it withholds the other answers or does not know them"
)
NO_REFERENCE = "no plain safeguard to compare with"


def coverage(runs: Sequence[Read]) -> dict[str, Any]:
    """Return what was tested on every attacked model, on some, and on none.

    Returns:
        ``tampers``: by access (weights, activations, routing, input), names tested on ``all``, on
        ``some`` and on ``none``; ``measures``: names ``taken`` of all and ``not_taken``;
        ``never``: what no suite tests, whatever it is given.
    """
    import durometer.catalogue  # noqa: F401  (fills the registries)

    sets = [_tested(run) for run in runs if run.attacked]
    all_, any_ = _common(sets), set().union(*sets)
    tampers: dict[str, dict[str, list[str]]] = {}
    for name, entry in tamper_registry:
        if name != "none":
            place = tampers.setdefault(entry.access, {"all": [], "some": [], "none": []})
            place["all" if name in all_ else "some" if name in any_ else "none"].append(name)
    return {
        "tampers": tampers,
        "measures": _measures(runs),
        "never": _never(runs),
    }


def gaps(run: Read, role: str) -> list[str]:
    """Return what one row lacks that a reader would take for granted, one phrase each."""
    if role == "undefended" or not run.attacked:
        return []
    found = [] if run.summary["undefended"] else [NO_UNDEFENDED, *_unknowing(run, role)]
    if role == "subject" and not run.summary["reference"]:
        found.append(NO_REFERENCE)
    tables = run.summary["tampers"] if role == "subject" else run.reference_tables["tampers"]
    return found + [told for tamper in tables for told in _unfinished(tamper)]


def _unknowing(run: Read, role: str) -> list[str]:
    """Say of a model that refuses little that it may not know the answers at all."""
    refused = run.outcomes.get(role, {}).get("refusal")
    if run.summary["domain"]["kind"] != "refusal" or not refused or refused["rate"] >= HALF:
        return []
    return [UNKNOWING.format(share=100 * refused["rate"])]


def _tested(run: Read) -> set[str]:
    """Return the tampers of which a trial at least was carried through."""
    return {
        tamper["name"]
        for tamper in run.summary["tampers"]
        if any(status["status"] in RESULTS for status in tamper["statuses"].values())
    }


def _common(sets: Sequence[set[str]]) -> set[str]:
    return set.intersection(*sets) if sets else set()


def _measures(runs: Sequence[Read]) -> dict[str, list[str]]:
    asked = [set((run.summary["request"] or {}).get("measures", [])) for run in runs]
    kind = runs[0].summary["domain"]["kind"]
    known = [name for name, measure in measure_registry if kind in measure.kinds]
    taken = {*PLANNED, *_common(asked)}
    return {
        "taken": [name for name in known if name in taken],
        "not_taken": [name for name in known if name not in taken],
    }


def _never(runs: Iterable[Read]) -> list[str]:
    told = [t for run in runs for t in run.summary["not_tested"] if not t.endswith(NOT_IN_RUN)]
    return list(dict.fromkeys(told))


def _unfinished(tamper: Json) -> list[str]:
    """Say of which attack some seeds gave no result, and why."""
    reasons: dict[str, list[str]] = {}
    for status in tamper["statuses"].values():
        if status["status"] not in ("done", "no_effect"):
            told = status["status"].replace("_", " ")
            reasons.setdefault(told, []).append(status["reason"])
    total = len(tamper["statuses"])
    return [
        f"{tamper['label']}: {told} with {len(found)} of {total} seeds"
        + (f" ({found[0]})" if found[0] else "")
        for told, found in reasons.items()
    ]
