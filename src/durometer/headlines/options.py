"""Headlines and columns as they are typed: ``ARM[:CATEGORY]=FIGURE``, ``ROLE=NAME``."""

from collections.abc import Iterable, Sequence
from typing import Any

from durometer.core.errors import InputError, unknown_name
from durometer.formats.safetensors import shown
from durometer.headlines.settings import PAIRED_KINDS, Columns, HeadlineEntry, Kind
from durometer.headlines.table import Table

__all__ = ["typed_columns", "typed_headlines"]


def typed_columns(columns: Columns, texts: Sequence[str]) -> dict[str, Any]:
    """Return columns with those of ``ROLE=NAME`` options; ``outcome`` may be named several times.

    Raises:
        InputError: an option has another form, or an unknown role.
    """
    held, outcomes = columns.model_dump(), list[str]()
    for text in texts:
        role, _, name = text.partition("=")
        if not name:
            raise InputError(
                f"--column '{shown(text, 60)}': write ROLE=NAME, as in outcome=verdict"
            )
        if role not in held:
            raise unknown_name("column role", role, held)
        if role == "outcome":
            outcomes.append(name)
        else:
            held[role] = name
    return held | ({"outcome": outcomes} if outcomes else {})


def typed_headlines(kind: Kind, texts: Iterable[str], table: Table) -> list[HeadlineEntry]:
    """Return the headlines of one option.

    Args:
        kind: what the option says the figures are.
        texts: ``ARM[:CATEGORY]=FIGURE``, or ``BEFORE,AFTER[:CATEGORY]=FIGURE`` for two arms. The
            arm may be left out where the table has one.
        table: whose arms may be named.

    Raises:
        InputError: an option has another form.
    """
    return [_typed(kind, text, table) for text in texts]


def _typed(kind: Kind, text: str, table: Table) -> HeadlineEntry:
    names, equals, printed = text.rpartition("=")
    two = kind in PAIRED_KINDS
    if not two and not equals and len(table.arms) == 1:
        names = table.arms[0]
    elif not (names and printed):
        form = "BEFORE,AFTER" if two else "ARM"
        arms = ", ".join(shown(arm, 40) for arm in table.arms)
        raise InputError(
            f"--{kind} '{shown(text, 60)}': write {form}[:CATEGORY]=FIGURE; the arms are {arms}"
        )
    arms, category = _without_category(names, two=two, table=table)
    if not two:
        return HeadlineEntry(printed=printed, kind=kind, arm=arms, category=category)
    before, comma, after = arms.partition(",")
    if not comma:
        raise InputError(f"--{kind} '{shown(text, 60)}': write BEFORE,AFTER[:CATEGORY]=FIGURE")
    return HeadlineEntry(
        printed=printed,
        kind=kind,
        before=before.strip(),
        after=after.strip(),
        category=category,
    )


def _without_category(names: str, *, two: bool, table: Table) -> tuple[str, str]:
    """Split off the category; an arm may have a colon in its name."""
    last = names.partition(",")[2].strip() if two else names
    if ":" not in names or last in table.arms:
        return names, ""
    arms, _, category = names.rpartition(":")
    return arms, category
