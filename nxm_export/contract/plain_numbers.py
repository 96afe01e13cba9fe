"""Numbers in texts that users write: of data files, options, shapes, gates.

Python's own ``int`` and ``float`` read more than that: ``1_0`` is 10 to them, full-width digits count, and ``infinity``
is a number. Whoever writes such a text seldom means it. Here a number is ASCII digits, with a sign, a point and an
exponent where it has any, and white space around it is not looked at.
"""

from __future__ import annotations

import math
import re

_WHOLE = re.compile(r"[+-]?[0-9]{1,400}")  # the largest float has 309 digits, and Python reads no text of many more
_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")


def whole_number(text: str) -> int | None:
    """The whole number that a text is, None where it is none."""
    text = text.strip()
    return int(text) if _WHOLE.fullmatch(text) else None


def real_number(text: str) -> float | None:
    """The finite number that a text is, None where it is none, or too large for a float."""
    text = text.strip()
    number = float(text) if _NUMBER.fullmatch(text) else math.inf
    return number if math.isfinite(number) else None


def size_of(text: str) -> int | None:
    """The whole number above 0 that a text is in digits alone, as shapes and counts are written; None where it is
    none."""
    number = whole_number(text)
    return number if number and text.strip().isdecimal() else None
