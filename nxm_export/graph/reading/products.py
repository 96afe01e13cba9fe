"""Which nodes of a graph are products, which of their inputs are multiplied, and how each lies as a matrix (K, N).

K is the axis that the product sums over. This is the only place that knows layouts of operators. A node of an unknown
operator counts as a product when it reads a constant matrix: nobody has shown that it is none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir


class NotRead(Exception):
    """A product's operand is not read; the message says why."""


@dataclass(frozen=True)
class Matrix:
    """An operand, or something of its shape, as (K, N); K consists of runs of `run` elements that lie together (the
    channels of a convolution)."""

    array: np.ndarray
    run: int


Layout = Callable[[ir.Node, int, np.ndarray], Matrix]


@dataclass(frozen=True)
class Product:
    """An operator that multiplies: the inputs that may be weights, likely ones first, and how they lie; None for any
    input, an empty tuple for constants in the node's attributes.

    `quantizers` are, of an operator that reads codes, where the scale and the zero point of an input stand; no scale
    where a later node scales.
    """

    operands: tuple[int, ...] | None
    layout: Layout
    quantizers: Mapping[int, tuple[int | None, int | None]] = field(default_factory=dict)

    @property
    def is_unknown(self) -> bool:
        """True when nothing is known of the operator, not even that it multiplies."""
        return self.layout is _unknown

    @property
    def reads_codes(self) -> bool:
        """True for an integer operator."""
        return bool(self.quantizers)


@dataclass(frozen=True)
class Operand:
    """One input of one product; `index` is None for constants that stand in the node's attributes."""

    node: ir.Node
    index: int | None
    product: Product

    @property
    def value(self) -> ir.Value | None:
        """The value that is multiplied."""
        return None if self.index is None else self.node.inputs[self.index]

    @property
    def label(self) -> str:
        """Which input it is, for people."""
        return "an attribute" if self.index is None else f"input {self.index}"

    def matrix(self, array: np.ndarray) -> Matrix:
        """The operand, or anything of its shape, as (K, N); raises `NotRead`."""
        try:
            return self.product.layout(self.node, -1 if self.index is None else self.index, array)
        except (ValueError, IndexError, KeyError) as error:
            raise NotRead(f"its shape {array.shape} is none that {self.node.op_type} multiplies by") from error


def operands(node: ir.Node) -> Iterator[Operand]:
    """The inputs of a node that it multiplies, or may multiply."""
    domain, op = operator(node)
    product = PRODUCTS.get((domain, op))
    if product is None:
        if _is_no_product(domain, op):
            return
        product = Product(None, _unknown)
    if product.operands == () or (product.is_unknown and _holds_matrix(node)):
        yield Operand(node, None, product)
    for index in range(len(node.inputs)) if product.operands is None else product.operands:
        if index < len(node.inputs) and node.inputs[index] is not None:
            yield Operand(node, index, product)


def _holds_matrix(node: ir.Node) -> bool:
    """True for a node with a tensor of two axes or more among its attributes."""
    return any(
        attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref() and len(attribute.as_tensor().shape) > 1
        for attribute in node.attributes.values()
    )


def operator(node: ir.Node) -> tuple[str, str]:
    """Domain and name of a node's operator; ONNX's own domain is the empty one."""
    return ("" if node.domain == "ai.onnx" else node.domain), node.op_type


def name_of(node: ir.Node) -> str:
    """The node's name, or what it is when it has none."""
    return node.name or f"{node.op_type} of {next((value.name for value in node.outputs if value.name), 'nothing')}"


def is_set(node: ir.Node, attribute: str) -> bool:
    """True for an integer attribute that is there and not 0."""
    return attribute in node.attributes and bool(node.attributes[attribute].as_int())


def _matmul(node: ir.Node, index: int, array: np.ndarray) -> Matrix:
    """Of the right operand the last axis but one is summed over, of the left one the last; the matrices of a stack lie
    side by side."""
    left = index == 0
    if is_set(node, "transBatchA" if left else "transBatchB"):
        raise NotRead("its batch axes are transposed")
    if array.ndim < 2:
        array, k_axis = (array[None, :], 1) if left else (array[:, None], 0)
        k_axis -= 2
    else:
        k_axis = -1 if left else -2
        if is_set(node, "transA" if left else "transB"):
            k_axis = -3 - k_axis
    return _rows(np.moveaxis(array, k_axis, 0))


