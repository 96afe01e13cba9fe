"""What each weight matrix of a graph offers to a sparse kernel: the pattern along K, before and after rounding, and the
form of the product around it. Reads any ONNX file, whoever made it; runs nothing.

Sparse tensor cores read 2:4 along the reduced axis K, of integers here. A file can have the pattern in its floats and
lose it in its integers (a zero point that is not 0), have it along the wrong axis, or have it all right around a
product that no sparse kernel computes. These facts, and what a builder says it did, make the report of
`engines.sparsity.judgement`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from nxm_export.contract.plan import CompressionPlan, NMPattern
from nxm_export.contract.quantizer_placement import planned_spec
from nxm_export.contract.records.matrix_facts import MatrixFacts, ScannedProducts, UnreadProduct
from nxm_export.contract.records.verify_report import VerifyReport
from nxm_export.graph.quantized_values import input_codes, output_type, reads_an_input
from nxm_export.graph.reading.graph_weights import GraphWeight, graph_products, parameter_of
from nxm_export.graph.reading.products import groups_of, name_of, operands
from nxm_export.graph.verifier import embedded_plan, scale_problems, verify_model

SPARSE = NMPattern(2, 4)
_FORMS = {"MatMul": "matmul", "FusedMatMul": "matmul", "Gemm": "gemm"}


def scan_products(model: ir.Model, source: str) -> ScannedProducts:
    """Every product with a constant operand: the facts of those that were read, and what was not read; `source` names
    the file in errors."""
    scan = _Scan(model, source)
    for _ in scan.products():
        pass
    return scan.seen


def node_names(model: ir.Model) -> list[str]:
    """The name of every node of a graph and of its local functions, as `MatrixFacts.node` has it; one that two nodes
    have is there twice."""
    functions = (node for function in model.functions.values() for node in function.all_nodes())
    return [name_of(node) for node in (*model.graph.all_nodes(), *functions)]


def product_names(model: ir.Model) -> tuple[str, ...]:
    """The name of every node that multiplies, or may multiply, weights or activations, each once."""
    return tuple(dict.fromkeys(name_of(node) for node in model.graph.all_nodes() if any(operands(node))))


def scan_and_verify(model: ir.Model, source: str) -> tuple[ScannedProducts, VerifyReport]:
    """`scan_products` and `verify_model` in one pass, since reading the weights is most of the work; each is let go
    before the next is read."""
    scan = _Scan(model, source)
    report = verify_model(model, source, products=scan.products())
    return scan.seen, report


class _Scan:
    """Keeps the facts of all products that go through its hands."""

    def __init__(self, model: ir.Model, source: str) -> None:
        self._model, self._plan = model, embedded_plan(model, source)
        self._facts: list[MatrixFacts] = []
        self._unread: list[UnreadProduct] = []

    def products(self) -> Iterator[GraphWeight | UnreadProduct]:
        for found in graph_products(self._model):
            if isinstance(found, UnreadProduct):
                self._unread.append(found)
            else:
                self._facts.append(_facts(found, self._plan))
            yield found

    @property
    def seen(self) -> ScannedProducts:
        return ScannedProducts(tuple(self._facts), tuple(self._unread))


def _facts(weight: GraphWeight, plan: CompressionPlan | None) -> MatrixFacts:
    name = parameter_of(weight.name)
    spec = planned_spec(plan, name) if plan else None
    output, epilogue = output_type(weight.node)
    form = _FORMS.get(weight.node.op_type, weight.node.op_type)
    if weight.node.op_type == "Conv" and weight.axes == 4:
        form = "conv1x1" if weight.k == weight.run else "conv"  # K is the channels of one place of the kernel
    elif weight.node.op_type == "Conv":
        form = f"conv{weight.axes - 2}d"
    return MatrixFacts(
        name=name,
        node=name_of(weight.node),
        form=form,
        k=weight.k,
        n=weight.n,
        planned=str(spec) if spec else None,
        planned_sparse=bool(spec and spec.pattern and spec.pattern.implies_2_4),
        pattern_float=_text(weight.before_rounding().pattern()),
        pattern_int8=_text(weight.pattern()) if weight.is_quantized else None,
        sparse_along_k=weight.follows(SPARSE),
        sparse_along_n=_follows_along_n(weight),
        broken_groups=weight.violations(SPARSE),
        broken_groups_of_codes=weight.without_zero_points().violations(SPARSE),
        groups=weight.groups(SPARSE),
        integer_weight=weight.is_quantized,
        integer_input=_integer_input(weight.node),
        scales_along_k=weight.scale_axis == "K",
        has_zero_point=weight.has_zero_point,
        output=output,
        epilogue=epilogue,
        op=weight.node.op_type,
        operand=weight.operand,
        stored=weight.stored,
        codes=weight.codes,
        run=weight.run,
        groups_of_channels=groups_of(weight.node),
        stack=weight.stack if form in _FORMS.values() else 1,
        scales_in_blocks=weight.scale_axis == "block",
        scale_problems=tuple(scale_problems(weight)),
        moved_by=weight.moved_by,
    )


def _text(pattern: NMPattern | None) -> str | None:
    return None if pattern is None else str(pattern)


def _follows_along_n(weight: GraphWeight) -> bool:
    if not weight.matrix.size or weight.n % SPARSE.m or weight.density > SPARSE.density:
        return False
    groups = weight.nonzero_mask().view(np.uint8).reshape(weight.k, -1, SPARSE.m)
    kept = sum(groups[..., at] for at in range(SPARSE.m))  # ten times as fast as a sum along so short an axis
    return bool((np.asarray(kept) <= SPARSE.n).all())


def _integer_input(node: ir.Node) -> bool:
    """True when what a product multiplies its weight by comes in 8 bits: out of a pair of quantizers, or, for operators
    that multiply integers, as it is."""
    if node.op_type.startswith(("QLinear", "QGemm", "MatMulInteger", "ConvInteger", "DynamicQuantize", "QAttention")):
        return True
    activations = [value for value in node.inputs[:2] if reads_an_input(value)]
    return bool(activations) and all(input_codes(value) in ("INT8", "UINT8") for value in activations)
