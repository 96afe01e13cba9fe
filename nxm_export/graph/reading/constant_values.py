"""The values of a graph that depend on none of its inputs, as its operators compute them.

ONNX's own reference evaluator runs each node, so that nothing here knows what an operator does. What is known here is
how large a result gets: a few bytes of shape can ask for terabytes (Expand, ConstantOfShape), and the work for one file
is bounded. What is not computed raises `NotComputed`, which says why.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from nxm_export.errors import ArtifactError
from nxm_export.graph.reading.dependence import Dependence, dependences, subgraphs

_LARGEST = 2**28  # elements of a computed constant that is larger than what it is computed from: 1 GiB of float32
_WORK = 2**35  # elements that are computed for one file: minutes
_NODE_WORK = 50_000  # elements that cost as much as starting one node, 0.3 ms
_CACHED = 2**28  # bytes of results that are kept for other products

# Each output has at most as many elements as all inputs together, or as they broadcast to.
_ELEMENTWISE = frozenset({
    "Abs", "Add", "And", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "Cast", "CastLike",
    "Ceil", "Celu", "Clip", "Cos", "Cosh", "DequantizeLinear", "Div", "Elu", "Equal", "Erf", "Exp", "Floor", "Gelu",
    "Greater", "GreaterOrEqual", "HardSigmoid", "HardSwish", "Identity", "IsInf", "IsNaN", "LeakyRelu", "Less",
    "LessOrEqual", "Log", "Max", "Mean", "Min", "Mish", "Mod", "Mul", "Neg", "Not", "Or", "Pow", "QuantizeLinear",
    "Reciprocal", "Relu", "Round", "Selu", "Sigmoid", "Sign", "Sin", "Sinh", "Softplus", "Softsign", "Sqrt", "Sub",
    "Sum", "Tan", "Tanh", "ThresholdedRelu", "Where", "Xor",
})  # fmt: skip
_NOT_LARGER = frozenset({
    "Concat", "Constant", "CumSum", "DepthToSpace", "DynamicQuantizeLinear", "EyeLike", "Flatten", "GatherElements",
    "LayerNormalization", "LogSoftmax", "LpNormalization", "RMSNormalization", "ReduceL1", "ReduceL2",
    "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum",
    "ReduceSumSquare", "Reshape", "Scatter", "ScatterElements", "ScatterND", "Shape", "Size", "Slice", "Softmax",
    "SpaceToDepth", "Split", "Squeeze", "Transpose", "Trilu", "Unsqueeze",
})  # fmt: skip
Size = Callable[[ir.Node, Sequence[np.ndarray]], int]


class NotComputed(Exception):
    """A constant is not computed; the message says why."""


class ConstantValues:
    """What depends on no input in one model; results that several products need are computed once."""

    def __init__(self, model: ir.Model) -> None:
        self._model = model  # values are known by their id, as long as they live
        self._dependences = dependences(model)
        self._opsets = dict(model.opset_imports)
        self._cache: OrderedDict[int, np.ndarray] = OrderedDict()
        self._cached = self._work = 0

    def dependence(self, value: ir.Value | None) -> Dependence:
        """On what of the graph's inputs a value depends; an input that is left out depends on nothing."""
        return Dependence.NOTHING if value is None else self._dependences.get(id(value), Dependence.NOTHING)

    def array(self, value: ir.Value) -> np.ndarray:
        """The value, in the type that the operators give it (4-bit and 8-bit types are those of ml_dtypes).

        Raises `NotComputed`, and `ArtifactError` when stored data are missing or damaged.
        """
        if self.dependence(value) is not Dependence.NOTHING:
            raise NotComputed(f"{_made_by(value)}, and depends on an input of the graph")
        if (array := self._known(value)) is not None:
            return array
        order = self._order(value)
        needed = Counter(id(read) for node in order for read in node.inputs if read is not None)
        results: dict[int, np.ndarray] = {}
        for node in order:
            inputs = [self._operand(read, results) for read in node.inputs]
            for output, result in zip(node.outputs, self.run(node, inputs), strict=False):
                results[id(output)] = result
                self._remember(output, result)
            for read in node.inputs:  # nothing is kept that no later node reads
                needed[id(read)] -= 1
                if not needed[id(read)] and read is not value:
                    results.pop(id(read), None)
        return results[id(value)]

    def operand(self, node: ir.Node, index: int) -> np.ndarray | None:
        """An input of a node, in a type of numpy's own; None where it is left out."""
        value = node.inputs[index] if index < len(node.inputs) else None
        return None if value is None else plain(self.array(value))

    def run(self, node: ir.Node, inputs: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        """The outputs of one node on these arrays."""
        size = _size(node, inputs)
        if size > max([_LARGEST, *(array.size for array in inputs if array is not None)]):
            raise NotComputed(f"{_named(node)} would make {size:.3g} elements of it, more than are computed here")
        self._work += max(size, _NODE_WORK)
        if self._work > _WORK:
            raise NotComputed(f"{_named(node)} is behind more arithmetic on constants than is done here")
        return _evaluated(node, inputs, self._opsets)

    def _known(self, value: ir.Value) -> np.ndarray | None:
        if id(value) in self._cache:
            self._cache.move_to_end(id(value))
            return self._cache[id(value)]
        array = stored_array(value)
        if array is not None and array.dtype.kind in "OSU":
            raise NotComputed(f"{value.name} holds text")
        return array

    def _operand(self, value: ir.Value | None, results: Mapping[int, np.ndarray]) -> np.ndarray | None:
        if value is None:
            return None
        array = results[id(value)] if id(value) in results else self._known(value)
        if array is None:
            raise NotComputed(_made_by(value))
        return array

    def _order(self, value: ir.Value) -> list[ir.Node]:
        """The nodes to run for a value, each behind those that it reads."""
        order: list[ir.Node] = []
        done: set[int] = set()
        inside: set[int] = set()
        stack: list[tuple[ir.Value, bool]] = [(value, False)]
        while stack:
            value, visited = stack.pop()
            node = value.producer()
            if node is not None and visited and id(node) not in done:
                order.append(node)
                done.add(id(node))
                inside.discard(id(node))
            if visited or (node is not None and id(node) in done) or id(value) in self._cache or is_stored(value):
                continue
            if node is None:
                raise NotComputed(_made_by(value))
            if id(node) in inside:
                raise NotComputed(f"{_named(node)} reads its own output")
            inside.add(id(node))
            stack.append((value, True))
            stack += [(read, False) for read in node.inputs if read is not None]
        return order

    def _remember(self, value: ir.Value, array: np.ndarray) -> None:
        if array.nbytes <= _CACHED:
            self._cached += array.nbytes
            self._cache[id(value)] = array
            while self._cached > _CACHED:
                self._cached -= self._cache.popitem(last=False)[1].nbytes


def is_stored(value: ir.Value) -> bool:
    """True for a constant that lies in the file: an initializer, or the output of a Constant node."""
    node = value.producer()
    return value.const_value is not None or (node is not None and node.op_type == "Constant" and not node.domain)


def stored_array(value: ir.Value) -> np.ndarray | None:
    """The values of a constant that lies in the file, in its own type; None for anything else.

    Raises `ArtifactError` when the data are missing or damaged.
    """
    try:
        tensor = ir.convenience.get_const_tensor(value)
        if tensor is None:
            return None
        _require_whole(tensor)
        return np.asarray(tensor.numpy())
    except Exception as error:  # data in another file, or of another size than the shape says
        line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ArtifactError(
            f"the data of constant {value.name} cannot be read ({line}); "
            "the file is truncated, or its .data file is missing"
        ) from error


def plain(array: np.ndarray) -> np.ndarray:
    """An array in a type of numpy's own: small integers as 8-bit ones, small floats as float32."""
    if array.dtype.type.__module__ == "numpy":
        return array
    name = array.dtype.name
    return array.astype(np.int8 if name.startswith("int") else np.uint8 if name.startswith("uint") else np.float32)


def _require_whole(tensor: ir.TensorProtocol) -> None:
    """Raise `ValueError` when a tensor of 2 or 4 bits holds less than its shape says: onnx_ir would read the rest as
    zeros, which look like a pattern."""
    if tensor.dtype.bitwidth >= 8:
        return
    needed = -(-tensor.size * tensor.dtype.bitwidth // 8)
    proto = tensor.raw if isinstance(tensor, ir.serde.TensorProtoTensor) else None
    packed = proto is not None and not proto.HasField("raw_data")  # one byte in each number of int32_data
    stored = len(proto.int32_data) if proto is not None and packed else len(tensor.tobytes())
    if stored < needed:
        raise ValueError(f"{stored} bytes, and its shape needs {needed}")


def _evaluated(node: ir.Node, inputs: Sequence[np.ndarray | None], opsets: Mapping[str, int]) -> list[np.ndarray]:
    """One node, by ONNX's reference evaluator."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    proto = ir.to_proto(node)
    del proto.input[:], proto.output[:]
    proto.input.extend("" if array is None else f"i{at}" for at, array in enumerate(inputs))
    proto.output.extend(f"o{at}" for at in range(len(node.outputs)))
    value = onnx.helper.make_tensor_value_info
    feeds = {f"i{at}": array for at, array in enumerate(inputs) if array is not None}
    graph = onnx.helper.make_graph(
        [proto],
        "node",
        [value(name, onnx.TensorProto.UNDEFINED, None) for name in feeds],
        [value(name, onnx.TensorProto.UNDEFINED, None) for name in proto.output],
    )
    imports = [onnx.helper.make_opsetid(domain, version) for domain, version in opsets.items()]
    try:
        with np.errstate(all="ignore"):
            results = ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=imports)).run(None, feeds)
    except Exception as error:  # a malformed node, or one that the evaluator lacks; it raises as many types
        line = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        raise NotComputed(f"{_named(node)} cannot be evaluated ({line})") from error
    if not all(isinstance(result, np.ndarray | np.generic) for result in results):
        raise NotComputed(f"{_named(node)} gives no plain tensors")
    return [np.asarray(result) for result in results]


def _size(node: ir.Node, inputs: Sequence[np.ndarray | None]) -> int:
    """How many elements a node makes at most, and for products how many it multiplies."""
    known = [array for array in inputs if array is not None]
    if node.domain not in ("", "ai.onnx") or subgraphs(node):
        raise NotComputed(f"it comes from {_named(node)}, which is not computed here")
    try:
        if node.op_type == "QuantizeLinear":
            _check_codes(node, known)
        if node.op_type in _ELEMENTWISE:
            return math.prod(np.broadcast_shapes(*(array.shape for array in known if array.size > 1 or not array.ndim)))
        if node.op_type in _NOT_LARGER:
            return sum(array.size for array in known)
        if node.op_type in _LARGER:
            return _LARGER[node.op_type](node, known)
    except NotComputed:
        raise
    except (ValueError, IndexError, KeyError, TypeError, ZeroDivisionError, OverflowError):
        return sum(array.size for array in known)  # shapes that do not fit: the evaluator says so
    raise NotComputed(f"it comes from {_named(node)}, which is not computed here")


def _check_codes(node: ir.Node, inputs: Sequence[np.ndarray]) -> None:
    """The evaluator rounds to 32-bit integers before it clips, so that a larger quotient would come out wrong."""
    values, scale = (array.astype(np.float64) for array in inputs[:2])
    smallest = np.abs(scale).min(initial=np.inf)
    if not np.isfinite(scale).all() or not smallest > 0:
        raise NotComputed(f"a scale of {_named(node)} is zero or not finite")
    if not np.abs(values).max(initial=0.0) / smallest < 2**31:
        raise NotComputed(f"{_named(node)} quantizes values that are not finite, or far beyond its scale")


def _gathered(node: ir.Node, inputs: Sequence[np.ndarray]) -> int:
    data, indices = inputs[:2]
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    return int(indices.size * (data.size // max(data.shape[axis], 1)))


def _padded(node: ir.Node, inputs: Sequence[np.ndarray]) -> int:
    if len(inputs) < 2:  # an attribute before opset 11
        pads = np.array(node.attributes["pads"].as_ints())
    elif len(inputs) < 4:
        pads = inputs[1]
    else:
        raise NotComputed(f"{_named(node)} pads some axes alone, which is not computed here")
    grown = np.array(inputs[0].shape) + pads.reshape(2, -1).clip(0).sum(axis=0)
    return _product(grown)


def _multiplied(node: ir.Node, inputs: Sequence[np.ndarray]) -> int:
    left, right = inputs[:2]
    return left.size * max(right.shape[-1] if right.ndim else 1, right.shape[0] if node.op_type == "Gemm" else 1)


def _product(sizes: np.ndarray | Sequence[int]) -> int:
    return math.prod(max(int(size), 0) for size in np.asarray(sizes).reshape(-1))


_LARGER: dict[str, Size] = {
    "Expand": lambda node, inputs: math.prod(np.broadcast_shapes(inputs[0].shape, tuple(map(int, inputs[1])))),
    "Tile": lambda node, inputs: inputs[0].size * _product(inputs[1]),
    "ConstantOfShape": lambda node, inputs: _product(inputs[0]),
    "Range": lambda node, inputs: int(abs((float(inputs[1]) - float(inputs[0])) / float(inputs[2]))) + 1,
    "Pad": _padded,
    "Gather": _gathered,
    "GatherND": lambda node, inputs: inputs[1].size * inputs[0].size // max(inputs[0].shape[0], 1),
    "MatMul": _multiplied,
    "Gemm": _multiplied,
}


def _named(node: ir.Node) -> str:
    operator = node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}::{node.op_type}"
    return f"{operator} {node.name}".strip()


def _made_by(value: ir.Value) -> str:
    node = value.producer()
    if node is not None:
        return f"it comes from {_named(node)}"
    if value.is_graph_input():
        return f"{value.name} is an input of a subgraph, another one in each round"
    return f"no node makes {value.name}"
