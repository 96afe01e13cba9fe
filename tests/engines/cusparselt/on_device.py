"""An engine on the fake accelerator, where a tensor on the wrong device raises; in a process of its own:

python -m tests.engines.cusparselt.on_device GRAPH OUT
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from engines.base import BuildOptions, Profile
from engines.cusparselt.backend import build_on, load_on
from engines.cusparselt.machine import Machine
from engines.cusparselt.stand_in import IntegerReferenceKernels
from tests.engines.cusparselt.machines import FACTS
from tools.gpu import fake_accelerator

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SHAPES = ((2, 16), (1, 7))
IDS = 35  # tiny models have few


class OnDevice(IntegerReferenceKernels):
    """The stand-in behind a device: what it is given must lie there, and so does what it gives."""

    device = fake_accelerator.NAME

    def compress(self, weight: Tensor) -> Tensor:
        return super().compress(self._host(weight)).to(self.device)

    def sparse(
        self,
        packed: Tensor,
        x: Tensor,
        out: torch.dtype,
        alpha: Tensor | None,
        bias: Tensor | None,
        algorithm: int,
        *,
        transposed: bool,
    ) -> Tensor:
        scale = None if alpha is None else self._host(alpha)
        bias = None if bias is None else self._host(bias)
        y = super().sparse(self._host(packed), self._host(x), out, scale, bias, algorithm, transposed=transposed)
        return y.to(self.device)

    def dense(self, x: Tensor, weight: Tensor) -> Tensor:
        return super().dense(self._host(x), self._host(weight)).to(self.device)

    def _host(self, tensor: Tensor) -> Tensor:
        assert tensor.device.type == self.device, f"an operand lies on {tensor.device}"
        return tensor.cpu()


def outputs(machine: Machine, graph: Path, out: Path) -> list[np.ndarray]:
    """Of an engine that is built on `machine`, at every shape, when its run is replayed."""
    out.mkdir(parents=True)
    build_on(machine, graph, out, BuildOptions(profiles=[Profile((1, 1), (2, 16), (2, 16))]))
    random, given = np.random.default_rng(0), []
    with load_on(machine, out) as engine:
        for shape in SHAPES:
            feeds = {name: np.ones(shape, np.int64) for name in engine.inputs}
            feeds["input_ids"] = random.integers(5, IDS, shape)
            for _ in range(3):
                values = engine.run(feeds)
            given.append(values["logits"])
    return given


def main() -> None:
    graph, out = map(Path, sys.argv[1:])
    fake_accelerator.install()
    ours = outputs(Machine(OnDevice(), FACTS), graph, out / "device")
    theirs = outputs(Machine(IntegerReferenceKernels(), FACTS), graph, out / "host")
    for mine, right in zip(ours, theirs, strict=True):
        # Norms in FP16 round otherwise on another device, and integers of these narrow models follow by a step: 3 %.
        np.testing.assert_allclose(mine, right, atol=0.05 * max(1.0, float(np.abs(right).max())))


if __name__ == "__main__":
    main()
