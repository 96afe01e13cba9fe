"""The knapsack against every choice there is."""

from __future__ import annotations

import itertools
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compressors.search.knapsack import Latency, choose
from nxm_export.errors import PlanError

CASES = 200


@dataclass(frozen=True)
class Problem:
    """A small knapsack, and its solution by enumeration."""

    losses: list[list[float]]
    bits: list[list[int]]
    budget: int
    latency: Latency | None

    def loss(self, choice: tuple[int, ...] | list[int]) -> float:
        return math.fsum(self.losses[item][option] for item, option in enumerate(choice))

    def fits(self, choice: tuple[int, ...] | list[int]) -> bool:
        if sum(self.bits[item][option] for item, option in enumerate(choice)) > self.budget:
            return False
        latency = self.latency
        return latency is None or sum(latency.milliseconds[i][o] for i, o in enumerate(choice)) <= latency.limit

    def by_enumeration(self) -> float:
        """The least loss of every feasible choice; infinite where there is none."""
        choices = itertools.product(*(range(len(options)) for options in self.bits))
        return min((self.loss(choice) for choice in choices if self.fits(choice)), default=math.inf)


def random_problem(seed: int, largest_loss: float, *, limited: bool) -> Problem:
    rng = np.random.default_rng(seed)
    items, options = int(rng.integers(3, 7)), int(rng.integers(2, 6))
    losses = (rng.random((items, options)) ** 2 * largest_loss).tolist()
    sizes = rng.choice([1, 8, 64], (items, options))
    bits = (rng.integers(1, 60, (items, options)) * sizes).tolist()
    least, most = sum(map(min, bits)), sum(map(max, bits))
    budget = int(least + rng.random() * (most - least))
    if not limited:
        return Problem(losses, bits, budget, None)
    milliseconds = rng.random((items, options)).tolist()
    fast, slow = sum(map(min, milliseconds)), sum(map(max, milliseconds))
    return Problem(losses, bits, budget, Latency(milliseconds, fast + rng.random() * (slow - fast) / 2))


@pytest.mark.parametrize("limited", [False, True], ids=["bits", "bits and latency"])
@pytest.mark.parametrize("largest_loss", [1.0, 1e-7])
def test_choice_is_as_good_as_the_best_of_all(largest_loss: float, limited: bool) -> None:
    infeasible = 0
    for seed in range(CASES):
        problem = random_problem(seed, largest_loss, limited=limited)
        best = problem.by_enumeration()
        if math.isinf(best):
            infeasible += 1
            with pytest.raises(PlanError, match=r"no choice of options fits the budget of \d+ and the limit"):
                choose(problem.losses, problem.bits, problem.budget, problem.latency)
            continue
        chosen = choose(problem.losses, problem.bits, problem.budget, problem.latency)
        assert problem.fits(chosen), seed
        assert problem.loss(chosen) == pytest.approx(best, rel=1e-9, abs=0.0), seed
    assert infeasible < CASES / 2


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    unit = draw(st.sampled_from([1, 3, 12288, 1_000_003]))
    # One option may lose a million times as much as the differences that decide.
    scales = draw(st.lists(st.sampled_from([1e-7, 1e-3, 1.0]), min_size=20, max_size=20))
    losses = [
        [draw(st.integers(0, 50)) / 7 * scales[4 * item + option] for option in range(size)]
        for item, size in enumerate(sizes)
    ]
    bits = [[draw(st.integers(1, 20)) * unit for _ in range(size)] for size in sizes]
    budget = draw(st.integers(1, 60)) * unit + draw(st.integers(0, 2))
    latency = None
    if draw(st.booleans()):
        milliseconds = [[draw(st.integers(0, 20)) / 8 for _ in range(size)] for size in sizes]
        latency = Latency(milliseconds, draw(st.integers(0, 60)) / 8)
    return Problem(losses, bits, budget, latency)


@given(problems())
@settings(max_examples=CASES, deadline=None)
def test_losses_of_any_scale_equal_choices_and_full_budgets(problem: Problem) -> None:
    best = problem.by_enumeration()
    if math.isinf(best):
        with pytest.raises(PlanError, match="no choice of options fits the budget"):
            choose(problem.losses, problem.bits, problem.budget, problem.latency)
        return
    chosen = choose(problem.losses, problem.bits, problem.budget, problem.latency)
    assert problem.fits(chosen)
    assert problem.loss(chosen) == pytest.approx(best, rel=1e-6, abs=0.0)


