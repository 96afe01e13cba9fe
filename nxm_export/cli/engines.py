"""Commands that look at engines: inspect, compare, doctor."""

from __future__ import annotations

from pathlib import Path

import click

from nxm_export.cli import first_lines
from nxm_export.cli.engine_tables import (
    print_inspection,
    print_machine,
)
from nxm_export.cli.gain import asks_for_gain, show_gain
from nxm_export.cli.group import command
from nxm_export.cli.options import (
    LABELLED_COLUMN_OPTIONS,
    all_option,
    columns_of,
    given_options,
    json_option,
)
from nxm_export.cli.output import print_next, quoted, serving_of, show_result
from nxm_export.cli.parity_tables import print_bisects, print_comparison
from nxm_export.cli.sparsity_tables import print_diagnosis
from nxm_export.contract.choices import (
    COMPUTE_CAPABILITY,
    TENSORRT_BACKENDS,
    TENSORRT_VERSIONS,
)
from nxm_export.contract.origin import recorded_checkpoint
from nxm_export.contract.plain_numbers import real_number
from nxm_export.errors import EngineError, NxmError


@command("nxm inspect engine", "nxm inspect twins --require-sparse 60% --json")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--twin", type=click.Path(path_type=Path), help="The dense twin's engine directory: what sparsity saves.")
@click.option(
    "--kernels", type=click.Path(path_type=Path), help="Names of kernels that ran, one a line, from any profiler."
)
@click.option("--measure", is_flag=True, help="Time every layer, or profile kernels, now (needs the GPU).")
@click.option(
    "--require-sparse",
    metavar="SHARE",
    help="Exit 3 unless this share (60%) of the planned-sparse weights provably runs sparse.",
)
@all_option
@json_option
def inspect(
    path: Path, measure: bool, require_sparse: str | None, everything: bool, json: bool, **evidence: Path | None
) -> None:
    """Say what a graph, engine or run holds, and what runs sparse.

    PATH is one of those, a checkpoint, or an ONNX file. Which matrices run sparse is known of engines on a GPU.
    """
    from nxm_export.pipeline.engine_sparsity import require_sparse as require_share
    from nxm_export.pipeline.inspection import inspect_path

    share = None if require_sparse is None else _share(require_sparse)
    twin, kernels = evidence["twin"], evidence["kernels"]
    facts = inspect_path(path, twin=twin, kernels=kernels, measure=measure)
    show_result(facts.to_dict, json, lambda: print_inspection(str(path), facts, everything))
    if share is not None:
        require_share(path, share, twin=twin, kernels=kernels)


@command(
    "nxm compare engine --checkpoint checkpoint --data dev.tsv",
    "nxm compare engine --data dev.tsv --gate 'drop<=0.5' --gate 'flips<=0.5%'",
)
@click.argument("engines", metavar="ENGINE...", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--data", required=True, metavar="FILE", help="Labelled samples to compare on.")
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    help="Compare with this one.  [default: the one that the first ENGINE records]",
)
@LABELLED_COLUMN_OPTIONS
@click.option(
    "--gate",
    "gates",
    multiple=True,
    metavar="GATE",
    help="Exit 3 unless it holds: 'drop<=0.5' (metric points), 'drop(mcc)<=0.5' (of another metric), 'flips<=0.5%', "
    "'max_abs<=0.1', 'cosine>=0.99' (embeddings) or 'embedding_table<=0.5' (an INT8 embedding table); may be repeated.",
)
@click.option("--bisect", is_flag=True, help="Find the first encoder block that differs from the checkpoint.")
@all_option
@json_option
def compare(
    engines: tuple[Path, ...],
    data: str,
    checkpoint: Path | None,
    gates: tuple[str, ...],
    bisect: bool,
    everything: bool,
    json: bool,
    **columns: str | None,
) -> None:
    """Compare engines with their checkpoint, on real samples.

    ENGINEs are compared with the checkpoint that they were made from, and with each other.

    Exits with 3 when one differs, a probe fails or a gate does not hold, and with 1 when one fails as it runs. An
    engine that cannot run here (its runtime or GPU is missing) is skipped with the reason; that fails the command only
    with --gate (3), or when no engine is left (1). With --bisect, block by block; exits with 3 when a block parts.
    """
    from engines.parity.gates import parse_gate
    from nxm_export.pipeline.engine_comparison import bisect_engines, compare_engines

    for gate in gates:
        try:
            parse_gate(gate)
        except NxmError as error:
            raise click.BadParameter(str(error), param_hint="--gate") from error
    if bisect and gates:
        raise click.UsageError("--bisect compares blocks, and --gate whole engines; give one of them")
    if len({engine.resolve() for engine in engines}) < len(engines):
        raise click.UsageError("the same engine is given twice")
    for engine in engines:
        if (engine / "config.json").is_file():
            raise click.UsageError(f"{engine} is a model, not an engine directory; name it by --checkpoint")
    if checkpoint is None:
        checkpoint = recorded_checkpoint(engines[0])
        click.echo(f"the checkpoint is {checkpoint}, which {engines[0]} records", err=True)
    named = columns_of(columns["text"], columns["text_pair"], columns["label"], columns["label_map"])
    if bisect:
        reports = bisect_engines(checkpoint, engines, data, named)
        show_result(lambda: [report.to_dict() for report in reports], json, lambda: print_bisects(reports))
        if not json:
            print_next(f"nxm inspect {quoted(engines[0])}")
        for report in reports:
            report.require()
        return
    comparison = compare_engines(checkpoint, engines, data, named, gates)
    show_result(comparison.to_list, json, lambda: print_comparison(comparison, everything))
    if not json:
        parts = f"nxm compare {quoted(engines[0])} --checkpoint {quoted(checkpoint)} --data {quoted(data)} --bisect"
        print_next(*(serving_of(engines) if comparison.passed else (parts,)))
    comparison.require()


