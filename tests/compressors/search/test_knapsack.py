"""The knapsack against every choice there is."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compressors.search import knapsack
from nxm_export.errors import PlanError


def by_enumeration(losses: list[list[float]], costs: list[list[int]], budget: int) -> float:
    """The least loss of every feasible choice."""
    return min(
        (
            sum(losses[i][o] for i, o in enumerate(choice))
            for choice in itertools.product(*(range(len(options)) for options in costs))
            if sum(costs[i][o] for i, o in enumerate(choice)) <= budget
        ),
        default=float("inf"),
    )


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[list[float]], list[list[int]], int]:
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    unit = draw(st.sampled_from([1, 3, 12288]))
    losses = [[draw(st.integers(0, 50)) / 7 for _ in range(size)] for size in sizes]
    costs = [[draw(st.integers(1, 20)) * unit for _ in range(size)] for size in sizes]
    return losses, costs, draw(st.integers(1, 60)) * unit + draw(st.integers(0, 2))


@given(problems())
@settings(max_examples=300, deadline=None)
def test_choice_is_as_good_as_the_best_of_all(problem: tuple[list[list[float]], list[list[int]], int]) -> None:
    losses, costs, budget = problem
    best = by_enumeration(losses, costs, budget)
    if best == float("inf"):
        with pytest.raises(PlanError, match="the smallest one needs"):
            knapsack.choose(losses, costs, budget)
        return
    chosen = knapsack.choose(losses, costs, budget)
    assert sum(costs[i][o] for i, o in enumerate(chosen)) <= budget
    assert sum(losses[i][o] for i, o in enumerate(chosen)) == pytest.approx(best)


@given(problems())
@settings(max_examples=60, deadline=None)
def test_a_budget_of_many_units_is_still_feasible(problem: tuple[list[list[float]], list[list[int]], int]) -> None:
    losses, costs, budget = problem
    huge = [[cost * 1_000_003 + 1 for cost in options] for options in costs]  # no common divisor
    wide = budget * 1_000_003 + 10
    if sum(min(options) for options in huge) > wide:
        return
    chosen = knapsack.choose(losses, huge, wide)
    assert sum(huge[i][o] for i, o in enumerate(chosen)) <= wide


def test_an_option_that_no_budget_reaches_is_never_taken() -> None:
    losses = [[0.0, 5.0], [float("inf"), 1.0]]
    assert knapsack.choose(losses, [[2**60, 3], [2**60, 4]], 7) == [1, 1]
    with pytest.raises(PlanError, match="needs 7"):
        knapsack.choose(losses, [[2**60, 3], [2**60, 4]], 6)
