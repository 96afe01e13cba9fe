"""Checks on an ONNX file alone, whoever made it: N:M along K on the stored integers, scales, zero points, pairs.

Needs no checkpoint and runs nothing. Problems that make a runtime refuse the graph, run it slowly or compute something
else are reported per weight and per graph; `GraphReport.require` turns them into an `ExportError`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from nxm_export.errors import ExportError
from nxm_export.plan import CompressionPlan, NMPattern
from nxm_export.weights import GraphWeight, graph_weights, load_graph, parameter_of


@dataclass(frozen=True)
class WeightReport:
    """One weight matrix. `pattern` is the tightest well-known N:M that the stored values follow along K."""

    name: str
    op: str
    k: int
    n: int
    stored: str
    scale_axis: str | None
    zeros: float
    pattern: str | None
    planned: str | None
    problems: tuple[str, ...]


@dataclass(frozen=True)
class GraphReport:
    """All weights and the problems of the graph as a whole."""

    file: str
    weights: list[WeightReport]
    problems: list[str] = field(default_factory=list)
    quantize_nodes: int = 0
    dequantize_nodes: int = 0

    @property
    def passed(self) -> bool:
        """True when nothing is wrong."""
        return not self.problems and not any(weight.problems for weight in self.weights)

    def require(self) -> None:
        """Raise `ExportError` naming the first problem, unless `passed`."""
        found = [f"{weight.name}: {problem}" for weight in self.weights for problem in weight.problems] + self.problems
        if found:
            more = f" (and {len(found) - 1} more: `nxm verify {self.file}`)" if len(found) > 1 else ""
            raise ExportError(f"{self.file}: {found[0]}{more}")

    def to_dict(self) -> dict[str, Any]:
        """The form of ``verify.json`` and ``--json``."""
        return {"schema": "nxm-verify/1", "passed": self.passed, **asdict(self)}


def verify(file: str | Path, *, plan: CompressionPlan | None = None, pattern: NMPattern | None = None) -> GraphReport:
    """Check an ONNX file. The plan inside the file, or `plan`, says what each weight must follow; `pattern` says it for
    every quantized weight of a file without plan. Raises `ArtifactError` when the file cannot be read.
    """
    model = load_graph(file)
    plan = plan or embedded_plan(model, str(file))
    found = list(graph_weights(model))
    rows = [_check_weight(weight, plan, pattern) for weight in found]
    problems = _check_pairs(model)
    if plan:
        present = {row.name for row in rows}
        missing = [name for name, spec in plan.weights.items() if not spec.is_dense and name not in present]
        problems += [f"{name} is planned and not in the graph under its name" for name in missing]
    count = {kind: sum(node.op_type == kind for node in model.graph) for kind in ("QuantizeLinear", "DequantizeLinear")}
    return GraphReport(str(file), rows, problems, count["QuantizeLinear"], count["DequantizeLinear"])


def embedded_plan(model: ir.Model, source: str) -> CompressionPlan | None:
    """The plan that our exporter put into the file's metadata, if any."""
    text = model.metadata_props.get("nxm.plan")
    return CompressionPlan.from_json(text, source=f"{source} (metadata)") if text else None


def _check_weight(weight: GraphWeight, plan: CompressionPlan | None, pattern: NMPattern | None) -> WeightReport:
    name = parameter_of(weight.name)
    spec = plan.weights.get(name) if plan else None
    wanted = spec.pattern if spec else pattern if weight.is_quantized else None
    problems = []
    if wanted and not weight.follows(wanted):
        groups = weight.k * weight.n // wanted.m
        problems.append(
            f"not {wanted} along K: {weight.violations(wanted)} of {groups} groups keep more than {wanted.n}"
        )
    if spec and spec.qmax is not None and not weight.is_quantized:
        problems.append(f"planned {spec}, and stored as {weight.stored}")
    if (
        spec
        and spec.qmax is not None
        and weight.is_quantized
        and np.abs(weight.matrix.astype(np.int16)).max(initial=0) > spec.qmax
    ):
        problems.append(f"a code exceeds {spec.qmax}, the planned {spec.weight_bits} bits")
    problems += _check_scale(weight)
    return WeightReport(
        name=name,
        op=weight.node.op_type,
        k=weight.k,
        n=weight.n,
        stored=weight.stored,
        scale_axis=weight.scale_axis,
        zeros=round(1.0 - float(weight.kept().mean()), 4),
        pattern=str(weight.pattern() or "") or None,
        planned=str(spec) if spec else None,
        problems=tuple(problems),
    )


