"""What a run directory holds, as plain data: whatever stages there are, and what is missing, damaged or changed since.

Nothing is computed here that a stage measures: numbers keep the file and the place that they were read from
(`nxm_export.reporting.figures.Figure`). Every file that is read is hashed and compared with the manifest; an engine with its
passport; a comparison with the engine that it names. What does not agree is said, and never silently shown.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nxm_export.contract.checkpoint import PLAN_FILE, Checkpoint, open_checkpoint, read_config
from nxm_export.contract.plan import CompressionPlan
from nxm_export.errors import ArtifactError, NxmError
from nxm_export.reporting.figures import Figure, Source
from nxm_export.reporting.matrices import Matrix, Sample, matrices, sample
from nxm_export.reporting.run_files import PASSPORT, Files
from nxm_export.storage.hashing import file_hash
from nxm_export.storage.run_dir import MANIFEST, RunDir, StageRecord

SUMMARY = "summary/summary.json"
_TRT = ("trt", "trt_rtx")


@dataclass(frozen=True)
class Gap:
    """Something that the page would show, why it does not, and the command that makes it (None: there is none)."""

    what: str
    why: str
    command: str | None = None


@dataclass(frozen=True)
class Graph:
    """One exported graph: its size, and what `nxm verify` found on it."""

    name: str
    bytes: Figure | None
    verify: Source | None


@dataclass(frozen=True)
class BlockError:
    """How far two backends are apart behind one block of the encoder, from a bisection or a comparison per layer.

    `max_abs` has travelled through all blocks so far; `own` is what this block adds, which `passed` judges (None where
    nobody did: its input was not finite, or the file has no verdicts).
    """

    block: str
    max_abs: Figure
    tolerance: Figure | None
    own: Figure | None = None
    own_tolerance: Figure | None = None
    passed: bool | None = None


@dataclass(frozen=True)
class Engine:
    """One engine directory, or a comparison whose engine is gone.

    `truth` are the rows of `engines.sparsity.report` (which matrix runs sparse, on which kernel), empty where a backend has none.
    `blocks` are errors per encoder block where somebody looked for them.
    """

    name: str
    passport: Source | None
    bytes: Figure | None
    parity: Source | None
    blocks: tuple[BlockError, ...]
    truth: tuple[Mapping[str, Any], ...]
    sparse_share: float | None

    @property
    def parts_in(self) -> str | None:
        """The first block that a bisection found to part from the checkpoint."""
        return next((block.block for block in self.blocks if block.passed is False), None)

    @property
    def is_trt(self) -> bool:
        """True for TensorRT and TensorRT-RTX, the runtimes that have sparse kernels."""
        return self.passport is not None and self.passport.data.get("backend") in _TRT


@dataclass(frozen=True)
class Search:
    """A directory of `nxm search`; `trials` are the rows of its CSV file, `front` its best plans at
    other compressions, `planned` whether the run uses its plan."""

    source: Source
    trials: tuple[Mapping[str, Any], ...]
    front: tuple[Mapping[str, Any], ...]
    sensitivity: Mapping[tuple[str, str], float]
    planned: bool


@dataclass(frozen=True)
class Run:
    """Everything that a report or a card can say of a run."""

    root: Path
    stages: Mapping[str, StageRecord]
    summary: Source | None
    dense: Source | None
    compressed: Source | None
    config: Mapping[str, Any]
    spec: Source | None
    plan: CompressionPlan | None
    graphs: tuple[Graph, ...]
    engines: tuple[Engine, ...]
    benches: tuple[Source, ...]
    logs: Mapping[str, tuple[Mapping[str, Any], ...]]
    matrices: tuple[Matrix, ...]
    sample: Sample | None
    search: Search | None
    files: Mapping[str, str]
    missing: tuple[Gap, ...]
    doubts: tuple[str, ...]

    @property
    def name(self) -> str:
        """The run directory's own name."""
        return self.root.resolve().name

    def figure(self, *keys: str | int) -> Figure | None:
        """A value of the summary, None where there is no summary or no such value."""
        return None if self.summary is None else self.summary.at(*keys)


