"""What a run directory holds, as plain data: whatever stages there are, and what is missing, damaged or changed since.

Nothing is computed here that a stage measures: numbers keep the file and the place that they were read from
(`nxm_export.reporting.figures.Figure`). Every file that is read is hashed and compared with the manifest; an engine
with its passport; a comparison with the engine that it names. What does not agree is said, and never silently shown.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from nxm_export.contract.checkpoint import PLAN_FILE, Checkpoint, open_checkpoint, read_config, task_at
from nxm_export.contract.io_spec import SPEC_FILE, IOSpec, load_spec
from nxm_export.contract.plan import CompressionPlan
from nxm_export.contract.records.checkpoint_metrics import (
    METRICS_FILE,
    CompressionMetrics,
    DenseMetrics,
    read_metrics_of,
)
from nxm_export.contract.records.run_summary import DIRECTORY, SUMMARY_FILE, RunSummary, read_summary_file
from nxm_export.contract.records.search_result import SEARCH_FILE, SearchResult, read_search_result
from nxm_export.contract.records.train_log import TRAIN_LOG_FILE, TrainLogLine, read_train_log
from nxm_export.contract.records.verify_report import VERIFY_FILE, VerifyReport, read_verify_report
from nxm_export.contract.tasks import TASKS
from nxm_export.errors import ArtifactError, NxmError
from nxm_export.reporting.engine_facts import PASSPORT, EngineEntry, read_engine, worst_output
from nxm_export.reporting.figures import Figure, Key, RunFile
from nxm_export.reporting.matrices import Matrix, Sample, matrices, sample
from nxm_export.reporting.run_files import Files
from nxm_export.storage.hashing import file_hash
from nxm_export.storage.run_dir import MANIFEST, Manifest, RunDir, StageRecord

if TYPE_CHECKING:
    from engines.benchmark.latency import BenchReport

Metrics = TypeVar("Metrics", DenseMetrics, CompressionMetrics)
SUMMARY = f"{DIRECTORY}/{SUMMARY_FILE}"


@dataclass(frozen=True)
class Gap:
    """Something that the page would show, why it does not, and the command that makes it (None: there is none)."""

    what: str
    why: str
    command: str | None = None


@dataclass(frozen=True)
class GraphEntry:
    """One exported graph: its size, and what `nxm verify` found on it."""

    name: str
    bytes: Figure | None
    verify: RunFile[VerifyReport] | None


@dataclass(frozen=True)
class SearchEntry:
    """A directory of `nxm search`; `trials` are the rows of its CSV file, `planned` says whether the run uses its
    plan."""

    result: RunFile[SearchResult]
    trials: tuple[Mapping[str, str], ...]
    sensitivity: Mapping[tuple[str, str], float]
    planned: bool


@dataclass(frozen=True)
class Run:
    """All facts of a run for a report or a card."""

    root: Path
    stages: Mapping[str, StageRecord]
    summary: RunFile[RunSummary] | None = None
    dense: RunFile[DenseMetrics] | None = None
    compressed: RunFile[CompressionMetrics] | None = None
    model_type: str | None = None
    spec: IOSpec | None = None
    plan: CompressionPlan | None = None
    graphs: tuple[GraphEntry, ...] = ()
    engines: tuple[EngineEntry, ...] = ()
    benches: tuple[RunFile[BenchReport], ...] = ()
    logs: Mapping[str, tuple[TrainLogLine, ...]] = field(default_factory=dict)
    matrices: tuple[Matrix, ...] = ()
    sample: Sample | None = None
    search: SearchEntry | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    missing: tuple[Gap, ...] = ()
    doubts: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The run directory's own name."""
        return self.root.resolve().name

    def figure(self, *keys: Key) -> Figure | None:
        """A value of the summary, None where there is no summary or no such value."""
        return None if self.summary is None else self.summary.figure(*keys)


