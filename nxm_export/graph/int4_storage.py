"""Weights of 4 bits or fewer, stored as INT4: two codes in a byte.

Runtimes differ in the form that they still multiply in integers, so each target has its own (`GraphTarget.int4`):

* `CAST`, ``INT4 -> Cast(INT8) -> DequantizeLinear``: ONNX Runtime and OpenVINO make INT8 constants of it when they load
  the graph, and run the same products as for weights that are stored as INT8. Without the Cast both multiply floats.
* `DIRECT`, ``INT4 -> DequantizeLinear``: what TensorRT's parsers take; they refuse the Cast. The engine casts the codes
  at every run, so what its products read is no constant, and sparse kernels need constants: a matrix with a pattern
  stays INT8. So do convolutions, which TensorRT-RTX does not build with INT4, and rows of an odd length.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from nxm_export.contract.choices import INT4_BITS, LOWERING
from nxm_export.contract.families import FAMILIES
from nxm_export.contract.plan import CompressionPlan, WeightSpec
from nxm_export.errors import ExportError
from nxm_export.graph.qdq import add_initializer
from nxm_export.graph.reading.graph_weights import array_of

CAST, DIRECT = "cast", "direct"
INT4_OPSET = 21  # it brought INT4 to Cast and DequantizeLinear
_WAY_OUT = "leave --weights-stored int4 out"


def int4_weights(plan: CompressionPlan, form: str | None, lowering: str = LOWERING) -> list[str]:
    """The weights of a graph with this plan that `form` (None: no INT4 at all) can store as INT4."""
    if form is None:
        return []
    return [name for name in _of_4_bits(plan) if form == CAST or _fits_direct(plan.weights[name], plan, name, lowering)]


def require_int4(plan: CompressionPlan | None, form: str | None, lowering: str, target: str) -> list[str]:
    """`int4_weights`, or `ExportError` with the reason where there is none: the option would do nothing."""
    if form is None:
        raise ExportError(f"target {target}: TensorRT 8.6 has no INT4; {_WAY_OUT}, or use target cpu or trt")
    if plan is None or not _of_4_bits(plan):
        raise ExportError(
            f"no weight of this graph is an integer of 4 bits or fewer; {_WAY_OUT}, or compress with --weight-bits 4"
        )
    names = int4_weights(plan, form, lowering)
    if not names:
        raise ExportError(
            f"target {target} keeps INT8 for weights with an N:M pattern, as no TensorRT has shown a sparse kernel for "
            f"INT4, for convolutions and for rows of an odd length, and there are no others of 4 bits; {_WAY_OUT}, or "
            "use target cpu"
        )
    return names


def store_int4(graph: ir.Graph, names: Iterable[str], form: str) -> None:
    """Store these weights, which `nxm_export.graph.qdq.fold_weight_qdq` stored as INT8, as INT4 in a form."""
    import ml_dtypes

    for name in names:
        stored = graph.initializers[f"{name}_quantized"]
        codes = array_of(stored)
        assert codes is not None
        readers = stored.consumers()
        stored.const_value = ir.tensor(codes.astype(ml_dtypes.int4), name=stored.name)
        stored.type = ir.TensorType(ir.DataType.INT4)
        for dequantize in readers:
            if form == CAST:
                cast = ir.node("Cast", [stored], attributes={"to": int(ir.DataType.INT8)}, name=f"{name}_cast")
                cast.outputs[0].name, cast.outputs[0].shape = f"{name}_int8", stored.shape
                cast.outputs[0].type = ir.TensorType(ir.DataType.INT8)
                graph.insert_before(dequantize, cast)
                dequantize.replace_input_with(0, cast.outputs[0])
            else:
                _replace_zero_point(graph, dequantize)


def _replace_zero_point(graph: ir.Graph, dequantize: ir.Node) -> None:
    """Zero points have the type of the codes."""
    import ml_dtypes

    old = dequantize.inputs[2]
    assert old is not None
    assert old.const_value is not None
    size = old.const_value.size
    zero = add_initializer(graph, f"nxm_zero_point_int4_{size}", np.zeros(size, ml_dtypes.int4))
    dequantize.replace_input_with(2, zero)
    if not old.consumers():
        graph.initializers.pop(str(old.name))


def _of_4_bits(plan: CompressionPlan) -> list[str]:
    return [
        name for name, spec in plan.weights.items() if spec.weight_bits is not None and spec.weight_bits <= INT4_BITS
    ]


def _fits_direct(spec: WeightSpec, plan: CompressionPlan, name: str, lowering: str) -> bool:
    out, in_ = plan.shapes[name]
    out //= len(FAMILIES[plan.model_type].parts(name))  # the graph of a target that takes this form has parts
    row = {"matmul": out, "gemm": in_}.get(lowering, 1)  # as `fold_weight_qdq` lays it; a 1x1 kernel's is 1
    return spec.pattern is None and row % 2 == 0
