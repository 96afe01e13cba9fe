"""Parameters of which `make test` runs some and `make test-slow` the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def variants(values: Iterable[Any], fast: Callable[[Any], bool] | tuple[Any, ...]) -> list[Any]:
    """`values` as parameters, marked slow but for those that `fast` names or accepts."""
    is_fast = fast if callable(fast) else lambda value: value in fast
    marked = []
    for value in values:
        marks = [] if is_fast(value) else [pytest.mark.slow]
        marked.append(pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=marks))
    return marked
