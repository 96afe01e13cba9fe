"""What is inside, and does it run sparse: facts of graphs, engines and runs, and the gate on proven sparse kernels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from nxm_export.contract.checkpoint import PLAN_FILE, open_checkpoint, read_config, task_at
from nxm_export.contract.choices import COMPUTE_CAPABILITY, STORAGE
from nxm_export.contract.plan import COUNTINGS
from nxm_export.contract.records.checkpoint_metrics import METRICS_FILE, read_metrics
from nxm_export.errors import ArtifactError, EngineError
from nxm_export.pipeline.graph_file import is_graph_directory, onnx_file
from nxm_export.storage.atomic import write_atomic
from nxm_export.storage.json_files import encode, to_builtins
from nxm_export.storage.unreadable import unreadable

if TYPE_CHECKING:
    from engines.base import EngineFacts
    from engines.passport import EnginePassport
    from engines.sparsity.advice import Advice
    from engines.sparsity.sparsity_report import SparsityReport
    from engines.tensorrt.rtx_parser import ParserAnswer


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


@dataclass(frozen=True)
class FileDiagnosis:
    """Any ONNX file, judged without building it: which of its matrices can run sparse, what to do about the others, and
    what is wrong with it: what `nxm verify` finds, what TensorRT's parser refuses or misreads, and, where it was asked,
    what an installed parser says (`parsed`). A file with problems has no matrix that is ready."""

    file: str
    sparsity: SparsityReport
    advice: tuple[Advice, ...]
    problems: tuple[str, ...]
    parsed: ParserAnswer | None = None

    def to_dict(self) -> dict[str, object]:
        """The form of ``--json``."""
        advice, problems, parsed = to_builtins(self.advice), list(self.problems), to_builtins(self.parsed)
        return {"file": self.file, **self.sparsity.to_dict(), "advice": advice, "problems": problems, "parsed": parsed}


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
    from nxm_export.pipeline.sparsity_twins import is_twins, twin_directories
    from nxm_export.storage.run_dir import MANIFEST

    path = Path(path)
    if (path / MANIFEST).is_file():
        _require_no_sparsity_options(path, twin, kernels, measure=measure)
        directories = sorted(file.parent for file in (path / "engines").glob(f"*/{PASSPORT_FILE}"))
        return RunInspection(str(path), {directory.name: inspect_engine(directory) for directory in directories})
    if is_twins(path):
        dense, sparse, other = twin_directories(path)
        if twin is not None:
            raise EngineError(f"{path}: its sparse engine is held against the dense one beside it; leave --twin out")
        if measure:
            measure_layers(dense)
            measure_layers(other)
        compared = None if _profiles_kernels(sparse) else dense  # such an engine has both times in itself
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


def require_sparse(path: Path, share: float, *, twin: Path | None = None, kernels: Path | None = None) -> None:
    """Raise `ParityError` unless `share` of the planned-sparse weights provably run sparse in the engine at `path`."""
    from engines.base import backend
    from engines.passport import load_passport
    from nxm_export.pipeline.sparsity_twins import is_twins, twin_directories

    if is_twins(path):
        path = twin_directories(path)[1]
    if not path.is_dir() or not backend(load_passport(path).backend).CAPABILITIES.sparse_kernels:
        raise EngineError(
            f"{path}: only engines for GPUs run sparse kernels; give an engine directory of --backend trt or cusparselt"
        )
    sparsity_of(path, twin, kernels).require_sparse(share)


def sparsity_of(directory: Path, twin: Path | None = None, kernels: Path | None = None) -> SparsityReport:
    """The sparsity report of an engine directory (see `engines.sparsity.judgement`).

    `kernels` is a file with one name of a kernel a line; `ArtifactError` where it is missing, and for an engine file
    that is not the one of its passport. Raises `EngineError` for `kernels` and for `twin` where the engine's backend
    profiles its kernels itself.
    """
    from engines.base import ProfiledFacts, backend
    from engines.passport import load_passport
    from engines.sparsity.engine_report import read_sparsity_report

    if _profiles_kernels(directory):
        if twin is not None or kernels is not None:
            raise EngineError(
                f"{directory}: leave --twin and --kernels out: this engine has the times of both kinds of kernels from "
                "its build, and the names of kernels from `nxm inspect --measure`"
            )
        facts = backend(load_passport(directory).backend).inspect(directory)
        assert isinstance(facts, ProfiledFacts)
        return facts.sparsity
    running = None
    if kernels is not None:
        if not kernels.is_file():
            raise ArtifactError(f"{kernels}: no such file; give a text file with one kernel name per line")
        running = _kernel_names(kernels)
    return read_sparsity_report(directory, twin, running)


def _kernel_names(file: Path) -> list[str]:
    """The lines of a text file that are not empty."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{unreadable(file, error)}; give a text file with one kernel name per line") from error
    return [line.strip() for line in lines if line.strip()]


