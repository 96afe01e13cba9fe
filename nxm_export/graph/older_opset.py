"""A traced graph for parsers of an older opset than the tracer writes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from nxm_export.errors import ExportError
from nxm_export.graph.qdq import add_initializer


def lower_opset(model: ir.Model, opset: int) -> None:
    """Write the graph for an opset below 18, where every operator of it meant the same; else `ExportError`."""
    import onnx.defs

    _write_whole_shapes(model.graph)
    now = model.opset_imports[""]
    for node in model.graph:
        if node.op_type == "Split" and _split_into_equal_parts(node):
            continue
        try:
            old = onnx.defs.get_schema(node.op_type, opset, "").since_version
        except onnx.defs.SchemaError:
            old = None
        if old != onnx.defs.get_schema(node.op_type, now, "").since_version:
            raise ExportError(
                f"{node.op_type} means another thing in opset {opset} than in {now}, so this model cannot be written "
                "for it; "
                "use another target"
            )
    model.opset_imports[""] = opset
    model.ir_version = 8  # of the onnx release that brought opset 17: readers of that time refuse newer ones


def _write_whole_shapes(graph: ir.Graph) -> None:
    """Write every Shape with `start` or `end` as Shape and Gather: the parser of TensorRT 8 and 9 ignores both, and
    gives all sizes."""
    for node in [node for node in graph if node.op_type == "Shape" and node.attributes]:
        value, output = node.inputs[0], node.outputs[0]
        if value is None or value.shape is None:
            raise ExportError(f"{node.name}: the rank of what it measures is not known; use another target")
        start, end = (node.attributes[key].as_int() if key in node.attributes else None for key in ("start", "end"))
        axes = np.arange(len(value.shape), dtype=np.int64)[start:end]
        whole = ir.node("Shape", [value], name=node.name)
        whole.outputs[0].name = f"{output.name}_all"
        kept = add_initializer(graph, f"{output.name}_axes", axes)
        picked = ir.node("Gather", [whole.outputs[0], kept], attributes={"axis": 0}, name=f"{node.name}_pick")
        ir.convenience.replace_nodes_and_values(graph, node, [node], [whole, picked], [output], picked.outputs)


def _split_into_equal_parts(node: ir.Node) -> bool:
    """True where a Split says the sizes of its parts, or they are equal. The number of parts, which opset 18 brought,
    is then left out, and it means the same in opset 13."""
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        return True
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    shape = None if node.inputs[0] is None else node.inputs[0].shape
    size = None if shape is None else shape[axis]
    if not isinstance(size, int) or size % len(node.outputs):
        return False
    node.attributes.pop("num_outputs", None)
    return True
