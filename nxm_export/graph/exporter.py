"""A checkpoint directory becomes ``model.onnx``: trace, restore meaning by name, put in the quantizers, tidy, verify.

Graphs of all targets (`nxm_export.graph.targets`) hold symmetric INT8 pairs with zero point 0. Weights of 4 bits or
fewer can be stored as INT4, at opset 21 (`nxm_export.graph.int4_storage`). A directory without a plan gives the float
graph: the baseline that a compressed engine is compared with.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir

from nxm_export.contract.checkpoint import (
    PLAN_FILE,
    Checkpoint,
    holds_tensor,
    open_checkpoint,
    read_config,
    read_tensor,
    task_at,
    weights_hash,
)
from nxm_export.contract.choices import FLOAT_TYPES, LOWERING, TARGET, WEIGHT_STORAGE, WEIGHT_STORAGES
from nxm_export.contract.encoder_family import Family
from nxm_export.contract.families import family_of
from nxm_export.contract.io_spec import TOKENIZER_FILE, IOSpec
from nxm_export.contract.origin import Origin
from nxm_export.contract.plan import INT8_ATTENTION, CompressionPlan, WeightSpec
from nxm_export.contract.pooling import read_pooling
from nxm_export.contract.quantizer_placement import at_placement, placement_of
from nxm_export.contract.records.verify_report import VERIFY_FILE, VerifyReport
from nxm_export.contract.tasks import Task, labels_of, task_named
from nxm_export.data.tokenization import copy_tokenizer
from nxm_export.errors import ExportError
from nxm_export.graph.apply_plan import graph_names, numpy_dtype, quantize
from nxm_export.graph.implied_zero_points import imply_zero_points
from nxm_export.graph.int4_storage import CAST, require_int4, store_int4
from nxm_export.graph.int8_embedding import fold_int8_embedding
from nxm_export.graph.linear_forms import Lowering
from nxm_export.graph.older_opset import lower_opset
from nxm_export.graph.qdq import add_initializer, fold_float_weight, linears_of, use_name
from nxm_export.graph.reading.graph_weights import array_of, save_graph
from nxm_export.graph.targets import GraphTarget, target_named
from nxm_export.graph.tracing import name_axes, tidy, trace
from nxm_export.graph.verifier import verify
from nxm_export.hf.model_loading import load_task_model
from nxm_export.storage.atomic import atomic_dir, require_apart, require_replaceable
from nxm_export.storage.json_files import encode

INT8_ATTENTION_TOKENS = 512  # TensorRT has no fused INT8 attention beyond (NVIDIA/TensorRT issue 3724)
OVERRIDABLE = ("LayerNormalization", "Softmax")
METADATA = "nxm."  # prefix of our entries in the ONNX metadata
METADATA_SCHEMA = "nxm-onnx/2"


@dataclass(frozen=True)
class Exported:
    """What an export made. `scale_rounding` is the largest relative change of a scale by the graph's float dtype."""

    path: Path
    bytes: int
    nodes: int
    scale_rounding: float
    report: VerifyReport

    def to_dict(self) -> dict[str, object]:
        """The form of ``--json``: the path as text, and of the report whether it passed (the whole lies beside the
        graph)."""
        return {
            "path": str(self.path),
            "bytes": self.bytes,
            "nodes": self.nodes,
            "scale_rounding": self.scale_rounding,
            "verified": self.report.passed,
        }


