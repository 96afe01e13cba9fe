"""How much a projection loses, without training."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from nxm_export.contract.plan import WeightSpec
from nxm_export.reporting.matrices import projection_error


@pytest.mark.parametrize("spec", ["2:4+W8", "1:4", "W4", "4:8+W3", "dense"])
def test_the_projection_error_is_that_of_the_nearest_matrix_by_enumeration(spec: str) -> None:
    planned, weight = WeightSpec.parse(spec), np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    lost = 0.0
    for row in weight.astype(float):
        projected = row.copy()
        if planned.pattern:
            n, m = planned.pattern.n, planned.pattern.m
            for start in range(0, 8, m):
                group = row[start : start + m]
                best = max(combinations(range(m), n), key=lambda places: sum(group[p] ** 2 for p in places))
                projected[start : start + m] = [group[p] if p in best else 0.0 for p in range(m)]
        if planned.qmax:
            scale = max(abs(projected)) / planned.qmax
            grid = [code * scale for code in range(-planned.qmax, planned.qmax + 1)]
            projected = np.array([min(grid, key=lambda point: abs(point - value)) for value in projected])
        lost += float(((row - projected) ** 2).sum())
    # both are sums of 24 squares in float64, in different orders
    assert projection_error(weight, planned) == pytest.approx(
        lost / float((weight.astype(float) ** 2).sum()), rel=1e-12
    )
