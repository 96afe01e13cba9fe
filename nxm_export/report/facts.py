"""What a run directory holds, as plain data: whatever stages there are, and what is missing, damaged or changed since.

Nothing is computed here that a stage measures: numbers keep the file and the place that they were read from
(`nxm_export.report.numbers.Figure`). Every file that is read is hashed and compared with the manifest; an engine with its
passport; a comparison with the engine that it names. What does not agree is said, and never silently shown.
"""

from __future__ import annotations

import csv
import json
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from nxm_export.checkpoint import PLAN_FILE, Checkpoint, open_checkpoint, read_config, read_tensor
from nxm_export.errors import ArtifactError, NxmError
from nxm_export.families import ROLES
from nxm_export.plan import CompressionPlan, NMPattern, WeightSpec, parse_json
from nxm_export.report.numbers import Figure, Source, pointer
from nxm_export.report.shapes import SHAPES, misfit
from nxm_export.run_dir import MANIFEST, RunDir, file_hash

SUMMARY = "summary/summary.json"
PASSPORT = "passport.json"
SAMPLE_ROWS, SAMPLE_COLUMNS = 32, 64  # of the picture of one matrix
# What each file must be: its schema up to the slash. Another version of it is not read; a newer nxm-export may mean other
# things by the same names.
_SCHEMAS = {"summary.json": "nxm-summary/1", PASSPORT: "nxm-passport/1", "search.json": "nxm-search/1"}
# Newer versions of these may add fields; what is known of them is shown.
_FAMILIES = {"parity.json": "nxm-parity", "latency.json": "nxm-bench", "verify.json": "nxm-verify"}
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
    """How far two backends are apart behind one block of the encoder, from a bisection or a comparison per layer."""

    block: str
    max_abs: Figure
    tolerance: Figure | None


