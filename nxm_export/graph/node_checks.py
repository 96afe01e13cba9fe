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
_KNOWN_TYPES = frozenset(int(kind) for kind in ir.DataType)


def malformed_nodes(model: ir.Model) -> Iterator[str]:
    """What is wrong with each malformed node of ONNX's own operators, as ``NODE (OPERATOR) WHAT``."""
    opset = model.opset_imports.get("", 1)
    for node in model.graph.all_nodes():
        if node.domain in ("", "ai.onnx"):
            for problem in _problems(node, opset):
                yield f"{node.name or 'a node without name'} ({node.op_type}) {problem}"


@cache
def _schema(op: str, opset: int) -> onnx.defs.OpSchema | None:
    """What ONNX says of an operator; None for one that it does not know in this version."""
    import onnx.defs

    try:
        return onnx.defs.get_schema(op, opset, "")
    except onnx.defs.SchemaError:
        return None


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


def _problems(node: ir.Node, opset: int) -> Iterator[str]:
    schema = _schema(node.op_type, opset)
    if schema is not None and len(node.inputs) < schema.min_input:
        yield f"has {len(node.inputs)} inputs and needs {schema.min_input}"
    if schema is not None and len(node.outputs) < schema.min_output:
        yield f"has {len(node.outputs)} outputs and needs {schema.min_output}"
    types = _attribute_types().get(node.op_type, {})
    for name, attribute in node.attributes.items():
        if attribute.is_ref() or name not in types:
            continue
        if attribute.type.name != types[name]:
            yield f"has {name} of type {attribute.type.name}, which is {types[name]}"
        elif name in _ELEMENT_TYPES and attribute.as_int() not in _KNOWN_TYPES:
            yield f"has {name} {attribute.as_int()}, and there is no such element type"
