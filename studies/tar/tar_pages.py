"""The result in words and pictures: the generated parts of docs/tar.md, and its figures as SVG.

Everything is computed from results/summary.json; a part that is not there says that it was not run.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from durometer.report.figures import decimal, element

Json = Mapping[str, Any]
IMAGES = Path(__file__).resolve().parents[2] / "docs" / "images"
NOT_RUN = "*Not run yet: `studies/tar/results/summary.json` holds no result of this part.*"
DASH = "\N{EN DASH}"
PLAIN = {"knowledge": "random_mapping", "refusal": "refusal"}
WHERE = {"all": "all", "in": "of TAR's own kind", "out": "of other kinds"}
FALLEN, KEPT = "50", "50 within"
LEVELS = {
    "25": "a quarter, no limit",
    "25 within": "a quarter, within the limit",
    "50": "half, no limit",
    "50 within": "half, within the limit",
}
STYLE = "font-family: system-ui, sans-serif; background: #ffffff"
INK, GREY, GRID = "#111111", "#555555", "#dddddd"
COLOURS = ("#0b6e99", "#c2410c", "#4d7c0f", "#7e22ce", "#b45309")


# ---- numbers as text -----------------------------------------------------------------------


def budget(found: Json | None) -> str:
    """Return ``12 (10, 12]``, or ``> 128`` where nothing broke it."""
    if found is None:
        return "not measured"
    if found["step"] is None:
        longest = found.get("longest", found["above"])
        reach = f" (some to {longest:,})" if longest > found["above"] else ""
        return f"> {found['above']:,}{reach}"
    return f"{found['step']:,} ({found['low']:,}, {found['step']:,}]" if found["step"] else "0"


def spread(found: Json | None) -> str:
    """Return the median over seeds with least and most: ``38 [20, > 128]``."""
    if found is None:
        return "not measured"
    if not found["broke"]:
        return f"> {found['above']:,.0f}"
    censored = found["broke"] < found["seeds"]
    middle = f"> {found['above']:,.0f}" if found["median"] is None else f"{found['median']:,.0f}"
    most = f"{found['max'] or found['min']:,.0f}" if not censored else "not reached"
    return f"{middle} [{found['min']:,.0f}, {most}]"


def times(found: Json, *, grid: bool = True) -> str:
    """Return a factor, with what the grid of budgets leaves open, or why there is none."""
    if found["factor"] is not None:
        high = "?" if found["high"] is None else decimal(found["high"])
        told = f" (grid {decimal(found['low'])} to {high})" if grid else ""
        return f"{decimal(found['factor'])}{told}"
    return f"> {decimal(found['low'])}" if "low" in found else found["reason"]


def counted(count: int, name: str) -> str:
    """Return ``1 seed``, ``3 seeds``."""
    return f"{count} {name}{'s' * (count != 1)}"


def percent(share: float | None) -> str:
    """Return a share in per cent."""
    return DASH if share is None else f"{decimal(100 * share)} %"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def picture(name: str, about: str) -> str:
    """Return the figure if there is one."""
    return f"![{about}](images/{name}.svg)" if (IMAGES / f"{name}.svg").is_file() else ""


# ---- sections of the page ------------------------------------------------------------------


def section(summary: Json, name: str) -> str:
    """Return one generated part of the page: ``headline``, or ``PART`` or ``PART-KIND``."""
    part, _, kind = name.partition("-")
    if part == "headline":
        return headline(summary)
    if part not in summary:
        return NOT_RUN
    found = summary[part]
    own: dict[str, Callable[[Json], str]] = {"figure3": _figure3, "figure5": _figure5}
    if part in own:
        return own[part](found)
    if part == "ablations":
        return "\n\n".join([_extent(summary["limits"][part]), _ablations(found)])
    if not [r for r in found["rows"] if r["kind"] == kind]:
        return NOT_RUN
    limits = summary["limits"][part]
    return "\n\n".join(filter(None, _part(found, part, kind, limits)))


def headline(summary: Json) -> str:
    """Return the sentences that the page begins with."""
    lines = [line for kind in PLAIN for line in _factor_lines(summary, kind)]
    if "figure3" in summary:
        held = summary["figure3"]["at_k"]
        good = [name for name, v in held.items() if v["reproduced"]]
        lines.append(
            "**Entropy against cross-entropy (the paper's Figure 3)**: reproduced for "
            f"{len(good)} of {len(held)} kinds of adversary{_list(good)}."
        )
    if "figure5" in summary:
        lines.append(_figure5_line(summary["figure5"]))
    return "\n".join(f"- {line}" for line in lines) if lines else NOT_RUN


def _list(names: Sequence[str]) -> str:
    return f" ({', '.join(names)})" if names else ""


def _factor_lines(summary: Json, kind: str) -> Iterable[str]:
    """Yield what the deepest part that was run says of TAR and of what it starts from."""
    for part in ("seeds", "best", "screen"):
        found = summary.get(part, {}).get("factors", {}).get(kind)
        if not found:
            continue
        rows = {r["label"]: r for r in summary[part]["rows"] if r["kind"] == kind}
        tar, plain = rows["tar"], rows[PLAIN[kind]]
        if unfinished(tar) or unfinished(plain):
            continue
        limits = summary["limits"][part]
        told = [
            f"{words}: {budget(tar['worst']['report'][key]['all'])} updates against "
            f"{budget(plain['worst']['report'][key]['all'])}, a factor of "
            f"{times(found[key]['all'])}{_seed_factors(found, key)}"
            for key, words in ((FALLEN, "without a utility limit"), (KEPT, "within the limit"))
        ]
        yield (
            f"**{kind.capitalize()}**: until the strongest of "
            f"{len(summary[part]['adversaries'])} adversaries has half of what is restricted back "
            f"from TAR, and from `{PLAIN[kind]}`, which it starts from "
            f"({counted(limits['seeds'], 'attack seed')}, at most {limits['cap']:,} updates), "
            f"{'; '.join(told)}. "
            f"{_price(tar)}"
        )
        return


def unfinished(found: Json) -> bool:
    """Say whether planned trials of a row are still to be run: its worst case may be another."""
    return bool({"missing", "not_trained"} & set(found["statuses"]))


def _seed_factors(found: Json, key: str) -> str:
    seeds = found.get("by_training_seed", {}).get(key, {})
    told = "; ".join(times(factor, grid=False) for factor in seeds.values())
    return f" (training seed by training seed {told})" if told else ""


def _price(found: Json) -> str:
    training = found.get("training")
    if not training or "retain_cost" not in found:
        return "It was not trained."
    return (
        f"It costs {decimal(found['retain_cost'])} points of retain score, "
        f"{training['seconds']:,.0f} s of training and {training['passes']:,} passes."
    )


def _part(found: Json, part: str, kind: str, limits: Json) -> Iterable[str]:
    yield _extent(limits)
    yield picture(f"tar_{part}_{kind}", f"Worst-case budgets, {part}, {kind}")
    rows = [r for r in found["rows"] if r["kind"] == kind]
    yield _safeguards(rows, kind)
    yield f"Trials: {_statuses(rows)}."
    if kind in found["factors"]:
        yield "How many times the worst-case budget of what it starts from TAR withstands:"
        yield _factors(found["factors"][kind])
    if part != "screen":
        yield "Median over seeds of the updates until half was back, by adversary:"
        yield _adversaries(found, rows, kind)
    own = [r for r in rows if "worst_by_training_seed" in r]
    if own:
        yield "Worst case by training seed (without a limit / within it):"
        yield _training_seeds(own)


def _extent(limits: Json) -> str:
    """Return how much of a part was run."""
    told = (
        f"{counted(limits['seeds'], 'attack seed')} an adversary, at most {limits['cap']:,} "
        f"updates, {counted(limits['training_seeds'], 'training seed')}."
    )
    return told + (" Others were left out so far." if limits.get("safeguards") else "")


def _safeguards(rows: Sequence[Json], kind: str) -> str:
    refusal = ["refused before"] if kind == "refusal" else []
    head = ["safeguard", "right before", *refusal, "points lost", "s", "passes"]
    head += ["half back, no limit", "within the limit", "defender's entities"]
    body = [_safeguard(r, bool(refusal)) for r in sorted(rows, key=_order)]
    return table(head, body)


def _order(found: Json) -> tuple[bool, float, float, str]:
    """Return the sort key: controls last, then by what was held within the limit."""

    def held(key: str) -> float:
        worst = found["worst"]["report"][key]["all"]
        if worst is None:
            return -1.0
        return math.inf if worst["step"] is None else float(worst["step"])

    return found["role"] == "control", -held(KEPT), -held(FALLEN), found["label"]


def _safeguard(found: Json, refusal: bool) -> list[str]:
    control = " (control)" if found["role"] == "control" else ""
    name = f"`{found['label']}`{control}"
    if found["trained"] != "done":
        told = f"training: {found['trained']}"
        return [name, told, *([DASH] if refusal else []), *[DASH] * 6]
    start, training, worst = found["start_worst"], found["training"], found["worst"]
    refused = [percent(start.get("refused"))] if refusal else []
    return [
        name,
        percent(start["report"]),
        *refused,
        decimal(found["retain_cost"]) if "retain_cost" in found else DASH,
        f"{training['seconds']:,.0f}",
        f"{training['passes']:,}",
        budget(worst["report"][FALLEN]["all"]),
        budget(worst["report"][KEPT]["all"]),
        budget(worst["defence"][FALLEN]["all"]),
    ]


def _statuses(rows: Iterable[Json]) -> str:
    counts: dict[str, int] = {}
    for found in rows:
        for status, count in found["statuses"].items():
            counts[status] = counts.get(status, 0) + count
    return _counted(counts)


def _counted(counts: Mapping[str, int]) -> str:
    told = [f"{count:,} {status.replace('_', ' ')}" for status, count in sorted(counts.items())]
    return ", ".join(told)


def _factors(found: Json) -> str:
    rows = [
        [words, *(times(found[key][where]) for where in WHERE)] for key, words in LEVELS.items()
    ]
    return table(["what is back", *(f"adversaries: {w}" for w in WHERE.values())], rows)


def _adversaries(found: Json, rows: Sequence[Json], kind: str) -> str:
    """Return TAR and what it starts from, adversary by adversary, those of TAR's kind first."""
    by_label = {r["label"]: r for r in rows}
    shown = [label for label in (PLAIN[kind], "tar") if label in by_label]
    ordered = sorted(found["adversaries"].items(), key=lambda e: not e[1]["trained_kind"])
    body = [
        [
            name,
            "yes" if about["trained_kind"] else "no",
            percent(about["undefended"]),
            *(
                spread(by_label[label]["medians"].get(name, {}).get(key))
                for label in shown
                for key in (FALLEN, KEPT)
            ),
        ]
        for name, about in ordered
    ]
    head = ["adversary", "TAR's own kind", "undefended after it"]
    head += [f"`{label}`, {w}" for label in shown for w in ("no limit", "within")]
    return table(head, body)


