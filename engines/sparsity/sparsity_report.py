"""The records of a sparsity report: what a graph is judged for, what is known of each matrix, and the reasons why one
does not run sparse. `engines.sparsity.judgement` makes them.
"""

from __future__ import annotations

from dataclasses import dataclass

from engines.sparsity.kernel_names import Existence, kernel_named, sparse_kernel_exists
from nxm_export.contract.records.matrix_facts import MatrixFacts, ProductCounts, UnreadProduct
from nxm_export.errors import EngineError, ParityError
from nxm_export.storage.json_files import to_builtins

SCHEMA = "nxm-sparsity/1"
SMALL = 256  # below it, dense kernels win (NVIDIA/TensorRT issues 3849 and 4065)
_INT8_SINCE = 7.2  # compute capability
REASONS = {
    "empty": "it has no elements",
    "k-multiple": "K is not a multiple of 4",
    "channels": "the channels of a group are not a multiple of 4, and groups of four lie along the channels",
    "depthwise": "a depthwise convolution reduces one channel: it has no groups of four",
    "weight-type": "its weight is no INT8 tensor: sparse integer kernels multiply INT8",
    "refused": "TensorRT or `nxm build` refuses the file",
    "kernel-unknown": "whether this TensorRT has a sparse kernel for it on this GPU is not known",
    "not-planned": "no 2:4 was planned for it, and it is dense",
    "pattern": "not 2:4 along K",
    "axis": "2:4 along N, the output channels; sparse kernels read it along K",
    "scales": "its scales or zero points are none that integer kernels can apply",
    "float-input": "its input is not quantized to INT8, so the product runs in float",
    "flag-off": "built without the flag that allows sparse kernels",
    "float-output": "sparse INT8 kernels here write INT8, and this product writes float: quantize its output",
    "activation": "no sparse INT8 kernel here computes the activation right behind it",
    "op-form": "sparse kernels here exist for another form of the product (see --lowering)",
    "no-kernel": "this TensorRT has no sparse kernel for this product on this GPU",
    "size": f"K or N is below {SMALL}: the builder found dense faster",
    "dense-faster": "eligible, and the builder measured a dense kernel faster",
    "no-graph": "a CUDA graph holds its dense product, and no sparse one here: launched alone, that was slower",
    "dense-chosen": "a dense kernel runs; whether a sparse one was tried is not known",
    "fused-away": "no layer of the engine names it as a product",
    "float-kernel": "a sparse kernel runs, in float",
    "no-gpu": "built without a GPU: kernels are chosen when the engine is loaded on one",
    "no-engine": "a graph alone: build it to know",
    "contradiction": "the evidence contradicts itself",
    "ambiguous": "the evidence does not say which of several products it is of",
    "untied": "nothing ties the evidence to this engine",
    "unknown": "the builder does not say which kernel runs it",
}


@dataclass(frozen=True)
class SparsityTarget:
    """What a graph is judged for: the runtime and its version, the GPU's compute capability (several, joined by
    commas, for an engine that was built without one), and whether the build allows sparse kernels."""

    backend: str
    version: str
    compute_capability: str
    sparse_flag: bool = True
    has_gpu: bool = True

    @property
    def multiplies_int8(self) -> bool:
        """Whether its tensor cores multiply INT8, dense: those of compute capability 7.0 (V100) do not, and earlier
        GPUs have none (CUDA C++ Programming Guide, Warp Matrix Functions: from 7.2 on)."""
        return all(float(part) >= _INT8_SINCE for part in self.compute_capability.split(","))

    def kernel_for(self, fact: MatrixFacts, *, form: str, output: str, epilogue: str) -> Existence:
        """Whether a sparse kernel exists for a matrix in another `form`, or with another `output` or `epilogue`."""
        return sparse_kernel_exists(
            backend=self.backend,
            version=self.version,
            compute_capability=self.compute_capability,
            weights=weight_type(fact),
            form=_kernel_form(fact, form),
            output=output,
            epilogue=epilogue,
        )


def _kernel_form(fact: MatrixFacts, form: str) -> str:
    """The form in the words of the catalogue, which has names for one matrix on the right alone; others have names
    that it lacks."""
    if fact.groups_of_channels > 1:
        return f"grouped {form}"
    if fact.stack > 1:
        return f"stacked {form}"
    return f"left {form}" if fact.operand == "input 0" else form


