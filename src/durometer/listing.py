"""Tables of what there is: methods, settings, cached folders, the splits of a domain."""

from collections.abc import Callable, Iterable, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

import durometer.catalogue  # noqa: F401  (fills the registries)
from durometer.core.cache import CacheEntry
from durometer.core.errors import InputError, unknown_name
from durometer.core.settings import Settings
from durometer.domains.base import Domain, Role, Split, domain_registry, require_sound
from durometer.domains.benchmarks.table import BENCHMARKS
from durometer.domains.load import read_domain
from durometer.domains.overlap import COLUMNS, overlap_report, render_rows
from durometer.judges.base import judge_registry
from durometer.measures.base import family_registry, measure_registry
from durometer.safeguards.base import safeguard_registry
from durometer.subjects.builtin import subject_registry
from durometer.tampers.base import tamper_registry
from durometer.trials.campaign import Request
from durometer.trials.estimate import Estimate
from durometer.trials.suites import SUITES, TINY, describe_suite, make_suite

Rows = Sequence[tuple[str, ...]]
Listing = tuple[tuple[str, ...], Rows]


def listed(kind: str = "", name: str = "") -> RenderableType:
    """Return a table of one kind of thing, of all kinds, or of one thing by name.

    Raises:
        InputError: no such kind or name.
    """
    if not kind:
        parts: list[RenderableType] = []
        for each in KINDS:
            parts += [Text(each, style="bold"), listed(each), Text("")]
        return Group(*parts[:-1])
    if kind not in KINDS:
        raise unknown_name("kind", kind, KINDS)
    if kind == "tampers" and name:
        return tamper_settings(name)
    if kind == "safeguards" and name:
        return safeguard_settings(name)
    if kind == "judges" and name:
        return judge_settings(name)
    header, rows = KINDS[kind]()
    if name:
        rows = [row for row in rows if row[0] == name]
        if not rows:
            raise unknown_name(kind.removesuffix("s"), name, [row[0] for row in KINDS[kind]()[1]])
    return table(header, rows)


def _subjects() -> Listing:
    rows = [(name, entry.domain or "-", entry.description) for name, entry in subject_registry]
    return ("name", "safeguarded on", "what it is"), rows


def _domains() -> Listing:
    built_in = [(name, entry.description) for name, entry in domain_registry]
    own_copies = [
        (name, f"{one.title}; your own copy, {name}:SOURCE (licence: {one.licence})")
        for name, one in BENCHMARKS.items()
    ]
    return ("name", "what it is"), [*built_in, *own_copies]


def _tampers() -> Listing:
    rows = [
        (name, f"{entry.access_level} {entry.access}", entry.cost, entry.summary, entry.source)
        for name, entry in tamper_registry
    ]
    return ("name", "access", "cost", "what it does", "source"), rows


def _safeguards() -> Listing:
    rows = [
        (name, entry.access, ", ".join(entry.kinds), entry.cost, entry.summary, entry.source)
        for name, entry in safeguard_registry
    ]
    return ("name", "protects", "kinds of domain", "cost", "what it does", "source"), rows


def _measures() -> Listing:
    rows = [(name, ", ".join(entry.kinds), entry.summary) for name, entry in measure_registry]
    rows += [(entry.usage, "any", entry.summary) for _, entry in family_registry]
    return ("name", "kinds of domain", "what it reads"), rows


def _judges() -> Listing:
    rows = []
    for name, entry in judge_registry:
        one = entry.describe(entry.settings_class())
        rows.append((name, ", ".join(one.judges), one.pinned or "-", one.summary, one.source))
    return ("name", "says", "pinned", "what it is", "source"), rows


def _suites() -> Listing:
    rows = [(name, describe_suite(make_suite(name, TINY))) for name in SUITES]
    return ("name", "what it runs (fewer but larger steps than on 'micro')"), rows


KINDS: dict[str, Callable[[], Listing]] = {
    "subjects": _subjects,
    "domains": _domains,
    "tampers": _tampers,
    "safeguards": _safeguards,
    "measures": _measures,
    "judges": _judges,
    "suites": _suites,
}


def tamper_settings(name: str) -> RenderableType:
    """Return what a tamper is and a table of its settings, from the settings class.

    Raises:
        InputError: no such tamper.
    """
    entry = tamper_registry.get(name)
    return Group(
        Text(f"{entry.name}: {entry.summary}", style="bold"),
        Text(f"access {entry.access_level} ({entry.access}); cost {entry.cost}; {entry.source}"),
        Text(f"cannot show {entry.cannot_show}"),
        Text(""),
        settings_table(entry.settings_class),
    )


def safeguard_settings(name: str) -> RenderableType:
    """Return what a safeguard is, its presets and a table of its settings.

    Raises:
        InputError: no such safeguard.
    """
    entry = safeguard_registry.get(name)
    presets = [
        Text(f"preset {preset}: {', '.join(f'{k}={v}' for k, v in values.items()) or 'defaults'}")
        for preset, values in entry.presets.items()
    ]
    return Group(
        Text(f"{entry.name}: {entry.summary}", style="bold"),
        Text(f"protects {entry.access}; cost {entry.cost}; {entry.source}"),
        Text(f"cannot show {entry.cannot_show}"),
        *presets,
        Text(""),
        settings_table(entry.settings_class),
    )


