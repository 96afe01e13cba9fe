"""Second-order pruning against brute force and against magnitude pruning."""

import itertools

import pytest
import torch

from compressors.projections import project_nm
from compressors.pruning.sparsegpt import prune
from nxm_export.contract.plan import NMPattern
from tests.support.random_tensors import correlated


def output_error(weight: torch.Tensor, pruned: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    difference = (weight - pruned).double()
    return ((difference @ hessian.double()) * difference).sum(dim=1)


@pytest.mark.parametrize("pattern", [NMPattern(2, 4), NMPattern(1, 4), NMPattern(1, 2)], ids=str)
def test_one_group_comes_close_to_the_best_support_with_refitted_weights(pattern: NMPattern) -> None:
    """For a single group the optimum is known: every support, its weights solved exactly."""
    x = correlated(256, pattern.m, 0)
    hessian = x.T @ x / len(x)
    weight = torch.randn(32, pattern.m, generator=torch.Generator().manual_seed(1))
    actual = output_error(weight, prune(weight, hessian, pattern, damping=1e-6), hessian)
    best = torch.full((32,), float("inf"), dtype=torch.float64)
    for support in itertools.combinations(range(pattern.m), pattern.n):
        nonzeros = list(support)
        solved = torch.zeros_like(weight)
        solved[:, nonzeros] = torch.linalg.solve(hessian[nonzeros][:, nonzeros], hessian[nonzeros] @ weight.T).T
        best = torch.minimum(best, output_error(weight, solved, hessian))
    # Greedy and left to right, so not optimal: within a factor of the best, and far below magnitude.
    magnitude = output_error(weight, project_nm(weight, pattern), hessian)
    assert (actual >= best - 1e-6).all()
    assert actual.sum() < 0.8 * magnitude.sum()


@pytest.mark.parametrize("pattern", [NMPattern(2, 4), NMPattern(1, 4), NMPattern(4, 8), NMPattern(2, 6)], ids=str)
def test_result_follows_the_pattern_and_beats_magnitude(pattern: NMPattern) -> None:
    size = 48 * pattern.m
    x = correlated(2 * size, size, 2)
    hessian = x.T @ x / len(x)
    weight = torch.randn(16, size, generator=torch.Generator().manual_seed(3))
    pruned = prune(weight, hessian, pattern)
    assert ((pruned != 0).reshape(16, -1, pattern.m).sum(-1) <= pattern.n).all()
    errors = [float(output_error(weight, z, hessian).sum()) for z in (pruned, project_nm(weight, pattern))]
    assert errors[0] < 0.7 * errors[1]


def test_uncorrelated_inputs_of_equal_size_give_magnitude_pruning() -> None:
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(prune(weight, torch.eye(32), NMPattern(2, 4)), project_nm(weight, NMPattern(2, 4)))


def test_inputs_that_are_always_zero_do_not_break_it() -> None:
    hessian = torch.eye(8)
    hessian[3, 3] = 0.0
    assert torch.isfinite(prune(torch.randn(4, 8), hessian, NMPattern(2, 4))).all()
