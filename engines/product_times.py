"""What one product of an engine takes, in the form that a runtime gives it: the ground of a latency table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# How a product runs: in float, on integers, and on integers by what a GPU does for a 2:4 matrix (the faster of sparse
# and dense).
Form = Literal["float", "int8", "int8 2:4"]


@dataclass(frozen=True)
class ProductTime:
    """One product with one weight (or one part of a fused one) of K x N; `milliseconds` of a run, or None with the
    `problem` why nobody can tell."""

    weight: str
    k: int
    n: int
    form: Form
    milliseconds: float | None
    problem: str | None = None
