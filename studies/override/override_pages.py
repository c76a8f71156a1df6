"""The override study in words and pictures: what the paper prints, its own rows, and our run.

The first two columns come from the tables that the package ships (``durometer recompute``), the
third from results/SUBJECT/drift.json. A subject that was not run says so.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from durometer.recomputing import recompute
from durometer.report import drift_text as words
from durometer.report import figures

Json = Mapping[str, Any]
HERE = Path(__file__).resolve().parent
IMAGES = HERE.parents[1] / "docs" / "images"
SUBJECTS = {
    "smollm2": "as it is released",
    "smollm2-refusal": "with a refusal safeguard, so that there is something to override",
}
FIRST = "smollm2"  # whose table is there before it was run, with the paper's columns alone
DASH = "\N{EN DASH}"
NOT_RUN = (
    "*Not run yet: `studies/override/results/{subject}/drift.json` does not exist. "
    "`python studies/override/run.py --subject {subject}` makes it.*"
)
# The paper's words for what is called 'restricted answers' and 'refusals' here.
ARMS = {"answers": "harmful", "refusals": "safe"}
STYLE = """
svg { background: #ffffff; font-family: system-ui, sans-serif; }
text { font-size: 10.5px; fill: #555555; } .row-label { font-size: 11.5px; fill: #111111; }
.middle { text-anchor: middle; } .axis { stroke: #555555; } .grid { stroke: #dddddd; }
.reach { stroke-width: 1.6; } .of { fill: none; }
.s0 { fill: #1f5a8c; } .s1 { fill: #b8371f; } .s2 { fill: #23815d; } .s5 { fill: #4d6b7a; }
.of.s0 .reach { stroke: #1f5a8c; } .of.s1 .reach { stroke: #b8371f; }
.of.s2 .reach { stroke: #23815d; } .of.s5 .reach { stroke: #4d6b7a; }
"""
KEY = "Red squares: trained on restricted answers; blue circles: refusals; green triangles: control"


def result(subject: str, results: Path = HERE / "results") -> Json | None:
    """Return the committed result of a subject, None where it was not run."""
    path = results / subject / "drift.json"
    if not path.is_file():
        return None
    found: Json = json.loads(path.read_text("utf-8"))
    return found


def section(name: str, results: Path = HERE / "results") -> str:
    """Return one generated part of the page: ``paper``, ``KIND-SUBJECT``.

    Kinds: ``columns``, ``findings``, ``figures``, ``numbers``.
    """
    if name == "paper":
        return _paper()
    kind, _, subject = name.partition("-")
    data = result(subject, results)
    if kind == "columns" and (data is not None or subject == FIRST):
        return _columns(data)
    if data is None:
        return NOT_RUN.format(subject=subject) if kind == "findings" else ""
    return {"findings": _findings, "figures": _figures, "numbers": _numbers}[kind](data, subject)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# ---- what the paper prints, and its rows ----------------------------------------------------


class Paper:
    """Printed figures and right ones, from the shipped tables."""

    def __init__(self) -> None:
        names = ("asr", "accuracy", "adoption")
        self._data = {name: recompute(f"2409.19476-{name}").data for name in names}

    def printed(self, name: str, kind: str, *arms: str) -> str:
        """Return how a figure was printed, a dash where it was not."""
        found = [
            f"{one['printed']}{'' if one['verdict'] == 'follows' else ' (does not follow)'}"
            for one in self._data[name]["headlines"]
            if (one["kind"], one["scope"], tuple(one["arms"])) == (kind, "all", arms)
        ]
        return "; ".join(found) or DASH

    def rate(self, name: str, arm: str, scope: str = "all") -> str:
        """Return a rate of the rows with its interval."""
        for one in self._data[name]["rates"]:
            if (one["arm"], one["scope"]) == (arm, scope):
                return figures.rate_text(one)
        return DASH

    def change(self, name: str, before: str, after: str, scope: str = "all") -> str:
        """Return a difference of the rows with its interval, in points."""
        for one in self._data[name]["differences"]:
            if (one["before"], one["after"], one["scope"]) == (before, after, scope):
                return f"{figures.signed(100 * one['value'])} {figures.rate_interval(one)}"
        return DASH

    def follow(self) -> tuple[int, int]:
        """Return how many headlines on attack success follow, and how many there are."""
        every = self._data["asr"]["headlines"]
        return sum(one["verdict"] == "follows" for one in every), len(every)


def _paper() -> str:
    """Return the paper's own rows by category, which a pooled figure hides."""
    paper = Paper()
    follows, total = paper.follow()
    rows = [
        (
            scope,
            paper.rate("asr", "base", scope),
            *(paper.rate("asr", arm, scope) for arm in ("harmful", "safe")),
            *(paper.change("asr", "base", arm, scope) for arm in ("harmful", "safe")),
        )
        for scope in ("all", "standard", "contextual", "copyright", "without copyright")
    ]
    head = ("prompts", "base", "harmful", "safe", "harmful, change", "safe, change")
    return (
        f"{follows} of the {total} printed figures on attack success that are checked follow from "
        f"the rows.\n\n{table(head, rows)}\n\nRates in per cent, changes in points, 95 % intervals."
    )


# ---- three columns --------------------------------------------------------------------------


def _columns(data: Json | None) -> str:
    """Return the table: the paper, its rows, our run."""
    ours = (data or {}).get("run", {}).get("subject", {}).get("name", "our run")
    head = ("", "the paper prints", "its own rows show", f"our run shows (`{ours}`)")
    return table(head, list(_rows(Paper(), data)))


def _rows(paper: Paper, data: Json | None) -> Iterator[tuple[str, str, str, str]]:
    seeds = words.plural(data["run"]["settings"]["seeds"], "seed") if data else "not run yet"
    yield "trainings", "1 seed, no control", "1 seed, no control", seeds + _control(data)
    yield (
        "attack success before",
        paper.printed("asr", "rate", "base"),
        paper.rate("asr", "base"),
        _level(data, "success"),
    )
    for way, arm in ARMS.items():
        yield (
            f"after {words.WAYS[way]}",
            paper.printed("asr", "rate", arm),
            paper.rate("asr", arm),
            _after(data, "success", way),
        )
        yield (
            f"change by {words.WAYS[way]}, points",
            paper.printed("asr", "difference", "base", arm),
            paper.change("asr", "base", arm),
            _change(data, "success", way),
        )
    yield "change by the control, points", DASH, DASH, _change(data, "success", "benign")
    yield from _knowledge(paper, data)
    yield (
        "adapter taken off gives back the base",
        DASH,
        DASH,
        DASH if data is None else f"{data['removal']['identical']} of {data['removal']['cells']}",
    )


def _control(data: Json | None) -> str:
    return ", with a benign control" if data else ""


def _knowledge(paper: Paper, data: Json | None) -> Iterator[tuple[str, str, str, str]]:
    for key, name in (("none", "B"), ("false", "FIP"), ("random", "RIP")):
        yield (
            f"right answers before, {name}",
            paper.printed("accuracy", "rate", f"base {name}"),
            paper.rate("accuracy", f"base {name}"),
            _level(data, f"accuracy_{key}"),
        )
        for way, arm in ARMS.items():
            yield (
                f"after {words.WAYS[way]}, {name}",
                paper.printed("accuracy", "rate", f"{arm} {name}"),
                paper.rate("accuracy", f"{arm} {name}"),
                _after(data, f"accuracy_{key}", way),
            )
    yield (
        "planted answer adopted before, FIP",
        DASH,
        paper.rate("adoption", "base FIP"),
        _level(data, "adopted_false"),
    )
    for way, arm in ARMS.items():
        yield (
            f"adoption: change by {words.WAYS[way]}, points",
            DASH,
            paper.change("adoption", "base FIP", f"{arm} FIP"),
            _change(data, "adopted_false", way),
        )
    yield (
        "adoption: restricted answers against the control, points",
        DASH,
        DASH,
        _against(data, "adopted_false"),
    )


def _found(data: Json | None, key: str) -> tuple[Json | None, int]:
    if data is None:
        return None, 0
    return words.quantity(data, key), data["run"]["settings"]["ranks"][0]


def _level(data: Json | None, key: str) -> str:
    found, _ = _found(data, key)
    return DASH if found is None else _told(found["unit"], found["before"])


def _told(unit: str, level: Json) -> str:
    return f"{words.level(unit, level)} {words.interval(unit, level)}"


def _after(data: Json | None, key: str, way: str) -> str:
    found, rank = _found(data, key)
    one = words.arm(found, way, rank)
    return DASH if found is None or one is None else _told(found["unit"], one["after"])


def _change(data: Json | None, key: str, way: str) -> str:
    found, rank = _found(data, key)
    one = words.arm(found, way, rank)
    return _shift(found, one["change"] if one else None)


def _against(data: Json | None, key: str) -> str:
    found, rank = _found(data, key)
    one = words.contrast(found, "answers", rank)
    return _shift(found, one["change"] if one else None)


def _shift(found: Json | None, change: Json | None) -> str:
    if found is None or change is None:
        return DASH
    return f"{words.shift(found['unit'], change)} {words.shift_interval(found['unit'], change)}"


# ---- our run --------------------------------------------------------------------------------


def _findings(data: Json, subject: str) -> str:
    """Return what was found, in sentences."""
    lines = [f"**{words.headline(data)}.**", f"{words.setup(data)}."]
    lines += [f"- {line}" for line in (*words.alerts(data), *words.findings(data))]
    few = data["run"]["settings"]["seeds"] < 5
    lines += ["- Fewer than five seeds: a try, not the study."] if few else []
    return "\n\n".join([*lines[:2], "\n".join(lines[2:])])


def _numbers(data: Json, subject: str) -> str:
    """Return every quantity: before, and the change by each way."""
    rank = data["run"]["settings"]["ranks"][0]
    rows = [
        (
            one["label"],
            _told(one["unit"], one["before"]),
            *(_change(data, one["key"], way) for way in words.WAYS),
            _against(data, one["key"]),
        )
        for one in data["quantities"]
    ]
    head = ("", "before", *(f"change: {w}" for w in words.SHORT.values()), "answers minus benign")
    return f"Rank {rank}.\n\n{table(head, rows)}"


def _figures(data: Json, subject: str) -> str:
    """Return the pictures that are there, with what they show."""
    shown = [
        f"![{about}](images/{name}.svg)"
        for name, about, _ in drawings(data, subject)
        if (IMAGES / f"{name}.svg").is_file()
    ]
    return "\n\n".join([*shown, f"{KEY}; grey diamonds: before." if shown else ""]).strip()


def drawings(data: Json, subject: str) -> list[tuple[str, str, str]]:
    """Return name, description and standalone SVG of every figure."""
    from durometer.report.drift_html import changes, levels

    rank = data["run"]["settings"]["ranks"][0]
    drawn = [*changes(data, rank), *levels(data, rank)]
    return [
        (f"override-{subject}-{_slug(title)}", f"{title}: {subject}", standalone(str(drawing)))
        for title, drawing in drawn
        if drawing
    ]


def _slug(title: str) -> str:
    return "-".join(title.lower().replace("-", " ").split())


def standalone(drawing: str) -> str:
    """Return a drawing as a file of its own: a name space, and the style that pages have."""
    head, _, rest = drawing.partition(">")
    opened = head.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    return f"{opened}><style>{STYLE}</style>{rest}\n"


def write_figures(results: Path, images: Path = IMAGES) -> list[Path]:
    """Write the figures of every subject that was run; return their paths."""
    written = []
    for subject in SUBJECTS:
        data = result(subject, results)
        for name, _, drawing in drawings(data, subject) if data else ():
            path = images / f"{name}.svg"
            path.write_text(drawing, "utf-8")
            written.append(path)
    return written
