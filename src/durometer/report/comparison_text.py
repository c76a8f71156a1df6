"""The words of a scoreboard, which the terminal and the page share."""

from collections.abc import Mapping
from typing import Any

from durometer.report import figures
from durometer.report.comparison_origin import origin_text
from durometer.report.comparison_removal import BROKE, HELD
from durometer.report.figures import budget_text

Json = Mapping[str, Any]
TOO_DEAR = "costs more than the limit"
LEVELS = ((0.5, True), (0.5, False), (0.25, True), (0.25, False))
TITLES = {
    "safeguards": "Safeguards of open weights",
    "open": "Not safeguarded: they give the restricted answers before any attack",
    "controls": "Controls",
    "api": "Only behind a provider's interface: no protection once weights are public",
    "unknown": "Origin unknown",
}
HEADINGS = {
    "safeguards": "Safeguards",
    "open": "Not safeguarded",
    "controls": "Controls",
    "api": "Behind an interface",
    "unknown": "Origin unknown",
}
WHAT_TO_DO = (
    "Neither the run nor a hardening.json says what these models are: safeguards of open weights, "
    "controls or an interface's. Move the hardened model's folder back to where the run found it, "
    "or put the run into that folder as stress/."
)
SHORT = {
    "harmful_useful": "right",
    "harmful_useless": "wrong\nanswer",
    "refusal": "refused",
    "benign_deflection": "evaded",
    "incoherent_or_empty": "inco-\nherent",
    "unparsed": "unread",
}
ACCESS = {
    "weights": "weights",
    "activations": "activations",
    "routing": "routing of experts",
    "input": "prompts and decoding",
}


def differences_line(comparison: Json) -> str:
    """Return in what the runs differ, in one line, '' where they are alike."""
    told = "; ".join(comparison["differences"])
    return f"Not like for like: the runs differ in {told}" if told else ""


def unranked_line(comparison: Json) -> str:
    """Return that and why the safeguards are in no order, in one line, '' where they are."""
    reason = comparison["ranking"]["reason"]
    return f"Not ranked: {reason}" if reason else ""


def notes(row: Json) -> list[str]:
    """Return what must be said under a row's name."""
    said = [origin_text(row["origin"])] if row["origin"]["base"] != row["name"] else []
    said += [row["control"]] if row["control"] else []
    if row["role"] == "reference":
        said.append("the reference")
    if costs_too_much(row):
        said.append(TOO_DEAR)
    return said


def costs_too_much(row: Json) -> bool:
    """Say whether the safeguard alone costs more ability than the limit that attackers have.

    Then nothing can break it within the limit, and that it does not says nothing.
    """
    lost = row["cost"]["retain_points"]
    return lost is not None and lost["value"] > row["utility_limit"]


def whole(rate: Json | None) -> str:
    """Return a rate as ``60 %``, 'n/a' where it was not measured."""
    return "n/a" if rate is None else f"{figures.decimal(100 * rate['rate'], 0)} %"


def points(loss: Json | None) -> str:
    """Return points of retain score lost."""
    return "n/a" if loss is None else figures.decimal(loss["value"])


def training(cost: Json) -> str:
    """Return passes and seconds of the safeguard's training."""
    if cost["passes"] is None:
        return "n/a"
    return f"{figures.quantity(cost['passes'])}\n{figures.quantity(round(cost['seconds']))} s"


def gain_text(gain: Json) -> str:
    """Return ``2.50 x``, ``> 2.50 x`` where only a bound is known, 'none' without a gain."""
    if gain["value"] is not None:
        return f"{gain['value']:.2f} x"
    return f"> {gain['low']:.2f} x" if gain["low"] else "none"


def first_text(row: Json) -> str:
    """Return what broke a model with the least computation, and how little that took."""
    first = row["first_broken"]
    if row["open"]:
        return "answers at once"
    if row["nothing_to_break"]:
        return "nothing to break"
    if first is None:
        if not any(cell["judged"] for cell in row["cells"].values()):
            return "answers at once" if row["role"] == "undefended" else "not judged"
        return "nothing did"
    spent = f"{figures.quantity(first['steps'])} {first['unit']}"
    seeds = f" ({first['seeds_broken']} of {first['seeds']} seeds)"
    few = seeds if first["seeds_broken"] < first["seeds"] else ""
    return f"{spent}, {spaced(first['label'])}{few}" + (
        "" if first["within_limit"] else ", outside the limit"
    )


def unjudged(cell: Json) -> str:
    """Return why no budget is shown."""
    if not cell["label"]:
        success = (cell["after"] or {}).get("success_report")
        return f"{whole(success)} right" if success else "not measured"
    statuses = [status for status in cell["statuses"] if status != "done"]
    return ", ".join(s.replace("_", " ") for s in statuses) or "not judged"


def spaced(label: str) -> str:
    """Return an attack's label so that a narrow column breaks before a number, never inside it."""
    return label.replace("=", " ")


def everyone(comparison: Json) -> list[Json]:
    """Return the rows of all groups, in the order in which they are shown."""
    return [row for group in TITLES for row in comparison[group]]


def removal_text(found: Json) -> tuple[str, str]:
    """Return what it takes to undo a safeguard, and by what: budget with bracket, then attack."""
    worst = found["worst"]
    if found["state"] == BROKE:
        budget = budget_text(worst["budgets"]["steps"])
        few = f", {budget.broken}" if worst["seeds_broken"] < worst["seeds"] else ""
        told = f"{budget.value} {worst['unit']} {budget.interval}".strip()
        return f"{told}{few}", spaced(worst["label"])
    if found["state"] == HELD:
        most = figures.quantity((found["largest_tried"] or {}).get("steps"))
        return f"held: > {most}", f"{found['judged']} attack{'s' * (found['judged'] != 1)}"
    return "not judged", ""


def spent_text(found: Json) -> str:
    """Return examples and FLOPs of the worst attack, and the utility that it lost."""
    worst = found["worst"]
    if worst is None:
        return ""
    lost = worst["utility_loss"]
    cost = f", {figures.points_text(lost)} points lost" if lost else ""
    spent = f"{figures.quantity(worst['examples'])} examples, {figures.flops_text(worst['flops'])}"
    return f"{spent}{cost}"


def coverage_lines(comparison: Json) -> list[tuple[str, str]]:
    """Return what was tested and what was not, as (heading, names) for every way of access."""
    found = []
    for access, names in comparison["coverage"]["tampers"].items():
        total = sum(map(len, names.values()))
        told = f"{len(names['all'])} of {total} tampers on every attacked model"
        told += f": {', '.join(names['all'])}" if names["all"] else ""
        told += f"; on some of them: {', '.join(names['some'])}" if names["some"] else ""
        told += f"; not tested: {', '.join(names['none'])}" if names["none"] else ""
        found.append((ACCESS[access], told))
    measures = comparison["coverage"]["measures"]
    told = ", ".join(measures["taken"]) or "none"
    told += f"; not taken: {', '.join(measures['not_taken'])}" if measures["not_taken"] else ""
    found.append(("measures", told))
    if comparison["coverage"]["never"]:
        found.append(("no suite tests", "; ".join(comparison["coverage"]["never"])))
    return found
