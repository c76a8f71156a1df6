"""The words of a scoreboard, which the terminal and the page share."""

from collections.abc import Mapping
from typing import Any

from durometer.report import figures

Json = Mapping[str, Any]
TOO_DEAR = "costs more than the limit"
LEVELS = ((0.5, True), (0.5, False), (0.25, True), (0.25, False))
TITLES = {
    "safeguards": "Safeguards of open weights",
    "controls": "Controls",
    "api": "Only behind a provider's interface: no protection once weights are public",
    "unknown": "Origin unknown",
}
HEADINGS = {
    "safeguards": "Safeguards",
    "controls": "Controls",
    "api": "Behind an interface",
    "unknown": "Origin unknown",
}
WHAT_TO_DO = (
    "Neither the run nor a hardening.json says what these models are: safeguards of open weights, "
    "controls or an interface's. Move the hardened model's folder back to where the run found it, "
    "or put the run into that folder as stress/; of a model that harden did not make nothing is "
    "known."
)


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
    said = [row["control"]] if row["control"] else []
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