def read_run(root: str | Path, search: str | Path | None = None) -> Run:
    """Read a run directory, finished or not; `search` is a directory of `nxm search` (``RUN/search`` by default).

    Raises `ArtifactError` when `root` is no run, when nothing has been made in it yet, and for a `search` that is none.
    """
    directory = RunDir.open(root)
    root, stages = directory.root, directory.manifest.stages
    recorded: dict[str, str] = {}
    for record in stages.values():
        recorded.update(record.outputs)
    files = Files(root, recorded)
    checkpoint = _checkpoint(files)
    plan = checkpoint.plan if checkpoint else None
    graphs = tuple(_graphs(files, stages))
    engines = tuple(_engines(files, stages))
    summary = files.json(SUMMARY)
    compressed, dense = files.json("checkpoint/metrics.json"), files.json("dense/metrics.json")
    if not (graphs or engines or compressed or dense or summary):
        raise ArtifactError(f"{root}: nothing has been made in this run yet; run {_again(stages)} to go on with it")
    searched = _search(root, search, plan)
    run = Run(
        root=root,
        stages=stages,
        summary=summary,
        dense=dense,
        compressed=compressed,
        config=_config(root),
        spec=next(filter(None, (files.json(f"onnx/{graph.name}/spec.json") for graph in graphs)), None),
        plan=plan,
        graphs=graphs,
        engines=engines,
        benches=tuple(filter(None, (files.json(file, "latency.json") for file in _below(root, "bench", "*.json")))),
        logs={stage: rows for stage in ("dense", "checkpoint") if (rows := files.lines(f"{stage}/train_log.jsonl"))},
        matrices=tuple(
            matrices(
                root,
                checkpoint,
                {graph.name: graph.verify for graph in graphs},
                searched.sensitivity if searched else None,
            )
        ),
        sample=sample(checkpoint, files),
        search=searched,
        files=files.hashes,
        missing=(),
        doubts=(),
    )
    doubts = (*files.doubts, *_contradictions(run))
    return replace(run, missing=tuple(_missing(run, search)), doubts=doubts)


def read_engine_directory(directory: Path) -> Run:
    """A run that has nothing but one engine: its passport, what lies beside it, and its input spec.

    Raises `ArtifactError` when `directory` has no passport of this version.
    """
    files = Files(directory, {})
    engine = read_engine(files, directory.resolve().name, "", [""])
    if engine.passport is None:
        reason = files.doubts[0] if files.doubts else f"it has no {PASSPORT} and no {MANIFEST}"
        raise ArtifactError(f"{directory} is neither an engine directory nor a run: {reason}")
    graph = engine.passport.data.get("graph")
    return Run(
        root=directory,
        stages={},
        summary=None,
        dense=None,
        compressed=None,
        config=graph if isinstance(graph, dict) else {},
        spec=files.json("spec.json"),
        plan=None,
        graphs=(),
        engines=(engine,),
        benches=(),
        logs={},
        matrices=(),
        sample=None,
        search=None,
        files=files.hashes,
        missing=(),
        doubts=tuple(files.doubts),
    )


def _below(root: Path, directory: str, pattern: str) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in (root / directory).glob(pattern) if path.is_file())


def _config(root: Path) -> Mapping[str, Any]:
    for stage in ("checkpoint", "dense"):
        try:
            return read_config(root / stage)
        except ArtifactError:
            continue
    return {}


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


def _graphs(files: Files, stages: Iterable[str]) -> Iterator[Graph]:
    names = [file.split("/")[1] for file in _below(files.root, "onnx", "*/model.onnx")]
    for name in _in_order(names, stages, "export"):
        yield Graph(name, files.size(f"onnx/{name}/model.onnx"), files.json(f"onnx/{name}/verify.json"))


