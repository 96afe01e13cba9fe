"""Quantize/dequantize pairs in an ONNX graph: the reference arithmetic, and the two edits that put pairs in.

A weight becomes an INT8 initializer and a DequantizeLinear with one scale per output channel; an activation becomes a
QuantizeLinear and DequantizeLinear with one static scale and zero point 0. Both edits find their place by parameter
name in a graph that still has its parameters under their own names (`linears_of`), never by shape or order: query, key
and value have equal shapes, and a swap would be silent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from nxm_export.errors import ExportError

INT8 = (-128, 127)


def quantize(x: np.ndarray, scale: npt.ArrayLike, qmin: int = INT8[0], qmax: int = INT8[1]) -> np.ndarray:
    """``clip(round_half_even(x / scale), qmin, qmax)`` as int8: ONNX QuantizeLinear with zero point 0.

    Half precision is divided in float32, as runtimes do; its own rounding of the quotient would make ties of its own.
    """
    kind = np.promote_types(x.dtype, np.float32)
    codes: np.ndarray = np.clip(np.rint(x.astype(kind) / np.asarray(scale).astype(kind)), qmin, qmax).astype(np.int8)
    return codes


def dequantize(codes: np.ndarray, scale: npt.ArrayLike, dtype: np.dtype | type = np.float32) -> np.ndarray:
    """``codes * scale``: ONNX DequantizeLinear, zero point 0."""
    values: np.ndarray = codes.astype(dtype) * np.asarray(scale, dtype)
    return values


@dataclass(frozen=True)
class Linear:
    """One linear layer in a graph: ``output = x @ weight.T (+ bias)``.

    `product` is its MatMul (or Gemm), `x` what it reads, `output` the value behind the bias.
    """

    product: ir.Node
    x: ir.Value
    output: ir.Value


def linears_of(graph: ir.Graph, parameter: str) -> list[Linear]:
    """Every linear layer that multiplies by the transpose of initializer `parameter` (out, in), in the order of the
    graph; shared weights have several.

    Raises `ExportError` when the parameter is missing or used in any other way.
    """
    if parameter not in graph.initializers:
        raise ExportError(
            f"the exported graph has no initializer {parameter}; this transformers version names its modules "
            "differently"
        )
    linears = []
    for transpose in graph.initializers[parameter].consumers():
        perm = transpose.attributes.get("perm")
        if transpose.op_type != "Transpose" or perm is None or list(perm.as_ints()) != [1, 0]:
            raise ExportError(
                f"{parameter} feeds {transpose.op_type} node {transpose.name!r}; expected Transpose and MatMul"
            )
        for product in transpose.outputs[0].consumers():
            if product.op_type != "MatMul" or product.inputs[1] is not transpose.outputs[0]:
                raise ExportError(
                    f"{parameter} feeds {product.op_type} node {product.name!r}; expected the right side of a MatMul"
                )
            x = product.inputs[0]
            assert x is not None
            linears.append(Linear(product, x, _behind_bias(product.outputs[0])))
    if not linears:
        raise ExportError(f"{parameter} is not multiplied by anything in the exported graph")
    if len(linears) > 1:
        at = {id(node): number for number, node in enumerate(graph)}
        linears.sort(key=lambda linear: at[id(linear.product)])
    return linears


def use_name(name: str, use: int) -> str:
    """The name of a node or value for the use of a shared weight with this number: from the second on, it says
    which."""
    return name if use == 0 else f"{name}.use{use + 1}"


def _behind_bias(value: ir.Value) -> ir.Value:
    users = value.consumers()
    if len(users) == 1 and users[0].op_type == "Add":
        other = next((v for v in users[0].inputs if v is not value), None)
        if other is not None and other.is_initializer() and other.shape is not None and len(other.shape) == 1:
            return users[0].outputs[0]
    return value


def fold_float_weight(graph: ir.Graph, name: str) -> None:
    """Store an unquantized weight as its products read it, (K, N), under the parameter's own name, without a Transpose.

    The exporter's constant folding would store the same values under a name that says nothing. To be called after
    `linears_of`, which makes sure that the parameter is used in no other way.
    """
    parameter = graph.initializers[name]
    assert parameter.const_value is not None
    for transpose in list(parameter.consumers()):
        for product in list(transpose.outputs[0].consumers()):
            product.replace_input_with(1, parameter)
        graph.remove(transpose, safe=True)
    array = np.ascontiguousarray(parameter.const_value.numpy().T)
    parameter.const_value = ir.tensor(array, dtype=parameter.const_value.dtype, name=name)
    parameter.shape = ir.Shape(array.shape)


# How each product reads its weight: from codes (out, in) to the stored tensor, and the axis of the output channels.
_WEIGHT_LAYOUTS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], int]] = {
    "MatMul": (lambda codes: np.ascontiguousarray(codes.T), 1),
    "Gemm": (lambda codes: codes, 0),
    "Conv": (lambda codes: codes[:, :, None, None], 0),
}


def fold_weight_qdq(
    graph: ir.Graph, linear: Linear, name: str, codes: np.ndarray, scale: np.ndarray, *, stored: str = "int8"
) -> None:
    """Replace the weight of `linear` by INT8 `codes` (out, in) and a DequantizeLinear per output channel.

    The initializer is stored as the product reads it: (in, out) for a MatMul, (out, in) for a Gemm, (out, in, 1, 1) for
    a convolution. `scale` (out,) has the graph's float dtype. With `stored="float"` the initializer holds ``code *
    scale`` and a QuantizeLinear stands in front, for parsers that take no INT8 constants. Layers that share a weight
    share it.
    """
    dequantized = graph.initializers.get(f"{name}_zero_point")
    if dequantized is not None:
        linear.product.replace_input_with(1, dequantized.consumers()[-1].outputs[0])
        return
    layout, axis = _WEIGHT_LAYOUTS[linear.product.op_type]
    scales = add_initializer(graph, f"{name}_scale", scale)
    zero = add_initializer(graph, f"{name}_zero_point", np.zeros(scale.shape, np.int8))
    nodes = []
    if stored == "int8":
        constant = add_initializer(graph, f"{name}_quantized", layout(codes))
    else:
        source = add_initializer(graph, f"{name}_dense", layout(codes.astype(scale.dtype) * scale[:, None]))
        quantize_node = ir.node(
            "QuantizeLinear", [source, scales, zero], attributes={"axis": axis}, name=f"{name}_quantize"
        )
        constant = quantize_node.outputs[0]
        constant.name, constant.type, constant.shape = (
            f"{name}_quantized",
            ir.TensorType(ir.DataType.INT8),
            source.shape,
        )
        nodes.append(quantize_node)
    node = ir.node("DequantizeLinear", [constant, scales, zero], attributes={"axis": axis}, name=f"{name}_dequantize")
    node.outputs[0].name = f"{name}_dequantized"
    node.outputs[0].type, node.outputs[0].shape = scales.type, constant.shape
    graph.insert_before(linear.product, [*nodes, node])
    linear.product.replace_input_with(1, node.outputs[0])


def insert_activation_qdq(
    graph: ir.Graph, value: ir.Value, scale: np.ndarray, name: str, users: list[ir.Node] | None = None, *, use: int = 0
) -> ir.Value:
    """Put a QuantizeLinear/DequantizeLinear pair on `value`, for all its readers or only for `users`; returns the new
    value.

    `scale` is a 0-d array in the graph's float dtype; a scale that is not positive, or subnormal in that dtype, raises.
    Pairs of one `name` at several places (`use`, from 0) share one scale.
    """
    require_scale(scale, name)
    readers = list(value.consumers()) if users is None else users
    scale_value = add_initializer(graph, f"{name}_scale", scale)
    zero = add_initializer(graph, f"{name}_zero_point", np.zeros((), np.int8))
    name = use_name(name, use)
    quantized = ir.node("QuantizeLinear", [value, scale_value, zero], name=f"{name}_quantize")
    restored = ir.node("DequantizeLinear", [quantized.outputs[0], scale_value, zero], name=f"{name}_dequantize")
    quantized.outputs[0].name, restored.outputs[0].name = f"{name}_quantized", f"{name}_dequantized"
    quantized.outputs[0].type, restored.outputs[0].type = ir.TensorType(ir.DataType.INT8), value.type
    quantized.outputs[0].shape = restored.outputs[0].shape = value.shape
    producer = value.producer()
    if producer is None:
        graph.insert_before(readers[0], [quantized, restored])
    else:
        graph.insert_after(producer, [quantized, restored])
    for reader in readers:
        for i, read in enumerate(reader.inputs):
            if read is value:
                reader.replace_input_with(i, restored.outputs[0])
    return restored.outputs[0]


def require_scale(scale: np.ndarray, name: str) -> None:
    """Raise `ExportError` unless every scale is positive, finite and normal in its own dtype."""
    smallest = _smallest_normal(scale.dtype)
    values = scale.astype(np.float64)
    if not (np.isfinite(values).all() and (values >= smallest).all()):
        bad = values[~(np.isfinite(values) & (values >= smallest))].flat[0]
        raise ExportError(
            f"{name}: scale {bad:.3g} is not a normal {scale.dtype} number (smallest {smallest:.3g}); "
            "export with --dtype bfloat16 or float32, or compress again with fewer bits for this weight"
        )


def _smallest_normal(dtype: np.dtype) -> float:
    import ml_dtypes

    return float(ml_dtypes.finfo(dtype).smallest_normal)  # type: ignore[no-untyped-call]  # its one class without types


def add_initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """A constant of the graph under this name; the one that is there already, if there is one."""
    if name in graph.initializers:
        return graph.initializers[name]
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
    graph.register_initializer(value)
    return value
