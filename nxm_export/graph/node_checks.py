"""Nodes that no runtime can run: inputs, outputs or attributes that are missing, too many, or of a wrong type.

Whoever walks a graph later may rely on what is checked here. ONNX's own checker refuses more, among it files that every
runtime takes, so it is not asked.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import onnx_ir as ir

if TYPE_CHECKING:
    import onnx

_QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
_TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype")


def first_malformed(model: ir.Model) -> str | None:
    """What is wrong with the first malformed node of a graph and its subgraphs, or None. Operators that the installed
    ONNX does not know are not looked at."""
    for node in model.graph.all_nodes():
        domain = "" if node.domain == "ai.onnx" else node.domain
        wrong = _wrong(node, domain, model.opset_imports.get(domain, model.opset_imports.get(node.domain)))
        if wrong is not None:
            return f"node {node.name or node.op_type} ({node.op_type}) {wrong}"
    return None


def _wrong(node: ir.Node, domain: str, version: int | None) -> str | None:
    schema = _schema(node.op_type, domain, version)
    if schema is None and node.op_type in _QUANTIZERS:  # of another domain, with the same inputs
        schema = _schema(node.op_type, "", None)
    if schema is None:
        return None
    missing = _missing_input(node, schema)
    if missing is not None:
        return missing
    if len(node.outputs) < schema.min_output:
        return f"has {len(node.outputs)} outputs, and needs {schema.min_output}"
    if len(node.outputs) > schema.max_output:
        return f"has {len(node.outputs)} outputs, and its operator has {schema.max_output}"
    newest = _schema(node.op_type, domain, None) or schema
    for name, attribute in node.attributes.items():
        declared = schema.attributes.get(name) or newest.attributes.get(name)
        if declared is None or attribute.is_ref():
            continue
        kind = _kinds().get(declared.type, attribute.type)
        if attribute.type != kind:
            return f"has an attribute {name} of type {attribute.type.name}, and it must be {kind.name}"
        if name in _TYPE_ATTRIBUTES and attribute.type == ir.AttributeType.INT and not _is_type(attribute.as_int()):
            return f"names the type {attribute.as_int()}, which ONNX does not have"
    lacking = [name for name, known in schema.attributes.items() if known.required and name not in node.attributes]
    if lacking:
        return f"has no attribute {lacking[0]}"
    if node.op_type == "Constant" and not domain and len(node.attributes) != 1:
        return f"has {len(node.attributes)} attributes, and a constant is one"
    return None


@cache
def _kinds() -> dict[object, ir.AttributeType]:
    """The types of attributes by what a schema calls them."""
    import onnx

    theirs = onnx.defs.OpSchema.AttrType
    return {getattr(theirs, kind.name): kind for kind in ir.AttributeType if hasattr(theirs, kind.name)}


def _schema(operator: str, domain: str, version: int | None) -> onnx.defs.OpSchema | None:
    import onnx

    try:
        if version is None:
            return onnx.defs.get_schema(operator, domain)
        return onnx.defs.get_schema(operator, version, domain)
    except onnx.defs.SchemaError:
        return None


def _missing_input(node: ir.Node, schema: onnx.defs.OpSchema) -> str | None:
    import onnx

    for at, formal in enumerate(schema.inputs):
        given = at < len(node.inputs) and node.inputs[at] is not None
        if formal.option == onnx.defs.OpSchema.FormalParameterOption.Single and not given:
            return f"has no input {formal.name}"
    if len(node.inputs) < schema.min_input:
        return f"has {len(node.inputs)} inputs, and needs {schema.min_input}"
    return None


def _is_type(number: int) -> bool:
    try:
        ir.DataType(number)
    except ValueError:
        return False
    return True
