"""Latency of engines against each other, interleaved in one run: the only comparison that a noisy machine allows.

Shape by shape, every round times every engine once, in an order that rotates, so that slow spells hit all of them alike.
Medians are reported with the interval of the middle half, and ratios are medians of paired ratios with a bootstrap
interval.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from engines.base import Engine
from nxm_export.errors import EngineError

WARMUP = 3
VOCABULARY = 1000  # token ids are drawn below; no encoder's table is smaller, but for tests


@dataclass(frozen=True)
class Timing:
    """One engine at one shape; milliseconds. `quartiles` hold the middle half of the rounds."""

    name: str
    batch: int
    sequence: int
    median: float
    quartiles: tuple[float, float]
    rounds: int


@dataclass(frozen=True)
class Ratio:
    """How many times faster `name` is than `reference` at one shape: median of paired ratios with its 95 % interval."""

    name: str
    reference: str
    batch: int
    sequence: int
    speedup: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class BenchReport:
    """All timings, and all ratios against the first engine."""

    timings: list[Timing]
    ratios: list[Ratio]

    def to_dict(self) -> dict[str, Any]:
        """The form of ``bench/*.json`` and ``--json``."""
        return {"schema": "nxm-bench/1", **asdict(self)}


def bench(
    engines: Mapping[str, Engine],
    shapes: Sequence[tuple[int, int]],
    *,
    rounds: int = 30,
    vocabulary: int = VOCABULARY,
    seed: int = 0,
) -> BenchReport:
    """Time `engines` at `shapes` (batch, sequence) with random token ids below `vocabulary` and no padding.

    The first engine is the reference of the ratios. Raises `EngineError` for no engines, shapes or rounds, and for an
    engine with inputs of unknown meaning.
    """
    if not engines or not shapes or rounds < 1:
        raise EngineError("a bench needs at least one engine, one shape and one round")
    names = list(engines)
    timings: list[Timing] = []
    ratios: list[Ratio] = []
    for batch, sequence in shapes:
        feeds = {name: _feeds(engine, batch, sequence, vocabulary, seed) for name, engine in engines.items()}
        for name, engine in engines.items():
            for _ in range(WARMUP):
                engine.run(feeds[name])
        taken: dict[str, list[float]] = {name: [] for name in names}
        for number in range(rounds):
            start = number % len(names)
            for name in names[start:] + names[:start]:
                began = time.perf_counter()
                engines[name].run(feeds[name])
                taken[name].append((time.perf_counter() - began) * 1e3)
        for name in names:
            low, middle, high = np.percentile(taken[name], [25, 50, 75])
            timings.append(Timing(name, batch, sequence, float(middle), (float(low), float(high)), rounds))
            if name != names[0]:
                speedup, bounds = _paired(np.array(taken[names[0]]), np.array(taken[name]), seed)
                ratios.append(Ratio(name, names[0], batch, sequence, speedup, bounds))
    return BenchReport(timings, ratios)


def _feeds(engine: Engine, batch: int, sequence: int, vocabulary: int, seed: int) -> dict[str, np.ndarray]:
    ids = np.random.default_rng(seed).integers(min(5, vocabulary - 1), vocabulary, size=(batch, sequence))
    unknown = set(engine.inputs) - {"input_ids", "attention_mask", "token_type_ids"}
    if unknown:
        raise EngineError(
            f"cannot make up values for the inputs {', '.join(sorted(unknown))}; only token inputs are timed"
        )
    values = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    return {name: values[name] for name in engine.inputs}


def _paired(reference: np.ndarray, other: np.ndarray, seed: int) -> tuple[float, tuple[float, float]]:
    ratios = reference / other
    picks = np.random.default_rng(seed).integers(0, len(ratios), size=(1000, len(ratios)))
    low, high = np.percentile(np.median(ratios[picks], axis=1), [2.5, 97.5])
    return float(np.median(ratios)), (float(low), float(high))
