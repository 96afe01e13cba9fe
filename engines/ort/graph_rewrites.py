"""Rewrites of a Q/DQ graph for ONNX Runtime's CPU kernels, each with what it does to the numbers.

* `integer_products`: ``MatMul(DQ(a), DQ(w)) + bias`` becomes ``MatMulIntegerToFloat`` of the codes, bias included. It
  is what ONNX Runtime's own optimizer makes of the pairs, but for the bias: the sum of products is exact in INT32 here
  and is rounded term by term in float there, so results differ by float rounding alone, and for the better.
* `fused_attention`: the scores, mask, softmax and context of a head become ``MultiHeadAttention`` in float32, the mask
  its ``key_padding_mask``, a bias of relative positions or a mask of windows its ``attention_bias``. Queries and
  keys that are rotated in between become ``RotaryEmbedding`` (`engines.ort.attention_operands`). Same formula, other
  order of summation: float rounding again. Masks must be 0 or 1.

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
    """The attention around a softmax: its operands, the mask (batch, sequence) and the bias that its scores get (batch
    or 1, heads or 1, sequence, sequence), each None without, and the last of its nodes."""

    query: Heads
    key: Heads
    value: Heads
    scale: float
    mask: ir.Value | None
    bias: ir.Value | None
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


def fused_attention(model: ir.Model) -> FusedAttention:
    """Put ``MultiHeadAttention`` for every attention in float, in place."""
    import onnx_ir as ir

    graph, fused, rotary = model.graph, 0, 0
    masks: dict[ir.Value, ir.Value] = {}
    operands = OperandWriter(graph)
    for softmax in [node for node in graph if node.op_type == "Softmax"]:
        attention = _attention_around(softmax)
        if attention is None:
            continue
        mask = attention.mask
        if mask is not None and mask not in masks:
            cast = ir.node("Cast", [mask], attributes={"to": int(ir.DataType.INT32)}, name=f"{mask.name}_int32")
            graph.insert_before(graph[0], cast)
            masks[mask] = cast.outputs[0]
        attributes = [
            ir.AttrInt64("num_heads", attention.query.count),
            ir.AttrFloat32("scale", attention.scale),
            ir.AttrFloat32("mask_filter_value", MASKED),
        ]
        heads = (attention.query, attention.key, attention.value)
        inputs = [operands.written(one, attention.last) for one in heads]
        optional = [None, None if mask is None else masks[mask], attention.bias]
        while optional[-1] is None:
            optional.pop()
        _replace(
            graph,
            attention.last,
            ir.Node(CONTRIB, "MultiHeadAttention", inputs + optional, attributes, name=softmax.name),
        )
        fused += 1
        rotary += attention.query.rotation is not None
    if fused:
        _declare(model)
    return FusedAttention(fused, rotary, plain_attention(graph))


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
    return _Attention(operands[0], operands[1], operands[2], scale, masking.mask, masking.bias, last)


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
    """What is added to scores: a mask (batch, sequence) of ones and zeros, a bias, or both."""

    scores: ir.Value | None
    mask: ir.Value | None
    bias: ir.Value | None


def _masking_of(add: ir.Node, scores: ir.Value | None) -> _Masking | None:
    """What the last Add in front of a softmax, and one before it, add to the scores (batch, heads, sequence, sequence);
    None for what the fused operator cannot add."""
    mask = _mask_of(add.inputs[1])
    if mask is None:  # as windows have it: a bias for every pair of a query and a key
        bias = add.inputs[1]
        return _Masking(add.inputs[0], None, bias) if _is_bias_of(bias, scores) else None
    biased = only(add.inputs[0], "Add")
    if biased is None:
        return _Masking(add.inputs[0], mask, None)
    bias = _unexpanded(biased.inputs[1])
    return None if bias is None else _Masking(biased.inputs[0], mask, bias)


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
        other = next(value for value in add.inputs if value is not product.outputs[0])
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
