"""The field of a settings class as an option: help, choices, range. Loads nothing.

A field with an `Option` in its metadata is an option of the command line, too; its choices, range, default and help
stand there alone (`nxm_export.cli.options` makes the options from them).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nxm_export.errors import DataError, PlanError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

OPTION = "option"  # the key of a field's metadata


@dataclass(frozen=True)
class Option:
    """A setting as the command line offers it; the field gives its type and its default.

    A number is at least `least` and at most `most`, or more than `above` and less than `below`; a text is one of
    `choices`. `flag` is the option's name where it is not the field's. `negates` says that the flag switches the
    setting off. `infinity_is_none`: the option takes ``inf`` for the setting's None, which is no limit. `scale` is how
    many units of the option are one of the setting: 1000 for milliseconds of a setting in seconds; the bounds are those
    of the setting.
    """

    help: str | None = None
    flag: str | None = None
    choices: tuple[str, ...] = ()
    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    metavar: str | None = None
    negates: bool = False
    infinity_is_none: bool = False
    scale: float = 1

    def require(self, name: str, value: object) -> None:
        """Raise `PlanError` for a value that is none of the choices, `DataError` for one outside the range."""
        what = name.replace("_", " ")
        if self.choices and value is not None and value not in self.choices:
            raise PlanError(f"unknown {what} {value!r}; choose one of {', '.join(self.choices)}")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return
        bounds = (
            (self.least, "at least", value >= (self.least or 0)),
            (self.most, "at most", value <= (self.most or 0)),
            (self.above, "more than", value > (self.above or 0)),
            (self.below, "less than", value < (self.below or 0)),
        )
        for bound, words, fits in bounds:
            if bound is not None and not fits:
                raise DataError(f"{what} must be {words} {bound:g}, got {value}")
        if not math.isfinite(value):
            raise DataError(f"{what} must be a finite number, got {value}")


def options_of(settings: type[DataclassInstance] | DataclassInstance) -> Iterator[tuple[str, Option]]:
    """(field, option) of the settings that are options, in their order."""
    for entry in dataclasses.fields(settings):
        if OPTION in entry.metadata:
            yield entry.name, entry.metadata[OPTION]
