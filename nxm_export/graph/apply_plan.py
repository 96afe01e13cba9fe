"""A plan goes into a traced graph: folded weights, and a quantize/dequantize pair on every tensor that it has in
INT8."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from nxm_export.contract.checkpoint import Checkpoint
from nxm_export.contract.encoder_family import BLOCK, FFN, OPERANDS, Family
from nxm_export.contract.plan import CompressionPlan, WeightSpec
from nxm_export.errors import ExportError
from nxm_export.graph.fused_parts import split_products
from nxm_export.graph.linear_forms import Lowering, cancel_reshapes
from nxm_export.graph.qdq import (
    Linear,
    add_initializer,
    fold_weight_qdq,
    insert_activation_qdq,
    linears_of,
    require_scale,
    use_name,
)

SOFTMAX_SCALE = 1.0 / 127.0
_BEFORE_SOFTMAX = ("Add", "Mul", "Div", "Cast", "MatMul")  # on the way from the scores


@dataclass(frozen=True)
class WeightForm:
    """How a target wants its weights: `stored` as `fold_weight_qdq` takes it, and fused ones whole or `split` into
    their parts. Those whose outputs are quantized are split in any case: a part has a scale of its own."""

    stored: str
    split: bool


def quantize(
    model: ir.Model, checkpoint: Checkpoint, plan: CompressionPlan, *, dtype: str, lower: Lowering, form: WeightForm
) -> float:
    """Put `plan` into the traced `model`, from the codes and scales of `checkpoint`; weights are in the `form` that the
    target wants.

    Returns the largest relative change of a scale by rounding it to `dtype`. Raises `ExportError` for a scale that does
    not fit `dtype`, and for a graph that computes attention in another way than this function knows.
    """
    family, graph = checkpoint.family, model.graph
    scales = _Scales(checkpoint, numpy_dtype(dtype))
    behind: list[tuple[Linear, str, int]] = []
    for block in family.blocks(checkpoint.config):
        names = [family.weight(block, linear) for linear in family.linears]
        if plan.residual == "int8":  # before the lowering: the residual reads the same pair
            _quantize_residual(graph, plan, family.readers(block, BLOCK) + family.readers(block, FFN), scales)
        # One pair per tensor, however many layers read it.
        pairs: dict[int, ir.Value] = {}
        divided: dict[int, ir.Value] = {}
        for name in (name for name in names if not plan.weights[name].is_dense):
            parts = graph_names(family, name, plan.weights[name], form)
            if len(parts) > 1:
                split_products(graph, name, parts)
            for number, part in enumerate(parts):
                for use, traced in enumerate(linears_of(graph, part)):
                    traced.product.name = use_name(part.removesuffix(".weight"), use)
                    factors = checkpoint.input_factors(name) if plan.weights[name].input_bits else None
                    if factors is not None:
                        traced = _divide_input(graph, traced, name, use, factors.astype(scales.dtype), divided)
                    linear = lower(traced, part)
                    if plan.weights[name].weight_bits is None:
                        continue
                    codes, scale = (
                        np.split(whole, len(parts))[number] for whole in (checkpoint.codes(name), scales.weight(name))
                    )
                    fold_weight_qdq(graph, linear, part, codes, scale, stored=form.stored)
                    _quantize_input(graph, linear, name, use, scales, pairs)
                    if plan.weights[name].output_bits:
                        behind.append((linear, part, use))
    # When every product has its input: a pair behind one may be a pair before the next.
    for linear, part, use in behind:
        insert_activation_qdq(graph, linear.output, scales.output(part), _path(part, "output"), use=use)
    if plan.attention == "int8":
        _quantize_attention(graph, checkpoint, scales)
    cancel_reshapes(graph)
    return scales.rounding


def graph_names(family: Family, name: str, spec: WeightSpec, form: WeightForm) -> tuple[str, ...]:
    """The names of the matrices that a graph holds for weight `name`: its own, or those of its parts."""
    return family.parts(name) if spec.weight_bits and (form.split or spec.output_bits) else (name,)


class _Scales:
    """A checkpoint's scales in the graph's dtype; `rounding` is the largest relative change of one so far."""

    def __init__(self, checkpoint: Checkpoint, dtype: np.dtype) -> None:
        self.checkpoint, self.dtype = checkpoint, dtype
        self.rounding = 0.0

    def weight(self, name: str) -> np.ndarray:
        """Per output channel (out,)."""
        return self.rounded(self.checkpoint.weight_scale(name), name)

    def input(self, name: str) -> np.ndarray:
        """Of what the linear layer of weight `name` reads."""
        return self.rounded(self.checkpoint.input_scale(name), _path(name, "input"))

    def output(self, name: str) -> np.ndarray:
        """Of what the linear layer of weight `name`, or of a part of a fused weight, writes."""
        return self.rounded(self.checkpoint.output_scale(name), _path(name, "output"))

    def rounded(self, scale: np.ndarray | float, name: str) -> np.ndarray:
        """`scale` in the graph's dtype; raises `ExportError` with `name` when it does not fit."""
        exact = np.asarray(scale, np.float32)
        with np.errstate(over="ignore"):  # an infinite scale is refused by name below
            result = exact.astype(self.dtype)
        require_scale(result, name)
        self.rounding = max(self.rounding, float((np.abs(result.astype(np.float32) - exact) / exact).max()))
        return result


