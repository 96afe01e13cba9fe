"""The weight matrices of any ONNX graph, whoever made it: what is stored, along which axis it is reduced, how it is
scaled.

This is the only place that knows layouts. A weight is found from the node that multiplies by it, back through
dequantize, quantize, transpose and reshape, to a constant; it is presented as a matrix (K, N), whatever its layout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from nxm_export.contract.plan import NMPattern
from nxm_export.errors import ArtifactError

# Where each product keeps its weight.
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
    "Attention": 1,
    "QAttention": 1,
    "QLinearMatMul": 3,
    "QGemm": 3,
    "QLinearConv": 3,
}
# Where those that quantize by themselves keep the weight's scale and zero point; None where a later node scales.
_SCALE_INPUTS: dict[str, tuple[int | None, int]] = {
    "QLinearMatMul": (4, 5),
    "QGemm": (4, 5),
    "QLinearConv": (4, 5),
    "QAttention": (4, 7),
    "MatMulIntegerToFloat": (3, 5),
    "DynamicQuantizeMatMul": (2, 3),
    "MatMulInteger": (None, 3),
    "ConvInteger": (None, 3),
}
_CONVOLUTIONS = ("Conv", "ConvInteger", "QLinearConv")
# Products whose weights are packed in a layout of their own, which nothing here reads.
PACKED_PRODUCTS = ("MatMulNBits", "MatMulBnb4", "MatMulFpQ4", "MoE", "QMoE")
_DETECTED = (NMPattern(1, 4), NMPattern(2, 8), NMPattern(1, 2), NMPattern(2, 4), NMPattern(4, 8))
_LONGEST_CHAIN = 16  # nodes between a constant and the product; a malformed graph may hold a cycle
_OUTPUT_CHANNELS = -2  # a scale axis that is the output's by definition of the node
_PROTOBUF_LIMIT = 1_800_000_000  # bytes; protobuf itself ends at 2 GB


@dataclass(frozen=True)
class GraphWeight:
    """One weight matrix as a product node reads it.

    `matrix` is (K, N): the stored integers, or floats for an unquantized weight (for a QuantizeLinear on a constant,
    the integers that it yields). `scale_axis` is ``N``, ``K``, ``block`` (several scales along K) or ``tensor``, None
    without scale.
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
        return int(self.matrix.shape[0])

    @property
    def n(self) -> int:
        """Output channels."""
        return int(self.matrix.shape[1])

    @property
    def is_quantized(self) -> bool:
        """True when the product's weight operand is an integer tensor or comes from one."""
        return self.matrix.dtype.kind in "iu"

    def nonzero_mask(self) -> npt.NDArray[np.bool_]:
        """Boolean (K, N): which weights are not zero (not the zero point, for an asymmetric weight)."""
        zero = self.zero_point
        if zero is None or not self.is_quantized or not np.any(zero):
            zero = np.zeros((), self.matrix.dtype)
        elif zero.size == 1:
            zero = zero.reshape(())
        elif self.scale_axis in ("N", None) and zero.size == self.n:  # MatMulInteger has zero points and no scales
            zero = zero.reshape(1, -1)
        elif self.scale_axis == "K" and zero.size == self.k:
            zero = zero.reshape(-1, 1)
        else:  # zero points in no known layout: nothing can be called zero
            return np.ones(self.matrix.shape, bool)
        return np.asarray(self.matrix != zero, bool)

    def follows(self, pattern: NMPattern) -> bool:
        """True when every M consecutive weights along K, in every output channel, keep at most N."""
        return self.k % pattern.m == 0 and self.violations(pattern) == 0

    def violations(self, pattern: NMPattern) -> int:
        """Number of groups along K that keep more than N of M; a tail shorter than M counts as a group."""
        nonzero_mask = self.nonzero_mask()
        tail = -self.k % pattern.m
        if tail:
            nonzero_mask = np.concatenate([nonzero_mask, np.zeros((tail, self.n), bool)])
        return int((nonzero_mask.reshape(-1, pattern.m, self.n).sum(axis=1) > pattern.n).sum())

    def pattern(self) -> NMPattern | None:
        """The tightest well-known pattern that the weight follows along K, or None when it is dense."""
        if not self.matrix.size or self.nonzero_mask().mean() > 0.5:
            return None
        return next((pattern for pattern in _DETECTED if self.follows(pattern)), None)


def parameter_of(name: str) -> str:
    """The checkpoint's parameter that a constant of one of our graphs holds; other names are left as they are."""
    for suffix in ("_quantized", "_dense", "_image"):
        name = name.removesuffix(suffix)
    return name


