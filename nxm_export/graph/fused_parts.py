"""A fused matrix becomes a product for each of its parts.

A traced graph multiplies by the whole of it and takes what it wrote apart: a view with an axis of parts (query, key
and value), or chunks (both inputs of a gate). TensorRT then takes apart the dequantized weight instead, and multiplies
it in float (seen of TensorRT-RTX 1.7); nor can a part's output have a quantizer of its own. Rows of a weight are
independent of each other, so the parts write the same numbers as the whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from nxm_export.errors import ExportError
from nxm_export.graph.qdq import Linear, add_initializer, linears_of


def split_products(graph: ir.Graph, name: str, parts: Sequence[str]) -> None:
    """Replace every product with the fused weight `name` by one with each of its `parts`, which then are parameters of
    the graph under these names.

    Raises `ExportError` where the graph takes the parts in a way that is not known here.
    """
    weight = graph.initializers[name].const_value
    assert weight is not None
    for part, rows in zip(parts, np.split(weight.numpy(), len(parts)), strict=True):
        add_initializer(graph, part, np.ascontiguousarray(rows))
    for linear in linears_of(graph, name):
        outputs = _products(graph, linear, parts)
        taken = list(_taken(linear.output, len(parts), name))
        for number, value in taken:
            _replace(graph, value, outputs[number])
        if {number for number, _ in taken} != set(range(len(parts))):
            raise _taken_otherwise(name, "leaves out a part")


def _products(graph: ir.Graph, linear: Linear, parts: Sequence[str]) -> list[ir.Value]:
    """What each part writes: a product with its rows, and its piece of the bias."""
    biases: Sequence[ir.Value | None] = [None] * len(parts)
    add = linear.output.producer()
    if add is not None and add is not linear.product:
        (bias,) = (value for value in add.inputs if value is not None and value is not linear.product.outputs[0])
        assert bias.const_value is not None
        pieces = np.split(bias.const_value.numpy(), len(parts))
        names = [f"{part.removesuffix('.weight')}.bias" for part in parts]
        biases = [add_initializer(graph, name, piece) for name, piece in zip(names, pieces, strict=True)]
    outputs = []
    for part, bias_part in zip(parts, biases, strict=True):
        parameter = graph.initializers[part]
        transpose = ir.node("Transpose", [parameter], attributes={"perm": [1, 0]})
        product = ir.node("MatMul", [linear.x, transpose.outputs[0]])
        nodes = [transpose, product]
        if bias_part is not None:
            nodes.append(ir.node("Add", [product.outputs[0], bias_part]))
        assert parameter.shape is not None
        out, in_ = parameter.shape
        transpose.outputs[0].type, transpose.outputs[0].shape = parameter.type, ir.Shape([in_, out])
        for node in nodes[1:]:
            node.outputs[0].type = linear.output.type
            if linear.output.shape is not None:
                node.outputs[0].shape = ir.Shape([*linear.output.shape[:-1], out])
        graph.insert_before(linear.product, nodes)
        outputs.append(nodes[-1].outputs[0])
    return outputs


def _taken(output: ir.Value, parts: int, name: str) -> Iterator[tuple[int, ir.Value]]:
    """Every value that is one part of `output`, with the part's number."""
    for node in output.consumers():
        if node.op_type == "SplitToSequence" and _ints(node.inputs[1]) == [_size(output, -1) // parts]:
            for at in node.outputs[0].consumers():
                yield _one(at.inputs[1], name), at.outputs[0]
        elif node.op_type == "Reshape" and _size(node.outputs[0], -3) == parts:
            for piece in node.outputs[0].consumers():
                yield _sliced(piece, name)
        else:
            raise _taken_otherwise(name, f"reads it by {node.op_type}")


def _sliced(node: ir.Node, name: str) -> tuple[int, ir.Value]:
    """The part that a Slice of one along the axis of parts, and a Squeeze of this axis, take."""
    users = node.outputs[0].consumers()
    if node.op_type != "Slice" or len(node.inputs) > 4 or len(users) != 1 or users[0].op_type != "Squeeze":
        raise _taken_otherwise(name, f"takes its parts by {node.op_type}")
    start, end, axis = (_one(value, name) for value in node.inputs[1:])
    rank = len(node.outputs[0].shape or ())
    if end != start + 1 or axis not in (-3, rank - 3) or _one(users[0].inputs[1], name) not in (-3, rank - 3):
        raise _taken_otherwise(name, "slices along another axis")
    return start, users[0].outputs[0]


def _replace(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    """Let all that reads `old` read `new`, in the shape of `old`: batch and sequence, then sizes that are known."""
    if old.shape is not None and new.shape is not None and len(old.shape) != len(new.shape):
        sizes = [0, 0, *old.shape[2:]]  # 0 copies
        shape = add_initializer(graph, f"nxm_part_{'x'.join(map(str, sizes[2:]))}", np.array(sizes, np.int64))
        view, producer = ir.node("Reshape", [new, shape]), new.producer()
        view.outputs[0].type, view.outputs[0].shape = old.type, old.shape
        assert producer is not None
        graph.insert_after(producer, view)
        new = view.outputs[0]
    for user in list(old.consumers()):
        for i, read in enumerate(user.inputs):
            if read is old:
                user.replace_input_with(i, new)


def _size(value: ir.Value, axis: int) -> int:
    """A size that the trace knows, 0 for another."""
    size = value.shape[axis] if value.shape is not None and len(value.shape) >= -axis else 0
    return size if isinstance(size, int) else 0


def _ints(value: ir.Value | None) -> list[int]:
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return [] if tensor is None else [int(number) for number in tensor.numpy().reshape(-1)]


def _one(value: ir.Value | None, name: str) -> int:
    numbers = _ints(value)
    if len(numbers) != 1:
        raise _taken_otherwise(name, "takes a part whose number is no constant")
    return numbers[0]


def _taken_otherwise(name: str, what: str) -> ExportError:
    return ExportError(
        f"{name}: the exported graph {what}; this transformers version takes a fused matrix apart differently: export "
        "for target cpu without output quantizers (--placement inputs), which keeps it whole"
    )
