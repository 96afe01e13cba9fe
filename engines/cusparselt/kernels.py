"""The few operations that need a GPU, behind one protocol, so that all around them can be tested without one.

`CudaKernels` calls torch: ``_cslt_compress`` and ``_cslt_sparse_mm`` (cuSPARSELt), ``_int_mm`` (cuBLASLt). What is
known of them, of torch 2.11: sizes are multiples of 16 or 32 and at least 32; the scale `alpha` is float32, one for
each output channel; the bias has the type of the output, and float32 for INT8 and int32. Nothing checks that, so every
form is tried against exact integers when an engine is built (`engines.cusparselt.choosing`).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from engines.cusparselt.capturing import capturing
from engines.cusparselt.fusing import Function
from nxm_export.errors import EngineError, notice

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.cuda import _POOL_HANDLE

LEAST, ROWS_STEP, MATRIX_STEP = 32, 16, 32  # of a product's sizes
CALLS, REPLAYS = 8, 15  # in a CUDA graph that is timed, and of it
WARM_UP_S = 0.3  # an idle GPU raises its clocks over some tenths of a second
Call = Callable[[], "Tensor"]


@dataclass(frozen=True)
class Form:
    """How a sparse product is asked for. `fused`: scale, bias and rounding are the kernel's, else it gives int32 and
    torch does the rest. `transposed`: the kernel writes (rows, N) itself. `float_bias`: its bias is float32 where the
    output is another float type."""

    fused: bool
    transposed: bool
    float_bias: bool = False

    def __str__(self) -> str:
        parts = ["sparse", "fused" if self.fused else "int32", "(M, N)" if self.transposed else "(N, M)"]
        return " ".join(parts + ["float32 bias"] * self.float_bias)


DENSE = "dense"  # the form that is no `Form`: `_int_mm`, then torch
FORMS = {
    str(form): form
    for form in (
        Form(True, True),
        Form(True, False),
        Form(True, True, True),
        Form(False, True),
        Form(False, False),
    )
}


@dataclass(frozen=True)
class Taken:
    """Microseconds of one call on the device; `in_graph` says that a CUDA graph replayed it, else the host's launches
    are in it."""

    microseconds: float
    in_graph: bool


class Kernels(Protocol):
    """What an engine runs on."""

    @property
    def device(self) -> str:
        """torch's name of the device that holds the tensors."""
        ...

    @property
    def kind(self) -> Literal["gpu", "stand-in"]:
        """What is behind it; nothing on a stand-in is evidence of anything on a GPU."""
        ...

    def compress(self, weight: Tensor) -> Tensor:
        """An INT8 matrix (N, K) that is 2:4 along K, in the form that `sparse` takes."""
        ...

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
        """The compressed matrix (N, K) times `x` (M, K), both INT8, as (M, N)."""
        ...

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
        """cuSPARSELt's fastest algorithm for a product of these sizes."""
        ...

    def dense(self, x: Tensor, weight: Tensor) -> Tensor:
        """(M, K) times (N, K), both INT8, exact int32 (M, N)."""
        ...

    def microseconds(self, calls: Sequence[Call]) -> list[Taken]:
        """The time of each call on the device, all measured side by side."""
        ...

    def milliseconds(self, run: Callable[[], object]) -> float:
        """The time of one run on the device."""
        ...

    def capture(self, call: Callable[[], dict[str, Tensor]]) -> tuple[Callable[[], None], dict[str, Tensor]] | None:
        """A function that repeats `call` on the same memory, and the tensors it writes; None where there is no such
        thing."""
        ...

    def compile(self, function: Function) -> Function:
        """The same function, in fewer kernels where that can be."""
        ...

    def synchronize(self) -> None:
        """Wait for the device."""
        ...


