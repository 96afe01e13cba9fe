"""Stand-ins of a GPU machine: what runs on them ran on no GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from engines.cusparselt.fusing import Function
from engines.cusparselt.kernels import Taken
from engines.cusparselt.machine import Machine
from engines.cusparselt.stand_in import IntegerReferenceKernels

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FACTS = {
    "torch": "stand-in",
    "cuda": "stand-in",
    "cusparselt": "0.8.0",
    "gpu": "stand-in of tests",
    "compute_capability": "9.0",
}
SPARSE_KERNEL = "sm90_xmma_sparse_gemm_i8i8_i8i32_tn_n_tilesize128x128x128_gmmastage"
FASTER = {(name, True): 1.0 for name in ("int8", "float16", "int32")}


def machine(kernels: IntegerReferenceKernels | None = None) -> Machine:
    """A machine whose kernels are exact integers on the CPU."""
    return Machine(kernels or IntegerReferenceKernels(), FACTS)


class Priced(IntegerReferenceKernels):
    """Kernels whose times are given: of products in int32, and of sparse ones by (output, transposed).

    Outputs that are not named are refused, as a version that does not have them would do. No CUDA graph holds a sparse
    product with an output in `refused`.
    """

    def __init__(
        self,
        dense: float,
        sparse: Mapping[tuple[str, bool], float],
        wrong: tuple[str, ...] = (),
        refused: tuple[str, ...] = (),
    ) -> None:
        self._dense, self._sparse, self._wrong, self.refused = dense, sparse, wrong, refused
        self._price, self._in_graph = 0.0, True

    def dense(self, x: Tensor, weight: Tensor) -> Tensor:
        self._price, self._in_graph = self._dense, True
        return super().dense(x, weight)

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
        name = str(out).removeprefix("torch.")
        if (name, transposed) not in self._sparse:
            raise RuntimeError(f"CUDA error: no {name} here\nwith a second line")
        self._price, self._in_graph = self._sparse[name, transposed], name not in self.refused
        y = super().sparse(packed, x, out, alpha, bias, algorithm, transposed=transposed)
        return y * 0 if name in self._wrong else y

    def microseconds(self, calls: Sequence[Callable[[], Tensor]]) -> list[Taken]:
        return [self._priced(call) for call in calls]

    def _priced(self, call: Callable[[], Tensor]) -> Taken:
        call()
        return Taken(self._price, self._in_graph)


class Named(IntegerReferenceKernels):
    """Kernels that compile nothing; `compiled` are the names of the functions that came to be compiled."""

    def __init__(self) -> None:
        self.compiled: list[str] = []

    def compile(self, function: Function) -> Function:
        self.compiled.append(function.__name__)
        return function


class Compiling(Named):
    """Kernels that trace with torch's own tracer, all of a function or it is an error, and run what was traced."""

    def compile(self, function: Function) -> Function:
        import torch

        traced: Function = torch.compile(super().compile(function), backend="eager", fullgraph=True)
        return traced


def two_four(n: int, k: int, seed: int) -> np.ndarray:
    """Random codes (N, K) with none, one or two of every four."""
    random = np.random.default_rng(seed)
    kept = random.random((n, k // 4, 4)).argsort(axis=-1) < random.integers(0, 3, (n, k // 4, 1))
    return (random.integers(-127, 128, (n, k // 4, 4)) * kept).reshape(n, k).astype(np.int8)
