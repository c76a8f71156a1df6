"""A drift run as one HTML file that loads nothing; whatever was answered is escaped."""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from durometer import __version__
from durometer.report import drift_text as words
from durometer.report import figures
from durometer.report.drift_charts import Line, Mark, Ranked, interval_chart, rank_chart
from durometer.report.html import OUTCOMES
from durometer.report.page import page_environment, page_style

Json = Mapping[str, Any]
SERIES = {"before": 5, "answers": 1, "refusals": 0, "benign": 2}
CHANGES = (
    ("Safeguard", ("success", "refused", "choices")),
    (
        "Over-refusal and reasoning",
        ("over_refusal", "incoherent", "reasoning_arithmetic", "reasoning_word_problems"),
    ),
    ("Knowledge", ("accuracy_none", "accuracy_false", "accuracy_random", "accuracy_gap")),
    ("Planted wrong answers", ("adopted_none", "adopted_false", "adopted_random", "adopted_gap")),
)
CONTEXTS = ("none", "false", "random")
STEERED = {"without": 1, "with": 3}
CONTEXT_NAMES = {"none": "B", "false": "FIP", "random": "RIP"}


def render_drift(data: Json) -> str:
    """Return the page.

    Args:
        data: the contents of ``drift.json``.
    """
    ranks = data["run"]["settings"]["ranks"]
    page = page_environment().get_template("drift.html")
    written = page.render(
        css=page_style(),
        d=data,
        words=words,
        figures=figures,
        version=__version__,
        series=SERIES,
        steered=STEERED,
        changes=[(rank, changes(data, rank)) for rank in ranks],
        bars=bars(data),
        outcomes=OUTCOMES,
        categories=[(rank, categories(data, rank)) for rank in ranks],
        levels=[(rank, levels(data, rank)) for rank in ranks],
        sure=[(rank, sure(data, rank)) for rank in ranks],
        uncertain=uncertain(data),
        sweep=sweep(data),
        steering=[(one, steering_chart(one)) for one in data["steering"]],
        context_names=CONTEXT_NAMES,
    )
    return written.encode("utf-8", "replace").decode("utf-8")


def changes(data: Json, rank: int) -> list[tuple[str, Markup]]:
    """Return a drawing a group: what changed by each way, in points."""
    drawn = [
        (title, interval_chart(_change_lines(data, keys, rank), "change, points", title))
        for title, keys in CHANGES
    ]
    return [(title, drawing) for title, drawing in drawn if drawing]


def _change_lines(data: Json, keys: Sequence[str], rank: int, scale: float = 100) -> list[Line]:
    found = [words.quantity(data, key) for key in keys]
    return [Line(one["label"], _changed(one, rank, scale)) for one in found if one is not None]


def _changed(found: Json, rank: int, scale: float) -> list[Mark]:
    marks = []
    for way in words.WAYS:
        one = words.arm(found, way, rank)
        change = one["change"] if one else None
        if change is not None:
            told = words.shift(found["unit"], change)
            told += f" {words.shift_interval(found['unit'], change)}"
            said = f"{words.WAYS[way]}: {told}; {change['method']}"
            marks.append(_mark(SERIES[way], change, said, scale))
    return marks


def _levels(found: Json, rank: int, scale: float = 100) -> list[Mark]:
    """Return the level before and after each way."""
    states = [("before", "before", found["before"])]
    for way, name in words.WAYS.items():
        one = words.arm(found, way, rank)
        states += [(way, name, one["after"])] if one else []
    return [
        _level_mark(SERIES[key], name, found["unit"], told, scale)
        for key, name, told in states
        if told["value"] is not None
    ]


def _level_mark(series: int, name: str, unit: str, told: Json, scale: float = 100) -> Mark:
    said = f"{name}: {words.level(unit, told)} {words.interval(unit, told)}; {told['method']}"
    return _mark(series, told, said, scale)


