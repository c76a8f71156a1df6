"""Parts of the documentation that are generated from the code and from result files.

A line ``<!-- generated: NAME ARGUMENT -->`` in a page is replaced while the site is built, so that
what the pages list is what the registries, the command line and the result files hold.
"""

import ast
import html
import importlib
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs"))

import studies  # noqa: E402

SOURCE = ROOT / "src" / "durometer"
RESULTS = ROOT / "benchmarks" / "results"
MARK = re.compile(r"^<!-- generated: (\S+)(?: (\S+))? -->$", re.MULTILINE)
# Upper layers first; an arrow of imports goes down only. Rooms of one layer stand together.
LAYERS = (
    ("report", "audit"),
    ("override",),
    ("trials",),
    ("safeguards",),
    ("tampers",),
    ("measures", "headlines"),
    ("judges",),
    ("domains", "subjects"),
    ("formats",),
    ("core",),
)
ROOMS = tuple(room for layer in LAYERS for room in layer)
NOTHING = "\N{EN DASH}"
TINY_WEIGHTS, ORDINARY_WEIGHTS = 1_000_000, 100_000_000


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in the generated parts of one page (called by mkdocs)."""
    return MARK.sub(lambda mark: GENERATORS[mark[1]](*filter(None, [mark[2]])), markdown)


# ---- Markdown ------------------------------------------------------------------------------


def text(value: object) -> str:
    """Return ``value`` as literal text in one line of Markdown; ``double ticks`` become code."""
    parts = re.split(r"``(.+?)``", " ".join(str(value).split()))
    return "".join(f"`{part}`" if at % 2 else _literal(part) for at, part in enumerate(parts))


def _literal(part: str) -> str:
    return re.sub(r"([\\`*_\[\]|#])", r"\\\1", html.escape(part, quote=False))


def sentence(value: str) -> str:
    """Return a summary line as a sentence."""
    return text(f"{value[:1].upper()}{value[1:].removesuffix('.')}.")


def code(value: object) -> str:
    """Return ``value`` as code, or a dash where there is nothing."""
    plain = " ".join(str(value).split())
    return f"`{plain.replace('|', ' or ')}`" if plain else NOTHING


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def sources(value: str) -> str:
    """Return a source line whose arXiv numbers are links."""
    return re.sub(r"\b(\d{4}\.\d{5})\b", r"[\1](https://arxiv.org/abs/\1)", text(value))


# ---- registries ----------------------------------------------------------------------------


def tampers() -> str:
    """Return one section a tamper: what it is, what it cannot show, its settings."""
    _fill_registries()
    from durometer.tampers.base import tamper_registry

    return "\n\n".join(_tamper(name, entry) for name, entry in tamper_registry)


def _tamper(name: str, entry: Any) -> str:
    facts = [
        ("access", text(f"{entry.access_level}, {entry.access}")),
        ("cost", text(entry.cost)),
        ("source", sources(entry.source)),
        ("cannot show", text(entry.cannot_show)),
    ]
    settings = [
        (
            code(s.name),
            code(s.default),
            text(s.meaning),
            text(s.type.replace(" | ", ", ")),
            text(s.search or NOTHING),
        )
        for s in entry.settings_class.describe()
    ]
    header = ("setting", "default", "meaning", "type", "search range")
    parts = [f"## `{name}` {{ #{name} }}", sentence(entry.summary)]
    parts.append("\n".join(f"- **{key}**: {value}" for key, value in facts))
    parts.append(table(header, settings) if settings else "It has no settings.")
    return "\n\n".join(parts)


def safeguards() -> str:
    """Return one section a safeguard: what it is, what it cannot show, presets and settings."""
    _fill_registries()
    from durometer.safeguards.base import safeguard_registry

    return "\n\n".join(_safeguard(name, entry) for name, entry in safeguard_registry)


def _safeguard(name: str, entry: Any) -> str:
    facts = [
        ("protects", text(entry.access)),
        ("kinds of domain", text(", ".join(entry.kinds))),
        ("cost", text(entry.cost)),
        ("source", sources(entry.source)),
        ("cannot show", text(entry.cannot_show)),
        *(
            (f"preset `{preset}`", code(", ".join(f"{k}={v}" for k, v in values.items())))
            for preset, values in entry.presets.items()
        ),
    ]
    settings = [
        (code(s.name), code(s.default), text(s.meaning), text(s.type.replace(" | ", ", ")))
        for s in entry.settings_class.describe()
    ]
    parts = [f"## `{name}` {{ #{name} }}", sentence(entry.summary)]
    parts.append("\n".join(f"- **{key}**: {value}" for key, value in facts))
    header = ("setting", "default", "meaning", "type")
    parts.append(table(header, settings) if settings else "It has no settings.")
    return "\n\n".join(parts)


def measures() -> str:
    """Return one section a measure."""
    _fill_registries()
    from durometer.measures.base import family_registry, measure_registry

    sections = []
    for name, entry in measure_registry:
        facts = f"- **kinds of domain**: {', '.join(entry.kinds)}\n- **reads**: {entry.role} items"
        doc = inspect.cleandoc(entry.run.__doc__ or "")
        sections.append(
            f"## `{name}` {{ #{name} }}\n\n{sentence(entry.summary)}\n\n{facts}\n\n{text(doc)}"
        )
    for name, family in family_registry:
        facts = f"- **named as**: {code(family.usage)}\n- **reads**: items of its own"
        sections.append(f"## `{name}` {{ #{name} }}\n\n{sentence(family.summary)}\n\n{facts}")
    return "\n\n".join(sections)


def subjects() -> str:
    """Return a table of the built-in subjects."""
    _fill_registries()
    from durometer.subjects.builtin import subject_registry

    rows = [
        (code(name), text(e.description), code(e.domain), code(e.undefended), code(e.reference))
        for name, e in subject_registry
    ]
    return table(("name", "what it is", "safeguarded on", "undefended", "reference"), rows)


def domains() -> str:
    """Return one section a built-in domain, with its counts and an example of each role."""
    _fill_registries()
    from durometer.domains.base import domain_registry

    return "\n\n".join(_domain(name, entry) for name, entry in domain_registry)


def _domain(name: str, entry: Any) -> str:
    from durometer.domains.base import KINDS, Role, Split

    built = {kind: entry.build(kind) for kind in KINDS}
    domain = built["refusal"]
    counts = domain.counts()
    splits = [s for s in Split if any(key.endswith(s) for key in counts)]
    names = {str(role): str(role) for role in Role} | {"entities": "restricted entities"}
    rows = [
        (shown, *(str(counts.get(f"{name}_{split}", 0)) for split in splits))
        for name, shown in names.items()
    ]
    chances = ", ".join(f"{built[kind].chance:g} for `{name}:{kind}`" for kind in KINDS)
    examples = [
        f"- {role}: *{text(items[0].prompt)}*: {text(items[0].response)}"
        for role in Role
        if domain.harmless and (items := domain.select(role))
    ]
    parts = [f"## `{name}` {{ #{name} }}", sentence(entry.description)]
    parts.append(f"Source: {text(domain.source.rstrip('.'))}. Chance: {chances}.")
    parts.append(table(("items", *(f"`{split}`" for split in splits)), rows))
    return "\n\n".join([*parts, "An item of each role:", "\n".join(examples)])


def suites() -> str:
    """Return every attack of every suite, for ordinary and for tiny subjects."""
    _fill_registries()
    from durometer.trials.suites import SUITES, make_suite

    sections = []
    for name in SUITES:
        ordinary, tiny = make_suite(name, ORDINARY_WEIGHTS), make_suite(name, TINY_WEIGHTS)
        sections.append(
            f"## `{name}` {{ #{name} }}\n\n{_suite_line(ordinary)}\n\n"
            f"### {name}: measuring plan\n\n{_plan(ordinary)}\n\n"
            f"### {name}: attacks on an ordinary subject\n\n{_attacks(ordinary)}\n\n"
            f"### {name}: attacks on a tiny subject\n\n{_attacks(tiny)}"
        )
    return "\n\n".join(sections)


def _suite_line(suite: Any) -> str:
    grade = "Claim-grade" if suite.claim_grade else "A screen"
    plural = "s" * (suite.control_seeds != 1)
    return (
        f"{grade}: {len(suite.attacks)} configurations x {suite.seeds} seeds; "
        f"{suite.control_seeds} seed{plural} on the undefended subject; "
        f"{suite.fresh_seeds} fresh seeds for the worst configuration."
    )


def _plan(suite: Any) -> str:
    rows = [
        (code(s.name), code(getattr(suite.plan, s.name)), text(s.meaning))
        for s in suite.plan.describe()
    ]
    return table(("setting of the plan", "value", "meaning"), rows)


def _attacks(suite: Any) -> str:
    rungs = ", ".join(str(rung) for rung in suite.rungs(suite.steps))
    rows = [
        (str(number), f"[`{attack.tamper}`](tampers.md#{attack.tamper})", code(_told(attack)))
        for number, attack in enumerate(suite.attacks, 1)
    ]
    listed = table(("", "tamper", "settings that the suite names"), rows)
    return f"At most {suite.steps} updates, measured at {rungs}.\n\n{listed}"


def _told(attack: Any) -> str:
    return ", ".join(
        f"{name}={value:.3g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in attack.settings.items()
    )


def drift_settings() -> str:
    """Return every setting of ``drift``."""
    from durometer.override.settings import DriftSettings

    rows = [(code(s.name), code(s.default), text(s.meaning)) for s in DriftSettings.describe()]
    return table(("setting", "default", "meaning"), rows)


def not_tested() -> str:
    """Return what the suites leave out."""
    from durometer.trials.suites import NOT_TESTED

    return "\n".join(f"- {text(entry)}" for entry in NOT_TESTED)


def _fill_registries() -> None:
    importlib.import_module("durometer.catalogue")


# ---- command line --------------------------------------------------------------------------


def command_line() -> str:
    """Return every command with its arguments and options."""
    try:
        module = importlib.import_module("durometer.cli")
    except ModuleNotFoundError as error:
        if error.name != "durometer.cli":
            raise
        return "This version has no command line."
    import typer

    group = typer.main.get_command(module.app)
    return "\n\n".join(_commands(group, "durometer"))


def _commands(command: Any, path: str) -> Iterable[str]:
    children = getattr(command, "commands", {})
    shown = [p for p in command.params if p.name != "help"]
    parts = [f"## `{path}` {{ #{path.replace(' ', '-')} }}", text(_plain(command.help or ""))]
    words = [_metavar(p) for p in shown if p.param_type_name == "argument"]
    parts.append(
        f"```text\n{' '.join([path, '[OPTIONS]', *words, *(['COMMAND'] * bool(children))])}\n```"
    )
    if shown:
        parts.append(table(("argument or option", "meaning", "default"), map(_parameter, shown)))
    yield "\n\n".join(parts)
    for name, child in children.items():
        yield from _commands(child, f"{path} {name}")


def _parameter(parameter: Any) -> tuple[str, str, str]:
    value = parameter.default
    default = "" if value in (None, False, "", ()) or callable(value) else value
    name = _metavar(parameter)
    if parameter.param_type_name == "option":
        flag = getattr(parameter, "is_flag", False)
        name = parameter.opts[0] if flag else f"{parameter.opts[0]} {name}"
    return f"`{name}`", text(_plain(parameter.help or "")), code(default)


def _metavar(parameter: Any) -> str:
    """Return the word that stands for a value: the metavar, the choices, or the name."""
    if parameter.metavar:
        word = str(parameter.metavar)
        return "KIND" if "|" in word else word.strip("[]") if word[0] == "[" else word
    annotation = getattr(getattr(parameter, "type_descriptor", None), "annotation", None)
    choices = get_args(annotation) if get_origin(annotation) is Literal else ()
    return ",".join(choices) or str(parameter.name).upper()


def _plain(help_text: str) -> str:
    """Return help without rich's markup."""
    from rich.text import Text

    return Text.from_markup(help_text).plain