def _path(name: str, end: str) -> str:
    """The name of a pair: the linear layer's module path and which `end` of it."""
    return f"{name.removesuffix('.weight')}.{end}"


def _quantize_residual(graph: ir.Graph, plan: CompressionPlan, names: list[str], scales: _Scales) -> None:
    """What the attention and the FFN of a block read (the layers `names`) is quantized for all of its readers, the
    residual among them."""
    for name in names:
        if plan.weights[name].input_bits:
            for use, linear in enumerate(linears_of(graph, name)):
                if not _is_dequantized(linear.x):
                    insert_activation_qdq(graph, linear.x, scales.input(name), _path(name, "input"), use=use)


def _quantize_input(
    graph: ir.Graph, linear: Linear, name: str, use: int, scales: _Scales, pairs: dict[int, ir.Value]
) -> None:
    """A pair before a product, or the one that another product of the block already has on the same tensor."""
    if id(linear.x) in pairs:
        linear.product.replace_input_with(0, pairs[id(linear.x)])
    elif not _is_dequantized(linear.x):
        path = _path(name, "input")
        pairs[id(linear.x)] = insert_activation_qdq(
            graph, linear.x, scales.input(name), path, [linear.product], use=use
        )


def _divide_input(
    graph: ir.Graph, linear: Linear, name: str, use: int, factors: np.ndarray, divided: dict[int, ir.Value]
) -> Linear:
    """The layer behind a product of what it reads and the reciprocals of `factors` (in,); layers that read one tensor
    share it."""
    x = linear.x
    if id(x) not in divided:
        if _is_dequantized(x):
            raise ExportError(f"{name}: its input is quantized for other readers, too, and cannot have factors")
        reciprocals = add_initializer(graph, f"{_path(name, 'input')}_reciprocals", 1 / factors)
        node = ir.node("Mul", [x, reciprocals], name=use_name(f"{_path(name, 'input')}_divide", use))
        node.outputs[0].name = use_name(f"{_path(name, 'input')}_divided", use)
        node.outputs[0].type, node.outputs[0].shape = x.type, x.shape
        graph.insert_before(linear.product, node)
        divided[id(x)] = node.outputs[0]
    linear.product.replace_input_with(0, divided[id(x)])
    return Linear(linear.product, divided[id(x)], linear.output)


def _is_dequantized(value: ir.Value) -> bool:
    """True behind a pair, also when it was only reshaped since."""
    producer = value.producer()
    while producer is not None and producer.op_type == "Reshape":
        reshaped = producer.inputs[0]
        producer = None if reshaped is None else reshaped.producer()
    return producer is not None and producer.op_type == "DequantizeLinear"


def _quantize_attention(graph: ir.Graph, checkpoint: Checkpoint, scales: _Scales) -> None:
    """A pair behind every softmax of attention, and one before each operand that no linear layer quantizes."""
    family, runs = checkpoint.family, checkpoint.family.runs(checkpoint.config)
    nodes = [node for node in graph if node.op_type == "Softmax"]
    if len(nodes) != len(runs):
        raise _other_attention(f"has {len(nodes)} Softmax nodes for {len(runs)} runs of encoder blocks")
    probabilities = scales.rounded(SOFTMAX_SCALE, "softmax")
    for number, (block, node) in enumerate(zip(runs, nodes, strict=True)):
        if own := checkpoint.operand_scales(block):
            use, path = runs[:number].count(block), f"{block}.{family.attention.path}"
            for operand, (product, value) in zip(OPERANDS, _operands(node), strict=True):
                if operand in own:
                    name = f"{path}.{operand}"
                    insert_activation_qdq(graph, value, scales.rounded(own[operand], name), name, [product], use=use)
        insert_activation_qdq(graph, node.outputs[0], probabilities, f"attention.{number}.probabilities")


def _operands(softmax: ir.Node) -> list[tuple[ir.Node, ir.Value]]:
    """The products around a softmax with what they read of query, key and value: (product, value) each."""
    scores = softmax
    while scores.op_type != "MatMul":  # the mask, the scale and casts stand between
        producers = [value.producer() for value in scores.inputs if value is not None and value.const_value is None]
        found = [node for node in producers if node is not None and node.op_type in _BEFORE_SOFTMAX]
        if not found:
            raise _other_attention(f"has no product before {softmax.name}")
        scores = found[0]
    context: ir.Node | None = softmax
    while context is not None and context.op_type != "MatMul":
        context = next(iter(context.outputs[0].consumers()), None)
    reads = [*scores.inputs, context.inputs[1] if context is not None else None]
    if context is None or len(reads) != len(OPERANDS) or None in reads:
        raise _other_attention(f"has no product behind {softmax.name}")
    return [(node, value) for node, value in zip((scores, scores, context), reads, strict=True) if value is not None]


def _other_attention(what: str) -> ExportError:
    return ExportError(
        f"the exported graph {what}; this transformers version computes attention differently: export with float "
        "attention"
    )


def numpy_dtype(dtype: str) -> np.dtype:
    """NumPy's type for the name of a graph's float dtype."""
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
