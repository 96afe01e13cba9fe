"""What is done with engines, as functions on paths (`nxm_export.api.functions` has the stages before them)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from compressors.search.settings import DEFAULT_CANDIDATES
from nxm_export.contract.choices import (
    AUTO_BACKEND,
    BACKEND,
    BENCH_ROUNDS,
    GATE,
)
from nxm_export.contract.origin import recorded_checkpoint
from nxm_export.data.columns import Columns
from nxm_export.data.predictions import AnyPrediction
from nxm_export.errors import EngineError
from nxm_export.pipeline.graph_file import onnx_file

if TYPE_CHECKING:
    from engines.base import BuildOptions
    from engines.benchmark.latency import BenchReport
    from engines.benchmark.text_throughput import TextReport
    from engines.parity.reports import Comparison
    from engines.passport import EnginePassport
    from engines.serving.settings import ModelOptions, ServerOptions, TritonOptions
    from engines.triton import TritonManifest
    from nxm_export.contract.records.latency_table import LatencyTable
    from nxm_export.data.texts import Text


def build(
    graph: str | Path,
    out: str | Path,
    *,
    backend: str = BACKEND,
    options: BuildOptions | None = None,
    shapes: Sequence[tuple[int, int]] | None = None,
    data: str | Path | None = None,
    checkpoint: str | Path | None = None,
) -> EnginePassport:
    """Build the engine directory `out` from an ONNX file or a graph directory; returns its passport.

    `backend` is ``ort``, ``openvino``, ``trt``, ``trt_rtx``, ``cusparselt``, or ``auto``: the fastest of those for the
    CPU, and of ``cusparselt`` where there is a GPU for it, at `shapes` of (batch, sequence). With `data`, labelled
    samples, ``auto`` keeps only an engine that passes `compare`, with the checkpoint that is recorded beside the graph,
    or with `checkpoint`.
    """
    from nxm_export.pipeline.engine_builds import ParityCheck, build_engine, build_fastest

    if backend != AUTO_BACKEND:
        if shapes is not None or data is not None or checkpoint is not None:
            raise EngineError(f"shapes, data and checkpoint are for backend='auto'; {backend} is built without them")
        return build_engine(graph, out, backend, options)
    if data is None and checkpoint is not None:
        raise EngineError("a checkpoint is compared on data; give data, or leave the checkpoint out")
    check = None
    if data is not None:
        check = ParityCheck(checkpoint or recorded_checkpoint(onnx_file(graph).parent), str(data))
    return build_fastest(graph, out, options, shapes=shapes, check=check).passport


def compare(
    engines: str | Path | Sequence[str | Path],
    data: str | Path,
    *,
    checkpoint: str | Path | None = None,
    gates: Sequence[str] = (),
    columns: Columns = Columns(),
) -> Comparison:
    """Run engine directories and the checkpoint that they were made from on the same labelled data, and compare them.

    The checkpoint is the one that the first engine records; where that is gone, or the directory was copied alone,
    name it as `checkpoint`. `gates` are such as ``drop<=0.5`` (docs/parity.md). `require` of the result raises
    `ParityError` for an engine that differs and for a gate that does not hold.
    """
    from nxm_export.pipeline.engine_comparison import compare_engines

    paths = _paths(engines)
    return compare_engines(checkpoint or recorded_checkpoint(paths[0]), paths, str(data), columns, gates)


def predict(
    engine: str | Path,
    texts: Iterable[Text],
    *,
    batch: int = 32,
    threads: int | None = None,
    hint: str | None = None,
    gate: str = GATE,
    expect_sha256: Collection[str] = (),
) -> list[AnyPrediction]:
    """What an engine directory says about texts, or pairs of them: one typed result each, in order.

    `hint` is what the threads of an engine on the CPU are for, see `Predictor`; by default ``throughput`` for more
    texts than one batch. `gate` is which ``parity.json`` it must have: ``not-failed``, ``passed`` or ``off`` (any);
    `expect_sha256` are the
    hashes of which its own, or that of all its contents, must be one. Needs neither torch nor transformers. The engine
    is loaded for this call; to answer many calls, keep a `Predictor`, or serve it.
    """
    from engines.predictor import Predictor, hint_for

    rows = texts if isinstance(texts, str) else list(texts)
    hint = hint or hint_for(engine, len(rows), batch)
    with Predictor(engine, threads=threads, hint=hint, gate=gate, expect_sha256=expect_sha256) as predictor:
        return predictor.predict(rows, batch=batch)


def bench(
    engines: str | Path | Sequence[str | Path],
    shapes: Sequence[tuple[int, int]] | None = None,
    *,
    rounds: int = BENCH_ROUNDS,
    threads: int | None = None,
) -> BenchReport:
    """Time engine directories interleaved at `shapes` of (batch, sequence), by default those of ``nxm bench``;
    speed-ups are against the first."""
    from nxm_export.pipeline.engine_timing import bench_engines

    _require_threads(threads)
    return bench_engines(_paths(engines), shapes, rounds, threads)


def bench_text(
    engines: str | Path | Sequence[str | Path],
    data: str | Path,
    *,
    batch: int | None = None,
    rounds: int | None = None,
    threads: int | None = None,
    columns: Columns = Columns(),
) -> TextReport:
    """Sentences a second of CPU engine directories over the text of a data file, tokenisation included; each is loaded
    twice, with either hint."""
    from nxm_export.pipeline.engine_timing import bench_text as bench_engines

    _require_threads(threads)
    return bench_engines(_paths(engines), str(data), batch=batch, rounds=rounds, threads=threads, columns=columns)


def latency(
    engines: str | Path | Sequence[str | Path],
    shape: tuple[int, int],
    *,
    candidates: Collection[str] = DEFAULT_CANDIDATES,
    rounds: int | None = None,
    threads: int | None = None,
) -> LatencyTable:
    """Milliseconds of the matrices of engine directories of one model at `shape` (batch, sequence), by role and by
    those `candidates` that the engines have times of.

    ``SearchSettings(latency_ms=..., latencies=table.milliseconds, latency_source=table.source)`` searches below a
    limit. Engines of ``ort`` are profiled now, `rounds` runs each; those of ``cusparselt`` hold their times. Raises
    `EngineError` for engines of other backends or of several models, and for a matrix whose time cannot be told.
    """
    from nxm_export.pipeline.latency_table import latency_table

    _require_threads(threads)
    return latency_table(_paths(engines), shape, list(candidates), rounds, threads)


def serve(
    engines: str | Path | Sequence[str | Path],
    *,
    models: ModelOptions | None = None,
    server: ServerOptions | None = None,
) -> None:
    """Serve engine directories over HTTP (Open Inference Protocol v2) until SIGTERM or SIGINT.

    Each is ``DIR`` or ``NAME[:VERSION]=DIR``.
    """
    from engines.serving.repository import EngineSource
    from engines.serving.server import serve as serve_engines
    from engines.serving.settings import ModelOptions, ServerOptions

    sources = [EngineSource.parse(str(engine)) for engine in _paths(engines)]
    serve_engines(sources, models or ModelOptions(), server or ServerOptions())


def triton(
    engines: str | Path | Sequence[str | Path], out: str | Path, *, options: TritonOptions | None = None
) -> TritonManifest:
    """Write a Triton model repository from engine directories (``DIR`` or ``NAME=DIR``); returns its manifest."""
    from engines.serving.repository import EngineSource
    from engines.serving.settings import TritonOptions
    from engines.triton import export_repository

    sources = [EngineSource.parse(str(engine)) for engine in _paths(engines)]
    return export_repository(sources, out, options or TritonOptions())


def _paths(engines: str | Path | Sequence[str | Path]) -> list[str | Path]:
    paths = [engines] if isinstance(engines, (str, Path)) else [*engines]
    if not paths:
        raise EngineError("no engine is given; give at least one engine directory")
    return paths


def _require_threads(threads: int | None) -> None:
    if threads is not None and threads < 1:
        raise EngineError(f"an engine runs on at least one thread, got {threads}; leave it out to time it as built")