def export(
    checkpoint: str | Path,
    out: str | Path,
    *,
    target: str = TARGET,
    task: str | None = None,
    dtype: str | None = None,
    placement: str | None = None,
    lowering: str = LOWERING,
    precision_overrides: str | None = None,
    max_length: int | None = None,
    weights_stored: str = WEIGHT_STORAGE,
) -> Exported:
    """Write ``model.onnx``, ``verify.json``, ``spec.json`` and the tokenizer to `out`, from a checkpoint directory.

    The keywords are the options of ``nxm export``, one each. `dtype` (float32, float16, bfloat16) and `placement` (one
    of `GRAPH_PLACEMENTS`) override the target's; a placement can only drop quantizers that the plan trained, never add
    some. An embedding table that is planned INT8 is stored so by target ``cpu``; the others store the same values in
    float, and their graph's plan says float. `lowering` is one of `LOWERINGS`. `precision_overrides` computes LayerNorm
    and softmax in another float dtype than the graph's. `max_length` (tokens) lowers the longest input that the graph
    is meant for; INT8 attention, where trained, is exported up to 512 tokens and runs in float above. With
    `weights_stored` (one of `WEIGHT_STORAGES`) ``int4`` those of 4 bits or fewer take half a byte each, as far as the
    target can run them so; where that is none, it is refused. Raises `ExportError`, `ArtifactError`, `PlanError`; a
    graph that breaks its plan is never written.
    """
    path, out = Path(checkpoint), Path(out)
    if weights_stored not in WEIGHT_STORAGES:
        raise ExportError(f"unknown weights stored {weights_stored!r}; choose one of {', '.join(WEIGHT_STORAGES)}")
    require_replaceable(out)
    require_apart(out, path)
    chosen = target_named(target)
    _require_overridable(precision_overrides, dtype or chosen.dtype, chosen)
    opened = _OpenedModel.of(path, task, max_length)
    plan = _placed(opened.checkpoint.plan, chosen, placement, opened.spec.max_length) if opened.checkpoint else None
    int4 = require_int4(plan, chosen.int4, lowering, chosen.name) if weights_stored == "int4" else []
    settings = _GraphSettings(
        chosen.for_int4() if int4 else chosen, dtype or chosen.dtype, plan, lowering, precision_overrides, tuple(int4)
    )
    if lowering != "matmul" and not settings.plan:
        raise ExportError(f"lowering {lowering} is for compressed checkpoints; {path} has no {PLAN_FILE}")
    model, rounding = _made(opened, settings)
    with atomic_dir(out) as scratch:
        save_graph(model, scratch / "model.onnx")
        report = replace(verify(scratch / "model.onnx", plan=settings.plan), file="model.onnx")
        report.require()
        (scratch / VERIFY_FILE).write_text(encode(report.to_dict()), encoding="utf-8")
        opened.spec.save(scratch)
        Origin(str(path.resolve())).save(scratch)
        if (path / TOKENIZER_FILE).is_file():
            copy_tokenizer(path, scratch)
    file = out / "model.onnx"
    size = sum(part.stat().st_size for part in out.glob("model.onnx*"))
    return Exported(file, size, len(model.graph), rounding, report)


@dataclass(frozen=True)
class _OpenedModel:
    """What is exported: a checkpoint directory, read; `checkpoint` is None for one without a plan."""

    path: Path
    config: Mapping[str, object]
    family: Family
    task: Task
    spec: IOSpec
    checkpoint: Checkpoint | None

    @classmethod
    def of(cls, path: Path, task: str | None, max_length: int | None) -> _OpenedModel:
        config = read_config(path)
        family, chosen = family_of(config, source=str(path)), task_named(task or _task_of(path, config))
        checkpoint = open_checkpoint(path) if (path / PLAN_FILE).is_file() else None
        if checkpoint is not None:
            checkpoint.require_valid()
        spec = _with_length(IOSpec.of(path, config, family, chosen), max_length)
        return cls(path, config, family, chosen, spec, checkpoint)


@dataclass(frozen=True)
class _GraphSettings:
    """How it is exported; `plan` is the one that the graph will hold, `int4` names the weights stored as INT4."""

    target: GraphTarget
    dtype: str
    plan: CompressionPlan | None
    lowering: str
    precision_overrides: str | None
    int4: tuple[str, ...]


