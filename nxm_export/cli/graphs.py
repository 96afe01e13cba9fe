"""Commands on graphs: export, verify."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import click

from nxm_export.cli.group import command
from nxm_export.cli.options import Whole, all_option, json_option, pattern_of, typed
from nxm_export.cli.output import print_next, quoted, show_result
from nxm_export.cli.sparsity_tables import print_verification
from nxm_export.cli.tables import print_facts
from nxm_export.contract.choices import (
    FLOAT_TYPES,
    LOWERING,
    LOWERINGS,
    TARGET,
    TARGETS,
    WEIGHT_STORAGE,
    WEIGHT_STORAGES,
)
from nxm_export.contract.plan import GRAPH_PLACEMENTS
from nxm_export.contract.tasks import TASKS


@dataclass(frozen=True)
class _ExportOptions:
    """The options of ``nxm export`` that override what its target means, and the target."""

    target: str
    dtype: str | None
    placement: str | None
    lowering: str
    precision_overrides: str | None
    max_length: int | None
    weights_stored: str
    task: str | None


@command(
    "nxm export checkpoint --target cpu --out graph",
    "nxm export checkpoint --target trt --dtype bfloat16 --out graph",
)
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "--target",
    type=click.Choice(TARGETS),
    default=TARGET,
    show_default=True,
    help="cpu (FP32 graph), trt (FP16 graph, opset 21) or trt8 (FP32 graph, opset 17, for TensorRT 8.6).",
)
@click.option("--dtype", type=click.Choice(FLOAT_TYPES), help="Float type of the graph.  [default: the target's]")
@click.option(
    "--placement",
    type=click.Choice(GRAPH_PLACEMENTS),
    help="[default: inputs for cpu, all that was trained for trt, trt8]",
)
@click.option(
    "--lowering",
    type=click.Choice(LOWERINGS),
    default=LOWERING,
    show_default=True,
    help="Form of the products.",
)
@click.option(
    "--precision-overrides",
    type=click.Choice(FLOAT_TYPES),
    help="Float type of LayerNorm and softmax.  [default: the graph's]",
)
@click.option("--max-length", type=Whole(min=2), help="Longest input in tokens.  [default: what the model allows]")
@click.option(
    "--weights-stored",
    type=click.Choice(WEIGHT_STORAGES),
    default=WEIGHT_STORAGE,
    show_default=True,
    help="int4: weights of 4 bits or fewer take half a byte each. Not for trt8; trt keeps N:M ones INT8.",
)
@click.option(
    "--task",
    type=click.Choice(list(TASKS)),
    metavar="TASK",
    help="What the graph is for.  [default: what the checkpoint's head says]",
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Directory of the graph.")
@json_option
def export(checkpoint: Path, out: Path, json: bool, **values: object) -> None:
    """Write a checkpoint as an ONNX graph with Q/DQ nodes.

    A CHECKPOINT without plan gives a float graph.
    """
    from nxm_export.graph.exporter import export as export_graph

    options = typed(_ExportOptions, values)
    exported = export_graph(
        checkpoint,
        out,
        target=options.target,
        task=options.task,
        dtype=options.dtype,
        placement=options.placement,
        lowering=options.lowering,
        precision_overrides=options.precision_overrides,
        max_length=options.max_length,
        weights_stored=options.weights_stored,
    )

    def show() -> None:
        click.echo(f"Exported for {options.target}; `nxm verify` checks the stored numbers.")
        print_facts(str(out), exported.to_dict())
        print_next(f"nxm verify {quoted(out)}")

    show_result(exported.to_dict, json, show)


@command("nxm verify graph", "nxm verify anybodys.onnx --pattern 2:4")
@click.argument("onnx", metavar="GRAPH", type=click.Path(path_type=Path))
@click.option(
    "--pattern",
    metavar="N:M",
    help="Require this N:M of every quantized weight, beside what the plan in a file of ours says.",
)
@all_option
@json_option
def verify(onnx: Path, pattern: str | None, everything: bool, json: bool) -> None:
    """Check the integers that a graph stores: N:M, scales, Q/DQ pairs.

    GRAPH is any ONNX file, or a graph directory. N:M is looked for along K. Exits with 3 on problems.
    """
    from nxm_export.graph.verifier import verify as verify_graph
    from nxm_export.pipeline.graph_file import onnx_file

    onnx = onnx_file(onnx)
    report = verify_graph(onnx, pattern=pattern_of(pattern) if pattern else None)

    show_result(report.to_dict, json, lambda: print_verification(str(onnx), report, everything))
    if not report.passed:
        sys.exit(3)
