"""One matrix product of an encoder in every type: FP16, FP8 and INT8 dense, INT8 and FP16 2:4; microseconds and errors.

`_int_mm` writes int32 and leaves scale and bias to a second kernel: "int8 2:4, int32" is its like-for-like partner. FP8
dense has the same peak with scale and bias inside, and stands for an INT8 dense product that has its epilogue inside.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from tools.gpu.cusparselt.products import INT8_UNIT, Algorithm, Example, Products, relative_error
from tools.gpu.cusparselt.timing import Call, Problem, Timer

PEAK = {"int8 dense": 1979e12, "int8 2:4": 3958e12}  # operations a second of an H100 SXM, by its data sheet
BANDWIDTH = 3.35e12  # bytes a second
FP16, FP8, INT8, SPARSE, SPARSE_F16, SPARSE_I8 = (
    "fp16 dense", "fp8 dense", "int8 dense, int32", "int8 2:4, int32", "int8 2:4, fp16", "int8 2:4, int8",
)  # fmt: skip
FP16_SPARSE, DEFAULT_ALGORITHM = "fp16 2:4", "int8 2:4, int32, default algorithm"
LEAST_GAIN = 1.03  # times faster: medians of few replays show less by chance
RIGHT = 0.02  # the largest relative error of a form that counts
ON_DEVICE = ("graph", "profiler")  # clocks without the host's launches
PROFILED_AT = 4096  # rows at which kernel names are asked for


@dataclass
class Gemm:
    """What one product came to, by way: times, deviations (int32: wrong elements; else relative errors), algorithms."""

    model: str
    name: str
    m: int
    n: int
    k: int
    copies: int = 0
    microseconds: dict[str, float] = field(default_factory=dict)
    eager: dict[str, float] = field(default_factory=dict)
    timed_by: dict[str, str] = field(default_factory=dict)
    deviations: dict[str, float] = field(default_factory=dict)
    algorithms: dict[str, Algorithm] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    kernels: dict[str, list[str]] = field(default_factory=dict)
    tflops: dict[str, float] = field(default_factory=dict)
    floor_microseconds: dict[str, float] = field(default_factory=dict)
    seconds: float | None = None


def products_of(hidden: int, wide: int) -> dict[str, tuple[int, int]]:
    """(N, K) of an encoder layer's products."""
    return {"ffn-up": (wide, hidden), "ffn-down": (hidden, wide), "qkv": (3 * hidden, hidden), "proj": (hidden, hidden)}