class CudaKernels:
    """torch's operations on the first NVIDIA GPU."""

    device = "cuda"
    kind: Literal["gpu", "stand-in"] = "gpu"
    _told = False
    _handle: _POOL_HANDLE | None = None

    def compress(self, weight: Tensor) -> Tensor:
        """By cuSPARSELt."""
        import torch

        return torch._cslt_compress(weight)

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
        """By cuSPARSELt, which computes weight @ x.T."""
        import torch

        y = torch._cslt_sparse_mm(
            packed,
            x.t(),
            bias=bias,
            alpha=alpha,
            out_dtype=None if out is torch.int8 else out,  # its own type must be left out
            transpose_result=transposed,
            alg_id=algorithm,
        )
        return y if transposed else y.t()

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
        """By cuSPARSELt; 0, its default, where the search fails."""
        import torch

        try:
            return int(
                torch._cslt_sparse_mm_search(
                    packed,
                    x.t(),
                    bias=bias,
                    alpha=alpha,
                    out_dtype=None if out is torch.int8 else out,
                    transpose_result=transposed,
                )
            )
        except RuntimeError as error:
            raise_if_lost(error)
            return 0

    def dense(self, x: Tensor, weight: Tensor) -> Tensor:
        """By cuBLASLt."""
        import torch

        return torch._int_mm(x, weight.t())

    def microseconds(self, calls: Sequence[Call]) -> list[Taken]:
        """Medians of replays of CUDA graphs with `CALLS` calls each; of eager launches where one cannot be captured.

        All run in turns, first until the clocks are up: what is measured first would be slow, and what comes next fast
        by that alone."""
        many = [_repeated(call) for call in calls]
        captured = [self.capture(run) for run in many]
        runs: list[Callable[[], object]] = [
            run if held is None else held[0] for run, held in zip(many, captured, strict=True)
        ]
        began = time.perf_counter()
        while time.perf_counter() - began < WARM_UP_S:
            for run in runs:
                self.milliseconds(run)
        taken: list[list[float]] = [[] for _ in runs]
        for replay in range(REPLAYS):
            for turn in range(len(runs)):
                at = (replay + turn) % len(runs)
                taken[at].append(1e3 * self.milliseconds(runs[at]) / CALLS)
        return [Taken(statistics.median(each), held is not None) for each, held in zip(taken, captured, strict=True)]

    def milliseconds(self, run: Callable[[], object]) -> float:
        """Between two CUDA events."""
        import torch

        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    def capture(self, call: Callable[[], dict[str, Tensor]]) -> tuple[Callable[[], None], dict[str, Tensor]] | None:
        """A CUDA graph, after a run on a side stream; None where something in it cannot be captured."""
        import torch

        try:
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                call()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with capturing(graph, self._pool()):
                made = call()
        except RuntimeError as error:
            raise_if_lost(error)
            return None
        return graph.replay, made

    def compile(self, function: Function) -> Function:
        """By torch.compile; what it cannot compile here runs as it is, and that is said once."""
        import torch

        compiled: Function | None = torch.compile(function)

        def run(*arguments: Tensor) -> tuple[Tensor, ...]:
            nonlocal compiled
            if compiled is not None:
                try:
                    return compiled(*arguments)
                except Exception as error:  # of compilers, as many types as there are
                    raise_if_lost(error)
                    compiled = None
                    self._tell(error)
            return function(*arguments)

        return run

    def _pool(self) -> _POOL_HANDLE:
        """One pool of memory for all graphs: they run one after the other, and what one wrote is read before the
        next."""
        import torch

        if self._handle is None:
            self._handle = torch.cuda.graph_pool_handle()
        return self._handle

    def _tell(self, error: Exception) -> None:
        if not self._told:
            self._told = True
            reason = str(error).strip().splitlines()
            notice(
                "torch cannot compile what lies between products here, so that it runs in more kernels "
                f"({type(error).__name__}: {reason[0][:200] if reason else ''}); --no-fuse does not try"
            )

    def synchronize(self) -> None:
        """Wait for the GPU."""
        import torch

        torch.cuda.synchronize()


def _repeated(call: Call) -> Callable[[], dict[str, Tensor]]:
    """`CALLS` calls in a row; the last result."""

    def run() -> dict[str, Tensor]:
        for _ in range(CALLS - 1):
            call()
        return {"": call()}

    return run


_LOST = ("illegal memory", "launch failure", "device-side assert", "misaligned address", "illegal instruction")


def raise_if_lost(error: Exception) -> None:
    """Raise `EngineError` for an error of CUDA after which nothing can run in this process."""
    if any(text in str(error) for text in _LOST):
        raise EngineError(f"the GPU stopped this process: {str(error)[:200]}; start again") from error