def _rows(array: np.ndarray) -> Matrix:
    """K is the first axis, and all others are output channels."""
    return Matrix(array.reshape(array.shape[0], math.prod(array.shape[1:])), array.shape[0])


def _conv(node: ir.Node, index: int, array: np.ndarray) -> Matrix:
    """(N, C, kernel...), summed over kernel and channels; the channels of one place of the kernel lie together."""
    if index == 0 or array.ndim < 3:
        raise NotRead("its image is constant, and its kernel is not" if index == 0 else "its kernel is no kernel")
    rows = np.moveaxis(array, 1, -1)
    return Matrix(rows.reshape(array.shape[0], math.prod(rows.shape[1:])).T, array.shape[1])


def _conv_transpose(node: ir.Node, index: int, array: np.ndarray) -> Matrix:
    """(C, N / groups, kernel...), summed over kernel and the channels of a group."""
    if index == 0 or array.ndim < 3:
        raise NotRead("its image is constant, and its kernel is not" if index == 0 else "its kernel is no kernel")
    groups = groups_of(node)
    if groups < 1 or array.shape[0] % groups:
        raise NotRead(f"{array.shape[0]} channels are not {groups} groups")
    channels = array.shape[0] // groups
    split = array.reshape(groups, channels, *array.shape[1:])  # groups, channels, N / groups, kernel...
    rows = np.moveaxis(split, 1, -1)
    rows = rows.reshape(groups * array.shape[1], math.prod(rows.shape[2:]))
    return Matrix(rows.T, channels)


def groups_of(node: ir.Node) -> int:
    """The groups of channels of a convolution; 1 for another product."""
    return node.attributes["group"].as_int() if "Conv" in node.op_type and "group" in node.attributes else 1


def _recurrent(node: ir.Node, index: int, array: np.ndarray) -> Matrix:
    """(directions, gates * hidden, K)."""
    if index == 0 or array.ndim != 3:
        raise NotRead(
            "its sequence is constant, and its weights are not" if index == 0 else "its weights have no 3 axes"
        )
    return _rows(np.moveaxis(array, -1, 0))


def _einsum(node: ir.Node, index: int, array: np.ndarray) -> Matrix:
    equation = node.attributes["equation"].as_string().replace(" ", "")
    inputs, arrow, output = equation.partition("->")
    terms = inputs.split(",")
    if not arrow or len(terms) != 2 or index >= 2 or "." in equation:
        raise NotRead(f"an Einsum {equation!r} of other than two operands with named axes")
    mine, other = terms[index], terms[1 - index]
    if len(mine) != array.ndim or len(set(mine)) != len(mine):
        raise NotRead(f"{mine!r} of the Einsum {equation!r} does not name {array.ndim} axes, each once")
    summed = [letter for letter in mine if letter not in output]
    if not summed or [letter for letter in other if letter in summed] != summed:
        raise NotRead(f"the Einsum {equation!r} sums over its axes in another order, or over none")
    kept = [letter for letter in mine if letter in output]
    moved = array.transpose([mine.index(letter) for letter in (*summed, *kept)])
    rows = math.prod(moved.shape[: len(summed)])
    return Matrix(moved.reshape(rows, math.prod(moved.shape[len(summed) :])), rows)


def _unread(reason: str) -> Layout:
    def layout(_: ir.Node, __: int, ___: np.ndarray) -> Matrix:
        raise NotRead(reason)

    return layout


_unknown = _unread("nothing is known of this operator here, and it may multiply by its constants")
_packed = _unread("its weights are packed in a layout of the operator's own")
_contrib = _unread("the layout of this operator's weights is not known here")
_LEFT_OR_RIGHT = (1, 0)
_CONTRIB = "com.microsoft"

