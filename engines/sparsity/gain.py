"""Will 2:4 pay on this GPU? Bounds and estimates from data sheets; nothing is measured, and nothing needs a GPU.

A roofline: a step takes at least as long as its operations need at the peak, and as long as its bytes need at the
memory's speed. From that follow numbers that are kept apart:

*bound*: by how much the product that gains most can gain. It holds however slow everything is, as long as a sparse
kernel comes no nearer to its limit than the dense one to its own, and the cache holds no larger share of the 2:4
weights than of the dense ones. It is taken to hold activations, and of the weights as much as fits.

*estimate*: the pass as a whole with every step at its limit, twice: with all tensors read from and written to the
memory, and with what fits kept in the cache. Where products are slower than their limit and the rest is not, the gain
is above it; where sparse kernels are slower, below.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from engines.sparsity.gpu_figures import GpuFigures
from engines.sparsity.workload import Step, WeightProduct, Workload

FP16, INT8, SPARSE = "fp16", "int8", "sparse"
_KINDS = (FP16, INT8, SPARSE)
# Bytes of a weight: of 2:4 INT8 half of the values, and two bits of index for each.
_WEIGHT_BYTES = {FP16: 2.0, INT8: 1.0, SPARSE: 0.625}
_ACTIVATION_BYTES = {FP16: 2, INT8: 1, SPARSE: 1}


@dataclass(frozen=True)
class ProductTimes:
    """One product at its limit, in microseconds a run, and what limits it at 2:4: arithmetic, weights (reading them) or
    activations (reading and writing them)."""

    name: str
    k: int
    n: int
    runs: int
    fp16_us: float
    int8_us: float
    sparse_us: float
    sparse_limit: str


@dataclass(frozen=True)
class GainBound:
    """Speed-up over dense INT8 that cannot be exceeded, on the module's conditions, and the number of tokens from which
    on arithmetic takes longer than reading the weights: of 2:4 products, and of dense INT8 ones."""

    speedup: float
    arithmetic_from_tokens: int
    dense_arithmetic_from_tokens: int


@dataclass(frozen=True)
class PassEstimate:
    """A pass with every step at its limit, in milliseconds. `product_share` is that of products with weights in the
    dense INT8 pass; where the rest of the pass is not known it is None, and the times are those of the products."""

    fp16_ms: float
    int8_ms: float
    sparse_ms: float
    product_share: float | None
    products: tuple[ProductTimes, ...]

    @property
    def speedup(self) -> float:
        """Dense INT8 over 2:4."""
        return self.int8_ms / self.sparse_ms


@dataclass(frozen=True)
class GainEstimate:
    """A pass with all tensors in the `memory`, and one with what fits in the `cache`."""

    memory: PassEstimate
    cache: PassEstimate


def gain_bound(work: Workload, gpu: GpuFigures) -> GainBound:
    """What no engine on this GPU exceeds (see the module), at most 2."""
    limits = _Limits(work, gpu, cached=True)

    def least(product: WeightProduct, kind: str) -> float:
        return max(limits.arithmetic(product, kind), limits.weights(product, kind))

    gains = [least(product, INT8) / least(product, SPARSE) for product in work.products if product.can_be_sparse]
    return GainBound(max(gains, default=1.0), _arithmetic_from(gpu, SPARSE), _arithmetic_from(gpu, INT8))


def gain_estimate(work: Workload, gpu: GpuFigures) -> GainEstimate:
    """The pass at its limits (see the module)."""
    return GainEstimate(_Limits(work, gpu, cached=False).estimate(), _Limits(work, gpu, cached=True).estimate())


def _arithmetic_from(gpu: GpuFigures, kind: str) -> int:
    """Tokens: a weight costs two operations for each, and is read once."""
    return math.ceil(_WEIGHT_BYTES[kind] / (gpu.memory_gb_per_second * 1e9) * _peak(gpu, kind) / 2)


def _peak(gpu: GpuFigures, kind: str) -> float:
    """Operations a second; those that 2:4 leaves out count."""
    return {FP16: gpu.fp16_tflops, INT8: gpu.int8_tops, SPARSE: 2 * gpu.int8_tops}[kind] * 1e12


@dataclass(frozen=True)
class _Limits:
    """Seconds that the steps of a pass take at least; a kind is FP16, INT8 or SPARSE."""

    work: Workload
    gpu: GpuFigures
    cached: bool

    def arithmetic(self, product: WeightProduct, kind: str) -> float:
        return 2 * self.work.tokens * product.k * product.n / _peak(self.gpu, kind)

    def weights(self, product: WeightProduct, kind: str) -> float:
        """What the cache holds is free: of any kind the share that it can hold of 2:4 weights."""
        fits = self.gpu.cache_mb * 1e6 / (_WEIGHT_BYTES[SPARSE] * self.work.weights)
        read = 1 - min(1.0, fits) if self.cached else 1.0
        return self._memory(read * _WEIGHT_BYTES[kind] * product.k * product.n)

    def activations(self, product: WeightProduct, kind: str) -> float:
        return self._moved(_ACTIVATION_BYTES[kind] * self.work.tokens * (product.k + product.n))

    def product(self, product: WeightProduct, kind: str) -> float:
        kind = _runs_as(product, kind)
        memory = self.weights(product, kind) + self.activations(product, kind)
        return max(self.arithmetic(product, kind), memory)

    def step(self, step: Step, kind: str) -> float:
        moved = step.fp16_bytes if kind == FP16 else step.int8_bytes
        return step.runs * max(step.operations / _peak(self.gpu, FP16), self._moved(moved))

    def estimate(self) -> PassEstimate:
        work = self.work
        products = {kind: sum(p.runs * self.product(p, kind) for p in work.products) for kind in _KINDS}
        total = {kind: products[kind] + sum(self.step(s, kind) for s in work.steps or ()) for kind in _KINDS}
        return PassEstimate(
            1e3 * total[FP16],
            1e3 * total[INT8],
            1e3 * total[SPARSE],
            None if work.steps is None else products[INT8] / total[INT8],
            tuple(map(self.times, work.products)),
        )

    def times(self, product: WeightProduct) -> ProductTimes:
        fp16, int8, sparse = (1e6 * self.product(product, kind) for kind in _KINDS)
        return ProductTimes(product.name, product.k, product.n, product.runs, fp16, int8, sparse, self.limit(product))

    def limit(self, product: WeightProduct) -> str:
        """What takes the most time at 2:4."""
        kind = _runs_as(product, SPARSE)
        weights, activations = self.weights(product, kind), self.activations(product, kind)
        if self.arithmetic(product, kind) >= weights + activations:
            return "arithmetic"
        return "weights" if weights >= activations else "activations"

    def _moved(self, bytes_: float) -> float:
        """Of what a step reads and writes."""
        return 0.0 if self.cached and bytes_ <= self.gpu.cache_mb * 1e6 else self._memory(bytes_)

    def _memory(self, bytes_: float) -> float:
        return bytes_ / (self.gpu.memory_gb_per_second * 1e9)


def _runs_as(product: WeightProduct, kind: str) -> str:
    return INT8 if kind == SPARSE and not product.can_be_sparse else kind