def test_an_option_that_no_budget_reaches_is_never_taken() -> None:
    losses = [[0.0, 5.0], [float("inf"), 1.0]]
    assert choose(losses, [[2**60, 3], [2**60, 4]], 7) == [1, 1]
    with pytest.raises(PlanError, match="the smallest one needs 7"):
        choose(losses, [[2**60, 3], [2**60, 4]], 6)


def test_a_budget_is_kept_to_the_bit() -> None:
    bits = [[10**9 + 1, 10**9], [10**9 + 1, 10**9]]
    assert choose([[0.0, 1.0], [0.0, 1.5]], bits, 2 * 10**9 + 1) == [1, 0]


def test_the_solver_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """``nxm search --json`` has its result on stdout, and nothing else."""
    for seed in range(5):
        rng = np.random.default_rng(seed)
        losses = (np.exp(2 * rng.normal(size=(288, 5))) * [8, 4, 2, 1, 0]).tolist()
        weights = rng.choice([384 * 384, 384 * 1536], 288).tolist()
        bits = [[int(weight * bits) + 12288 for bits in (2.75, 4, 5, 8, 16)] for weight in weights]
        choose(losses, bits, sum(weights) * 4)
    assert capfd.readouterr() == ("", "")


def test_what_is_printed_behind_the_solver_goes_where_it_went_before(capfd: pytest.CaptureFixture[str]) -> None:
    choose([[0.0, 1.0]], [[1, 1]], 1)
    left_open = len(list(Path("/proc/self/fd").iterdir()))
    choose([[0.0, 1.0]], [[1, 1]], 1)
    os.write(1, b"the result")
    os.write(2, b"a note")
    assert capfd.readouterr() == ("the result", "a note")
    assert len(list(Path("/proc/self/fd").iterdir())) == left_open


@pytest.mark.parametrize("unit", [1e-9, 1.0, 1e9])
@pytest.mark.parametrize("over", [1e-12, 1e-9, 1e-7])
def test_a_choice_that_only_the_solvers_tolerance_lets_pass_is_none(unit: float, over: float) -> None:
    """Two of three options are over the limit together, by less than the solver sees; whatever milliseconds are in."""
    milliseconds = [[unit * (1 + over), unit, unit / 2]] * 2
    losses, bits = [[0.0, 1.0, 9.0], [0.0, 2.0, 9.0]], [[1, 1, 1]] * 2
    assert choose(losses, bits, 2, Latency(milliseconds, 2 * unit)) == [1, 1]
    assert choose(losses, bits, 2, Latency(milliseconds, unit * (2 + 3 * over))) == [0, 0]
    with pytest.raises(PlanError, match=r"fits the budget of 2 and the limit of \S+ ms together"):
        choose(losses, bits, 2, Latency(milliseconds, unit * (1 - over)))


def test_a_limit_of_nothing_takes_what_costs_nothing() -> None:
    assert choose([[0.0, 1.0]] * 2, [[1, 1]] * 2, 2, Latency([[0.5, 0.0], [0.0, 0.5]], 0.0)) == [1, 0]


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("base", [0.0, 1e6])
def test_only_differences_of_losses_decide_however_large_or_small_all_of_them_are(scale: float, base: float) -> None:
    """An option of the last item loses a million times as much as the differences between the others."""
    losses = [[scale * (base + loss) for loss in item] for item in ([0.25, 0.0], [0.5, 0.0], [0.0, 1e6])]
    bits = [[1, 2], [1, 2], [1, 1]]
    assert choose(losses, bits, 4, None) == [0, 1, 0]
    assert choose(losses, bits, 5, None) == [1, 1, 0]
    assert choose(losses, bits, 3, None) == [0, 0, 0]


def test_options_that_are_alike_and_items_with_one_option_are_chosen_from() -> None:
    assert choose([[0.0]], [[3]], 3) == [0]
    assert choose([[5.0, 5.0]] * 3, [[2, 3]] * 3, 6) == [0, 0, 0]
    with pytest.raises(PlanError, match=r"no choice of options fits the budget of 9$"):
        choose([[0.0, 1.0], [math.inf, math.inf]], [[1, 1], [1, 1]], 9)
