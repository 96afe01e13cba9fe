"""Parameters of which `make test` runs some, `make test-slow` others, and `pytest -m exhaustive` the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest

from nxm_export.contract.encoder_family import Family
from nxm_export.contract.plan import INT8_ATTENTION, PLACEMENTS


def variants(
    values: Iterable[Any], fast: Callable[[Any], bool] | tuple[Any, ...], slow: tuple[Any, ...] | None = None
) -> list[Any]:
    """`values` as parameters, marked slow but for those that `fast` names or accepts; with `slow`, those that neither
    names are marked exhaustive."""
    is_fast = fast if callable(fast) else lambda value: value in fast
    marked = []
    for value in values:
        later = pytest.mark.slow if slow is None or value in slow else pytest.mark.exhaustive
        marks = [] if is_fast(value) else [later]
        marked.append(pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=marks))
    return marked


def placements_of(family: Family) -> tuple[str, ...]:
    """Those of `PLACEMENTS` that a family can train."""
    return tuple(name for name in PLACEMENTS if family.attention.quantizable or name not in INT8_ATTENTION)
