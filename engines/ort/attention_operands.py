"""What attention multiplies in a graph: where its queries, keys and values come from, and how they are put back for an
operator that splits heads and rotates by itself.

An operand is a tensor (batch, sequence, features), or one of three parts of it (a fused matrix of query, key and
value), that is split into heads. Queries and keys may be rotated: ``x * cos + turned(x) * sin`` with `turned` the two
halves of a head exchanged and one of them negated. ONNX Runtime's ``RotaryEmbedding`` does that in one pass, with the
cosines and sines that the graph has already, so that no angle is computed anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from engines.ort.node_forms import axis, integers, only, perm, producer, same_size, scalar

if TYPE_CHECKING:
    import onnx_ir as ir

CONTRIB = "com.microsoft"
_PARTS = 3  # of a fused matrix: query, key, value
_ELEMENTWISE = ("Cos", "Sin", "Cast")  # what stands between the angles and what is multiplied, and a Mul by a number


@dataclass(frozen=True)
class Rotation:
    """Cosines and sines (1, sequence, head), both halves of a head alike, and the name of what is rotated."""

    cos: ir.Value
    sin: ir.Value
    name: str


@dataclass(frozen=True)
class Heads:
    """A tensor (batch, sequence, features), or its `part` of three along the features, as `count` heads of `size`
    features each, rotated or not."""

    whole: ir.Value
    part: int | None
    count: int
    size: int
    rotation: Rotation | None = None


def query_or_value(value: ir.Value | None) -> Heads | None:
    """The heads of an operand (batch, heads, sequence, head) of attention; None for another form."""
    return _split(value, (0, 2, 1, 3)) or _rotated(value)


def key(value: ir.Value | None) -> Heads | None:
    """The same of keys, (batch, heads, head, sequence)."""
    turned = only(value, "Transpose")
    if turned is not None and perm(turned) == (0, 1, 3, 2):
        return query_or_value(turned.inputs[0])
    return _split(value, (0, 2, 3, 1))


def _split(value: ir.Value | None, order: tuple[int, ...]) -> Heads | None:
    """What a transpose of this permutation splits into heads."""
    transpose = producer(value, "Transpose")
    if transpose is None or perm(transpose) != order:
        return None
    source = transpose.inputs[0]
    if source is None or source.shape is None or len(source.shape) != 4:
        return None
    count, size = source.shape[2], source.shape[3]
    if not isinstance(count, int) or not isinstance(size, int):
        return None
    reshape = producer(source, "Reshape")
    whole, part = (reshape.inputs[0], None) if reshape is not None else _part_of(source, count, size)
    if whole is None or whole.shape is None or len(whole.shape) != 3:
        return None
    return Heads(whole, part, count, size)


def _part_of(value: ir.Value, count: int, size: int) -> tuple[ir.Value | None, int | None]:
    """(the whole, which of its three parts): of a value (batch, sequence, `count`, `size`) that is cut out of (batch,
    sequence, 3, `count`, `size`)."""
    nothing = None, None
    squeeze = producer(value, "Squeeze")
    if squeeze is None or integers(squeeze, 1) not in ([2], [-3]):
        return nothing
    cut = producer(squeeze.inputs[0], "Slice")
    reshape = None if cut is None else producer(cut.inputs[0], "Reshape")
    if cut is None or reshape is None or integers(cut, 3) not in ([2], [-3]) or integers(cut, 4) not in (None, [1]):
        return nothing
    starts, ends, shape = integers(cut, 1), integers(cut, 2), reshape.outputs[0].shape
    if not starts or not ends or ends != [starts[0] + 1] or not 0 <= starts[0] < _PARTS:
        return nothing
    if shape is None or list(shape)[2:] != [_PARTS, count, size]:
        return nothing
    return reshape.inputs[0], starts[0]


def _rotated(value: ir.Value | None) -> Heads | None:
    """The heads behind ``x * cos + turned(x) * sin``."""
    added = only(value, "Add")
    plain, exchanged = (None, None) if added is None else (only(half, "Mul") for half in added.inputs)
    if added is None or plain is None or exchanged is None:
        return None
    joined = only(exchanged.inputs[0], "Concat")
    heads = _split(plain.inputs[0], (0, 2, 1, 3))
    if heads is None or joined is None or not _exchanges_halves(joined, plain.inputs[0], heads.size):
        return None
    cos, sin = _angles(plain.inputs[1], plain.inputs[0]), _angles(exchanged.inputs[1], plain.inputs[0])
    if cos is None or sin is None:
        return None
    return Heads(heads.whole, heads.part, heads.count, heads.size, Rotation(cos, sin, str(added.outputs[0].name)))


def _exchanges_halves(joined: ir.Node, x: ir.Value | None, size: int) -> bool:
    """True for the second half of each head of `x`, negated, in front of the first one."""
    negated = only(joined.inputs[0], "Neg")
    if negated is None or len(joined.inputs) != 2 or size % 2 or axis(joined, 0) not in (-1, 3):
        return False
    second, first = only(negated.inputs[0], "Slice"), only(joined.inputs[1], "Slice")
    if first is None or second is None or first.inputs[0] is not x or second.inputs[0] is not x:
        return False
    for cut, (begin, end) in ((first, (0, size // 2)), (second, (size // 2, size))):
        starts, ends = integers(cut, 1), integers(cut, 2)
        if starts != [begin] or not ends or min(ends[0], size) != end or len(ends) != 1:
            return False
        if integers(cut, 3) not in ([3], [-1]) or integers(cut, 4) not in (None, [1]):
            return False
    return True


def _angles(value: ir.Value | None, x: ir.Value | None) -> ir.Value | None:
    """The cosines or sines (1, sequence, head) behind an operand (1, 1, sequence, head) that multiplies the heads `x`,
    where both halves of a head have the same; None for others."""
    spread = producer(value, "Unsqueeze")
    source = None if spread is None or integers(spread, 1) != [1] else spread.inputs[0]
    if source is None or source.shape is None or x is None or x.shape is None:
        return None
    if len(source.shape) != 3 or source.shape[0] != 1 or len(x.shape) != 4:
        return None
    if not same_size(source.shape[1], x.shape[2]) or not same_size(source.shape[2], x.shape[3]):
        return None
    node = source.producer()
    while node is not None and (node.op_type in _ELEMENTWISE or (node.op_type == "Mul" and _by_number(node))):
        before = node.inputs[0]
        node = None if before is None else before.producer()
    if node is None or node.op_type != "Concat" or axis(node, 0) not in (-1, 2):
        return None
    return source if len(node.inputs) == 2 and node.inputs[0] is node.inputs[1] else None


def _by_number(node: ir.Node) -> bool:
    return scalar(node.inputs[1]) is not None


class OperandWriter:
    """Puts operands into a graph as the fused operators take them; what several of them need is made once."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._parts: dict[ir.Value, list[ir.Value]] = {}
        self._halves: dict[ir.Value, ir.Value] = {}
        self._constants: dict[str, ir.Value] = {}

    def written(self, heads: Heads, before: ir.Node) -> ir.Value:
        """The operand (batch, sequence, features), rotated where it was; its last node is put in front of `before`."""
        value = heads.whole if heads.part is None else self._part(heads)
        if heads.rotation is None:
            return value
        import onnx_ir as ir

        caches = [self._half(angles, heads.size) for angles in (heads.rotation.cos, heads.rotation.sin)]
        inputs = [value, self._integers("rotary_offset", [0]), *caches]
        node = ir.Node(CONTRIB, "RotaryEmbedding", inputs, name=f"{heads.rotation.name}_rotation")
        node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
        self._graph.insert_before(before, node)
        return node.outputs[0]

    def _part(self, heads: Heads) -> ir.Value:
        """A third of the features of a fused matrix's output."""
        import onnx_ir as ir

        if heads.whole not in self._parts:
            across, shape = heads.count * heads.size, heads.whole.shape
            sizes = self._integers(f"attention_parts_{across}", [across] * _PARTS)
            node = ir.node("Split", [heads.whole, sizes], attributes={"axis": -1}, num_outputs=_PARTS)
            for output in node.outputs:
                output.type = heads.whole.type
                output.shape = None if shape is None else ir.Shape([*list(shape)[:2], across])
            self._behind(heads.whole, node)
            self._parts[heads.whole] = list(node.outputs)
        return self._parts[heads.whole][heads.part or 0]

    def _half(self, angles: ir.Value, size: int) -> ir.Value:
        """(sequence, head / 2) of cosines or sines (1, sequence, head)."""
        import onnx_ir as ir

        if angles not in self._halves:
            bounds = [self._integers(f"rotary_{name}", [n]) for name, n in (("begin", 0), (f"end_{size}", size // 2))]
            cut = ir.node("Slice", [angles, *bounds, self._integers("rotary_axis", [2])])
            flat = ir.node("Squeeze", [cut.outputs[0], self._integers("rotary_begin", [0])])
            for output in (cut.outputs[0], flat.outputs[0]):
                output.type = angles.type
            sequence = None if angles.shape is None else angles.shape[1]
            cut.outputs[0].shape = ir.Shape([1, sequence, size // 2])
            flat.outputs[0].shape = ir.Shape([sequence, size // 2])
            self._behind(angles, cut)
            self._graph.insert_after(cut, flat)
            self._halves[angles] = flat.outputs[0]
        return self._halves[angles]

    def _behind(self, value: ir.Value, node: ir.Node) -> None:
        made = value.producer()
        if made is None:
            self._graph.insert_before(self._graph[0], node)
        else:
            self._graph.insert_after(made, node)

    def _integers(self, name: str, values: list[int]) -> ir.Value:
        """A constant of the graph."""
        import onnx_ir as ir

        if name not in self._constants:
            tensor = ir.tensor(np.array(values, np.int64), name=f"nxm_{name}")
            type_ = ir.TensorType(ir.DataType.INT64)
            value = ir.Value(name=tensor.name, const_value=tensor, type=type_, shape=ir.Shape([len(values)]))
            self._graph.register_initializer(value)
            self._constants[name] = value
        return self._constants[name]
