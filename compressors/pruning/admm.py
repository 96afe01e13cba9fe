"""ADMM for compression constraints: minimise the task loss of W subject to W lying in a set C of compressed matrices.

Split as ``loss(W) + indicator_C(Z)`` with ``W = Z`` and scaled dual U (Boyd et al. 2011, section 3.1.1):

    W-step   optimizer steps on  loss(W) + (rho/2) * ||W - Z + U||**2
    Z-step   Z <- projection of (W + U) onto C
    U-step   U <- U + damping * (W - Z)

``rho`` is scale-free: after every dual update it is chosen so that the penalty's gradient, were U zero, would be a
given multiple of the task gradient; that ratio is what acts under Adam. It never falls, and whenever it rises U is
divided by the same factor, because the dual variable is ``rho * U`` (section 3.4.1). Without that rescaling U keeps the
weight of a time when the penalty was weak, ``W + U`` doubles dropped weights, and masks flip back and forth without
end. The penalty is added after gradient clipping, so that clipping never trades task for penalty.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from compressors.projections import PROJECTIONS
from compressors.quantization.fake_quant import QuantLinear
from nxm_export.contract.plan import WeightSpec
from nxm_export.errors import PlanError

# name -> (constraint set, weights fake-quantized in the forward pass)
ADMM_MODES: dict[str, tuple[str, bool]] = {
    "mask": ("mask", True),
    "joint": ("joint", False),
    "joint-ste": ("joint", True),
}


@dataclass(frozen=True)
class DualUpdate:
    """What one dual update did. `residual` is ||W - Z|| / ||W||, `flips` the share of weights whose support changed."""

    residual: float
    flips: float


class _Constraint(nn.Module):
    """One weight's copy Z inside the constraint set and its scaled dual U, both (out, in)."""

    z: Tensor
    u: Tensor

    def __init__(
        self,
        weight: nn.Parameter,
        spec: WeightSpec,
        project: Callable[..., Tensor],
        importance: Tensor | None,
    ) -> None:
        super().__init__()
        self._weight = [weight]  # a list, so that the parameter is not registered a second time
        self.spec, self._project, self._importance = spec, project, importance
        z = self.project(weight.detach())
        self.register_buffer("z", z.clone())
        self.register_buffer("u", torch.zeros_like(z))

    def project(self, weight: Tensor) -> Tensor:
        importance = None if self._importance is None else self._importance.to(weight.device)
        return self._project(weight, self.spec, importance)

    @property
    def weight(self) -> nn.Parameter:
        return self._weight[0]

    @property
    def grad(self) -> Tensor:
        if self.weight.grad is None:
            self.weight.grad = torch.zeros_like(self.weight)
        return self.weight.grad


