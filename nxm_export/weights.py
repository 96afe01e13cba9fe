"""The weight matrices of any ONNX graph, whoever made it: what is stored, along which axis it is reduced, how it is scaled.

This is the only place that knows layouts. A weight is found from the node that multiplies by it, back through
dequantize, quantize, transpose and reshape, to a constant; it is presented as a matrix (K, N), whatever its layout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from nxm_export.errors import ArtifactError
from nxm_export.plan import NMPattern
from nxm_export.qdq import quantize

# Where each product keeps its weight, and (first, second) input for those that may have it on either side.
_WEIGHT_INPUT = {
    "MatMul": 1,
    "Gemm": 1,
    "Conv": 1,
    "FusedMatMul": 1,
    "FusedGemm": 1,
    "MatMulInteger": 1,
    "MatMulIntegerToFloat": 1,
    "DynamicQuantizeMatMul": 1,
    "ConvInteger": 1,
    "QLinearMatMul": 3,
    "QGemm": 3,
    "QLinearConv": 3,
}
_SCALE_INPUTS = {
    "QLinearMatMul": (4, 5),
    "QGemm": (4, 5),
    "QLinearConv": (4, 5),
    "MatMulIntegerToFloat": (3, 5),
    "DynamicQuantizeMatMul": (2, 3),
}
_DETECTED = (NMPattern(1, 4), NMPattern(2, 8), NMPattern(1, 2), NMPattern(2, 4), NMPattern(4, 8))


@dataclass(frozen=True)
class GraphWeight:
    """One weight matrix as a product node reads it.

    `matrix` is (K, N): the stored integers, or floats for an unquantized weight (for a QuantizeLinear on a constant, the
    integers that it yields). `scale_axis` is ``N``, ``K`` or ``tensor``, None without scale.
    """

    name: str
    node: ir.Node
    matrix: np.ndarray
    stored: str
    scale: np.ndarray | None
    scale_axis: str | None
    zero_point: np.ndarray | None

    @property
    def k(self) -> int:
        """Reduced size."""
        return self.matrix.shape[0]

    @property
    def n(self) -> int:
        """Output channels."""
        return self.matrix.shape[1]

    @property
    def is_quantized(self) -> bool:
        """True when the product's weight operand is an integer tensor or comes from one."""
        return self.matrix.dtype.kind in "iu"

    def kept(self) -> np.ndarray:
        """Boolean (K, N): which weights are not zero (not the zero point, for an asymmetric weight)."""
        if self.zero_point is None or not self.is_quantized:
            return self.matrix != 0
        zero = self.zero_point if self.zero_point.size == 1 or self.scale_axis != "K" else self.zero_point[:, None]
        return self.matrix != zero.reshape(zero.shape if zero.ndim > 1 else -1)

    def follows(self, pattern: NMPattern) -> bool:
        """True when every M consecutive weights along K, in every output channel, keep at most N."""
        return self.k % pattern.m == 0 and self.violations(pattern) == 0

    def violations(self, pattern: NMPattern) -> int:
        """Number of groups along K that keep more than N of M; a tail shorter than M counts as a group."""
        kept = self.kept()
        tail = -self.k % pattern.m
        if tail:
            kept = np.concatenate([kept, np.zeros((tail, self.n), bool)])
        return int((kept.reshape(-1, pattern.m, self.n).sum(axis=1) > pattern.n).sum())

    def pattern(self) -> NMPattern | None:
        """The tightest well-known pattern that the weight follows along K, or None when it is dense."""
        if self.kept().mean() > 0.5:
            return None
        return next((pattern for pattern in _DETECTED if self.follows(pattern)), None)


def parameter_of(name: str) -> str:
    """The checkpoint's parameter that a constant of one of our graphs holds; other names are left as they are."""
    for suffix in ("_quantized", "_dense", "_image"):
        name = name.removesuffix(suffix)
    return name


def load_graph(file: str | Path) -> ir.Model:
    """Read an ONNX file; raises `ArtifactError` when it is missing, truncated or not ONNX."""
    file = Path(file)
    if not file.is_file():
        raise ArtifactError(f"{file}: no such file")
    try:
        model = ir.load(file)
        if not len(model.graph) and not model.opset_imports:
            raise ValueError("no nodes and no opset")
        return model
    except Exception as error:  # protobuf, external data and IR errors come as many types
        raise ArtifactError(
            f"{file}: not a readable ONNX model ({str(error).splitlines()[0]}); it is truncated, or another format"
        ) from error


def graph_weights(model: ir.Model, *, integers: bool = True) -> Iterator[GraphWeight]:
    """Every product with a constant weight, in graph order; products of two activations are skipped.

    With `integers=False` a QuantizeLinear on a constant is looked through: the matrix holds the floats in front of it.
    """
    for node in model.graph.all_nodes() if hasattr(model.graph, "all_nodes") else model.graph:
        if node.op_type not in _WEIGHT_INPUT:
            continue
        index = _WEIGHT_INPUT[node.op_type]
        found = _constant_behind(node.inputs[index] if index < len(node.inputs) else None, integers)
        left = False
        if found is None and node.op_type == "MatMul":
            found, left = _constant_behind(node.inputs[0], integers), True
        if found is None or found.array.ndim < 2:
            continue
        weight = _as_matrix(node, found, left)
        if weight is not None:
            yield weight


