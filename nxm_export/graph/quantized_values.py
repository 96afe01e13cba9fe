"""What surrounds a product: in what type its input was quantized, and in what type its output leaves.

A quantizer need not touch the product: nodes that only move elements may stand between, and behind it bias and
activation, which every kernel does on the way out.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from nxm_export.graph.linear_forms import ELEMENTWISE
from nxm_export.graph.reading.graph_weights import array_of

MOVES = ("Identity", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten")
_PARTS = ("Slice", "Gather", "Split", "Concat")  # these move codes, too, and change which ones
_FLOATS = {"FLOAT": "float32", "FLOAT16": "float16", "BFLOAT16": "bfloat16"}


def values_behind(value: ir.Value | None, through: tuple[str, ...]) -> Iterator[ir.Value]:
    """A value, then the ones that it is made of by the first input of nodes of these operators; a malformed graph may
    hold a circle, which is gone round once."""
    seen: set[int] = set()
    while value is not None and id(value) not in seen:
        seen.add(id(value))
        yield value
        node = value.producer()
        value = node.inputs[0] if node is not None and node.op_type in through and node.inputs else None


def codes_type(value: ir.Value | None) -> str | None:
    """ONNX's name of the element type of a value (``INT8``), where the graph says it; for a QuantizeLinear the type
    that ONNX means by its zero point, its ``output_dtype``, or the absence of both (UINT8)."""
    quantizer = quantizer_behind(value)
    return _declared_type(value) or (None if quantizer is None else _quantized_type(quantizer))


def _declared_type(value: ir.Value | None) -> str | None:
    """The element type of a value that the file itself or a Cast states."""
    for moved in values_behind(value, (*MOVES, *_PARTS)):
        if moved.dtype is not None:
            return moved.dtype.name
        tensor, node = ir.convenience.get_const_tensor(moved), moved.producer()
        if tensor is not None:
            return tensor.dtype.name
        if node is not None and node.op_type == "Cast" and "to" in node.attributes:
            return ir.DataType(node.attributes["to"].as_int()).name
    return None


def quantizer_behind(value: ir.Value | None) -> ir.Node | None:
    """The QuantizeLinear whose codes a value is, behind nodes that only move them."""
    return _made_by("QuantizeLinear", value, (*MOVES, *_PARTS))


def input_codes(value: ir.Value | None) -> str | None:
    """The type of the codes (``INT8``) that a product's input is dequantized from; None for a float input."""
    node = _made_by("DequantizeLinear", value, MOVES)
    return None if node is None else codes_type(node.inputs[0])


def _made_by(op: str, value: ir.Value | None, through: tuple[str, ...]) -> ir.Node | None:
    """The node of this operator that makes a value, behind nodes that only move it."""
    nodes = [moved.producer() for moved in values_behind(value, through)]
    return nodes[-1] if nodes and nodes[-1] is not None and nodes[-1].op_type == op else None


def reads_an_input(value: ir.Value | None) -> bool:
    """True when a value depends on an input of its graph that no initializer stands in for."""
    seen: set[int] = set()
    stack = [value]
    while stack:
        value = stack.pop()
        if value is None or id(value) in seen:
            continue
        seen.add(id(value))
        node = value.producer()
        if node is not None:
            stack += node.inputs
        elif value.const_value is None:
            return True
    return False


def output_type(node: ir.Node) -> tuple[str, str]:
    """(type that leaves a product behind bias and activation, which activation): ``int8`` when everything that leaves
    is read through 8-bit quantizers of one scale, and no float of it is an output of the graph."""
    inside, ends, used = _region(node)
    epilogue = "none"
    if "Relu" in used:
        epilogue = "relu"
    elif "Tanh" in used or any(_is_tanh(user) for value in inside for user in value.consumers()):
        epilogue = "gelu_tanh"
    elif "Erf" in used or "Gelu" in used:
        epilogue = "gelu_erf"
    seen = any(value.is_graph_output() for value in inside)
    if ends and not seen and _quantize_alike(ends):
        return "int8", epilogue
    if node.op_type.startswith("QLinear"):
        return (codes_type(node.outputs[0]) or "int8").lower(), epilogue
    dtype = node.outputs[0].dtype
    return _FLOATS.get(dtype.name, dtype.name.lower()) if dtype is not None else "float", epilogue


def _region(node: ir.Node) -> tuple[list[ir.Value], list[ir.Node], set[str]]:
    """What a kernel does on the way out: its values, the nodes that read them from outside, and its operators."""
    region: list[ir.Node] = []
    inside = list(node.outputs[:1])
    grown = True
    while grown:  # a decomposed GELU reads the product twice: go on until nothing more belongs to it
        grown = False
        for user in [user for value in inside for user in value.consumers()]:
            if user in region or not (user.op_type in MOVES or user.op_type in ELEMENTWISE):
                continue
            known = [read is None or read in inside or not reads_an_input(read) for read in user.inputs]
            if all(known) or (user.op_type in MOVES and known[0]):
                region.append(user)
                inside += user.outputs
                grown = True
    ends = [user for value in inside for user in value.consumers() if user not in region]
    return inside, ends, {user.op_type for user in region}


def _quantize_alike(ends: list[ir.Node]) -> bool:
    if any(end.op_type != "QuantizeLinear" or _quantized_type(end) not in ("INT8", "UINT8") for end in ends):
        return False
    scales = [array_of(end.inputs[1]) for end in ends]
    first = scales[0]
    return first is not None and all(scale is not None and np.array_equal(first, scale) for scale in scales)


def _quantized_type(node: ir.Node) -> str:
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    given = node.attributes["output_dtype"].as_int() if "output_dtype" in node.attributes else 0
    return _declared_type(zero) or (ir.DataType(given).name if given else "UINT8")


def _is_tanh(node: ir.Node) -> bool:
    return (
        node.op_type == "Gelu"
        and "approximate" in node.attributes
        and node.attributes["approximate"].as_string() == "tanh"
    )