def _training_seeds(rows: Sequence[Json]) -> str:
    seeds = list(rows[0]["worst_by_training_seed"])
    body = [
        [
            f"`{r['label']}`",
            *(
                " / ".join(
                    budget(r["worst_by_training_seed"].get(seed, {}).get(key))
                    for key in (FALLEN, KEPT)
                )
                for seed in seeds
            ),
        ]
        for r in rows
    ]
    return table(["safeguard", *(f"seed {seed}" for seed in seeds)], body)


def _ablations(found: Json) -> str:
    parts = []
    for kind, axes in found["axes"].items():
        parts.append(picture(f"tar_ablations_{kind}", f"Ablations of TAR, {kind}"))
        head = ["varied", "value", "right before", "points lost"]
        head += [f"half back, {w}" for w in WHERE.values()]
        head += [f"within the limit, {w}" for w in WHERE.values()]
        body = [
            [axis, value, *_ablation(row)]
            for axis, values in axes.items()
            for value, row in values.items()
        ]
        parts.append(table(head, body))
        rows = [row for values in axes.values() for row in values.values()]
        parts.append(f"Trials ({kind}, a model that is in several rows counted in each): ")
        parts[-1] += f"{_statuses(rows)}."
    return "\n\n".join(filter(None, parts))


def _ablation(found: Json) -> list[str]:
    if found["trained"] != "done":
        return [f"training: {found['trained']}", *[DASH] * 7]
    worst = found["worst"]["report"]
    return [
        percent(found["start"]["report"]),
        decimal(found["retain_cost"]) if "retain_cost" in found else DASH,
        *(budget(worst[key][where]) for key in (FALLEN, KEPT) for where in WHERE),
    ]


