"""How a linear layer is written in the graph: as MatMul, Gemm or 1x1 convolution (`LOWERINGS`).

The three mean the same; runtimes have different kernels for them. A traced graph has ``MatMul(x, Transpose(W)) + bias``
on x (batch, sequence, K). Gemm takes a matrix, a convolution an image of one pixel per token, so both get a reshape in
front, ``(batch * sequence, K)`` or ``(batch * sequence, K, 1, 1)``, and one behind: no data moves. `cancel_reshapes`
then takes out the pairs that meet around elementwise nodes, so that a product, GELU and the quantizer behind it stay
neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from nxm_export.contract.choices import LOWERINGS
from nxm_export.errors import ExportError
from nxm_export.graph.qdq import Linear, add_initializer

# What computes one element of its output from one of its input.
ELEMENTWISE = ("Gelu", "Relu", "Erf", "Tanh", "Mul", "Add", "Div", "Sub", "Pow", "Cast")
_BETWEEN_RESHAPES = (*ELEMENTWISE, "QuantizeLinear", "DequantizeLinear")


@dataclass
class Lowering:
    """Rewrites linear layers of one graph; layers that read the same tensor share the reshape in front of them."""

    graph: ir.Graph
    form: str

    def __post_init__(self) -> None:
        if self.form not in LOWERINGS:
            raise ExportError(f"unknown lowering {self.form!r}; choose one of {', '.join(LOWERINGS)}")
        self._inputs: dict[int, ir.Value] = {}

    def __call__(self, linear: Linear, parameter: str) -> Linear:
        """The layer of weight `parameter` in the form asked for; a MatMul is left as it is."""
        if self.form == "matmul":
            return linear
        graph, product = self.graph, linear.product
        weight = graph.initializers[parameter]
        assert weight.const_value is not None
        n, k = weight.const_value.shape.numpy()
        bias = self._take_bias(linear)
        x = self._reshaped(linear.x, k, product)
        if self.form == "gemm":
            lowered = ir.node("Gemm", [x, weight, *bias], attributes={"transB": 1}, name=product.name)
        else:
            image = add_initializer(graph, f"{parameter}_image", weight.const_value.numpy().reshape(n, k, 1, 1))
            lowered = ir.node("Conv", [x, image, *bias], attributes={"kernel_shape": [1, 1]}, name=product.name)
        y = lowered.outputs[0]
        y.name, y.type = f"{product.name}_product", linear.output.type
        shape = self._token_shape(n, product)
        restored = ir.node("Reshape", [y, shape], name=f"{product.name}_restore")
        restored.outputs[0].type, restored.outputs[0].shape = linear.output.type, linear.output.shape
        graph.insert_before(product, [lowered, restored])
        for user in list(linear.output.consumers()):
            for i, read in enumerate(user.inputs):
                if read is linear.output:
                    user.replace_input_with(i, restored.outputs[0])
        add = linear.output.producer()
        graph.remove([add, product] if add is not None and add is not product else [product], safe=True)
        return Linear(lowered, x, y)

    def _take_bias(self, linear: Linear) -> list[ir.Value]:
        if linear.output is linear.product.outputs[0]:
            return []
        add = linear.output.producer()
        assert add is not None
        return [value for value in add.inputs if value is not None and value is not linear.product.outputs[0]]

    def _reshaped(self, x: ir.Value, k: int, before: ir.Node) -> ir.Value:
        if id(x) not in self._inputs:
            sizes = [-1, k] if self.form == "gemm" else [-1, k, 1, 1]
            shape = add_initializer(self.graph, f"nxm_rows_{'x'.join(map(str, sizes[1:]))}", np.array(sizes, np.int64))
            node = ir.node("Reshape", [x, shape], name=f"{x.name}_rows")
            node.outputs[0].type, node.outputs[0].name = x.type, f"{x.name}_rows"
            self.graph.insert_before(before, node)
            self._inputs[id(x)] = node.outputs[0]
        return self._inputs[id(x)]

    def _token_shape(self, n: int, before: ir.Node) -> ir.Value:
        """(batch, sequence, n) as a tensor, from the shape of the first graph input."""
        size = add_initializer(self.graph, f"nxm_channels_{n}", np.array([n], np.int64))
        tokens = ir.node("Shape", [self.graph.inputs[0]], attributes={"start": 0, "end": 2})
        shape = ir.node("Concat", [tokens.outputs[0], size], attributes={"axis": 0})
        for value in (tokens.outputs[0], shape.outputs[0]):
            value.type = ir.TensorType(ir.DataType.INT64)
        self.graph.insert_before(before, [tokens, shape])
        return shape.outputs[0]


def cancel_reshapes(graph: ir.Graph) -> int:
    """Take out reshapes to tokens that only elementwise nodes separate from the same rows again; returns how many."""
    count = 0
    for restore in [node for node in graph if node.op_type == "Reshape" and (node.name or "").endswith("_restore")]:
        elementwise = _region(restore)
        if elementwise is None:
            continue
        region, back = elementwise
        rows = restore.inputs[0]
        for node in [*region, *back]:
            for i, read in enumerate(node.inputs):
                if read is restore.outputs[0]:
                    node.replace_input_with(i, rows)
        for node in back:
            source = node.inputs[0]
            for user in list(node.outputs[0].consumers()):
                for i, read in enumerate(user.inputs):
                    if read is node.outputs[0]:
                        user.replace_input_with(i, source)
        for node in region:
            for value in node.outputs:
                value.shape = None  # it was (batch, sequence, n); rows now
        count += 1
    return count


def _region(restore: ir.Node) -> tuple[list[ir.Node], list[ir.Node]] | None:
    """The elementwise nodes behind a reshape to tokens, and the reshapes to rows that end them; None when something
    else reads a value in between."""
    region: list[ir.Node] = []
    back: list[ir.Node] = []
    inside = {id(restore.outputs[0])}
    frontier = list(restore.outputs[0].consumers())
    while frontier:
        node = frontier.pop()
        if node in region or node in back:
            continue
        if node.op_type == "Reshape" and (node.inputs[0].name or "") + "_rows" == node.name:  # type: ignore[union-attr]
            back.append(node)
        elif node.op_type in _BETWEEN_RESHAPES and not node.outputs[0].is_graph_output():
            region.append(node)
            inside |= {id(value) for value in node.outputs}
            frontier += [user for value in node.outputs for user in value.consumers()]
        else:
            return None
    constant = all(
        id(value) in inside or _is_scalar(value) for node in region for value in node.inputs if value is not None
    )
    return (region, back) if back and constant else None


def _is_scalar(value: ir.Value) -> bool:
    tensor = ir.convenience.get_const_tensor(value)
    return tensor is not None and tensor.size == 1
