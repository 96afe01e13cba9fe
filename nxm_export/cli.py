"""The command line ``nxm``: one thin command per stage. Parse, one call, print.

stdout is the result, stderr the progress; ``--json`` prints the result for machines. Exit codes: 0 done, 1 an error that
says what to do, 2 wrong usage, 3 a gate failed. Heavy imports stand inside the commands, so that ``--help`` is instant.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
from click.core import ParameterSource

from nxm_export import __version__
from nxm_export.errors import NxmError, PlanError
from nxm_export.families import TASKS
from nxm_export.plan import COUNTINGS, GRAPH_PLACEMENTS, PLACEMENTS, NMPattern, WeightSpec
from nxm_export.run_dir import json_text
from nxm_export.terminal import (
    print_estimate,
    print_facts,
    print_search,
    print_summary,
    print_table,
    progress_bars,
)


class _Group(click.Group):
    """Turns our errors into one line and an exit code; anything else is a bug and keeps its traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except NxmError as error:
            click.echo(f"nxm: {error}", err=True)
            ctx.exit(error.exit_code)
        except ModuleNotFoundError as error:
            from nxm_export.machine import extra_of

            extra = extra_of(error.name)
            if extra is None:
                raise
            click.echo(
                f"nxm: this needs {error.name}, which is not installed; pip install 'nxm-export[{extra}]'", err=True
            )
            ctx.exit(1)
        except KeyboardInterrupt:
            click.echo("nxm: interrupted; run the same command again to go on from here", err=True)
            ctx.exit(130)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="nxm")
def main() -> None:
    """Compress BERT-family encoders to N:M sparsity and low-bit integers; export, build, prove and run them."""
    command = click.get_current_context().invoked_subcommand
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and command not in ("compress", "search"):
        raise click.UsageError(f"nxm {command} is no work for torchrun; only nxm compress and nxm search are")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when the hub client is imported, which is later
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # what matters of its warnings is an error of ours


class _Positive(click.ParamType):
    """A finite number above 0."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number, or wrong usage."""
        try:
            number = float(value)
        except ValueError:
            self.fail(f"{value!r} is not a number", param, ctx)
        if not (math.isfinite(number) and number > 0):
            self.fail(f"{value} is not a positive number", param, ctx)
        return number


def _json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--json", is_flag=True, help="Print the result as JSON on stdout, and no progress.")(command)


def _options(*options: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_PLAN_OPTIONS = _options(
    click.option(
        "--pattern", default="2:4", show_default=True, help="N:M kept of every M along the input axis, or 'none'."
    ),
    click.option("--weight-bits", default="8", show_default=True, help="2 to 8, or 'none' for unquantized weights."),
    click.option(
        "--placement",
        type=click.Choice(PLACEMENTS),
        default="inputs-outputs",
        show_default=True,
        help="Activation quantizers: before the products; behind them, too; the softmax as well; the FFN's only.",
    ),
    click.option(
        "--residual",
        type=click.Choice(["float", "int8"]),
        default="float",
        show_default=True,
        help="What goes around the layers.",
    ),
    click.option("--keep-dense", multiple=True, metavar="GLOB", help="Leave matching weights dense; may be repeated."),
)
_DATA_OPTIONS = _options(
    click.option("--task", type=click.Choice(list(TASKS)), default="classification", show_default=True),
    click.option("--train", metavar="FILE", help="TSV, CSV, JSONL or Parquet, or a GLUE task name."),
    click.option("--dev", metavar="FILE", help="Held-out data, or the same GLUE task name."),
    click.option("--text", help="Column of the text.  [default: sentence, sentence1, text, ...]"),
    click.option("--text-pair", help="Column of the second text.  [default: sentence2, if there is one]"),
    click.option("--label", help="Column of the label.  [default: label]"),
    click.option("--train-limit", type=click.IntRange(min=1), help="Use a sample of this many training examples."),
    click.option("--revision", help="Branch, tag or commit of a hub model."),
)
_TRAINING_OPTIONS = _options(
    click.option(
        "--recipe",
        type=click.Choice(["nxm", "magnitude", "sr-ste", "one-shot", "paper"]),
        default="nxm",
        show_default=True,
    ),
    click.option(
        "--admm",
        type=click.Choice(["mask", "joint", "joint-ste"]),
        default="mask",
        show_default=True,
        help="ADMM's constraint set.",
    ),
    click.option(
        "--epochs", type=_Positive(), default=6.0, show_default=True, help="Epochs of compression, all phases together."
    ),
    click.option("--steps", type=click.IntRange(min=1), help="Optimizer steps of compression; wins over --epochs."),
    click.option(
        "--dense-epochs",
        type=_Positive(),
        default=3.0,
        show_default=True,
        help="Epochs of dense fine-tuning, where it is needed.",
    ),
    click.option(
        "--dense-steps",
        type=click.IntRange(min=1),
        help="Optimizer steps of dense fine-tuning; wins over --dense-epochs.",
    ),
    click.option("--learning-rate", type=_Positive(), default=1e-4, show_default=True, help="Of compression."),
    click.option("--dense-learning-rate", type=_Positive(), default=5e-5, show_default=True),
    click.option(
        "--batch-size", type=click.IntRange(min=1), default=32, show_default=True, help="Samples per optimizer step."
    ),
    click.option(
        "--max-length", type=click.IntRange(min=2), help="Longest input in tokens.  [default: what the model allows]"
    ),
    click.option("--distill/--no-distill", default=True, show_default=True, help="Learn from the dense model."),
    click.option(
        "--gelu", type=click.Choice(["erf", "tanh"]), help="Train and export this GELU.  [default: the model's own]"
    ),
    click.option("--train-embeddings", is_flag=True, help="Train embedding tables during compression, too."),
    click.option(
        "--precision",
        type=click.Choice(["auto", "fp32", "bf16"]),
        default="auto",
        show_default=True,
        help="Of training.",
    ),
    click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True),
    click.option("--threads", type=click.IntRange(min=1), help="CPU threads of training.  [default: all cores]"),
)


