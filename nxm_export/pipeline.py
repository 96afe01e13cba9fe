"""All stages in a row, from a model and a data set to engines, their proof and a summary; each stage a directory of a run.

::

    RUN/dense  ->  RUN/checkpoint  ->  RUN/onnx/*  ->  RUN/engines/*  ->  RUN/compare/*, RUN/bench  ->  RUN/summary

A stage whose inputs, options and outputs are unchanged is skipped (see `nxm_export.run_dir`). Every number of the summary is
read back from the file of the stage that measured it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nxm_export.data import Columns
from nxm_export.errors import ArtifactError, DataError, EngineError, EngineUnavailable, ParityError, PlanError
from nxm_export.families import task_named
from nxm_export.plan import COUNTINGS, CompressionPlan, WeightSpec, require_schema
from nxm_export.run_dir import RunDir, atomic_dir, json_text, read_json, require_replaceable, write_atomic
from nxm_export.spec import load_spec

if TYPE_CHECKING:
    from compressors.settings import Settings
    from engines.base import BuildOptions

Progress = Callable[[str, int, int], None]
SHAPES = ((1, 32), (8, 64))  # (batch, sequence) that a run times
ROUNDS = 20
SUMMARY_SCHEMA = "nxm-summary/1"
# graph directory -> (source, target, placement); the dense model's float graph is what INT8 is compared with
_GRAPHS = {
    "dense": ("dense", "cpu", None),
    "cpu": ("checkpoint", "cpu", "inputs"),
    "cpu-outputs": ("checkpoint", "cpu", "inputs-outputs"),
    "trt": ("checkpoint", "trt", None),
}
# engine directory -> (graph, backend); {} is int8, or sparse where a plan leaves all weights in float
_ENGINES = {
    "ort-cpu-fp32": ("dense", "ort"),
    "ort-cpu-{}": ("cpu", "ort"),
    "ort-cpu-{}-outputs": ("cpu-outputs", "ort"),
    "trt_rtx-fp16-{}": ("trt", "trt_rtx"),
}
_NEEDED = ("torch", "transformers", "accelerate", "sklearn", "scipy", "onnx", "onnx_ir", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class Request:
    """What to run: a model (directory or hub id), a task, its data, how to compress and how to train."""

    model: str
    task: str
    train: str
    dev: str
    spec: WeightSpec
    settings: Settings
    columns: Columns = Columns()
    placement: str = "inputs-outputs"
    residual: str = "float"
    keep_dense: Sequence[str] = ()
    revision: str | None = None
    train_limit: int | None = None


def run(request: Request, out: str | Path, *, progress: Progress = lambda what, done, total: None) -> dict[str, Any]:
    """Run all stages into the run directory `out` and return the summary (also in ``summary/summary.json``).

    What failed on the way (an engine that differs from its checkpoint, one that cannot be built) is in the summary;
    `require_passed` raises for it.
    """
    lacking = [name for name in _NEEDED if find_spec(name) is None]
    if lacking:  # said before hours of training, not after
        raise EngineUnavailable(f"`nxm run` needs {', '.join(lacking)}; pip install 'nxm-export[all]'")
    from compressors.models import resolve

    directory = RunDir(out)
    with directory.lock():
        source = resolve(request.model, request.revision)
        plan = _uniform_plan(request, source)
        _train(directory, request, plan, source.path, progress)
        graphs = _export(directory, request, plan, progress)
        engines, missing, failed = _build(directory, graphs, plan, progress)
        features = _features(directory.path("onnx", "cpu"), request.dev, request.columns)
        _compare(directory, engines, features, missing, progress)
        _bench(directory, engines, progress)
        summary = _summary(directory, plan, graphs, engines, missing, failed)
        directory.stage(
            "summary",
            "summary",
            lambda scratch: (scratch / "summary.json").write_text(json_text(summary), encoding="utf-8"),
            options=summary,
        )
    return read_summary(directory.root)  # as JSON gives it back: what run returns is what show reads


def _uniform_plan(request: Request, source: Any) -> CompressionPlan:
    plan: CompressionPlan = source.family.uniform_plan(
        source.config,
        request.spec,
        placement=request.placement,
        keep_dense=request.keep_dense,
        residual=request.residual,
    )
    return plan


def read_summary(root: str | Path) -> dict[str, Any]:
    """The summary of a finished run; raises `ArtifactError` for a directory that is no run or not finished."""
    directory = RunDir.open(root)
    file = directory.path("summary", "summary.json")
    if not file.is_file():
        raise ArtifactError(f"{root}: this run has no summary yet; run the same `nxm run` again to finish it")
    summary = read_json(file, "run the same `nxm run` again")
    require_schema(summary, SUMMARY_SCHEMA, str(file), ArtifactError)
    return _at(summary, directory.root)


def require_passed(summary: Mapping[str, Any]) -> None:
    """Raise `ParityError` for an engine that differs from its checkpoint, `EngineError` for one that could not be built."""
    differing = [name for name, report in summary["parity"].items() if not report["passed"]]
    if differing:
        raise ParityError(
            f"parity failed for {', '.join(differing)}: see {summary['artifacts'][f'parity {differing[0]}']}"
        )
    for name, why in summary["failed"].items():
        raise EngineError(f"{name} could not be built: {why}")


def _at(summary: dict[str, Any], root: Path) -> dict[str, Any]:
    """The summary with its artifacts' paths, which are stored relative to the run, from where the run lies now."""
    return {**summary, "artifacts": {name: str(root / path) for name, path in summary["artifacts"].items()}}