# ---- modules and objects -------------------------------------------------------------------


def modules() -> str:
    """Return the rooms of the package, upper layers first, one line a module."""
    sections = [_room("", "The front rooms", SOURCE)]
    sections += [_room(room, f"`{room}`", SOURCE / room) for room in ROOMS]
    return "\n\n".join(sections)


def _room(room: str, title: str, folder: Path) -> str:
    files = [path for path in sorted(folder.glob("*.py")) if path.name != "__init__.py"]
    rows = [(f"`{f'{room}/' * bool(room)}{path.name}`", text(_first_line(path))) for path in files]
    return f"### {title}\n\n{table(('module', 'what it holds'), rows)}"


def _first_line(path: Path) -> str:
    doc = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    return doc.partition("\n")[0].removesuffix(".")


def documented(name: str) -> str:
    """Return the signature and the docstring of a public object, ``package.module.Name``."""
    module, _, attribute = name.rpartition(".")
    target = getattr(importlib.import_module(module), attribute)
    head = attribute
    if inspect.isfunction(target):
        head += _signature(target)
    parts = [f"```python\n{head}\n```", _docstring(inspect.getdoc(target) or "")]
    return "\n\n".join(parts)


def _signature(target: Any) -> str:
    """Return the signature, one argument a line where it is long."""
    signature = inspect.signature(target)
    shown = str(signature).replace("durometer.core.", "").replace("pathlib.", "")
    shown = re.sub(r"durometer\.\w+\.\w+\.", "", shown)
    if len(shown) < 70:
        return shown
    inside, _, returns = shown.rpartition(")")
    arguments = re.split(r", (?=\w+:|\*,)", inside.removeprefix("("))
    return "(\n" + "".join(f"    {argument},\n" for argument in arguments) + f"){returns}"


