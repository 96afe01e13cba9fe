"""The truth report: for every weight matrix, was 2:4 planned, is it in the integers along K, could a sparse kernel run,
does one run, and if not, why.

Evidence, from strong to weak: the kernel's name in the engine inspector's report (and, where a profile was taken, among
the kernels that really ran); the builder's own lists of sparse layers, in both wordings; the layers that a verbose build
prints. ``HasSparseWeights`` only says that the builder saw the pattern: it is never proof. Whatever contradicts itself, or
is missing, is unknown, and unknown counts as not sparse.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from engines.sparsity.build_evidence import Evidence, LayerInfo, read_evidence, read_json
from engines.sparsity.kernel_names import kernel_named, sparse_kernel_exists
from nxm_export.contract.matrix_facts import MatrixFacts
from nxm_export.errors import ArtifactError, ParityError
from nxm_export.storage.json_files import require_schema

SCHEMA = "nxm-truth/1"
FACTS_FILE = "weights.json"
ALIGNMENT = 32  # elements; tiles of the sparse INT8 kernels
SMALL = 256  # below it, dense kernels win (NVIDIA/TensorRT issues 3849 and 4065)
REASONS = {
    "not-planned": "no 2:4 was planned for it, and it is dense",
    "pattern": "not 2:4 along K",
    "axis": "2:4 along N, the output channels; sparse kernels read it along K",
    "scales": "its scales lie along K or its zero point is not 0: it cannot run in integers",
    "float-input": "its input is not quantized, so the product runs in float",
    "alignment": f"K and N must be multiples of {ALIGNMENT} for sparse INT8 kernels",
    "flag-off": "built without the flag that allows sparse kernels",
    "float-output": "sparse INT8 kernels here write INT8, and this product writes float: quantize its output",
    "op-form": "sparse kernels here exist for another form of the product (see --lowering)",
    "no-kernel": "this TensorRT has no sparse kernel for this product on this GPU",
    "size": f"K or N is below {SMALL}: the builder found dense faster",
    "dense-faster": "eligible, and the builder measured a dense kernel faster",
    "dense-chosen": "a dense kernel runs; whether a sparse one was tried is not known",
    "fused-away": "no layer of the engine names it as a product",
    "float-kernel": "a sparse kernel runs, in float",
    "no-gpu": "built without a GPU: kernels are chosen when the engine is loaded on one",
    "no-engine": "a graph alone: build it to know",
    "contradiction": "the evidence contradicts itself",
    "unknown": "the builder does not say which kernel runs it",
}


@dataclass(frozen=True)
class WeightTruth:
    """One row. `eligible` and `chosen` are None where unknown; `reason` is a key of `REASONS`, None when sparse runs.

    `saved_ms` is the dense twin's time for the layers around this matrix minus this engine's; `shared_with` other
    matrices when the builder merged them into one product.
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


@dataclass(frozen=True)
class TruthReport:
    """All rows of one engine or graph, and what they were judged for."""

    backend: str
    version: str
    compute_capability: str
    weights: list[WeightTruth]

    @property
    def planned_elements(self) -> int:
        """Weights in matrices that were planned sparse."""
        return sum(row.k * row.n for row in self.weights if row.planned_sparse)

    @property
    def sparse_share(self) -> float | None:
        """Share of the planned-sparse matrices, by elements, that provably run sparse; None when none was planned."""
        planned = self.planned_elements
        chosen = sum(row.k * row.n for row in self.weights if row.planned_sparse and row.chosen is True)
        return chosen / planned if planned else None

    @property
    def counts(self) -> dict[str, int]:
        """Matrices by outcome: ``sparse`` or the reason."""
        found: dict[str, int] = {}
        for row in self.weights:
            key = "sparse" if row.chosen is True else row.reason or "unknown"
            found[key] = found.get(key, 0) + 1
        return found

    def require_sparse(self, share: float) -> None:
        """Raise `ParityError` unless at least `share` (0 to 1) of the planned-sparse elements provably run sparse."""
        found = self.sparse_share
        if found is None:
            raise ParityError("no matrix was planned sparse, so none is required to run sparse; plan 2:4 first")
        if found < share:
            why = ", ".join(f"{count} x {reason}" for reason, count in self.counts.items() if reason != "sparse")
            raise ParityError(
                f"{found:.1%} of the planned-sparse weights provably run sparse, {share:.1%} required; the others: {why}"
            )

    def to_dict(self) -> dict[str, Any]:
        """The form of ``--json``."""
        return {
            "schema": SCHEMA,
            "backend": self.backend,
            "version": self.version,
            "compute_capability": self.compute_capability,
            "sparse_share": self.sparse_share,
            "counts": self.counts,
            "weights": [asdict(row) for row in self.weights],
        }