def compress_model(
    request: Request,
    out: str | Path,
    *,
    plan_file: str | Path | None = None,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """Fine-tune where the model has no head for the task, then compress it to the checkpoint directory `out`.

    The dense model is kept in the run directory ``<out>-dense``, and is made again when anything that it depends on changed.
    """
    out = Path(out)
    require_replaceable(out)
    from compressors.compress import compress
    from compressors.distributed import world_size
    from compressors.models import resolve

    source, out = resolve(request.model, request.revision), Path(out)
    if plan_file is not None:
        plan = CompressionPlan.load(plan_file)
        plan.require_fits(source.family.model_type, source.family.weights(source.config))
    else:
        plan = _uniform_plan(request, source)
    model = source.path
    if not source.head_fits(task_named(request.task)):
        if world_size() > 1:
            raise DataError(
                f"{request.model} has no {request.task} head; fine-tune it in one process first: under torchrun `nxm compress` takes "
                "the dense task model"
            )
        directory = RunDir(out.with_name(f"{out.name}-dense"))
        with directory.lock():
            _finetune(directory, request, source.path, progress)
        model = directory.path("dense")
        request = replace(
            request, settings=replace(request.settings, max_length=None)
        )  # the dense model keeps its length
    return compress(model, plan=plan, out=out, settings=request.settings, **_data_options(request, progress))


def search_plan(
    model: str, task: str, train: str, out: Path, options: dict[str, Any], progress: Progress
) -> dict[str, Any]:
    """Search a plan; `options` are those of ``nxm search``. Returns what ``search.json`` holds."""
    from compressors.search import search
    from compressors.selection import SearchSettings
    from compressors.settings import Settings

    latencies = options["latency_table"]
    if latencies is not None:
        try:
            latencies = json.loads(latencies.read_text(encoding="utf-8"))
            if not isinstance(latencies, dict) or not latencies:
                raise ValueError("no table of roles")
        except (OSError, ValueError) as error:
            raise ArtifactError(
                f"{latencies}: not a readable latency table ({error}); it is JSON, {{role: {{option: ms}}}}"
            ) from error
    compression = options["compression"]
    if compression is None and options["bytes_"] is None:
        compression = 0.875
    settings = SearchSettings(
        menu=tuple(option.strip() for option in options["menu"].split(",")),
        counting=options["count"],
        compression=compression,
        bytes=options["bytes_"],
        latencies=latencies or {},
        **{
            key: options[key]
            for key in ("method", "samples", "held_out", "swaps", "finalists", "placement", "seed", "latency_ms")
        },
        halving=tuple(_numbers(options["halving"], int)),
        pareto=tuple(_numbers(options["pareto"], float)),
    )
    return search(
        model,
        task=task,
        train=train,
        out=out,
        settings=settings,
        training=Settings(
            seed=options["seed"], threads=options["threads"], max_length=options["max_length"], epochs=options["epochs"]
        ),
        columns=Columns(options["text"], options["text_pair"], options["label"]),
        progress=progress,
    )


def _numbers(text: str, kind: Callable[[str], Any]) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        what = "whole numbers" if kind is int else "numbers"
        raise PlanError(f"{text!r} is not a list of {what} separated by commas") from error


def build_engine(
    source: str | Path,
    out: str | Path,
    name: str = "ort",
    options: BuildOptions | None = None,
    *,
    lengths: str | None = None,
    profiles: int = 3,
    columns: Columns = Columns(),
    twins: bool = False,
    export_options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Build an engine directory from an ONNX file, or, with `twins`, three of them from a checkpoint directory.

    With `lengths` (a data file) the optimization profiles, at most `profiles`, come from its token lengths. Returns the
    facts of the passport, or of the twins.
    """
    from engines.base import BuildOptions, backend
    from engines.trt_builder import CACHE_FILE
    from nxm_export.twins import build_twins

    source, out, options = Path(source), Path(out), options or BuildOptions()
    if options.timing_cache is None and (out / CACHE_FILE).is_file():  # of the engine that is built anew
        options = replace(options, timing_cache=out / CACHE_FILE)
    if lengths is not None:
        options = replace(options, profiles=_profiles(source if twins else source.parent, lengths, profiles, columns))
    if twins:
        return build_twins(source, out, name, options, dict(export_options or {}))
    with atomic_dir(out) as scratch:
        passport = backend(name).build(source, scratch, options)
    return asdict(passport)


def _profiles(directory: Path, data: str, count: int, columns: Columns) -> list[Any]:
    """Optimization profiles from the token lengths of a data file, by the tokenizer of a graph or checkpoint directory."""
    from engines.profiles import profiles_from_lengths
    from nxm_export.data import load_raw, load_tokenizer
    from nxm_export.families import family_of
    from nxm_export.spec import SPEC_FILE

    if (directory / SPEC_FILE).is_file():
        limit = load_spec(directory).max_length
    else:
        from nxm_export.checkpoint import read_config

        config = read_config(directory)
        limit = family_of(config, source=str(directory)).max_positions(config)
    raw = load_raw(data, "train", columns)
    tokenizer = load_tokenizer(directory)
    tokenizer.no_padding()
    tokenizer.enable_truncation(limit)
    rows: Any = raw.texts if raw.pairs is None else list(zip(raw.texts, raw.pairs, strict=True))
    return profiles_from_lengths([len(found.ids) for found in tokenizer.encode_batch(rows)], limit, count=count)


def inspect_path(
    path: str | Path, *, twin: Path | None = None, kernels: Path | None = None, measure: bool = False
) -> dict[str, Any]:
    """Facts of an ONNX file, an engine directory, a twins directory or a run; TensorRT engines with their truth report.

    `twin` is the dense engine's directory, for the time that sparsity saves; `kernels` a text file with one name of a
    kernel that ran per line (any profiler's list); `measure` times every layer here and now, which needs the GPU.
    """
    from engines.passport import PASSPORT_FILE, load_passport
    from nxm_export.run_dir import MANIFEST
    from nxm_export.twins import is_twins, twin_directories

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
        if passport.backend not in ("trt", "trt_rtx"):
            return {**backend(passport.backend).inspect(path), "passport": asdict(passport)}
        if measure:
            measure_layers(path)
        facts = backend(passport.backend).inspect(path)
        return {**facts, **_truth(path, twin, kernels).to_dict(), "passport": asdict(passport)}
    from nxm_export.weights import load_graph

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
    from engines.passport import load_passport
    from nxm_export.twins import is_twins, twin_directories

    if is_twins(path):
        path = twin_directories(path)[1]
    if not path.is_dir() or load_passport(path).backend not in ("trt", "trt_rtx"):
        raise EngineError(
            f"{path}: only TensorRT engines run sparse kernels; give an engine directory of --backend trt"
        )
    _truth(path, twin, kernels).require_sparse(share)


def _truth(path: Path, twin: Path | None, kernels: Path | None) -> Any:
    from engines.truth import read_truth

    running = None
    if kernels is not None:
        if not kernels.is_file():
            raise ArtifactError(f"{kernels}: no such file; give a text file with one kernel name per line")
        running = [line.strip() for line in kernels.read_text(encoding="utf-8").splitlines() if line.strip()]
    return read_truth(path, twin, running)


def measure_layers(directory: Path, rounds: int = 20) -> None:
    """Time every layer of an engine at its first profile's best shape, and write ``measured.json`` beside it."""
    from engines.base import backend
    from engines.bench import feeds_for
    from engines.passport import load_passport
    from engines.truth import MEASURED_FILE

    passport = load_passport(directory)
    with backend(passport.backend).load(directory) as engine:
        batch, sequence = engine.profiles[0].optimum
        times = engine.layer_times(feeds_for(engine, batch, sequence, 1000, 0), rounds)
    facts = {"engine_sha256": passport.engine_sha256, "shape": [batch, sequence], "rounds": rounds, "layer_ms": times}
    write_atomic(directory / MEASURED_FILE, json.dumps(facts, indent=1) + "\n")


def doctor_file(file: Path, backend_name: str, version: str, compute_capability: str) -> dict[str, Any]:
    """Any ONNX file's rows, judged for a TensorRT version and GPU without building, and advice per matrix."""
    from engines.advice import advise
    from engines.truth import judge
    from nxm_export.sparsity import matrix_facts
    from nxm_export.verify import verify
    from nxm_export.weights import load_graph

    facts = matrix_facts(load_graph(file), str(file))
    report = judge(facts, None, backend=backend_name, version=version, compute_capability=compute_capability)
    return {
        "file": str(file),
        **report.to_dict(),
        "advice": advise(facts, report),
        "problems": verify(file).problems,
    }


def compare_engines(
    checkpoint: str | Path, engines: Sequence[str | Path], data: str, columns: Columns = Columns()
) -> list[Any]:
    """Compare each engine directory with the checkpoint on a labelled data file; one `ParityReport` each."""
    from engines.parity import compare

    return [compare(checkpoint, engine, _features(Path(engine), data, columns)) for engine in engines]


def bench_engines(
    engines: Sequence[str | Path],
    shapes: Sequence[tuple[int, int]] = SHAPES,
    rounds: int = 30,
    threads: int | None = None,
) -> Any:
    """Time engine directories (a twins directory stands for its three) against each other; returns a `BenchReport`.

    Engines that this machine cannot run are named in the report with the reason, unless none is left.
    """
    from engines.base import backend
    from engines.bench import bench, sparse_verdict
    from engines.passport import load_passport
    from nxm_export.twins import DENSE, SPARSE, is_twins, twin_directories

    given = [Path(path) for path in engines]
    paths = [part for path in given for part in (twin_directories(path) if is_twins(path) else [path])]
    if len({path.resolve() for path in paths}) < len(paths):
        raise EngineError("the same engine is given twice; copy its directory to time it against itself")
    named = len({path.resolve().name for path in paths}) == len(paths)
    passports = {path: load_passport(path) for path in paths}
    unmeasured: dict[str, str] = {}
    with ExitStack() as stack:
        loaded = {}
        names = {}
        for path in paths:
            name = path.resolve().name if named else str(path)
            runtime = backend(passports[path].backend)
            options = {"threads": threads} if threads and runtime.NAME == "ort" else {}
            try:
                loaded[name] = stack.enter_context(runtime.load(path, **options))
                names[passports[path].options.get("twin")] = (name, path)
            except EngineUnavailable as error:
                unmeasured[name] = str(error)
        if not loaded:
            raise EngineUnavailable(f"nothing could be timed here: {'; '.join(dict.fromkeys(unmeasured.values()))}")
        report = bench(loaded, shapes, rounds=rounds, vocabulary=_vocabulary(paths))
    verdict = None
    if DENSE in names and SPARSE in names:
        (dense, _), (sparse, path) = names[DENSE], names[SPARSE]
        gpu = passports[path].device.get("gpu", "this GPU")
        verdict = sparse_verdict(report, sparse, dense, _truth(path, None, None).sparse_share, gpu)
    missing = tuple(f"{name}: {why}" for name, why in unmeasured.items())
    return replace(report, verdict=verdict, unmeasured=missing)


def _vocabulary(engines: Sequence[Path]) -> int:
    """Token ids below this exist in every engine."""
    from engines.base import spec_of
    from engines.bench import VOCABULARY

    specs = [spec_of(path) for path in engines]
    return min([VOCABULARY, *(spec.limits["input_ids"] for spec in specs if spec and "input_ids" in spec.limits)])


def load_servers(
    urls: Sequence[str],
    model: str,
    data: str,
    engine: Path | None,
    clients: Sequence[int],
    seconds: float,
    rounds: int,
    encoding: str,
) -> Any:
    """Load running servers with the sentences of a data file; returns a `LoadReport`.

    With an `engine` directory they are sent as tokens of its tokenizer, else as text, in an order that is shuffled once.
    """
    import random

    from engines.load import measure, text_target, token_target
    from nxm_export.data import Columns, load_raw
    from nxm_export.spec import load_spec

    if engine is None:
        raw = load_raw(data, "dev", Columns())
        texts = random.Random(0).sample(raw.texts, len(raw.texts))
        targets = [text_target(url, url, model, texts) for url in urls]
    else:
        features = _features(engine, data, Columns())
        features = random.Random(0).sample(features, len(features))
        targets = [token_target(url, url, model, features, load_spec(engine), encoding=encoding) for url in urls]
    return measure(targets, clients, seconds=seconds, rounds=rounds)


def _train(directory: RunDir, request: Request, plan: CompressionPlan, model: Path, progress: Progress) -> None:
    """Dense fine-tuning and compression. What they have done lies in ``work/`` until they are complete."""
    from compressors.compress import compress

    _finetune(directory, request, model, progress)
    settings = replace(request.settings, max_length=None)  # the dense model keeps its length
    files, names = _data(request)
    directory.stage(
        "compress",
        "checkpoint",
        lambda scratch: _into(
            scratch,
            compress,
            directory.path("dense"),
            plan=plan,
            settings=settings,
            work_dir=directory.path("work", "compress"),
            **_data_options(request, progress),
        ),
        inputs={"dense": directory.path("dense"), **files},
        options={**names, "plan": json.loads(plan.to_json()), "settings": asdict(settings)},
        seed=request.settings.seed,
    )
    shutil.rmtree(directory.path("work"), ignore_errors=True)


def _finetune(directory: RunDir, request: Request, model: Path, progress: Progress) -> None:
    from compressors.compress import finetune

    files, names = _data(request)
    directory.stage(
        "dense",
        "dense",
        lambda scratch: _into(
            scratch,
            finetune,
            request.model,
            settings=request.settings,
            revision=request.revision,
            work_dir=directory.path("work", "dense"),
            **_data_options(request, progress),
        ),
        inputs={"model": model, **files},
        options={**names, "task": request.task, "settings": _dense_options(request.settings)},
        seed=request.settings.seed,
    )


def _data(request: Request) -> tuple[dict[str, Path], dict[str, Any]]:
    """What the data of a stage is: files, which are hashed, and options, among them the names of data that is no file."""
    sources = {"train": request.train, "dev": request.dev}
    files = {label: Path(source) for label, source in sources.items() if Path(source).is_file()}
    names = {label: source for label, source in sources.items() if label not in files}
    return files, {**names, "train_limit": request.train_limit, "columns": asdict(request.columns)}


def _data_options(request: Request, progress: Progress) -> dict[str, Any]:
    return {
        "task": request.task,
        "train": request.train,
        "dev": request.dev,
        "columns": request.columns,
        "train_limit": request.train_limit,
        "progress": progress,
    }


def _dense_options(settings: Settings) -> dict[str, Any]:
    """The settings that change the dense model: compressing in another way must not train it again."""
    keys = (
        "dense_epochs",
        "dense_steps",
        "dense_learning_rate",
        "dense_freeze_embeddings",
        "batch_size",
        "max_length",
        "precision",
    )
    return {key: getattr(settings, key) for key in keys}


def _into(scratch: Path, work: Callable[..., Any], *arguments: Any, **options: Any) -> None:
    """Let a function that makes a directory of its own make it inside a stage's scratch directory."""
    work(*arguments, out=scratch / "result", **options)
    for path in (scratch / "result").iterdir():
        path.rename(scratch / path.name)
    (scratch / "result").rmdir()


def _export(directory: RunDir, request: Request, plan: CompressionPlan, progress: Progress) -> list[str]:
    from nxm_export.export import export

    made = []
    for number, (name, (source, target, placement)) in enumerate(_GRAPHS.items()):
        if placement == "inputs-outputs" and plan.placement in ("float", "inputs"):
            continue
        placed = placement or (plan.placement if source == "checkpoint" else None)
        progress("export", number, len(_GRAPHS))
        directory.stage(
            f"export {name}",
            f"onnx/{name}",
            lambda scratch, source=source, target=target, placed=placed: _into(  # type: ignore[misc]
                scratch, export, directory.path(source), target=target, task=request.task, placement=placed
            ),
            inputs={source: directory.path(source)},
            options={"target": target, "placement": placed, "task": request.task},
        )
        made.append(name)
    progress("export", len(_GRAPHS), len(_GRAPHS))
    return made


def _build(
    directory: RunDir, graphs: Sequence[str], plan: CompressionPlan, progress: Progress
) -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
    """The graph of every engine directory made; for those that cannot be made here, why; for those that failed, why."""
    from engines.base import backend

    kind = _kind(plan)
    made: dict[str, str] = {}
    missing: dict[str, str] = {}
    failed: dict[str, str] = {}
    for number, (template, (graph, runtime)) in enumerate(_ENGINES.items()):
        if graph not in graphs:
            continue
        name = template.format(kind)
        progress("build", number, len(_ENGINES))
        onnx = directory.path("onnx", graph, "model.onnx")
        try:
            directory.stage(
                f"build {name}",
                f"engines/{name}",
                lambda scratch, runtime=runtime, onnx=onnx: backend(runtime).build(onnx, scratch),  # type: ignore[misc]
                inputs={"onnx": directory.path("onnx", graph)},
                options={"backend": runtime},
            )
            made[name] = graph
        except EngineUnavailable as error:
            missing[name] = str(error)
        except EngineError as error:
            if runtime == "ort":  # without which there is nothing to show
                raise
            failed[name] = str(error)
    progress("build", len(_ENGINES), len(_ENGINES))
    return made, missing, failed


def _kind(plan: CompressionPlan) -> str:
    return "int8" if any(spec.weight_bits for spec in plan.weights.values()) else "sparse"


def _features(directory: Path, data: str, columns: Columns) -> list[Any]:
    """A labelled data file in tokens, by the tokenizer and labels of a graph or engine directory."""
    from nxm_export.data import encode, load_raw, load_tokenizer, with_classes, with_scores

    spec = load_spec(directory)
    raw = load_raw(data, "dev", columns)
    if spec.task == "classification":
        names = spec.labels if set(raw.labels) <= set(spec.labels) else [str(i) for i in range(len(spec.labels))]
        examples = with_classes(raw, names)
    else:
        examples = with_scores(raw)
    return encode(load_tokenizer(directory), examples, spec.max_length, spec.inputs)


def _compare(
    directory: RunDir, engines: Mapping[str, str], features: list[Any], missing: dict[str, str], progress: Progress
) -> None:
    from engines.parity import OUTPUTS_FILE, PARITY_FILE, compare

    samples = hashlib.sha256(json.dumps(features).encode()).hexdigest()
    for number, (name, graph) in enumerate(engines.items()):
        progress("compare", number, len(engines))
        source, engine = _GRAPHS[graph][0], directory.path("engines", name)

        def work(scratch: Path, source: str = source, engine: Path = engine) -> None:
            compare(directory.path(source), engine, features)
            for file in (PARITY_FILE, OUTPUTS_FILE):
                shutil.copyfile(engine / file, scratch / file)

        try:
            directory.stage(
                f"compare {name}",
                f"compare/{name}",
                work,
                inputs={source: directory.path(source), "passport": engine / "passport.json"},
                options={"samples": samples},
            )
        except EngineUnavailable as error:
            missing[name] = f"built, not run: {error}"
    progress("compare", len(engines), len(engines))


def _bench(directory: RunDir, engines: Mapping[str, str], progress: Progress) -> None:
    from engines.base import module_command

    names = [name for name in engines if name.startswith("ort-")]
    limit = load_spec(directory.path("onnx", "cpu")).max_length
    shapes = list(dict.fromkeys((batch, min(sequence, limit)) for batch, sequence in SHAPES))

    def work(scratch: Path) -> None:
        progress("bench", 0, 1)
        # In a process of its own: the thread pool that training left behind would slow the engines down.
        arguments = ["bench", *(str(directory.path("engines", name)) for name in names), f"--rounds={ROUNDS}", "--json"]
        arguments += [f"--shape={batch}x{sequence}" for batch, sequence in shapes]
        child = subprocess.run(module_command("nxm_export", *arguments), capture_output=True, text=True, check=False)
        if child.returncode:
            raise EngineError(f"timing the engines failed: {child.stderr.strip()}")
        (scratch / "latency.json").write_text(child.stdout, encoding="utf-8")
        progress("bench", 1, 1)

    inputs = {name: directory.path("engines", name, "passport.json") for name in names}
    directory.stage("bench", "bench", work, inputs=inputs, options={"shapes": shapes, "rounds": ROUNDS})


def _summary(
    directory: RunDir,
    plan: CompressionPlan,
    graphs: Sequence[str],
    engines: Mapping[str, str],
    missing: Mapping[str, str],
    failed: Mapping[str, str],
) -> dict[str, Any]:
    """The numbers of the run, every one read back from the file that a stage wrote; paths are relative to the run."""
    import numpy as np

    from nxm_export.metrics import paired_interval

    def read(*parts: str) -> dict[str, Any]:
        return dict(read_json(directory.path(*parts), "run the same `nxm run` again"))

    dense, compressed, latency = (
        read("dense", "metrics.json"),
        read("checkpoint", "metrics.json"),
        read("bench", "latency.json"),
    )
    compared = [name for name in engines if name not in missing]
    reports = {name: read("compare", name, "parity.json") for name in compared}
    main, reference = f"ort-cpu-{_kind(plan)}", "ort-cpu-fp32"
    outputs = {name: np.load(directory.path("compare", name, "outputs.npz")) for name in (main, reference)}
    labels = outputs[main]["labels"]
    first = reports[main]["outputs"][0]["output"]
    rtx = next((name for name in engines if name.startswith("trt_rtx")), None)
    return {
        "schema": SUMMARY_SCHEMA,
        "metric": dense["metric"],
        "dev_samples": dense["dev_samples"],
        "dense": dense["value"],
        "compressed": reports[main]["engine_value"],
        "difference_interval": paired_interval(
            dense["metric"], outputs[main][first], outputs[reference][first], labels
        ),
        "checkpoint": compressed["value"],
        "compression": {counting: plan.compression(counting) for counting in COUNTINGS},
        "plan": plan.pattern_counts,
        "parity": {
            name: {
                "agreement": report["outputs"][0]["agreement"],
                "max_abs": report["outputs"][0]["max_abs"],
                "passed": report["passed"],
                "value": report["engine_value"],
            }
            for name, report in reports.items()
        },
        "latency_ms": {
            f"{timing['name']} {timing['batch']}x{timing['sequence']}": {
                "batch": timing["batch"],
                "seq": timing["sequence"],
                "median": timing["median"],
            }
            for timing in latency["timings"]
        },
        "speedup": latency["ratios"],
        "onnx_bytes": {name: directory.path("onnx", name, "model.onnx").stat().st_size for name in graphs},
        "trt_rtx": read("engines", rtx, "passport.json")["options"] if rtx else None,
        "missing": dict(missing),
        "failed": dict(failed),
        "training": {
            key: compressed.get(key)
            for key in ("recipe", "admm_steps", "qat_steps", "residual", "residual_gate_passed", "mask_hash")
        },
        "artifacts": {
            "dense": "dense",
            "checkpoint": "checkpoint",
            **{f"onnx {name}": f"onnx/{name}/model.onnx" for name in graphs},
            **{f"engine {name}": f"engines/{name}" for name in engines},
            **{f"parity {name}": f"compare/{name}/parity.json" for name in compared},
        },
    }
