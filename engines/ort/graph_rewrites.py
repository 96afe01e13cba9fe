"""Rewrites of a Q/DQ graph for ONNX Runtime's CPU kernels, each with what it does to the numbers.

* `integer_products`: ``MatMul(DQ(a), DQ(w)) + bias`` becomes ``MatMulIntegerToFloat`` of the codes, bias included. It
  is what ONNX Runtime's own optimizer makes of the pairs, but for the bias: the sum of products is exact in INT32 here
  and is rounded term by term in float there, so results differ by float rounding alone, and for the better.
* `fused_attention`: the scores, mask, softmax and context of a head become one operator in float32. It is ONNX's
  ``Attention``, which takes what is added to the scores as the graph computed it, or where the graph or the runtime is
  too old for that ONNX Runtime's ``MultiHeadAttention``, slower, with the mask as its ``key_padding_mask`` and a bias
  of relative positions or a mask of windows as its ``attention_bias``. Queries and keys that are rotated in between
  become ``RotaryEmbedding`` (`engines.ort.attention_operands`). Same formula, other order of summation: float rounding
  again. Masks must be 0 or 1.

Both look for exactly the form that `nxm_export.graph.exporter` writes, by structure, and leave alone what differs in
anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from engines.ort.attention_operands import CONTRIB, Heads, OperandWriter, key, query_or_value
from engines.ort.node_forms import axis, constant, only, perm, producer, reader, same_size, scalar
from nxm_export.hf.finite_masks import MASKED  # the fused operator is told what padding gets in the graph

if TYPE_CHECKING:
    import onnx_ir as ir

ATTENTION_OPSET, _ATTENTION_IR = 23, 11  # the first with ``Attention``, and its format
# From these opsets a graph can be said to be of `ATTENTION_OPSET`: all operators but one read the same there.
_RAISED_FROM, _CHANGED_SINCE = 20, "GroupNormalization"
PRODUCTS = ("MatMul", "MatMulInteger", "MatMulIntegerToFloat", "QLinearMatMul", "FusedMatMul")  # that attention may run


@dataclass(frozen=True)
class FusedAttention:
    """How many attentions of a graph became one operator, in how many of those its queries and keys are rotated by
    operators of their own, and how many were left as they are."""

    fused: int
    rotary: int
    plain: int


@dataclass(frozen=True)
class _Attention:
    """The attention around a softmax: its operands, what its scores get, and the last of its nodes."""

    query: Heads
    key: Heads
    value: Heads
    scale: float
    masking: _Masking
    last: ir.Node


def integer_products(model: ir.Model) -> int:
    """Put products of codes for products of dequantized values, in place; returns how many.

    The activation's pair must be UINT8 with one scale, the weight an INT8 constant (K, N), or an INT4 one behind a Cast
    to INT8, with zero point 0 and one scale or one per output channel.
    """
    import onnx_ir as ir

    graph, count = model.graph, 0
    for product in [node for node in graph if node.op_type == "MatMul" and not node.domain]:
        left, right = (_dequantize(value) for value in product.inputs)
        if left is None or right is None or not _is_activation(left):
            continue
        features = _weight_features(right)
        if features is None:
            continue
        last, bias = _bias_behind(product, features)
        inputs = [left.inputs[0], right.inputs[0], left.inputs[1], right.inputs[1], left.inputs[2], None, bias]
        fused = ir.Node(CONTRIB, "MatMulIntegerToFloat", inputs if bias is not None else inputs[:-1], name=product.name)
        _replace(graph, last, fused)
        count += 1
    if count:
        _declare(model)
    return count


def fused_attention(model: ir.Model, *, onnx_attention: bool = True) -> FusedAttention:
    """Put one operator for every attention in float, in place.

    It is ONNX's ``Attention``, and the graph then of opset 23, unless `onnx_attention` is false (the runtime does not
    have it) or the graph's opset is not one that can be raised; else ``MultiHeadAttention``.
    """
    graph, fused, rotary = model.graph, 0, 0
    standard = onnx_attention and _can_be_raised(model)
    masks = _MaskWriter(graph)
    operands = OperandWriter(graph)
    for softmax in [node for node in graph if node.op_type == "Softmax"]:
        attention = _attention_around(softmax)
        if attention is None:
            continue
        heads = (attention.query, attention.key, attention.value)
        inputs = [operands.written(one, attention.last) for one in heads]
        form = _onnx_attention if standard else _multi_head_attention
        _replace(graph, attention.last, form(attention, inputs, masks, str(softmax.name)))
        fused += 1
        rotary += attention.query.rotation is not None
    if fused:
        _declare(model)
        if standard:
            model.opset_imports[""] = ATTENTION_OPSET
            model.ir_version = max(model.ir_version, _ATTENTION_IR)
    return FusedAttention(fused, rotary, plain_attention(graph))


def _can_be_raised(model: ir.Model) -> bool:
    """True for a graph whose operators mean the same at `ATTENTION_OPSET`."""
    opset = model.opset_imports.get("", 0)
    same = all(node.op_type != _CHANGED_SINCE for node in model.graph.all_nodes())
    return _RAISED_FROM <= opset <= ATTENTION_OPSET and not model.functions and same


def _onnx_attention(attention: _Attention, inputs: list[ir.Value], masks: _MaskWriter, name: str) -> ir.Node:
    import onnx_ir as ir

    count = attention.query.count
    attributes = [
        ir.AttrInt64("q_num_heads", count),
        ir.AttrInt64("kv_num_heads", count),
        ir.AttrFloat32("scale", attention.scale),
    ]
    return ir.Node("", "Attention", [*inputs, masks.added(attention)], attributes, name=name)


def _multi_head_attention(attention: _Attention, inputs: list[ir.Value], masks: _MaskWriter, name: str) -> ir.Node:
    import onnx_ir as ir

    attributes = [
        ir.AttrInt64("num_heads", attention.query.count),
        ir.AttrFloat32("scale", attention.scale),
        ir.AttrFloat32("mask_filter_value", MASKED),
    ]
    mask, bias = attention.masking.mask, attention.masking.bias
    optional = [None, None if mask is None else masks.in_int32(mask), bias]
    while optional[-1] is None:
        optional.pop()
    return ir.Node(CONTRIB, "MultiHeadAttention", [*inputs, *optional], attributes, name=name)


class _MaskWriter:
    """Puts masks into a graph as the fused operators take them, each once."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._made: dict[tuple[ir.Value | None, ...], ir.Value] = {}

    def in_int32(self, mask: ir.Value) -> ir.Value:
        """A mask (batch, sequence) of ones and zeros."""
        import onnx_ir as ir

        if (mask,) not in self._made:
            cast = ir.node("Cast", [mask], attributes={"to": int(ir.DataType.INT32)}, name=f"{mask.name}_int32")
            self._graph.insert_before(self._graph[0], cast)
            self._made[mask,] = cast.outputs[0]
        return self._made[mask,]

    def added(self, attention: _Attention) -> ir.Value:
        """All that scores get, (batch or 1, heads or 1, sequence, sequence): ``Attention`` repeats no mask for every
        query by itself."""
        masking = attention.masking
        if masking.added is None:
            assert masking.bias is not None
            return masking.bias
        key = (masking.added, masking.bias)
        if key not in self._made:
            nodes = self._sum(masking) if masking.bias is not None else self._repeated(attention)
            self._graph.insert_before(attention.last, nodes)
            self._made[key] = nodes[-1].outputs[0]
        return self._made[key]

    def _sum(self, masking: _Masking) -> list[ir.Node]:
        import onnx_ir as ir

        node = ir.node("Add", [masking.bias, masking.added], name="nxm_attention_bias")
        self._describe(node, masking)
        return [node]

    def _repeated(self, attention: _Attention) -> list[ir.Node]:
        import onnx_ir as ir

        one = self._ones()
        length = ir.node("Shape", [attention.query.whole], attributes={"start": 1, "end": 2}, name="nxm_queries")
        shape = ir.node("Concat", [one, one, length.outputs[0], one], attributes={"axis": 0}, name="nxm_mask_shape")
        node = ir.node("Expand", [attention.masking.added, shape.outputs[0]], name="nxm_attention_mask")
        length.outputs[0].type = shape.outputs[0].type = ir.TensorType(ir.DataType.INT64)
        length.outputs[0].shape, shape.outputs[0].shape = ir.Shape([1]), ir.Shape([4])
        self._describe(node, attention.masking)
        return [length, shape, node]

    def _describe(self, node: ir.Node, masking: _Masking) -> None:
        """Type and sizes of what `node` writes, as far as they are known."""
        import onnx_ir as ir

        assert masking.added is not None
        out, sizes = node.outputs[0], masking.added.shape
        out.type = masking.added.type
        if sizes is not None and len(sizes) == 4:
            bias = None if masking.bias is None else masking.bias.shape
            out.shape = ir.Shape([sizes[0], 1 if bias is None else bias[1], sizes[3], sizes[3]])

    def _ones(self) -> ir.Value:
        import onnx_ir as ir

        tensor = ir.tensor(np.array([1], np.int64), name="nxm_attention_one")
        value = ir.Value(
            name=tensor.name, const_value=tensor, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([1])
        )
        self._graph.register_initializer(value)
        return value