def _made(opened: _OpenedModel, settings: _GraphSettings) -> tuple[ir.Model, float]:
    """The finished graph with its metadata, and the largest relative change of a scale by its dtype."""
    plan, checkpoint, dtype = settings.plan, opened.checkpoint, settings.dtype
    model = trace(opened.path, opened.task, opened.family, dtype, max(settings.target.opset, 18))
    matrices = opened.family.weights(opened.config)
    int8_embedding = [opened.family.word_embedding] if plan and plan.embedding == "int8" else []
    _require_same_weights(model, opened, [*matrices, *int8_embedding], dtype)
    rounding, hashes = 0.0, {}
    if checkpoint and plan:
        lower = Lowering(model.graph, settings.lowering)
        rounding = quantize(model, checkpoint, plan, dtype=dtype, lower=lower, form=settings.target.weight_form)
        for name in int8_embedding:
            codes, scale = checkpoint.codes(name), checkpoint.weight_scale(name)
            digest = fold_int8_embedding(model.graph, name, codes, scale, numpy_dtype(dtype))
            hashes["embedding_sha256"] = digest
    traced = [name for name in matrices if not plan or _stays_traced(plan.weights[name], settings.lowering)]
    _name_float_weights(model, traced)
    tidy(model)
    if settings.precision_overrides:
        _override_precision(model, settings.precision_overrides, dtype)
    if settings.target.opset < 18:
        lower_opset(model, settings.target.opset)
    if settings.int4 and settings.target.int4:
        assert plan
        form = settings.target.weight_form
        parts = [graph_names(opened.family, name, plan.weights[name], form) for name in settings.int4]
        store_int4(model.graph, itertools.chain.from_iterable(parts), settings.target.int4)
        if settings.target.int4 == CAST:  # for ONNX Runtime, and of opset 21
            imply_zero_points(model.graph)
    name_axes(model, opened.task)
    model.metadata_props.update(_metadata(opened, settings, hashes))
    return model, rounding


def _with_length(spec: IOSpec, max_length: int | None) -> IOSpec:
    if max_length is None:
        return spec
    if not 2 <= max_length <= spec.max_length:
        raise ExportError(f"max length {max_length} is outside 2..{spec.max_length}, what model and tokenizer allow")
    return replace(spec, max_length=max_length)


def _placed(plan: CompressionPlan, target: GraphTarget, placement: str | None, max_length: int) -> CompressionPlan:
    """The plan as the graph holds it; INT8 attention falls back to float beyond 512 tokens unless it was asked for."""
    chosen = placement or target.placement or placement_of(plan)
    if chosen in INT8_ATTENTION and max_length > INT8_ATTENTION_TOKENS:
        without = "inputs-outputs" if chosen == "attention" else "inputs"
        if placement is not None:
            raise ExportError(
                f"INT8 attention is for at most {INT8_ATTENTION_TOKENS} tokens, and this graph takes {max_length}; "
                f"lower it (--max-length {INT8_ATTENTION_TOKENS}) or use --placement {without}"
            )
        chosen = without
    placed = at_placement(plan, chosen)
    return placed if target.embedding == "int8" else replace(placed, embedding="float")


def _require_overridable(precision_overrides: str | None, dtype: str, target: GraphTarget) -> None:
    if precision_overrides is None:
        return
    if precision_overrides not in FLOAT_TYPES or precision_overrides == dtype:
        raise ExportError(
            f"precision_overrides must be a float dtype other than the graph's {dtype}, got {precision_overrides!r}"
        )
    if target.opset < 18:
        raise ExportError(
            f"target {target.name} is weakly typed: its builder chooses the dtype of LayerNorm and softmax itself"
        )


def _task_of(path: Path, config: Mapping[str, object]) -> str:
    """The task that a checkpoint's head serves, from its ``config.json``."""
    task = task_at(path, config)
    if task is None:
        raise ExportError(f"{path}: it has no head of a supported kind; fine-tune it first (`nxm compress` does)")
    return task


