"""Rewrites of a Q/DQ graph for ONNX Runtime's CPU kernels, each with what it does to the numbers.

* `integer_products`: ``MatMul(DQ(a), DQ(w)) + bias`` becomes ``MatMulIntegerToFloat`` of the codes, bias included. It is
  what ONNX Runtime's own optimizer makes of the pairs, but for the bias: the sum of products is exact in INT32 here and is
  rounded term by term in float there, so results differ by float rounding alone, and for the better.
* `fused_attention`: the scores, mask, softmax and context of a head become ``MultiHeadAttention`` in float32, the mask its
  ``key_padding_mask``. Same formula, other order of summation: float rounding again. Masks must be 0 or 1.

Both look for exactly the form that `nxm_export.graph.exporter` writes, by structure, and leave alone what differs in anything.
"""

from __future__ import annotations

from typing import Any

import numpy as np

CONTRIB = "com.microsoft"
MASKED = -1e4  # what `nxm_export.graph.exporter` adds to the scores of padding; the fused operator is told the same


def integer_products(model: Any) -> int:
    """Put products of codes for products of dequantized values, in place; returns how many.

    The activation's pair must be UINT8 with one scale, the weight an INT8 constant (K, N) with zero point 0 and one scale
    or one per output channel.
    """
    import onnx_ir as ir

    graph, count = model.graph, 0
    for product in [node for node in graph if node.op_type == "MatMul" and not node.domain]:
        left, right = (_dequantize(value) for value in product.inputs)
        if left is None or right is None or not _is_activation(left) or not _is_weight(right):
            continue
        inputs = [left.inputs[0], right.inputs[0], left.inputs[1], right.inputs[1], left.inputs[2], None]
        last, bias = _bias_behind(product, right.inputs[0].shape[1])
        fused = ir.Node(
            CONTRIB, "MatMulIntegerToFloat", [*inputs, bias] if bias is not None else inputs, name=product.name
        )
        _replace(graph, last, fused)
        count += 1
    if count:
        _declare(model)
    return count


def fused_attention(model: Any) -> int:
    """Put ``MultiHeadAttention`` for every attention in float, in place; returns how many."""
    import onnx_ir as ir

    graph, count, masks = model.graph, 0, {}
    for softmax in [node for node in graph if node.op_type == "Softmax"]:
        found = _attention_around(softmax)
        if found is None:
            continue
        query, key, value, heads, scale, mask, last = found
        if mask not in masks:
            cast = ir.node("Cast", [mask], attributes={"to": int(ir.DataType.INT32)}, name=f"{mask.name}_int32")
            graph.insert_before(graph[0], cast)
            masks[mask] = cast.outputs[0]
        attributes = [
            ir.AttrInt64("num_heads", heads),
            ir.AttrFloat32("scale", scale),
            ir.AttrFloat32("mask_filter_value", MASKED),
        ]
        fused = ir.Node(
            CONTRIB, "MultiHeadAttention", [query, key, value, None, masks[mask]], attributes, name=softmax.name
        )
        _replace(graph, last, fused)
        count += 1
    if count:
        _declare(model)
    return count


def _attention_around(softmax: Any) -> tuple[Any, Any, Any, int, float, Any, Any] | None:
    """(query, key, value, heads, scale, mask input, last node) around a softmax; None for any other form."""
    import onnx_ir as ir

    add = _only(softmax.inputs[0], "Add")
    if add is None or softmax.attributes["axis"].as_int() not in (-1, 3):
        return None
    scaled, bias = (_only(add.inputs[0], "Mul"), add.inputs[1])
    mask = _mask_of(bias)
    if scaled is None or mask is None:
        return None
    scale = _scalar(scaled.inputs[1])
    scores = _only(scaled.inputs[0], "MatMul")
    context = _reader(softmax.outputs[0], "MatMul")
    if scale is None or scores is None or context is None or context.inputs[0] is not softmax.outputs[0]:
        return None
    query, key = _heads_of(scores.inputs[0], (0, 2, 1, 3)), _heads_of(scores.inputs[1], (0, 2, 3, 1))
    value = _heads_of(context.inputs[1], (0, 2, 1, 3))
    turned = _reader(context.outputs[0], "Transpose")
    last = None if turned is None else _reader(turned.outputs[0], "Reshape")
    if query is None or key is None or value is None or last is None or not query[1] == key[1] == value[1]:
        return None
    if query[0].dtype != ir.DataType.FLOAT:  # there is no other on the CPU
        return None
    if _perm(turned) != (0, 2, 1, 3) or last.outputs[0].shape is None or len(last.outputs[0].shape) != 3:
        return None
    return query[0], key[0], value[0], query[1], scale, mask, last


