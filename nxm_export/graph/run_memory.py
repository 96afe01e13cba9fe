"""How much memory running a graph takes at least: the largest set of its values that live at the same time.

Counted from the shapes in the file, node by node. A value lives from the node that writes it to the last that reads it;
what only renames, reshapes or dequantizes shares the memory of what it reads, and an operator that works element by
element may write where it reads. What has no shape in the file counts nothing. So the true number is hardly lower: a
runtime adds its weights, buffers of its own, and what it does not give back.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

# Their outputs lie where their inputs lie, or are made again when they are read.
_VIEWS = (
    "Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Transpose", "Expand", "Cast", "DequantizeLinear",
)  # fmt: skip
# They read all of their inputs while they write.
_PRODUCTS = (
    "MatMul", "Gemm", "Conv", "Einsum", "MatMulInteger", "MatMulIntegerToFloat", "QLinearMatMul", "QGemm",
    "MultiHeadAttention", "Attention",
)  # fmt: skip
# Attention as one operator, whose scores are no value of the graph, and its attribute with the number of heads.
_FUSED_ATTENTION = {"MultiHeadAttention": "num_heads", "Attention": "q_num_heads"}


def run_memory(model: ir.Model, batch: int, sequence: int, *, scores: bool) -> int:
    """Bytes of the values of one run of `batch` x `sequence`, without the weights.

    The first axis of an input is the batch where its size is free, and every other free axis is as long as the
    sequence. `scores`: attention's, (batch, heads, sequence, sequence), lie in memory as a whole; a runtime that fuses
    attention never has them.
    """
    graph = model.graph
    sizes = _Sizes(graph.inputs, batch, sequence, scores=scores)
    owners: dict[ir.Value, ir.Value] = {}
    last: dict[ir.Value, int] = {}
    nodes = list(graph)
    for at, node in enumerate(nodes):
        read = [owners.get(value, value) for value in node.inputs if value is not None]
        last.update(dict.fromkeys(read, at))
        if node.op_type in _VIEWS and read:
            owners.update(dict.fromkeys(node.outputs, read[0]))
    last.update({owners.get(value, value): len(nodes) for value in graph.outputs})
    living = highest = 0
    for at, node in enumerate(nodes):
        written = 0 if node.op_type in _VIEWS else sum(sizes.bytes(value) for value in node.outputs)
        ends = {owners.get(value, value) for value in node.inputs if value is not None}
        done = sum(sizes.bytes(value) for value in ends if last[value] == at and value.producer() is not None)
        if node.op_type in _PRODUCTS:
            highest = max(highest, living + written + sizes.inside(node))
        else:
            highest = max(highest, living + max(0, written - done))
        unread = sum(sizes.bytes(value) for value in node.outputs if value not in last and node.op_type not in _VIEWS)
        living += written - done - unread
    return highest


class _Sizes:
    """Bytes of values, with the free sizes of a graph's inputs bound."""

    def __init__(self, inputs: Iterable[ir.Value], batch: int, sequence: int, *, scores: bool) -> None:
        self._batch, self._sequence, self._scores = batch, sequence, scores
        self._bound: dict[str, int] = {}
        self._lengths: set[str] = set()
        for value in inputs:
            for axis, size in enumerate(value.shape or ()):
                if isinstance(size, ir.SymbolicDim) and size.value is not None:
                    self._bound.setdefault(size.value, sequence if axis else batch)
                    self._lengths |= {size.value} if axis else set()

    def bytes(self, value: ir.Value) -> int:
        """0 for constants, and for what the file does not say."""
        if value.shape is None or value.dtype is None or value.const_value is not None:
            return 0
        lengths = [size for size in value.shape if isinstance(size, ir.SymbolicDim) and size.value in self._lengths]
        if len(lengths) > 1 and not self._scores:
            return 0
        count = 1
        for size in value.shape:
            count *= size if isinstance(size, int) else self._bound.get(size.value or "", 0)
        return int(count * value.dtype.itemsize)

    def inside(self, node: ir.Node) -> int:
        """Bytes that an operator needs for itself."""
        heads = node.attributes.get(_FUSED_ATTENTION.get(node.op_type, ""))
        if heads is None or not self._scores:
            return 0
        return 4 * self._batch * heads.as_int() * self._sequence**2
