"""The command line ``nxm``: one thin command per stage. Parse, one call, print.

stdout is the result, stderr the progress; ``--json`` prints the result for machines. Exit codes: 0 done, 1 an error that
says what to do, 2 wrong usage, 3 a gate failed. Heavy imports stand inside the commands, so that ``--help`` is instant.
"""

from __future__ import annotations

import json as json_
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from nxm_export import __version__
from nxm_export.errors import NxmError, PlanError
from nxm_export.families import TASKS
from nxm_export.plan import PLACEMENTS, NMPattern, WeightSpec
from nxm_export.terminal import print_summary, print_table, progress_bars


class _Group(click.Group):
    """Turns our errors into one line and an exit code; anything else is a bug and keeps its traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except NxmError as error:
            click.echo(f"nxm: {error}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("nxm: interrupted; run the same command again to go on from here", err=True)
            ctx.exit(130)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="nxm")
def main() -> None:
    """Compress BERT-family encoders to N:M sparsity and low-bit integers; export, build, prove and run them."""


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
        help="Activation quantizers.",
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
    click.option("--recipe", type=click.Choice(["nxm", "magnitude", "paper"]), default="nxm", show_default=True),
    click.option(
        "--admm",
        type=click.Choice(["mask", "joint", "joint-ste"]),
        default="mask",
        show_default=True,
        help="ADMM's constraint set.",
    ),
    click.option(
        "--epochs", type=float, default=6.0, show_default=True, help="Epochs of compression, all phases together."
    ),
    click.option("--steps", type=click.IntRange(min=1), help="Optimizer steps of compression; wins over --epochs."),
    click.option(
        "--dense-epochs",
        type=float,
        default=3.0,
        show_default=True,
        help="Epochs of dense fine-tuning, where it is needed.",
    ),
    click.option(
        "--dense-steps",
        type=click.IntRange(min=1),
        help="Optimizer steps of dense fine-tuning; wins over --dense-epochs.",
    ),
    click.option("--learning-rate", type=float, default=1e-4, show_default=True, help="Of compression."),
    click.option("--dense-learning-rate", type=float, default=5e-5, show_default=True),
    click.option(
        "--batch-size", type=click.IntRange(min=1), default=32, show_default=True, help="Samples per optimizer step."
    ),
    click.option(
        "--max-length", type=click.IntRange(min=2), help="Longest input in tokens.  [default: what the model allows]"
    ),
    click.option("--distill/--no-distill", default=True, show_default=True, help="Learn from the dense model."),
    click.option("--train-embeddings", is_flag=True, help="Train embedding tables during compression, too."),
    click.option(
        "--precision",
        type=click.Choice(["auto", "fp32", "bf16"]),
        default="auto",
        show_default=True,
        help="Of training.",
    ),
    click.option("--seed", type=int, default=0, show_default=True),
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
    """Compress, export, build, compare and time a model, into one run directory; up-to-date stages are skipped."""
    from nxm_export.pipeline import run as run_all

    if demo:
        out = out or Path("runs/demo")
        request = _demo_request(out, options)
    else:
        missing = [
            name
            for name, value in (
                ("--model", model),
                ("--train", options["train"]),
                ("--dev", options["dev"]),
                ("--out", out),
            )
            if not value
        ]
        if missing:
            raise click.UsageError(f"missing {', '.join(missing)} (or use --demo)")
        request = _request(str(model), options)
    assert out is not None
    if dry_run:
        from nxm_export.estimate import estimate

        _print(
            estimate(request),
            json,
            lambda result: print_table("what `nxm run` would do", ("stage", "estimate"), list(result.items())),
        )
        return
    with progress_bars(enabled=not json) as progress:
        summary = run_all(request, out, progress=progress)
    _print(summary, json, print_summary)


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
    with progress_bars(enabled=not json) as progress:
        metrics = compress_model(_request(model, options), out, plan_file=plan_file, progress=progress)
    _print(metrics, json, lambda result: print_table(str(out), ("what", "value"), list(result.items())))


@main.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--target", default="cpu", show_default=True, help="cpu (FP32 graph) or trt (FP16 graph, opset 21).")
@click.option(
    "--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="Of the graph.  [default: the target's]"
)
@click.option("--placement", type=click.Choice(PLACEMENTS), help="[default: inputs for cpu, inputs-outputs for trt]")
@click.option("--task", type=click.Choice(list(TASKS)), help="[default: what the checkpoint's head says]")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Directory of the graph.")
@_json_option
def export(
    checkpoint: Path, target: str, dtype: str | None, placement: str | None, task: str | None, out: Path, json: bool
) -> None:
    """Write CHECKPOINT as a Q/DQ ONNX graph (a float graph, for a checkpoint without plan)."""
    from nxm_export.export import export as export_graph

    done = export_graph(checkpoint, out, target=target, dtype=dtype, placement=placement, task=task)
    result = {
        "path": str(done.path),
        "bytes": done.bytes,
        "nodes": done.nodes,
        "scale_rounding": done.scale_rounding,
        "verified": done.report.passed,
    }
    _print(result, json, lambda facts: print_table("exported", ("what", "value"), list(facts.items())))


@main.command()
@click.argument("onnx", type=click.Path(path_type=Path))
@click.option("--pattern", help="Require this N:M of every quantized weight (files of ours carry their plan).")
@_json_option
def verify(onnx: Path, pattern: str | None, json: bool) -> None:
    """Check any ONNX file by itself: N:M along K on the stored integers, scales, zero points, Q/DQ pairs. Exit 3 on problems."""
    from nxm_export.verify import verify as verify_graph

    report = verify_graph(onnx, pattern=NMPattern.parse(pattern) if pattern else None)

    def show_rows(_: Any) -> None:
        columns = ("weight", "op", "K", "N", "stored", "scales", "zeros", "N:M found", "planned", "problems")
        rows = [
            (
                w.name,
                w.op,
                w.k,
                w.n,
                w.stored,
                w.scale_axis,
                f"{w.zeros:.1%}",
                w.pattern or "dense",
                w.planned,
                "; ".join(w.problems),
            )
            for w in report.weights
        ]
        print_table(str(onnx), columns, rows)
        for problem in report.problems:
            click.echo(f"problem: {problem}")
        click.echo(
            f"{len(report.weights)} weights, {report.quantize_nodes} Q and {report.dequantize_nodes} DQ nodes: {'ok' if report.passed else 'PROBLEMS'}"
        )

    _print(report.to_dict(), json, show_rows)
    if not report.passed:
        sys.exit(3)


@main.command()
@click.argument("onnx", type=click.Path(path_type=Path))
@click.option("--backend", default="ort", show_default=True, help="ort or trt_rtx.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Engine directory.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of an ort engine.  [default: all cores]")
@_json_option
def build(onnx: Path, backend: str, out: Path, threads: int | None, json: bool) -> None:
    """Build an engine directory from an ONNX graph."""
    from nxm_export.pipeline import build_engine

    result = build_engine(onnx, out, backend, threads)
    _print(result, json, lambda facts: print_table(str(out), ("what", "value"), list(facts.items())))


@main.command()
@click.argument("path", type=click.Path(path_type=Path))
@_json_option
def inspect(path: Path, json: bool) -> None:
    """Print the facts of an ONNX graph or an engine directory."""
    from nxm_export.pipeline import inspect_path

    _print(inspect_path(path), json, lambda facts: print_table(str(path), ("what", "value"), list(facts.items())))


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
        columns = (
            "engine",
            "output",
            "max |diff| (tolerated)",
            "mean |diff| (tolerated)",
            "equal argmax",
            "metric: engine / checkpoint",
            "verdict",
        )
        rows = [
            (
                report.engine,
                output.output,
                f"{output.max_abs:.4g} ({output.max_tolerance:.4g})",
                f"{output.mean_abs:.4g} ({output.mean_tolerance:.4g})",
                f"{output.agreement:.2%}",
                f"{report.metric} {report.engine_value:.4f} / {report.reference_value:.4f}",
                "pass" if output.passed else "FAIL",
            )
            for report in reports
            for output in report.outputs
        ]
        print_table(f"parity on {reports[0].samples} samples", columns, rows)
        for reason in dict.fromkeys(report.reason for report in reports):
            click.echo(f"tolerance: {reason}")

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
@_json_option
def doctor(json: bool) -> None:
    """Say what this machine can build and run, and what to install for the rest."""
    from nxm_export.machine import report

    _print(report(), json, lambda facts: print_table("this machine", ("what", "found"), list(facts.items())))


@main.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script of SHELL; put it where that shell looks, or eval it."""
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(main, {}, "nxm", "_NXM_COMPLETE").source())