def judge(
    facts: Iterable[MatrixFacts],
    evidence: Evidence | None,
    *,
    backend: str,
    version: str,
    compute_capability: str,
    sparse_flag: bool = True,
    has_gpu: bool = True,
    twin: Evidence | None = None,
) -> TruthReport:
    """One row per matrix. Without `evidence` a graph is judged alone: nothing can be chosen."""
    rows = []
    for fact in facts:
        obstacle, detail, eligible = _obstacle(fact, backend, version, compute_capability, sparse_flag)
        row = WeightTruth(
            name=fact.name, k=fact.k, n=fact.n, form=fact.form, planned=fact.planned, planned_sparse=fact.planned_sparse,
            pattern_float=fact.pattern_float, pattern_int8=fact.pattern_int8, sparse_along_k=fact.sparse_along_k,
            eligible=eligible, chosen=None, kernel=None, reason=obstacle, detail=detail,
        )  # fmt: skip
        if evidence is None:
            row = replace(row, chosen=False if not fact.sparse_along_k else None, reason=obstacle or "no-engine")
        else:
            row = _with_evidence(row, fact, evidence, obstacle, sparse_flag, has_gpu)
            row = _with_times(row, fact, evidence, twin)
        rows.append(replace(row, detail=row.detail or (REASONS[row.reason] if row.reason else "")))
    return TruthReport(backend, version, compute_capability, rows)


def _obstacle(
    fact: MatrixFacts, backend: str, version: str, compute_capability: str, sparse_flag: bool
) -> tuple[str | None, str, bool | None]:
    """(what stands in a sparse kernel's way, its detail, whether the matrix is eligible) from the graph alone."""
    if not fact.sparse_along_k:
        if fact.sparse_along_n:
            return "axis", "", False
        if not fact.planned_sparse and fact.broken_groups > fact.groups // 100:
            return "not-planned", "", False
        return "pattern", f"{fact.broken_groups} of {fact.groups} groups of four along K keep more than two", False
    if fact.integer_weight and (fact.scales_along_k or fact.has_zero_point):
        return "scales", "", False
    if fact.integer_weight and not fact.integer_input:
        return "float-input", "", False
    if fact.k % ALIGNMENT or fact.n % ALIGNMENT:
        return "alignment", f"K {fact.k} x N {fact.n}: {REASONS['alignment']}", False
    if not sparse_flag:
        return "flag-off", "", False
    target: dict[str, Any] = {
        "backend": backend,
        "version": version,
        "compute_capability": compute_capability,
        "integer": fact.integer_weight,
    }
    found = sparse_kernel_exists(**target, form=fact.form, output=fact.output)
    if found.exists is not False:
        return None, "", found.exists
    if fact.output != "int8" and sparse_kernel_exists(**target, form=fact.form, output="int8").exists:
        return "float-output", f"{REASONS['float-output']} (it writes {fact.output}). {found.source}", False
    other = next(
        (
            form
            for form in ("conv1x1", "matmul")
            if form != fact.form and sparse_kernel_exists(**target, form=form, output="int8").exists
        ),
        None,
    )
    if other:
        return (
            "op-form",
            f"sparse kernels here exist for {other} with INT8 output, and this is {fact.form}. {found.source}",
            False,
        )
    return "no-kernel", f"{REASONS['no-kernel']}. {found.source}", False