def read_run(root: str | Path, search: str | Path | None = None) -> Run:
    """Read a run directory, finished or not; `search` is a directory of `nxm search` (``RUN/search`` by default).

    Raises `ArtifactError` when `root` is no run, when nothing has been made in it yet, and for a `search` that is none.
    """
    directory = RunDir.open(root)
    root, stages = directory.root, directory.manifest.stages
    files = Files(root, _recorded(directory.manifest))
    checkpoint = _checkpoint(files)
    run = Run(
        root=root,
        stages=stages,
        summary=files.decoded(SUMMARY, read_summary_file),
        dense=files.decoded(f"dense/{METRICS_FILE}", partial(_metrics, DenseMetrics)),
        compressed=files.decoded(f"checkpoint/{METRICS_FILE}", partial(_metrics, CompressionMetrics)),
        model_type=_model_type(root),
        plan=checkpoint.plan if checkpoint else None,
        graphs=tuple(_graphs(files, stages)),
        engines=tuple(_engines(files, stages)),
        benches=tuple(_benches(files)),
    )
    if not (run.graphs or run.engines or run.compressed or run.dense or run.summary):
        raise ArtifactError(f"{root}: nothing has been made in this run yet; run {_again(stages)} to go on with it")
    searched = _search(root, search, run.plan)
    verified = {graph.name: graph.verify for graph in run.graphs}
    run = replace(
        run,
        spec=next(filter(None, (_spec(files, f"onnx/{graph.name}") for graph in run.graphs)), None),
        logs={
            stage: rows
            for stage in ("dense", "checkpoint")
            if (rows := files.lines(f"{stage}/{TRAIN_LOG_FILE}", read_train_log))
        },
        matrices=tuple(matrices(root, checkpoint, verified, searched.sensitivity if searched else None)),
        sample=sample(checkpoint, files),
        search=searched,
        files=files.hashes,
    )
    doubts = (*files.doubts, *_contradictions(run))
    return replace(run, missing=tuple(_missing(run, search)), doubts=doubts)


def read_engine_directory(directory: Path) -> Run:
    """A run that has nothing but one engine: its passport, what lies beside it, and its input spec.

    Raises `ArtifactError` when `directory` has no passport of this version.
    """
    from engines.passport import covered_spec

    files = Files(directory, {})
    engine = read_engine(files, directory.resolve().name, "", [""])
    if engine.passport is None:
        reason = files.doubts[0] if files.doubts else f"it has no {PASSPORT}, no {PLAN_FILE} and no {MANIFEST}"
        raise ArtifactError(
            f"{directory} is neither a run, a compressed checkpoint nor an engine directory: {reason}; dense models "
            "and graphs have no card: `nxm compress` and `nxm build` make what has one"
        )
    passport = engine.passport.content
    spec = files.decoded(SPEC_FILE, lambda file: covered_spec(file.parent, passport))
    return Run(
        root=directory,
        stages={},
        model_type=passport.graph.get("model_type"),
        spec=spec.content if spec else None,
        engines=(engine,),
        files=files.hashes,
        doubts=tuple(files.doubts),
    )


def read_checkpoint(directory: Path) -> Run:
    """A run that has nothing but one compressed checkpoint: its plan, its metrics, and the inputs of its model.

    Raises `ArtifactError` for a checkpoint that is damaged.
    """
    checkpoint = open_checkpoint(directory)
    files, task = Files(directory, {}), task_at(directory, checkpoint.config)
    return Run(
        root=directory,
        stages={},
        compressed=files.decoded(METRICS_FILE, partial(_metrics, CompressionMetrics)),
        model_type=str(checkpoint.config["model_type"]),
        spec=IOSpec.of(directory, checkpoint.config, checkpoint.family, TASKS[task]) if task else None,
        plan=checkpoint.plan,
        matrices=tuple(matrices(directory, checkpoint, {}, None)),
        files=files.hashes,
        doubts=tuple(files.doubts),
    )


