"""From the command line and a TOML file to a request, and back to a command line."""

import re
import shlex
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from durometer.core.errors import InputError, unknown_name
from durometer.domains.benchmarks.spec import short_name
from durometer.subjects.builtin import subject_registry
from durometer.subjects.record import read_record
from durometer.trials.campaign import Request

RUNS = Path("durometer-runs")
# Which tables a command takes, by the option that they stand for.
TABLES = {"tamper": "attack", "safeguard": "stage"}
# Options that may be given several times.
REPEATED = (*TABLES, "measure", "judge")


def read_config(file: Path, known: Mapping[str, bool]) -> dict[str, Any]:
    """Return the options set in a TOML file, as if they had been typed.

    Keys are the options' names (``budget_steps`` or ``budget-steps``); every ``[[attack]]`` table
    names a ``tamper`` and its settings, every ``[[stage]]`` table a ``safeguard`` and its own.

    Args:
        file: the TOML file.
        known: names of the options, and whether each is a flag.

    Raises:
        InputError: the file cannot be read, or holds an unknown key or a value of a wrong kind.
    """
    try:
        values = tomllib.loads(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{file}: cannot be read: {reason}") from error
    values = {name.replace("-", "_"): value for name, value in values.items()}
    option = "safeguard" if "safeguard" in known else "tamper"
    heads = TABLES[option]
    methods = [_method(file, option, t) for t in _tables(file, heads, values.pop(heads, []))]
    for name in values:
        if name not in known:
            raise InputError(f"{file}: {unknown_name('key', name, [*known, heads])}")
    options = {name: _typed(file, name, value, known[name]) for name, value in values.items()}
    if methods:
        options[option] = [*options.get(option, []), *methods]
    return options


def _tables(file: Path, heads: str, tables: Any) -> list[dict[str, Any]]:
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise InputError(f"{file}: '{heads}' must be tables, each headed [[{heads}]]")
    return tables


def _method(file: Path, option: str, table: Mapping[str, Any]) -> str:
    """Return one table as ``--tamper`` or ``--safeguard`` takes it, names and values checked."""
    from durometer import catalogue  # noqa: F401  (fills the registries that names are looked up in)
    from durometer.safeguards.base import make_safeguard
    from durometer.tampers.base import make_tamper

    if not isinstance(table.get(option), str):
        raise InputError(f'{file}: every [[{TABLES[option]}]] needs {option} = "NAME"')
    settings = {name: value for name, value in table.items() if name != option}
    make: Callable[..., object] = make_safeguard if option == "safeguard" else make_tamper
    try:
        make(table[option], **settings)
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
    pairs = [f"{name}={_plain(value)}" for name, value in settings.items()]
    return f"{table[option]}:{','.join(pairs)}" if pairs else str(table[option])


def _typed(file: Path, name: str, value: Any, flag: bool) -> Any:
    """Return a value in the form in which it would be typed; flags stay true or false."""
    if name in REPEATED:
        texts = value if isinstance(value, list) else [value]
        usable = all(isinstance(text, str) for text in texts)
    else:
        usable = not isinstance(value, dict | list) and isinstance(value, bool) == flag
    if not usable:
        raise InputError(f"{file}: {name} = {value!r}: not a value that this option can have")
    if name in REPEATED:
        return texts
    return value if flag else str(value)


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def domain_for(subject: str, domain: str | None) -> str:
    """Return the domain to test: the one named, else the one that a built-in subject is for.

    Raises:
        InputError: neither is known.
    """
    if domain:
        return domain
    names = subject_registry.names()
    if subject not in names and not set("/\\+.") & set(subject) and not Path(subject).exists():
        raise unknown_name("subject", subject, names)
    own = subject_registry.get(subject).domain if subject in names else _recorded(subject)
    if not own:
        raise InputError(f"subject '{subject}': say what it is safeguarded on, with --domain")
    return own


def _recorded(subject: str) -> str:
    """Return the domain that a hardened model's folder says it is safeguarded on, else ''."""
    domain = read_record(Path(subject)).get("domain", {}) if Path(subject).is_dir() else {}
    return str(domain.get("spec", ""))


def free_folder(*parts: str) -> Path:
    """Return the first ``durometer-runs/<parts>-<n>`` that does not exist."""
    stem = "-".join(slug(short_name(part)) for part in parts)
    number = 1
    while (RUNS / f"{stem}-{number}").exists():
        number += 1
    return RUNS / f"{stem}-{number}"


def slug(name: str) -> str:
    """Return a name fit for a folder: the last part of a path or hub id."""
    last = name.rstrip("/\\").replace("\\", "/").rpartition("/")[2]
    return re.sub(r"[^\w.+@-]+", "-", last).strip("-.") or "run"


def resume_command(request: Request, folder: Path) -> str:
    """Return the shell command that goes on with a request where it was left."""
    options: list[tuple[str, object]] = [
        ("--domain", request.domain),
        ("--suite", request.suite),
        ("--undefended", request.undefended),
        ("--reference", request.reference),
        *(("--tamper", tamper) for tamper in request.tampers),
        *(("--measure", measure) for measure in request.measures),
        *(("--judge", judge) for judge in request.judges),
        ("--judge-rule", request.judge_rule if request.judge_rule != "first" else ""),
        ("--languages", ",".join(request.languages)),
        ("--framings", ",".join(request.framings)),
        ("--seeds", request.seeds),
        ("--budget-steps", request.budget_steps),
        ("--dtype", request.dtype),
        ("--device", request.device),
    ]
    words = ["durometer", "stress", request.subject]
    for name, value in options:
        if value not in ("", None, "auto"):
            words += [name, str(value)]
    return shlex.join([*words, "--out", str(folder), "--resume"])


def names_in(text: str) -> tuple[str, ...]:
    """Return the names in a list with commas, as ``--languages`` takes it."""
    return tuple(name.strip() for name in text.split(",") if name.strip())