def plain_attention(graph: ir.Graph) -> int:
    """How many attentions run as operators of their own: softmaxes that a product reads, be it through quantizers."""
    found = 0
    for node in graph:
        if node.op_type != "Softmax":
            continue
        value = node.outputs[0]
        while (behind := reader(value, "QuantizeLinear") or reader(value, "DequantizeLinear")) is not None:
            value = behind.outputs[0]
        found += any(user.op_type in PRODUCTS for user in value.consumers())
    return found


def _attention_around(softmax: ir.Node) -> _Attention | None:
    """The attention around a softmax; None for any other form."""
    add, context = only(softmax.inputs[0], "Add"), reader(softmax.outputs[0], "MatMul")
    if (
        add is None
        or context is None
        or context.inputs[0] is not softmax.outputs[0]
        or axis(softmax, -1) not in (-1, 3)
    ):
        return None
    masking = _masking_of(add, softmax.inputs[0])
    scaled = None if masking is None else only(masking.scores, "Mul") or only(masking.scores, "Div")
    scores = None if scaled is None else only(scaled.inputs[0], "MatMul")
    scale = None if scaled is None else scalar(scaled.inputs[1])
    if masking is None or scaled is None or scores is None or not scale:
        return None
    operands = query_or_value(scores.inputs[0]), key(scores.inputs[1]), query_or_value(context.inputs[1])
    last = _joined_heads(context)
    if last is None or operands[0] is None or operands[1] is None or operands[2] is None:
        return None
    if not _go_together(operands[0], operands[1], operands[2]):
        return None
    scale = 1.0 / scale if scaled.op_type == "Div" else scale
    return _Attention(operands[0], operands[1], operands[2], scale, masking, last)