def _docstring(doc: str) -> str:
    """Return a docstring in Google style as Markdown."""
    lines = []
    for block in re.split(r"\n(?=(?:Args|Attributes|Returns|Raises):\n)", doc):
        head, _, body = block.partition("\n")
        if head in ("Args:", "Attributes:", "Returns:", "Raises:"):
            entries = re.split(r"\n(?!\s)", inspect.cleandoc(body))
            lines.append(f"**{head.removesuffix(':')}**\n\n" + "\n".join(map(_entry, entries)))
        else:
            lines += [text(part) for part in block.strip().split("\n\n")]
    return "\n\n".join(lines)


def _entry(entry: str) -> str:
    names, colon, meaning = entry.partition(": ")
    if not colon or len(names) > 60:
        return f"- {text(entry)}"
    return f"- `{names}`: {text(meaning)}"


# ---- result files --------------------------------------------------------------------------

BENCHMARKS = ("training", "generation", "likelihood", "gcg", "restore", "demo")
LABELS = {
    "what": "what is run",
    "baseline": "compared with",
    "ratio": "times as fast (median of paired ratios)",
    "ratio_low": "lowest ratio",
    "ratio_high": "highest ratio",
    "ours_seconds": "durometer, s (median)",
    "baseline_seconds": "baseline, s (median)",
    "rounds": "paired rounds",
}
UNITS = {"seconds": "s", "mib": "MiB", "gib": "GiB"}


