"""In what the runs of a scoreboard differ besides their subjects."""

from collections.abc import Callable, Sequence
from typing import Any

from durometer.report.comparison_runs import Read

# What says nothing of a run that had nothing to break.
OF_ATTACKS = ("attacks", "seeds", "undefended subjects")


def differences(runs: Sequence[Read]) -> list[str]:
    """Return in what the runs differ besides their subjects, one phrase each."""
    looked: tuple[tuple[str, Callable[[Read], Any]], ...] = (
        ("suites", lambda run: run.summary["suite"]["name"]),
        ("attacks", lambda run: f"{len(run.summary['tampers'])} of them"),
        ("seeds", lambda run: run.summary["suite"]["seeds"]),
        ("utility limits", lambda run: f"{run.summary['suite']['plan']['utility_limit']:g} points"),
        ("measuring plans", lambda run: run.summary["suite"]["plan"]),
        ("undefended subjects", _base),
        ("judges", _judges),
        ("number formats", lambda run: run.summary["subject"]["dtype"]),
        ("devices", lambda run: run.summary["environment"].get("device") or "not recorded"),
        ("versions", lambda run: run.summary["environment"].get("versions") or {}),
    )
    attacked = [run for run in runs if run.attacked]
    told = []
    for what, look in looked:
        alike = attacked if what in OF_ATTACKS else runs
        values = [look(run) for run in alike]
        if all(value == values[0] for value in values):
            continue
        if isinstance(values[0], dict):
            told.append(what)
        else:
            told.append(f"{what} ({', '.join(_by_value(values, alike))})")
    return told + _other_attacks(attacked)


def _by_value(values: Sequence[Any], runs: Sequence[Read]) -> list[str]:
    """Return every value with the runs that have it; what most have goes without their names."""
    named: dict[Any, list[str]] = {}
    for value, run in zip(values, runs, strict=True):
        named.setdefault(value, []).append(run.folder.name or str(run.folder))
    usual = max(named, key=lambda value: len(named[value]))
    if len(named[usual]) == 1:
        return [f"{value}: {' '.join(folders)}" for value, folders in named.items()]
    rest = [f"{value}: {' '.join(folders)}" for value, folders in named.items() if value != usual]
    return [f"mostly {usual}", *rest]


def _judges(run: Read) -> str:
    """Return who judged, and whose word made a success."""
    judged = run.summary["judges"]
    if not judged:
        return "none"
    return f"{' and '.join(str(one['name']) for one in judged['judges'])}, rule {judged['rule']}"


def _base(run: Read) -> str:
    subject = (run.summary["undefended"] or {}).get("subject")
    return f"{subject['name']} {subject['fingerprint'][:8]}" if subject else "none"


def _other_attacks(runs: Sequence[Read]) -> list[str]:
    """Say how many attacks not every run made, where their number alone does not tell."""
    sets = [{t["configuration"] for t in run.summary["tampers"]} for run in runs]
    if not sets:
        return []
    odd = set.union(*sets) - set.intersection(*sets)
    same_number = len({len(one) for one in sets}) == 1
    return [f"{len(odd)} attacks were not made on all"] if odd and same_number else []
