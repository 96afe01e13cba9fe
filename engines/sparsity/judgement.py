"""The sparsity report: for every weight matrix, was 2:4 planned, is it in the integers along K, could a sparse kernel
run, does one run, and if not, why. This is the only judge: advice and `nxm doctor` follow its reasons.

Evidence, from strong to weak: the kernel's name in the engine inspector's report (and, where a profile was taken,
among the kernels that really ran); the builder's own lists of sparse layers, in both wordings; the layers that a
verbose build prints. ``HasSparseWeights`` only says that the builder saw the pattern: it is never proof. Whatever
contradicts itself, is missing, does not say which of several products it is of, or is not tied to the engine by the
hashes of its passport, is unknown, and unknown counts as not sparse.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from engines.sparsity.build_evidence import (
    Evidence,
    LayerInfo,
    product_layers,
    unclear_products,
)
from engines.sparsity.kernel_names import is_among, kernel_named
from engines.sparsity.sparsity_report import REASONS, SMALL, SparsityReport, SparsityTarget, WeightSparsity, weight_type
from nxm_export.contract.records.matrix_facts import MatrixFacts

ALIGNMENT = 32  # elements of INT8
_ALIGNMENT_HINT = (
    f"K and N are best multiples of {ALIGNMENT}: TensorRT pads others without a word (NVIDIA's TensorRT developer "
    "guide, Optimizing for Tensor Cores)"
)
_MULTIPLIED = ("int8", "float", "float16", "bfloat16", "float32", "float8")  # by tensor cores, dense or sparse


@dataclass(frozen=True)
class FileProblem:
    """Why a file is refused, or is computed otherwise than it says; `matrix` is the name of the matrix that it is of,
    None for the file as a whole."""

    text: str
    matrix: str | None = None

    def __str__(self) -> str:
        return f"{self.matrix}: {self.text}" if self.matrix else self.text


@dataclass(frozen=True)
class ProductNames:
    """How a builder's report names the products of a graph: `nodes` are those of all products, also of two activations;
    `ambiguous` those by which it cannot tell a product from other nodes, with the reason."""

    nodes: tuple[str, ...] = ()
    ambiguous: Mapping[str, str] = field(default_factory=dict)


def judge(
    facts: Iterable[MatrixFacts],
    evidence: Evidence | None,
    target: SparsityTarget,
    twin: Evidence | None = None,
    problems: Sequence[FileProblem] = (),
    names: ProductNames = ProductNames(),
) -> SparsityReport:
    """The report on matrices.

    Without `evidence` a graph is judged alone: nothing can be chosen, and nothing is eligible while the file has
    `problems`. `twin` is the evidence of the dense engine of the same graph, for the time that
    sparsity saves. `names` are those of the graph's products."""
    weights, facts = [], tuple(facts)
    doubts = {} if evidence is None else _doubts(facts, evidence, names)
    for fact in facts:
        obstacle, detail, eligible = _obstacle(fact, target)
        if obstacle is None and problems:
            obstacle, detail, eligible = "refused", f"{REASONS['refused']}: {problems[0]}", False
        weight = WeightSparsity(
            name=fact.name,
            k=fact.k,
            n=fact.n,
            form=fact.form,
            planned=fact.planned,
            planned_sparse=fact.planned_sparse,
            pattern_float=fact.pattern_float,
            pattern_int8=fact.pattern_int8,
            sparse_along_k=fact.sparse_along_k,
            eligible=eligible,
            chosen=None,
            kernel=None,
            reason=obstacle,
            detail=detail,
            node=fact.node,
            type=weight_type(fact),
            hint=_ALIGNMENT_HINT if _is_int8(fact) and (fact.k % ALIGNMENT or fact.n % ALIGNMENT) else None,
        )
        if evidence is None:
            reason, detail = _unbuilt(fact, weight, target)
            weight = replace(weight, chosen=None if fact.sparse_along_k else False, reason=reason, detail=detail)
        else:
            doubt = doubts.get(fact.node)
            weight = (
                _with_evidence(weight, fact, evidence, obstacle, target)
                if doubt is None
                else _without_proof(weight, fact, obstacle, target, doubt)
            )
            if doubt is None:
                weight = _with_times(weight, fact, evidence, twin)
        detail = weight.detail or (REASONS[weight.reason] if weight.reason else "")
        weights.append(replace(weight, detail=detail))
    return SparsityReport(target, tuple(weights))


