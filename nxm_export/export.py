"""A checkpoint directory becomes ``model.onnx``: trace, restore meaning by name, put in the quantizers, tidy, verify.

Targets (`TARGETS`): ``cpu`` is a float32 graph at opset 20, ``trt`` a float16 (or bfloat16) one at opset 21 for strongly
typed TensorRT. Both hold symmetric INT8 pairs with zero point 0. A directory without a plan gives the float graph: the
baseline that a compressed engine is compared with.

The attention mask is one finite additive constant, made from the mask input inside the graph: -inf or the smallest float
turns into NaN in half precision as soon as a row is all padding.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nxm_export.checkpoint import PLAN_FILE, Checkpoint, load_task_model, open_checkpoint, read_config, read_tensor
from nxm_export.errors import ExportError
from nxm_export.families import ROLES, Family, Task, family_of, labels_of, task_named, task_of
from nxm_export.plan import CompressionPlan
from nxm_export.run_dir import atomic_dir, json_text, require_replaceable
from nxm_export.spec import TOKENIZER_FILE, IOSpec

if TYPE_CHECKING:
    from nxm_export.verify import GraphReport

MASKED = -1e4  # added to the attention scores of padding: finite in float16, and exp() of it is 0
SOFTMAX_SCALE = 1.0 / 127.0
METADATA = "nxm."  # prefix of our entries in the ONNX metadata


@dataclass(frozen=True)
class Target:
    """What a graph is made for: float dtype of the graph, opset, and which quantizers stay, of those that were trained."""

    name: str
    dtype: str
    opset: int
    placement: str


TARGETS = {
    # At opset 21 ONNX Runtime 1.32 cannot load the plain file: it moves pairs through reshapes with output_dtype INT8, then
    # makes their zero points UINT8. Below 20 there is no Gelu.
    "cpu": Target("cpu", "float32", 20, "inputs"),
    "trt": Target("trt", "float16", 21, "inputs-outputs"),
}


@dataclass(frozen=True)
class Exported:
    """What an export made. `scale_rounding` is the largest relative change of a scale by the graph's float dtype."""

    path: Path
    bytes: int
    nodes: int
    scale_rounding: float
    report: GraphReport


def export(
    checkpoint: str | Path,
    out: str | Path,
    *,
    target: str = "cpu",
    task: str | None = None,
    dtype: str | None = None,
    placement: str | None = None,
) -> Exported:
    """Write ``model.onnx``, ``verify.json``, ``spec.json`` and the tokenizer to `out`, from a checkpoint directory.

    `dtype` (float32, float16, bfloat16) and `placement` (inputs, inputs-outputs) override the target's; a placement can
    only drop quantizers that the plan trained, never add some. Left out, it is the target's where the plan allows that,
    else the plan's own. Raises `ExportError`, `ArtifactError`, `PlanError`; a graph that breaks its plan is never written.
    """
    from nxm_export.verify import verify
    from nxm_export.weights import save_graph

    path, out = Path(checkpoint), Path(out)
    require_replaceable(out)
    chosen = target_named(target)
    dtype = dtype or chosen.dtype
    config = read_config(path)
    family, kind = family_of(config, source=str(path)), task_named(task or _task_of(path, config))
    compressed = open_checkpoint(path) if (path / PLAN_FILE).is_file() else None
    if compressed is not None:
        compressed.require_valid()
    plan = _placed(compressed.plan, placement, chosen) if compressed else None
    model = _trace(path, kind, family, dtype, chosen.opset)
    _require_same_weights(model, path, family.weights(config), dtype)
    rounding = _quantize(model, compressed, plan, family, dtype) if compressed and plan else 0.0
    _name_float_weights(model, [n for n in family.weights(config) if not (plan and plan.weights[n].weight_bits)])
    _tidy(model)
    _name_axes(model, family, kind)
    model.metadata_props.update(_metadata(config, kind, chosen, dtype, plan))
    with atomic_dir(out) as scratch:
        save_graph(model, scratch / "model.onnx")
        report = replace(verify(scratch / "model.onnx", plan=plan), file="model.onnx")
        report.require()
        (scratch / "verify.json").write_text(json_text(report.to_dict()), encoding="utf-8")
        IOSpec.of(path, config, family, kind).save(scratch)
        if (path / TOKENIZER_FILE).is_file():
            shutil.copyfile(path / TOKENIZER_FILE, scratch / TOKENIZER_FILE)
    file = out / "model.onnx"
    size = sum(part.stat().st_size for part in out.glob("model.onnx*"))
    return Exported(file, size, len(model.graph), rounding, report)


