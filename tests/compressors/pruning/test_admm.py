"""ADMM on problems small enough to know the answer."""

import torch
from torch import nn

from compressors.projections import PROJECTIONS, project_nm
from compressors.pruning.admm import Admm
from nxm_export.contract.plan import NMPattern, WeightSpec

SPEC = WeightSpec(NMPattern(2, 4))


def correlated_regression(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs whose columns repeat each other within groups of four, so that the largest weights are not the best to
    keep."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(512, 8, generator=generator)
    x = torch.stack([base[:, i // 2] + 0.3 * torch.randn(512, generator=generator) for i in range(16)], dim=1)
    w = torch.randn(4, 16, generator=generator)
    return x, w, x @ w.T


def loss_of(weight: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x @ weight.T - y).square().mean()


def run_admm(
    x: torch.Tensor, w: torch.Tensor, y: torch.Tensor, damping: float, steps: int = 600, updates: int = 30
) -> tuple[torch.Tensor, list[float]]:
    weight = nn.Parameter(w.clone())
    admm = Admm({"w": (weight, SPEC)}, PROJECTIONS["mask"], damping)
    optimizer = torch.optim.Adam([weight], lr=0.02)
    residuals = []
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        torch.autograd.backward(loss_of(weight, x, y))
        if step == 1 or (step - 1) % (steps // updates) == 0:
            admm.set_strength(0.3 * (5 / 0.3) ** (step / steps))
        admm.add_penalty()
        optimizer.step()
        if step % (steps // updates) == 0:
            residuals.append(admm.dual_update().residual)
    return project_nm(weight.detach(), SPEC.pattern), residuals  # type: ignore[arg-type]


def refit(mask: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> float:
    """The least-squares loss that a mask allows: solved exactly, row by row."""
    weight = torch.zeros_like(mask, dtype=torch.float32)
    for row in range(mask.shape[0]):
        nonzeros = mask[row].nonzero().squeeze(-1)
        weight[row, nonzeros] = torch.linalg.lstsq(x[:, nonzeros], y[:, row]).solution
    return float(loss_of(weight, x, y))


def test_residual_falls_and_the_result_beats_magnitude_pruning() -> None:
    wins = 0
    for seed in range(5):
        x, w, y = correlated_regression(seed)
        actual, residuals = run_admm(x, w, y, damping=0.5)
        magnitude = project_nm(w, SPEC.pattern)  # type: ignore[arg-type]
        assert residuals[-1] < 0.1 * residuals[0]
        assert loss_of(actual, x, y) < 0.6 * loss_of(magnitude, x, y)
        wins += refit(actual != 0, x, y) < refit(magnitude != 0, x, y)  # a better mask, not only better values
    assert wins >= 3  # of five: ADMM finds a better one mostly, not always; magnitude would win none against itself


def test_strength_is_the_ratio_of_penalty_to_task_gradient() -> None:
    weight = nn.Parameter(torch.randn(4, 8))
    admm = Admm({"w": (weight, SPEC)}, PROJECTIONS["mask"], 0.5)
    weight.grad = torch.randn(4, 8)
    task = weight.grad.clone()
    admm.set_strength(0.25)
    admm.add_penalty()
    added = weight.grad - task
    torch.testing.assert_close(added.norm(), 0.25 * task.norm())
    gap = weight.detach() - project_nm(weight.detach(), SPEC.pattern)  # type: ignore[arg-type]
    torch.testing.assert_close(added / added.norm(), gap / gap.norm())  # ... and it pulls towards Z


def test_dual_update_is_the_textbook_one() -> None:
    weight = nn.Parameter(torch.randn(4, 8))
    admm = Admm({"w": (weight, SPEC)}, PROJECTIONS["mask"], 1.0)
    constraint = admm.constraints["w"]
    u = torch.randn(4, 8)
    constraint.u.copy_(u)  # type: ignore[operator]
    update = admm.dual_update()
    z = project_nm(weight.detach() + u, SPEC.pattern)  # type: ignore[arg-type]
    torch.testing.assert_close(constraint.z, z)
    torch.testing.assert_close(constraint.u, u + weight.detach() - z)
    torch.testing.assert_close(torch.tensor(update.residual), (weight.detach() - z).norm() / weight.detach().norm())


def test_changing_rho_keeps_the_dual_variable_and_z() -> None:
    weight = nn.Parameter(torch.randn(4, 8))
    admm = Admm({"w": (weight, SPEC)}, PROJECTIONS["mask"], 1.0)
    admm.set_rho(2.0)
    admm.dual_update()
    constraint = admm.constraints["w"]
    z, u = constraint.z.clone(), constraint.u.clone()  # type: ignore[operator]
    admm.set_rho(8.0)
    torch.testing.assert_close(constraint.u, u / 4)
    torch.testing.assert_close(constraint.z, z)


def test_rho_never_falls() -> None:
    weight = nn.Parameter(torch.randn(4, 8))
    admm = Admm({"w": (weight, SPEC)}, PROJECTIONS["mask"])
    weight.grad = torch.randn(4, 8)
    admm.set_strength(1.0)
    before = float(admm.rho)
    admm.set_strength(0.01)
    assert float(admm.rho) == before


def test_without_rescaling_the_dual_the_mask_never_settles() -> None:
    """Why U is rescaled when rho rises: the same run, with U left as it is, still flips masks at its end."""
    x, w, y = correlated_regression(0)

    def flips(rescale: bool) -> float:
        weight = nn.Parameter(w.clone())
        admm = Admm({"w": (weight, SPEC)}, PROJECTIONS["mask"], 1.0)
        optimizer = torch.optim.Adam([weight], lr=0.02)
        last = []
        for step in range(1, 601):
            optimizer.zero_grad()
            torch.autograd.backward(loss_of(weight, x, y))
            if step % 20 == 1:
                saved = admm.constraints["w"].u.clone()  # type: ignore[operator]
                admm.set_strength(0.3 * (5 / 0.3) ** (step / 600))
                if not rescale:
                    admm.constraints["w"].u.copy_(saved)  # type: ignore[operator]
            admm.add_penalty()
            optimizer.step()
            if step % 20 == 0:
                last.append(admm.dual_update().flips)
        return sum(last[-10:])

    assert flips(rescale=True) == 0.0
    assert flips(rescale=False) > 0.0


def test_projected_block_restores_the_weights() -> None:
    weight = nn.Parameter(torch.randn(4, 8))
    before = weight.detach().clone()
    admm = Admm({"w": (weight, SPEC)}, PROJECTIONS["mask"])
    with admm.projected():
        assert ((weight != 0).reshape(4, 2, 4).sum(-1) == 2).all()
    assert torch.equal(weight, before)


def test_the_penalty_of_what_is_resumed_has_the_weight_that_was_saved() -> None:
    def build() -> tuple[nn.ModuleDict, Admm, nn.Parameter]:
        weight = nn.Parameter(torch.arange(32.0).reshape(4, 8))
        admm = Admm({"w": (weight, SPEC)}, PROJECTIONS["mask"])
        admm.set_rho(2.0)
        return nn.ModuleDict({"admm": admm}), admm, weight

    (saved, first, _), (resumed, second, weight) = build(), build()
    first.set_rho(8.0)
    resumed.load_state_dict(saved.state_dict())  # of the module that holds it, as the Trainer does
    second.add_penalty()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, 8.0 * (weight.detach() - second.constraints["w"].z))  # type: ignore[operator]


def test_state_survives_saving() -> None:
    def build() -> Admm:
        return Admm({"a.b.weight": (nn.Parameter(torch.ones(4, 8)), SPEC)}, PROJECTIONS["mask"])

    first, second = build(), build()
    first.constraints["a/b/weight"].u.fill_(3.0)  # type: ignore[operator]
    second.load_state_dict(first.state_dict())
    u = second.constraints["a/b/weight"].u
    assert isinstance(u, torch.Tensor)
    assert (u == 3.0).all()
