"""A task model becomes a float graph: traced by torch, tidied, its parameters under the names of the checkpoint.

The attention mask is one finite additive constant, made from the mask input inside the graph: -inf or the smallest
float turns into NaN in half precision as soon as a row is all padding.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from nxm_export.contract.checkpoint import read_config
from nxm_export.contract.encoder_family import Family
from nxm_export.contract.tasks import Task
from nxm_export.errors import ExportError
from nxm_export.hf.deberta import write_out_attention
from nxm_export.hf.finite_masks import MASKED, read_rows_of_padding, use_finite_masks
from nxm_export.hf.model_loading import load_task_model

if TYPE_CHECKING:
    import torch


def traced_module(path: Path, task: Task, family: Family, dtype: str) -> torch.nn.Module:
    """The model of a directory with the inputs and outputs of an engine, in the form in which it is traced; it returns
    a tuple of the task's outputs in float32. Raises `ExportError` for an unknown dtype."""
    import torch

    floats = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if dtype not in floats:
        raise ExportError(f"unknown dtype {dtype!r}; choose one of {', '.join(floats)}")

    class Traced(torch.nn.Module):
        def __init__(self, model: torch.nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            inputs = dict(zip(family.inputs, tensors, strict=True))
            if family.attention.takes_bias_mask:
                mask = inputs["attention_mask"][:, None, None, :].to(floats[dtype])
                inputs["attention_mask"] = (1.0 - mask) * MASKED
            outputs = self.model(**inputs)
            return tuple(outputs[name].float() for name in task.outputs)

    model = load_task_model(path, task, dtype=dtype)
    if family.attention.interface and not family.attention.takes_bias_mask:
        use_finite_masks(model)
    write_out_attention(model, fixed_positions=True)
    read_rows_of_padding(model)
    return Traced(model)


def trace(path: Path, task: Task, family: Family, dtype: str, opset: int) -> ir.Model:
    """The float graph, not yet optimized, its initializers under the parameters' own names."""
    import torch

    module = traced_module(path, task, family, dtype)
    # One object twice would be traced as one input. Not every model has a second kind of tokens.
    ones = [int(name != "token_type_ids") for name in family.inputs]
    examples = tuple(torch.full((2, 7), one, dtype=torch.long) for one in ones)
    with _silence(), torch.no_grad():
        try:
            module(*examples)
        except Exception as error:  # of any kind: the model is of transformers, and runs on what config.json says
            raise ExportError(
                f"{path}: the model that config.json describes does not run ({error}); restore config.json from the "
                "model"
            ) from error
        batch = torch.export.Dim("batch")
        sequence = torch.export.Dim("sequence", max=family.max_positions(read_config(path)))
        program = torch.onnx.export(
            module,
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


def _renamed(model: ir.Model) -> ir.Model:
    """Drop the wrapper's ``model.`` from initializer names, so that they are the checkpoint's."""
    for name in list(model.graph.initializers):
        if name.startswith("model."):
            value = model.graph.initializers.pop(name)
            value.name = name.removeprefix("model.")
            model.graph.register_initializer(value)
    return model


def tidy(model: ir.Model) -> None:
    """Fold constants, merge equal subexpressions, drop what nothing reads. Q/DQ pairs are left alone by the folder."""
    import onnx_ir.passes.common as passes
    import onnxscript.optimizer

    products = {node.outputs[0].name: node.name for node in model.graph if node.op_type in ("Gemm", "Conv")}
    with _silence():
        onnxscript.optimizer.optimize(model)
        for node in model.graph:  # a product whose bias is all 0 was made anew without it, and without its name
            if node.op_type in ("Gemm", "Conv"):
                node.name = products.get(node.outputs[0].name, node.name)
        for clean in (
            passes.CommonSubexpressionEliminationPass(),
            passes.RemoveUnusedNodesPass(),
            passes.LiftConstantsToInitializersPass(),
            passes.DeduplicateInitializersPass(),
            passes.RemoveUnusedOpsetsPass(),
            passes.ClearMetadataAndDocStringPass(),
            passes.TopologicalSortPass(),
        ):
            clean(model)


def name_axes(model: ir.Model, task: Task) -> None:
    """Two inputs that share an axis get it renamed by the exporter: say again what every axis is."""
    for value in model.graph.inputs:
        value.shape = ir.Shape(["batch", "sequence"])
    for value, axes in zip(model.graph.outputs, task.outputs.values(), strict=True):
        traced = value.shape if value.shape is not None else axes
        value.shape = ir.Shape([axis if axis in ("batch", "sequence") else traced[i] for i, axis in enumerate(axes)])


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