def target_named(name: str) -> Target:
    """The target of this name, or `ExportError` with the list."""
    if name not in TARGETS:
        raise ExportError(f"unknown target {name!r}; choose one of {', '.join(TARGETS)}")
    return TARGETS[name]


def _task_of(path: Path, config: Mapping[str, Any]) -> str:
    """The task that a checkpoint's head serves, from its ``config.json``."""
    task = task_of(config)
    if task is None:
        raise ExportError(f"{path}: it has no head of a supported kind; fine-tune it first (`nxm compress` does)")
    return task


def _placed(plan: CompressionPlan, placement: str | None, target: Target) -> CompressionPlan:
    """The plan at the placement asked for, or at the target's, where the plan has quantizers for it."""
    if placement is None:
        allowed = plan.placement if plan.placement == "inputs" or plan.attention == "int8" else target.placement
        return plan.at_placement(allowed)
    return plan.at_placement(placement)


def _trace(path: Path, task: Task, family: Family, dtype: str, opset: int) -> Any:
    """The float graph, not yet optimized, its initializers under the parameters' own names."""
    import torch

    floats = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if dtype not in floats:
        raise ExportError(f"unknown dtype {dtype!r}; choose one of {', '.join(floats)}")

    class Traced(torch.nn.Module):
        """The model with the inputs and outputs of an engine."""

        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            inputs = dict(zip(family.inputs, tensors, strict=True))
            mask = inputs["attention_mask"][:, None, None, :].to(floats[dtype])
            inputs["attention_mask"] = (1.0 - mask) * MASKED
            outputs = self.model(**inputs)
            return tuple(outputs[name].float() for name in task.outputs)

    model = load_task_model(path, task, dtype=dtype)
    with _silence():
        batch, sequence = (
            torch.export.Dim("batch"),
            torch.export.Dim("sequence", max=family.max_positions(model.config.to_dict())),
        )
        examples = tuple(
            torch.ones(2, 7, dtype=torch.long) for _ in family.inputs
        )  # one object twice would be traced as one input
        program = torch.onnx.export(
            Traced(model),
            examples,
            input_names=list(family.inputs),
            output_names=list(task.outputs),
            dynamic_shapes=(({0: batch, 1: sequence},) * len(family.inputs),),
            opset_version=opset,
            dynamo=True,
            optimize=False,
            verbose=False,
        )
    assert program is not None
    return _renamed(program.model)


def _renamed(model: Any) -> Any:
    """Drop the wrapper's ``model.`` from initializer names, so that they are the checkpoint's."""
    for name in list(model.graph.initializers):
        if name.startswith("model."):
            value = model.graph.initializers.pop(name)
            value.name = name.removeprefix("model.")
            model.graph.register_initializer(value)
    return model


def _quantize(model: Any, checkpoint: Checkpoint, plan: CompressionPlan, family: Family, dtype: str) -> float:
    """Put the plan into the graph; returns the largest relative change of a scale by rounding to `dtype`."""
    from nxm_export.qdq import fold_weight_qdq, insert_activation_qdq, linears_of, require_scale

    rounding = 0.0

    def rounded(scale: np.ndarray | float, name: str) -> np.ndarray:
        nonlocal rounding
        exact = np.asarray(scale, np.float32)
        with np.errstate(over="ignore"):  # an infinite scale is refused by name below
            result = exact.astype(_numpy_dtype(dtype))
        require_scale(result, name)
        rounding = max(rounding, float((np.abs(result.astype(np.float32) - exact) / exact).max()))
        return result

    pending_outputs = []
    for block in family.blocks(checkpoint.config):
        inputs: dict[int, Any] = {}  # one pair per tensor, however many layers read it
        for role in ROLES:
            name = f"{family.linear(block, role)}.weight"
            spec, path = plan.weights[name], name.removesuffix(".weight")
            if spec.weight_bits is None:
                continue
            for linear in linears_of(model.graph, name):
                linear.product.name = path
                fold_weight_qdq(
                    model.graph, linear, name, checkpoint.codes(name), rounded(checkpoint.weight_scale(name), name)
                )
                if id(linear.x) not in inputs:
                    scale = rounded(checkpoint.input_scale(name), f"{path}.input")
                    inputs[id(linear.x)] = insert_activation_qdq(
                        model.graph, linear.x, scale, f"{path}.input", [linear.product]
                    )
                else:
                    linear.product.replace_input_with(0, inputs[id(linear.x)])
                if spec.output_bits:
                    pending_outputs.append((linear, name, path))
    for linear, name, path in pending_outputs:
        insert_activation_qdq(
            model.graph, linear.output, rounded(checkpoint.output_scale(name), f"{path}.output"), f"{path}.output"
        )
    if plan.attention == "int8":
        blocks = len(family.blocks(checkpoint.config))
        _quantize_probabilities(model.graph, rounded(SOFTMAX_SCALE, "softmax"), blocks)
    return rounding


