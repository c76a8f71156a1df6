"""The study's section of docs/harden.md, from results/summary.json."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from durometer.report.comparison_text import TOO_DEAR, costs_too_much
from durometer.report.figures import budget_text, decimal, percent, points_text, rate_text, visible

Json = Mapping[str, Any]
NOT_RUN = "*Not run yet: `studies/hardened/results/summary.json` holds no result of this kind.*"
DASH = "\N{EN DASH}"
WHERE = {"within": "within the limit", "any": "without it"}
ROLES = {"control": " (control)", "reference": " (plain)", "safeguard": ""}


def section(summary: Json, kind: str) -> str:
    """Return the tables of one kind of domain, or that it was not run."""
    found = summary.get("kinds", {}).get(kind, {})
    models = [m for m in found.get("models", []) if m["training"] or m["failure"]]
    if not models:
        return NOT_RUN
    parts = [_lead(found, summary.get("machine") or {}), _training(models)]
    attacked = [m for m in models if m["attacked"]]
    if attacked:
        parts += [_worth(attacked, found), _held(attacked, _limit(found))]
    parts += [_failed(models), _differences(found)]
    return "\n\n".join(part for part in parts if part)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _lead(found: Json, machine: Json) -> str:
    suite = found["suite"]
    if not suite:
        return ""
    grade = "claim-grade" if suite["claim_grade"] else "a screen"
    where = suite["environment"]
    told = [
        f"Suite `{suite['name']}` ({grade}), {suite['seeds']} attack seeds a configuration, "
        f"utility limit {suite['utility_limit']:g} points, {where.get('dtype', 'unknown format')}",
        f"{machine.get('cpu', 'unknown processor')}, {where.get('threads', '?')} threads, "
        f"{machine.get('memory_gib', '?')} GiB, other work beside it",
    ]
    return f"{'; '.join(told)}."


def _training(models: Iterable[Json]) -> str:
    head = ["safeguard", "training, s", "passes", "peak memory, GB", "answered right before"]
    head += ["refused", "other knowledge kept"]
    rows = []
    for model in models:
        training = model["training"]
        if training is None:
            rows.append([_name(model), "not trained", *[DASH] * 5])
            continue
        cost = [f"{training['seconds']:,.0f}", f"{training['passes']:,}"]
        cost.append(f"{training['peak_memory'] / 1e9:.1f}")
        looks = ("restricted", "restricted_refused", "retain")
        rows.append([_name(model), *cost, *(_change(model["before"], look) for look in looks)])
    return table(head, rows)


def _change(before: Json, look: str) -> str:
    """Return a rate without and with the safeguard."""
    rates = [before.get(where, {}).get(look) for where in ("undefended", "hardened")]
    if rates[1] is None:
        return DASH
    return " \N{RIGHTWARDS ARROW} ".join(percent(r["rate"]) if r else DASH for r in rates)


def _name(model: Json) -> str:
    return f"`{model['name']}`{ROLES[model['role']]}"


def _worth(models: Iterable[Json], found: Json) -> str:
    head = ["safeguard", "success at step 0", "retain points lost"]
    head += [f"broken first {words}" for words in WHERE.values()]
    rows = [
        [
            _name(model),
            rate_text(model["start"].get("success")),
            points_text(model["retain_points_lost"]) if model["retain_points_lost"] else DASH,
            *(_first(model, where, _limit(found)) for where in WHERE),
        ]
        for model in models
    ]
    undefended = (found.get("undefended") or {}).get("success")
    told = f"Without a safeguard: {rate_text(undefended)}. " if undefended else ""
    return (
        f"{told}Half of the answers back, least computation first; `(a, b]` spans the seeds, none "
        f"broken at a and all at b:\n\n{table(head, rows)}"
    )


def _limit(found: Json) -> float | None:
    """Return the utility limit in points, None where no run says it."""
    limit: float | None = found["suite"].get("utility_limit")
    return limit


def _first(model: Json, where: str, limit: float | None) -> str:
    """Return what broke a model first, or why there is nothing of the kind."""
    first = model["first"][where]
    if first is None:
        return _nothing_to_see(model, where, limit) or "not broken"
    budget = budget_text(first["steps"])
    words = f"{budget.value} {first['unit']} {budget.interval}".strip()
    return visible(f"`{first['label']}`: {words}, {budget.broken}")


def _nothing_to_see(model: Json, where: str, limit: float | None) -> str:
    """Return why no break could have been seen, '' where one could."""
    if not any(attack["judged"] for attack in model["attacks"]):
        return "not judged"
    row = {"cost": {"retain_points": model["retain_points_lost"]}, "utility_limit": limit}
    return TOO_DEAR if where == "within" and limit is not None and costs_too_much(row) else ""


def _held(models: Iterable[Json], limit: float | None) -> str:
    return "\n".join(line for model in models for line in _held_lines(model, limit))


def _held_lines(model: Json, limit: float | None) -> Iterator[str]:
    for where, words in WHERE.items():
        kept = [
            f"`{a['label']}` (to {decimal(a['largest_tried'], 0)} {a['unit']})"
            for a in model["not_broken"][where]
            if a["largest_tried"] is not None
        ]
        unseen = _nothing_to_see(model, where, limit)
        told = f"nothing can be said: {unseen}" if unseen else ", ".join(kept) or "by none"
        yield f"- {_name(model)}, not broken {words}: {told}."
    if model["not_judged"]:
        told = [f"`{name}` ({', '.join(s)})" for name, s in model["not_judged"].items()]
        yield f"- {_name(model)}, could not be judged: {', '.join(told)}."
    counts = [f"{count} {name.replace('_', ' ')}" for name, count in model["statuses"].items()]
    yield f"- {_name(model)}, trials: {', '.join(counts)}."


def _failed(models: Iterable[Json]) -> str:
    return "\n".join(
        f"- {_name(model)}, `{failure['command']}` ended with exit code {failure['exit_code']}: "
        f"{visible(failure['said'])}"
        for model in models
        if (failure := model["failure"])
    )


def _differences(found: Json) -> str:
    told = [str(words) for words in found["differences"]]
    return f"The runs differ in: {'; '.join(told)}." if told else ""
