"""Numbers of blocks as people write them: ``0-2,5`` for 0, 1, 2 and 5."""

from __future__ import annotations

from collections.abc import Iterable


def ranges(numbers: Iterable[int], separator: str = ",") -> str:
    """Each number once, in rising order, with runs as their ends; nothing for none."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return separator.join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