PRODUCTS: dict[tuple[str, str], Product] = {
    ("", "MatMul"): Product(_LEFT_OR_RIGHT, _matmul),
    ("", "Gemm"): Product(_LEFT_OR_RIGHT, _matmul),
    ("", "MatMulInteger"): Product(_LEFT_OR_RIGHT, _matmul, {0: (None, 2), 1: (None, 3)}),
    ("", "QLinearMatMul"): Product((3, 0), _matmul, {0: (1, 2), 3: (4, 5)}),
    ("", "Conv"): Product((1, 0), _conv),
    ("", "ConvInteger"): Product((1, 0), _conv, {0: (None, 2), 1: (None, 3)}),
    ("", "QLinearConv"): Product((3, 0), _conv, {0: (1, 2), 3: (4, 5)}),
    ("", "ConvTranspose"): Product((1, 0), _conv_transpose),
    ("", "DeformConv"): Product((1, 0), _conv),
    ("", "CausalConvWithState"): Product((1, 0), _conv),
    ("", "Einsum"): Product(None, _einsum),
    **{("", cell): Product((1, 2, 0), _recurrent) for cell in ("RNN", "GRU", "LSTM")},
    **{
        ("", attention): Product((0, 1, 2), _unread("a query, key or value of it is constant"))
        for attention in ("Attention", "LinearAttention")
    },
    **{
        ("ai.onnx.ml", op): Product((), _unread("its coefficients stand in attributes"))
        for op in ("LinearClassifier", "LinearRegressor", "SVMClassifier", "SVMRegressor")
    },
    **{
        (_CONTRIB, op): Product(_LEFT_OR_RIGHT, _matmul)
        for op in ("FusedMatMul", "FusedMatMulActivation", "TransposeMatMul", "FusedGemm", "GemmFastGelu")
    },
    (_CONTRIB, "MatMulInteger16"): Product(_LEFT_OR_RIGHT, _matmul, {0: (None, None), 1: (None, None)}),
    (_CONTRIB, "MatMulIntegerToFloat"): Product(_LEFT_OR_RIGHT, _matmul, {0: (2, 4), 1: (3, 5)}),
    (_CONTRIB, "DynamicQuantizeMatMul"): Product((1,), _matmul, {1: (2, 3)}),
    (_CONTRIB, "QGemm"): Product((3, 0), _matmul, {0: (1, 2), 3: (4, 5)}),
    (_CONTRIB, "FusedConv"): Product((1, 0), _conv),
    (_CONTRIB, "QLinearConv"): Product(None, _contrib),  # channels last or first, by an attribute
    (_CONTRIB, "Attention"): Product((1,), _matmul),
    (_CONTRIB, "QAttention"): Product((1,), _matmul, {1: (4, 7)}),
    **{
        (_CONTRIB, op): Product((1,), _packed)
        for op in ("MatMulNBits", "MatMulBnb4", "MatMulFpQ4", "DynamicQuantizeLSTM")
    },
    **{(_CONTRIB, op): Product(None, _packed) for op in ("MoE", "QMoE")},
    (_CONTRIB, "EPContext"): Product((), _unread("it holds a graph that is compiled already")),
}
PACKED_PRODUCTS = tuple(op for (_, op), product in PRODUCTS.items() if product.layout is _packed)
# Operators of ONNX Runtime that multiply by no matrix of theirs: tables, norms, activations, what moves or scales.
_NO_PRODUCTS = frozenset({
    "BeamSearch", "BiasAdd", "BiasDropout", "BiasGelu", "BiasSoftmax", "BiasSplitGelu", "BitmaskBiasDropout",
    "BitmaskDropout", "CropAndResize", "DequantizeBFP", "DequantizeLinear", "DynamicQuantizeLinear",
    "EmbedLayerNormalization", "ExpandDims", "FastGelu", "GatherBlockQuantized", "GatherND", "Gelu", "GreedySearch",
    "GridSample", "GroupNorm", "Inverse", "Irfft", "MaxpoolWithMask", "MulInteger", "NGramRepeatBlock",
    "NhwcMaxPool", "Pad", "QEmbedLayerNormalization", "QLinearAdd", "QLinearAveragePool", "QLinearConcat",
    "QLinearGlobalAveragePool", "QLinearLeakyRelu", "QLinearMul", "QLinearReduceMean", "QLinearSigmoid",
    "QLinearSoftmax", "QLinearWhere", "QOrderedGelu", "QOrderedLayerNormalization", "QuantizeBFP", "QuantizeLinear",
    "QuickGelu", "Range", "ReduceSumInteger", "RelativePositionBias", "RemovePadding", "RestorePadding", "Rfft",
    "RotaryEmbedding", "SampleOp", "Sampling", "SimplifiedLayerNormalization", "SkipGroupNorm",
    "SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "Tokenizer", "Trilu", "UnfoldTensor", "Unique",
    "WhisperBeamSearch",
})  # fmt: skip
_FORMER = ("SimplifiedLayerNormalization", "LayerNormalization")  # ONNX Runtime writes them in ONNX's domain


def _is_no_product(domain: str, op: str) -> bool:
    if domain == _CONTRIB:
        return op in _NO_PRODUCTS
    if domain not in ("", "ai.onnx.ml"):
        return False
    import onnx

    return op in _FORMER or bool(onnx.defs.has(op, domain))
