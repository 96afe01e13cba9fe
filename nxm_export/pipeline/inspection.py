"""What is inside: facts of graphs, checkpoints, engines and runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from nxm_export.contract.checkpoint import PLAN_FILE, open_checkpoint, read_config, task_at
from nxm_export.contract.choices import STORAGE
from nxm_export.contract.plan import COUNTINGS
from nxm_export.contract.records.checkpoint_metrics import METRICS_FILE, read_metrics
from nxm_export.errors import EngineError
from nxm_export.pipeline.engine_sparsity import measure_layers, profiles_kernels, sparsity_of
from nxm_export.pipeline.graph_file import is_graph_directory, onnx_file
from nxm_export.storage.json_files import to_builtins

if TYPE_CHECKING:
    from engines.base import EngineFacts
    from engines.passport import EnginePassport
    from engines.sparsity.sparsity_report import SparsityReport


@dataclass(frozen=True)
class GraphFacts:
    """Facts of an ONNX file: inputs and outputs as ``dtype shape``, operators by type, and what its exporter noted."""

    opset: int | None
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    operators: Mapping[str, int]
    metadata: Mapping[str, str]

    def to_dict(self) -> dict[str, object]:
        """The form of ``--json``; metadata stand beside the other fields."""
        fields = {key: getattr(self, key) for key in ("opset", "inputs", "outputs", "operators")}
        return {**fields, **self.metadata}


@dataclass(frozen=True)
class EngineInspection:
    """What an engine directory says: its passport, its backend's own facts, and, where its backend has sparse kernels,
    the report of which matrices run on one."""

    passport: EnginePassport
    facts: EngineFacts
    sparsity: SparsityReport | None

    def to_dict(self) -> dict[str, object]:
        """The form of ``--json``: facts and report in one, then the passport."""
        sparsity = {} if self.sparsity is None else self.sparsity.to_dict()
        return {**self.facts.to_dict(), **sparsity, "passport": to_builtins(self.passport)}


@dataclass(frozen=True)
class RunInspection:
    """The engines of a run by name."""

    run: str
    engines: Mapping[str, EngineInspection]

    def to_dict(self) -> dict[str, object]:
        """The form of ``--json``."""
        return {"run": self.run, "engines": {name: engine.to_dict() for name, engine in self.engines.items()}}


@dataclass(frozen=True)
class CheckpointFacts:
    """The facts of a model directory: `plan` is the number of matrices by option, and `compression` by
    counting, both empty for a dense model; `metrics` are those of its ``metrics.json``, where there is one."""

    model_type: str
    task: str | None
    weight_bytes: int
    plan: Mapping[str, int]
    compression: Mapping[str, float]
    embedding: str
    metrics: Mapping[str, object]

    def to_dict(self) -> dict[str, object]:
        """The form of ``--json``."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self)}


Inspection = GraphFacts | EngineInspection | RunInspection | CheckpointFacts


