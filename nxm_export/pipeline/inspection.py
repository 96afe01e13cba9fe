"""What is inside, and does it run sparse: facts of graphs, engines and runs, and the gate on proven sparse kernels."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nxm_export.errors import ArtifactError, EngineError
from nxm_export.storage.atomic import write_atomic

if TYPE_CHECKING:
    from engines.sparsity.report import SparsityReport


def inspect_path(
    path: str | Path, *, twin: Path | None = None, kernels: Path | None = None, measure: bool = False
) -> dict[str, Any]:
    """Facts of an ONNX file, an engine directory, a twins directory or a run; TensorRT engines with their sparsity report.

    `twin` is the dense engine's directory, for the time that sparsity saves; `kernels` a text file with one name of a
    kernel that ran per line (any profiler's list); `measure` times every layer here and now, which needs the GPU.
    """
    from engines.passport import PASSPORT_FILE, load_passport
    from nxm_export.pipeline.sparsity_twins import is_twins, twin_directories
    from nxm_export.storage.run_dir import MANIFEST

    path = Path(path)
    if (path / MANIFEST).is_file():
        found = sorted(file.parent for file in (path / "engines").glob(f"*/{PASSPORT_FILE}"))
        return {"run": str(path), "engines": {engine.name: inspect_path(engine) for engine in found}}
    if is_twins(path):
        dense, sparse, other = twin_directories(path)
        if measure:
            measure_layers(dense)
            measure_layers(other)
        return inspect_path(sparse, twin=dense, kernels=kernels, measure=measure)
    if path.is_dir():
        from engines.base import backend

        passport = load_passport(path)
        runtime = backend(passport.backend)
        if not runtime.CAPABILITIES.sparse_kernels:
            return {**runtime.inspect(path).to_dict(), "passport": passport.to_dict()}
        if measure:
            measure_layers(path)
        facts = runtime.inspect(path).to_dict()
        return {**facts, **sparsity_of(path, twin, kernels).to_dict(), "passport": passport.to_dict()}
    from nxm_export.graph.graph_weights import load_graph

    model = load_graph(path)
    counts: dict[str, int] = {}
    for node in model.graph.all_nodes():
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    metadata = {key: value for key, value in model.metadata_props.items() if key != "nxm.plan"}
    return {
        "opset": model.opset_imports.get(""),
        "inputs": {value.name: f"{value.dtype} {value.shape}" for value in model.graph.inputs},
        "outputs": {value.name: f"{value.dtype} {value.shape}" for value in model.graph.outputs},
        "operators": dict(sorted(counts.items())),
        **metadata,
    }


def require_sparse(path: Path, share: float, *, twin: Path | None = None, kernels: Path | None = None) -> None:
    """The gate: `ParityError` unless `share` of the planned-sparse weights provably run sparse in the engine at `path`."""
    from engines.base import backend
    from engines.passport import load_passport
    from nxm_export.pipeline.sparsity_twins import is_twins, twin_directories

    if is_twins(path):
        path = twin_directories(path)[1]
    if not path.is_dir() or not backend(load_passport(path).backend).CAPABILITIES.sparse_kernels:
        raise EngineError(
            f"{path}: only TensorRT engines run sparse kernels; give an engine directory of --backend trt"
        )
    sparsity_of(path, twin, kernels).require_sparse(share)


def sparsity_of(path: Path, twin: Path | None, kernels: Path | None) -> SparsityReport:
    """The sparsity report of an engine directory (see `engines.sparsity.report`); `kernels` is a file with one name of a
    kernel a line."""

    from engines.sparsity.report import read_sparsity_report

    running = None
    if kernels is not None:
        if not kernels.is_file():
            raise ArtifactError(f"{kernels}: no such file; give a text file with one kernel name per line")
        running = [line.strip() for line in kernels.read_text(encoding="utf-8").splitlines() if line.strip()]
    return read_sparsity_report(path, twin, running)


def measure_layers(directory: Path, rounds: int = 20) -> None:
    """Time every layer of an engine at its first profile's best shape, and write ``measured.json`` beside it."""
    from engines.base import LayerTimedEngine, backend
    from engines.benchmark.latency import feeds_for
    from engines.passport import load_passport
    from engines.sparsity.build_evidence import MEASURED_FILE, MeasuredLayers
    from nxm_export.storage.json_files import encode

    passport = load_passport(directory)
    with backend(passport.backend).load(directory) as engine:
        if not isinstance(engine, LayerTimedEngine) or not passport.profiles:
            raise EngineError(
                f"{directory}: engines of {passport.backend} do not time their layers; leave --measure out"
            )
        batch, sequence = passport.profiles[0].optimum
        times = engine.layer_times(feeds_for(engine, batch, sequence, 1000, 0), rounds)
    measured = MeasuredLayers(passport.engine_sha256, (batch, sequence), rounds, times)
    write_atomic(directory / MEASURED_FILE, encode(measured))


def doctor_file(file: Path, backend_name: str, version: str, compute_capability: str) -> dict[str, Any]:
    """Any ONNX file's rows, judged for a TensorRT version and GPU without building, and advice per matrix."""
    from engines.sparsity.advice import advise
    from engines.sparsity.report import SparsityTarget, judge
    from nxm_export.graph.graph_weights import load_graph
    from nxm_export.graph.sparsity_scan import matrix_facts
    from nxm_export.graph.verifier import verify

    facts = matrix_facts(load_graph(file), str(file))
    report = judge(facts, None, SparsityTarget(backend_name, version, compute_capability))
    return {
        "file": str(file),
        **report.to_dict(),
        "advice": [asdict(advice) for advice in advise(facts, report)],
        "problems": verify(file).problems,
    }
