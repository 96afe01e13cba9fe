"""What a weight was before it was scaled: the integers in front of its DequantizeLinear, moved as the values are.

Between a DequantizeLinear and the product a weight may be transposed, split, joined, gathered: the operators that move
values move the codes alike, and with them, element by element, the number of the scale that belongs to each. So it is
known how a weight is scaled, however it came to lie.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from nxm_export.graph.reading.constant_values import ConstantValues, NotComputed, is_stored, plain
from nxm_export.graph.reading.products import Operand

# Nodes that move the elements of their first input (Concat: of all) and change none; a Cast, from float to float.
_MOVES = frozenset({
    "Cast", "Concat", "DepthToSpace", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "SpaceToDepth",
    "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze",
})  # fmt: skip
_LAYING = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Identity", "Flatten", "Cast")  # all of it, in another shape
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
_INTEGERS = (ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT16, ir.DataType.UINT16, ir.DataType.INT32)


@dataclass(frozen=True)
class Origins:
    """The stored matrices that a value is made of (vectors and numbers, when there is no matrix), and whether any is of
    integers or goes through a QuantizeLinear."""

    sources: tuple[ir.Value, ...]
    quantized: bool

    @property
    def name(self) -> str:
        """Their names; of many, the first three."""
        names = [value.name or "" for value in self.sources]
        return " + ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

    @property
    def stored(self) -> str:
        """Their types in the file."""
        tensors = [ir.convenience.get_const_tensor(value) for value in self.sources]
        return "+".join(dict.fromkeys(str(tensor.dtype) for tensor in tensors if tensor is not None))


@dataclass(frozen=True)
class Parameter:
    """Scales or zero points of a weight, flat; `index` has the weight's shape and says which belongs to each element.

    None where there is one for all, where an operator knows by itself, and where they fit no axis.
    """

    values: np.ndarray
    index: np.ndarray | None


@dataclass(frozen=True)
class Codes:
    """The integers (or small floats) of a weight, laid out as the product's operand is; `kind` their type.

    `floats` are the values in front of a QuantizeLinear of constants, `blocked` says that scales belong to blocks;
    `moved_by` names what takes a part of the scaled values or joins them.
    """

    codes: np.ndarray
    kind: str
    scale: Parameter | None
    zero: Parameter | None
    blocked: bool
    floats: np.ndarray | None
    moved_by: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Path:
    """The nodes that a value comes from, and those that only move it since, each behind those that it reads."""

    starts: Sequence[ir.Node]
    moves: Sequence[ir.Node]


def origins_of(value: ir.Value) -> Origins:
    """Where a value comes from; also of one that is not computed."""
    sources: dict[int, ir.Value] = {}
    quantized, seen, pending = False, set[int](), [value]
    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        node = value.producer()
        if is_stored(value):
            sources[id(value)] = value
        elif node is not None:
            quantizes = node.op_type in ("DequantizeLinear", "QuantizeLinear")
            quantized |= quantizes
            reads = (
                node.inputs[:1] if quantizes or (node.op_type in _MOVES and node.op_type != "Concat") else node.inputs
            )
            pending += [read for read in reversed(reads) if read is not None]
    matrices = [source for source in sources.values() if _is_matrix(source)]
    integers = any(_is_integer(source) for source in matrices)
    return Origins(tuple(matrices or sources.values()), quantized or integers)


def _is_integer(value: ir.Value) -> bool:
    tensor = ir.convenience.get_const_tensor(value)
    return tensor is not None and tensor.dtype.is_integer()


def _is_matrix(value: ir.Value) -> bool:
    tensor = ir.convenience.get_const_tensor(value)
    return tensor is not None and sum(size != 1 for size in tensor.shape.numpy()) >= 2


def dequantized(value: ir.Value, constants: ConstantValues) -> Codes | None:
    """The codes of a value that comes from DequantizeLinear nodes and is only moved behind them, or None.

    Raises `NotComputed` when they cannot be computed.
    """
    path = _path(value, "DequantizeLinear")
    if path is None:
        return None
    kinds = {_kind(constants, node) for node in path.starts}
    if len(kinds) != 1:
        return None
    codes = [constants.operand(node, 0) for node in path.starts]
    shapes = [array.shape for array in codes if array is not None]
    scales = [constants.operand(node, 1) for node in path.starts]
    zeros = [constants.operand(node, 2) for node in path.starts]

    def moved(arrays: Sequence[np.ndarray | None]) -> np.ndarray:
        return _moved(value, path, arrays, constants)

    def parameter(arrays: Sequence[np.ndarray | None]) -> Parameter | None:
        if all(array is None for array in arrays):
            return None
        filled = [np.zeros(1, np.int8) if array is None else array for array in arrays]
        values = np.concatenate([array.reshape(-1) for array in filled])
        index = _indices(path.starts, shapes, filled)
        return Parameter(values, None if values.size == 1 or index is None else moved(index))

    blocked = any(_block_size(node) for node in path.starts)
    floats = [_unrounded(node.inputs[0], constants) for node in path.starts]
    unrounded = None if any(array is None for array in floats) else moved(floats)
    parting = tuple(dict.fromkeys(node.op_type for node in path.moves if node.op_type not in _LAYING))
    return Codes(moved(codes), kinds.pop(), parameter(scales), parameter(zeros), blocked, unrounded, parting)


def scaled_by_operator(operand: Operand, constants: ConstantValues) -> Codes | None:
    """The codes of an operand that its product scales by itself, or None for another product."""
    node, index, value = operand.node, operand.index, operand.value
    if value is None or index is None or index not in operand.product.quantizers:
        return None
    scale_at, zero_at = operand.product.quantizers[index]

    def parameter(at: int | None) -> Parameter | None:
        array = None if at is None else constants.operand(node, at)
        return None if array is None else Parameter(array.reshape(-1), None)

    raw = constants.array(value)
    floats = _unrounded(value, constants)
    return Codes(plain(raw), type_name(raw), parameter(scale_at), parameter(zero_at), False, floats)


def _unrounded(value: ir.Value | None, constants: ConstantValues) -> np.ndarray | None:
    """The floats in front of the QuantizeLinear that codes come from; None when the codes are what is stored."""
    path = None if value is None else _path(value, "QuantizeLinear")
    if path is None or value is None:
        return None
    return _moved(value, path, [constants.operand(node, 0) for node in path.starts], constants)


def _path(value: ir.Value, start: str) -> _Path | None:
    """How a value comes from nodes of type `start` by moves alone; None when it comes from anything else, too."""
    kept = _FLOATS if start == "DequantizeLinear" else _INTEGERS
    starts: dict[int, ir.Node] = {}
    moves: dict[int, ir.Node] = {}
    stack = [(value, False)]
    entered: set[int] = set()
    while stack:
        value, visited = stack.pop()
        node = value.producer()
        if node is None or is_stored(value):
            return None
        if visited:
            moves.setdefault(id(node), node)
        elif node.op_type == start and not node.domain:
            starts[id(node)] = node
        elif id(node) not in moves:
            reads = _moved_inputs(node, kept)
            if not reads or id(node) in entered:
                return None
            entered.add(id(node))
            stack.append((value, True))
            stack += [(read, False) for read in reads]
    return _Path(list(starts.values()), list(moves.values()))


def _moved_inputs(node: ir.Node, kept: Sequence[ir.DataType] = ()) -> list[ir.Value]:
    """The inputs whose elements a node moves; none for a node that does something else. A Cast moves when it goes to a
    type that is `kept`."""
    if node.op_type not in _MOVES or node.domain:
        return []
    if node.op_type == "Cast" and ir.DataType(node.attributes["to"].as_int()) not in kept:
        return []
    reads = node.inputs if node.op_type == "Concat" else node.inputs[:1]
    return [read for read in reads if read is not None]


def _moved(value: ir.Value, path: _Path, arrays: Sequence[np.ndarray | None], constants: ConstantValues) -> np.ndarray:
    """Arrays of the shapes of what the path starts with, as they lie at its end."""
    laid = {id(node.outputs[0]): array for node, array in zip(path.starts, arrays, strict=True) if array is not None}
    for node in path.moves:
        if node.op_type == "Cast":  # it changes the type alone
            results = [_given(node.inputs[0], laid, constants)]
        else:
            moved = _moved_inputs(node)
            results = constants.run(
                node,
                [
                    None
                    if read is None
                    else _given(read, laid, constants)
                    if any(read is given for given in moved)
                    else constants.array(read)
                    for read in node.inputs
                ],
            )
        laid.update({id(output): result for output, result in zip(node.outputs, results, strict=False)})
    return laid[id(value)]


def _given(value: ir.Value | None, laid: Mapping[int, np.ndarray], constants: ConstantValues) -> np.ndarray:
    if value is None:
        raise NotComputed("an input of a node that moves it is missing")
    return laid[id(value)] if id(value) in laid else constants.array(value)


def _indices(
    nodes: Sequence[ir.Node], shapes: Sequence[tuple[int, ...]], parameters: Sequence[np.ndarray]
) -> list[np.ndarray] | None:
    """For each DequantizeLinear, which of all parameters, one behind the other, belongs to each element of its codes;
    None when some fit no axis."""
    indices, first = [], 0
    for node, shape, parameter in zip(nodes, shapes, parameters, strict=True):
        index = _index(node, shape, parameter)
        if index is None:
            return None
        indices.append(index + np.int32(first) if first else index)
        first += parameter.size
    return indices


def _index(node: ir.Node, shape: tuple[int, ...], parameter: np.ndarray) -> np.ndarray | None:
    numbers = np.arange(parameter.size, dtype=np.int32)
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
    if parameter.size == 1:
        return np.broadcast_to(numbers.reshape(()), shape)
    if not -len(shape) <= axis < len(shape):
        return None
    axis %= len(shape)
    block = _block_size(node)
    if block:
        expected = tuple(-(-size // block) if at == axis else size for at, size in enumerate(shape))
        if parameter.shape != expected:
            return None
        repeated = np.repeat(numbers.reshape(expected), block, axis=axis)
        return np.asarray(repeated.take(np.arange(shape[axis]), axis=axis))
    if parameter.size != shape[axis]:
        return None
    return np.broadcast_to(numbers.reshape([-1 if at == axis else 1 for at in range(len(shape))]), shape)


def _block_size(node: ir.Node) -> int:
    return max(node.attributes["block_size"].as_int(), 0) if "block_size" in node.attributes else 0


def _kind(constants: ConstantValues, node: ir.Node) -> str:
    value = node.inputs[0]
    if value is None:
        raise NotComputed("a DequantizeLinear has no input")
    return type_name(constants.array(value))


def type_name(array: np.ndarray) -> str:
    """ONNX's name of an array's type."""
    return ir.DataType.from_numpy(array.dtype).name