def _figure3(found: Json) -> str:
    head = ["adversary", "loss after K: entropy", "cross-entropy", "its peak before"]
    head += ["retain before: entropy", "cross-entropy", "reproduced"]
    body = [
        [
            name,
            f"{v['entropy']:.2f}",
            f"{v['cross_entropy']:.2f}",
            f"{v['cross_entropy_peak']:.2f}",
            percent(v["entropy_retain_at_start"]),
            percent(v["cross_entropy_retain_at_start"]),
            "yes" if v["reproduced"] else "no",
        ]
        for name, v in found["at_k"].items()
    ]
    parts = [picture("tar_figure3", "Loss of inner attackers, and retain, by loss of TAR")]
    parts.append(f"Trajectories: {_counted(found['statuses'])}.")
    return "\n\n".join(filter(None, [*parts, table(head, body)]))


def _figure5(found: Json) -> str:
    parts = [picture("tar_figure5", "Five data orders of one attack on TAR")]
    firsts = ", ".join("not reached" if f is None else f"{f:,}" for f in found["first"])
    parts.append(f"{_figure5_line(found)} A quarter was back, order by order, after: {firsts}.")
    return "\n\n".join(filter(None, parts))


def _figure5_line(found: Json) -> str:
    steps = found["step"][-1]
    return (
        f"**{found['orders']} data orders of one attack (Figure 5)**: no order has a quarter back "
        f"for {found['plateau']:,} of {steps:,} updates; the orders lie at most "
        f"{100 * found['spread_on_plateau']:.0f} points apart until then and "
        f"{100 * found['spread_after']:.0f} points afterwards."
    )


