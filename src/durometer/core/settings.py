"""One definition of a setting: meaning, default, bounds and search range in one place.

A method's settings are a frozen, validated class. The command line, TOML files, the search space
and the docs page are derived from it.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from durometer.core.errors import InputError, unknown_name


@dataclass(frozen=True)
class Between:
    """A continuous or integer search range; ``log`` says that it is searched on a log scale."""

    low: float
    high: float
    log: bool = False

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}{' (log)' if self.log else ''}"


@dataclass(frozen=True)
class Levels:
    """A search range of named levels."""

    values: tuple[Any, ...]

    def __str__(self) -> str:
        return ", ".join(str(value) for value in self.values)


def setting(
    default: Any, meaning: str, *, search: Between | Levels | None = None, **bounds: Any
) -> Any:
    """Return a pydantic field with its meaning and search range.

    ``bounds`` are pydantic's own (``ge``, ``le``, ``gt``, ``lt``, ``min_length`` ...).
    """
    extra: dict[str, Any] | None = {"search": str(search)} if search is not None else None
    return Field(default, description=meaning, json_schema_extra=extra, **bounds)


@dataclass(frozen=True)
class SettingDescription:
    """What the docs and ``durometer list`` show of one setting."""

    name: str
    type: str
    default: str
    meaning: str
    search: str


class Settings(BaseModel):
    """Base of every settings class: frozen, unknown fields refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def parse(cls, owner: str, values: Mapping[str, Any]) -> Self:
        """Return validated settings; ``owner`` names the method in error messages.

        Raises:
            InputError: an unknown name (the nearest is suggested) or a value out of bounds.
        """
        for name in values:
            if name not in cls.model_fields:
                error = unknown_name("setting", name, cls.model_fields)
                raise InputError(f"{owner}: {error}")
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"]) or "settings"
            raise InputError(
                f"{owner}: {place} = {first['input']!r}: {first['msg'].lower()}"
            ) from error

    @classmethod
    def describe(cls) -> list[SettingDescription]:
        """Return one description a field, in the order of definition."""
        return [_describe(name, field) for name, field in cls.model_fields.items()]

    def canonical(self) -> dict[str, Any]:
        """Return the values as plain JSON types, with every default written out."""
        return self.model_dump(mode="json")

    @property
    def digest(self) -> str:
        """First 12 hex digits of the SHA-256 of the canonical values (seeds are no settings)."""
        return digest_of(self.canonical())[:12]


def parse_pairs(owner: str, text: str) -> dict[str, str]:
    """Return ``key=value,key=value`` as a command line has it, neither validated nor converted.

    A comma divides settings only where a name and '=' follow: values may hold commas, too.

    Args:
        owner: whose settings they are, as in "tamper 'lora'".

    Raises:
        InputError: a name without a value.
    """
    parts = re.split(r",(?=\s*\w+\s*=)", text)
    pairs = [part.partition("=") for part in parts if part.strip()]
    for name, sign, _ in pairs:
        if not sign:
            raise InputError(f"{owner}: '{name}' needs a value, as in {name}=...")
    return {name.strip(): value.strip() for name, _, value in pairs}


def digest_of(value: Any) -> str:
    """Return the SHA-256 hex digest of a JSON-serialisable value, independent of key order."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _describe(name: str, field: FieldInfo) -> SettingDescription:
    extra = field.json_schema_extra
    search = str(extra.get("search", "")) if isinstance(extra, dict) else ""
    annotation = field.annotation
    literal = getattr(annotation, "__args__", None)
    kind = getattr(annotation, "__name__", str(annotation))
    if kind == "Literal" and literal:
        kind = " | ".join(str(value) for value in literal)
    elif literal:
        kind = str(annotation).replace("typing.", "")
    default = "required" if field.is_required() else field.get_default(call_default_factory=True)
    return SettingDescription(name, kind, str(default), field.description or "", search)