def _go_together(query: Heads, key: Heads, value: Heads) -> bool:
    """True for operands that the fused operator takes: in float32, which is the only type on the CPU, of as many heads,
    with queries and keys rotated both or neither."""
    import onnx_ir as ir

    if not query.count == key.count == value.count or query.whole.dtype != ir.DataType.FLOAT:
        return False
    return (query.rotation is None) == (key.rotation is None) and value.rotation is None


def _joined_heads(context: ir.Node) -> ir.Node | None:
    """The node that puts the heads of a context side by side again, (batch, sequence, features)."""
    turned = reader(context.outputs[0], "Transpose")
    last = None if turned is None or perm(turned) != (0, 2, 1, 3) else reader(turned.outputs[0], "Reshape")
    if last is None or last.outputs[0].shape is None or len(last.outputs[0].shape) != 3:
        return None
    return last


@dataclass(frozen=True)
class _Masking:
    """What is added to `scores`: a mask, a bias (batch or 1, heads or 1, sequence, sequence), or both. `mask` is that
    of ones and zeros (batch, sequence), `added` what the graph makes of it, (batch, 1, 1, sequence)."""

    scores: ir.Value | None
    mask: ir.Value | None
    added: ir.Value | None
    bias: ir.Value | None


def _masking_of(add: ir.Node, scores: ir.Value | None) -> _Masking | None:
    """What the last Add in front of a softmax, and one before it, add to the scores (batch, heads, sequence, sequence);
    None for what the fused operator cannot add."""
    mask = _mask_of(add.inputs[1])
    if mask is None:  # as windows have it: a bias for every pair of a query and a key
        bias = add.inputs[1]
        return _Masking(add.inputs[0], None, None, bias) if _is_bias_of(bias, scores) else None
    biased = only(add.inputs[0], "Add")
    if biased is None:
        return _Masking(add.inputs[0], mask, add.inputs[1], None)
    bias = _unexpanded(biased.inputs[1])
    return None if bias is None else _Masking(biased.inputs[0], mask, add.inputs[1], bias)