class Admm(nn.Module):
    """Z and U of every constrained weight (buffers, so that checkpoints hold them), the penalty, the dual update.

    `damping` is the dual step: 1 is the textbook's. With `warm_dual` U starts at W - Z, as in the authors' code.
    `project` is one of `PROJECTIONS`; `importance` (in,) of a weight's inputs, by name, is handed to it.
    """

    rho: Tensor

    def __init__(
        self,
        weights: Mapping[str, tuple[nn.Parameter, WeightSpec]],
        project: Callable[..., Tensor],
        damping: float = 0.5,
        *,
        warm_dual: bool = False,
        importance: Mapping[str, Tensor | None] | None = None,
    ) -> None:
        super().__init__()
        self.damping = damping
        self.register_buffer("rho", torch.zeros((), dtype=torch.float64))
        self._known_rho: float | None = 0.0  # the buffer's value, so that no step waits for a device to tell it
        self.register_load_state_dict_post_hook(_forget_rho)  # type: ignore[no-untyped-call]
        self.constraints = nn.ModuleDict()
        for name, (weight, spec) in weights.items():
            constraint = _Constraint(weight, spec, project, (importance or {}).get(name))
            if warm_dual:
                constraint.u.copy_(weight.detach() - constraint.z)
            self.constraints[name.replace(".", "/")] = constraint  # module names hold no dots

    @classmethod
    def of(
        cls,
        layers: Mapping[str, QuantLinear],
        mode: str,
        damping: float,
        *,
        warm_dual: bool = False,
    ) -> Admm:
        """ADMM over prepared layers in one of `ADMM_MODES`; sets whether the layers quantize weights going forward."""
        if mode not in ADMM_MODES:
            raise PlanError(f"unknown ADMM mode {mode!r}; choose one of {', '.join(ADMM_MODES)}")
        projection, straight_through = ADMM_MODES[mode]
        for layer in layers.values():
            layer.quantize_weight = straight_through and layer.spec.weight_bits is not None
        constrained = {
            name: (cast(nn.Parameter, layer.weight), layer.spec)
            for name, layer in layers.items()
            if layer.spec.pattern or projection == "joint"
        }
        importance = {name: layer.importance for name, layer in layers.items()}
        return cls(
            constrained,
            PROJECTIONS[projection],
            damping,
            warm_dual=warm_dual,
            importance=importance,
        )

    def _all(self) -> list[_Constraint]:
        return list(self.constraints.values())  # type: ignore[arg-type]  # only constraints are put in

    @torch.no_grad()
    def set_strength(self, strength: float) -> None:
        """Raise rho so that ``rho * ||W - Z||`` is `strength` times the norm of the gradients now in place.

        rho never falls, and U is rescaled by what it rises.
        """
        constraints = self._all()
        if not constraints:
            return
        task = torch.stack([constraint.grad.norm() for constraint in constraints]).norm()
        gap = torch.stack([(constraint.weight - constraint.z).norm() for constraint in constraints]).norm()
        self.set_rho(max(self._rho(), float(strength * task.clamp(min=1e-9) / gap.clamp(min=1e-9))))

    @torch.no_grad()
    def set_rho(self, rho: float) -> None:
        """Set rho and rescale U, so that the dual variable ``rho * U`` stays what it is."""
        before = self._rho()
        if before and rho:
            for constraint in self._all():
                constraint.u.mul_(before / rho)
        self.rho.fill_(rho)
        self._known_rho = rho

    def _rho(self) -> float:
        if self._known_rho is None:
            self._known_rho = float(self.rho)
        return self._known_rho

    @torch.no_grad()
    def add_penalty(self) -> None:
        """Add ``rho * (W - Z + U)`` to the gradients."""
        rho = self._rho()
        for constraint in self._all():
            grad = constraint.grad  # three passes in place: no allocation as large as a weight
            grad.add_(constraint.weight, alpha=rho).sub_(constraint.z, alpha=rho).add_(constraint.u, alpha=rho)

    @torch.no_grad()
    def dual_update(self) -> DualUpdate:
        """Z- and U-step of every weight."""
        gaps, norms, flips, elements = [], [], [], 0
        for constraint in self._all():
            weight = constraint.weight.detach()
            z = constraint.project(weight + constraint.u)
            flips.append(((z != 0) != (constraint.z != 0)).sum())
            difference = weight - z
            constraint.u.add_(difference, alpha=self.damping)
            constraint.z.copy_(z)
            gaps.append(difference.norm())
            norms.append(weight.norm())
            elements += z.numel()
        if not gaps:
            return DualUpdate(0.0, 0.0)
        residual = torch.stack(gaps).norm() / torch.stack(norms).norm().clamp(min=1e-30)
        return DualUpdate(float(residual), float(torch.stack(flips).sum()) / elements)

    @torch.no_grad()
    def residual(self) -> float:
        """||W - projection(W)|| / ||W||: what fixing the masks would take away now."""
        gaps = [(c.weight.detach() - c.project(c.weight.detach())).norm() for c in self._all()]
        norms = [c.weight.detach().norm() for c in self._all()]
        return float(torch.stack(gaps).norm() / torch.stack(norms).norm().clamp(min=1e-30)) if gaps else 0.0

    @torch.no_grad()
    def mean_gap(self) -> float:
        """Mean |W - Z| over the weights that the projection changes: how far a dropped weight has to travel."""
        gaps = [(c.weight.detach() - c.z).abs() for c in self._all()]
        moved = sum(int((gap > 0).sum()) for gap in gaps)
        return float(sum(gap.sum() for gap in gaps)) / max(moved, 1)

    @contextmanager
    def projected(self) -> Iterator[None]:
        """Inside the block, every weight is its own projection (with U = 0): the model as it would be if masks were
        fixed now."""
        saved = [constraint.weight.detach().clone() for constraint in self._all()]
        try:
            with torch.no_grad():
                for constraint in self._all():
                    constraint.weight.copy_(constraint.project(constraint.weight))
            yield
        finally:
            with torch.no_grad():
                for constraint, weight in zip(self._all(), saved, strict=True):
                    constraint.weight.copy_(weight)


def _forget_rho(admm: Admm, _: object) -> None:
    """Called behind `load_state_dict`, which changes the buffer."""
    admm._known_rho = None