def measure_layers(directory: Path, rounds: int = 20) -> None:
    """Time every layer of an engine at its first profile's best shape, and write ``measured.json`` beside it; for a
    backend that profiles kernels, write what it finds."""
    from engines.base import LayerTimedEngine, ProfiledBackend, backend
    from engines.benchmark.latency import feeds_for
    from engines.passport import load_passport
    from engines.sample_inputs import nearest_shape
    from engines.sparsity.build_evidence import MEASURED_FILE, MEASURED_SCHEMA, MeasuredLayers

    passport = load_passport(directory)
    runtime = backend(passport.backend)
    if isinstance(runtime, ProfiledBackend):
        runtime.profile(directory)
        return
    with runtime.load(directory) as engine:
        if not isinstance(engine, LayerTimedEngine) or not passport.profiles:
            raise EngineError(
                f"{directory}: engines of {passport.backend} do not time their layers; leave --measure out"
            )
        batch, sequence = nearest_shape(engine.input_bindings, *passport.profiles[0].optimum)
        times = engine.layer_times(feeds_for(engine, batch, sequence, 1000, 0), rounds)
    measured = MeasuredLayers(passport.engine_sha256, (batch, sequence), rounds, times)
    write_atomic(directory / MEASURED_FILE, encode(measured, MEASURED_SCHEMA))


def _profiles_kernels(directory: Path) -> bool:
    """Whether the backend of an engine directory profiles kernels itself."""
    from engines.base import backend
    from engines.passport import load_passport

    return backend(load_passport(directory).backend).CAPABILITIES.profiled_kernels


def doctor_file(
    file: Path,
    backend_name: str,
    version: str | None = None,
    gpu: str = COMPUTE_CAPABILITY,
    *,
    parse: bool = False,
) -> FileDiagnosis:
    """The matrices of any ONNX file (or the one in a graph directory), judged for a TensorRT version and GPU without
    building, and advice for each.

    `version` and `gpu` are as people write them; `EngineError` for what is not understood. `parse` asks the parser of
    the installed TensorRT-RTX, too: `EngineUnavailable` where there is none. What it takes is not ready for that.
    """
    from engines.sparsity.advice import advise
    from engines.sparsity.judgement import FileProblem, judge
    from engines.sparsity.targets import sparsity_target, target_problems
    from engines.tensorrt.rtx_parser import ask_parser
    from nxm_export.graph.reading.graph_weights import load_graph
    from nxm_export.graph.reading.sparsity_scan import scan_and_verify
    from nxm_export.graph.tensorrt_parser import parser_of, parser_problems

    target = sparsity_target(backend_name, version, gpu)
    file = onnx_file(file)
    model = load_graph(file)
    scanned, checked = scan_and_verify(model, str(file))
    answer = ask_parser(file) if parse else None
    problems = [FileProblem(problem, weight.name) for weight in checked.weights for problem in weight.problems]
    problems += map(FileProblem, checked.problems)
    problems += [
        FileProblem(str(problem)) for problem in parser_problems(model, parser_of(backend_name, target.version))
    ]
    problems += target_problems(target)
    if answer is not None:
        problems += [FileProblem(f"{error} ({answer.parser}'s parser refuses it)") for error in answer.errors]
    report = replace(judge(scanned.facts, None, target, problems=problems), unread=scanned.unread)
    advice = tuple(advise(scanned.facts, report, problems))
    return FileDiagnosis(str(file), report, advice, tuple(map(str, problems)), answer)
