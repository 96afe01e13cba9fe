"""All stages in a row, from a model and a data set to engines, their proof and a summary; each stage a directory of a run.

::

    RUN/dense  ->  RUN/checkpoint  ->  RUN/onnx/*  ->  RUN/engines/*  ->  RUN/compare/*, RUN/bench  ->  RUN/summary

A stage whose inputs, options and outputs are unchanged is skipped (see `nxm_export.storage.run_dir`). Every number of the summary is
read back from the file of the stage that measured it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nxm_export.contract.checkpoint import open_checkpoint
from nxm_export.contract.io_spec import load_spec
from nxm_export.contract.placement import placement_of
from nxm_export.contract.plan import CompressionPlan, WeightSpec
from nxm_export.contract.tasks import task_named
from nxm_export.data.examples import Columns
from nxm_export.errors import DataError, EngineError, EngineUnavailable
from nxm_export.pipeline.engine_commands import SHAPES, features_of
from nxm_export.pipeline.summary import kind_of, read_summary, summarize
from nxm_export.storage.atomic import require_replaceable
from nxm_export.storage.json_files import json_text
from nxm_export.storage.run_dir import RunDir

if TYPE_CHECKING:
    from compressors.search.settings import SearchSettings
    from compressors.settings import Settings
    from nxm_export.contract.checkpoint_metrics import CompressionMetrics
    from nxm_export.contract.search_result import SearchResult

Progress = Callable[[str, int, int], None]
ROUNDS = 20
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
    embedding: str = "float"
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
        plan = open_checkpoint(directory.path("checkpoint")).plan  # outputs that cost too much are no longer in it
        graphs = _export(directory, request, plan, progress)
        engines, missing, failed = _build(directory, graphs, plan, progress)
        features = features_of(directory.path("onnx", "cpu"), request.dev, request.columns)
        _compare(directory, engines, features, missing, progress)
        _bench(directory, engines, progress)
        summary = summarize(directory, plan, graphs, engines, missing, failed)
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
        embedding=request.embedding,
    )
    return plan


def compress_model(
    request: Request,
    out: str | Path,
    *,
    plan_file: str | Path | None = None,
    progress: Progress = lambda what, done, total: None,
) -> CompressionMetrics:
    """Fine-tune where the model has no head for the task, then compress it to the checkpoint directory `out`.

    The dense model is kept in the run directory ``<out>-dense``, and is made again when anything that it depends on changed.
    """
    out = Path(out)
    require_replaceable(out)
    from compressors.distributed import world_size
    from compressors.models import resolve
    from compressors.training.compress import compress

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
    model: str,
    task: str,
    train: str,
    out: Path,
    settings: SearchSettings,
    training: Settings,
    columns: Columns,
    progress: Progress,
) -> SearchResult:
    """Search a plan and write it with its evidence to `out`; see `compressors.search.plan_search.search`."""
    from compressors.search.plan_search import search

    return search(
        model,
        task=task,
        train=train,
        out=out,
        settings=settings,
        training=training,
        columns=columns,
        progress=progress,
    )


def _train(directory: RunDir, request: Request, plan: CompressionPlan, model: Path, progress: Progress) -> None:
    """Dense fine-tuning and compression. What they have done lies in ``work/`` until they are complete."""
    from compressors.training.compress import compress

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
    from compressors.training.compress import finetune

    files, names = _data(request)
    dense = {name: value for name, value in request.settings.dense_part().items() if name != "seed"}
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
        options={**names, "task": request.task, "settings": dense},
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


def _into(scratch: Path, work: Callable[..., Any], *arguments: Any, **options: Any) -> None:
    """Let a function that makes a directory of its own make it inside a stage's scratch directory."""
    work(*arguments, out=scratch / "result", **options)
    for path in (scratch / "result").iterdir():
        path.rename(scratch / path.name)
    (scratch / "result").rmdir()


def _export(directory: RunDir, request: Request, plan: CompressionPlan, progress: Progress) -> list[str]:
    from nxm_export.graph.exporter import export

    made = []
    for number, (name, (source, target, placement)) in enumerate(_GRAPHS.items()):
        if placement == "inputs-outputs" and placement_of(plan) in ("float", "inputs", "products"):
            continue
        placed = placement or (placement_of(plan) if source == "checkpoint" else None)
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

    kind = kind_of(plan)
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


def _compare(
    directory: RunDir, engines: Mapping[str, str], features: list[Any], missing: dict[str, str], progress: Progress
) -> None:
    from engines.parity.compare import OUTPUTS_FILE, compare
    from engines.parity.reports import PARITY_FILE

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
