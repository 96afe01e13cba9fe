"""What the tools take on their command lines: types for argparse, which says in a line what is wrong with a value."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Callable, Collection

from nxm_export.errors import DataError


def shape(text: str) -> tuple[int, int]:
    """Batch and sequence of ``8x128``."""
    batch, _, sequence = text.partition("x")
    return count(batch, text), count(sequence, text)


def shapes(text: str) -> list[tuple[int, int]]:
    """Those of ``8x128,1x384``."""
    return [shape(part) for part in text.split(",")]


def counts(text: str) -> list[int]:
    """Those of ``1024,4096``."""
    return [count(part, text) for part in text.split(",")]


def count(text: str, whole: str) -> int:
    """A number of one or more, which is a part of `whole`."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{whole!r} has {text!r} where a number of at least 1 should be")
    return int(text)


def names_of(known: Collection[str], *, or_none: bool = False) -> Callable[[str], list[str]]:
    """A type for comma-separated names, each one of `known`; of an empty text there are none, where they may be."""

    def names(text: str) -> list[str]:
        given = text.split(",") if text or not or_none else []
        for name in given:
            if name not in known:
                raise ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
        return given

    return names


def fitting(asked: Collection[tuple[int, int]], positions: int) -> list[tuple[int, int]]:
    """The shapes that a model with so many positions takes; raises `DataError` where it takes none."""
    taken = [each for each in asked if each[1] <= positions]
    if not taken:
        raise DataError(f"the model takes at most {positions} tokens, and every shape has more: give --shapes")
    return taken
