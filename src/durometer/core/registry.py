"""Registries: a decorator is all that it takes to add a method."""

from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from durometer.core.errors import InputError, unknown_name

T = TypeVar("T")


class Registry(Generic[T]):
    """A named set of methods of one kind, open to other packages through entry points.

    Args:
        kind: what is registered, for messages ("tamper", "domain", ...).
        group: entry-point group from which other packages' methods are loaded on first use.
    """

    def __init__(self, kind: str, group: str) -> None:
        self.kind = kind
        self._group = group
        self._entries: dict[str, T] = {}
        self._aliases: dict[str, str] = {}
        self._loaded = False

    def register(self, name: str, *, aliases: tuple[str, ...] = ()) -> Callable[[T], T]:
        """Return a decorator that registers its argument under ``name``.

        Raises:
            InputError: the name or an alias is taken, so that no method shadows another.
        """

        def decorate(entry: T) -> T:
            for taken in (name, *aliases):
                if taken in self._entries or taken in self._aliases:
                    raise InputError(f"{self.kind} '{taken}' is registered twice")
            self._entries[name] = entry
            self._aliases.update(dict.fromkeys(aliases, name))
            return entry

        return decorate

    def get(self, name: str) -> T:
        """Return the entry called ``name`` or by one of its aliases.

        Raises:
            InputError: there is none; the nearest name is suggested.
        """
        self._load_entry_points()
        canonical = self.canonical_name(name)
        return self._entries[canonical]

    def canonical_name(self, name: str) -> str:
        """Return the name under which ``name`` (or the alias) is registered."""
        self._load_entry_points()
        canonical = self._aliases.get(name, name)
        if canonical not in self._entries:
            raise unknown_name(self.kind, name, [*self._entries, *self._aliases])
        return canonical

    def names(self) -> list[str]:
        """Return the canonical names in the order of registration."""
        self._load_entry_points()
        return list(self._entries)

    def __iter__(self) -> Iterator[tuple[str, T]]:
        self._load_entry_points()
        return iter(self._entries.items())

    def _load_entry_points(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        for point in entry_points(group=self._group):
            entry = point.load()  # which may already register it, through its decorator
            name = self._aliases.get(point.name, point.name)
            if self._entries.get(name) is not entry:
                self.register(point.name)(entry)