def _recorded(manifest: Manifest) -> dict[str, str]:
    """The sha256 of every file that a stage wrote."""
    return {file: digest for record in manifest.stages.values() for file, digest in record.outputs.items()}


def _below(root: Path, directory: str, pattern: str) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in (root / directory).glob(pattern) if path.is_file())


def _metrics(kind: type[Metrics], file: Path) -> Metrics:
    return read_metrics_of(kind, file.parent)


def _benches(files: Files) -> Iterator[RunFile[BenchReport]]:
    from engines.benchmark.latency import read_bench_report

    for file in _below(files.root, "bench", "*.json"):
        if report := files.decoded(file, read_bench_report):
            yield report


def _spec(files: Files, directory: str) -> IOSpec | None:
    spec = files.decoded(f"{directory}/{SPEC_FILE}", lambda file: load_spec(file.parent))
    return spec.content if spec else None


def _model_type(root: Path) -> str | None:
    """What the model's config calls it."""
    for stage in ("checkpoint", "dense"):
        try:
            model_type = read_config(root / stage).get("model_type")
        except ArtifactError:
            continue
        return None if model_type is None else str(model_type)
    return None


def _checkpoint(files: Files) -> Checkpoint | None:
    if not (files.root / "checkpoint" / PLAN_FILE).is_file():
        return None
    try:
        files.check(f"checkpoint/{PLAN_FILE}")
        return open_checkpoint(files.root / "checkpoint")
    except NxmError as error:
        files.doubts.append(str(error))
        return None


def _in_order(names: list[str], stages: Iterable[str], verb: str) -> list[str]:
    """Names in the order in which the stages ``verb NAME`` ran, others behind."""
    order = [stage.removeprefix(f"{verb} ") for stage in stages if stage.startswith(f"{verb} ")]
    return sorted(names, key=lambda name: order.index(name) if name in order else len(order))


def _graphs(files: Files, stages: Iterable[str]) -> Iterator[GraphEntry]:
    names = [file.split("/")[1] for file in _below(files.root, "onnx", "*/model.onnx")]
    for name in _in_order(names, stages, "export"):
        verify = files.decoded(f"onnx/{name}/{VERIFY_FILE}", read_verify_report)
        if verify is not None and _is_of_other_files(files, f"onnx/{name}", verify.content):
            files.doubts.append(
                f"{verify.file} is about another graph than the one beside it, or than its weights (their sha256 "
                "differ): it is not shown; export again"
            )
            verify = None
        yield GraphEntry(name, files.size(f"onnx/{name}/model.onnx"), verify)


def _is_of_other_files(files: Files, directory: str, report: VerifyReport) -> bool:
    """True when a file that was verified is not there, or is another one; older reports name none."""
    for name, digest in (report.hashes or {}).items():
        file = files.root / directory / name
        if not file.is_file() or file_hash(file) != digest:
            return True
    return False


def _engines(files: Files, stages: Iterable[str]) -> Iterator[EngineEntry]:
    """Engine directories at any depth (twins are three in one), and comparisons whose engine is gone."""
    made = [file.removesuffix(f"/{PASSPORT}") for file in _below(files.root, "engines", f"**/{PASSPORT}")]
    names = [directory.removeprefix("engines/") for directory in made]
    compared = [file.split("/")[1] for file in _below(files.root, "compare", "*/parity.json")]
    for name in _in_order(list(dict.fromkeys([*names, *compared])), stages, "build"):
        yield read_engine(files, name, f"engines/{name}", [f"compare/{name}", f"engines/{name}"])