class GemmBench:
    """Measures one product in every way, into `gemm`; a way that fails is a result, too."""

    def __init__(self, products: Products, timer: Timer, gemm: Gemm, flush: Callable[[], None]) -> None:
        self.products, self.timer, self.gemm, self.flush = products, timer, gemm, flush
        m, n, k = gemm.m, gemm.n, gemm.k
        gemm.copies = 1 if products.rehearsed else max(1, min(timer.calls, math.ceil(120e6 / (m * k + n * k))))
        self.example = Example.random(products, m, n, k, gemm.copies)
        self.compressed = [products.compress(weight) for weight in self.example.weights]

    def run(self) -> None:
        """All ways; int32 results are compared exactly, and a corner of `_int_mm` with float64 on the CPU."""
        example, products = self.example, self.products
        x, weight = example.xs[0], example.weights[0]
        corner = (x[:64].cpu().double() @ weight[:64].cpu().double().T).round().to(torch.int32)
        self.gemm.deviations["int_mm against float64"] = float((example.exact[:64, :64].cpu() != corner).sum())
        halves = [(value.half() / 127).contiguous() for value in example.xs]
        half_weights, half_bias = [value.half() / 127 for value in example.weights], example.bias.half()
        self._time(FP16, lambda i: lambda: functional.linear(halves[i], half_weights[i], half_bias))
        self._time(INT8, lambda i: lambda: products.int_mm(example.xs[i], example.weights[i]))
        calls: dict[str, Call] = {
            FP16: lambda: functional.linear(halves[0], half_weights[0], half_bias),
            INT8: lambda: products.int_mm(x, weight),
        }
        calls[SPARSE] = self._sparse(SPARSE, "int32", None, None)
        if self.gemm.algorithms[SPARSE]:
            compressed = self.compressed
            self._time(
                DEFAULT_ALGORITHM,
                lambda i: lambda: products.sparse(compressed[i], example.xs[i], "int32"),
                self._wrong,
                kind="cusparselt",
            )
        unit = INT8_UNIT(self.gemm.k)
        calls[SPARSE_F16] = self._sparse(SPARSE_F16, "float16", example.alpha, example.bias)
        calls[SPARSE_I8] = self._sparse(SPARSE_I8, "int8", example.alpha * unit, example.bias * 10)
        if not products.rehearsed:
            self._fp16_sparse(halves, half_weights)
            self._fp8(halves, half_weights, half_bias)
            if self.gemm.m == PROFILED_AT:
                self._name_kernels(calls)
        self._rates()

    def _time(
        self,
        way: str,
        call_of: Callable[[int], Call],
        deviation: Callable[[Tensor], float] | None = None,
        kind: str = "cublas",
    ) -> None:
        try:
            calls = [call_of(number) for number in range(self.gemm.copies)]
            if deviation is not None:
                result = calls[0]()
                assert isinstance(result, Tensor)
                self.gemm.deviations[way] = deviation(result)
            timing = self.timer.time(kind, calls)
            self.gemm.microseconds[way] = round(timing.microseconds, 2)
            self.gemm.eager[way] = round(timing.eager, 2)
            self.gemm.timed_by[way] = timing.how
        except Exception as error:
            self._fail(way, error)
        self.flush()

    def _sparse(self, way: str, output: str, alpha: Tensor | None, raw_bias: Tensor | None) -> Call:
        products, example, dtype = self.products, self.example, self.products.choices[output].bias
        bias = None if raw_bias is None or dtype is None else products.vector(raw_bias, dtype)
        applied = None if bias is None else raw_bias
        try:
            self.gemm.algorithms[way] = products.search(self.compressed[0], example.xs[0], output, alpha, bias)
        except Exception as error:
            self.gemm.algorithms[way] = {}
            self._fail(f"search: {way}", error)
        algorithm = self.gemm.algorithms[way]

        def call_of(number: int) -> Call:
            weight, x = self.compressed[number], example.xs[number]
            return lambda: products.sparse(weight, x, output, alpha, bias, algorithm)

        def deviation(y: Tensor) -> float:
            return self._wrong(y) if output == "int32" else round(relative_error(y, example.exact, alpha, applied), 6)

        self._time(way, call_of, deviation, kind="cusparselt")
        return call_of(0)

    def _fp16_sparse(self, halves: list[Tensor], half_weights: list[Tensor]) -> None:
        products = self.products
        try:
            compressed = [products.compress(weight) for weight in half_weights]
            algorithm = self.gemm.algorithms[FP16_SPARSE] = products.search(compressed[0], halves[0], "float16")
        except Exception as error:
            self._fail(FP16_SPARSE, error)
            return
        self._time(
            FP16_SPARSE,
            lambda i: lambda: products.sparse(compressed[i], halves[i], "float16", algorithm=algorithm),
            kind="cusparselt",
        )

    def _fp8(self, halves: list[Tensor], half_weights: list[Tensor], bias: Tensor) -> None:
        try:
            eights = [value.to(torch.float8_e4m3fn) for value in halves]
            eight_weights = [value.to(torch.float8_e4m3fn) for value in half_weights]
        except Exception as error:
            self._fail(FP8, error)
            return
        one = torch.ones((), device=self.products.device)
        self._time(FP8, lambda i: lambda: fp8_product(eights[i], eight_weights[i], one, one, bias))

    def _name_kernels(self, calls: dict[str, Call]) -> None:
        for way, call in calls.items():
            if way in self.gemm.microseconds:
                try:
                    self.gemm.kernels[way] = sorted({name for name, _ in self.timer.kernel_times(call)})
                except RuntimeError as error:
                    self._fail(f"kernels: {way}", error)

    def _rates(self) -> None:
        m, n, k = self.gemm.m, self.gemm.n, self.gemm.k
        operations, bytes_in = 2.0 * m * n * k, m * k + n * k
        for way, microseconds in self.gemm.microseconds.items():
            self.gemm.tflops[way] = round(operations / max(microseconds, 0.01) / 1e6, 1)
        for way, traffic in (("int8 2:4", m * k + n * k * 0.625 + 2 * m * n), ("int8 dense", bytes_in + 2 * m * n)):
            self.gemm.floor_microseconds[way] = round(1e6 * max(operations / PEAK[way], traffic / BANDWIDTH), 2)

    def _wrong(self, y: Tensor) -> float:
        return float((y != self.example.exact).sum())

    def _fail(self, way: str, error: Exception) -> None:
        self.gemm.failed[way] = Problem.of(way, error).error