def _mark(series: int, found: Json, said: str, scale: float) -> Mark:
    value, low, high = (scale * found[end] for end in ("value", "low", "high"))
    return Mark(series, value, low, high, said)


def categories(data: Json, rank: int) -> Markup:
    """Return attack success by category, before and after; '' where there is one."""
    lines = [
        Line(
            f"{one['label'].replace('_', ' ')}, {words.plural(one['items'], 'prompt')}",
            _levels(one, rank),
        )
        for one in data["categories"]
    ]
    return interval_chart(lines, "attack success, %", "Success by category", span=(0, 100))


def levels(data: Json, rank: int) -> list[tuple[str, Markup]]:
    """Return accuracy and adoption in the three contexts, before and after."""
    drawn = []
    for title, stem in (("Right answers", "accuracy"), ("Planted answer adopted", "adopted")):
        found = [(c, words.quantity(data, f"{stem}_{c}")) for c in CONTEXTS]
        lines = [
            Line(one["label"].partition(", ")[2], _levels(one, rank))
            for _, one in found
            if one is not None
        ]
        drawn.append((title, interval_chart(lines, "answers, %", title, span=(0, 100))))
    return drawn


def sure(data: Json, rank: int) -> list[tuple[str, Markup]]:
    """Return what changed in perplexity, entropy and token probability, each on its own axis."""
    names = {"perplexity": "", "entropy": ", nats", "probability": ""}
    return [
        (
            f"{name.capitalize()} of answers",
            interval_chart(
                _change_lines(data, [f"{name}_{c}" for c in CONTEXTS], rank, 1),
                f"change{unit}",
                f"Change of {name}",
            ),
        )
        for name, unit in names.items()
    ]


def bars(data: Json) -> list[dict[str, Any]]:
    """Return a stacked bar of the six outcomes for every state, all categories together."""
    ranks = data["run"]["settings"]["ranks"]
    return [
        {
            "label": words.arm_name(one["state"], ranks) + (", steered" if one["steered"] else ""),
            "note": f"{words.plural(one['items'], 'prompt')}, "
            + ("untrained" if one["state"] == "before" else words.plural(one["seeds"], "seed")),
            "drawing": figures.stacked_bar(one["shares"], OUTCOMES, one["state"]),
        }
        for one in data["outcomes"]
        if not one["category"]
    ]


def uncertain(data: Json) -> list[dict[str, Any]]:
    """Return the rows of the table on right, wrong and all answers."""
    ranks = data["run"]["settings"]["ranks"]
    return [
        {
            "state": words.arm_name(one["state"], ranks),
            "context": CONTEXT_NAMES[one["context"]],
            "answers": one["answers"],
            "count": one["count"],
            "values": [one[name] for name in ("perplexity", "entropy", "probability")],
        }
        for one in data["uncertainty"]
        if one["count"]
    ]


def sweep(data: Json) -> Markup:
    """Return attack success against the rank; '' with one rank."""
    found, ranks = words.quantity(data, "success"), data["run"]["settings"]["ranks"]
    if found is None or len(ranks) < 2:
        return Markup()
    ways = []
    for way, name in words.WAYS.items():
        reached = [(rank, words.arm(found, way, rank)) for rank in sorted(ranks)]
        points = [
            (rank, one["after"], f"{name}, rank {rank}: {figures.percent(one['after']['value'])}")
            for rank, one in reached
            if one is not None
        ]
        ways += [Ranked(SERIES[way], points)] if points else []
    return (
        rank_chart(ways, found["before"]["value"], "Attack success by rank") if ways else Markup()
    )


def steering_chart(one: Json) -> Markup:
    """Return the quantities without and with steering."""
    lines = [
        Line(
            found["label"],
            [
                _level_mark(STEERED[way], f"{way} steering", found["unit"], found[way])
                for way in STEERED
            ],
        )
        for found in one["quantities"]
    ]
    return interval_chart(lines, "%", "Steering towards refusal", span=(0, 100))