def _stays_traced(spec: WeightSpec, lowering: str) -> bool:
    """True for a weight that stays in the graph as it was traced: neither quantized nor lowered."""
    return spec.weight_bits is None and (spec.is_dense or lowering == "matmul")


def _name_float_weights(model: ir.Model, names: Iterable[str]) -> None:
    """Give the matrices that stay in float, and their products, the checkpoint's names."""
    for name in names:
        for use, linear in enumerate(linears_of(model.graph, name)):
            linear.product.name = use_name(name.removesuffix(".weight"), use)
        fold_float_weight(model.graph, name)


def _reader(opened: _OpenedModel, names: Sequence[str]) -> Callable[[str], np.ndarray]:
    """What gives a weight by its name: the file, or, of one under names of its authors' own, what transformers makes of
    it."""
    if all(holds_tensor(opened.path, name) for name in names):
        return partial(read_tensor, opened.path)
    translated = load_task_model(opened.path, opened.task).state_dict()
    return lambda name: translated[name].numpy()


def _require_same_weights(model: ir.Model, opened: _OpenedModel, names: Sequence[str], dtype: str) -> None:
    """The traced weights are the checkpoint's, bit for bit, rounded to the dtype of the graph."""
    read = _reader(opened, names)
    for name in names:
        traced = model.graph.initializers.get(name)
        expected = read(name).astype(numpy_dtype(dtype))
        values = None if traced is None else array_of(traced)
        if values is not None and not np.array_equal(values, expected):
            raise ExportError(
                f"{name}: the traced graph holds other values than the checkpoint; this is a bug, please report it "
                "with "
                "the model"
            )


def _override_precision(model: ir.Model, precision: str, dtype: str) -> None:
    """Compute LayerNorm and softmax in dtype `precision`, with casts around them; parameters are stored in it."""
    inner, outer = (ir.DataType.from_numpy(numpy_dtype(name)) for name in (precision, dtype))
    graph = model.graph
    for node in [node for node in graph if node.op_type in OVERRIDABLE]:
        for i, value in enumerate(node.inputs):
            if value is None:
                continue
            if value.const_value is not None:
                array = value.const_value.numpy().astype(numpy_dtype(precision))
                node.replace_input_with(i, add_initializer(graph, f"{value.name}_{precision}", array))
            else:
                cast = ir.node("Cast", [value], attributes={"to": int(inner)})
                cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(inner), value.shape
                graph.insert_before(node, cast)
                node.replace_input_with(i, cast.outputs[0])
        output = node.outputs[0]
        users = list(output.consumers())
        back = ir.node("Cast", [output], attributes={"to": int(outer)})
        back.outputs[0].type, back.outputs[0].shape = ir.TensorType(outer), output.shape
        output.type = ir.TensorType(inner)
        graph.insert_after(node, back)
        for user in users:
            for i, read in enumerate(user.inputs):
                if read is output:
                    user.replace_input_with(i, back.outputs[0])


def _metadata(opened: _OpenedModel, settings: _GraphSettings, hashes: Mapping[str, str]) -> dict[str, str]:
    """What the ONNX file says about itself, by the names that a passport keeps, with our prefix."""
    plan, task = settings.plan, opened.task
    facts = {
        "lowering": settings.lowering,
        **({"weights_stored": "int4"} if settings.int4 else {}),
        "precision_overrides": settings.precision_overrides or settings.dtype,
        "gelu": opened.family.gelu(opened.config) or "none",
        "weights": weights_hash(opened.path),
        **hashes,
        **({"pooling": str(read_pooling(opened.path))} if task.auto_class is None else {}),
        "schema": METADATA_SCHEMA,
        "model_type": opened.family.model_type,
        "task": task.name,
        "target": settings.target.name,
        "dtype": settings.dtype,
        "placement": placement_of(plan) if plan else "float",
        "labels": json.dumps(labels_of(opened.config) if task.names_labels else ()),
        **({"plan": plan.to_json()} if plan else {}),
    }
    return {METADATA + key: value for key, value in facts.items()}
