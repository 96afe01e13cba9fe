"""All stages in a row, from a model and a data set to engines, their proof and a summary; each a directory of the run.

::

    RUN/dense -> RUN/checkpoint -> RUN/onnx/* -> RUN/engines/* -> RUN/compare/*, RUN/bench, RUN/choice -> RUN/summary

A stage whose inputs, options and outputs are unchanged is skipped (see `nxm_export.storage.run_dir`). Every number of
the summary is read back from the file of the stage that measured it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from nxm_export.contract.checkpoint import float32_bytes, open_checkpoint, read_config, task_at
from nxm_export.contract.choices import WEIGHT_STORAGE
from nxm_export.contract.families import family_of
from nxm_export.contract.io_spec import IOSpec
from nxm_export.contract.plan import INT8_ATTENTION, CompressionPlan
from nxm_export.contract.quantizer_placement import placement_of
from nxm_export.contract.records.run_summary import DIRECTORY as SUMMARY_DIRECTORY
from nxm_export.contract.records.run_summary import SUMMARY_FILE, RunSummary
from nxm_export.contract.tasks import task_named
from nxm_export.contract.token_budget import DEFAULT_MAX_LENGTH
from nxm_export.errors import DataError, EngineUnavailable, notice
from nxm_export.pipeline.early_refusals import require_more_text, require_possible
from nxm_export.pipeline.engine_stages import bench_built, build_engines, choose_engine, compare_built, drop_others
from nxm_export.pipeline.estimate import saved_bytes
from nxm_export.pipeline.labelled_texts import features_of
from nxm_export.pipeline.later_comparisons import summary_now
from nxm_export.pipeline.plan_choice import PlanChoice, first_plan
from nxm_export.pipeline.request import Request
from nxm_export.pipeline.run_engines import RunBackends, RunGraph, engines_of, graphs_of, run_backends
from nxm_export.pipeline.summary import kind_of, summarize, summarized_files
from nxm_export.progress import Progress, silent
from nxm_export.storage.atomic import require_apart, require_replaceable, write_atomic
from nxm_export.storage.disk_space import require_space, written_in
from nxm_export.storage.run_dir import RunDir

if TYPE_CHECKING:
    from compressors.models import ModelSource
    from compressors.search.settings import SearchSettings
    from compressors.settings import Settings
    from nxm_export.contract.records.checkpoint_metrics import CompressionMetrics

_NEEDED = ("torch", "transformers", "accelerate", "sklearn", "scipy", "onnx", "onnx_ir", "onnxscript", "onnxruntime")


def run(
    request: Request, out: str | Path, choice: PlanChoice = PlanChoice(), *, progress: Progress = silent
) -> RunSummary:
    """Run all stages into the run directory `out` and return the summary (also in ``summary/summary.json``).

    What failed on the way (an engine that differs from its checkpoint, cannot be built, or fails when it runs) is in
    the summary; its `require_passed` raises for it.
    """
    absent = [name for name in _NEEDED if find_spec(name) is None]
    if absent:  # said before hours of training, not after
        raise EngineUnavailable(f"`nxm run` needs {', '.join(absent)}; pip install 'nxm-export[all]'")
    from compressors.models import resolve

    backends = run_backends(request.backends)
    directory = RunDir(out)
    with directory.lock():
        source = resolve(request.model, request.revision)
        require_apart(directory.root, source.path)
        plan = first_plan(request, source, choice.file)
        require_possible(request, source, choice)
        _require_space(directory.root, source, plan, backends)
        _say(_head_notice(request, source))
        _finetune(directory, request, source.path, progress)
        if choice.search is not None:
            plan = _search(directory, request, choice.search, progress)
        _compress(directory, request, plan, progress)
        plan = open_checkpoint(directory.path("checkpoint")).plan  # outputs that cost too much are no longer in it
        graphs = _export(directory, request, plan, graphs_of(backends, kind_of(plan)), progress)
        engines = engines_of(backends, kind_of(plan), graphs)
        drop_others(directory, engines, graphs)
        built = build_engines(directory, engines, progress)
        features = features_of(directory.path("onnx", "cpu"), request.scored_on, request.columns)
        built = compare_built(directory, engines, built, features, progress)
        running = [engine for engine in engines if engine.name in built.compared]
        bench_built(directory, running, progress)
        chosen = choose_engine(directory, engines, built, backends)
        summary = summarize(directory, plan, graphs, built, chosen)
        directory.stage(
            "summary",
            SUMMARY_DIRECTORY,
            lambda scratch: write_atomic(scratch / SUMMARY_FILE, summary.to_json()),
            inputs=summarized_files(directory, built),
            options=summary.to_dict(),
        )
    return summary_now(directory.root)  # as JSON gives it back: what run returns is what show reads


def compress_model(
    request: Request,
    out: str | Path,
    *,
    plan: CompressionPlan | str | Path | None = None,
    progress: Progress = silent,
) -> CompressionMetrics:
    """Fine-tune where the model has no head for the task, then compress it to the checkpoint directory `out`.

    A `plan`, or its file, wins over the request's pattern, bits and places. The dense model is kept in the run
    directory ``<out>-dense``, and is made again when anything that it depends on changed.
    """
    out = Path(out)
    require_replaceable(out)
    from compressors.distributed import world_size
    from compressors.models import resolve
    from compressors.training.compress import compress

    source = resolve(request.model, request.revision)
    files = [] if plan is None or isinstance(plan, CompressionPlan) else [plan]
    files += request.more_text.files if request.more_text else ()
    files += [] if request.dev is None else [request.dev]
    require_apart(out, source.path, request.train, *files, within=False)
    plan = first_plan(request, source, plan)
    require_more_text(request, source)
    model = source.path
    if not source.head_fits(task_named(request.task)):
        if world_size() > 1:
            raise DataError(
                f"{request.model} has no {request.task} head; fine-tune it in one process first: under torchrun "
                "`nxm compress` takes the dense task model"
            )
        _say(_head_notice(request, source))
        directory = RunDir(out.with_name(f"{out.name}-dense"))
        with directory.lock():
            _finetune(directory, request, source.path, progress)
        model = directory.path("dense")
        request = replace(request, settings=_with_length_of(model, request))
    return compress(
        model,
        plan=plan,
        out=out,
        settings=request.settings,
        task=request.task,
        train=request.train,
        dev=request.dev,
        columns=request.columns,
        train_limit=request.train_limit,
        more_text=request.more_text,
        progress=progress,
    )


def head_notice(request: Request) -> str | None:
    """What is said before a head is trained anew, None where the model keeps its own."""
    from compressors.models import resolve

    return _head_notice(request, resolve(request.model, request.revision))


def _head_notice(request: Request, source: ModelSource) -> str | None:
    task = task_named(request.task)
    if source.head_fits(task):
        return None
    own = task_at(source.path, source.config)
    had = f"its {own} head is dropped (--task {own} keeps it)" if own else f"it has no {task.name} head"
    return f"{request.model}: {had}, and a new {task.name} head is trained before it is compressed"


def _say(text: str | None) -> None:
    if text is not None:
        notice(text)


def _require_space(root: Path, source: ModelSource, plan: CompressionPlan, backends: RunBackends) -> None:
    """Raise `ArtifactError` where the disk has no room for what a run keeps: two models, its graphs and its engines."""
    weights = float32_bytes(source.path)
    compressed = weights - saved_bytes(plan, source, WEIGHT_STORAGE)  # that of trt may have INT8
    graphs = graphs_of(backends, kind_of(plan))
    files = [*graphs, *(engine.graph for engine in engines_of(backends, kind_of(plan), [*graphs]))]
    sizes = [weights if graphs[name].source == "dense" else compressed for name in files]
    needed = 2 * weights + sum(sizes)  # the dense model and the checkpoint
    require_space(root, needed - written_in(root), "a run, with its models, graphs and engines,")


def _search(directory: RunDir, request: Request, settings: SearchSettings, progress: Progress) -> CompressionPlan:
    """Search a plan for the dense model, on the training data alone; what it has done lies in ``work/`` until then."""
    from compressors.search.plan_search import search

    files, names = _data(request)
    training = _with_length_of(directory.path("dense"), request)

    def work(out: Path) -> None:
        search(
            directory.path("dense"),
            task=request.task,
            train=request.train,
            out=out,
            settings=settings,
            training=training,
            columns=request.columns,
            train_limit=request.train_limit,
            work_dir=directory.path("work", "search"),
            progress=progress,
        )

    directory.stage(
        "search",
        "search",
        lambda scratch: _into(scratch, work),
        inputs={"dense": directory.path("dense"), **{name: file for name, file in files.items() if name == "train"}},
        options={
            **{key: value for key, value in names.items() if key != "dev"},
            "search": asdict(settings),
            "settings": asdict(training),
        },
        seed=request.settings.seed,
    )
    return CompressionPlan.load(directory.path("search", "plan.json"))


def _compress(directory: RunDir, request: Request, plan: CompressionPlan, progress: Progress) -> None:
    """Compression training. What it has done lies in ``work/`` until it is complete."""
    from compressors.training.compress import compress

    settings = _with_length_of(directory.path("dense"), request)
    files, names = _data(request)
    more, more_names = _more_text(request)

    def work(out: Path) -> None:
        compress(
            directory.path("dense"),
            plan=plan,
            out=out,
            settings=settings,
            work_dir=directory.path("work", "compress"),
            task=request.task,
            train=request.train,
            dev=request.dev,
            columns=request.columns,
            train_limit=request.train_limit,
            more_text=request.more_text,
            progress=progress,
        )

    directory.stage(
        "compress",
        "checkpoint",
        lambda scratch: _into(scratch, work),
        inputs={"dense": directory.path("dense"), **files, **more},
        options={**names, **more_names, "plan": plan.to_dict(), "settings": asdict(settings)},
        seed=request.settings.seed,
    )
    shutil.rmtree(directory.path("work"), ignore_errors=True)


def _with_length_of(dense: Path, request: Request) -> Settings:
    """The settings with the longest input that a dense model was trained for; None, the default, where that is no
    more."""
    config, task = read_config(dense), task_named(request.task)
    length = IOSpec.of(dense, config, family_of(config, source=str(dense)), task).max_length
    return replace(request.settings, max_length=length if length > DEFAULT_MAX_LENGTH else None)


def _finetune(directory: RunDir, request: Request, model: Path, progress: Progress) -> None:
    from compressors.training.compress import finetune

    files, names = _data(request)
    # Without the seed, which the stage records by itself.
    dense = {name: value for name, value in request.settings.dense_part().items() if name != "seed"}

    def work(out: Path) -> None:
        finetune(
            request.model,
            out=out,
            settings=request.settings,
            revision=request.revision,
            work_dir=directory.path("work", "dense"),
            task=request.task,
            train=request.train,
            dev=request.scored_on,
            columns=request.columns,
            train_limit=request.train_limit,
            progress=progress,
        )

    directory.stage(
        "dense",
        "dense",
        lambda scratch: _into(scratch, work),
        inputs={"model": model, **files},
        options={**names, "task": request.task, "settings": dense},
        seed=request.settings.seed,
    )


def _data(request: Request) -> tuple[dict[str, Path], dict[str, object]]:
    """(files of data, which are hashed; options of data, among them the names of data that is no file)."""
    files, names = _split({"train": request.train, "dev": request.scored_on})
    return files, {**names, "train_limit": request.train_limit, "columns": asdict(request.columns)}


def _more_text(request: Request) -> tuple[dict[str, Path], dict[str, object]]:
    """(files of more text, which are hashed; its share and names that are no file). Nothing where there is none: runs
    from before it need not be made again."""
    if request.more_text is None:
        return {}, {}
    numbered = enumerate(request.more_text.files, start=1)
    files, names = _split({f"more text {number}": source for number, source in numbered})
    return files, {**names, "more_text_share": request.more_text.share}


def _split(sources: Mapping[str, str]) -> tuple[dict[str, Path], dict[str, str]]:
    """(those that are files, those that are names of something else), by label."""
    files = {label: Path(source) for label, source in sources.items() if Path(source).is_file()}
    return files, {label: source for label, source in sources.items() if label not in files}


def _into(scratch: Path, work: Callable[[Path], object]) -> None:
    """Let a function that makes a directory of its own make it inside a stage's scratch directory."""
    work(scratch / "result")
    for path in (scratch / "result").iterdir():
        path.rename(scratch / path.name)
    (scratch / "result").rmdir()