def _with_evidence(
    row: WeightTruth, fact: MatrixFacts, evidence: Evidence, obstacle: str | None, sparse_flag: bool, has_gpu: bool
) -> WeightTruth:
    layers = [layer for layer in evidence.layers if fact.node and fact.node in layer.onnx]
    products = [layer for layer in layers if layer.is_product]
    kernels = [kernel_named(layer.kernel) for layer in products]
    names = " | ".join(dict.fromkeys(layer.kernel for layer in products if layer.kernel)) or None
    row = replace(row, kernel=names, shared_with=_merged(fact.node, products))
    listed = evidence.log.eligible is not None and fact.node in evidence.log.eligible
    picked = evidence.log.picked is not None and fact.node in evidence.log.picked
    eligible = True if listed else row.eligible
    sparse = bool(kernels) and all(kernel is not None and kernel.sparse for kernel in kernels)
    dense = any(kernel is not None and not kernel.sparse for kernel in kernels)
    if sparse or (picked and not products):
        if not fact.sparse_along_k or not sparse_flag:
            return replace(
                row, chosen=None, reason="contradiction",
                detail="the engine names a sparse kernel for a matrix that is not 2:4 along K, or without the flag",
            )  # fmt: skip
        if sparse and fact.integer_weight and not all(kernel is not None and kernel.integer for kernel in kernels):
            return replace(row, eligible=True, chosen=False, reason="float-kernel")
        if evidence.running is not None and not all(_ran(layer.kernel, evidence.running) for layer in products):
            return replace(
                row, eligible=True, chosen=None, reason="contradiction",
                detail="the engine names a sparse kernel, and the profiler did not see it run",
            )  # fmt: skip
        return replace(
            row, eligible=True, chosen=True, reason=None, detail="" if sparse else "by the builder's log alone"
        )
    if dense:
        if picked:
            return replace(
                row, eligible=eligible, chosen=None, reason="contradiction",
                detail="the build log says sparse, and the engine names a dense kernel",
            )  # fmt: skip
        seen = any(layer.saw_sparse_weights for layer in products)
        if obstacle:  # that the builder lists the weights as 2:4 gives it no kernel
            return replace(row, eligible=eligible, chosen=False)
        if min(fact.k, fact.n) < SMALL:
            return replace(row, eligible=eligible, chosen=False, reason="size")
        if listed or eligible:
            return replace(row, eligible=True, chosen=False, reason="dense-faster")
        detail = "the builder saw 2:4 weights (HasSparseWeights), and a dense kernel runs" if seen else ""
        return replace(row, eligible=eligible, chosen=False, reason="dense-chosen", detail=detail)
    if not fact.sparse_along_k or not sparse_flag:
        return replace(row, chosen=False)  # whatever runs, it cannot be a sparse kernel
    if obstacle:
        return replace(row, eligible=eligible)
    if not has_gpu:
        return replace(row, eligible=eligible, reason="no-gpu")
    if evidence.layers and not products:
        detail = f"inside {layers[0].kind} layer {layers[0].name}" if layers else ""
        return replace(row, eligible=eligible, reason="fused-away", detail=detail)
    return replace(row, eligible=eligible, reason="unknown")


def _merged(node: str, products: Sequence[LayerInfo]) -> tuple[str, ...]:
    """Other ONNX products in the same layer: query, key and value often run as one."""
    return tuple(sorted({part for layer in products for part in layer.parts if part in layer.onnx and part != node}))


def _ran(kernel: str, running: frozenset[str]) -> bool:
    return any(kernel in name or name in kernel for name in running)


def _with_times(row: WeightTruth, fact: MatrixFacts, evidence: Evidence, twin: Evidence | None) -> WeightTruth:
    own = _product_ms(fact.node, evidence)
    other = _product_ms(fact.node, twin) if twin is not None else None
    return row if own is None or other is None else replace(row, saved_ms=other - own)


def _product_ms(node: str, evidence: Evidence) -> float | None:
    names = [layer.name for layer in evidence.layers if layer.profile == 0 and layer.is_product and node in layer.onnx]
    if not names or any(name not in evidence.layer_ms for name in names):
        return None
    return sum(evidence.layer_ms[name] for name in names)


def write_truth(
    out: Path, model: Any, *, backend: str, version: str, device: Mapping[str, str], sparse_flag: bool
) -> None:
    """Write ``weights.json``: what the graph offers, and what it was built for. `read_truth` adds the engine's evidence."""
    from nxm_export.graph.sparsity_scan import matrix_facts

    facts = [fact.to_dict() for fact in matrix_facts(model, str(out))]
    head = {
        "schema": SCHEMA,
        "backend": backend,
        "version": version,
        "compute_capability": device["compute_capability"],
        "has_gpu": device["gpu"] != "none",
        "sparse_flag": sparse_flag,
    }
    (out / FACTS_FILE).write_text(json.dumps({**head, "facts": facts}, indent=1) + "\n", encoding="utf-8")


def read_truth(directory: Path, twin: Path | None = None, running: Iterable[str] | None = None) -> TruthReport:
    """Judge an engine directory by all that lies in it; `twin` is the dense engine's, `running` kernel names of a profile.

    Raises `ArtifactError` when the directory has no ``weights.json``.
    """
    data = read_json(directory / FACTS_FILE)
    require_schema(data, SCHEMA, str(directory / FACTS_FILE), ArtifactError)
    try:
        return judge(
            [MatrixFacts.of(entry) for entry in data["facts"]],
            read_evidence(directory, running),
            backend=data["backend"],
            version=data["version"],
            compute_capability=data["compute_capability"],
            sparse_flag=data["sparse_flag"],
            has_gpu=data["has_gpu"],
            twin=read_evidence(twin) if twin is not None else None,
        )
    except (KeyError, TypeError) as error:
        raise ArtifactError(f"{directory / FACTS_FILE}: malformed ({error!r}); build the engine again") from error
