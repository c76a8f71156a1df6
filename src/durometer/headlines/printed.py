"""A figure as it was printed: its value, its digits, and what could have been rounded to it."""

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from durometer.core.errors import InputError
from durometer.formats.safetensors import shown

__all__ = ["Printed", "parse_printed"]

Unit = Literal["percent", "points", "fraction"]
_FIGURE = re.compile(
    r"(?P<sign>[+-]?) ?(?P<digits>\d{1,9}(?:\.\d{1,9})?|\.\d{1,9}) ?"
    r"(?P<unit>%|per ?cent|percentage points?|points?|pp)?",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Printed:
    """A printed figure.

    Attributes:
        text: as it was printed.
        value: as a share: 0.5906 for ``59.06 %``.
        step: one unit of the last printed digit, as a share.
        signed: whether a sign was printed; without one a change is compared by its size.
        unit: percent, points or a bare fraction.
    """

    text: str
    value: Fraction
    step: Fraction
    signed: bool
    unit: Unit

    def matches(self, value: Fraction, *, by_size: bool = False) -> bool:
        """Whether ``value`` rounds to the printed figure; a half may go either way.

        Args:
            by_size: compare sizes where no sign was printed.
        """
        compared = abs(value) if by_size and not self.signed else value
        return abs(compared - self.value) <= self.step / 2


def parse_printed(text: str) -> Printed:
    """Return a printed figure: ``59.06 %``, ``-51.68 %``, ``+53.1 points`` or ``0.4094``.

    Without a unit a figure above 1 is per cent, one with decimals up to 1 a fraction.

    Raises:
        InputError: it is no such figure, or its unit cannot be told.
    """
    plain = " ".join(text.replace("\N{MINUS SIGN}", "-").split())
    found = _FIGURE.fullmatch(plain)
    if found is None:
        raise InputError(
            f"printed figure '{shown(text, 40)}': write a number with a decimal point, and % or "
            "points: 59.06 %, -51.68 %, +53.1 points, 0.4094"
        )
    digits, named = Fraction(found["digits"]), (found["unit"] or "").lower()
    decimals = len(found["digits"].partition(".")[2])
    unit = _unit(text, digits, decimals, named)
    scale = 1 if unit == "fraction" else 100
    sign = -1 if found["sign"] == "-" else 1
    step = Fraction(1, 10**decimals * scale)
    return Printed(text, sign * digits / scale, step, bool(found["sign"]), unit)


def _unit(text: str, digits: Fraction, decimals: int, named: str) -> Unit:
    if named:
        return "percent" if named in ("%", "percent", "per cent") else "points"
    if digits > 1:
        return "percent"
    if not decimals and digits == 1:
        raise InputError(f"printed figure '{text}': write 1 % or 1.0, it could be either")
    return "fraction"