@dataclass(frozen=True)
class Engine:
    """One engine directory, or a comparison whose engine is gone.

    `truth` are the rows of `engines.truth` (which matrix runs sparse, on which kernel), empty where a backend has none.
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
    def is_trt(self) -> bool:
        """True for TensorRT and TensorRT-RTX, the runtimes that have sparse kernels."""
        return self.passport is not None and self.passport.data.get("backend") in _TRT


@dataclass(frozen=True)
class Matrix:
    """One weight matrix of the plan. `stored`, `pattern` and `zeros` are by graph, as `nxm verify` found them in the file;
    `sensitivity` is the search's divergence of the planned option, `projection` what the projection of the dense weights
    onto the plan loses: ``|W - P(W)|^2 / |W|^2``."""

    name: str
    block: int | None
    role: str | None
    shape: tuple[int, int]
    spec: WeightSpec
    stored: Mapping[str, str]
    pattern: Mapping[str, str | None]
    zeros: Mapping[str, Figure]
    problems: tuple[str, ...]
    sensitivity: float | None
    projection: float | None


@dataclass(frozen=True)
class Sample:
    """The corner of one stored matrix: integer codes (rows, columns), or floats where the plan leaves them."""

    name: str
    values: np.ndarray
    spec: WeightSpec


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
    stages: Mapping[str, Mapping[str, Any]]
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


class Files:
    """Reads files below one directory, and remembers what was wrong with them."""

    def __init__(self, root: Path, recorded: Mapping[str, str]) -> None:
        self.root, self.recorded = root, recorded
        self.doubts: list[str] = []
        self.hashes: dict[str, str] = {}

    def check(self, file: str) -> None:
        """Compare a file with the hash that the manifest has of it."""
        if file in self.hashes:
            return
        self.hashes[file] = file_hash(self.root / file)
        if self.recorded.get(file, self.hashes[file]) != self.hashes[file]:
            self.doubts.append(
                f"{file} is not the file that its stage wrote (its sha256 differs from the one in {MANIFEST}); run the same "
                "command again to make it anew"
            )

    def text(self, file: str) -> str | None:
        """A text file, None where it is missing or cannot be read."""
        path = self.root / file
        if not path.is_file():
            return None
        try:
            self.check(file)
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError, ArtifactError) as error:
            self.doubts.append(f"{file} cannot be read ({error}); make it again")
            return None

    def json(self, file: str, kind: str | None = None) -> Source | None:
        """A JSON object of the schema that its name, or the name `kind`, asks for; None where it is missing or not that."""
        text = self.text(file)
        if text is None:
            return None
        try:
            data = parse_json(text, file, "make it again", ArtifactError)
        except ArtifactError as error:
            self.doubts.append(str(error))
            return None
        name = kind or Path(file).name
        schema = data.get("schema") if isinstance(data, dict) else None
        family = str(schema).partition("/")[0]
        if not isinstance(data, dict) or schema != _SCHEMAS.get(name, schema) or family != _FAMILIES.get(name, family):
            wanted = _SCHEMAS.get(name) or _FAMILIES.get(name) or "a JSON object"
            self.doubts.append(f"{file} is of schema {schema!r}, not {wanted}: it is not shown; make it again")
            return None
        if wrong := misfit(data, SHAPES.get(name, {})):
            self.doubts.append(f"{file} is malformed at {wrong}: it is not shown; make it again")
            return None
        return Source(file, data)

    def rows(self, file: str) -> tuple[Mapping[str, str], ...]:
        """The rows of a CSV file with a header."""
        text = self.text(file)
        return () if text is None else tuple(csv.DictReader(text.splitlines()))

    def lines(self, file: str) -> tuple[Mapping[str, Any], ...]:
        """The objects of a JSON-lines file; a last line that was cut is left out."""
        found = []
        for line in (self.text(file) or "").splitlines():
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict):
                found.append(value)
        return tuple(found)

    def size(self, file: str) -> Figure | None:
        """Bytes of a file, None where it is missing."""
        path = self.root / file
        return Figure(path.stat().st_size, file) if path.is_file() else None


def read_run(root: str | Path, search: str | Path | None = None) -> Run:
    """Read a run directory, finished or not; `search` is a directory of `nxm search` (``RUN/search`` by default).

    Raises `ArtifactError` when `root` is no run, when nothing has been made in it yet, and for a `search` that is none.
    """
    directory = RunDir.open(root)
    root, stages = directory.root, directory.manifest["stages"]
    if wrong := misfit(directory.manifest, SHAPES[MANIFEST]):
        raise ArtifactError(f"{root / MANIFEST}: malformed at {wrong}; restore it, or start a new run directory")
    recorded: dict[str, str] = {}
    for record in stages.values():
        outputs = record.get("outputs")
        recorded.update(outputs if isinstance(outputs, dict) else {})
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
        matrices=tuple(_matrices(root, checkpoint, graphs, searched)),
        sample=_sample(checkpoint, files),
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
    engine = None
    if passport is not None:
        file = _join(directory, Path(str(passport.data.get("engine", ""))).name)
        engine = files.size(file)
        wanted = str(passport.data.get("engine_sha256"))
        if engine is None:
            files.doubts.append(f"{file} is missing, and the passport beside it names it")
        elif file_hash(files.root / file) != wanted:
            files.doubts.append(f"{file} is not the engine of its passport (its sha256 differs); build it again")
        if parity is not None and parity.data.get("engine_sha256") != wanted:
            files.doubts.append(
                f"{parity.file} compared another engine than the one of {passport.file} (their sha256 differ): it is not "
                "shown; compare again"
            )
            parity = None
    blocks = [block for place in evidence for block in _blocks(files.json(_join(place, "bisect.json")))]
    truth, share = _truth(files, directory, passport)
    return Engine(name, passport, engine, parity, tuple(blocks or _blocks(parity)), truth, share)


def _join(directory: str, name: str) -> str:
    return f"{directory}/{name}" if directory else name


def _blocks(source: Source | None) -> Iterator[BlockError]:
    """Errors per block: a list ``blocks`` (or ``layers``) of objects with a name and ``max_abs``."""
    for key in ("blocks", "layers"):
        rows = source.data.get(key) if source is not None else None
        if source is None or not isinstance(rows, list):
            continue
        for number, row in enumerate(rows):
            error = source.at(key, number, "max_abs")
            if isinstance(row, dict) and error is not None:
                name = next((row[part] for part in ("block", "layer", "name", "output") if part in row), number)
                yield BlockError(str(name), error, source.at(key, number, "max_tolerance"))


def _truth(files: Files, directory: str, passport: Source | None) -> tuple[tuple[Mapping[str, Any], ...], float | None]:
    if passport is None or passport.data.get("backend") not in _TRT:
        return (), None
    from engines.truth import read_truth

    try:
        report = read_truth(files.root / directory)
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


def _matrices(
    root: Path, checkpoint: Checkpoint | None, graphs: tuple[Graph, ...], search: Search | None
) -> Iterator[Matrix]:
    if checkpoint is None:
        return
    places = {
        f"{checkpoint.family.linear(block, role)}.weight": (number, role)
        for number, block in enumerate(checkpoint.family.blocks(checkpoint.config))
        for role in ROLES
    }
    verified = {graph.name: _rows_of(graph) for graph in graphs}
    for name, spec in checkpoint.plan.weights.items():
        found = {graph: rows[name] for graph, rows in verified.items() if name in rows and rows[name].get("planned")}
        block, role = places.get(name, (None, None))
        yield Matrix(
            name,
            block,
            role,
            checkpoint.plan.shapes[name],
            spec,
            {graph: str(row.get("stored")) for graph, row in found.items()},
            {graph: row.get("pattern") for graph, row in found.items()},
            {
                graph: Figure(row["zeros"], *row["place"])
                for graph, row in found.items()
                if isinstance(row.get("zeros"), float)
            },
            tuple(dict.fromkeys(str(problem) for row in found.values() for problem in row.get("problems", []))),
            None if search is None else search.sensitivity.get((name, str(spec))),
            None if search is not None and search.sensitivity else _projection(root / "dense", name, spec),
        )


def _rows_of(graph: Graph) -> dict[str, Mapping[str, Any]]:
    """The rows of a graph's verify.json by matrix, each with the ``place`` of its zeros."""
    rows = graph.verify.data.get("weights") if graph.verify else None
    if graph.verify is None or not isinstance(rows, list):
        return {}
    return {
        str(row.get("name")): {**row, "place": (graph.verify.file, pointer("weights", number, "zeros"))}
        for number, row in enumerate(rows)
        if isinstance(row, dict)
    }