def _is_int8(fact: MatrixFacts) -> bool:
    return weight_type(fact) == "int8"


def _unbuilt(fact: MatrixFacts, weight: WeightSparsity, target: SparsityTarget) -> tuple[str, str]:
    """(reason, detail) of a matrix in a graph alone."""
    if weight.reason is not None:
        return weight.reason, weight.detail
    if weight.eligible:
        return "no-engine", ""
    if fact.moved_by:
        operators = ", ".join(fact.moved_by)
        return "kernel-unknown", (
            f"{operators} between its DequantizeLinear and the product: whether TensorRT makes one integer product of "
            "them is not known. Store the weight as the product reads it"
        )
    source = target.kernel_for(fact, form=fact.form, output=fact.output, epilogue=fact.epilogue).source
    return "kernel-unknown", f"{REASONS['kernel-unknown']}. {source}"


def _obstacle(fact: MatrixFacts, target: SparsityTarget) -> tuple[str | None, str, bool | None]:
    """(what stands in a sparse kernel's way, its detail, whether the matrix is eligible) from the graph alone."""
    obstacle = _of_pattern(fact) or _of_numbers(fact)
    if obstacle is not None:
        return *obstacle, False
    if not target.sparse_flag:
        return "flag-off", "", False
    kernel = target.kernel_for(fact, form=fact.form, output=fact.output, epilogue=fact.epilogue)
    if kernel.exists is not False:
        return None, "", None if fact.moved_by else kernel.exists
    if target.kernel_for(fact, form=fact.form, output=fact.output, epilogue="none").exists is not False:
        return "activation", f"{REASONS['activation']} ({fact.epilogue}). {kernel.source}", False
    if target.kernel_for(fact, form=fact.form, output="int8", epilogue="none").exists:
        return "float-output", f"{REASONS['float-output']} (it writes {fact.output}). {kernel.source}", False
    for form in ("conv1x1", "matmul"):
        if target.kernel_for(fact, form=form, output="int8", epilogue="none").exists:
            text = f"sparse kernels here exist for {form} with INT8 output, and this is {fact.form}. {kernel.source}"
            return "op-form", text, False
    return "no-kernel", f"{REASONS['no-kernel']}. {kernel.source}", False


def _of_pattern(fact: MatrixFacts) -> tuple[str, str] | None:
    """(reason, detail) when the elements do not lie as a sparse kernel reads them."""
    if not fact.k or not fact.n:
        return "empty", ""
    convolves = "conv" in fact.form.lower()  # over any number of axes, transposed, of integers
    if convolves and fact.run == 1 and fact.groups_of_channels > 1:
        return "depthwise", ""
    if convolves and fact.run % 4:
        return (
            "channels",
            f"it has {fact.run} input channels{' a group' if fact.groups_of_channels > 1 else ''}, and "
            + ("groups of four lie along the channels of one kernel position: that is no multiple of 4"),
        )
    if fact.k % 4:
        return "k-multiple", f"K is {fact.k}, which is not a multiple of 4"
    if fact.sparse_along_k:
        return None
    if (codes := fact.broken_groups_of_codes) is not None and codes < fact.broken_groups and _few(codes, fact):
        hidden = fact.broken_groups - codes
        text = f"a zero point is not 0, so that the stored zeros of {hidden} of {fact.groups} groups of four are none"
        return "scales", f"{REASONS['scales']}: {text}"
    if fact.sparse_along_n:
        return "axis", ""
    if not fact.planned_sparse and not _few(fact.broken_groups, fact):
        return "not-planned", ""
    return "pattern", f"{fact.broken_groups} of {fact.groups} groups of four along K keep more than two"