@main.command()
@click.option("--demo", is_flag=True, help="MiniLM-L6 on rotten tomatoes, out of installed packages.")
@click.option("--model", metavar="DIR_OR_HUB_ID")
@_DATA_OPTIONS
@_PLAN_OPTIONS
@_TRAINING_OPTIONS
@click.option("--out", type=click.Path(path_type=Path), help="Run directory.  [default: runs/demo with --demo]")
@click.option("--dry-run", is_flag=True, help="Say what would be done, how long it takes and how large it gets.")
@_json_option
def run(demo: bool, model: str | None, out: Path | None, dry_run: bool, json: bool, **options: Any) -> None:
    """Compress, export, build, compare and time a model, into one run directory; up-to-date stages are skipped.

    Exits with 3 when an engine differs from its checkpoint.
    """
    from nxm_export.pipeline import require_passed
    from nxm_export.pipeline import run as run_all

    given = {
        name
        for name, option in (("--model", model), ("--train", options["train"]), ("--dev", options["dev"]))
        if option
    }
    if demo and given:
        raise click.UsageError(f"--demo brings its own model and data; drop {', '.join(sorted(given))}")
    missing = sorted({"--model", "--train", "--dev"} - given) + (["--out"] if out is None else [])
    if not demo and missing:
        raise click.UsageError(f"missing {', '.join(missing)} (or use --demo)")
    with TemporaryDirectory() if demo and dry_run else nullcontext(None) as scratch:  # a dry run writes nothing
        out = out or Path("runs/demo")
        request = _demo_request(out, options, scratch) if demo else _request(str(model), options)
        if dry_run:
            from nxm_export.estimate import estimate

            _print(estimate(request), json, print_estimate)
            return
    with progress_bars(enabled=not json) as progress:
        summary = run_all(request, out, progress=progress)
    _print(summary, json, print_summary)
    require_passed(summary)


@main.command()
@click.argument("run_directory", type=click.Path(path_type=Path))
@_json_option
def show(run_directory: Path, json: bool) -> None:
    """Print the final table of a run again."""
    from nxm_export.pipeline import read_summary

    _print(read_summary(run_directory), json, print_summary)


