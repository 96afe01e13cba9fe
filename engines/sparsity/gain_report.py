"""The answer to "will 2:4 pay here?": kernels that exist, a bound, an estimate, and the verdict that they allow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from engines.sparsity.gain import GainBound, GainEstimate, gain_bound, gain_estimate
from engines.sparsity.gpu_figures import GpuFigures, figures_of
from engines.sparsity.kernel_names import Existence, sparse_kernel_exists
from engines.sparsity.sparsity_report import SparsityTarget
from engines.sparsity.targets import sparsity_target, target_problems
from engines.sparsity.workload import Workload
from nxm_export.contract.choices import LOWERING
from nxm_export.storage.json_files import to_builtins, to_json_object

CPU = "cpu"
_FORMS = (LOWERING, "conv1x1")  # of a linear layer in a graph (`nxm export --lowering`)
_OUTPUTS = ("int8", "float16")
_FEW_TOKENS = (
    "so few tokens wait for weights: where the cache holds more of the 2:4 weights than of the dense ones, 2:4 can "
    "gain more than the bound"
)
_DENSE_FFN = "ffn_up counts as sparse, and its GELU by erf keeps it dense: --gelu tanh"
_NAMES = {"trt": "TensorRT", "trt_rtx": "TensorRT-RTX"}


@dataclass(frozen=True)
class KernelAnswer:
    """Whether a sparse INT8 kernel exists for a form of product and a type that it writes; None: nobody has looked."""

    form: str
    output: str
    exists: bool | None
    source: str


@dataclass(frozen=True)
class Gain:
    """What 2:4 can gain on a GPU with sparse kernels: by these `figures`, at most, and at the limits."""

    figures: GpuFigures
    bound: GainBound
    estimate: GainEstimate


@dataclass(frozen=True)
class GainReport:
    """The answer for one model, GPU and shape. Where `gain` is None, 2:4 cannot pay, and `why_not` says why. On a CPU
    `target` is None."""

    model: str
    gpu: str
    target: SparsityTarget | None
    batch: int
    sequence: int
    kernels: tuple[KernelAnswer, ...]
    gain: Gain | None
    why_not: str | None
    notes: tuple[str, ...]

    @property
    def runtime(self) -> str:
        """The runtime and its version, in words."""
        return "" if self.target is None else f"{_NAMES[self.target.backend]} {self.target.version}"

    @property
    def kernels_in_words(self) -> str:
        """Empty where the usual form of a product has a sparse kernel; else which form has one, or that none is known
        to."""
        known = [form for form in _FORMS if any(kernel.exists for kernel in self.kernels if kernel.form == form)]
        if not known:
            return f"whether {self.runtime} has a sparse kernel for it is unknown"
        return "" if LOWERING in known else f"a sparse kernel is known for {known[0]} alone (`nxm export --lowering`)"

    @property
    def verdict(self) -> str:
        """One sentence."""
        if self.gain is None:
            return f"2:4 cannot pay here: {self.why_not}"
        estimate = self.gain.estimate
        kernels = f"; {self.kernels_in_words}" if self.kernels_in_words else ""
        low, high = sorted((estimate.memory.speedup, estimate.cache.speedup))
        products = " in the products" if estimate.memory.product_share is None else ""
        return (
            f"2:4 can gain at most {self.gain.bound.speedup:.2f}x over dense INT8 here (bound), and {low:.2f}x to "
            f"{high:.2f}x{products} if every step ran at its limit (estimate){kernels}"
        )

    def to_dict(self) -> dict[str, object]:
        """The form of ``--json``: nothing under ``bound`` or ``estimate`` is measured."""
        gain, target = self.gain, self.target
        return {
            "verdict": self.verdict,
            "can_pay": gain is not None,
            "why_not": self.why_not,
            "model": self.model,
            "gpu": self.gpu,
            "backend": None if target is None else target.backend,
            "version": None if target is None else target.version,
            "compute_capability": None if target is None else target.compute_capability,
            "batch": self.batch,
            "sequence": self.sequence,
            "kernels": to_builtins(self.kernels),
            "bound": None if gain is None else to_builtins(gain.bound),
            "estimate": None if gain is None else _estimate(gain.estimate),
            "figures": None if gain is None else to_builtins(gain.figures),
            "notes": list(self.notes),
        }


def _estimate(estimate: GainEstimate) -> dict[str, object]:
    passes = {"memory": estimate.memory, "cache": estimate.cache}
    return {name: {"speedup": one.speedup, **to_json_object(one)} for name, one in passes.items()}


def gain_report(
    model: str, work: Workload, gpu: str, backend: str, version: str | None = None, *, epilogue: str = "none"
) -> GainReport:
    """The report for a pass of `model` on `gpu` (a name that has peaks here, or ``cpu``) with a version of TensorRT.

    `epilogue` is the activation right behind the FFN's first product, as `MatrixFacts` has it.
    Raises `EngineError` for a GPU or version that is not understood, and for a GPU with sparse tensor cores whose peaks
    are not known here.
    """
    if gpu.strip().casefold() == CPU:
        why_not = "ONNX Runtime and OpenVINO multiply the zeros, too; INT8 is what pays on a CPU"
        return GainReport(model, CPU, None, work.batch, work.sequence, (), None, why_not, work.notes)
    target = sparsity_target(backend, version, gpu)
    kernels = tuple(_kernel(target, form, output) for form in _FORMS for output in _OUTPUTS)
    refusal = _refusal(gpu, target, kernels)
    if refusal is not None:
        return GainReport(model, gpu, target, work.batch, work.sequence, kernels, None, refusal, work.notes)
    figures = figures_of(gpu)
    gain = Gain(figures, gain_bound(work, figures), gain_estimate(work, figures))
    few = work.tokens < gain.bound.dense_arithmetic_from_tokens
    with_it, alone = ([_kernel(target, LOWERING, output, how) for output in _OUTPUTS] for how in (epilogue, "none"))
    stays_dense = _all_missing(with_it) and not _all_missing(alone)
    notes = (*work.notes, *((_FEW_TOKENS,) if few else ()), *((_DENSE_FFN,) if stays_dense else ()))
    return GainReport(model, figures.name, target, work.batch, work.sequence, kernels, gain, None, notes)


def first_shape(tokens: int, sequence: int) -> str:
    """The smallest batch of this sequence with so many tokens, as ``2x128``."""
    return f"{math.ceil(tokens / sequence)}x{sequence}"


def _all_missing(kernels: Sequence[KernelAnswer]) -> bool:
    return all(kernel.exists is False for kernel in kernels)


def _kernel(target: SparsityTarget, form: str, output: str, epilogue: str = "none") -> KernelAnswer:
    found: Existence = sparse_kernel_exists(
        backend=target.backend,
        version=target.version,
        compute_capability=target.compute_capability,
        weights="int8",
        form=form,
        output=output,
        epilogue=epilogue,
    )
    return KernelAnswer(form, output, found.exists, found.source)


def _refusal(gpu: str, target: SparsityTarget, kernels: tuple[KernelAnswer, ...]) -> str | None:
    """Why 2:4 cannot pay, whatever the model; None where it may."""
    for problem in target_problems(target):
        return str(problem)
    if not _all_missing(kernels):
        return None
    sources = " ".join(dict.fromkeys(kernel.source for kernel in kernels))
    return (
        f"{_NAMES[target.backend]} {target.version} has no sparse INT8 kernel for {gpu} (compute capability "
        f"{target.compute_capability}). {sources}"
    )
