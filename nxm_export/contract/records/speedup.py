"""How many times faster one engine is than another: what `nxm bench` measures, and the summary of a run repeats."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Speedup:
    """How many times faster `name` is than `reference` at one shape (batch, sequence): the median of paired ratios,
    with its 95 % interval."""

    name: str
    reference: str
    batch: int
    sequence: int
    speedup: float
    interval: tuple[float, float]