def inspect_path(
    path: str | Path, *, twin: Path | None = None, kernels: Path | None = None, measure: bool = False
) -> Inspection:
    """Facts of an ONNX file (or the one in a graph directory), of a checkpoint or dense model, of an engine directory,
    or of all engines of a run.

    A twins directory stands for its sparse engine, judged against the dense one. `twin` is the dense engine's
    directory, for the time that sparsity saves; `kernels` a text file with one name of a kernel that ran per line (any
    profiler's list); `measure` times every layer here and now, which needs the GPU. Raises `EngineError` where one of
    them is given for something that is no TensorRT engine.
    """
    from engines.passport import PASSPORT_FILE
    from nxm_export.pipeline.sparsity_twins import DENSE, SPARSE, is_twins, twin_directories, twin_directory
    from nxm_export.storage.run_dir import MANIFEST

    path = Path(path)
    if (path / MANIFEST).is_file():
        _require_no_sparsity_options(path, twin, kernels, measure=measure)
        directories = sorted(file.parent for file in (path / "engines").glob(f"*/{PASSPORT_FILE}"))
        return RunInspection(str(path), {directory.name: inspect_engine(directory) for directory in directories})
    if is_twins(path):
        sparse, others = twin_directory(path, SPARSE), twin_directories(path)
        del others[SPARSE]
        if twin is not None:
            raise EngineError(f"{path}: its sparse engine is held against the dense one beside it; leave --twin out")
        if measure:
            for other in others.values():
                measure_layers(other)
        # An engine that profiles its kernels has both times in itself.
        compared = None if profiles_kernels(sparse) else others.get(DENSE)
        return inspect_engine(sparse, twin=compared, kernels=kernels, measure=measure)
    if _is_model(path):
        _require_no_sparsity_options(path, twin, kernels, measure=measure)
        return _checkpoint_facts(path)
    if path.is_dir() and not is_graph_directory(path):
        return inspect_engine(path, twin=twin, kernels=kernels, measure=measure)
    file = onnx_file(path)
    _require_no_sparsity_options(path, twin, kernels, measure=measure)
    return _graph_facts(file)


def _is_model(path: Path) -> bool:
    """True for a directory with a Hugging Face model in safetensors; graphs and engines have no ``config.json``."""
    return (path / "config.json").is_file() and any(path.glob("*.safetensors"))


def _checkpoint_facts(path: Path) -> CheckpointFacts:
    config = read_config(path)
    plan = open_checkpoint(path).plan if (path / PLAN_FILE).is_file() else None
    measured = to_builtins(read_metrics(path)) if (path / METRICS_FILE).is_file() else {}
    return CheckpointFacts(
        model_type=str(config.get("model_type", "unknown")),
        task=task_at(path, config),
        weight_bytes=sum(file.stat().st_size for file in path.glob("*.safetensors")),
        plan=plan.pattern_counts if plan else {},
        compression={counting: plan.compression(counting) for counting in COUNTINGS} if plan else {},
        embedding=plan.embedding if plan else STORAGE,
        metrics=measured if isinstance(measured, dict) else {},
    )


def _require_no_sparsity_options(path: Path, twin: Path | None, kernels: Path | None, *, measure: bool) -> None:
    """Raise `EngineError` where one of these was given: nothing but an engine of TensorRT has an answer to it."""
    options = {"--twin": twin is not None, "--kernels": kernels is not None, "--measure": measure}
    given = [name for name, was_given in options.items() if was_given]
    if given:
        raise EngineError(
            f"{path}: {', '.join(given)} asks of sparse kernels, which only engines for GPUs have; leave it out here"
        )


def inspect_engine(
    directory: Path, *, twin: Path | None = None, kernels: Path | None = None, measure: bool = False
) -> EngineInspection:
    """Facts of an engine directory; options as in `inspect_path`."""
    from engines.base import backend
    from engines.passport import load_passport

    passport = load_passport(directory)
    runtime = backend(passport.backend)
    if not runtime.CAPABILITIES.sparse_kernels:
        _require_no_sparsity_options(directory, twin, kernels, measure=measure)
        return EngineInspection(passport, runtime.inspect(directory), None)
    if measure:
        measure_layers(directory)
    return EngineInspection(passport, runtime.inspect(directory), sparsity_of(directory, twin, kernels))


def _graph_facts(file: Path) -> GraphFacts:
    from nxm_export.graph.reading.graph_weights import load_graph

    model = load_graph(file)
    counts: dict[str, int] = {}
    for node in model.graph.all_nodes():
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return GraphFacts(
        opset=model.opset_imports.get(""),
        inputs={str(value.name): f"{value.dtype} {value.shape}" for value in model.graph.inputs},
        outputs={str(value.name): f"{value.dtype} {value.shape}" for value in model.graph.outputs},
        operators=dict(sorted(counts.items())),
        metadata={key: value for key, value in model.metadata_props.items() if key != "nxm.plan"},
    )
