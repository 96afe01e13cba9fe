"""Commands on engines: build, inspect, compare, bench, doctor."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nxm_export.cli import first_lines
from nxm_export.cli.engine_tables import (
    print_built,
    print_choice,
    print_inspection,
    print_latency,
    print_load,
    print_machine,
    print_text_throughput,
)
from nxm_export.cli.gain import asks_for_gain, show_gain
from nxm_export.cli.group import command
from nxm_export.cli.options import (
    LABELLED_COLUMN_OPTIONS,
    Real,
    Whole,
    all_option,
    batch_tokens_option,
    columns_of,
    given_options,
    json_option,
    numbers_of,
    shape_of,
    typed,
)
from nxm_export.cli.output import print_next, quoted, show_result
from nxm_export.cli.parity_tables import print_bisects, print_comparison
from nxm_export.cli.progress_bars import progress_bars
from nxm_export.cli.sparsity_tables import print_diagnosis
from nxm_export.contract.choices import (
    AUTO_BACKEND,
    BACKEND,
    BACKEND_NAMES,
    BENCH_ROUNDS,
    BENCH_SHAPES,
    COMPUTE_CAPABILITY,
    LOAD_ROUNDS,
    LOWERING,
    LOWERINGS,
    MAX_PROFILES,
    SPARSE_KERNELS,
    TARGETS,
    TASK,
    TENSORRT_BACKENDS,
    TENSORRT_VERSIONS,
    TEXT_BATCH,
    TOKEN_ENCODING,
    TOKEN_ENCODINGS,
)
from nxm_export.contract.origin import recorded_checkpoint
from nxm_export.contract.plain_numbers import real_number
from nxm_export.contract.tasks import TASKS
from nxm_export.errors import EngineError, NxmError

if TYPE_CHECKING:
    from engines.base import BuildOptions
    from nxm_export.pipeline.sparsity_twins import TwinGraphs
    from nxm_export.progress import Progress


@dataclass(frozen=True)
class _BuildOptions:
    """The options of ``nxm build`` beside where to and with which backend."""

    threads: int | None
    profiles: tuple[str, ...]
    lengths: str | None
    max_profiles: int
    max_batch_tokens: int
    sparse: bool
    always_sparse: bool
    fuse: bool
    onnxruntime: str | None
    level: int | None
    workspace: int | None
    timing_cache: Path | None
    build_route: str | None
    twins: bool
    lowering: str
    target: str | None
    shapes: tuple[str, ...]
    checkpoint: Path | None
    data: str | None

    def require_usage(self, backend: str) -> None:
        """Raise wrong usage for options that do not go together."""
        from engines.base import backend as backend_of
        from engines.base import cpu_backends

        automatic = [flag for flag, value in (("--checkpoint", self.checkpoint), ("--data", self.data)) if value]
        if automatic and backend != AUTO_BACKEND:
            raise click.UsageError(f"{automatic[0]} is for --backend auto")
        if self.shapes and backend != AUTO_BACKEND and not backend_of(backend).CAPABILITIES.compiled_shapes:
            raise click.UsageError(f"--shape is for --backend openvino and auto; {backend} compiles no shapes")
        if backend == AUTO_BACKEND and (self.twins or self.lengths or self.profiles):
            raise click.UsageError(
                "--backend auto takes no --twins, --lengths and --profile; name the backend that they are for"
            )
        alone = [] if self.twins else given_options(("lowering", "target"))
        if alone:
            raise click.UsageError(f"{alone[0]} is of the graphs of --twins; GRAPH has its own: see `nxm export`")
        if not self.lengths and given_options(("max_profiles",)):
            raise click.UsageError("--max-profiles is for --lengths")
        if bool(self.checkpoint) != bool(self.data):
            raise click.UsageError("--checkpoint and --data belong together")
        if self.threads and backend not in (*cpu_backends(), AUTO_BACKEND):
            raise click.UsageError(f"--threads is for engines on the CPU; {backend} has no use for it")
        for flag, given in (("--always-sparse", self.always_sparse), ("--no-fuse", not self.fuse)):
            if given and (backend == AUTO_BACKEND or not backend_of(backend).CAPABILITIES.always_sparse):
                raise click.UsageError(f"{flag} is for --backend cusparselt")
        if self.onnxruntime and backend not in ("ort", AUTO_BACKEND):
            raise click.UsageError(f"--onnxruntime is for --backend ort and auto; {backend} does without it")
        if self.always_sparse and not self.sparse:
            raise click.UsageError("--always-sparse and --no-sparse contradict each other; give one of them")
        if self.lengths and self.profiles:
            raise click.UsageError("--lengths and --profile are two ways to say the same; give one of them")
        if self.timing_cache is not None and not self.timing_cache.is_file():
            raise click.BadParameter(f"{self.timing_cache}: no such file", param_hint="--timing-cache")

    def of_engine(self, backend: str, progress: Progress) -> BuildOptions:
        """What the build itself is told."""
        from engines.base import BuildOptions
        from engines.tensorrt.profiles import parse_profile

        return BuildOptions(
            threads=self.threads,
            shapes=() if backend == AUTO_BACKEND else tuple(shape_of(text) for text in self.shapes),
            profiles=[parse_profile(text) for text in self.profiles],
            max_batch_tokens=self.max_batch_tokens,
            sparse=self.sparse,
            always_sparse=self.always_sparse,
            fuse=self.fuse,
            oldest_onnxruntime=self.onnxruntime,
            level=self.level,
            workspace_bytes=self.workspace * 2**20 if self.workspace else None,
            build_route=self.build_route,
            timing_cache=self.timing_cache,
            require_timing_cache=self.timing_cache is not None,
            progress=progress,
        )

    def of_twins(self) -> TwinGraphs:
        """How the graphs of twins are exported."""
        from nxm_export.pipeline.sparsity_twins import TwinGraphs

        graphs = TwinGraphs(lowering=self.lowering)
        return replace(graphs, target=self.target) if self.target else graphs


@dataclass(frozen=True)
class _BenchOptions:
    """The options of ``nxm bench`` beside the engines."""

    shapes: tuple[str, ...]
    rounds: int | None
    threads: int | None
    urls: tuple[str, ...]
    name: str | None
    data: str | None
    task: str
    batch: int | None
    clients: str
    seconds: float
    encoding: str


@command(
    "nxm build graph --backend auto --out engine",
    "nxm build checkpoint --twins --backend trt --out twins",
    common=("backend", "out", "threads", "profiles", "lengths", "twins", "shapes", "checkpoint", "data"),
)
@click.argument("source", metavar="GRAPH", type=click.Path(path_type=Path))
@click.option(
    "--backend",
    type=click.Choice([*BACKEND_NAMES, AUTO_BACKEND]),
    default=BACKEND,
    show_default=True,
    help="auto: the fastest of ort, openvino and, on a GPU, cusparselt.",
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Engine directory.")
@click.option("--threads", type=Whole(min=1), help="Threads of a CPU engine.  [default: all cores]")
@click.option(
    "--profile",
    "profiles",
    multiple=True,
    metavar="SHAPES",
    help="Shapes to tune for: 8x128, or 1x1,8x128,32x512 as minimum, optimum, maximum; may be repeated.",
)
@click.option(
    "--lengths",
    metavar="FILE",
    help="Choose the profiles (of openvino the shapes, of one text) from the token lengths of this data file.",
)
@click.option(
    "--max-profiles",
    type=Whole(min=1),
    default=MAX_PROFILES,
    show_default=True,
    help="At most this many, with --lengths.",
)
@batch_tokens_option("Of a profile that is not given by --profile. ")
@click.option(
    "--sparse/--no-sparse", default=SPARSE_KERNELS, show_default=True, help="Let the builder use 2:4 kernels."
)
@click.option(
    "--always-sparse", is_flag=True, help="cusparselt: 2:4 kernels even where dense ones are faster; for measurements."
)
@click.option(
    "--fuse/--no-fuse", default=True, help="cusparselt: compile what lies between products, when it is loaded."
)
@click.option(
    "--onnxruntime", metavar="VERSION", help="The oldest that is to load an ort engine.  [default: the installed one]"
)
@click.option("--level", type=Whole(0, 5), help="Builder optimization level.  [default: TensorRT's]")
@click.option("--workspace", type=Whole(min=1), metavar="MIB", help="Limit of scratch memory.  [default: TensorRT's]")
@click.option(
    "--timing-cache", type=click.Path(path_type=Path), help="Read this timing cache, too.  [default: the engine's own]"
)
@click.option(
    "--build-route", metavar="OPTIONS", help="Passed to TensorRT 11.1 and later, if it lists each option as public."
)
@click.option(
    "--twins", is_flag=True, help="GRAPH is a checkpoint: build its FP16, dense INT8 and sparse INT8 engines."
)
@click.option(
    "--lowering",
    type=click.Choice(LOWERINGS),
    default=LOWERING,
    show_default=True,
    help="Form of the products, with --twins.",
)
@click.option(
    "--target", type=click.Choice(TARGETS), help="Graph target, with --twins.  [default: trt; trt8 for TensorRT 8.6]"
)
@click.option(
    "--shape",
    "shapes",
    multiple=True,
    metavar="BATCHxLENGTH",
    help="A shape to be fast at; may be repeated. openvino compiles a model for each, which takes memory; auto "
    "times them, too.",
)
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    help="With --backend auto: keep only an engine that passes `nxm compare` with it.",
)
@click.option("--data", metavar="FILE", help="With --checkpoint: labelled samples to compare on.")
@json_option
def build(source: Path, backend: str, out: Path, json: bool, **values: object) -> None:
    """Build an engine directory from a graph.

    GRAPH is a graph directory or an ONNX file; with --twins it is a checkpoint, and three engines are built.
    """
    from nxm_export.pipeline.engine_commands import (
        DataProfiles,
        ParityCheck,
        build_engine,
        build_fastest,
        build_twin_engines,
    )

    options = typed(_BuildOptions, values)
    options.require_usage(backend)
    profiles_from = DataProfiles(options.lengths, options.max_profiles) if options.lengths else None
    with progress_bars(enabled=not json) as progress:
        settings = options.of_engine(backend, progress)
        if backend == AUTO_BACKEND:
            shapes = [shape_of(text) for text in options.shapes] or None
            check = ParityCheck(options.checkpoint, options.data) if options.checkpoint and options.data else None
            fastest = build_fastest(source, out, settings, shapes=shapes, check=check)
            facts = {**fastest.passport.to_dict(), "path": str(out)}
            show_result(lambda: facts, json, lambda: print_choice(fastest.choice, facts))
            return
        if options.twins:
            built = build_twin_engines(
                source, out, backend, settings, profiles_from=profiles_from, graphs=options.of_twins()
            ).to_dict()
        else:
            built = build_engine(source, out, backend, settings, profiles_from=profiles_from).to_dict()
    built |= {"path": str(out)}
    show_result(lambda: built, json, lambda: print_built(built, twins=options.twins))


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
    from nxm_export.pipeline import inspection

    share = None if require_sparse is None else _share(require_sparse)
    twin, kernels = evidence["twin"], evidence["kernels"]
    facts = inspection.inspect_path(path, twin=twin, kernels=kernels, measure=measure)
    show_result(facts.to_dict, json, lambda: print_inspection(str(path), facts, everything))
    if share is not None:
        inspection.require_sparse(path, share, twin=twin, kernels=kernels)


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

    Exits with 3 when one differs, a probe fails or a gate does not hold. An engine that cannot run here (its runtime or
    GPU is missing) is skipped with the reason; that fails the command only with --gate, since the gate was not checked
    (3), or when no engine is left (1). With --bisect, block by block instead, and exits with 3 when a block parts.
    """
    from engines.parity.gates import parse_gate
    from nxm_export.pipeline import engine_commands

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
        reports = engine_commands.bisect_engines(checkpoint, engines, data, named)
        show_result(lambda: [report.to_dict() for report in reports], json, lambda: print_bisects(reports))
        if not json:
            print_next(f"nxm inspect {quoted(engines[0])}")
        for report in reports:
            report.require()
        return
    comparison = engine_commands.compare_engines(checkpoint, engines, data, named, gates)
    show_result(comparison.to_list, json, lambda: print_comparison(comparison, everything))
    if not json:
        following = f"nxm serve {quoted(engines[0])} --text"
        parts = f"nxm compare {quoted(engines[0])} --checkpoint {quoted(checkpoint)} --data {quoted(data)} --bisect"
        print_next(following if comparison.passed else parts)
    comparison.require()


