"""Nodes that no runtime could run: too few inputs or outputs, attributes of another type, element types that there are
none of. Everything behind `load_graph` may count on what is checked here."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING

import onnx_ir as ir

if TYPE_CHECKING:
    import onnx.defs

_ELEMENT_TYPES = ("to", "output_dtype", "dtype")  # attributes that hold the number of an element type
# Attributes that products of ONNX Runtime share with ONNX's, and those that a node of ONNX may have where none belongs.
_SHARED = dict.fromkeys(("transA", "transB", "transBatchA", "transBatchB"), "INT")
_GUESSED = {
    **dict.fromkeys(("axis", "group", "block_size", "output_dtype", "to", "start", "end"), "INT"),
    "perm": "INTS",
}
# What is looked at under whatever domain it stands, as TensorRT does.
_READ_BY_NAME = (
    *("QuantizeLinear", "DequantizeLinear", "Cast", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Shape", "Gelu"),
    *("MatMul", "Gemm", "Conv"),
)
_KNOWN_TYPES = frozenset(int(kind) for kind in ir.DataType)


def malformed_nodes(model: ir.Model) -> Iterator[str]:
    """What is wrong with each malformed node of ONNX's own operators, as ``NODE (OPERATOR) WHAT``."""
    opset = model.opset_imports.get("", 1)
    for node in model.graph.all_nodes():
        own = node.domain in ("", "ai.onnx") or node.op_type in _READ_BY_NAME
        for problem in (*(_problems(node, opset) if own else ()), *_odd_attributes(node, own)):
            yield f"{node.name or 'a node without name'} ({node.op_type}) {problem}"


@cache
def _schema(op: str, opset: int) -> onnx.defs.OpSchema | None:
    """ONNX's definition of an operator in this version, or in its newest where it came later; None for others."""
    import onnx.defs

    if not onnx.defs.has(op):
        return None
    try:
        return onnx.defs.get_schema(op, opset, "")
    except onnx.defs.SchemaError:
        return onnx.defs.get_schema(op)


@cache
def _attribute_types() -> dict[str, dict[str, str]]:
    """The attributes that each operator has in any version, with the names of their types; the newest counts."""
    import onnx.defs

    types: dict[str, dict[str, str]] = {}
    for schema in sorted(onnx.defs.get_all_schemas_with_history(), key=lambda schema: schema.since_version):
        if not schema.domain:
            known = types.setdefault(schema.name, {})
            known |= {name: str(attribute.type).rpartition(".")[2] for name, attribute in schema.attributes.items()}
    return types


def _odd_attributes(node: ir.Node, own: bool) -> Iterator[str]:
    """Attributes of another type than ONNX gives them; of the operators of others, those that they share with ONNX."""
    types = _attribute_types().get(node.op_type, {}) if own else {}
    for name, attribute in node.attributes.items():
        expected = types.get(name) or _SHARED.get(name) or (_GUESSED.get(name) if own else None)
        if attribute.is_ref() or expected is None:
            continue
        if attribute.type.name != expected:
            yield f"has {name} of type {attribute.type.name}, which is {expected}"
        elif own and name in _ELEMENT_TYPES and attribute.as_int() not in _KNOWN_TYPES:
            yield f"has {name} {attribute.as_int()}, and there is no such element type"


def _problems(node: ir.Node, opset: int) -> Iterator[str]:
    schema = _schema(node.op_type, opset)
    if schema is None:
        return
    if len(node.inputs) < schema.min_input:
        yield f"has {len(node.inputs)} inputs and needs {schema.min_input}"
    single = type(schema).FormalParameterOption.Single
    for formal, given in zip(schema.inputs, node.inputs, strict=False):
        if given is None and formal.option == single:
            yield f"has no input {formal.name}"
    if len(node.outputs) > schema.max_output:
        yield f"has {len(node.outputs)} outputs, and its operator has {schema.max_output}"
    if len(node.outputs) < schema.min_output:
        yield f"has {len(node.outputs)} outputs and needs {schema.min_output}"
    for name, attribute in schema.attributes.items():
        if attribute.required and name not in node.attributes:
            yield f"has no attribute {name}"
    if node.op_type == "Constant" and (
        len(node.attributes) != 1 or not schema.attributes.keys() & node.attributes.keys()
    ):
        yield f"has the attributes {', '.join(node.attributes) or 'none'} and needs its value alone"
