"""Layer-wise ADMM's dual variables carried into the first epoch of training, in which masks still move.

Where layer-wise ADMM ends, its dual is the gradient of the layer's output error at the refit weight R. It is zero on
the mask, and ``2 (R - W) H`` elsewhere: W (out, in) is the dense weight, H (in, in) the moments of its inputs. ADMM on
the task's loss starts from Z = R with the scaled dual ``U = -s * 2 (R - W) H / rho``. So a weight that was dropped
moves only where the task's gradient is another than the layer's. The layer's loss has its own unit: s makes the dual of
each layer as large as its gradient of the first batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from compressors.pruning.admm import Admm
from compressors.pruning.layer_inputs import Batches, second_moments
from compressors.quantization.fake_quant import QuantLinear

if TYPE_CHECKING:
    from compressors.pruning.admm import _Constraint

UPDATES = 8  # dual updates of the epoch
STRENGTH, MOVED = 1.0, 0.05  # the penalty is as large as the first gradient where weights have moved by 5 %


def layer_duals(dense: nn.Module, layers: Mapping[str, QuantLinear], batches: Batches) -> dict[str, Tensor]:
    """``2 (R - W) H`` (out, in) of every layer that has a mask, outside of it, by weight name."""
    linears = {name: dense.get_submodule(name.removesuffix(".weight")) for name in layers}
    inputs = second_moments(dense, linears, batches)
    return {
        name: 2 * (layer.weight.detach() - dense.get_parameter(name).detach()) @ inputs[name] * ~layer.mask
        for name, layer in layers.items()
        if layer.mask is not None
    }


@dataclass
class CarriedDuals:
    """A `compressors.training.admm_schedule.Schedule` of `steps`; with no `duals` U starts at zero, and masks are free
    all the same."""

    steps: int
    duals: Mapping[str, Tensor]
    cosines: dict[str, float] = field(default_factory=dict)  # of the dual and the task's gradient outside the mask

    @torch.no_grad()
    def penalize(self, admm: Admm, step: int) -> None:
        """Add the penalty to the gradients of a step."""
        if step == 1:
            self._start(admm)
        admm.add_penalty()

    def updates_at(self, step: int) -> bool:
        """Whether the dual is updated behind a step."""
        return step % max(self.steps // UPDATES, 1) == 0

    def _start(self, admm: Admm) -> None:
        constraints = cast(Mapping[str, "_Constraint"], admm.constraints)
        gradients = torch.stack([constraint.grad.norm() for constraint in constraints.values()]).norm()
        weights = torch.stack([constraint.weight.norm() for constraint in constraints.values()]).norm()
        rho = float(STRENGTH * gradients / (MOVED * weights))
        admm.set_rho(rho)
        for name, dual in self.duals.items():
            constraint = constraints[name.replace(".", "/")]
            gradient = constraint.grad[constraint.z == 0]
            pull = dual[constraint.z == 0]
            self.cosines[name] = float(torch.cosine_similarity(gradient, pull, dim=0))
            constraint.u.copy_(-dual * gradient.norm() / pull.norm() / rho)
