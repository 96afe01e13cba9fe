"""Rewrites of a Q/DQ graph for ONNX Runtime's CPU kernels, each with what it does to the numbers.

* `integer_products`: ``MatMul(DQ(a), DQ(w)) + bias`` becomes ``MatMulIntegerToFloat`` of the codes, bias included. It
  is what ONNX Runtime's own optimizer makes of the pairs, but for the bias: the sum of products is exact in INT32 here
  and is rounded term by term in float there, so results differ by float rounding alone, and for the better.
* `fused_attention`: the scores, mask, softmax and context of a head become ``MultiHeadAttention`` in float32, the mask
  its ``key_padding_mask``, a bias of relative positions its ``attention_bias``. Same formula, other order of summation:
  float rounding again. Masks must be 0 or 1.

Both look for exactly the form that `nxm_export.graph.exporter` writes, by structure, and leave alone what differs in
anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from nxm_export.hf.finite_masks import MASKED  # the fused operator is told what padding gets in the graph

if TYPE_CHECKING:
    import onnx_ir as ir

CONTRIB = "com.microsoft"


@dataclass(frozen=True)
class _Heads:
    """A tensor (batch, sequence, features) that is split into `count` heads."""

    value: ir.Value
    count: int


@dataclass(frozen=True)
class _Attention:
    """The attention around a softmax: its inputs, the mask (batch, sequence), the bias that its scores get (batch or 1,
    heads or 1, sequence, sequence), None without, and the last of its nodes."""

    query: ir.Value
    key: ir.Value
    value: ir.Value
    heads: int
    scale: float
    mask: ir.Value
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


def fused_attention(model: ir.Model) -> int:
    """Put ``MultiHeadAttention`` for every attention in float, in place; returns how many."""
    import onnx_ir as ir

    graph, count = model.graph, 0
    masks: dict[ir.Value, ir.Value] = {}
    for softmax in [node for node in graph if node.op_type == "Softmax"]:
        attention = _attention_around(softmax)
        if attention is None:
            continue
        mask = attention.mask
        if mask not in masks:
            cast = ir.node("Cast", [mask], attributes={"to": int(ir.DataType.INT32)}, name=f"{mask.name}_int32")
            graph.insert_before(graph[0], cast)
            masks[mask] = cast.outputs[0]
        attributes = [
            ir.AttrInt64("num_heads", attention.heads),
            ir.AttrFloat32("scale", attention.scale),
            ir.AttrFloat32("mask_filter_value", MASKED),
        ]
        inputs = [attention.query, attention.key, attention.value, None, masks[mask], attention.bias]
        inputs = inputs if attention.bias is not None else inputs[:-1]
        fused = ir.Node(CONTRIB, "MultiHeadAttention", inputs, attributes, name=softmax.name)
        _replace(graph, attention.last, fused)
        count += 1
    if count:
        _declare(model)
    return count


def _attention_around(softmax: ir.Node) -> _Attention | None:
    """The attention around a softmax; None for any other form."""
    import onnx_ir as ir

    add = _only(softmax.inputs[0], "Add")
    if add is None or softmax.attributes["axis"].as_int() not in (-1, 3):
        return None
    mask, biased = _mask_of(add.inputs[1]), _only(add.inputs[0], "Add")
    bias = None if biased is None else _unexpanded(biased.inputs[1])
    before = add.inputs[0] if biased is None else biased.inputs[0]
    scaled = _only(before, "Mul") or _only(before, "Div")
    if scaled is None or mask is None or (biased is not None and bias is None):
        return None
    scale = _scalar(scaled.inputs[1])
    if scale and scaled.op_type == "Div":
        scale = 1.0 / scale
    scores = _only(scaled.inputs[0], "MatMul")
    context = _reader(softmax.outputs[0], "MatMul")
    if scale is None or scores is None or context is None or context.inputs[0] is not softmax.outputs[0]:
        return None
    query, key = _heads_of(scores.inputs[0], (0, 2, 1, 3)), _heads_of(scores.inputs[1], (0, 2, 3, 1))
    value = _heads_of(context.inputs[1], (0, 2, 1, 3))
    turned = _reader(context.outputs[0], "Transpose")
    last = None if turned is None else _reader(turned.outputs[0], "Reshape")
    if query is None or key is None or value is None or turned is None or last is None:
        return None
    if not query.count == key.count == value.count:
        return None
    if query.value.dtype != ir.DataType.FLOAT:  # there is no other on the CPU
        return None
    if _perm(turned) != (0, 2, 1, 3) or last.outputs[0].shape is None or len(last.outputs[0].shape) != 3:
        return None
    return _Attention(query.value, key.value, value.value, query.count, scale, mask, bias, last)


def _unexpanded(bias: ir.Value | None) -> ir.Value | None:
    """A bias of scores, which the fused operator repeats over the batch itself; None for one of another rank."""
    expand = _producer(bias, "Expand")
    source = bias if expand is None else expand.inputs[0]
    if source is None or source.shape is None or len(source.shape) != 4:
        return None
    return source


def _heads_of(value: ir.Value | None, perm: tuple[int, ...]) -> _Heads | None:
    """What a transpose of this permutation splits into heads."""
    transpose = _only(value, "Transpose")
    reshape = None if transpose is None or _perm(transpose) != perm else _only(transpose.inputs[0], "Reshape")
    whole = None if reshape is None else reshape.inputs[0]
    if reshape is None or whole is None or whole.shape is None or len(whole.shape) != 3:
        return None
    shape = reshape.outputs[0].shape
    if shape is None or len(shape) != 4 or not isinstance(shape[2], int):
        return None
    return _Heads(whole, shape[2])


def _mask_of(bias: ir.Value | None) -> ir.Value | None:
    """The input mask (batch, sequence) behind ``(1 - mask[:, None, None, :]) * MASKED``, else None."""
    product = _producer(bias, "Mul")
    if product is None or _scalar(product.inputs[1]) != MASKED:
        return None
    difference = _producer(product.inputs[0], "Sub")
    if difference is None or _scalar(difference.inputs[0]) != 1.0:
        return None
    cast = _producer(difference.inputs[1], "Cast")
    spread = None if cast is None else _producer(cast.inputs[0], "Unsqueeze")
    axes = None if spread is None else _constant(spread.inputs[1])
    return spread.inputs[0] if spread is not None and axes is not None and axes.tolist() == [1, 2] else None


def _constant(value: ir.Value | None) -> np.ndarray | None:
    """The array of a constant value, None for others."""
    return None if value is None or value.const_value is None else value.const_value.numpy()


def _scalar(value: ir.Value | None) -> float | None:
    array = _constant(value)
    return float(array.reshape(-1)[0]) if array is not None and array.size == 1 else None


def _producer(value: ir.Value | None, op: str) -> ir.Node | None:
    """The node of type `op` that made `value`."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op else None


