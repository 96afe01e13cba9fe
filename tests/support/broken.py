"""Engines broken on purpose: one edit of a healthy engine's graph, and a passport that vouches for the result."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir

from nxm_export.graph.reading.graph_weights import load_graph, save_graph
from nxm_export.storage.hashing import file_hash

BLOCK = "bert.encoder.layer.1"


def write_engine(healthy: Path, out: Path, edit: Callable[[ir.Model], None]) -> Path:
    """A copy of the engine `healthy` with its graph changed by `edit`."""
    shutil.copytree(healthy, out)
    model = load_graph(out / "model.onnx")
    edit(model)
    save_graph(model, out / "model.onnx")
    passport = json.loads((out / "passport.json").read_text())
    passport["engine_sha256"] = file_hash(out / "model.onnx")
    (out / "passport.json").write_text(json.dumps(passport))
    return out


def _change(model: ir.Model, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    value = model.graph.initializers[name]
    assert value.const_value is not None
    array = np.ascontiguousarray(change(value.const_value.numpy()))
    value.const_value = ir.tensor(array, dtype=value.const_value.dtype, name=name)


def scale_doubled(model: ir.Model) -> None:
    """The input scale of one matrix, on both sides of the pair: it clips half as early and rounds twice as coarsely."""
    _change(model, f"{BLOCK}.output.dense.input_scale", lambda scale: scale * scale.dtype.type(2))


def matrix_transposed(model: ir.Model) -> None:
    """A square matrix the wrong way round, which no shape reveals."""
    _change(model, f"{BLOCK}.attention.self.value.weight_quantized", lambda codes: codes.T)


def pair_dropped(model: ir.Model) -> None:
    """The pair in front of the FFN's second product."""
    drop_pair(model, f"{BLOCK}.output.dense.input_quantize", f"{BLOCK}.output.dense")


def drop_pair(model: ir.Model, quantizer: str, name: str) -> None:
    """The product of this name reads what it would have read without the quantizer of that name in front of it."""
    nodes = {node.name: node for node in model.graph}
    x = nodes[quantizer].inputs[0]
    product = nodes[name]
    codes, scale, bias = product.inputs[1], product.inputs[3], product.inputs[6]
    weight = ir.node("DequantizeLinear", [codes, scale], attributes={"axis": 1})
    in_float = ir.node("MatMul", [x, weight.outputs[0]])
    with_bias = ir.node("Add", [in_float.outputs[0], bias])
    model.graph.insert_before(product, [weight, in_float, with_bias])
    for user, index in list(product.outputs[0].uses()):
        user.replace_input_with(index, with_bias.outputs[0])


def overflowing(model: ir.Model) -> None:
    """LayerNorm's weight as large as float16 goes: what it multiplies by more than 1 is infinite in a float16 graph.

    It is the last block's, whose output no quantizer reads: one would clip the infinities away.
    """
    _change(model, f"{BLOCK}.output.LayerNorm.weight", lambda weight: np.full_like(weight, 65504))


BROKEN = {"scale doubled": scale_doubled, "matrix transposed": matrix_transposed, "pair dropped": pair_dropped}
