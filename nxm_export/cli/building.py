"""The command that builds engines."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nxm_export.cli.engine_tables import (
    print_built,
    print_choice,
)
from nxm_export.cli.group import command
from nxm_export.cli.options import (
    Whole,
    batch_tokens_option,
    given_options,
    json_option,
    shape_of,
    typed,
)
from nxm_export.cli.output import show_result
from nxm_export.cli.progress_bars import progress_bars
from nxm_export.contract.choices import (
    AUTO_BACKEND,
    BACKEND,
    BACKEND_NAMES,
    LOWERING,
    LOWERINGS,
    MAX_PROFILES,
    SPARSE_USE,
    SPARSE_USES,
    TARGETS,
    SparseUse,
)

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
    sparse: SparseUse
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
        for flag, given in (("--sparse always", self.sparse == "always"), ("--no-fuse", not self.fuse)):
            if given and (backend == AUTO_BACKEND or not backend_of(backend).CAPABILITIES.always_sparse):
                raise click.UsageError(f"{flag} is for --backend cusparselt")
        if self.onnxruntime and backend not in ("ort", AUTO_BACKEND):
            raise click.UsageError(f"--onnxruntime is for --backend ort and auto; {backend} does without it")
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
    help="At most this many, with --lengths, and one more where the model takes longer texts.",
)
@batch_tokens_option("Of a profile that is not given by --profile. ")
@click.option(
    "--sparse",
    type=click.Choice(SPARSE_USES),
    default=SPARSE_USE,
    show_default=True,
    help="2:4 kernels: where they are faster, wherever there is one (cusparselt alone, to measure), or nowhere.",
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
    "--timing-cache", type=click.Path(path_type=Path), help="Read this timing cache.  [default: the engine's own]"
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
    from nxm_export.pipeline.engine_builds import (
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