def _print(result: Any, json: bool, show_result: Callable[[Any], None]) -> None:
    if json:
        click.echo(json_.dumps(result, indent=1, default=str))
    else:
        show_result(result)


def _columns(text: str | None, pair: str | None, label: str | None) -> Any:
    from nxm_export.data import Columns

    return Columns(text, pair, label)


def _shape(text: str) -> tuple[int, int]:
    batch, separator, sequence = text.lower().partition("x")
    if not separator or not batch.isdecimal() or not sequence.isdecimal() or not int(batch) or not int(sequence):
        raise click.BadParameter(f"{text!r} is not a shape; write batch x sequence, as in 8x128", param_hint="--shape")
    return int(batch), int(sequence)


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
    if bits != "none" and not bits.isdecimal():
        raise click.BadParameter(f"{bits!r} is not a number of bits, nor 'none'", param_hint="--weight-bits")
    found = WeightSpec(
        None if pattern == "none" else NMPattern.parse(pattern),
        None if bits == "none" else int(bits),
        None if bits == "none" else 8,
    )
    if found.is_dense:
        raise PlanError("--pattern none and --weight-bits none leave nothing to compress")
    return found


def _request(model: str, options: dict[str, Any], **changes: Any) -> Any:
    from compressors.compress import Settings
    from nxm_export.pipeline import Request

    settings = {
        key: options[key]
        for key in (
            "recipe", "admm", "epochs", "steps", "dense_epochs", "dense_steps", "learning_rate", "dense_learning_rate", "batch_size",
            "max_length", "distill", "precision", "seed", "threads",
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
        keep_dense=options["keep_dense"],
        revision=options["revision"],
        train_limit=options["train_limit"],
    )


def _demo_request(out: Path, options: dict[str, Any]) -> Any:
    from nxm_export import demo
    from nxm_export.run_dir import RunDir

    model = demo.model_directory()
    RunDir(out).stage("data", "data", demo.write_data)
    settings = {**demo.STEPS, "max_length": demo.MAX_LENGTH, "dense_freeze_embeddings": True}
    return _request(
        str(model), options, train=str(out / "data" / "train.tsv"), dev=str(out / "data" / "dev.tsv"), settings=settings
    )