def _is_bias_of(bias: ir.Value | None, scores: ir.Value | None) -> bool:
    """True for a value (batch or 1, heads or 1, sequence, sequence), of which nothing is left to repeat along the last
    two axes."""
    if bias is None or scores is None or bias.shape is None or scores.shape is None or len(bias.shape) != 4:
        return False
    broadcast = all(bias.shape[i] == 1 or same_size(bias.shape[i], scores.shape[i]) for i in (0, 1))
    return broadcast and all(same_size(bias.shape[i], scores.shape[i]) for i in (2, 3))


def _unexpanded(bias: ir.Value | None) -> ir.Value | None:
    """A bias of scores, which the fused operator repeats over the batch itself; None for one of another rank."""
    expand = producer(bias, "Expand")
    source = bias if expand is None else expand.inputs[0]
    if source is None or source.shape is None or len(source.shape) != 4:
        return None
    return source


def _mask_of(bias: ir.Value | None) -> ir.Value | None:
    """The input mask (batch, sequence) behind ``(1 - mask[:, None, None, :]) * MASKED``, else None."""
    product = producer(bias, "Mul")
    if product is None or scalar(product.inputs[1]) != MASKED:
        return None
    difference = producer(product.inputs[0], "Sub")
    if difference is None or scalar(difference.inputs[0]) != 1.0:
        return None
    cast = producer(difference.inputs[1], "Cast")
    spread = None if cast is None else producer(cast.inputs[0], "Unsqueeze")
    axes = None if spread is None else constant(spread.inputs[1])
    return spread.inputs[0] if spread is not None and axes is not None and axes.tolist() == [1, 2] else None


def _dequantize(value: ir.Value | None) -> ir.Node | None:
    node = producer(value, "DequantizeLinear")
    return node if node is not None and len(node.inputs) == 3 else None


def _is_activation(node: ir.Node) -> bool:
    codes, scale, zero = node.inputs[0], constant(node.inputs[1]), constant(node.inputs[2])
    if codes is None or codes.const_value is not None or scale is None or zero is None:
        return False
    return scale.size == zero.size == 1 and zero.dtype == np.uint8 and scale.dtype == np.float32


def _weight_features(node: ir.Node) -> int | None:
    """The output features N of a weight that a product of codes can take; None for others."""
    shape, scale, zero = _codes_shape(node.inputs[0]), constant(node.inputs[1]), constant(node.inputs[2])
    if shape is None or scale is None or zero is None or len(shape) != 2:
        return None
    features = shape[1]
    fits = scale.size == 1 or (axis(node, 1) in (1, -1) and scale.shape == (features,))
    return int(features) if fits and scale.dtype == np.float32 and not np.any(zero) else None


def _codes_shape(value: ir.Value | None) -> tuple[int, ...] | None:
    """The shape of a constant of INT8 codes, stored as such or as INT4 behind a Cast; None for others."""
    import onnx_ir as ir

    cast = producer(value, "Cast")
    if cast is None:
        codes = constant(value)
        return codes.shape if codes is not None and codes.dtype == np.int8 else None
    stored = None if cast.inputs[0] is None else cast.inputs[0].const_value
    if stored is None or stored.dtype != ir.DataType.INT4 or cast.attributes["to"].as_int() != ir.DataType.INT8:
        return None
    return stored.numpy().shape


def _bias_behind(product: ir.Node, features: int) -> tuple[ir.Node, ir.Value | None]:
    """(last node, bias): the Add of a constant (N,) behind a product, or the product itself and None."""
    add = reader(product.outputs[0], "Add")
    if add is not None:
        other = next(
            (value for value in add.inputs if value is not product.outputs[0]), None
        )  # none: twice the product
        bias = constant(other)
        if bias is not None and bias.shape == (features,):
            return add, other
    return product, None


def _replace(graph: ir.Graph, last: ir.Node, fused: ir.Node) -> None:
    """Let `fused` make what `last` made; what only fed it is removed with the rest that nothing reads."""
    old, new = last.outputs[0], fused.outputs[0]
    new.type, new.shape = old.type, old.shape
    graph.insert_before(last, fused)
    for user, index in list(old.uses()):
        user.replace_input_with(index, new)
    for index, output in enumerate(graph.outputs):
        if output is old:
            graph.outputs[index] = new
    new.name, old.name = old.name, f"{old.name}_replaced"
    graph.remove(last, safe=True)


def _declare(model: ir.Model) -> None:
    """Say the operators' domain, and drop what nothing reads any more."""
    import onnx_ir.passes.common as passes

    model.opset_imports[CONTRIB] = 1
    passes.RemoveUnusedNodesPass()(model)