def _projection(dense: Path, name: str, spec: WeightSpec) -> float | None:
    try:
        weight = read_tensor(dense, name)
    except (ArtifactError, NxmError, OSError):
        return None
    return projection_error(weight, spec)


def projection_error(weight: np.ndarray, spec: WeightSpec) -> float:
    """``|W - P(W)|^2 / |W|^2`` of a dense weight (out, in), float32: the N of every M largest kept along the input axis,
    then rounded to the nearest of ``2 * qmax + 1`` even steps up to the largest of each output channel."""
    w = weight.astype(np.float64)
    z = w
    if spec.pattern is not None and w.shape[1] % spec.pattern.m == 0:
        z = _keep_largest(w, spec.pattern)
    if spec.qmax is not None:
        scale = np.abs(z).max(axis=1, keepdims=True) / spec.qmax
        scale[scale == 0] = 1.0
        z = np.rint(z / scale) * scale
    total = float(np.square(w).sum())
    return float(np.square(w - z).sum() / total) if total else 0.0


def _keep_largest(w: np.ndarray, pattern: NMPattern) -> np.ndarray:
    groups = w.reshape(w.shape[0], -1, pattern.m)
    order = np.argsort(-np.abs(groups), axis=-1, kind="stable")  # ties go to the lower index
    kept = np.zeros(groups.shape, bool)
    np.put_along_axis(kept, order[..., : pattern.n], True, axis=-1)
    return np.asarray(np.where(kept, groups, 0.0).reshape(w.shape))


def _sample(checkpoint: Checkpoint | None, files: Files) -> Sample | None:
    """The upper left corner of the first matrix that has a pattern, or else is quantized, or else any."""
    if checkpoint is None:
        return None
    weights = checkpoint.plan.weights
    ranked = sorted(weights, key=lambda name: (weights[name].pattern is None, weights[name].weight_bits is None))
    name = ranked[0]
    try:
        whole = checkpoint.codes(name) if weights[name].weight_bits else checkpoint.weight(name)
    except NxmError as error:
        files.doubts.append(str(error))
        return None
    return Sample(name, whole[:SAMPLE_ROWS, :SAMPLE_COLUMNS], weights[name])


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
            (("parity", engine.name, "agreement"), report.at("outputs", 0, "agreement")),
            (("parity", engine.name, "max_abs"), report.at("outputs", 0, "max_abs")),
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


def _again(stages: Mapping[str, Mapping[str, Any]]) -> str:
    """The command of this run, as it was typed where the manifest knows it."""
    for record in stages.values():
        command = record.get("command")
        if isinstance(command, list) and len(command) > 1 and command[1] == "run":
            return shlex.join(["nxm", *map(str, command[1:])])
    return "the same `nxm run`"
