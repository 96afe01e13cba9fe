"""All stages in a row, from a model and a data set to engines, their proof and a summary; each stage a directory of a run.

::

    RUN/dense  ->  RUN/checkpoint  ->  RUN/onnx/*  ->  RUN/engines/*  ->  RUN/compare/*, RUN/bench  ->  RUN/summary

A stage whose inputs, options and outputs are unchanged is skipped (see `nxm_export.run_dir`).
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nxm_export.errors import ArtifactError, EngineError, EngineUnavailable
from nxm_export.families import task_named
from nxm_export.plan import COUNTINGS, CompressionPlan, WeightSpec
from nxm_export.run_dir import RunDir, atomic_dir

if TYPE_CHECKING:
    from compressors.compress import Settings
    from nxm_export.data import Columns

Progress = Callable[[str, int, int], None]
SHAPES = ((1, 32), (8, 64))  # (batch, sequence) that a run times
ROUNDS = 20
# graph directory -> (source, target, placement); the dense model's float graph is what INT8 is compared with
_GRAPHS = {
    "dense": ("dense", "cpu", None),
    "cpu": ("checkpoint", "cpu", "inputs"),
    "cpu-outputs": ("checkpoint", "cpu", "inputs-outputs"),
    "trt": ("checkpoint", "trt", None),
}
# engine directory -> (graph, backend)
_ENGINES = {
    "ort-cpu-fp32": ("dense", "ort"),
    "ort-cpu-int8": ("cpu", "ort"),
    "ort-cpu-int8-outputs": ("cpu-outputs", "ort"),
    "trt_rtx-fp16-int8": ("trt", "trt_rtx"),
}


@dataclass(frozen=True)
class Request:
    """What to run: a model (directory or hub id), a task, its data, how to compress and how to train."""

    model: str
    task: str
    train: str
    dev: str
    spec: WeightSpec
    settings: Settings
    columns: Columns
    placement: str = "inputs-outputs"
    keep_dense: Sequence[str] = ()
    revision: str | None = None
    train_limit: int | None = None


def run(request: Request, out: str | Path, *, progress: Progress = lambda what, done, total: None) -> dict[str, Any]:
    """Run all stages into the run directory `out` and return the summary (also in ``summary/summary.json``)."""
    from compressors.models import resolve

    directory = RunDir(out)
    source = resolve(request.model, request.revision)
    plan = source.family.uniform_plan(
        source.config, request.spec, placement=request.placement, keep_dense=request.keep_dense
    )
    _train(directory, request, plan, source.path, progress)
    graphs = _export(directory, request, plan, progress)
    engines, missing = _build(directory, graphs, progress)
    features = _features(directory.path("onnx", "cpu"), request.dev, request.columns)
    _compare(directory, engines, features, missing, progress)
    _bench(directory, engines, progress)
    summary = _summary(directory, plan, engines, missing)
    directory.stage(
        "summary",
        "summary",
        lambda scratch: (scratch / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8"),
        options=summary,
    )
    return summary


def read_summary(root: str | Path) -> dict[str, Any]:
    """The summary of a finished run; raises `ArtifactError` for a directory that is no run or not finished."""
    file = RunDir.open(root).path("summary", "summary.json")
    if not file.is_file():
        raise ArtifactError(f"{root}: this run has no summary yet; run the same `nxm run` again to finish it")
    return dict(json.loads(file.read_text(encoding="utf-8")))


def compress_model(
    request: Request, out: Path, *, plan_file: Path | None = None, progress: Progress = lambda what, done, total: None
) -> dict[str, Any]:
    """Fine-tune where the model has no head for the task, then compress it to the checkpoint directory `out`."""
    from compressors.compress import compress, finetune
    from compressors.models import resolve

    source = resolve(request.model, request.revision)
    if plan_file is not None:
        if not plan_file.is_file():
            raise ArtifactError(f"{plan_file}: no such plan file")
        plan = CompressionPlan.from_json(plan_file.read_text(encoding="utf-8"), source=str(plan_file))
    else:
        plan = source.family.uniform_plan(
            source.config, request.spec, placement=request.placement, keep_dense=request.keep_dense
        )
    common: dict[str, Any] = {
        "task": request.task, "train": request.train, "dev": request.dev, "columns": request.columns, "train_limit": request.train_limit,
        "progress": progress,
    }  # fmt: skip
    model, dense = source.path, out.with_name(f"{out.name}-dense")
    if not source.head_fits(task_named(request.task)):
        if not (dense / "metrics.json").is_file():
            finetune(source.path, out=dense, settings=request.settings, **common)
        model = dense
    return compress(model, plan=plan, out=out, settings=request.settings, **common)


def build_engine(onnx: Path, out: Path, name: str, threads: int | None = None) -> dict[str, Any]:
    """Build an engine directory from an ONNX file; returns the facts of its passport."""
    from engines.base import BuildOptions, backend

    runtime = backend(name)
    with atomic_dir(out) as scratch:
        passport = runtime.build(onnx, scratch, BuildOptions(threads=threads))
    return asdict(passport)


def inspect_path(path: Path) -> dict[str, Any]:
    """Facts of an engine directory or an ONNX file."""
    from engines.base import backend
    from engines.passport import load_passport

    if path.is_dir():
        passport = load_passport(path)
        return {**backend(passport.backend).inspect(path), "passport": asdict(passport)}
    from nxm_export.weights import load_graph

    model = load_graph(path)
    counts: dict[str, int] = {}
    for node in model.graph:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    metadata = {key: value for key, value in model.metadata_props.items() if key != "nxm.plan"}
    return {
        "opset": model.opset_imports.get(""),
        "inputs": {value.name: f"{value.dtype} {value.shape}" for value in model.graph.inputs},
        "outputs": {value.name: f"{value.dtype} {value.shape}" for value in model.graph.outputs},
        "operators": dict(sorted(counts.items())),
        **metadata,
    }


def compare_engines(checkpoint: Path, engines: Sequence[Path], data: str, columns: Columns) -> list[Any]:
    """Compare each engine directory with the checkpoint on a labelled data file; one `ParityReport` each."""
    from engines.parity import compare

    return [compare(checkpoint, engine, _features(engine, data, columns)) for engine in engines]


def bench_engines(engines: Sequence[Path], shapes: Sequence[tuple[int, int]], rounds: int, threads: int | None) -> Any:
    """Time engine directories against each other; returns a `BenchReport`."""
    from engines.base import backend
    from engines.bench import bench
    from engines.passport import load_passport

    with ExitStack() as stack:
        loaded = {}
        for path in engines:
            runtime = backend(load_passport(path).backend)
            options = {"threads": threads} if threads and runtime.NAME == "ort" else {}
            loaded[path.name if len({engine.name for engine in engines}) == len(engines) else str(path)] = (
                stack.enter_context(runtime.load(path, **options))
            )
        return bench(loaded, shapes, rounds=rounds)


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
    from compressors.compress import compress, finetune

    data = {"train": Path(request.train), "dev": Path(request.dev)}
    data = {label: path for label, path in data.items() if path.is_file()}  # a GLUE name is no file
    common: dict[str, Any] = {
        "task": request.task, "train": request.train, "dev": request.dev, "columns": request.columns, "train_limit": request.train_limit,
        "progress": progress,
    }  # fmt: skip
    dense_settings, settings = (
        request.settings,
        replace(request.settings, max_length=None),
    )  # the dense model keeps its length
    directory.stage(
        "dense",
        "dense",
        lambda scratch: _into(scratch, finetune, request.model, settings=dense_settings, revision=request.revision, work_dir=directory.path("work", "dense"), **common),
        inputs={"model": model, **data},
        options={"task": request.task, "settings": _dense_options(dense_settings), "train_limit": request.train_limit, "columns": asdict(request.columns)},
        seed=request.settings.seed,
    )  # fmt: skip
    directory.stage(
        "compress",
        "checkpoint",
        lambda scratch: _into(scratch, compress, directory.path("dense"), plan=plan, settings=settings, work_dir=directory.path("work", "compress"), **common),
        inputs={"dense": directory.path("dense"), **data},
        options={"plan": json.loads(plan.to_json()), "settings": asdict(settings), "train_limit": request.train_limit, "columns": asdict(request.columns)},
        seed=request.settings.seed,
    )  # fmt: skip
    shutil.rmtree(directory.path("work"), ignore_errors=True)


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
        if placement == "inputs-outputs" and request.placement == "inputs":
            continue
        placed = placement or (request.placement if source == "checkpoint" else None)
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


def _build(directory: RunDir, graphs: Sequence[str], progress: Progress) -> tuple[list[str], dict[str, str]]:
    """Engine directories made, and for those that cannot be made here, why."""
    from engines.base import backend

    made, missing = [], {}
    for number, (name, (graph, runtime)) in enumerate(_ENGINES.items()):
        if graph not in graphs:
            continue
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
            made.append(name)
        except EngineUnavailable as error:
            missing[name] = str(error)
    progress("build", len(_ENGINES), len(_ENGINES))
    return made, missing


def _features(directory: Path, data: str, columns: Columns) -> list[Any]:
    """A labelled data file in tokens, by the tokenizer and labels of a graph or engine directory."""
    from nxm_export.data import encode, load_raw, load_tokenizer, with_classes, with_scores
    from nxm_export.spec import load_spec

    spec = load_spec(directory)
    raw = load_raw(data, "dev", columns)
    if spec.task == "classification":
        names = spec.labels if set(raw.labels) <= set(spec.labels) else [str(i) for i in range(len(spec.labels))]
        examples = with_classes(raw, names)
    else:
        examples = with_scores(raw)
    return encode(load_tokenizer(directory), examples, spec.max_length, spec.inputs)


def _compare(
    directory: RunDir, engines: Sequence[str], features: list[Any], missing: dict[str, str], progress: Progress
) -> None:
    from engines.parity import OUTPUTS_FILE, PARITY_FILE, compare

    for number, name in enumerate(engines):
        progress("compare", number, len(engines))
        graph, _ = _ENGINES[name]
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
                options={"samples": len(features)},
            )
        except EngineUnavailable as error:
            missing[name] = f"built, not run: {error}"
    progress("compare", len(engines), len(engines))


def _bench(directory: RunDir, engines: Sequence[str], progress: Progress) -> None:
    names = [name for name in engines if _ENGINES[name][1] == "ort"]

    def work(scratch: Path) -> None:
        progress("bench", 0, 1)
        # In a process of its own: the thread pool that training left behind would slow the engines down.
        command = [
            sys.executable,
            "-m",
            "nxm_export",
            "bench",
            *(str(directory.path("engines", name)) for name in names),
        ]
        command += [f"--shape={batch}x{sequence}" for batch, sequence in SHAPES] + [f"--rounds={ROUNDS}", "--json"]
        child = subprocess.run(command, capture_output=True, text=True, check=False)
        if child.returncode:
            raise EngineError(f"timing the engines failed: {child.stderr.strip()}")
        (scratch / "latency.json").write_text(child.stdout, encoding="utf-8")
        progress("bench", 1, 1)

    inputs = {name: directory.path("engines", name, "passport.json") for name in names}
    directory.stage("bench", "bench", work, inputs=inputs, options={"shapes": SHAPES, "rounds": ROUNDS})


def _summary(
    directory: RunDir, plan: CompressionPlan, engines: Sequence[str], missing: dict[str, str]
) -> dict[str, Any]:
    """The numbers of the run, every one read back from the file that a stage wrote."""
    import numpy as np

    from nxm_export.metrics import paired_interval

    def read(*parts: str) -> dict[str, Any]:
        return dict(json.loads(directory.path(*parts).read_text(encoding="utf-8")))

    dense, compressed = read("dense", "metrics.json"), read("checkpoint", "metrics.json")
    reports = {name: read("compare", name, "parity.json") for name in engines if name not in missing}
    outputs = {
        name: np.load(directory.path("compare", name, "outputs.npz")) for name in ("ort-cpu-fp32", "ort-cpu-int8")
    }
    labels = outputs["ort-cpu-int8"]["labels"]
    logits = [outputs[name]["logits"] for name in ("ort-cpu-int8", "ort-cpu-fp32")]
    rtx = directory.path("engines", "trt_rtx-fp16-int8", "passport.json")
    return {
        "metric": dense["metric"],
        "dev_samples": dense["dev_samples"],
        "dense": dense["value"],
        "compressed": reports["ort-cpu-int8"]["engine_value"],
        "difference_interval": paired_interval(dense["metric"], logits[0], logits[1], labels),
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
            for timing in read("bench", "latency.json")["timings"]
        },
        "speedup": read("bench", "latency.json")["ratios"],
        "onnx_bytes": {
            name: directory.path("onnx", name, "model.onnx").stat().st_size
            for name in _GRAPHS
            if directory.path("onnx", name).is_dir()
        },
        "trt_rtx": json.loads(rtx.read_text(encoding="utf-8"))["options"] if rtx.is_file() else None,
        "missing": missing,
        "training": {
            key: compressed.get(key)
            for key in ("recipe", "admm_steps", "qat_steps", "residual", "residual_gate_passed", "mask_hash")
        },
        "artifacts": {
            "checkpoint": str(directory.path("checkpoint")),
            **{
                f"onnx {name}": str(directory.path("onnx", name, "model.onnx"))
                for name in _GRAPHS
                if directory.path("onnx", name).is_dir()
            },
            **{f"engine {name}": str(directory.path("engines", name)) for name in engines},
        },
    }
