"""The percentile bootstrap: how far a statistic moves when the same number of units is drawn again, with replacement.

A unit is what is independent of the others: a sample, a query with its candidates, or one round of timings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

RESAMPLES = 1000
COVERAGE = (2.5, 97.5)  # percentiles: 95 % between them


def resamples(units: int, seed: int = 0) -> Iterator[np.ndarray]:
    """`RESAMPLES` arrays of indices (units,), one at a time: together they would take gigabytes for a large dev set."""
    generator = np.random.default_rng(seed)
    return (generator.integers(0, units, size=units) for _ in range(RESAMPLES))


def bootstrap_interval(units: int, statistic: Callable[[np.ndarray], float], seed: int = 0) -> tuple[float, float]:
    """95 % interval of `statistic`, a function of the indices of the units that were drawn; NaN stays NaN."""
    low, high = np.percentile([statistic(picks) for picks in resamples(units, seed)], COVERAGE)
    return float(low), float(high)