def _export(
    directory: RunDir,
    request: Request,
    plan: CompressionPlan,
    graphs: Mapping[str, RunGraph],
    progress: Progress,
) -> list[str]:
    """Export every graph of the run that the plan allows; returns their names."""
    from nxm_export.graph.exporter import INT8_ATTENTION_TOKENS, export
    from nxm_export.graph.int4_storage import int4_weights
    from nxm_export.graph.targets import target_named

    made = []
    checkpoint = open_checkpoint(directory.path("checkpoint"))
    spec = IOSpec.of(checkpoint.path, checkpoint.config, checkpoint.family, task_named(request.task))
    length = spec.max_length
    for number, (name, graph) in enumerate(graphs.items()):
        source, target, placement = graph.source, graph.target, graph.placement
        if placement == "inputs-outputs" and placement_of(plan) in ("float", "inputs", "products"):
            continue
        placed = placement or (placement_of(plan) if source == "checkpoint" else None)
        progress("export", number, len(graphs))
        integers = source == "checkpoint" and placement != "float"
        stored = request.weights_stored if integers else WEIGHT_STORAGE
        if stored == "int4" and not int4_weights(plan, target_named(target).int4):
            notice(f"onnx/{name} keeps its weights in INT8: target {target} takes none of this plan's as INT4")
            stored = WEIGHT_STORAGE
        exported = partial(
            export,
            directory.path(source),
            target=target,
            task=request.task,
            placement=placement,  # None: all that was trained, of INT8 attention as far as it goes
            weights_stored=stored,
        )
        if placement is None and placed in INT8_ATTENTION and length > INT8_ATTENTION_TOKENS:
            notice(
                f"onnx/{name} computes attention in float: INT8 attention is for at most {INT8_ATTENTION_TOKENS} "
                f"tokens, and this model takes {length}"
            )
        options: dict[str, object] = {"target": target, "placement": placed, "task": request.task}
        if stored != WEIGHT_STORAGE:  # named where it is no default: runs from before it need no export again
            options["weights_stored"] = stored
        directory.stage(
            f"export {name}",
            f"onnx/{name}",
            partial(_into, work=exported),
            inputs={source: directory.path(source)},
            options=options,
        )
        made.append(name)
    progress("export", len(graphs), len(graphs))
    return made