def judge_settings(name: str) -> RenderableType:
    """Return what a judge is, what it cannot judge, and a table of its settings.

    Raises:
        InputError: no such judge.
    """
    entry = judge_registry.get(name)
    one = entry.describe(entry.settings_class())
    base = f"adapter of {one.base}@{one.base_revision}; " if one.base else ""
    return Group(
        Text(f"{one.name}: {one.summary}", style="bold"),
        Text(f"says {', '.join(one.judges)}; {one.source}"),
        Text(f"pinned {one.pinned or '-'}; {base}licence: {one.licence}"),
        Text(f"prompt {one.template_hash}"),
        Text(f"cannot judge {one.cannot_judge}"),
        Text(""),
        settings_table(entry.settings_class),
    )


def settings_table(settings: type[Settings]) -> RenderableType:
    """Return one row a setting: meaning, default and search range."""
    rows = [(s.name, s.default, s.meaning, s.search or "-") for s in settings.describe()]
    if not rows:
        return Text("no settings")
    return table(("setting", "default", "meaning", "search range"), rows)


def cached(entries: Iterable[CacheEntry]) -> RenderableType:
    """Return one row a cached folder."""
    return table(("cached", "size"), [(entry.name, size(entry.size)) for entry in entries])


def checked_domain(spec: str) -> tuple[RenderableType, list[str], list[str]]:
    """Return tables about a domain, what makes it unusable, and what else to look at.

    Raises:
        InputError: the domain cannot be read at all.
    """
    domain = read_domain(spec)
    report = overlap_report(domain)
    problems = list(report.problems)
    try:
        require_sound(domain)
    except InputError as error:
        problems.insert(0, str(error))
    title = f"{domain.name} ({domain.kind}), {len(domain.items)} items"
    tables = Group(
        Text(f"{title}: {domain.description}" if domain.description else title, style="bold"),
        *_provenance(domain),
        Text(""),
        _counts(domain),
        Text(""),
        Text(f"what splits have in common (n-grams of {report.n} words)"),
        table(COLUMNS, render_rows(report), wrap_first=True),
    )
    warnings = list(report.warnings)
    if domain.needs_judge:
        warnings.append(
            "prompts without accepted answers: a run needs a judge to read responses (--judge)"
        )
    return tables, problems, warnings


def _provenance(domain: Domain) -> list[RenderableType]:
    """Return what was read of others' sets, and whether reports show texts; nothing if built in."""
    if not domain.origins:
        return []
    rows = [
        (
            origin.name,
            f"{origin.rows:,}",
            origin.split or "-",
            origin.revision[:12] or "-",
            origin.sha256[:16],
            origin.licence,
        )
        for origin in domain.origins
    ]
    texts = "shown" if domain.harmless else "hidden unless asked for"
    return [
        Text(""),
        table(("read", "rows", "split", "revision", "SHA-256", "licence"), rows),
        *(Text(f"note: {note}") for note in domain.notes),
        Text(f"texts in reports: {texts}"),
    ]


def _counts(domain: Domain) -> RenderableType:
    counts = domain.counts()
    splits = [split for split in Split if any(key.endswith(split) for key in counts)]
    names = [*(str(role) for role in Role), "entities"]
    rows = [
        (
            "restricted entities" if name == "entities" else name,
            *(str(counts.get(f"{name}_{split}", 0)) for split in splits),
        )
        for name in names
    ]
    return table(("items", *(str(split) for split in splits)), rows)


def estimated(request: Request, found: Estimate) -> RenderableType:
    """Return the lines of ``--dry-run``."""
    grid = Table.grid(padding=(0, 2))
    low, high = duration(found.seconds_unbroken), duration(found.seconds)
    time = f"at most {high} on this machine"
    if low != high:
        time += f", about {low} if no attack comes near a break; less where one stops at a break"
    rows = [
        ("trials", f"{found.trials}, of at most {found.updates:,} updates in all"),
        ("time", time),
        ("memory", f"at most about {size(found.memory)} ({size(found.memory_free)} free)"),
        ("disk", f"at most about {size(found.disk)} ({size(found.disk_free)} free)"),
    ]
    rows += [(name, f"not timed: {reason}") for name, reason in found.not_measured.items()]
    for row in rows:
        grid.add_row(*row)
    title = f"{request.subject} on {request.domain}, suite {request.suite}: nothing was written"
    return Group(Text(title, style="bold"), grid)


def table(header: tuple[str, ...], rows: Rows, *, wrap_first: bool = False) -> Table:
    """Return a plain table, one line a row where there is room."""
    made = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for number, name in enumerate(header):
        words = name.split() if number else " ".join(row[0] for row in rows).split()
        whole = number == 0 and not wrap_first
        made.add_column(name, min_width=max(map(len, words), default=0), no_wrap=whole)
    for row in rows:
        made.add_row(*(Text(cell) for cell in row))
    return made


def size(count: float) -> str:
    """Return bytes as people read them (powers of ten)."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def duration(seconds: float) -> str:
    """Return a time as people say it."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