def benchmark(name: str) -> str:
    """Return the result file of one benchmark as tables, or say that there is none."""
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        return f"Not measured yet: `benchmarks/results/{name}.json` does not exist."
    result = json.loads(path.read_text("utf-8"))
    parts = [_facts(result)]
    parts += [_cases(value) for value in result.values() if _is_rows(value)]
    parts.append(_machine(result.get("machine") or {}))
    return "\n\n".join(part for part in parts if part)


def other_benchmarks() -> str:
    """Return the result files of benchmarks that no page names."""
    extra = [
        path.stem
        for path in sorted(RESULTS.glob("*.json"))
        if path.stem not in BENCHMARKS and "what" in json.loads(path.read_text("utf-8"))
    ]
    sections = [
        f"## {text(name.replace('_', ' ').capitalize())}\n\n{benchmark(name)}" for name in extra
    ]
    return "\n\n".join(sections)


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _facts(result: dict[str, Any]) -> str:
    rows = [(_label(k), _number(v)) for k, v in result.items() if not isinstance(v, dict | list)]
    return table(("", ""), rows) if rows else ""


def _cases(rows: list[dict[str, Any]]) -> str:
    names = [k for k in rows[0] if not isinstance(rows[0][k], dict | list)]
    cells = [[_number(row.get(name)) for name in names] for row in rows]
    return table([_label(name) for name in names], cells)


def _label(name: str) -> str:
    if name in LABELS:
        return LABELS[name]
    *words, last = name.split("_")
    if last not in UNITS:
        return text(name.replace("_", " "))
    return text(f"{' '.join(words)}, {UNITS[last]}" if words else f"{last} ({UNITS[last]})")


def _number(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return NOTHING if value is None else text(value)


def _machine(machine: dict[str, Any]) -> str:
    if not machine:
        return ""
    versions = ", ".join(f"{k} {v}" for k, v in (machine.get("versions") or {}).items())
    facts = [
        f"{machine.get('cpu', 'unknown CPU')}, {machine.get('cores')} cores",
        f"{machine.get('threads')} threads",
        f"{machine.get('memory_gib')} GiB memory",
        f"GPU {machine.get('gpu') or 'none'}",
        f"Python {machine.get('python')}",
        versions,
    ]
    return f"Measured on: {text('; '.join(facts))}."


def changelog() -> str:
    """Return the changelog without its title."""
    return (ROOT / "CHANGELOG.md").read_text("utf-8").partition("\n")[2].strip()


GENERATORS: dict[str, Callable[..., str]] = {
    "attack-surface": studies.attack_surface,
    "standard": studies.standard,
    "transfer": studies.transfer,
    "benchmark": benchmark,
    "changelog": changelog,
    "command-line": command_line,
    "domains": domains,
    "drift-settings": drift_settings,
    "hardened": studies.hardened,
    "measures": measures,
    "modules": modules,
    "not-tested": not_tested,
    "object": documented,
    "other-benchmarks": other_benchmarks,
    "override": studies.override,
    "safeguards": safeguards,
    "scanners": studies.scanners,
    "subjects": subjects,
    "suites": suites,
    "tampers": tampers,
    "tar": studies.tar,
}
