"""What the rewrites of a graph ask of its nodes: who made a value, who reads it, and what a constant holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx_ir as ir


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The array of a constant value, None for others."""
    return None if value is None or value.const_value is None else value.const_value.numpy()


def scalar(value: ir.Value | None) -> float | None:
    """The number of a constant of one element, None for others."""
    array = constant(value)
    return float(array.reshape(-1)[0]) if array is not None and array.size == 1 else None


def integers(node: ir.Node, index: int) -> list[int] | None:
    """The integers of an input of a node that is a constant, None for others and for a missing one."""
    array = constant(node.inputs[index]) if len(node.inputs) > index else None
    return None if array is None else [int(number) for number in array.reshape(-1)]


def producer(value: ir.Value | None, op: str) -> ir.Node | None:
    """The node of type `op` that made `value`."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op else None


def only(value: ir.Value | None, op: str) -> ir.Node | None:
    """The node of type `op` that made `value`, where nothing else reads it."""
    alone = value is not None and len(value.consumers()) == 1 and not value.is_graph_output()
    return producer(value, op) if alone else None


def reader(value: ir.Value, op: str) -> ir.Node | None:
    """The one node that reads `value`, where it is of type `op`."""
    users = value.consumers()
    return users[0] if len(users) == 1 and users[0].op_type == op and not value.is_graph_output() else None


def perm(node: ir.Node) -> tuple[int, ...]:
    """The permutation of a Transpose; empty where it names none."""
    return tuple(node.attributes["perm"].as_ints()) if "perm" in node.attributes else ()


def axis(node: ir.Node, default: int) -> int:
    """The ``axis`` of a node, or what it is where the node does not say."""
    return node.attributes["axis"].as_int() if "axis" in node.attributes else default


def same_size(one: ir.SymbolicDim | int, other: ir.SymbolicDim | int) -> bool:
    """True for two sizes that are known to be equal: the same number, or the same name."""
    return one == other and (isinstance(one, int) or one.value is not None)