@command(
    "nxm bench engines/fp32 engines/int8 --shape 1x32 --shape 8x64",
    "nxm bench --serve http://127.0.0.1:8000 --name engine_text --data dev.tsv",
)
@click.argument("engines", metavar="[ENGINE]...", type=click.Path(path_type=Path), nargs=-1)
@click.option(
    "--shape",
    "shapes",
    multiple=True,
    metavar="BATCHxLENGTH",
    help="May be repeated.  "
    f"[default: {', '.join(f'{batch}x{sequence}' for batch, sequence in BENCH_SHAPES)}, or what ENGINEs have fixed]",
)
@click.option("--rounds", type=Whole(min=1), help=f"[default: {BENCH_ROUNDS}; {LOAD_ROUNDS} with --serve]")
@click.option("--threads", type=Whole(min=1), help="CPU threads.  [default: as built]")
@click.option("--serve", "urls", multiple=True, metavar="URL", help="Load running servers instead; may be repeated.")
@click.option("--name", help="With --serve: the model's name there.")
@click.option(
    "--data",
    metavar="FILE",
    help="Time ENGINEs over this text, tokenisation included, loaded for latency and for throughput. With --serve: "
    "samples to send, as tokens of ENGINE's tokenizer, else as text.",
)
@click.option(
    "--task",
    type=click.Choice(list(TASKS)),
    metavar="TASK",
    default=TASK,
    show_default=True,
    help="With --serve and no ENGINE: what the data is for.",
)
@click.option("--batch", type=Whole(min=1), help=f"With --data: sentences a batch.  [default: {TEXT_BATCH}]")
@click.option(
    "--clients", default="1,8,32", show_default=True, metavar="N,N,...", help="With --serve: clients at once."
)
@click.option("--seconds", type=Real(min=0.1), default=5.0, show_default=True, help="With --serve: length of a round.")
@click.option(
    "--encoding",
    type=click.Choice(TOKEN_ENCODINGS),
    default=TOKEN_ENCODING,
    show_default=True,
    help="With --serve: how tokens are sent.",
)
@json_option
def bench(engines: tuple[Path, ...], json: bool, **values: object) -> None:
    """Time engines against each other, or load running servers.

    ENGINEs are timed in turns; speeds are against the first. With --serve running servers are loaded instead.
    """
    from nxm_export.pipeline.engine_commands import bench_engines, bench_text

    options = typed(_BenchOptions, values)
    _require_bench_usage(options, with_engine=bool(engines))
    if options.urls:
        _bench_servers(engines, options, json)
        return
    if not engines:
        raise click.UsageError("missing ENGINE (or --serve URL)")
    if options.data:
        text = bench_text(engines, options.data, batch=options.batch, rounds=options.rounds, threads=options.threads)
        show_result(text.to_dict, json, lambda: print_text_throughput(text))
        if not json:
            print_next(f"nxm serve {quoted(engines[0])} --text")
        return
    shapes = [shape_of(text) for text in options.shapes] or None
    report = bench_engines(engines, shapes, options.rounds or BENCH_ROUNDS, options.threads)
    show_result(report.to_dict, json, lambda: print_latency(report))
    if not json:
        print_next(f"nxm serve {quoted(engines[0])} --text")


