"""Nodes that no runtime could run: too few inputs or outputs, attributes that are missing or of another type, element
types that there are none of. Everything behind `load_graph` may count on what is checked here. ONNX's own checker
refuses more, among it files that every runtime takes, so it is not asked."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING

import onnx_ir as ir

if TYPE_CHECKING:
    import onnx.defs

_ELEMENT_TYPES = ("to", "output_dtype", "dtype")  # attributes that hold the number of an element type
_QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
_NEWEST = -1  # in place of a version
_KNOWN_TYPES = frozenset(int(kind) for kind in ir.DataType)


def malformed_nodes(model: ir.Model) -> Iterator[str]:
    """What is wrong with each malformed node of an operator that ONNX knows, as ``NODE (OPERATOR) WHAT``. The
    quantizers of other domains have the same inputs."""
    for node in model.graph.all_nodes():
        domain = "" if node.domain == "ai.onnx" else node.domain
        version = model.opset_imports.get(domain, model.opset_imports.get(node.domain, 1))
        if node.op_type in _QUANTIZERS and domain:
            domain, version = "", _NEWEST
        for problem in _problems(node, domain, version):
            yield f"{node.name or 'a node without name'} ({node.op_type}) {problem}"


@cache
def _schema(operator: str, domain: str, version: int) -> onnx.defs.OpSchema | None:
    """What ONNX says of an operator; None for one that it does not know in this version."""
    import onnx.defs

    try:
        if version == _NEWEST:
            return onnx.defs.get_schema(operator, domain)
        return onnx.defs.get_schema(operator, version, domain)
    except onnx.defs.SchemaError:
        return None


@cache
def _kinds() -> dict[object, ir.AttributeType]:
    """The types of attributes by what a schema calls them."""
    import onnx.defs

    theirs = onnx.defs.OpSchema.AttrType
    return {getattr(theirs, kind.name): kind for kind in ir.AttributeType if hasattr(theirs, kind.name)}


def _problems(node: ir.Node, domain: str, version: int) -> Iterator[str]:
    schema, newest = _schema(node.op_type, domain, version), _schema(node.op_type, domain, _NEWEST)
    if schema is not None:
        yield from _counts(node, schema)
        lacking = [name for name, known in schema.attributes.items() if known.required and name not in node.attributes]
        yield from (f"has no attribute {name}" for name in lacking)
    if node.op_type == "Constant" and not domain and len(node.attributes) != 1:
        yield f"has {len(node.attributes)} attributes, and a constant is one"
    for name, attribute in node.attributes.items():
        declared = [
            known.attributes[name] for known in (schema, newest) if known is not None and name in known.attributes
        ]
        if attribute.is_ref() or not declared:
            continue
        kind = _kinds().get(declared[0].type, attribute.type)
        if attribute.type != kind:
            yield f"has {name} of type {attribute.type.name}, which is {kind.name}"
        elif name in _ELEMENT_TYPES and attribute.as_int() not in _KNOWN_TYPES:
            yield f"has {name} {attribute.as_int()}, and there is no such element type"


def _counts(node: ir.Node, schema: onnx.defs.OpSchema) -> Iterator[str]:
    import onnx.defs

    if len(node.inputs) < schema.min_input:
        yield f"has {len(node.inputs)} inputs and needs {schema.min_input}"
    if not schema.min_output <= len(node.outputs) <= schema.max_output:
        yield f"has {len(node.outputs)} outputs and needs {schema.min_output} to {schema.max_output}"
    single = onnx.defs.OpSchema.FormalParameterOption.Single
    for formal, value in zip(schema.inputs, node.inputs, strict=False):
        if formal.option == single and value is None:
            yield f"has no input {formal.name}"