# ---- figures -------------------------------------------------------------------------------


def figures(summary: Json) -> dict[str, str]:
    """Return every figure that the summary has numbers for, by file name without ending."""
    found: dict[str, str] = {}
    for part in ("screen", "best", "seeds"):
        for kind in PLAIN:
            rows = [r for r in summary.get(part, {}).get("rows", []) if r["kind"] == kind]
            if rows:
                found[f"tar_{part}_{kind}"] = _dots([*_dot_rows(rows)])
    for kind, axes in summary.get("ablations", {}).get("axes", {}).items():
        found[f"tar_ablations_{kind}"] = _dots([*_ablation_rows(axes)])
    if "figure3" in summary:
        found["tar_figure3"] = _draw3(summary["figure3"])
    if "figure5" in summary:
        found["tar_figure5"] = _draw5(summary["figure5"])
    return found


Mark = tuple[str, Json | None]  # colour and worst case


def _dot_rows(rows: Sequence[Json]) -> Iterable[tuple[str, list[Mark]]]:
    for found in sorted(rows, key=_order):
        worst = found["worst"]["report"]
        control = " (control)" if found["role"] == "control" else ""
        marks = [(COLOURS[0], worst[FALLEN]["all"]), (COLOURS[1], worst[KEPT]["all"])]
        yield f"{found['label']}{control}", marks


