"""A DequantizeLinear that ONNX Runtime would break at opset 21 is written without its zero point, which is 0 then.

ONNX Runtime (seen in 1.32) moves a pair through what only moves elements, in two steps that do not fit together. Behind
``DequantizeLinear -> Reshape`` it puts another pair, whose QuantizeLinear says ``output_dtype`` INT8, an attribute that
opset 21 brought. Then it makes the zero points of INT8 pairs UINT8, and leaves that attribute as it is. The file does
not load: "output_dtype INT8 does not match y_zero_point type UINT8" (microsoft/onnxruntime issue 25526 is the second
half). A pair of which one half states no zero point stays INT8, and so does the one that is made of it.
"""

from __future__ import annotations

import onnx_ir as ir

_MOVED_THROUGH = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "MaxPool")


def imply_zero_points(graph: ir.Graph) -> int:
    """Leave the zero point 0 out where an activation is moved behind its DequantizeLinear; returns how many."""
    count = 0
    for restored in [node for node in graph if node.op_type == "DequantizeLinear" and len(node.inputs) == 3]:
        quantizer = None if restored.inputs[0] is None else restored.inputs[0].producer()
        moved = any(user.op_type in _MOVED_THROUGH for user in restored.outputs[0].consumers())
        if moved and quantizer is not None and quantizer.op_type == "QuantizeLinear":
            restored.resize_inputs(2)
            count += 1
    return count