def _few(broken: int, fact: MatrixFacts) -> bool:
    """True for so few broken groups of four that the matrix was meant to have none."""
    return broken <= fact.groups // 100


def _of_numbers(fact: MatrixFacts) -> tuple[str, str] | None:
    """(reason, detail) when the numbers, weight or input, are none that a sparse kernel multiplies."""
    if fact.scale_problems:
        return "scales", f"{REASONS['scales']}: {'; '.join(fact.scale_problems)}"
    if fact.integer_weight and fact.scales_in_blocks:
        return "scales", f"{REASONS['scales']}: they lie in blocks along K"
    if fact.integer_weight and (fact.scales_along_k or fact.has_zero_point):
        what = "they lie along K, the reduced axis" if fact.scales_along_k else "its zero point is not 0"
        return "scales", f"{REASONS['scales']}: {what}"
    kind = weight_type(fact)
    if kind not in _MULTIPLIED:
        return "weight-type", f"its weight is {kind.upper()}: sparse integer kernels multiply INT8"
    if _is_int8(fact) and not fact.integer_input:
        return "float-input", ""
    return None


def _doubts(facts: Sequence[MatrixFacts], evidence: Evidence, names: ProductNames) -> dict[str, tuple[str, str]]:
    """(reason, detail) by node, of products of which the evidence proves nothing."""
    counts = Counter(fact.node for fact in facts)
    if evidence.untied is not None:
        return dict.fromkeys(counts, ("untied", f"{REASONS['untied']}: {evidence.untied}"))
    found = {node: ("ambiguous", text) for node, text in names.ambiguous.items()}
    products = {*names.nodes, *counts}
    for node, count in counts.items():
        if count > 1:
            found[node] = ("ambiguous", f"{count} matrices are of products named {node!r}")
        unclear = [layer for layer in product_layers(evidence.layers, node) if unclear_products(layer, products)]
        if unclear:
            text = f"one kernel runs in the layer {unclear[0].name}, which has several products and is named like none"
            found.setdefault(node, ("ambiguous", text))
    return found


def _without_proof(
    weight: WeightSparsity, fact: MatrixFacts, obstacle: str | None, target: SparsityTarget, doubt: tuple[str, str]
) -> WeightSparsity:
    """The verdict on a matrix of which the evidence proves nothing, for the reason `doubt`."""
    if not fact.sparse_along_k or not target.sparse_flag:
        return replace(weight, chosen=False)  # whatever runs, it cannot be a sparse kernel
    if obstacle:
        return weight
    reason, detail = doubt if target.has_gpu else ("no-gpu", "")
    return replace(weight, reason=reason, detail=detail)