def _search(root: Path, given: str | Path | None, plan: CompressionPlan | None) -> SearchEntry | None:
    directory = Path(given) if given is not None else root / "search"
    if not (directory / SEARCH_FILE).is_file():
        if given is not None:
            raise ArtifactError(f"{directory} has no {SEARCH_FILE}; give the --out of an `nxm search`")
        return None
    files = Files(directory, {})
    result = files.decoded(SEARCH_FILE, read_search_result)
    if result is None:
        raise ArtifactError(f"{directory}: {files.doubts[0]}")
    try:
        same = plan is not None and CompressionPlan.load(directory / "plan.json") == plan
    except NxmError:
        same = False
    sensitivity = {}
    for row in files.rows("sensitivity.csv"):
        try:
            sensitivity[row["weight"], row["option"]] = float(row["kl"])
        except (KeyError, TypeError, ValueError):
            continue  # of an interrupted or foreign file
    return SearchEntry(result, files.rows("trials.csv"), sensitivity, same)


def _contradictions(run: Run) -> Iterator[str]:
    """Numbers of the summary that the files behind it no longer say."""
    pairs: list[tuple[tuple[str, ...], Figure | None]] = [
        (("dense",), run.dense.figure("value") if run.dense else None),
        (("checkpoint",), run.compressed.figure("value") if run.compressed else None),
    ]
    for engine in run.engines:
        if engine.parity is None:
            continue
        report = engine.parity
        pairs += [
            (("parity", engine.name, "passed"), report.figure("passed")),
            (("parity", engine.name, "value"), report.figure("engine_value")),
            (("parity", engine.name, "agreement"), worst_output(report, "agreement", least=True)),
            (("parity", engine.name, "max_abs"), worst_output(report, "max_abs")),
        ]
    for keys, actual in pairs:
        recorded = run.figure(*keys)
        if recorded is not None and actual is not None and recorded.value != actual.value:
            yield (
                f"{recorded.file} says {recorded.value} for {' '.join(keys)}, and {actual.file} says {actual.value}; "
                "run the same command again to bring the summary up to date"
            )


def _missing(run: Run, search: str | Path | None) -> Iterator[Gap]:
    again, root = _again(run.stages), shlex.quote(str(run.root))
    stages: tuple[tuple[str, object, str], ...] = (
        ("the dense model's metric", run.dense, "the stage dense has not finished"),
        ("the compressed model and its plan", run.plan, "the stage compress has not finished"),
        ("the graphs and what was found stored in them", run.graphs, "no graph was exported"),
        ("the engines", [e for e in run.engines if e.passport], "no engine was built"),
        ("parity", [e for e in run.engines if e.parity], "no engine was compared with its checkpoint"),
        ("latency", run.benches, "no engine was timed"),
        ("the paired interval of the difference to the dense model", run.summary, "the run has no summary"),
        ("training curves", run.logs, "no training log lies in the run"),
    )
    yield from (Gap(what, why, again) for what, present, why in stages if not present)
    if run.summary is not None:
        yield from (Gap(f"engine {name}", why) for name, why in run.summary.content.missing.items())
        failed = run.summary.content.failed.items()
        yield from (Gap(f"engine {name}", f"failed: {why}") for name, why in failed)
    if search is None and run.search is None:
        yield Gap(
            "the trade-off of other plans, and the measured sensitivity of every matrix",
            "no search was made for this run",
            f"nxm search {root}/dense --train TRAIN --out {root}/search",
        )
    engines = [engine for engine in run.engines if engine.sparse_kernels]
    sparse = run.plan is not None and any(s.pattern and s.pattern.implies_2_4 for s in run.plan.weights.values())
    known = [row for engine in engines for row in engine.matrices if row.planned_sparse and row.chosen is not None]
    if run.graphs and sparse and not known:
        yield Gap(
            "which matrices run on sparse kernels",
            "kernels are chosen on the GPU, and no engine of this run was built on one"
            if engines
            else "no TensorRT engine was built",
            f"nxm build {root}/onnx/trt/model.onnx --backend trt --out {root}/engines/trt",
        )


def _again(stages: Mapping[str, StageRecord]) -> str:
    """The command of this run, as it was typed where the manifest knows it."""
    for record in stages.values():
        if len(record.command) > 1 and record.command[1] == "run":
            return shlex.join(["nxm", *record.command[1:]])
    return "the same `nxm run`"