@dataclass
class _Found:
    """A constant and what was done to it on the way to the product. `axes[i]` is what axis i was in the stored tensor."""

    name: str
    stored: str
    array: np.ndarray
    axes: list[int]
    scale: np.ndarray | None = None
    scale_axis: int | None = None  # in the stored tensor
    zero_point: np.ndarray | None = None


def _constant_behind(value: ir.Value | None, integers: bool) -> _Found | None:
    if value is None:
        return None
    if value.const_value is not None:
        array = value.const_value.numpy()
        return _Found(value.name or "", str(value.const_value.dtype), array, list(range(array.ndim)))
    node = value.producer()
    if node is None:
        return None
    if node.op_type == "Constant":
        tensor = ir.convenience.get_const_tensor(value)
        return (
            None
            if tensor is None
            else _Found(value.name or "", str(tensor.dtype), tensor.numpy(), list(range(len(tensor.shape))))
        )
    if node.op_type not in (
        "DequantizeLinear",
        "QuantizeLinear",
        "Transpose",
        "Reshape",
        "Unsqueeze",
        "Squeeze",
        "Identity",
        "Cast",
    ):
        return None
    found = _constant_behind(node.inputs[0], integers)
    if found is None:
        return None
    if node.op_type in ("DequantizeLinear", "QuantizeLinear"):
        return _with_scale(found, node, integers)
    if node.op_type == "Transpose":
        perm = (
            list(node.attributes["perm"].as_ints())
            if "perm" in node.attributes
            else list(range(found.array.ndim))[::-1]
        )
        found.array, found.axes = found.array.transpose(perm), [found.axes[i] for i in perm]
    elif node.op_type in ("Reshape", "Unsqueeze", "Squeeze"):
        return _reshaped(found, node)
    return found


def _with_scale(found: _Found, node: ir.Node, integers: bool) -> _Found | None:
    scale = _constant(node.inputs[1])
    if scale is None:
        return None
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
    if scale.size > 1:
        found.scale_axis = found.axes[axis % found.array.ndim]
    found.scale = scale
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    found.zero_point = None if zero is None else _constant(zero)
    if node.op_type == "QuantizeLinear" and integers:
        shaped = scale
        if scale.size > 1:
            shaped = scale.reshape([-1 if i == axis % found.array.ndim else 1 for i in range(found.array.ndim)])
        found.array = quantize(found.array.astype(np.float32), shaped.astype(np.float32))
    return found


def _reshaped(found: _Found, node: ir.Node) -> _Found | None:
    """Only reshapes that add or drop axes of size 1 keep the meaning of the others."""
    output = node.outputs[0]
    real = [(size, axis) for size, axis in zip(found.array.shape, found.axes, strict=True) if size != 1]
    if output.shape is None or any(not isinstance(size, int) for size in output.shape):
        wanted = _constant(node.inputs[1]) if node.op_type == "Reshape" and len(node.inputs) > 1 else None
        if wanted is None:
            return None
        sizes = [int(size) for size in wanted]
        if -1 in sizes:
            sizes[sizes.index(-1)] = found.array.size // abs(math.prod(sizes))
    else:
        sizes = [size for size in output.shape if isinstance(size, int)]
    if [size for size in sizes if size != 1] != [size for size, _ in real]:
        return None
    axes = iter([axis for _, axis in real])
    found.axes = [next(axes) if size != 1 else -1 for size in sizes]
    found.array = found.array.reshape(sizes)
    return found


def _as_matrix(node: ir.Node, found: _Found, left: bool) -> GraphWeight | None:
    axes = found.axes
    array: np.ndarray = found.array
    matrix: np.ndarray
    if node.op_type in ("Conv", "ConvInteger", "QLinearConv"):  # (N, C, kernel...), reduced along C and the kernel
        if array.shape[2:] and math.prod(array.shape[2:]) != 1:
            array = np.moveaxis(array, 1, -1)  # (N, kernel..., C): groups of M lie along C
        k_axis = axes[1]
        matrix = array.reshape(array.shape[0], -1).T
    elif node.op_type in ("Gemm", "FusedGemm", "QGemm") and _is_set(node, "transB"):
        k_axis, matrix = axes[1], array.T
    elif (node.op_type == "FusedMatMul" and _is_set(node, "transB")) or left:
        k_axis, matrix = axes[-1], array.reshape(-1, array.shape[-1]).T
    elif math.prod(array.shape[:-2]) != 1:
        return None  # a stack of matrices is no linear layer
    else:
        k_axis, matrix = axes[-2], array.reshape(array.shape[-2:])
    scale: np.ndarray | None = found.scale
    zero, scale_axis = found.zero_point, found.scale_axis
    if node.op_type in _SCALE_INPUTS and scale is None:
        scale, zero = (_constant(node.inputs[i]) if i < len(node.inputs) else None for i in _SCALE_INPUTS[node.op_type])
        scale_axis = (
            None if scale is None or scale.size == 1 else -2
        )  # per output channel, by definition of these nodes
    elif node.op_type in ("MatMulInteger", "ConvInteger") and zero is None and len(node.inputs) > 3:
        zero = _constant(node.inputs[3])
    kind = None if scale is None else "tensor" if scale.size == 1 else "K" if scale_axis == k_axis else "N"
    return GraphWeight(found.name, node, matrix, found.stored, scale, kind, zero)


def _is_set(node: ir.Node, attribute: str) -> bool:
    return attribute in node.attributes and bool(node.attributes[attribute].as_int())


def _constant(value: ir.Value | None) -> np.ndarray | None:
    if value is None:
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()
