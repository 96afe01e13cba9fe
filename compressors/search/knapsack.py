"""The exact choice of one option per weight under a budget of bits and, where there is one, a latency limit.

A multiple-choice knapsack, as an integer program that HiGHS solves (`scipy.optimize.milp`): minimise the sum of chosen losses
so that chosen bits stay within the budget and chosen milliseconds within the limit. The solver has absolute tolerances of
1e-6, so its numbers are made to be about one: bits are divided by their greatest common divisor, milliseconds by the limit,
and losses by the largest that is left once options are gone that alone lose more than a choice known to be feasible. What
comes back is added up again, bits in integers; a choice that only the tolerances let pass is excluded, and the rest is solved
again.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nxm_export.errors import PlanError

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Latency:
    """A second constraint: `milliseconds` by item and option, whose chosen sum stays within `limit`."""

    milliseconds: Sequence[Sequence[float]]
    limit: float


def choose(
    losses: Sequence[Sequence[float]],
    bits: Sequence[Sequence[int]],
    budget: int,
    latency: Latency | None = None,
) -> list[int]:
    """Index of the chosen option per item: the least sum of `losses` within the `budget` of bits and the `latency` limit.

    An option with an infinite loss is never chosen. Raises `PlanError` when no choice fits, with the least bits that any needs.
    """
    least = sum(min(options) for options in bits)
    if least > budget:
        raise PlanError(f"no choice of options fits the budget of {budget}: the smallest one needs {least}")
    problem = _Problem.of(losses, bits, budget, latency)
    chosen = problem.solved()
    while chosen is not None:
        # All options that lose more than this choice does are out; what is left may be solved on a finer scale.
        smaller = problem.without_losses_above(problem.loss(chosen))
        if smaller.largest_loss >= problem.largest_loss / 10:
            return chosen
        problem, chosen = smaller, smaller.solved() or chosen
    within = "" if latency is None else f" and the limit of {latency.limit:g} ms together"
    raise PlanError(f"no choice of options fits the budget of {budget}{within}")


@dataclass(frozen=True)
class _Problem:
    """The integer program: a variable, 0 or 1, for every option that may be chosen, and one option per item.

    `excess` is what an option loses beyond the best of its item: only differences decide, and they may be far smaller than
    the losses.
    """

    variables: tuple[tuple[int, int], ...]  # (item, option)
    excess: Floats  # (variables,)
    bits: Sequence[Sequence[int]]
    budget: int
    latency: Latency | None

    @classmethod
    def of(
        cls, losses: Sequence[Sequence[float]], bits: Sequence[Sequence[int]], budget: int, latency: Latency | None
    ) -> _Problem:
        """The program of all options that may be chosen."""
        variables, excess = [], []
        for item, (item_losses, item_bits) in enumerate(zip(losses, bits, strict=True)):
            options = [o for o, loss in enumerate(item_losses) if math.isfinite(loss) and item_bits[o] <= budget]
            best = min((item_losses[o] for o in options), default=0.0)
            variables += [(item, o) for o in options]
            excess += [item_losses[o] - best for o in options]
        return cls(tuple(variables), np.array(excess, np.float64), bits, budget, latency)

    @property
    def largest_loss(self) -> float:
        """The largest excess of an option, which the solver's tolerance is relative to."""
        return float(self.excess.max(initial=0.0))

    def loss(self, chosen: Sequence[int]) -> float:
        """Sum of the excess of a choice."""
        return float(sum(e for (item, o), e in zip(self.variables, self.excess, strict=True) if chosen[item] == o))

    def without_losses_above(self, loss: float) -> _Problem:
        """The program without the options that no choice with at most this loss has."""
        keep = self.excess <= loss * (1 + 1e-9)
        variables = tuple(variable for variable, stays in zip(self.variables, keep, strict=True) if stays)
        return _Problem(variables, self.excess[keep], self.bits, self.budget, self.latency)

    def fits(self, chosen: Sequence[int]) -> bool:
        """Whether a choice keeps to the budget, in integers, and to the limit."""
        if sum(self.bits[item][o] for item, o in enumerate(chosen)) > self.budget:
            return False
        latency = self.latency
        return latency is None or sum(latency.milliseconds[i][o] for i, o in enumerate(chosen)) <= latency.limit

    def solved(self) -> list[int] | None:
        """The best choice, None where there is none."""
        from scipy.optimize import Bounds, LinearConstraint, milp

        items, count = len(self.bits), len(self.variables)
        one_of_each = np.zeros((items, count))
        for at, (item, _) in enumerate(self.variables):
            one_of_each[item, at] = 1.0
        if not one_of_each.any(axis=1).all():
            return None  # an item without an option
        rows, bounds = self._constraints()
        excluded = np.empty((0, count))
        while True:
            upper = [*bounds, *[items - 1] * len(excluded)]
            with _quiet_stdout():
                answer = milp(
                    self.excess / (self.largest_loss or 1.0),
                    integrality=np.ones(count),
                    bounds=Bounds(0, 1),
                    constraints=[
                        LinearConstraint(one_of_each, 1, 1),
                        LinearConstraint(np.vstack([rows, excluded]), ub=upper),
                    ],
                    options={"mip_rel_gap": 0.0},
                )
            if answer.x is None:
                return None
            taken = answer.x > 0.5
            chosen = [option for (_, option), yes in zip(self.variables, taken, strict=True) if yes]  # items in order
            if self.fits(chosen):
                return chosen
            excluded = np.vstack([excluded, taken])

    def _constraints(self) -> tuple[Floats, list[float]]:
        """(rows (constraints, variables), their upper bounds)."""
        unit = math.gcd(*(self.bits[item][o] for item, o in self.variables)) or 1
        rows = [[float(self.bits[item][o] // unit) for item, o in self.variables]]
        bounds = [float(self.budget // unit)]
        if self.latency is not None:
            scale = self.latency.limit or 1.0
            rows.append([self.latency.milliseconds[item][o] / scale for item, o in self.variables])
            bounds.append(self.latency.limit / scale)
        return np.array(rows), bounds


@contextmanager
def _quiet_stdout() -> Iterator[None]:
    """Inside the block, C code prints nothing: HiGHS has lines for its authors, and ``--json`` needs stdout to itself."""
    sys.stdout.flush()
    saved, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        ctypes.CDLL(None).fflush(None)  # C keeps lines in a buffer of its own
        os.dup2(saved, 1)
        os.close(saved)
        os.close(nowhere)
