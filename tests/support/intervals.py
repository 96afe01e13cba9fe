"""The interval of a metric, as one call."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nxm_export.data.metrics import Groups, ScoredOutputs


def interval(
    name: str,
    outputs: np.ndarray,
    labels: np.ndarray,
    seed: int = 0,
    classes: Sequence[str] = (),
    groups: Groups = None,
) -> tuple[float, float]:
    """95 % bootstrap interval of a metric over samples, or over `groups` of them; NaN for fewer than `LEAST_UNITS`."""
    return ScoredOutputs(outputs, labels, classes, groups).interval(name, seed)