@main.command()
@click.argument("model")
@_DATA_OPTIONS
@_PLAN_OPTIONS
@_TRAINING_OPTIONS
@click.option(
    "--plan", "plan_file", type=click.Path(path_type=Path), help="A plan file; wins over --pattern and --weight-bits."
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Directory of the compressed checkpoint.")
@_json_option
def compress(model: str, plan_file: Path | None, out: Path, json: bool, **options: Any) -> None:
    """Compress MODEL (a directory or hub id), fine-tuning it first where it has no head for the task."""
    from nxm_export.pipeline import compress_model

    if not options["train"] or not options["dev"]:
        raise click.UsageError("missing --train or --dev")
    request = _request(model, options)
    with progress_bars(enabled=not json) as progress:
        metrics = compress_model(request, out, plan_file=plan_file, progress=progress)
    _print({**metrics, "path": str(out)}, json, lambda result: print_facts("compressed", result))


@main.command()
@click.argument("model")
@click.option("--task", type=click.Choice(list(TASKS)), default="classification", show_default=True)
@click.option("--train", required=True, metavar="FILE", help="Training data; the search never reads dev data.")
@click.option("--text")
@click.option("--text-pair")
@click.option("--label")
@click.option(
    "--menu", default="2:4+W4,W4,2:4+W8,W8,dense", show_default=True, help="Options per weight, separated by commas."
)
@click.option("--compression", type=float, help="1 - compressed/FP32 of the weights.  [default: 0.875]")
@click.option("--bytes", "bytes_", type=click.IntRange(min=1), help="Budget in bytes instead of --compression.")
@click.option(
    "--count", type=click.Choice(COUNTINGS), default="hw", show_default=True, help="How the budget is counted."
)
@click.option("--method", type=click.Choice(["nxm", "paper"]), default="nxm", show_default=True)
@click.option("--placement", type=click.Choice(PLACEMENTS), default="inputs-outputs", show_default=True)
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    help="Calibration samples.  [default: 32 to 256, for a tenth of a compression run's time]",
)
@click.option("--held-out", type=click.IntRange(min=1), help="Samples of train that judge.  [default: as many]")
@click.option("--swaps", type=click.IntRange(min=0), default=40, show_default=True)
@click.option(
    "--halving", default="", metavar="STEPS,...", help="Optimizer steps of each round of short runs.  [default: none]"
)
@click.option("--finalists", type=click.IntRange(min=1), default=4, show_default=True)
@click.option("--pareto", default="", metavar="C,...", help="Further compressions to report from the same table.")
@click.option("--latency-table", type=click.Path(path_type=Path), help="JSON: {role: {option: milliseconds}}.")
@click.option("--latency-ms", type=float, help="Limit on the sum of the table's milliseconds.")
@click.option(
    "--max-length", type=click.IntRange(min=2), help="Longest input in tokens.  [default: what the model allows]"
)
@click.option(
    "--epochs",
    type=float,
    default=6.0,
    show_default=True,
    help="Of the compression run that the cost is compared with.",
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--threads", type=click.IntRange(min=1))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Directory of plan.json and the evidence.")
@_json_option
def search(model: str, task: str, train: str, out: Path, json: bool, **options: Any) -> None:
    """Search a different (pattern, bits) per weight of MODEL, which must have its task head, under a budget."""
    from nxm_export.pipeline import search_plan

    with progress_bars(enabled=not json) as progress:
        found = search_plan(model, task, train, out, options, progress)
    _print(found, json, print_search)


@main.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The packed file.")
@_json_option
def pack(checkpoint: Path, out: Path, json: bool) -> None:
    """Write CHECKPOINT as one file at its true size: packed bits, N:M indices, scales."""
    from nxm_export.packed import pack as pack_checkpoint

    _print(
        pack_checkpoint(checkpoint, out),
        json,
        lambda sizes: print_table(str(out), ("what", "bytes"), list(sizes.items())),
    )


@main.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Directory of the checkpoint.")
def unpack(file: Path, out: Path) -> None:
    """Write a packed FILE back as the checkpoint directory it was, bit by bit."""
    from nxm_export.packed import unpack as unpack_file

    click.echo(unpack_file(file, out))


