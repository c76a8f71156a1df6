"""What was printed, and how a table is to be read: from a TOML file, options, or both."""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from durometer.core.errors import InputError, unknown_name
from durometer.formats.safetensors import open_regular, shown
from durometer.headlines.printed import Printed, parse_printed
from durometer.headlines.table import Scope, Table

__all__ = [
    "KINDS",
    "PAIRED_KINDS",
    "Columns",
    "Headline",
    "HeadlineEntry",
    "Kind",
    "Settings",
    "read_settings",
    "with_scorers",
]

Kind = Literal["rate", "difference", "change", "deviation"]
KINDS: dict[Kind, str] = {
    "rate": "rate of an arm",
    "difference": "difference of two rates, after minus before, in points",
    "change": "change relative to the rate before",
    "deviation": "standard deviation of an arm's outcomes (0 or 1)",
}
PAIRED_KINDS = ("difference", "change")
MAX_BYTES = 1 << 20
Name = Annotated[str, Field(max_length=200)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Columns(_Strict):
    """Names of the columns, by what they hold."""

    item: Name = "item"
    arm: Name = "arm"
    category: Name = "category"
    scorer: Name = "scorer"
    entity: Name = "entity"
    outcome: Name | list[Name] = "outcome"
    count: Name = "count"
    successes: Name = "successes"
    n: Name = "n"
    unparsed: Name = "unparsed"


class Pair(_Strict):
    """Items that succeed only after, and only before, where a table of counts cannot tell."""

    before: Name
    after: Name
    category: Name = ""
    gained: int = Field(ge=0)
    lost: int = Field(ge=0)


class HeadlineEntry(_Strict):
    """A printed figure and what it is said to be."""

    printed: Name
    kind: Kind = "rate"
    arm: Name = ""
    before: Name = ""
    after: Name = ""
    category: Name = ""
    note: str = Field(default="", max_length=1000)


class Settings(_Strict):
    """Everything beside the table."""

    title: str = Field(default="", max_length=300)
    source: str = Field(default="", max_length=1000)
    success: list[Name] = []
    unparsed: list[Name] = []
    columns: Columns = Columns()
    scorers: dict[str, Name] = {}
    pair: list[Pair] = []
    headline: list[HeadlineEntry] = []

    def changed(self, **values: Any) -> "Settings":
        """Return these settings with other values.

        Raises:
            InputError: a value is of a wrong kind.
        """
        try:
            return Settings(**{**self.model_dump(), **values})
        except ValidationError as error:
            raise InputError(_first_fault(error)) from error


@dataclass(frozen=True)
class Headline:
    """A printed figure whose names are known to the table.

    Attributes:
        arms: the arm of a rate or deviation; before and after of a difference or change.
    """

    entry: HeadlineEntry
    printed: Printed
    arms: tuple[str, ...]
    scope: Scope

    @property
    def kind(self) -> Kind:
        """What the figure is said to be."""
        return self.entry.kind

    @classmethod
    def of(cls, entry: HeadlineEntry, table: Table) -> "Headline":
        """Return the headline of an entry.

        Raises:
            InputError: the figure cannot be read, or the table has no such arm or category.
        """
        names = _arm_names(entry)
        for name in names:
            if name not in table.arms:
                raise unknown_name("arm", name, table.arms)
        return cls(entry, parse_printed(entry.printed), names, table.scope(entry.category))


def _arm_names(entry: HeadlineEntry) -> tuple[str, ...]:
    two = entry.kind in PAIRED_KINDS
    given = {name: getattr(entry, name) for name in ("arm", "before", "after")}
    wanted = ("before", "after") if two else ("arm",)
    if {name for name, value in given.items() if value} != set(wanted):
        what = " and ".join(wanted)
        raise InputError(f"headline '{shown(entry.printed, 40)}': a {entry.kind} needs {what}")
    if two and entry.before == entry.after:
        raise InputError(f"headline '{shown(entry.printed, 40)}': before and after are one arm")
    return tuple(given[name] for name in wanted)


def read_settings(path: Path) -> Settings:
    """Return the settings of a TOML file.

    Raises:
        InputError: it cannot be read, or holds an unknown key or a value of a wrong kind.
    """
    with open_regular(path) as stream:
        raw = stream.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        raise InputError(f"{shown(path)}: larger than 1 MiB; this is no file of headlines")
    try:
        return Settings(**tomllib.loads(raw.decode("utf-8")))
    except ValidationError as error:
        raise InputError(f"{shown(path)}: {_first_fault(error)}") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise InputError(f"{shown(path)}: not a TOML file in UTF-8: {shown(error)}") from error


def _first_fault(error: ValidationError) -> str:
    """Return the first fault in one line: where, and what is wrong."""
    fault = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(part + 1 if isinstance(part, int) else part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        return f"unknown key '{shown(place)}'"
    if fault["loc"][-1:] == ("printed",) and fault["type"] == "string_type":
        return f"{place}: write it in quotes, so that the digits that were printed are known"
    return f"{shown(place)}: {fault['msg'][:1].lower()}{fault['msg'][1:]}"


def with_scorers(settings: Settings, scorers: Sequence[str]) -> dict[str, str]:
    """Return the scorers of ``CATEGORY=NAME`` options over those of a file.

    Raises:
        InputError: an option has another form.
    """
    found = dict(settings.scorers)
    for text in scorers:
        category, equals, name = text.partition("=")
        if not (category and equals and name):
            raise InputError(f"--scorer '{shown(text, 60)}': write CATEGORY=NAME")
        found[category] = name
    return found
