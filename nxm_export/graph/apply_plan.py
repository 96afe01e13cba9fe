"""A plan goes into a traced graph: folded weights, and a quantize/dequantize pair on every tensor that the plan has in INT8."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from nxm_export.contract.checkpoint import Checkpoint
from nxm_export.contract.families import ROLES, Family
from nxm_export.contract.plan import CompressionPlan
from nxm_export.errors import ExportError

if TYPE_CHECKING:
    from nxm_export.graph.linear_forms import Lowering

SOFTMAX_SCALE = 1.0 / 127.0


def quantize(
    model: Any,
    checkpoint: Checkpoint,
    plan: CompressionPlan,
    family: Family,
    dtype: str,
    lower: Lowering,
    stored: str,
) -> float:
    """Put `plan` into the traced `model`, from the codes and scales of `checkpoint`; weights are `stored` as the target wants.

    Returns the largest relative change of a scale by rounding it to `dtype`. Raises `ExportError` for a scale that does not
    fit `dtype`, and for a graph that computes attention in another way than this function knows.
    """
    from nxm_export.graph.linear_forms import cancel_reshapes
    from nxm_export.graph.qdq import fold_weight_qdq, insert_activation_qdq, linears_of, require_scale, use_name

    rounding = 0.0

    def rounded(scale: np.ndarray | float, name: str) -> np.ndarray:
        nonlocal rounding
        exact = np.asarray(scale, np.float32)
        with np.errstate(over="ignore"):  # an infinite scale is refused by name below
            result = exact.astype(numpy_dtype(dtype))
        require_scale(result, name)
        rounding = max(rounding, float((np.abs(result.astype(np.float32) - exact) / exact).max()))
        return result

    pending_outputs = []
    for block in family.blocks(checkpoint.config):
        names = {role: f"{family.linear(block, role)}.weight" for role in ROLES}
        if plan.residual == "int8":  # before the lowering: the residual reads the same pair
            for role in ("query", "key", "value", "ffn_up"):
                if not plan.weights[names[role]].input_bits:
                    continue
                path = names[role].removesuffix(".weight")
                for use, linear in enumerate(linears_of(model.graph, names[role])):
                    if not _is_dequantized(linear.x):
                        scale = rounded(checkpoint.input_scale(names[role]), f"{path}.input")
                        insert_activation_qdq(model.graph, linear.x, scale, f"{path}.input", use=use)
        inputs: dict[int, Any] = {}  # one pair per tensor, however many layers read it
        for name in (name for name in names.values() if not plan.weights[name].is_dense):
            spec, path = plan.weights[name], name.removesuffix(".weight")
            for use, linear in enumerate(linears_of(model.graph, name)):
                linear.product.name = use_name(path, use)
                linear = lower(linear, name)
                if spec.weight_bits is None:
                    continue
                scale = rounded(checkpoint.weight_scale(name), name)
                fold_weight_qdq(model.graph, linear, name, checkpoint.codes(name), scale, stored=stored)
                if id(linear.x) in inputs:
                    linear.product.replace_input_with(0, inputs[id(linear.x)])
                elif not _is_dequantized(linear.x):
                    scale = rounded(checkpoint.input_scale(name), f"{path}.input")
                    inputs[id(linear.x)] = insert_activation_qdq(
                        model.graph, linear.x, scale, f"{path}.input", [linear.product], use=use
                    )
                if spec.output_bits:
                    pending_outputs.append((linear, name, path, use))
    for linear, name, path, use in pending_outputs:
        scale = rounded(checkpoint.output_scale(name), f"{path}.output")
        insert_activation_qdq(model.graph, linear.output, scale, f"{path}.output", use=use)
    if plan.attention == "int8":
        _quantize_probabilities(model.graph, rounded(SOFTMAX_SCALE, "softmax"), len(family.runs(checkpoint.config)))
    cancel_reshapes(model.graph)
    return rounding


def _is_dequantized(value: Any) -> bool:
    """True behind a pair, also when it was only reshaped since."""
    producer = value.producer()
    while producer is not None and producer.op_type == "Reshape":
        producer = producer.inputs[0].producer()
    return producer is not None and producer.op_type == "DequantizeLinear"


def _quantize_probabilities(graph: Any, scale: np.ndarray, blocks: int) -> None:
    from nxm_export.graph.qdq import insert_activation_qdq

    nodes = [node for node in graph if node.op_type == "Softmax"]
    if len(nodes) != blocks:
        raise ExportError(
            f"the exported graph has {len(nodes)} Softmax nodes for {blocks} runs of encoder blocks; "
            "this transformers version computes attention differently: export with float attention"
        )
    for number, node in enumerate(nodes):
        insert_activation_qdq(graph, node.outputs[0], scale, f"attention.{number}.probabilities")


def numpy_dtype(dtype: str) -> np.dtype:
    """NumPy's type for the name of a graph's float dtype."""
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