@main.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "--target",
    default="cpu",
    show_default=True,
    help="cpu (FP32 graph), trt (FP16 graph, opset 21) or trt8 (FP32 graph, opset 17, for TensorRT 8.6).",
)
@click.option(
    "--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="Of the graph.  [default: the target's]"
)
@click.option(
    "--placement",
    type=click.Choice(GRAPH_PLACEMENTS),
    help="[default: inputs for cpu, all that was trained for trt, trt8]",
)
@click.option(
    "--lowering",
    type=click.Choice(["matmul", "gemm", "conv1x1"]),
    default="matmul",
    show_default=True,
    help="Of linear layers.",
)
@click.option(
    "--islands",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="Of LayerNorm and softmax.  [default: the graph's]",
)
@click.option(
    "--max-length", type=click.IntRange(min=2), help="Longest input in tokens.  [default: what the model allows]"
)
@click.option("--task", type=click.Choice(list(TASKS)), help="[default: what the checkpoint's head says]")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Directory of the graph.")
@_json_option
def export(checkpoint: Path, out: Path, json: bool, **options: Any) -> None:
    """Write CHECKPOINT as a Q/DQ ONNX graph (a float graph, for a checkpoint without plan)."""
    from nxm_export.export import export as export_graph

    done = export_graph(checkpoint, out, **options)
    result = {
        "path": str(done.path),
        "bytes": done.bytes,
        "nodes": done.nodes,
        "scale_rounding": done.scale_rounding,
        "verified": done.report.passed,
    }
    _print(result, json, lambda facts: print_facts("exported", facts))


@main.command()
@click.argument("onnx", type=click.Path(path_type=Path))
@click.option("--pattern", help="Require this N:M of every quantized weight (files of ours carry their plan).")
@_json_option
def verify(onnx: Path, pattern: str | None, json: bool) -> None:
    """Check any ONNX file by itself: N:M along K on the stored integers, scales, zero points, Q/DQ pairs. Exit 3 on problems."""
    from nxm_export.verify import verify as verify_graph

    report = verify_graph(onnx, pattern=_pattern(pattern) if pattern else None)

    def show_rows(_: Any) -> None:
        columns = ("weight", "op", "K x N", "stored", "scales", "zeros", "N:M", "planned")
        rows = [
            (
                weight.name.removesuffix(".weight"),
                weight.op,
                f"{weight.k}x{weight.n}",
                weight.stored,
                f"per {weight.scale_axis}" if weight.scale_axis else "none",
                f"{weight.zeros:.1%}",
                weight.pattern or "dense",
                weight.planned or "",
            )
            for weight in report.weights
        ]
        print_table(str(onnx), columns, rows)
        found = [
            f"{weight.name}: {problem}" for weight in report.weights for problem in weight.problems
        ] + report.problems
        for problem in found:
            click.echo(f"problem: {problem}")
        click.echo(
            f"{len(report.weights)} weights, {report.quantize_nodes} Q and {report.dequantize_nodes} DQ nodes: "
            f"{f'{len(found)} problems' if found else 'no problem found'}"
        )

    _print(report.to_dict(), json, show_rows)
    if not report.passed:
        sys.exit(3)


@main.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--backend", default="ort", show_default=True, help="ort, trt or trt_rtx.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Engine directory.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of an ort engine.  [default: all cores]")
@click.option(
    "--profile",
    "profiles",
    multiple=True,
    metavar="SHAPES",
    help="Shapes to tune for: 8x128, or 1x1,8x128,32x512 as minimum, optimum, maximum; may be repeated.",
)
@click.option("--lengths", metavar="FILE", help="Choose the profiles from the token lengths of this data file.")
@click.option(
    "--max-profiles",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="At most this many, with --lengths.",
)
@click.option("--sparse/--no-sparse", default=True, show_default=True, help="Let the builder use 2:4 kernels.")
@click.option("--level", type=click.IntRange(0, 5), help="Builder optimization level.  [default: TensorRT's]")
@click.option(
    "--workspace", type=click.IntRange(min=1), metavar="MIB", help="Limit of scratch memory.  [default: TensorRT's]"
)
@click.option(
    "--timing-cache", type=click.Path(path_type=Path), help="Read this timing cache, too.  [default: the engine's own]"
)
@click.option(
    "--build-route", metavar="OPTIONS", help="Passed to TensorRT 11.1 and later, if it lists each option as public."
)
@click.option(
    "--twins", is_flag=True, help="SOURCE is a checkpoint: build its FP16, dense INT8 and sparse INT8 engines."
)
@click.option(
    "--lowering",
    type=click.Choice(["matmul", "gemm", "conv1x1"]),
    default="matmul",
    help="Of linear layers, with --twins.",
)
@click.option("--target", help="Graph target, with --twins.  [default: trt; trt8 for TensorRT 8.6]")
@_json_option
def build(source: Path, backend: str, out: Path, json: bool, **options: Any) -> None:
    """Build an engine directory from an ONNX graph (or, with --twins, three from a checkpoint)."""
    from engines.base import BuildOptions
    from engines.profiles import parse_profile
    from nxm_export.pipeline import build_engine

    if options["threads"] and backend != "ort":
        raise click.UsageError(f"--threads is for ort engines; {backend} has no use for it")
    if options["lengths"] and options["profiles"]:
        raise click.UsageError("--lengths and --profile are two ways to say the same; give one of them")
    cache = options["timing_cache"]
    if cache is not None and not cache.is_file():
        raise click.BadParameter(f"{cache}: no such file", param_hint="--timing-cache")
    with progress_bars(enabled=not json) as progress:
        settings = BuildOptions(
            threads=options["threads"],
            profiles=[parse_profile(text) for text in options["profiles"]],
            sparse=options["sparse"],
            level=options["level"],
            workspace_bytes=options["workspace"] * 2**20 if options["workspace"] else None,
            build_route=options["build_route"],
            timing_cache=cache,
            require_timing_cache=cache is not None,
            progress=progress,
        )
        result = build_engine(
            source, out, backend, settings, lengths=options["lengths"], profiles=options["max_profiles"], twins=options["twins"],
            export_options={"target": options["target"] or "trt", "lowering": options["lowering"]},
        )  # fmt: skip
    _print({**result, "path": str(out)}, json, lambda facts: print_facts("built", facts))


@main.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--twin", type=click.Path(path_type=Path), help="The dense twin's engine directory: what sparsity saves.")
@click.option(
    "--kernels", type=click.Path(path_type=Path), help="Names of kernels that ran, one a line, from any profiler."
)
@click.option("--measure", is_flag=True, help="Time every layer now (needs the GPU).")
@click.option(
    "--require-sparse",
    metavar="SHARE",
    help="Exit 3 unless this share (60%) of the planned-sparse weights provably runs sparse.",
)
@_json_option
def inspect(
    path: Path, twin: Path | None, kernels: Path | None, measure: bool, require_sparse: str | None, json: bool
) -> None:
    """Print the facts of an ONNX graph, an engine directory or a run; for TensorRT, which weights run sparse and why not."""
    from nxm_export import pipeline

    share = None if require_sparse is None else _share(require_sparse)
    result = pipeline.inspect_path(path, twin=twin, kernels=kernels, measure=measure)
    _print(result, json, lambda facts: _show_facts(str(path), facts))
    if share is not None:
        pipeline.require_sparse(path, share, twin=twin, kernels=kernels)


@main.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("engines", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--data", required=True, metavar="FILE", help="Labelled samples to compare on.")
@click.option("--text")
@click.option("--text-pair")
@click.option("--label")
@_json_option
def compare(
    checkpoint: Path,
    engines: tuple[Path, ...],
    data: str,
    text: str | None,
    text_pair: str | None,
    label: str | None,
    json: bool,
) -> None:
    """Compare ENGINES with the CHECKPOINT they were made from, on real samples. Exit 3 when one differs."""
    from nxm_export.pipeline import compare_engines

    reports = compare_engines(checkpoint, engines, data, _columns(text, text_pair, label))

    def show_rows(_: Any) -> None:
        for report in reports:
            low, high = report.engine_interval
            metric = f"{report.engine_value:.4f} ({low:.4f} to {high:.4f})"
            for output in report.outputs:
                rows = [
                    ("largest |difference|", f"{output.max_abs:.4g}", f"at most {output.max_tolerance:.4g}"),
                    ("mean |difference|", f"{output.mean_abs:.4g}", f"at most {output.mean_tolerance:.4g}"),
                    ("equal samples", f"{output.quiet:.1%}", f"at least {output.quiet_required:.1%}"),
                    ("cosine", f"{output.cosine:.8f}", ""),
                    ("equal argmax", f"{output.agreement:.2%}", ""),
                    ("classes changed beyond the tolerance", output.unexcused_flips, "none"),
                    ("worst sample", output.worst_sample, ""),
                    (
                        f"{report.metric} of the engine, 95 % interval",
                        metric,
                        f"checkpoint {report.reference_value:.4f}",
                    ),
                    ("verdict", "pass" if output.passed else "FAIL", ""),
                ]
                title = (
                    f"{report.engine}: {output.output} of {report.samples} samples against the checkpoint in PyTorch"
                )
                print_table(title, ("what", "found", "required"), rows)
            click.echo(f"tolerance: {report.reason}")

    _print([report.to_dict() for report in reports], json, show_rows)
    for report in reports:
        report.require()


@main.command()
@click.argument("engines", type=click.Path(path_type=Path), nargs=-1)
@click.option(
    "--shape",
    "shapes",
    multiple=True,
    default=("1x32", "8x64"),
    show_default=True,
    help="batch x sequence; may be repeated.",
)
@click.option("--rounds", type=click.IntRange(min=1), help="[default: 30; 3 with --serve]")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: as built]")
@click.option("--serve", "urls", multiple=True, metavar="URL", help="Load running servers instead; may be repeated.")
@click.option("--model", help="With --serve: the model's name there.")
@click.option(
    "--data", metavar="FILE", help="With --serve: sentences to send, as tokens of ENGINES' tokenizer, else as text."
)
@click.option(
    "--clients", default="1,8,32", show_default=True, metavar="N,N,...", help="With --serve: clients at once."
)
@click.option(
    "--seconds", type=click.FloatRange(min=0.1), default=5.0, show_default=True, help="With --serve: of a round."
)
@click.option(
    "--encoding",
    type=click.Choice(["binary", "json"]),
    default="binary",
    show_default=True,
    help="With --serve: of tokens.",
)
@_json_option
def bench(
    engines: tuple[Path, ...], shapes: tuple[str, ...], rounds: int, threads: int | None, json: bool, **load: Any
) -> None:
    """Time ENGINES interleaved (speed-ups are against the first), or load running servers with --serve."""
    if load["urls"]:
        _bench_servers(engines, rounds or 3, json, **load)
        return
    if not engines:
        raise click.UsageError("missing ENGINES (or --serve URL)")
    from nxm_export.pipeline import bench_engines

    report = bench_engines(engines, [_shape(text) for text in shapes], rounds or 30, threads)

    def show_rows(_: Any) -> None:
        speed = {(ratio.name, ratio.batch, ratio.sequence): ratio for ratio in report.ratios}
        rows = []
        for timing in report.timings:
            ratio = speed.get((timing.name, timing.batch, timing.sequence))
            note = (
                f"{ratio.speedup:.2f}x ({ratio.interval[0]:.2f} to {ratio.interval[1]:.2f})" if ratio else "reference"
            )
            rows.append(
                (
                    timing.name,
                    f"{timing.batch}x{timing.sequence}",
                    timing.median,
                    f"{timing.quartiles[0]:.3g} to {timing.quartiles[1]:.3g}",
                    note,
                )
            )
        print_table("latency, milliseconds", ("engine", "batch x sequence", "median", "middle half", "speed"), rows)
        click.echo(f"clock: {report.timings[0].clock}")
        for missing in report.unmeasured:
            click.echo(f"not measured: {missing}")
        if report.verdict:
            click.echo(f"verdict: {report.verdict}")

    _print(report.to_dict(), json, show_rows)


@main.command()
@click.argument("engines", metavar="[NAME[:VERSION]=]ENGINE_DIR...", nargs=-1, required=True)
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option("--allow-remote", is_flag=True, help="Listen beyond this machine. There is no authentication.")
@click.option("--text", is_flag=True, help="Serve NAME_text, too: sentences in, class names out.")
@click.option(
    "--instances", type=click.IntRange(min=1), help="Copies of each engine.  [default: CPU cores; 1 on a GPU]"
)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of each copy.  [default: cores / instances]")
@click.option("--max-batch", type=click.IntRange(min=1), default=32, show_default=True, help="Rows of a request.")
@click.option(
    "--merge",
    type=click.IntRange(min=1),
    help="Rows of different requests in a batch.  [default: 4 on a CPU, else --max-batch]",
)
@click.option("--max-delay-ms", type=click.FloatRange(min=0), default=0.0, show_default=True, help="Wait for company.")
@click.option(
    "--buckets", metavar="N,N,...", help="Lengths that requests are padded to.  [default: steps of an eighth]"
)
@click.option("--max-queue", type=click.IntRange(min=1), default=512, show_default=True, help="Rows that may wait.")
@click.option("--timeout-ms", type=click.FloatRange(min=1), default=10000.0, show_default=True, help="Deadline.")
@click.option("--max-body-mb", type=click.FloatRange(min=0.001), default=4.0, show_default=True)
@click.option("--max-connections", type=click.IntRange(min=1), default=512, show_default=True)
@click.option(
    "--read-timeout-ms",
    type=click.FloatRange(min=1),
    default=10000.0,
    show_default=True,
    help="For a request to arrive.",
)
@click.option(
    "--gate",
    type=click.Choice(["not-failed", "passed", "off"]),
    default="not-failed",
    show_default=True,
    help="Which parity.json an engine must have.",
)
@click.option(
    "--expect-sha256", multiple=True, metavar="HEX", help="Serve only engines of these hashes; may be repeated."
)
@click.option(
    "--watch-seconds",
    type=click.FloatRange(min=0),
    default=2.0,
    show_default=True,
    help="Look for changed engines; 0 never.",
)
@click.option(
    "--drain-seconds", type=click.FloatRange(min=0), default=30.0, show_default=True, help="How long SIGTERM may take."
)
@click.option("--access-log", is_flag=True, help="Log every inference request.")
def serve(engines: tuple[str, ...], **options: Any) -> None:
    """Serve ENGINE_DIRs over HTTP (Open Inference Protocol v2: tritonclient and KServe clients work) until SIGTERM."""
    from engines.serving.app import RequestLimits
    from engines.serving.connection import ConnectionLimits
    from engines.serving.model import ModelOptions
    from engines.serving.repository import Source
    from engines.serving.server import ServerOptions
    from engines.serving.server import serve as serve_engines

    serve_engines(
        [Source.parse(text) for text in engines],
        ModelOptions(
            instances=options["instances"],
            threads=options["threads"],
            max_batch=options["max_batch"],
            lengths=_numbers(options["buckets"], "--buckets", "lengths") if options["buckets"] else None,
            merge=options["merge"],
            max_queue=options["max_queue"],
            max_delay=options["max_delay_ms"] / 1e3,
            text=options["text"],
            gate=options["gate"],
            expect_sha256=frozenset(digest.lower() for digest in options["expect_sha256"]),
        ),
        ServerOptions(
            host=options["host"],
            port=options["port"],
            allow_remote=options["allow_remote"],
            drain=options["drain_seconds"],
            watch=options["watch_seconds"],
            access_log=options["access_log"],
            requests=RequestLimits(int(options["max_body_mb"] * 2**20), options["timeout_ms"] / 1e3),
            connections=ConnectionLimits(options["max_connections"], options["read_timeout_ms"] / 1e3),
        ),
    )


@main.command()
@click.argument("engines", metavar="[NAME=]ENGINE_DIR...", nargs=-1, required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Model repository to write.")
@click.option("--text", is_flag=True, help="Add NAME_text: sentences in, class names out.")
@click.option("--text-pair", is_flag=True, help="The same for models of two sentences.")
@click.option("--kind", type=click.Choice(["cpu", "gpu"]), help="Where instances run.  [default: as built]")
@click.option("--instances", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of an ONNX Runtime instance.")
@click.option("--max-batch", type=click.IntRange(min=1), default=32, show_default=True, help="Rows of a batch.")
@click.option("--image", help="Triton container.  [default: the release that the tests run]")
@click.option(
    "--container-tensorrt", metavar="X.Y.Z", help="TensorRT in that container; refuse engines that need another."
)
@_json_option
def triton(engines: tuple[str, ...], out: Path, json: bool, **options: Any) -> None:
    """Write a Triton model repository from ENGINE_DIRs; several of one NAME are one model for several GPUs."""
    from engines.serving.repository import Source
    from engines.triton import TritonOptions, export_repository
    from engines.triton.deploy import DEFAULT_IMAGE

    manifest = export_repository(
        [Source.parse(text) for text in engines],
        out,
        TritonOptions(
            text=options["text"] or options["text_pair"],
            pair=options["text_pair"],
            kind=options["kind"],
            instances=options["instances"],
            threads=options["threads"],
            max_batch=options["max_batch"],
            image=options["image"] or DEFAULT_IMAGE,
            tensorrt=options["container_tensorrt"],
        ),
    )
    _print(manifest, json, lambda facts: print_table(str(out), ("file", "sha256"), list(facts["files"].items())))


@main.command()
@click.argument("file", type=click.Path(path_type=Path), required=False)
@click.option(
    "--backend", type=click.Choice(["trt", "trt_rtx"]), default="trt", show_default=True, help="Judge FILE for it."
)
@click.option("--version", "trt_version", default="11.4", show_default=True, help="Its version.")
@click.option(
    "--gpu",
    default="8.9",
    show_default=True,
    metavar="CAPABILITY",
    help="Compute capability, as 8.0 (A100), 8.9 (L4), 9.0 (H100).",
)
@_json_option
def doctor(file: Path | None, backend: str, trt_version: str, gpu: str, json: bool) -> None:
    """Say what this machine can build and run; with FILE (any ONNX), which of its matrices can run sparse, and what to fix."""
    if file is None:
        from nxm_export.machine import report

        _print(report(), json, lambda facts: print_facts("this machine", facts))
        return
    from nxm_export.pipeline import doctor_file

    _print(doctor_file(file, backend, trt_version, gpu), json, lambda facts: _show_facts(str(file), facts))


@main.command("report")
@click.argument("run_directory", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="The page.  [default: RUN_DIRECTORY/report.html]")
@click.option(
    "--search", type=click.Path(path_type=Path), help="An `nxm search` to show, too.  [default: the run's own]"
)
@_json_option
def report_page(run_directory: Path, out: Path | None, search: Path | None, json: bool) -> None:
    """Write one HTML page of a run, finished or not: verdicts, plots, every matrix, provenance; needs no network to read."""
    from nxm_export.report import report

    path = report(run_directory, out, search=search)
    _print({"path": str(path), "bytes": path.stat().st_size}, json, lambda facts: click.echo(facts["path"]))


@main.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The model card, as in README.md.")
@_json_option
def card(path: Path, out: Path, json: bool) -> None:
    """Write a Hugging Face model card of an engine directory or a run at PATH, every number from its files."""
    from nxm_export.report import card as write_card

    written = write_card(path, out)
    _print({"path": str(written), "bytes": written.stat().st_size}, json, lambda facts: click.echo(facts["path"]))


@main.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script of SHELL; put it where that shell looks, or eval it."""
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(main, {}, "nxm", "_NXM_COMPLETE").source())


def _print(result: Any, json: bool, show_result: Callable[[Any], None]) -> None:
    if int(os.environ.get("RANK", "0")):
        return  # under torchrun the first process prints
    if json:
        click.echo(json_text(result), nl=False)
    else:
        show_result(result)


def _show_facts(title: str, facts: dict[str, Any]) -> None:
    """Facts as tables: one for the weights, one for advice, one for the rest."""
    engines = facts.get("engines")
    if isinstance(engines, dict):
        for name, engine in engines.items():
            _show_facts(f"{title}: {name}", engine)
        return
    rest = [(key, value) for key, value in facts.items() if key not in ("weights", "advice", "passport", "schema")]
    print_table(title, ("what", "value"), rest)
    if "weights" in facts:
        columns = ("weight", "K x N", "planned", "float > INT8", "eligible", "sparse", "kernel", "saved ms", "why not")
        table: list[Any] = [
            (
                row["name"].removesuffix(".weight"),
                f"{row['k']}x{row['n']} {row['form']}",
                row["planned"] or "-",
                f"{row['pattern_float'] or 'dense'} > {row['pattern_int8'] or 'dense'}",
                _known(row["eligible"]),
                _known(row["chosen"]),
                (row["kernel"] or "-").split("_tilesize")[0],
                "-" if row["saved_ms"] is None else f"{row['saved_ms']:.4f}",
                row["reason"] or "-",
            )
            for row in facts["weights"]
        ]
        print_table("weights", columns, table)
        for reason, detail in {row["reason"]: row["detail"] for row in facts["weights"] if row["reason"]}.items():
            click.echo(f"{reason}: {detail}")
    if facts.get("advice"):
        table = [
            (entry["name"], "ready" if entry["ready"] else "yes" if entry["one_fix_away"] else "no", entry["advice"])
            for entry in facts["advice"]
        ]
        print_table("advice", ("weight", "one fix away", "what to do"), table)


def _known(value: bool | None) -> str:
    return "unknown" if value is None else "yes" if value else "no"


def _share(text: str) -> float:
    number = text.strip().removesuffix("%")
    try:
        value = float(number) / (100.0 if "%" in text else 1.0)
    except ValueError:
        value = -1.0
    if not 0.0 < value <= 1.0:
        raise click.BadParameter(f"{text!r} is not a share; write 60% or 0.6", param_hint="--require-sparse")
    return value


def _columns(text: str | None, pair: str | None, label: str | None) -> Any:
    from nxm_export.data import Columns

    return Columns(text, pair, label)


def _shape(text: str) -> tuple[int, int]:
    batch, separator, sequence = text.lower().partition("x")
    if not separator or not batch.isdecimal() or not sequence.isdecimal() or not int(batch) or not int(sequence):
        raise click.BadParameter(f"{text!r} is not a shape; write batch x sequence, as in 8x128", param_hint="--shape")
    return int(batch), int(sequence)


def _pattern(text: str) -> NMPattern:
    try:
        return NMPattern.parse(text)
    except PlanError as error:
        raise click.BadParameter(str(error), param_hint="--pattern") from error


def _numbers(text: str, option: str, what: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) for part in parts):
        raise click.BadParameter(f"{text!r} are no {what}; write them as in 8,16,32", param_hint=option)
    return tuple(int(part) for part in parts)


def _bench_servers(
    engines: tuple[Path, ...], rounds: int, json: bool, *, urls: tuple[str, ...], model: str | None, data: str | None,
    clients: str, seconds: float, encoding: str,
) -> None:  # fmt: skip
    from nxm_export.pipeline import load_servers

    if not model or not data or len(engines) > 1:
        raise click.UsageError("--serve needs --model and --data, and at most one engine directory (for its tokenizer)")
    numbers = _numbers(clients, "--clients", "numbers of clients")
    report = load_servers(urls, model, data, engines[0] if engines else None, numbers, seconds, rounds, encoding)
    columns = ("server", "clients", "answers a second", "lowest to highest", "p50 ms", "p99 ms", "errors")
    rows = [
        (
            found.name,
            found.clients,
            f"{found.throughput:.1f}",
            f"{found.throughput_range[0]:.1f} to {found.throughput_range[1]:.1f}",
            f"{found.p50:.2f}",
            f"{found.p99:.2f}",
            ", ".join(f"{count} x {kind}" for kind, count in found.errors.items()) or "none",
        )
        for found in report.results
    ]
    _print(report.to_dict(), json, lambda _: print_table(f"load on {model}, medians of {rounds} rounds", columns, rows))


def _spec(pattern: str, bits: str) -> WeightSpec:
    if bits != "none" and not (bits.isascii() and bits.isdecimal() and 2 <= int(bits) <= 8):
        raise click.BadParameter(
            f"{bits!r} is neither a number of bits from 2 to 8 nor 'none'", param_hint="--weight-bits"
        )
    found = WeightSpec(
        None if pattern == "none" else _pattern(pattern),
        None if bits == "none" else int(bits),
        None if bits == "none" else 8,
    )
    if found.is_dense:
        raise click.UsageError("--pattern none and --weight-bits none leave nothing to compress")
    return found


def _request(model: str, options: dict[str, Any], **changes: Any) -> Any:
    from compressors.settings import Settings
    from nxm_export.pipeline import Request

    settings = {
        key: options[key]
        for key in (
            "recipe", "admm", "epochs", "steps", "dense_epochs", "dense_steps", "learning_rate", "dense_learning_rate", "batch_size",
            "max_length", "distill", "precision", "seed", "threads", "gelu",
        )
    }  # fmt: skip
    placement = options["placement"] if options["weight_bits"] != "none" else "inputs"
    return Request(
        model=model,
        task=options["task"],
        train=changes.get("train", options["train"]),
        dev=changes.get("dev", options["dev"]),
        spec=_spec(options["pattern"], options["weight_bits"]),
        settings=Settings(
            **{**settings, "freeze_embeddings": not options["train_embeddings"], **changes.get("settings", {})}
        ),
        columns=_columns(options["text"], options["text_pair"], options["label"]),
        placement=placement,
        residual=options["residual"] if options["weight_bits"] != "none" else "float",
        keep_dense=options["keep_dense"],
        revision=options["revision"],
        train_limit=options["train_limit"],
    )


def _demo_request(out: Path, options: dict[str, Any], scratch: str | None) -> Any:
    """The demo's request; its data go into the run, or into `scratch`. Options that were given win over the demo's own."""
    from nxm_export import demo
    from nxm_export.run_dir import RunDir

    model, data = demo.model_directory(), Path(scratch or out / "data")
    if scratch:
        demo.write_data(data)
    else:
        RunDir(out).stage("data", "data", demo.write_data)
    context = click.get_current_context()
    defaults = {**demo.STEPS, "max_length": demo.MAX_LENGTH}
    same = {"steps": ("steps", "epochs"), "dense_steps": ("dense_steps", "dense_epochs"), "max_length": ("max_length",)}
    chosen = {
        name: value
        for name, value in defaults.items()
        if all(context.get_parameter_source(option) is not ParameterSource.COMMANDLINE for option in same[name])
    }
    settings = {**chosen, "dense_freeze_embeddings": True}
    return _request(str(model), options, train=str(data / "train.tsv"), dev=str(data / "dev.tsv"), settings=settings)