def _require_bench_usage(options: _BenchOptions, *, with_engine: bool) -> None:
    """Raise wrong usage for options that this kind of timing does not read."""
    if options.urls:
        told = dict.fromkeys(("shapes", "threads", "batch"), "is for ENGINEs that are timed here, not for --serve")
        told["task" if with_engine else "encoding"] = (
            "is that of ENGINE; leave it out"
            if with_engine
            else "is for tokens, which need an ENGINE for its tokenizer"
        )
    else:
        told = dict.fromkeys(("name", "task", "clients", "seconds", "encoding"), "is for --serve")
        told |= {"shapes": "is not for --data: texts have lengths of their own"} if options.data else {}
        told |= {} if options.data else {"batch": "is for --data"}
    for name, why in told.items():
        if given := given_options((name,)):
            raise click.UsageError(f"{given[0]} {why}")


def _bench_servers(engines: tuple[Path, ...], options: _BenchOptions, json: bool) -> None:
    from nxm_export.pipeline.engine_commands import LoadRequests, LoadRounds, load_servers

    name, data, rounds = options.name, options.data, options.rounds or LOAD_ROUNDS
    if not name or not data or len(engines) > 1:
        raise click.UsageError("--serve needs --name and --data, and at most one engine directory (for its tokenizer)")
    clients = numbers_of(options.clients, "--clients", "numbers of clients")
    requests = LoadRequests(data, engines[0] if engines else None, options.encoding, options.task)
    report = load_servers(options.urls, name, requests, LoadRounds(clients, options.seconds, rounds))
    show_result(report.to_dict, json, lambda: print_load(report, name, rounds))
    if not json:
        print_next(f"curl {options.urls[0].rstrip('/')}/metrics", "what the server counted")


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
    from nxm_export.pipeline.inspection import doctor_file

    try:
        sparsity_target(backend, trt_version, gpu)
    except EngineError as error:
        raise click.UsageError(str(error)) from error
    diagnosis = doctor_file(file, backend, trt_version, gpu, parse=parse)
    show_result(diagnosis.to_dict, json, lambda: print_diagnosis(diagnosis, everything))


def _share(text: str) -> float:
    number = real_number(text.strip().removesuffix("%"))
    value = None if number is None else number / (100.0 if "%" in text else 1.0)
    if value is None or not 0.0 < value <= 1.0:
        raise click.BadParameter(f"{text!r:.80} is not a share; write 60% or 0.6", param_hint="--require-sparse")
    return value
