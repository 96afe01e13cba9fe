"""Which values of a graph depend on its inputs: on their data, on their shapes alone, or not at all.

An initializer that an input of the same name may override is none of the graph's inputs here: whoever runs the file as
it is multiplies by what lies in it. What only decides *whether* or *how often* something runs (the condition of an If,
the number of rounds of a Loop), how stored integers are scaled, or which part of a tensor is taken, counts as a shape
does: the data that it lets through lie in the file. An index that chooses by the data of an input (Gather) gives
something of the input: embeddings are read so, and nothing tells a table of words from one of weights.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from enum import IntEnum

import onnx_ir as ir


class Dependence(IntEnum):
    """On what a value depends; the larger includes the smaller."""

    NOTHING = 0
    SHAPES = 1
    INPUTS = 2


_RANDOM = ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial")
# The data of these are their first input; the others say how to scale, lay or cut them.
_ONE_DATA_INPUT = (
    "DequantizeLinear", "QuantizeLinear", "Reshape", "Expand", "Tile", "Slice", "Squeeze", "Unsqueeze", "Split", "Pad",
    "Trilu",
)  # fmt: skip
_Edge = tuple[ir.Value, ir.Value, Dependence]  # from, to, and the most that goes along


def dependences(model: ir.Model, *, with_defaults: bool = False) -> dict[int, Dependence]:
    """The dependence of every value that depends on an input at all, by the value's ``id``; `with_defaults` counts
    inputs that have a value in the file, too."""
    edges: dict[int, list[tuple[ir.Value, Dependence]]] = {}
    found: dict[int, Dependence] = {}
    queue: deque[ir.Value] = deque()

    def reach(value: ir.Value, dependence: Dependence) -> None:
        if dependence > found.get(id(value), Dependence.NOTHING):
            found[id(value)] = dependence
            queue.append(value)

    for node in model.graph.all_nodes():
        for start, end, most in _edges(node):
            edges.setdefault(id(start), []).append((end, most))
        for value in [*_unknown_inputs(node), *(node.outputs if node.op_type in _RANDOM else ())]:
            reach(value, Dependence.INPUTS)
    for value in model.graph.inputs:
        if value.const_value is None or with_defaults:
            reach(value, Dependence.INPUTS)
    while queue:
        value = queue.popleft()
        for end, most in edges.get(id(value), []):
            reach(end, min(found[id(value)], most))
    return found


def subgraphs(node: ir.Node) -> list[ir.Graph]:
    """The graphs in a node's attributes."""
    inside: list[ir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH and not attribute.is_ref():
            inside.append(attribute.as_graph())
        elif attribute.type == ir.AttributeType.GRAPHS and not attribute.is_ref():
            inside += attribute.as_graphs()
    return inside


def _edges(node: ir.Node) -> Iterator[_Edge]:
    inside = subgraphs(node)
    if (node.op_type == "If" and inside) or node.op_type in ("Shape", "Size"):
        yield from _all(node.inputs, node.outputs, Dependence.SHAPES)
    elif node.op_type in _ONE_DATA_INPUT:
        yield from _all(node.inputs[:1], node.outputs, Dependence.INPUTS)
        yield from _all(node.inputs[1:], node.outputs, Dependence.SHAPES)
    elif node.op_type == "Loop" and inside:
        yield from _loop(node, inside[0])
    elif node.op_type in ("Scan", "SequenceMap") and inside and len(inside[0].inputs) == len(node.inputs):
        yield from _scan(node, inside[0])
    else:
        yield from _all(node.inputs, node.outputs, Dependence.INPUTS)
    if node.op_type != "Loop":
        for graph in inside:
            yield from _pairs(graph.outputs, node.outputs)


def _loop(node: ir.Node, body: ir.Graph) -> Iterator[_Edge]:
    """Inputs: rounds, condition, carried values. The body has: round, condition, carried; and gives: condition,
    carried, collected."""
    carried = len(node.inputs) - 2
    control = [*node.inputs[:2], *body.outputs[:1]]
    yield from _all(control, [*node.outputs, *body.inputs[:2]], Dependence.SHAPES)
    yield from _pairs(node.inputs[2:], body.inputs[2:])
    yield from _pairs(node.inputs[2:], node.outputs)
    yield from _pairs(body.outputs[1 : 1 + carried], body.inputs[2:])
    yield from _pairs(body.outputs[1:], node.outputs)


def _scan(node: ir.Node, body: ir.Graph) -> Iterator[_Edge]:
    yield from _pairs(node.inputs, body.inputs)
    slices = node.attributes["num_scan_inputs"].as_int() if "num_scan_inputs" in node.attributes else len(node.inputs)
    states = len(node.inputs) - slices
    yield from _pairs(body.outputs[:states], body.inputs)


def _unknown_inputs(node: ir.Node) -> Iterator[ir.Value]:
    """What the inputs of a subgraph stand for is known for ONNX's own operators alone."""
    known = node.op_type in ("If", "Loop") or (
        node.op_type in ("Scan", "SequenceMap")
        and all(len(graph.inputs) == len(node.inputs) for graph in subgraphs(node))
    )
    if not known:
        for graph in subgraphs(node):
            yield from (value for value in graph.inputs if value.const_value is None)


def _all(starts: Sequence[ir.Value | None], ends: Sequence[ir.Value], most: Dependence) -> Iterator[_Edge]:
    for start in starts:
        for end in ends:
            if start is not None:
                yield start, end, most


def _pairs(starts: Sequence[ir.Value | None], ends: Sequence[ir.Value]) -> Iterator[_Edge]:
    for start, end in zip(starts, ends, strict=False):
        if start is not None:
            yield start, end, Dependence.INPUTS