def gain(gemm: Gemm, way: str) -> float | None:
    """How many times faster a way is than the dense INT8 product; None where one of them is wrong, or both were not
    timed alike, without the host's launches."""
    sparse, dense = gemm.microseconds.get(way), gemm.microseconds.get(INT8)
    right = gemm.deviations.get(way, 1.0) <= (0 if way == SPARSE else RIGHT)  # NaN is not
    exact = gemm.deviations.get("int_mm against float64") == 0
    alike = gemm.timed_by.get(way) == gemm.timed_by.get(INT8) in ON_DEVICE
    return dense / sparse if sparse and dense and right and exact and alike else None


def verdict_rows(gemms: Sequence[Gemm]) -> list[list[str]]:
    """Of every product of every model: its name, K x N, the numbers of rows, from which of them on 2:4 pays, its
    largest gain over dense INT8, what it is over dense FP16 there, and the largest gain of forms with scale and bias
    inside."""
    grouped: dict[tuple[str, str], list[Gemm]] = {}
    for gemm in sorted(gemms, key=lambda gemm: gemm.m):
        grouped.setdefault((gemm.model, gemm.name), []).append(gemm)
    return [
        [f"{model} {name}", f"{of[0].k}x{of[0].n}", ", ".join(str(gemm.m) for gemm in of), pays(of), *_largest(of)]
        for (model, name), of in grouped.items()
    ]


def pays(gemms: Sequence[Gemm]) -> str:
    """From which number of rows on 2:4 pays, of one product at several numbers of rows in rising order."""
    gains = [(gemm.m, gain(gemm, SPARSE)) for gemm in gemms]
    known = [(m, faster) for m, faster in gains if faster is not None]
    if len(known) < len(gains):
        missing = ", ".join(str(m) for m, faster in gains if faster is None)
        return f"no verdict: at M {missing} one of the two is wrong, or has no time of the device alone"
    losing = max((m for m, faster in known if not faster >= LEAST_GAIN), default=0)
    beyond = [m for m, _ in known if m > losing]
    return f"from M = {beyond[0]} on" if beyond else f"no: not at M = {losing}"


def _largest(gemms: Sequence[Gemm]) -> list[str]:
    known = [(faster, gemm) for gemm in gemms if (faster := gain(gemm, SPARSE)) is not None]
    inside = [faster for gemm in gemms for way in (SPARSE_F16, SPARSE_I8) if (faster := gain(gemm, way)) is not None]
    shown = ["-", "-"]
    if known:
        faster, best = max(known, key=lambda pair: pair[0])
        half = best.microseconds.get(FP16) if best.timed_by.get(FP16) == best.timed_by[SPARSE] else None
        shown = [f"{faster:.2f}x at {best.m}", f"{half / best.microseconds[SPARSE]:.2f}x" if half else "-"]
    return [*shown, f"{max(inside):.2f}x" if inside else "-"]


def fp8_product(x: Tensor, weight: Tensor, scale_x: Tensor, scale_weight: Tensor, bias: Tensor) -> Tensor:
    """(M, K) FP8 times (N, K) FP8 with scales and bias inside, FP16."""
    y = torch._scaled_mm(
        x, weight.t(), scale_a=scale_x, scale_b=scale_weight, bias=bias, out_dtype=torch.float16, use_fast_accum=True
    )
    assert isinstance(y, Tensor)
    return y