def _ablation_rows(axes: Json) -> Iterable[tuple[str, list[Mark]]]:
    for axis, values in axes.items():
        for value, found in values.items():
            worst = found["worst"]["report"]
            marks = [(COLOURS[0], worst[FALLEN]["all"]), (COLOURS[1], worst[KEPT]["all"])]
            yield f"{axis}: {value}", marks


def _dots(rows: Sequence[tuple[str, list[Mark]]]) -> str:
    """Return worst-case budgets on a logarithmic axis; an arrow is one that was not reached."""
    left, right, top, line = 250, 40, 46, 20
    width, height = 720, top + line * len(rows) + 40
    worsts = [w for _, marks in rows for _, w in marks if w]
    most = max((w["step"] if w["step"] is not None else w["above"] for w in worsts), default=1)
    body = [element("rect", width=width, height=height, fill="#ffffff")]

    def x(step: float) -> float:
        share = math.log2(1 + step) / math.log2(1 + max(most, 1))
        return left + share * (width - left - right)

    for tick in [0, *(4**power for power in range(7) if 4**power <= most)]:
        body.append(_line(x(tick), top - 8, x(tick), height - 32, GRID))
        body.append(_text(x(tick), height - 18, f"{tick:,}", anchor="middle", fill=GREY, size=11))
    for number, (label, marks) in enumerate(rows):
        y = top + line * number + line / 2
        body.append(_text(left - 10, y + 4, label, anchor="end"))
        for shift, (colour, found) in zip((-3.5, 3.5), marks, strict=True):
            body += _mark(x, y + shift, colour, found)
    body += _legend(left, [(COLOURS[0], "no utility limit"), (COLOURS[1], "within the limit")])
    name = "updates until half is back, worst case of all attacks (arrow: not reached)"
    body.append(_text(left, height - 4, name, size=11, fill=GREY))
    return _svg(width, height, "Worst-case budgets until half of the knowledge is back", body)


def _mark(x: Callable[[float], float], y: float, colour: str, found: Json | None) -> list[Any]:
    if found is None:
        return []
    if found["step"] is None:
        at = x(found["above"])
        points = f"{at:.1f},{y - 4:.1f} {at + 9:.1f},{y:.1f} {at:.1f},{y + 4:.1f}"
        return [element("polygon", points=points, fill=colour)]
    at = x(found["step"])
    tail = _line(x(found["low"]), y, at, y, colour, 2)
    return [tail, element("circle", cx=at, cy=y, r=4.0, fill=colour)]


def _draw3(found: Json) -> str:
    """Return the loss (above) and the retain score (below) along inner attacks, by adversary."""
    lines = _series3(found)
    names = list(dict.fromkeys(name for _, _, _, curves in lines for name in curves))
    wide, gap = 250, 50
    width, height = gap + len(names) * (wide + gap), 470
    losses = [v for *_, curves in lines for c in curves.values() for v in c["loss_max"]]
    most = max(losses, default=1.0)
    body = [element("rect", width=width, height=height, fill="#ffffff")]
    body += _legend(gap, [(colour, label) for label, colour, _, _ in lines])
    for column, name in enumerate(names):
        left = gap + column * (wide + gap)
        body.append(_text(left, 46, f"adversary: {name}"))
        for key, top, limit in (("loss", 60, most), ("retain", 265, 1.0)):
            body += _panel3(found, lines, name, key, (left, top, wide, 160), limit)
    body.append(_text(gap, height - 6, "inner updates; dashed: a quarter of the training", size=11))
    return _svg(width, height, "Loss and retain along inner attacks", body)


def _series3(found: Json) -> list[tuple[str, str, bool, Json]]:
    """Return label, colour, whether dashed, and curves by adversary."""
    lines = []
    for number, (loss, times) in enumerate(found["curves"].items()):
        for when, curves in times.items():
            label = f"{loss.replace('_', '-')}{', early' if when == 'early' else ''}"
            lines.append((label, COLOURS[number], when == "early", curves))
    return lines


