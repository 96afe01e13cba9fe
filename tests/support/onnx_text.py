"""Graphs as ONNX text, written by the test that needs them, and run by ONNX Runtime as they stand."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir


def model(text: str, *, opset: int = 21) -> ir.Model:
    """The model of a graph in ONNX text; ``com.microsoft`` is imported, too."""
    head = f'<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1]>\n'
    return ir.from_onnx_text(head + textwrap.dedent(text))


def save(graph: ir.Model | str, file: Path, *, opset: int = 21) -> Path:
    """Write a model, or the model of a text, to `file` and return it."""
    ir.save(model(graph, opset=opset) if isinstance(graph, str) else graph, file)
    return file


def run(graph: ir.Model | Path, feeds: Mapping[str, np.ndarray], *, optimize: bool = False) -> dict[str, np.ndarray]:
    """Outputs of ONNX Runtime on the CPU; without `optimize`, every node runs as it is written."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    source = str(graph) if isinstance(graph, Path) else ir.to_proto(graph).SerializeToString()
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))
