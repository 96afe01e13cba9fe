"""What each weight matrix of a graph offers to a sparse kernel: the pattern along K, before and after rounding, and the
form of the product around it. Reads any ONNX file, whoever made it; runs nothing.

Sparse tensor cores read 2:4 along the reduced axis K, of integers here. A file can have the pattern in its floats and
lose it in its integers (a zero point that is not 0), have it along the wrong axis, or have it all right around a
product that no sparse kernel computes. These facts, and what a builder says it did, make the report of
`engines.sparsity.report`.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from nxm_export.contract.matrix_facts import MatrixFacts, ScannedProducts, UnreadProduct
from nxm_export.contract.plan import CompressionPlan, NMPattern
from nxm_export.graph.graph_weights import GraphWeight, graph_products, parameter_of
from nxm_export.graph.linear_forms import ELEMENTWISE
from nxm_export.graph.products import groups_of, name_of
from nxm_export.graph.verifier import embedded_plan, scale_problems

SPARSE = NMPattern(2, 4)
_FORMS = {"MatMul": "matmul", "FusedMatMul": "matmul", "Gemm": "gemm"}
_EPILOGUE = (*ELEMENTWISE, "Reshape", "Identity")  # between a product and the quantizers that read it
_MOVES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Identity", "Flatten")
_FLOATS = {"FLOAT": "float32", "FLOAT16": "float16", "BFLOAT16": "bfloat16"}


def scan_products(model: ir.Model, source: str) -> ScannedProducts:
    """Every product with a constant operand: the facts of those that were read, and what was not read; `source` names
    the file in errors."""
    plan = embedded_plan(model, source)
    facts, unread = [], []
    for found in graph_products(model):
        if isinstance(found, UnreadProduct):
            unread.append(found)
        else:
            facts.append(_facts(found, plan))
    return ScannedProducts(tuple(facts), tuple(unread))


def matrix_facts(model: ir.Model, source: str) -> list[MatrixFacts]:
    """The facts of every weight matrix that was read, in graph order; `source` names the file in errors."""
    return list(scan_products(model, source).facts)


def _facts(weight: GraphWeight, plan: CompressionPlan | None) -> MatrixFacts:
    name = parameter_of(weight.name)
    spec = plan.weights.get(name) if plan else None
    output, epilogue = _output(weight.node)
    form = _FORMS.get(weight.node.op_type, weight.node.op_type)
    if weight.node.op_type == "Conv":
        shape = _kernel_shape(weight.node)
        form = "conv1x1" if set(shape) <= {1} else "conv"
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
        groups=weight.groups(SPARSE),
        integer_weight=weight.is_quantized,
        integer_input=_integer_input(weight),
        scales_along_k=weight.scale_axis == "K",
        has_zero_point=weight.zero_point is not None and bool(np.any(weight.zero_point)),
        output=output,
        epilogue=epilogue,
        op=weight.node.op_type,
        operand=weight.operand,
        stored=weight.stored,
        codes=weight.codes,
        run=weight.run,
        groups_of_channels=groups_of(weight.node),
        scales_in_blocks=weight.scale_axis == "block",
        scale_problems=tuple(scale_problems(weight)),
    )


def _text(pattern: NMPattern | None) -> str | None:
    return None if pattern is None else str(pattern)


def _follows_along_n(weight: GraphWeight) -> bool:
    nonzero_mask = weight.nonzero_mask()
    if not weight.matrix.size or weight.n % SPARSE.m or nonzero_mask.mean() > SPARSE.density:
        return False
    return bool((nonzero_mask.reshape(weight.k, -1, SPARSE.m).sum(axis=-1) <= SPARSE.n).all())


def _kernel_shape(node: ir.Node) -> list[int]:
    if "kernel_shape" in node.attributes:
        return list(node.attributes["kernel_shape"].as_ints())
    weight = node.inputs[1]
    shape = None if weight is None else weight.shape
    return [int(size) if isinstance(size, int) else 0 for size in shape[2:]] if shape is not None else [0]


def _integer_input(weight: GraphWeight) -> bool:
    """True when the product's activation comes out of a pair of quantizers."""
    for value in weight.node.inputs[:2]:
        producer = None if value is None else value.producer()
        while producer is not None and producer.op_type in _MOVES:
            source = producer.inputs[0]
            producer = None if source is None else source.producer()
        if producer is not None and producer.op_type == "DequantizeLinear":
            source = producer.inputs[0]
            quantizer = None if source is None else source.producer()
            while quantizer is not None and quantizer.op_type in _MOVES:
                source = quantizer.inputs[0]
                quantizer = None if source is None else source.producer()
            if (
                quantizer is not None
                and quantizer.op_type == "QuantizeLinear"
                and not _is_constant(quantizer.inputs[0])
            ):
                return True
    return weight.node.op_type.startswith(("QLinear", "QGemm"))


def _is_constant(value: ir.Value | None) -> bool:
    return value is not None and ir.convenience.get_const_tensor(value) is not None


def _output(node: ir.Node) -> tuple[str, str]:
    """(dtype behind bias and activation, which activation): int8 when quantizers read all that leaves."""
    region, inside = [], [node.outputs[0]]
    grown = True
    while grown:  # a decomposed GELU reads the product twice: go on until nothing more belongs to it
        grown = False
        for user in [user for value in inside for user in value.consumers()]:
            known = [read in inside or read is None or _is_constant(read) for read in user.inputs]
            if user not in region and user.op_type in _EPILOGUE and (user.op_type == "Reshape" or all(known)):
                region.append(user)
                inside += user.outputs
                grown = True
    ends = [user for value in inside for user in value.consumers() if user not in region]
    used = {user.op_type for user in region}
    epilogue = "none"
    if "Relu" in used:
        epilogue = "relu"
    elif "Tanh" in used or any(_is_tanh(user) for user in region):
        epilogue = "gelu_tanh"
    elif "Erf" in used or "Gelu" in used:
        epilogue = "gelu_erf"
    if ends and all(user.op_type == "QuantizeLinear" for user in ends):
        return "int8", epilogue
    dtype = node.outputs[0].dtype
    return _FLOATS.get(dtype.name, dtype.name.lower()) if dtype is not None else "float", epilogue


def _is_tanh(node: ir.Node) -> bool:
    return (
        node.op_type == "Gelu"
        and "approximate" in node.attributes
        and node.attributes["approximate"].as_string() == "tanh"
    )