def _name_float_weights(model: Any, names: Iterable[str]) -> None:
    """Give the matrices that stay in float, and their products, the checkpoint's names."""
    from nxm_export.qdq import fold_float_weight, linears_of

    for name in names:
        for linear in linears_of(model.graph, name):
            linear.product.name = name.removesuffix(".weight")
        fold_float_weight(model.graph, name)


def _quantize_probabilities(graph: Any, scale: np.ndarray, blocks: int) -> None:
    from nxm_export.qdq import insert_activation_qdq

    nodes = [node for node in graph if node.op_type == "Softmax"]
    if len(nodes) != blocks:
        raise ExportError(
            f"the exported graph has {len(nodes)} Softmax nodes for {blocks} encoder blocks; "
            "this transformers version computes attention differently: export with float attention"
        )
    for number, node in enumerate(nodes):
        insert_activation_qdq(graph, node.outputs[0], scale, f"attention.{number}.probabilities")


def _require_same_weights(model: Any, path: Path, names: Iterable[str], dtype: str) -> None:
    """The traced weights are the checkpoint's, bit for bit, rounded to the dtype of the graph."""
    for name in names:
        traced = model.graph.initializers.get(name)
        wanted = read_tensor(path, name).astype(_numpy_dtype(dtype))
        if traced is not None and not np.array_equal(traced.const_value.numpy(), wanted):
            raise ExportError(
                f"{name}: the traced graph holds other values than the checkpoint; this is a bug, please report it with the model"
            )


def _tidy(model: Any) -> None:
    """Fold constants, merge equal subexpressions, drop what nothing reads. Q/DQ pairs are left alone by the folder."""
    import onnx_ir.passes.common as passes
    import onnxscript.optimizer

    with _silence():
        onnxscript.optimizer.optimize(model)
        for tidy in (
            passes.CommonSubexpressionEliminationPass(),
            passes.RemoveUnusedNodesPass(),
            passes.LiftConstantsToInitializersPass(),
            passes.DeduplicateInitializersPass(),
            passes.RemoveUnusedOpsetsPass(),
            passes.ClearMetadataAndDocStringPass(),
            passes.TopologicalSortPass(),
        ):
            tidy(model)


def _name_axes(model: Any, family: Family, task: Task) -> None:
    """Two inputs that share an axis get it renamed by the exporter: say again what every axis is."""
    import onnx_ir as ir

    for value in model.graph.inputs:
        value.shape = ir.Shape(["batch", "sequence"])
    for value, axes in zip(model.graph.outputs, task.outputs.values(), strict=True):
        traced = value.shape if value.shape is not None else axes
        value.shape = ir.Shape([axis if axis in ("batch", "sequence") else traced[i] for i, axis in enumerate(axes)])


def _metadata(
    config: Mapping[str, Any], task: Task, target: Target, dtype: str, plan: CompressionPlan | None
) -> dict[str, str]:
    facts = {
        "schema": "nxm-onnx/1",
        "model_type": config["model_type"],
        "task": task.name,
        "target": target.name,
        "dtype": dtype,
        "placement": plan.placement if plan else "float",
        "labels": json.dumps(labels_of(config)),
    }
    if plan:
        facts["plan"] = plan.to_json()
    return {METADATA + key: value for key, value in facts.items()}


def _numpy_dtype(dtype: str) -> np.dtype:
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """The exporter prints and warns about things that are none of the user's business."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "transformers")]
    levels = [logger.level for logger in loggers]
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