def _only(value: ir.Value | None, op: str) -> ir.Node | None:
    """The node of type `op` that made `value`, where nothing else reads it."""
    alone = value is not None and len(value.consumers()) == 1 and not value.is_graph_output()
    return _producer(value, op) if alone else None


def _reader(value: ir.Value, op: str) -> ir.Node | None:
    """The one node that reads `value`, where it is of type `op`."""
    users = value.consumers()
    return users[0] if len(users) == 1 and users[0].op_type == op and not value.is_graph_output() else None


def _perm(node: ir.Node) -> tuple[int, ...]:
    return tuple(node.attributes["perm"].as_ints()) if "perm" in node.attributes else ()


def _dequantize(value: ir.Value | None) -> ir.Node | None:
    node = _producer(value, "DequantizeLinear")
    return node if node is not None and len(node.inputs) == 3 else None


def _is_activation(node: ir.Node) -> bool:
    codes, scale, zero = node.inputs[0], _constant(node.inputs[1]), _constant(node.inputs[2])
    if codes is None or codes.const_value is not None or scale is None or zero is None:
        return False
    return scale.size == zero.size == 1 and zero.dtype == np.uint8 and scale.dtype == np.float32


def _weight_features(node: ir.Node) -> int | None:
    """The output features N of a weight that a product of codes can take; None for others."""
    shape, scale, zero = _codes_shape(node.inputs[0]), _constant(node.inputs[1]), _constant(node.inputs[2])
    if shape is None or scale is None or zero is None or len(shape) != 2:
        return None
    axis, features = node.attributes["axis"].as_int() if "axis" in node.attributes else 1, shape[1]
    fits = scale.size == 1 or (axis in (1, -1) and scale.shape == (features,))
    return int(features) if fits and scale.dtype == np.float32 and not np.any(zero) else None


def _codes_shape(value: ir.Value | None) -> tuple[int, ...] | None:
    """The shape of a constant of INT8 codes, stored as such or as INT4 behind a Cast; None for others."""
    import onnx_ir as ir

    cast = _producer(value, "Cast")
    if cast is None:
        codes = _constant(value)
        return codes.shape if codes is not None and codes.dtype == np.int8 else None
    stored = None if cast.inputs[0] is None else cast.inputs[0].const_value
    if stored is None or stored.dtype != ir.DataType.INT4 or cast.attributes["to"].as_int() != ir.DataType.INT8:
        return None
    return stored.numpy().shape


def _bias_behind(product: ir.Node, features: int) -> tuple[ir.Node, ir.Value | None]:
    """(last node, bias): the Add of a constant (N,) behind a product, or the product itself and None."""
    add = _reader(product.outputs[0], "Add")
    if add is not None:
        other = next(value for value in add.inputs if value is not product.outputs[0])
        bias = _constant(other)
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
