"""One row of a benchmark in common form, and the checked access to the fields it comes from."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from durometer.core.errors import InputError
from durometer.formats.safetensors import shown

__all__ = ["LETTERS", "Question", "Row"]

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Question:
    """What one row of a benchmark asks.

    Attributes:
        text: what is asked.
        answers: accepted answers, the preferred one first; none where only a judge can tell.
        options: texts to choose from, in the published order.
        right: index of the right option, -1 without options.
        suite: the benchmark's own group: subject, category, type.
        about: what the row is about, where that is more than its text; rows that share it are
            never dealt to different splits.
        solution: worked solution to train on; '' where there is none.
        safe: whether it is a harmless prompt that must be answered.
    """

    text: str
    answers: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    right: int = -1
    suite: str = ""
    about: str = ""
    solution: str = ""
    safe: bool = False


@dataclass(frozen=True)
class Row:
    """One row of a file; its texts are never quoted in errors, since they may be hazardous.

    Attributes:
        path: the file it is in.
        number: its place there, from 1.
        values: fields by column name.
    """

    path: Path
    number: int
    values: Mapping[str, Any]

    def text(self, name: str) -> str:
        """Return a text that must be there.

        Raises:
            InputError: it is missing, empty or no text.
        """
        value = self.optional(name)
        if not value:
            raise self.refused(f"'{name}' is missing or empty")
        return value

    def optional(self, name: str) -> str:
        """Return a text, '' where the column is empty or not there."""
        value = self.values.get(name)
        if value is None:
            return ""
        if not isinstance(value, str):
            raise self.refused(f"'{name}' is not a text")
        return self.whole(name, value).strip()

    def texts(self, name: str) -> list[str]:
        """Return a list of texts, which may be empty ones.

        Raises:
            InputError: it is no such list.
        """
        value = self.values.get(name)
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise self.refused(f"'{name}' is not a list of texts")
        return [self.whole(name, one).strip() for one in value]

    def table(self, name: str) -> "Row":
        """Return a field that is a table of its own, as a row.

        Raises:
            InputError: it is none.
        """
        value = self.values.get(name)
        if not isinstance(value, dict):
            raise self.refused(f"'{name}' is not a table of fields")
        return Row(self.path, self.number, {f"{name}.{key}": v for key, v in value.items()})

    def index(self, name: str, count: int) -> int:
        """Return which of ``count`` options is right, from a number (from 0) or a letter.

        Raises:
            InputError: missing, or neither a number nor a letter of that range.
        """
        value = self.values.get(name)
        if value is None or value == "":
            raise self.refused(f"'{name}' is missing or empty")
        if isinstance(value, str) and len(value.strip()) == 1:
            letter = value.strip().upper()
            value = LETTERS.find(letter) if letter in LETTERS else _number(letter)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < count:
            raise self.refused(f"'{name}' names none of the {count} options")
        return value

    def whole(self, name: str, value: str) -> str:
        """Return a text that can be hashed and tokenised.

        Raises:
            InputError: it holds half of a surrogate pair.
        """
        try:
            value.encode()
        except UnicodeEncodeError:
            raise self.refused(f"'{name}' holds half of a surrogate pair") from None
        return value

    def refused(self, problem: str) -> InputError:
        """Return the error that names this row."""
        return InputError(f"{shown(self.path)}: row {self.number}: {problem}")


def _number(character: str) -> int:
    return int(character) if character.isdecimal() else -1
