"""One post-norm encoder layer in every type: FP16, FP8 dense, INT8 dense, INT8 2:4 with int32 output and with FP16
output.

INT8 dense is `_int_mm`, with scale and bias in a second kernel; "int8 2:4, int32" has the same second kernel, "int8
2:4" has scale and bias inside the product. What stands between the products is compiled once, so that all run the same
kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from tools.gpu.cusparselt.gemms import fp8_product
from tools.gpu.cusparselt.products import Algorithm, Products, pruned
from tools.gpu.cusparselt.timing import Problem, Timer

FP16, FP8, INT8, SPARSE, SPARSE_I32 = "fp16", "fp8", "int8", "int8 2:4", "int8 2:4, int32"
COMPARED = ((SPARSE, INT8), (SPARSE_I32, INT8), (INT8, FP16), (FP8, FP16))
PROFILED_AT = 4096
ACTIVATION_SCALE = 1 / 32.0
Product = Callable[[str, Tensor], Tensor]


@dataclass
class LayerTimes:
    """What one layer came to, by way: times, the relative error of one way against another, and speed-ups."""

    model: str
    batch: int
    length: int
    microseconds: dict[str, float] = field(default_factory=dict)
    eager: dict[str, float] = field(default_factory=dict)
    timed_by: dict[str, str] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    speedups: dict[str, float] = field(default_factory=dict)
    parts: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    seconds: float | None = None

    @property
    def rows(self) -> int:
        """Tokens of a batch."""
        return self.batch * self.length


def quantize(x: Tensor, scale: float) -> Tensor:
    return (x * (1 / scale)).round().clamp(-128, 127).to(torch.int8)


def quantize_fp8(x: Tensor, scale: float) -> Tensor:
    return (x * (1 / scale)).clamp(-448, 448).to(torch.float8_e4m3fn)


def gelu(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


def gelu_quantize(x: Tensor, scale: float) -> Tensor:
    return quantize(gelu(x), scale)


def gelu_quantize_fp8(x: Tensor, scale: float) -> Tensor:
    return quantize_fp8(gelu(x), scale)


def add_norm(x: Tensor, residual: Tensor, gain: Tensor, offset: Tensor) -> Tensor:
    return functional.layer_norm(x + residual, gain.shape, gain, offset)


def norm_quantize(x: Tensor, residual: Tensor, gain: Tensor, offset: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    y = add_norm(x, residual, gain, offset)
    return y, quantize(y, scale)


def norm_quantize_fp8(x: Tensor, residual: Tensor, gain: Tensor, offset: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    y = add_norm(x, residual, gain, offset)
    return y, quantize_fp8(y, scale)


def dequantize(exact: Tensor, alpha: Tensor, bias: Tensor) -> Tensor:
    return (exact.float() * alpha + bias).to(bias.dtype)


class Compiled:
    """A function through ``torch.compile``, or as it is where that fails."""

    def __init__(self, function: Callable[..., Tensor], problems: list[Problem]) -> None:
        self.function, self.problems = function, problems
        torch._dynamo.config.recompile_limit = 64
        self._fast: Callable[..., Tensor] | None = torch.compile(function)

    def __call__(self, *arguments: object) -> Tensor:
        if self._fast is not None:
            try:
                return self._fast(*arguments)
            except Exception as error:
                self.problems.append(Problem.of(f"compiling {self.function.__name__}", error))
                self._fast = None
        return self.function(*arguments)


class LayerBench:
    """Random weights, 2:4 and INT8, of a layer's products, and the layer in every way."""

    def __init__(self, products: Products, timer: Timer, hidden: int, wide: int, times: LayerTimes) -> None:
        self.products, self.timer, self.times = products, timer, times
        device, generator = products.device, torch.Generator(device=products.device).manual_seed(0)
        self.hidden, self.heads = hidden, 12 if hidden == 384 else hidden // 64
        self.float = torch.float32 if products.rehearsed else torch.float16
        sizes = {"qkv": (3 * hidden, hidden), "out": (hidden, hidden), "up": (wide, hidden), "down": (hidden, wide)}
        self.sizes = sizes
        self.steps = {name: 1.0 / (127 * math.sqrt(shape[1] / 2)) for name, shape in sizes.items()}
        self.weights = {
            name: pruned(torch.randint(-127, 128, shape, device=device, dtype=torch.int8, generator=generator))
            for name, shape in sizes.items()
        }
        raw = {name: 0.1 * torch.randn(shape[0], device=device, generator=generator) for name, shape in sizes.items()}
        self.bias_inside = products.rehearsed or products.choices["float16"].bias is not None
        dtype = products.choices["float16"].bias or "float32"
        self.biases = {name: bias.to(self.float) for name, bias in raw.items()}
        self.product_biases = {name: products.vector(bias, dtype) for name, bias in raw.items()}
        self.alphas = {
            name: torch.full((shape[0],), self.steps[name] * ACTIVATION_SCALE, device=device)
            for name, shape in sizes.items()
        }
        self.gain = torch.ones(hidden, device=device, dtype=self.float)
        self.offset = torch.zeros(hidden, device=device, dtype=self.float)
        self.x = torch.randn(times.rows, hidden, device=device, generator=generator).to(self.float)
        self._functions: dict[str, Callable[..., Tensor]] = {}

    def run(self) -> None:
        """Time every way and compare their results; a way that fails is a result, too."""
        results: dict[str, Tensor] = {}
        with torch.no_grad():
            ways = self._ways()
            for way, (call, kind) in ways.items():
                try:
                    results[way] = call().float()
                    timing = self.timer.time(f"{kind} layer", [call])
                    self.times.microseconds[way] = round(timing.microseconds, 1)
                    self.times.eager[way] = round(timing.eager, 1)
                    self.times.timed_by[way] = timing.how
                except Exception as error:
                    self.times.failed[way] = Problem.of(way, error).error
            for way, reference in COMPARED:
                if way in results and reference in results:
                    difference = (results[way] - results[reference]).norm() / results[reference].norm()
                    self.times.errors[f"{way} against {reference}"] = round(float(difference), 5)
            if SPARSE in self.times.microseconds and self.times.rows == PROFILED_AT:
                self._parts(ways[SPARSE][0])
        times = self.times.microseconds
        for way in (SPARSE, SPARSE_I32, INT8):
            for reference in (FP16, FP8, INT8):
                if way != reference and way in times and reference in times:
                    self.times.speedups[f"{way} over {reference}"] = round(times[reference] / times[way], 3)

    def _ways(self) -> dict[str, tuple[Callable[[], Tensor], str]]:
        """Every way as a call of the whole layer, and the library that its products come from."""
        products = self.products
        compressed = {name: products.compress(weight) for name, weight in self.weights.items()}
        algorithms = {name: self._algorithms(name, compressed[name]) for name in self.sizes}
        exact, half = "int32", "float16"

        def dense(name: str, x: Tensor) -> Tensor:
            return self._dequantize(products.int_mm(x, self.weights[name]), name)

        def sparse_exact(name: str, x: Tensor) -> Tensor:
            y = products.sparse(compressed[name], x, exact, algorithm=algorithms[name][exact])
            return self._dequantize(y, name)

        def sparse(name: str, x: Tensor) -> Tensor:
            bias = self.product_biases[name] if self.bias_inside else None
            algorithm = algorithms[name][half]
            y = products.sparse(compressed[name], x, half, self.alphas[name], bias, algorithm).to(self.float)
            return y if self.bias_inside else y + self.biases[name]

        ways = {
            FP16: (self._float(), "cublas"),
            INT8: (self._integer(dense), "cublas"),
            SPARSE: (self._integer(sparse), "cusparselt"),
            SPARSE_I32: (self._integer(sparse_exact), "cusparselt"),
        }
        if not products.rehearsed:
            ways[FP8] = (self._fp8(), "cublas")
        return ways

    def _algorithms(self, name: str, compressed: Tensor) -> dict[str, Algorithm]:
        zeros = torch.zeros(self.times.rows, self.sizes[name][1], device=self.products.device, dtype=torch.int8)
        bias = self.product_biases[name] if self.bias_inside else None
        return {
            "int32": self.products.search(compressed, zeros, "int32"),
            "float16": self.products.search(compressed, zeros, "float16", self.alphas[name], bias),
        }

    def _float(self) -> Callable[[], Tensor]:
        weights = {name: (w.float() * self.steps[name]).to(self.float) for name, w in self.weights.items()}
        norm, activation = self._function(add_norm), self._function(gelu)

        def linear(name: str, x: Tensor) -> Tensor:
            return functional.linear(x, weights[name], self.biases[name])

        def layer() -> Tensor:
            attended = norm(linear("out", self._attend(linear("qkv", self.x))), self.x, self.gain, self.offset)
            inner = activation(linear("up", attended))
            return norm(linear("down", inner), attended, self.gain, self.offset)

        return layer

    def _integer(self, product: Product) -> Callable[[], Tensor]:
        return self._eight_bits(product, quantize(self.x, ACTIVATION_SCALE), (quantize, gelu_quantize, norm_quantize))

    def _fp8(self) -> Callable[[], Tensor]:
        weights = {name: w.float().to(torch.float8_e4m3fn) for name, w in self.weights.items()}
        scale = torch.full((), ACTIVATION_SCALE, device=self.products.device)
        steps = {name: torch.full((), step, device=self.products.device) for name, step in self.steps.items()}

        def product(name: str, x: Tensor) -> Tensor:
            return fp8_product(x, weights[name], scale, steps[name], self.biases[name])

        start = quantize_fp8(self.x, ACTIVATION_SCALE)
        return self._eight_bits(product, start, (quantize_fp8, gelu_quantize_fp8, norm_quantize_fp8))

    def _eight_bits(
        self, product: Product, start: Tensor, between: tuple[Callable[..., object], ...]
    ) -> Callable[[], Tensor]:
        """The layer on quantized inputs; `between` quantizes a value, one behind GELU, and one behind the norm."""
        to_eight, gelu_to_eight, norm_to_eight = (self._function(function) for function in between)
        scale, gain, offset = ACTIVATION_SCALE, self.gain, self.offset

        def layer() -> Tensor:
            attended = self._attend(product("qkv", start))
            residual, eight = norm_to_eight(product("out", to_eight(attended, scale)), self.x, gain, offset, scale)
            inner = gelu_to_eight(product("up", eight), scale)
            return norm_to_eight(product("down", inner), residual, gain, offset, scale)[0]

        return layer

    def _attend(self, qkv: Tensor) -> Tensor:
        batch, length = self.times.batch, self.times.length
        parts = qkv.view(batch, length, 3, self.heads, self.hidden // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = parts.unbind(0)  # (batch, heads, length, width)
        attended = functional.scaled_dot_product_attention(query, key, value)
        return attended.transpose(1, 2).reshape(self.times.rows, self.hidden)

    def _dequantize(self, exact: Tensor, name: str) -> Tensor:
        return self._function(dequantize)(exact, self.alphas[name], self.biases[name])

    def _function(self, function: Callable[..., object]) -> Callable[..., Tensor]:
        name = function.__name__
        if name not in self._functions:
            plain: Callable[..., Tensor] = function  # type: ignore[assignment]  # or a pair of tensors
            self._functions[name] = plain if self.products.rehearsed else Compiled(plain, self.products.problems)
        return self._functions[name]

    def _parts(self, call: Callable[[], Tensor]) -> None:
        """Microseconds by kernel, the fourteen largest."""
        total: dict[str, float] = {}
        for name, microseconds in self.timer.kernel_times(call):
            total[name[:90]] = round(total.get(name[:90], 0.0) + microseconds, 1)
        self.times.parts = dict(sorted(total.items(), key=lambda item: -item[1])[:14])
