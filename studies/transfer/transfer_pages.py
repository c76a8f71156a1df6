"""The result in words and pictures: tables of the README, and the matrix as SVG."""

from collections.abc import Mapping, Sequence
from typing import Any

from transfer_matrix import NONE, RANDOM, UNDEFENDED

from durometer.report.figures import element, percent, rate_text

Result = Mapping[str, Any]
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
CELL, HEIGHT, LEFT, TOP = 104, 46, 132, 64
_LABELS = {NONE: "no suffix", RANDOM: "random suffixes", UNDEFENDED: "undefended"}
STYLE = "font-family: system-ui, sans-serif; background: #ffffff"


def tables(result: Result) -> str:
    """Return the tables of the README as Markdown."""
    parts = (_variants(result), _matrix(result), _best(result), _failures(result))
    return "\n\n".join(parts)


def with_results(readme: str, result: Result) -> str:
    """Return ``readme`` with the text between the marks replaced by the tables."""
    head, _, rest = readme.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n\n{tables(result)}\n\n{END}{tail}"


def _targets(result: Result) -> list[str]:
    return list(result["outcomes"])


def _row(result: Result, source: str, target: str) -> Mapping[str, Any]:
    rows: Sequence[Mapping[str, Any]] = result["matrix"]
    return next(row for row in rows if (row["source"], row["target"]) == (source, target))


def _label(name: str) -> str:
    return _LABELS.get(name, f"`{name}`")


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _variants(result: Result) -> str:
    failures = result["failures"]
    rows = [
        [
            _label(name),
            variant["difference"],
            percent(_row(result, NONE, name)["mean"]["rate"]),
            f"{failures['working_on_source'][name]} of {failures['k']}",
        ]
        for name, variant in result["variants"].items()
    ]
    rows.append(
        ["undefended", "no safeguard", percent(_row(result, NONE, UNDEFENDED)["mean"]["rate"]), "-"]
    )
    head = ["variant", "what differs", "success without a suffix", "strings that succeed on it"]
    return _markdown(head, rows)


def _matrix(result: Result) -> str:
    """Return the mean success of the strings of each source on each target."""
    targets, k = _targets(result), result["failures"]["k"]
    rows = [
        [_label(source), *(rate_text(_row(result, source, t)["mean"]) for t in targets)]
        for source in (NONE, RANDOM, *result["variants"])
    ]
    head = ["found on", *(f"on {_label(target)}" for target in targets)]
    told = f"Success on `report` items, mean over the k = {k} strings of a source (95 % interval):"
    return f"{told}\n\n{_markdown(head, rows)}"


def _best(result: Result) -> str:
    """Return the best of k on each target, and of as many random strings."""
    targets, k = [t for t in _targets(result) if t != UNDEFENDED], result["failures"]["k"]
    rows = []
    for source in (RANDOM, *result["variants"]):
        cells = [_row(result, source, target) for target in targets]
        rows.append(
            [
                _label(source),
                *(
                    f"{percent(cell['chosen_on_source']['rate'])} / "
                    f"{percent(cell['chosen_on_target']['rate'])}"
                    if "chosen_on_source" in cell
                    else f"- / {percent(cell['chosen_on_target']['rate'])}"
                    for cell in cells
                ),
            ]
        )
    head = ["found on", *(f"on {_label(target)}" for target in targets)]
    told = (
        f"Success on `report` items of the best of k = {k} strings, chosen on `select` items of "
        "the source / of the target (the second needs k questions an item to the target):"
    )
    return f"{told}\n\n{_markdown(head, rows)}"