def load_graph(file: str | Path) -> ir.Model:
    """Read an ONNX file, its local functions inlined; raises `ArtifactError` when it is missing, truncated or not
    ONNX."""
    import onnx_ir.passes.common as passes

    file = Path(file)
    if not file.is_file():
        inside = f"; give {file / 'model.onnx'}" if (file / "model.onnx").is_file() else ""
        what = f"a directory, not an ONNX file{inside}" if file.is_dir() else "no such file"
        raise ArtifactError(f"{file}: {what}")
    try:
        model = ir.load(file)
        if not len(model.graph) or not model.opset_imports:
            raise ValueError("no nodes, or no opset")
        if model.functions:
            passes.InlinePass()(model)
        return model
    except Exception as error:  # protobuf, external data and IR errors come as many types
        raise ArtifactError(
            f"{file}: not a readable ONNX model ({_first_line(error)}); it is truncated, or another format"
        ) from error


def save_graph(model: ir.Model, file: Path) -> None:
    """Write one ONNX file where protobuf allows it (2 GB), else weights next to it in ``<file>.data``."""
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    if size > _PROTOBUF_LIMIT:
        ir.save(model, file, external_data=f"{file.name}.data")
        return
    ir.external_data.load_to_model(model)  # weights of a .data file come into this one
    ir.save(model, file)


def graph_weights(model: ir.Model, *, integers: bool = True) -> Iterator[GraphWeight]:
    """Every product with a constant weight, in graph order; products of two activations are skipped.

    With `integers=False` a QuantizeLinear on a constant is looked through: the matrix holds the floats in front of it.
    """
    for node in model.graph.all_nodes():
        if node.op_type not in _WEIGHT_INPUT:
            continue
        constant, left = _constant_behind(_input(node, _WEIGHT_INPUT[node.op_type]), integers), False
        if constant is None and node.op_type == "MatMul":
            constant, left = _constant_behind(_input(node, 0), integers), True
        if constant is None or constant.array.ndim < 2:
            continue
        weight = _as_matrix(node, constant, left)
        if weight is not None:
            yield weight


def array_of(value: ir.Value | None) -> np.ndarray | None:
    """The values of a constant, or None for anything else; 4-bit integers come as 8-bit ones, 8- and 16-bit floats as
    float32.

    Raises `ArtifactError` when the constant's data are missing or damaged.
    """
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    if tensor is None:
        return None
    try:
        array = tensor.numpy()
    except Exception as error:  # data in another file, or of another size than the shape says
        raise ArtifactError(
            f"the data of constant {value.name if value else ''} cannot be read ({_first_line(error)}); "
            "the file is truncated, or its .data file is missing"
        ) from error
    if tensor.dtype in (ir.DataType.INT4, ir.DataType.UINT4):
        return array.astype(np.int8 if tensor.dtype == ir.DataType.INT4 else np.uint8)
    return array.astype(np.float32) if array.dtype.kind not in "biuf" else array


@dataclass
class _TracedConstant:
    """A constant and what was done to it on the way to the product. `axes[i]` is what axis i was in the stored
    tensor."""

    name: str
    stored: str
    array: np.ndarray
    axes: list[int]
    scale: np.ndarray | None = None
    scale_axis: int | None = None  # in the stored tensor
    blocked: bool = False
    zero_point: np.ndarray | None = None


def _constant_behind(value: ir.Value | None, integers: bool) -> _TracedConstant | None:
    """The constant that `value` comes from, with everything on the way applied; None when it comes from none."""
    chain: list[ir.Node] = []
    while value is not None and (array := array_of(value)) is None:
        node = value.producer()
        if node is None or node.op_type not in _APPLIED or len(chain) == _LONGEST_CHAIN:
            return None
        chain.append(node)
        value = _input(node, 0)
    if value is None or array is None:
        return None
    tensor = ir.convenience.get_const_tensor(value)
    constant: _TracedConstant | None = _TracedConstant(
        value.name or "", str(tensor.dtype) if tensor else "", array, list(range(array.ndim))
    )
    for node in reversed(chain):
        looked_through = node.op_type == "QuantizeLinear" and not integers
        if constant is not None and not looked_through:
            constant = _APPLIED[node.op_type](constant, node)
    return constant


def _scaled(constant: _TracedConstant, node: ir.Node) -> _TracedConstant | None:
    """QuantizeLinear or DequantizeLinear on a constant."""
    scale = array_of(_input(node, 1))
    if scale is None:
        return None
    ndim = constant.array.ndim
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
    if scale.size > 1 and not -ndim <= axis < ndim:
        return None
    constant.scale, constant.zero_point = scale, array_of(_input(node, 2))
    constant.blocked = "block_size" in node.attributes and node.attributes["block_size"].as_int() > 0
    constant.scale_axis = constant.axes[axis] if scale.size > 1 else None
    if node.op_type == "QuantizeLinear":
        return None if constant.blocked else _quantized(constant, axis)
    return constant