def _heads_of(value: Any, perm: tuple[int, ...]) -> tuple[Any, int] | None:
    """(tensor (batch, sequence, features), heads) that a transpose of this permutation splits into heads."""
    transpose = _only(value, "Transpose")
    reshape = None if transpose is None or _perm(transpose) != perm else _only(transpose.inputs[0], "Reshape")
    if reshape is None or reshape.inputs[0].shape is None or len(reshape.inputs[0].shape) != 3:
        return None
    shape = reshape.outputs[0].shape
    if shape is None or len(shape) != 4 or not isinstance(shape[2], int):
        return None
    return reshape.inputs[0], shape[2]


def _mask_of(bias: Any) -> Any:
    """The input mask (batch, sequence) behind ``(1 - mask[:, None, None, :]) * MASKED``, else None."""
    product = bias.producer()
    if product is None or product.op_type != "Mul" or _scalar(product.inputs[1]) != MASKED:
        return None
    difference = product.inputs[0].producer()
    if difference is None or difference.op_type != "Sub" or _scalar(difference.inputs[0]) != 1.0:
        return None
    cast = difference.inputs[1].producer()
    spread = cast.inputs[0].producer() if cast is not None and cast.op_type == "Cast" else None
    if spread is None or spread.op_type != "Unsqueeze":
        return None
    axes = spread.inputs[1].const_value
    return spread.inputs[0] if axes is not None and axes.numpy().tolist() == [1, 2] else None


def _scalar(value: Any) -> float | None:
    found = None if value is None else value.const_value
    return float(found.numpy().reshape(-1)[0]) if found is not None and found.size == 1 else None


def _only(value: Any, op: str) -> Any:
    """The node of type `op` that made `value`, where nothing else reads it."""
    node = value.producer()
    fits = node is not None and node.op_type == op and len(value.consumers()) == 1 and not value.is_graph_output()
    return node if fits else None


def _reader(value: Any, op: str) -> Any:
    """The one node that reads `value`, where it is of type `op`."""
    users = value.consumers()
    return users[0] if len(users) == 1 and users[0].op_type == op and not value.is_graph_output() else None


def _perm(node: Any) -> tuple[int, ...]:
    return tuple(node.attributes["perm"].as_ints()) if "perm" in node.attributes else ()


def _dequantize(value: Any) -> Any:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == "DequantizeLinear" and len(node.inputs) == 3 else None


def _is_activation(node: Any) -> bool:
    codes, scale, zero = node.inputs
    return (
        codes.const_value is None
        and all(
            value is not None and value.const_value is not None and value.const_value.size == 1
            for value in (scale, zero)
        )
        and zero.const_value.numpy().dtype == np.uint8
        and scale.const_value.numpy().dtype == np.float32
    )


def _is_weight(node: Any) -> bool:
    codes, scale, zero = (value.const_value if value is not None else None for value in node.inputs)
    if codes is None or scale is None or zero is None or len(codes.shape) != 2 or codes.numpy().dtype != np.int8:
        return False
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
    return bool(
        scale.numpy().dtype == np.float32
        and (scale.size == 1 or (axis in (1, -1) and scale.shape == (codes.shape[1],)))
        and not np.any(zero.numpy())
    )


def _bias_behind(product: Any, features: int) -> tuple[Any, Any]:
    """(last node, bias): the Add of a constant (N,) behind a product, or the product itself and None."""
    add = _reader(product.outputs[0], "Add")
    if add is not None:
        other = next(value for value in add.inputs if value is not product.outputs[0])
        if other.const_value is not None and tuple(other.const_value.shape) == (features,):
            return add, other
    return product, None


def _replace(graph: Any, last: Any, fused: Any) -> None:
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


def _declare(model: Any) -> None:
    """Say the operators' domain, and drop what nothing reads any more."""
    import onnx_ir.passes.common as passes

    model.opset_imports[CONTRIB] = 1
    passes.RemoveUnusedNodesPass()(model)