def _failures(result: Result) -> str:
    failures = result["failures"]
    best = f"best of k = {failures['k']}, chosen on the"
    lines = (
        ("strings that succeed on their source, on other variants", "other_targets"),
        ("the same strings on their own source's `report` items", "source_itself"),
        (f"{best} source, on other variants", "best_of_k_chosen_on_source"),
        (f"{best} target, on other variants", "best_of_k_chosen_on_target"),
        ("single answers given on the source, on other variants", "answers_lost"),
    )
    rows = [[told, *_counted(failures[name])] for told, name in lines]
    working = sum(failures["working_on_source"].values())
    head = (
        f"{working} of {failures['found']} strings succeed on the variant they were found on. "
        "Failure rate, the share that does not succeed where it is tried:"
    )
    return f"{head}\n\n{_markdown(['what is tried', 'failure rate', 'counted'], rows)}"


def _counted(share: Mapping[str, Any] | None) -> tuple[str, str]:
    if share is None:
        return "not measured", "-"
    return rate_text(
        share
    ), f"{share['failed']} of {share['pairs']}; {share['method']} ({share['n']})"


def figure(result: Result) -> str:
    """Return the matrix of sources and targets as a picture, mean above best of k."""
    targets, sources = _targets(result), [NONE, RANDOM, *result["variants"]]
    width, height = LEFT + CELL * len(targets) + 8, TOP + HEIGHT * len(sources) + 30
    k = result["failures"]["k"]
    body = [
        element("rect", width=width, height=height, fill="#ffffff"),
        _text(LEFT + CELL * len(targets) / 2, 18, "tried on", size=13, anchor="middle"),
        _text(LEFT - 10, TOP - 10, "found on", size=13, anchor="end"),
    ]
    for column, target in enumerate(targets):
        name = _LABELS.get(target, target)
        body.append(_text(LEFT + CELL * (column + 0.5), TOP - 10, name, anchor="middle"))
    for line, source in enumerate(sources):
        y = TOP + HEIGHT * line
        name = _LABELS.get(source, source)
        body.append(_text(LEFT - 10, y + HEIGHT / 2 + 4, name, anchor="end"))
        for column, target in enumerate(targets):
            body += _cell(_row(result, source, target), LEFT + CELL * column, y)
    told = f"success on report items, %: mean of k = {k} strings; best of k chosen on the target"
    body.append(_text(LEFT, height - 10, told, size=11, fill="#444444"))
    drawing = element(
        "svg",
        *body,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {width} {height}",
        width=width,
        height=height,
        role="img",
        aria_label="Success of suffixes by the model they were found on and tried on",
        style=STYLE,
    )
    return f"{drawing}\n"


def _cell(row: Mapping[str, Any], x: float, y: float) -> list[Any]:
    rate, best = row["mean"], row["chosen_on_target"]
    share = rate["rate"]
    ink = "#ffffff" if share > 0.35 else "#111111"
    framed = row["source"] == row["target"]
    middle = x + CELL / 2
    second = f"[{100 * rate['low']:.0f}, {100 * rate['high']:.0f}]"
    if row["k"] > 1:
        second += f"  best {100 * best['rate']:.0f}"
    return [
        element(
            "rect",
            x=x + 1.5,
            y=y + 1.5,
            width=CELL - 3.0,
            height=HEIGHT - 3.0,
            fill=_shade(share),
            stroke="#111111" if framed else "#cccccc",
            stroke_width=2.0 if framed else 1.0,
        ),
        _text(middle, y + 21, f"{100 * share:.0f} %", size=15, anchor="middle", fill=ink),
        _text(middle, y + 36, second, size=10, anchor="middle", fill=ink),
    ]


def _shade(share: float) -> str:
    """Return a blue that is darker the larger the share; all of it from 60 %."""
    depth = min(share / 0.6, 1.0)
    light, dark = (247, 251, 255), (8, 69, 148)
    mixed = (round(a + depth * (b - a)) for a, b in zip(light, dark, strict=True))
    return "#" + "".join(f"{part:02x}" for part in mixed)


def _text(
    x: float, y: float, text: str, *, size: int = 12, anchor: str = "start", fill: str = "#111111"
) -> Any:
    return element(
        "text", text, x=float(x), y=float(y), font_size=size, text_anchor=anchor, fill=fill
    )