def _check_scale(weight: GraphWeight) -> list[str]:
    problems = []
    if weight.scale_axis == "K":
        problems.append(
            "its scales lie along K, the reduced axis: no integer kernel can apply them, and TensorRT silently runs the product in float"
        )
    if weight.scale is not None:
        scale = weight.scale.astype(np.float64)
        if not np.isfinite(scale).all() or (scale <= 0).any():
            problems.append("a scale is not a positive number")
        if weight.scale_axis == "N" and scale.size != weight.n:
            problems.append(f"{scale.size} scales for {weight.n} output channels")
    if weight.zero_point is not None and np.any(weight.zero_point):
        problems.append("its zero point is not 0, and TensorRT refuses asymmetric weights")
    return problems


def _check_pairs(model: ir.Model) -> list[str]:
    """Activation pairs: Q feeds DQ and nothing else, per tensor, zero point 0, positive constant scale."""
    problems = []
    for node in model.graph:
        if node.op_type == "QuantizeLinear":
            others = [user.op_type for user in node.outputs[0].consumers() if user.op_type not in _READS_CODES]
            if not node.outputs[0].consumers() or others:
                problems.append(
                    f"{node.name}: quantizes into {', '.join(others) or 'nothing'}; an orphan without DequantizeLinear"
                )
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or _on_weight(node):
            continue
        if node.op_type == "DequantizeLinear" and not _from_codes(node.inputs[0]):
            problems.append(f"{node.name}: dequantizes what nothing quantized")
        scale, zero = (_array(value) for value in _operands(node))
        if scale is None:
            problems.append(
                f"{node.name}: its scale is not a constant: dynamic quantization, which TensorRT does not take"
            )
        elif scale.size != 1:
            problems.append(
                f"{node.name}: {scale.size} scales on an activation; only one per tensor can run in integers"
            )
        elif not np.isfinite(float(scale.reshape(-1)[0])) or float(scale.reshape(-1)[0]) <= 0:
            problems.append(f"{node.name}: its scale is not a positive number")
        if zero is not None and np.any(zero):
            problems.append(
                f"{node.name}: zero point {int(zero.reshape(-1)[0])} is not 0, and TensorRT refuses asymmetric activations"
            )
    return problems


_READS_CODES = (
    "DequantizeLinear",
    "QLinearMatMul",
    "QLinearConv",
    "QGemm",
    "MatMulInteger",
    "ConvInteger",
    "MatMulIntegerToFloat",
    "QAttention",
    "Reshape",
    "Transpose",
    "Gather",
)


def _operands(node: ir.Node) -> tuple[ir.Value | None, ir.Value | None]:
    return node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None


def _array(value: ir.Value | None) -> np.ndarray | None:
    if value is None:
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def _on_weight(node: ir.Node) -> bool:
    """True for a pair on a constant."""
    value = node.inputs[0]
    while value is not None and value.const_value is None:
        producer = value.producer()
        if producer is None or producer.op_type not in (
            "QuantizeLinear",
            "Transpose",
            "Reshape",
            "Identity",
            "Cast",
            "Constant",
        ):
            return False
        if producer.op_type == "Constant":
            return True
        value = producer.inputs[0]
    return value is not None


def _from_codes(value: ir.Value | None) -> bool:
    """True when the value comes from a node that writes integers (or is an input of the graph)."""
    while value is not None:
        producer = value.producer()
        if producer is None:
            return True
        if producer.op_type in ("Reshape", "Transpose", "Gather", "Identity", "Squeeze", "Unsqueeze"):
            value = producer.inputs[0]
            continue
        return producer.op_type.startswith(("Quantize", "QLinear", "QGemm", "DynamicQuantize"))
    return False