def _panel3(
    found: Json,
    lines: Sequence[tuple[str, str, bool, Json]],
    name: str,
    key: str,
    box: tuple[float, float, float, float],
    limit: float,
) -> list[Any]:
    left, top, wide, high = box
    ends = [c[name]["step"][-1] for *_, c in lines if name in c]
    last = max(ends, default=1)
    told = "held-out loss, nats a token" if key == "loss" else "retain score"
    body = _axes(box, f"{told} (0 to {limit:.3g})", last)
    at = left + found["inner_steps"] / last * wide
    body += [_line(at, top, at, top + high, GREY), _text(at + 3, top + 10, "K", size=10)]
    for _, colour, dashed, curves in lines:
        if name in curves:
            curve = curves[name]
            points = zip(curve["step"], curve[key], strict=True)
            body.append(_path(points, box, last, limit, colour, dashed))
    return body


def _draw5(found: Json) -> str:
    """Return what each data order has back, and how far they lie apart at every step."""
    width, height = 720, 460
    body = [element("rect", width=width, height=height, fill="#ffffff")]
    last = found["step"][-1]
    upper, lower = (50.0, 30.0, 640.0, 230.0), (50.0, 300.0, 640.0, 110.0)
    body += _axes(upper, "right answers on report entities (0 to 1)", last)
    for number, values in enumerate(found["report"]):
        points = zip(found["step"], values, strict=True)
        body.append(_path(points, upper, last, 1.0, COLOURS[number % len(COLOURS)], False))
    body += _axes(lower, "largest minus smallest of the orders (0 to 1)", last)
    points = zip(found["step"], found["spread"], strict=True)
    body.append(_path(points, lower, last, 1.0, INK, False))
    body.append(_text(50, height - 8, "updates of the attack", size=11, fill=GREY))
    return _svg(width, height, "Data orders of one attack on TAR", body)


def _axes(box: tuple[float, float, float, float], name: str, last: float) -> list[Any]:
    left, top, wide, high = box
    body = [_text(left, top - 4, name, size=11, fill=GREY)]
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = top + (1 - share) * high
        body.append(_line(left, y, left + wide, y, GRID if share else INK))
        tick = _text(left + share * wide, top + high + 14, f"{share * last:,.0f}", size=10)
        body.append(tick)
    return body


def _path(
    points: Iterable[tuple[float, float]],
    box: tuple[float, float, float, float],
    last: float,
    limit: float,
    colour: str,
    dashed: bool,
) -> Any:
    left, top, wide, high = box
    places = [
        f"{left + step / last * wide:.1f},{top + (1 - min(value / limit, 1)) * high:.1f}"
        for step, value in points
        if value is not None
    ]
    more = {"stroke_dasharray": "5 4"} if dashed else {}
    return element(
        "polyline", points=" ".join(places), fill="none", stroke=colour, stroke_width=1.8, **more
    )


def _legend(left: float, entries: Sequence[tuple[str, str]]) -> list[Any]:
    body = []
    for colour, label in entries:
        body.append(element("rect", x=float(left), y=12.0, width=12.0, height=8.0, fill=colour))
        body.append(_text(left + 17, 20, label))
        left += 40 + 6.6 * len(label)
    return body


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float = 1) -> Any:
    places = {"x1": float(x1), "y1": float(y1), "x2": float(x2), "y2": float(y2)}
    return element("line", **places, stroke=colour, stroke_width=float(width))


def _text(
    x: float, y: float, text: str, *, size: int = 12, anchor: str = "start", fill: str = INK
) -> Any:
    return element(
        "text", text, x=float(x), y=float(y), font_size=size, text_anchor=anchor, fill=fill
    )


def _svg(width: float, height: float, label: str, body: Iterable[Any]) -> str:
    drawing = element(
        "svg",
        *body,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {width} {height}",
        width=width,
        height=height,
        role="img",
        aria_label=label,
        style=STYLE,
    )
    return f"{drawing}\n"
