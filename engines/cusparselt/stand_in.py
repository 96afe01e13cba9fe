"""The documented semantics of the GPU's products on the CPU, in exact integers: for tests and rehearsals alone.

No verb of the backend ever takes this: what runs on it ran on no GPU, and its engines say "stand-in". The compressed
form here has the shape that torch 2.11 gives it, (N, 10/16 of K bytes), and reads N from; what it holds is the kept
values, then two bits for the place of each. Only the shape is torch's; the order in cuSPARSELt's is not documented.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from engines.cusparselt.fusing import Function
from engines.cusparselt.kernels import LEAST, MATRIX_STEP, ROWS_STEP, Taken
from nxm_export.errors import EngineError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_INT_MM_ROWS = 16  # `_int_mm` takes more than these


class IntegerReferenceKernels:
    """`engines.cusparselt.kernels.Kernels` on the CPU. Sizes and types that the GPU's operations refuse are errors."""

    device = "cpu"
    kind: Literal["gpu", "stand-in"] = "stand-in"

    def compress(self, weight: Tensor) -> Tensor:
        """(N, K 10/16): values (N, K/2), then their places in each group of four, two bits each, cut into N rows."""
        import torch

        self._require_matrix(weight)
        n, k = weight.shape
        groups = weight.reshape(n, k // 4, 4)
        if bool(((groups != 0).sum(-1) > 2).any()):
            raise EngineError("a group of four along K keeps more than two: it is not 2:4")
        # The kept places of each group, in rising order; where fewer than two are kept, the first others.
        order = (groups == 0).to(torch.int8).sort(dim=-1, stable=True).indices[..., :2].sort(dim=-1).values
        values = groups.gather(-1, order)
        pairs = order.reshape(n, -1, 4)  # a byte holds the places of two groups
        places = sum((pairs[..., at] << (2 * at)) for at in range(4))
        packed = torch.cat([values.reshape(-1), places.to(torch.uint8).view(torch.int8).reshape(-1)])  # type: ignore[union-attr]
        assert packed.numel() * 16 == n * k * 10
        return packed.reshape(n, -1)

    def decompress(self, packed: Tensor, k: int) -> Tensor:
        """The matrix (N, K) of its compressed form."""
        import torch

        if packed.dim() != 2 or packed.shape[1] * 16 != k * 10:
            raise EngineError(f"a compressed matrix of {tuple(packed.shape)} is none of K = {k}")
        n, row = packed.shape[0], packed.reshape(-1)
        values = row[: n * k // 2].reshape(n, k // 4, 2)
        bits = row[n * k // 2 :].view(torch.uint8).to(torch.int64).reshape(n, k // 8, 1)
        places = torch.cat([(bits >> (2 * at)) & 3 for at in range(4)], dim=-1).reshape(n, k // 4, 2)
        return torch.zeros(n, k // 4, 4, dtype=torch.int8).scatter_(-1, places, values).reshape(n, k)

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
        """int32 sums; scale and bias in float32; INT8 rounds to the nearest, halves to even, and is clipped."""
        import torch

        rows, k = x.shape
        if x.dtype is not torch.int8 or rows < LEAST or rows % ROWS_STEP or k % MATRIX_STEP:
            raise EngineError(f"cuSPARSELt takes no operand {x.dtype} of {rows} x {k}")
        weight = self.decompress(packed, k)
        exact = x.to(torch.int64) @ weight.to(torch.int64).t()
        if out is torch.int32:
            return _written(exact.to(torch.int32), transposed)
        for vector in (alpha, bias):
            if vector is not None and vector.numel() != weight.shape[0]:
                raise EngineError(f"a vector of {vector.numel()} for {weight.shape[0]} output channels")
        if alpha is not None and alpha.dtype is not torch.float32:
            raise EngineError(f"alpha is {alpha.dtype}, and must be float32")
        expected = torch.float32 if out is torch.int8 else out
        if bias is not None and bias.dtype is not expected:
            raise EngineError(f"the bias of {out} must be {expected}, got {bias.dtype}")
        y = exact.float() * (1.0 if alpha is None else alpha) + (0.0 if bias is None else bias.float())
        return _written(y.round().clamp(-128, 127).to(torch.int8) if out is torch.int8 else y.to(out), transposed)

    def search(
        self,
        packed: Tensor,
        x: Tensor,
        out: torch.dtype,
        alpha: Tensor | None,
        bias: Tensor | None,
        *,
        transposed: bool,
    ) -> int:
        """There is one algorithm."""
        return 0

    def dense(self, x: Tensor, weight: Tensor) -> Tensor:
        """Exact."""
        import torch

        if x.shape[0] <= _INT_MM_ROWS or x.shape[1] % 8 or weight.shape[0] % 8:
            raise EngineError(f"_int_mm takes no {tuple(x.shape)} times {tuple(weight.shape)}")
        return (x.to(torch.int64) @ weight.to(torch.int64).t()).to(torch.int32)

    def microseconds(self, calls: Sequence[Callable[[], Tensor]]) -> list[Taken]:
        """One run of each by the wall clock: it means nothing."""
        return [Taken(1e3 * self.milliseconds(call), in_graph=True) for call in calls]

    def milliseconds(self, run: Callable[[], object]) -> float:
        """One run by the wall clock: it means nothing."""
        began = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - began)

    def capture(self, call: Callable[[], dict[str, Tensor]]) -> tuple[Callable[[], None], dict[str, Tensor]] | None:
        """What a CUDA graph does: repeat the call on the memory that it had, and write where it wrote."""
        made = call()

        def replay() -> None:
            for name, tensor in call().items():
                made[name].copy_(tensor)

        return replay, made

    def compile(self, function: Function) -> Function:
        """As it is."""
        return function

    def synchronize(self) -> None:
        """Nothing is ever behind."""

    def _require_matrix(self, weight: Tensor) -> None:
        import torch

        n, k = weight.shape
        if weight.dtype is not torch.int8 or n % MATRIX_STEP or k % MATRIX_STEP or not weight.is_contiguous():
            raise EngineError(f"cuSPARSELt takes no matrix {weight.dtype} of {n} x {k}")


def _written(y: Tensor, transposed: bool) -> Tensor:
    """(M, N) as a kernel leaves it in memory: without `transposed` it wrote (N, M)."""
    return y if transposed else y.t().contiguous().t()