def _engines(files: Files, stages: Iterable[str]) -> Iterator[Engine]:
    """Engine directories at any depth (twins are three in one), and comparisons whose engine is gone."""
    made = [file.removesuffix(f"/{PASSPORT}") for file in _below(files.root, "engines", f"**/{PASSPORT}")]
    names = [directory.removeprefix("engines/") for directory in made]
    compared = [file.split("/")[1] for file in _below(files.root, "compare", "*/parity.json")]
    for name in _in_order(list(dict.fromkeys([*names, *compared])), stages, "build"):
        yield read_engine(files, name, f"engines/{name}", [f"compare/{name}", f"engines/{name}"])


def read_engine(files: Files, name: str, directory: str, evidence: list[str]) -> Engine:
    """One engine `directory` below the root of `files`; `evidence` are directories that may hold its comparison."""
    passport = files.json(_join(directory, PASSPORT))
    parity = next(filter(None, (files.json(_join(place, "parity.json")) for place in evidence)), None)
    bisected = [files.json(_join(place, "bisect.json")) for place in evidence]
    engine = None
    if passport is not None:
        file = _join(directory, Path(str(passport.data.get("engine", ""))).name)
        engine = files.size(file)
        wanted = str(passport.data.get("engine_sha256"))
        if engine is None:
            files.doubts.append(f"{file} is missing, and the passport beside it names it")
        elif file_hash(files.root / file) != wanted:
            files.doubts.append(f"{file} is not the engine of its passport (its sha256 differs); build it again")
        parity = _of_this_engine(files, parity, passport.file, wanted)
        bisected = [_of_this_engine(files, source, passport.file, wanted) for source in bisected]
    blocks = [block for source in bisected for block in _blocks(source)]
    truth, share = _truth(files, directory, passport)
    return Engine(name, passport, engine, parity, tuple(blocks or _blocks(parity)), truth, share)


def worst_output(report: Source, key: str, *, least: bool = False) -> Figure | None:
    """The largest (or smallest) value of a comparison's outputs, which is the one that a summary has; that of the first output
    where one of them has none."""
    values = [output.get(key) for output in report.data["outputs"]]
    numbers = [value for value in values if isinstance(value, (int, float))]
    if not numbers or len(numbers) < len(values):
        return report.at("outputs", 0, key)
    return report.at("outputs", numbers.index(min(numbers) if least else max(numbers)), key)


def _of_this_engine(files: Files, source: Source | None, passport: str, sha256: str) -> Source | None:
    """The result, unless it names another engine than the passport does."""
    if source is None or source.data.get("engine_sha256") == sha256:
        return source
    files.doubts.append(
        f"{source.file} compared another engine than the one of {passport} (their sha256 differ): it is not shown; compare again"
    )
    return None


def _join(directory: str, name: str) -> str:
    return f"{directory}/{name}" if directory else name


def _blocks(source: Source | None) -> Iterator[BlockError]:
    """Errors per block: a list ``blocks`` (or ``layers``) of objects with a name and ``max_abs``."""
    for key in ("blocks", "layers"):
        rows = source.data.get(key) if source is not None else None
        if source is None or not isinstance(rows, list):
            continue
        for number, row in enumerate(rows):
            error = source.at(key, number, "accumulated_max_abs") or source.at(key, number, "max_abs")
            if isinstance(row, dict) and error is not None:
                name = next((row[part] for part in ("block", "layer", "name", "output") if part in row), number)
                passed = row.get("passed")
                yield BlockError(
                    str(name),
                    error,
                    source.at(key, number, "accumulated_max_tolerance") or source.at(key, number, "max_tolerance"),
                    source.at(key, number, "isolated_max_abs"),
                    source.at(key, number, "isolated_max_tolerance"),
                    passed if isinstance(passed, bool) else None,
                )


def _truth(files: Files, directory: str, passport: Source | None) -> tuple[tuple[Mapping[str, Any], ...], float | None]:
    if passport is None or passport.data.get("backend") not in _TRT:
        return (), None
    from engines.sparsity.report import read_sparsity_report

    try:
        report = read_sparsity_report(files.root / directory)
    except NxmError as error:
        files.doubts.append(f"{directory or '.'}: which kernels run cannot be read ({error})")
        return (), None
    return tuple(report.to_dict()["weights"]), report.sparse_share