@command("nxm doctor anybodys.onnx --gpu L4 --version 10.3", "nxm doctor my-model --gpu L4 --shape 32x128")
@click.argument("file", metavar="[PATH]", type=click.Path(path_type=Path), required=False)
@click.option(
    "--backend",
    type=click.Choice(TENSORRT_BACKENDS),
    default=TENSORRT_BACKENDS[0],
    show_default=True,
    help="Judge PATH for it.",
)
@click.option(
    "--version",
    "trt_version",
    help="Its version, such as 8.6 or 10.3; 10 is 10.0.  [default: "
    f"{', '.join(f'{version} for {name}' for name, version in TENSORRT_VERSIONS.items())}]",
)
@click.option(
    "--gpu",
    default=COMPUTE_CAPABILITY,
    show_default=True,
    metavar="GPU",
    help="Its compute capability or name: 8.9, 89, sm_89, L4, 'RTX 4090'.",
)
@click.option("--parse", is_flag=True, help="Ask the parser of the installed TensorRT-RTX, too.")
@click.option(
    "--shape",
    metavar="BATCHxLENGTH",
    help="Say what 2:4 can gain at this shape, such as 32x128, on a --gpu by name (or cpu).  [default: 32x128 for a "
    "model]",
)
@all_option
@json_option
def doctor(
    file: Path | None, backend: str, trt_version: str | None, gpu: str, parse: bool, json: bool, **more: object
) -> None:
    """Say what this machine can do, or what of a graph can run sparse.

    PATH is any ONNX file, or a graph directory: for each matrix it says what to fix. With --shape, or for the directory
    of a Hugging Face model (its config.json is enough): what 2:4 can gain at most on a GPU, by arithmetic.
    """
    everything, shape = bool(more["everything"]), None if more["shape"] is None else str(more["shape"])
    if file is not None and asks_for_gain(file, shape):
        show_gain(file, shape, gpu, backend, trt_version, parse=parse, json=json)
        return
    if shape is not None:
        raise click.UsageError("--shape needs PATH: the directory of a model, or an ONNX file")
    if file is None:
        if given := given_options(("backend", "trt_version", "gpu", "parse")):
            raise click.UsageError(f"{given[0]} needs PATH: without one this machine is looked at")
        from nxm_export.pipeline.environment import report

        machine = report()

        def show() -> None:
            click.echo(f"{first_lines.of_machine(machine)}\n")
            print_machine(machine.to_dict(), everything)

        show_result(machine.to_dict, json, show)
        if not json:
            print_next("nxm init my-model", "then nxm run --config nxm.toml")
        return
    from engines.sparsity.targets import sparsity_target
    from nxm_export.pipeline.file_diagnosis import diagnose_file

    try:
        sparsity_target(backend, trt_version, gpu)
    except EngineError as error:
        raise click.UsageError(str(error)) from error
    diagnosis = diagnose_file(file, backend, trt_version, gpu, parse=parse)
    show_result(diagnosis.to_dict, json, lambda: print_diagnosis(diagnosis, everything))


def _share(text: str) -> float:
    number = real_number(text.strip().removesuffix("%"))
    value = None if number is None else number / (100.0 if "%" in text else 1.0)
    if value is None or not 0.0 < value <= 1.0:
        raise click.BadParameter(f"{text!r:.80} is not a share; write 60% or 0.6", param_hint="--require-sparse")
    return value
