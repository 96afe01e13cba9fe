"""The exact choice of one option per weight under a budget: multiple-choice knapsack by dynamic programming.

Minimise the sum of chosen losses subject to the sum of chosen costs staying within the budget. Costs are integers; they
are divided by their greatest common divisor, and if the budget is still more than `MAX_CELLS` of that unit, costs are
rounded up to a coarser one (the result then is feasible, and exact for the rounded costs).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from nxm_export.errors import PlanError

MAX_CELLS = 200_000


def choose(losses: Sequence[Sequence[float]], costs: Sequence[Sequence[int]], budget: int) -> list[int]:
    """Index of the chosen option per item. Raises `PlanError` when no choice fits, with the least that any needs."""
    least = sum(min(options) for options in costs)
    if least > budget:
        raise PlanError(f"no choice of options fits the budget of {budget}: the smallest one needs {least}")
    unit = math.gcd(*(cost for options in costs for cost in options if cost <= budget)) or 1
    unit = max(unit, -(-budget // MAX_CELLS))
    cells = budget // unit
    units = [[-(-cost // unit) for cost in options] for options in costs]
    if sum(min(options) for options in units) > cells:  # only rounding up made it too large: take the smallest
        return [int(np.argmin(options)) for options in costs]
    best = np.zeros(cells + 1)  # best[c]: least loss of the items so far at a cost of at most c units
    taken = np.zeros((len(losses), cells + 1), np.int16)
    for item, (item_losses, item_units) in enumerate(zip(losses, units, strict=True)):
        rows = np.full((len(item_units), cells + 1), np.inf)
        for option, (loss, cost) in enumerate(zip(item_losses, item_units, strict=True)):
            if cost <= cells:
                rows[option, cost:] = best[: cells + 1 - cost] + loss
        taken[item] = rows.argmin(axis=0)
        best = rows.min(axis=0)
    chosen, cell = [], cells
    for item in range(len(losses) - 1, -1, -1):
        option = int(taken[item, cell])
        chosen.append(option)
        cell -= units[item][option]
    return chosen[::-1]