def _quantized(constant: _TracedConstant, axis: int) -> _TracedConstant | None:
    """The integers that a QuantizeLinear on a constant yields."""
    assert constant.scale is not None
    zero = np.zeros((), np.uint8) if constant.zero_point is None else constant.zero_point  # what ONNX defaults to
    shape = [-1 if i == axis % constant.array.ndim else 1 for i in range(constant.array.ndim)]
    scale = constant.scale.reshape(shape) if constant.scale.size > 1 else constant.scale.reshape(())
    shift = zero.reshape(shape) if zero.size > 1 else zero.reshape(())
    limits = np.iinfo(zero.dtype)
    try:
        codes = np.rint(constant.array.astype(np.float32) / scale.astype(np.float32)) + shift.astype(np.float32)
    except ValueError:
        return None  # as many scales as nothing here has
    constant.array, constant.zero_point = np.clip(codes, limits.min, limits.max).astype(zero.dtype), zero
    return constant


def _transposed(constant: _TracedConstant, node: ir.Node) -> _TracedConstant | None:
    ndim = constant.array.ndim
    order = list(node.attributes["perm"].as_ints()) if "perm" in node.attributes else list(range(ndim))[::-1]
    if sorted(order) != list(range(ndim)):
        return None
    constant.array, constant.axes = constant.array.transpose(order), [constant.axes[i] for i in order]
    return constant


def _reshaped(constant: _TracedConstant, node: ir.Node) -> _TracedConstant | None:
    """Only reshapes that add or drop axes of size 1 keep the meaning of the others."""
    sizes = _new_sizes(constant.array.shape, node)
    real = [(size, axis) for size, axis in zip(constant.array.shape, constant.axes, strict=True) if size != 1]
    if sizes is None or [size for size in sizes if size != 1] != [size for size, _ in real]:
        return None
    axes = iter([axis for _, axis in real])
    constant.axes = [next(axes) if size != 1 else -1 for size in sizes]
    constant.array = constant.array.reshape(sizes)
    return constant


def _new_sizes(shape: tuple[int, ...], node: ir.Node) -> list[int] | None:
    operand = array_of(_input(node, 1))
    if node.op_type == "Reshape":
        if operand is None:
            return None
        sizes = [shape[i] if size == 0 and i < len(shape) else int(size) for i, size in enumerate(operand)]
        if -1 in sizes:
            known = math.prod(size for size in sizes if size != -1)
            sizes[sizes.index(-1)] = math.prod(shape) // known if known else 0
        return sizes
    axes = operand.reshape(-1).tolist() if operand is not None else None
    if "axes" in node.attributes:  # before opset 13
        axes = list(node.attributes["axes"].as_ints())
    if node.op_type == "Squeeze":
        dropped = {axis % len(shape) for axis in axes} if axes else {i for i, size in enumerate(shape) if size == 1}
        return [size for i, size in enumerate(shape) if i not in dropped]
    if axes is None:
        return None
    sizes, rank = list(shape), len(shape) + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        sizes.insert(axis, 1)
    return sizes


def _unchanged(constant: _TracedConstant, node: ir.Node) -> _TracedConstant | None:
    return constant


_APPLIED = {
    "DequantizeLinear": _scaled,
    "QuantizeLinear": _scaled,
    "Transpose": _transposed,
    "Reshape": _reshaped,
    "Unsqueeze": _reshaped,
    "Squeeze": _reshaped,
    "Identity": _unchanged,
    "Cast": _unchanged,
}


def _as_matrix(node: ir.Node, constant: _TracedConstant, left: bool) -> GraphWeight | None:
    array, axes = constant.array, constant.axes
    matrix: np.ndarray
    if node.op_type in _CONVOLUTIONS:  # (N, C, kernel...), reduced along C and the kernel
        k_axis = axes[1]
        # (N, kernel..., C): groups of M lie along C
        matrix = np.moveaxis(array, 1, -1).reshape(array.shape[0], -1).T
    elif math.prod(array.shape[:-2]) != 1:
        return None  # a stack of matrices is no linear layer
    elif left or (node.op_type in ("Gemm", "FusedGemm", "QGemm", "FusedMatMul") and _is_set(node, "transB")):
        k_axis, matrix = axes[-1], array.reshape(array.shape[-2:]).T
    else:
        k_axis, matrix = axes[-2], array.reshape(array.shape[-2:])
    scale, scale_axis, zero = constant.scale, constant.scale_axis, constant.zero_point
    if node.op_type in _SCALE_INPUTS and scale is None:
        at_scale, at_zero = _SCALE_INPUTS[node.op_type]
        scale = None if at_scale is None else array_of(_input(node, at_scale))
        zero, scale_axis = array_of(_input(node, at_zero)), _OUTPUT_CHANNELS
    if scale is None:
        kind = None
    elif scale.size == 1:
        kind = "tensor"
    else:
        kind = "block" if constant.blocked else "K" if scale_axis == k_axis else "N"
    return GraphWeight(constant.name, node, matrix, constant.stored, scale, kind, zero)


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _is_set(node: ir.Node, attribute: str) -> bool:
    return attribute in node.attributes and bool(node.attributes[attribute].as_int())


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
