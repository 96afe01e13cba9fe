"""How long work is watched: a function that is told what is done, how much of it, and of how much in all."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]  # (what, done, total)


def silent(what: str, done: int, total: int) -> None:
    """The progress that nobody watches."""
