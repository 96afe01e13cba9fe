"""One product between quantizers, as other tools write it, with one thing or several out of the ordinary."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

K, N = 64, 32
INT8, UINT8 = "INT8", "UINT8"


@dataclass(frozen=True)
class QdqProduct:
    """``x -> Q -> DQ -> MatMul(W) [-> bias] [-> moves] -> Q -> DQ`` with W (K, N) 2:4 along K behind its DQ.

    `input_type` and `output_type` are types of zero points (None: no zero point), or ``float`` for no pair at all;
    `weight_type` that of the stored weight. `weight_pair` quantizes a float weight in the graph behind `weight_moves`;
    `moves` stand between the product and its output's quantizer. `also_output` makes the product an output, too.
    `weight_zero_at` are the channels or blocks whose zero point is `weight_zero`; None for all.
    """

    input_type: str | None = INT8
    input_scale: float = 0.05
    input_zero: int = 0
    weight_type: str = INT8
    weight_scales: tuple[float, ...] = (0.01,) * N
    weight_zero: int = 0
    weight_zero_at: frozenset[int] | None = None
    weight_axis: int = 1
    weight_block: int = 0
    weight_pair: bool = False
    weight_moves: tuple[str, ...] = ()
    weight_cast: bool = False
    bias: str = "none"
    moves: tuple[str, ...] = ()
    output_type: str | None = INT8
    also_output: bool = False
    dense: bool = False
    opset: int = 21

    def model(self) -> onnx.ModelProto:
        """The graph as a model."""
        maker = _Maker(self)
        maker.make()
        graph = helper.make_graph(maker.nodes, "g", maker.inputs, maker.outputs, maker.constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=10)

    def save(self, file: Path) -> Path:
        """Write the graph and return the file."""
        onnx.save(self.model(), file)
        return file


def sparse_codes(dense: bool = False) -> np.ndarray:
    """Integer codes (K, N) from -7 to 7, two of four zero along K unless `dense`."""
    signs = np.random.default_rng(1).choice([-1, 1], (K, N))
    codes: np.ndarray = np.random.default_rng(0).integers(1, 8, size=(K, N)) * signs
    if not dense:
        codes[np.arange(K) % 4 < 2] = 0
    return codes


class _Maker:
    def __init__(self, product: QdqProduct) -> None:
        self.product = product
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", K])]
        self.outputs: list[onnx.ValueInfoProto] = []

    def make(self) -> None:
        product = self.product
        x = self.pair("x", "a", product.input_type, product.input_scale, product.input_zero)
        y = self.node("MatMul", [x, self.weight()], "product")
        if product.also_output:
            self.outputs.append(helper.make_tensor_value_info(y, TensorProto.FLOAT, None))
        if product.bias == "float":
            y = self.node("Add", [y, self.constant("bias", TensorProto.FLOAT, [N], [0.5] * N)], "add")
        elif product.bias == "int32":
            codes = self.constant("bias", TensorProto.INT32, [N], [5] * N)
            scale = self.constant("bias_scale", TensorProto.FLOAT, [], [0.1])
            y = self.node("Add", [y, self.node("DequantizeLinear", [codes, scale], "bias_dq")], "add")
        for at, move in enumerate(product.moves):
            y = self.move(move, y, f"move{at}", ["0", "8", "4"])
        y = self.pair(y, "o", product.output_type, 0.05, 0)
        self.outputs.append(helper.make_tensor_value_info(y, TensorProto.FLOAT, None))

    def weight(self) -> str:
        product = self.product
        codes = sparse_codes(product.dense)
        if product.weight_pair:
            moves, floats = _moved_to((codes * 0.01).astype(np.float32), product.weight_moves)
            value = self.array("w", floats)
            for at, move in enumerate(moves):
                value = self.move(move, value, f"weight_move{at}", [str(K), str(N)])
        elif product.weight_type == "FLOAT":
            return self.array("w", codes.astype(np.float32))
        else:
            value = self.constant("w", _type(product.weight_type), [K, N], list(_clipped(codes, product.weight_type)))
        if product.weight_cast:
            value = self.node("Cast", [value], "weight_cast", to=TensorProto.INT8)
        scales = product.weight_scales
        shape = [len(scales)] if len(scales) != 1 else []
        if product.weight_block:
            shape, scales = [K // product.weight_block, N], (0.01,) * (K // product.weight_block * N)
        kind = INT8 if product.weight_cast or product.weight_pair else product.weight_type
        shifted = frozenset(range(len(scales))) if product.weight_zero_at is None else product.weight_zero_at
        zeros = [product.weight_zero if number in shifted else 0 for number in range(len(scales))]
        read = [
            self.constant("w_scale", TensorProto.FLOAT, shape, list(scales)),
            self.constant("w_zero", _type(kind), shape, zeros),
        ]
        where = (
            {"axis": 0, "block_size": product.weight_block} if product.weight_block else {"axis": product.weight_axis}
        )
        if product.weight_pair:
            value = self.node("QuantizeLinear", [value, *read], "weight_q", **where)
        return self.node("DequantizeLinear", [value, *read], "weight_dq", **where)

    def pair(self, value: str, name: str, kind: str | None, scale: float, zero: int) -> str:
        if kind == "float":
            return value
        read = [self.constant(f"{name}_scale", TensorProto.FLOAT, [], [scale])]
        if kind is not None:
            read.append(self.constant(f"{name}_zero", _type(kind), [], [zero]))
        codes = self.node("QuantizeLinear", [value, *read], f"{name}_q")
        return self.node("DequantizeLinear", [codes, *read], f"{name}_dq")

    def move(self, kind: str, value: str, name: str, sizes: list[str]) -> str:
        if kind == "Reshape":
            shape = self.constant(f"{name}_shape", TensorProto.INT64, [len(sizes)], [int(size) for size in sizes])
            return self.node("Reshape", [value, shape], name)
        return self.node(kind, [value], name)

    def node(self, op: str, inputs: list[str], name: str, **attributes: int) -> str:
        node = helper.make_node(op, inputs, [f"{name}_out"], name=name)
        node.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
        self.nodes.append(node)
        return f"{name}_out"

    def constant(self, name: str, kind: int, shape: list[int], values: list[int] | list[float]) -> str:
        self.constants.append(helper.make_tensor(name, kind, shape, values))
        return name

    def array(self, name: str, values: np.ndarray) -> str:
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name


def _moved_to(matrix: np.ndarray, moves: tuple[str, ...]) -> tuple[tuple[str, ...], np.ndarray]:
    """(moves that end in the shape of `matrix`, what they make `matrix` of)."""
    places = np.arange(matrix.size).reshape(matrix.shape)
    for move in moves:
        places = places.T if move == "Transpose" else places.reshape(matrix.shape) if move == "Reshape" else places
    if places.shape != matrix.shape:
        moves, places = (*moves, "Transpose"), places.T
    start = np.empty(matrix.size, matrix.dtype)
    start[places.reshape(-1)] = matrix.reshape(-1)
    return moves, start.reshape(matrix.shape)


def _type(name: str) -> int:
    return int(TensorProto.DataType.Value(name))


def _clipped(codes: np.ndarray, kind: str) -> np.ndarray:
    return np.abs(codes).reshape(-1) if kind.startswith("U") else codes.reshape(-1)