@dataclass(frozen=True)
class WeightSparsity:
    """What is known of one matrix. `eligible` and `chosen` are None where unknown; `reason` is a key of `REASONS`,
    None when sparse runs.

    `saved_ms` is the dense twin's time for the layers around this matrix minus this engine's; `shared_with` other
    matrices when the builder merged them into one product. `node` is the product's, `type` what it multiplies by
    (``int8``, ``float16``, ...); `hint` may make it faster and stands in no way.
    """

    name: str
    k: int
    n: int
    form: str
    planned: str | None
    planned_sparse: bool
    pattern_float: str | None
    pattern_int8: str | None
    sparse_along_k: bool
    eligible: bool | None
    chosen: bool | None
    kernel: str | None
    reason: str | None
    detail: str
    saved_ms: float | None = None
    shared_with: tuple[str, ...] = ()
    node: str = ""
    type: str = ""
    hint: str | None = None

    @property
    def ready(self) -> bool:
        """True when nothing in the file stands in the way of a sparse INT8 kernel that is known to exist."""
        return self.reason == "no-engine" and self.eligible is True and self.type == "int8"

    @property
    def has_sparse_kernel(self) -> bool:
        """Whether one of its kernels is sparse by its name: of floats, too, and of one of several profiles."""
        kernels = map(kernel_named, (self.kernel or "").split(" | "))
        return any(kernel is not None and kernel.sparse for kernel in kernels)

    @property
    def outcome(self) -> str:
        """``sparse`` where that is proven, otherwise the reason: no reason alone proves nothing."""
        return "sparse" if self.chosen is True else self.reason or "unknown"


@dataclass(frozen=True)
class SparsityReport:
    """All matrices of one engine or graph, and what they were judged for. `unread` are the products of the graph whose
    matrix was not read, of which nothing is said."""

    target: SparsityTarget
    weights: tuple[WeightSparsity, ...]
    unread: tuple[UnreadProduct, ...] = ()

    @property
    def products(self) -> ProductCounts:
        """How many products there are, were read, and are 2:4 along K."""
        sparse = sum(weight.sparse_along_k for weight in self.weights)
        return ProductCounts(len(self.weights) + len(self.unread), len(self.weights), sparse)

    @property
    def planned_elements(self) -> int:
        """Weights in matrices that were planned sparse."""
        return sum(weight.k * weight.n for weight in self.weights if weight.planned_sparse)

    @property
    def sparse_share(self) -> float | None:
        """Share of the planned-sparse matrices, by elements, that provably run sparse; None when none was planned."""
        planned = self.planned_elements
        chosen = sum(w.k * w.n for w in self.weights if w.planned_sparse and w.chosen is True)
        return chosen / planned if planned else None

    @property
    def open_question(self) -> WeightSparsity | None:
        """A planned-sparse matrix that may use a sparse kernel, where none provably runs sparse; if there is one, it is
        one that nothing in the file keeps from it. None where it is known that no sparse kernel runs."""
        if self.sparse_share != 0:
            return None
        planned = [weight for weight in self.weights if weight.planned_sparse]
        still_open = [weight for weight in planned if weight.chosen is None or weight.has_sparse_kernel]
        return min(still_open, key=lambda weight: weight.eligible is False, default=None)

    @property
    def counts(self) -> dict[str, int]:
        """Matrices by outcome: ``sparse`` or the reason."""
        counts: dict[str, int] = {}
        for weight in self.weights:
            counts[weight.outcome] = counts.get(weight.outcome, 0) + 1
        return counts

    def require_sparse(self, share: float) -> None:
        """Raise `ParityError` unless at least `share` (above 0, up to 1) of the planned-sparse elements provably run
        sparse, and `EngineError` for another share: any engine has none."""
        if not 0.0 < share <= 1.0:
            raise EngineError(
                f"a share of {share} requires nothing, or more than there is; give one above 0 and up to 1"
            )
        actual = self.sparse_share
        if actual is None:
            raise ParityError("no matrix was planned sparse, so none is required to run sparse; plan 2:4 first")
        if not actual >= share:
            why = ", ".join(f"{count} x {reason}" for reason, count in self.counts.items() if reason != "sparse")
            raise ParityError(
                f"{actual:.1%} of the planned-sparse weights provably run sparse, {share:.1%} required; "
                f"the others: {why}"
            )

    def to_dict(self) -> dict[str, object]:
        """The form of ``--json``."""
        return {
            "schema": SCHEMA,
            "backend": self.target.backend,
            "version": self.target.version,
            "compute_capability": self.target.compute_capability,
            "sparse_share": self.sparse_share,
            "counts": self.counts,
            "products": to_builtins(self.products),
            "unread": to_builtins(self.unread),
            "weights": [to_builtins(weight) for weight in self.weights],
        }


def weight_type(fact: MatrixFacts) -> str:
    """The type that a product multiplies by, in the words of the catalogue: ``int8``, ``int4``, ``float16``, ...;
    ``float`` where the record does not say which."""
    written = fact.codes or fact.stored
    if fact.codes is None and fact.integer_weight and "INT" not in fact.stored:
        written = "INT8"  # floats that the graph quantizes, or a record that does not say
    known = {"UINT8": "int8", "FLOAT": "float32", "DOUBLE": "float32", "": "float"}
    if written.startswith("FLOAT8"):
        return "float8"
    return known.get(written, written.lower())
