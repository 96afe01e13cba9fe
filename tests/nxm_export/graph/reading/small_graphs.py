"""Small graphs in ONNX text with a dense or a 2:4 constant, and what is read of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from nxm_export.contract.plan import NMPattern
from nxm_export.contract.records.matrix_facts import UnreadProduct
from nxm_export.graph.reading.graph_weights import GraphWeight, graph_products, load_graph

PATTERN = NMPattern(2, 4)
DENSE = np.arange(1, 129, dtype=np.int8).reshape(16, 8)  # (K, N)
SPARSE = DENSE * (np.arange(16) % 4 < 2)[:, None].astype(np.int8)  # 2:4 along K
SQUARE = np.hstack([DENSE, DENSE])
ONE = "float s = {1}"


def held(name: str, array: np.ndarray, kind: str = "int8") -> str:
    """A declaration of an initializer."""
    return f"{kind}[{','.join(map(str, array.shape))}] {name} = {{{','.join(map(str, array.ravel().tolist()))}}}"


def found(text: str, tmp_path: Path, *, more: str = "") -> list[GraphWeight | UnreadProduct]:
    """The products of a graph in ONNX text, written to a file and read again; `more` are local functions."""
    head = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1, "plugin" : 1, "local" : 1]>'
    onnx.save(onnx.parser.parse_model(f"{head}\n{text}\n{more}"), tmp_path / "model.onnx")
    return list(graph_products(load_graph(tmp_path / "model.onnx")))