def _search(root: Path, given: str | Path | None, plan: CompressionPlan | None) -> Search | None:
    directory = Path(given) if given is not None else root / "search"
    if not (directory / "search.json").is_file():
        if given is not None:
            raise ArtifactError(f"{directory} has no search.json; give the --out of an `nxm search`")
        return None
    files = Files(directory, {})
    source = files.json("search.json")
    if source is None:
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
            continue  # of an interrupted or foreign table
    front = source.data.get("pareto")
    rows = tuple(row for row in front if isinstance(row, dict)) if isinstance(front, list) else ()
    return Search(source, files.rows("trials.csv"), rows, sensitivity, same)


def _contradictions(run: Run) -> Iterator[str]:
    """Numbers of the summary that the files behind it no longer say."""
    pairs: list[tuple[tuple[str, ...], Figure | None]] = [
        (("dense",), run.dense.at("value") if run.dense else None),
        (("checkpoint",), run.compressed.at("value") if run.compressed else None),
    ]
    for engine in run.engines:
        if engine.parity is None:
            continue
        report = engine.parity
        pairs += [
            (("parity", engine.name, "passed"), report.at("passed")),
            (("parity", engine.name, "value"), report.at("engine_value")),
            (("parity", engine.name, "agreement"), worst_output(report, "agreement", least=True)),
            (("parity", engine.name, "max_abs"), worst_output(report, "max_abs")),
        ]
    for keys, found in pairs:
        said = run.figure(*keys)
        if said is not None and found is not None and said.value != found.value:
            yield (
                f"{said.file} says {said.value} for {' '.join(keys)}, and {found.file} says {found.value}; run the same "
                "command again to bring the summary up to date"
            )


def _missing(run: Run, search: str | Path | None) -> Iterator[Gap]:
    again, root = _again(run.stages), shlex.quote(str(run.root))
    stages = (
        ("the dense model's metric", run.dense, "the stage dense has not finished"),
        ("the compressed model and its plan", run.plan, "the stage compress has not finished"),
        ("the graphs and what was found stored in them", run.graphs, "no graph was exported"),
        ("the engines", [e for e in run.engines if e.passport], "no engine was built"),
        ("parity", [e for e in run.engines if e.parity], "no engine was compared with its checkpoint"),
        ("latency", run.benches, "no engine was timed"),
        ("the paired interval of the difference to the dense model", run.summary, "the run has no summary"),
        ("training curves", run.logs, "no training log lies in the run"),
    )
    for what, found, why in stages:
        if not found:
            yield Gap(what, why, again)
    for kind, why in (("missing", ""), ("failed", "could not be built: ")):
        engines = run.summary.data.get(kind) if run.summary else None
        for name, reason in (engines if isinstance(engines, dict) else {}).items():
            yield Gap(f"engine {name}", f"{why}{reason}")
    if search is None and run.search is None:
        yield Gap(
            "the trade-off of other plans, and the measured sensitivity of every matrix",
            "no search was made for this run",
            f"nxm search {root}/dense --train TRAIN --out {root}/search",
        )
    trt = [engine for engine in run.engines if engine.is_trt]
    sparse = run.plan is not None and any(s.pattern and s.pattern.implies_2_4 for s in run.plan.weights.values())
    known = [row for engine in trt for row in engine.truth if row.get("planned_sparse") and row["chosen"] is not None]
    if run.graphs and sparse and not known:
        yield Gap(
            "which matrices run on sparse kernels",
            "kernels are chosen on the GPU, and no engine of this run was built on one"
            if trt
            else "no TensorRT engine was built",
            f"nxm build {root}/onnx/trt/model.onnx --backend trt --out {root}/engines/trt",
        )


def _again(stages: Mapping[str, StageRecord]) -> str:
    """The command of this run, as it was typed where the manifest knows it."""
    for record in stages.values():
        if record.command[1:2] == ("run",):
            return shlex.join(["nxm", *record.command[1:]])
    return "the same `nxm run`"