def _with_evidence(
    weight: WeightSparsity, fact: MatrixFacts, evidence: Evidence, obstacle: str | None, target: SparsityTarget
) -> WeightSparsity:
    """The verdict of an engine's evidence on one matrix; one function, because the order of the cases is the rule."""
    layers = [layer for layer in evidence.layers if fact.node in layer.onnx]
    products = product_layers(evidence.layers, fact.node)
    kernels = [kernel_named(layer.kernel) for layer in products]
    names = " | ".join(dict.fromkeys(layer.kernel for layer in products if layer.kernel)) or None
    weight = replace(weight, kernel=names, shared_with=_merged(fact.node, products))
    listed = evidence.log.eligible is not None and fact.node in evidence.log.eligible
    picked = evidence.log.picked is not None and fact.node in evidence.log.picked
    eligible = True if listed else weight.eligible
    sparse = bool(kernels) and all(kernel is not None and kernel.sparse for kernel in kernels)
    dense = any(kernel is not None and not kernel.sparse for kernel in kernels)
    if sparse or (picked and not products):
        if not fact.sparse_along_k or not target.sparse_flag:
            return replace(
                weight, chosen=None, reason="contradiction",
                detail="the engine names a sparse kernel for a matrix that is not 2:4 along K, or without the flag",
            )  # fmt: skip
        if _is_int8(fact) and not all(kernel is not None and kernel.integer for kernel in kernels):
            return replace(weight, eligible=True, chosen=False, reason="float-kernel")
        running = evidence.running
        if running is not None and not all(is_among(layer.kernel, running) for layer in products):
            return replace(
                weight, eligible=True, chosen=None, reason="contradiction",
                detail="the engine names a sparse kernel, and the profiler did not see it run",
            )  # fmt: skip
        if not products and any(layer.kind for layer in layers or evidence.layers):
            return replace(
                weight, chosen=None, reason="contradiction",
                detail="the build log says sparse, and no layer of the engine is this product",
            )  # fmt: skip
        if running is not None and not products:  # by the log alone, which names no kernel
            if any((ran := kernel_named(name)) is not None and ran.sparse for name in running):
                detail = "the build log says sparse, and not which of the sparse kernels that the profiler saw"
                return replace(weight, eligible=True, chosen=None, reason="unknown", detail=detail)
            detail = "the build log says sparse, and the profiler saw no sparse kernel"
            return replace(weight, eligible=True, chosen=None, reason="contradiction", detail=detail)
        if products and (others := evidence.profiles - {layer.profile for layer in products}):
            detail = f"a sparse kernel runs in other profiles, and profile {min(others)} does not name this product"
            return replace(weight, eligible=True, chosen=None, reason="unknown", detail=detail)
        return replace(
            weight, eligible=True, chosen=True, reason=None, detail="" if sparse else "by the builder's log alone"
        )
    if dense:
        if picked:
            return replace(
                weight, eligible=eligible, chosen=None, reason="contradiction",
                detail="the build log says sparse, and the engine names a dense kernel",
            )  # fmt: skip
        seen = any(layer.saw_sparse_weights for layer in products)
        if obstacle:  # that the builder lists the weights as 2:4 gives it no kernel
            return replace(weight, eligible=eligible, chosen=False)
        if min(fact.k, fact.n) < SMALL:
            return replace(weight, eligible=eligible, chosen=False, reason="size")
        if eligible:
            return replace(weight, eligible=True, chosen=False, reason="dense-faster")
        detail = "the builder saw 2:4 weights (HasSparseWeights), and a dense kernel runs" if seen else ""
        return replace(weight, eligible=eligible, chosen=False, reason="dense-chosen", detail=detail)
    if not fact.sparse_along_k or not target.sparse_flag:
        return replace(weight, chosen=False)  # whatever runs, it cannot be a sparse kernel
    if obstacle:
        return replace(weight, eligible=eligible)
    if not target.has_gpu:
        return replace(weight, eligible=eligible, reason="no-gpu")
    if evidence.layers and not products:
        detail = f"inside {layers[0].kind} layer {layers[0].name}" if layers else ""
        return replace(weight, eligible=eligible, reason="fused-away", detail=detail)
    return replace(weight, eligible=eligible, reason="unknown")


def _merged(node: str, products: Sequence[LayerInfo]) -> tuple[str, ...]:
    """Other ONNX products in the same layer: query, key and value often run as one."""
    return tuple(sorted({part for layer in products for part in layer.parts if part in layer.onnx and part != node}))


def _with_times(weight: WeightSparsity, fact: MatrixFacts, evidence: Evidence, twin: Evidence | None) -> WeightSparsity:
    mine = _product_ms(fact.node, evidence)
    other = _product_ms(fact.node, twin) if twin is not None else None
    return weight if mine is None or other is None else replace(weight, saved_ms=other - mine)


def _product_ms(node: str, evidence: Evidence) -> float | None:
    names = [layer.name for layer in product_layers(evidence.layers, node) if layer.profile == 0]
    if not names or any(name not in evidence.layer_ms for name in names):
        return None
    return sum(evidence.layer_ms[name] for name in names)
