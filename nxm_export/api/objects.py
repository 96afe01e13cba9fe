"""The stages as objects: a `Model` becomes a `CompressedModel`, a `Graph`, an `EngineDirectory`; each is a directory
on disk.

An object holds a path and what was measured on the way, no weights and no open engine, so it costs nothing to keep.
The type of its predictions goes along: of ``load(..., task="classification")`` come lists of `Prediction`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Literal, TypeVar, cast, overload

from nxm_export.api import engine_functions, functions
from nxm_export.api.requests import DEFAULT, Default, PlanOptions
from nxm_export.contract.choices import BACKEND, BENCH_ROUNDS, GATE, LOWERING, TARGET, WEIGHT_STORAGE
from nxm_export.contract.io_spec import load_spec
from nxm_export.contract.tasks import task_named
from nxm_export.data.columns import Columns
from nxm_export.data.more_text import MoreText
from nxm_export.data.predictions import Answer, AnyPrediction, Embedding, LabelSet, Prediction, Score, TaggedText
from nxm_export.errors import ArtifactError, DataError
from nxm_export.progress import Progress, silent

if TYPE_CHECKING:
    from compressors.search.settings import SearchSettings
    from compressors.settings import Settings
    from engines.base import BuildOptions
    from engines.benchmark.latency import BenchReport
    from engines.parity.reports import Comparison
    from engines.passport import EnginePassport
    from nxm_export.contract.plan import CompressionPlan, NMPattern
    from nxm_export.contract.records.checkpoint_metrics import CompressionMetrics
    from nxm_export.contract.records.search_result import SearchResult
    from nxm_export.contract.records.verify_report import VerifyReport
    from nxm_export.data.texts import Text
    from nxm_export.graph.exporter import Exported

P_co = TypeVar("P_co", bound=AnyPrediction, covariant=True)


class Model(Generic[P_co]):
    """A model to start from: a Hugging Face directory or hub id, and the task that it is for. Made by `load`."""

    def __init__(self, source: str, task: str, revision: str | None = None) -> None:
        self.source, self.task, self.revision = source, task, revision

    def __repr__(self) -> str:
        return f"Model({self.source!r}, task={self.task!r})"

    def compress(
        self,
        train: str | Path,
        *,
        dev: str | Path | None = None,
        out: str | Path,
        pattern: str | NMPattern | Default | None = DEFAULT,
        weight_bits: int | Default | None = DEFAULT,
        plan: CompressionPlan | str | Path | None = None,
        settings: Settings | None = None,
        columns: Columns = Columns(),
        options: PlanOptions = PlanOptions(),
        train_limit: int | None = None,
        more_text: MoreText | None = None,
        progress: Progress = silent,
    ) -> CompressedModel[P_co]:
        """Compress to the checkpoint directory `out`; see `nxm_export.compress` for the parameters, which are as many
        here, but for the model's own."""
        metrics = functions.compress(
            self.source,
            train=train,
            dev=dev,
            out=out,
            task=self.task,
            pattern=pattern,
            weight_bits=weight_bits,
            plan=plan,
            settings=settings,
            columns=columns,
            options=options,
            revision=self.revision,
            train_limit=train_limit,
            more_text=more_text,
            progress=progress,
        )
        return CompressedModel(out, metrics)

    def search(
        self,
        train: str | Path,
        *,
        out: str | Path,
        settings: SearchSettings | None = None,
        training: Settings | None = None,
        columns: Columns = Columns(),
        train_limit: int | None = None,
        progress: Progress = silent,
    ) -> SearchResult:
        """Search a different (pattern, bits) for every weight; ``out/plan.json`` is a plan for `compress`, with the
        settings `training`.

        The model is a directory: raises `ArtifactError` where a hub `revision` was asked for.
        """
        if self.revision is not None:
            raise ArtifactError(
                f"{self.source}: a search takes no revision; fetch {self.revision} of it to a directory, and load that"
            )
        return functions.search(
            self.source,
            train=train,
            out=out,
            task=self.task,
            settings=settings,
            training=training,
            columns=columns,
            train_limit=train_limit,
            progress=progress,
        )


class CompressedModel(Generic[P_co]):
    """A checkpoint directory that `Model.compress` wrote; `metrics` are what it measured."""

    def __init__(self, path: str | Path, metrics: CompressionMetrics) -> None:
        self.path, self.metrics = Path(path), metrics

    def __repr__(self) -> str:
        return f"CompressedModel({str(self.path)!r})"

    @property
    def plan(self) -> CompressionPlan:
        """What every weight got."""
        from nxm_export.contract.checkpoint import open_checkpoint

        return open_checkpoint(self.path).plan

    def export(
        self,
        out: str | Path,
        *,
        target: str = TARGET,
        dtype: str | None = None,
        placement: str | None = None,
        lowering: str = LOWERING,
        precision_overrides: str | None = None,
        max_length: int | None = None,
        weights_stored: str = WEIGHT_STORAGE,
    ) -> Graph[P_co]:
        """Export to the graph directory `out`; see `nxm_export.export`, whose choices these are, but for the task."""
        exported = functions.export(
            self.path,
            out,
            target=target,
            dtype=dtype,
            placement=placement,
            lowering=lowering,
            precision_overrides=precision_overrides,
            max_length=max_length,
            weights_stored=weights_stored,
        )
        return Graph(out, exported)

    def pack(self, out: str | Path) -> Path:
        """Write the checkpoint as one file at its true size; returns its path."""
        functions.pack(self.path, out)
        return Path(out)


class Graph(Generic[P_co]):
    """A graph directory: ``model.onnx`` and what is beside it; `exported` says what the export made."""

    def __init__(self, path: str | Path, exported: Exported) -> None:
        self.path, self.exported = Path(path), exported

    def __repr__(self) -> str:
        return f"Graph({str(self.path)!r})"

    def verify(self) -> VerifyReport:
        """Check the file by itself: see `nxm_export.verify`."""
        return functions.verify(self.path)

    def build(
        self, out: str | Path, *, backend: str = BACKEND, options: BuildOptions | None = None
    ) -> EngineDirectory[P_co]:
        """Build the engine directory `out`: ``ort``, ``openvino``, ``trt``, ``trt_rtx``, ``cusparselt``, or ``auto``,
        the fastest here (see `nxm_export.build`)."""
        engine_functions.build(self.path, out, backend=backend, options=options)
        return EngineDirectory(out)


class EngineDirectory(Generic[P_co]):
    """An engine directory, wherever it was copied to. Raises `ArtifactError` where there is none."""

    def __init__(self, path: str | Path) -> None:
        from engines.passport import load_passport

        self.path = Path(path)
        self.passport: EnginePassport = load_passport(self.path)

    def __repr__(self) -> str:
        return f"EngineDirectory({str(self.path)!r}, backend={self.passport.backend!r})"

    def compare(
        self,
        data: str | Path,
        *,
        checkpoint: str | Path | None = None,
        gates: Sequence[str] = (),
        columns: Columns = Columns(),
    ) -> Comparison:
        """Compare with the checkpoint on labelled data; see `nxm_export.compare`."""
        return engine_functions.compare([self.path], data, checkpoint=checkpoint, gates=gates, columns=columns)

    def predict(
        self,
        texts: Iterable[Text],
        *,
        batch: int = 32,
        threads: int | None = None,
        hint: str | None = None,
        gate: str = GATE,
        expect_sha256: Collection[str] = (),
    ) -> list[P_co]:
        """One typed result for every text or pair of texts; see `nxm_export.predict`. Loads the engine each time: to
        answer many calls, keep a `Predictor`."""
        predicted = engine_functions.predict(
            self.path, texts, batch=batch, threads=threads, hint=hint, gate=gate, expect_sha256=expect_sha256
        )
        return cast("list[P_co]", predicted)

    def bench(
        self,
        shapes: Sequence[tuple[int, int]] | None = None,
        *,
        rounds: int = BENCH_ROUNDS,
        threads: int | None = None,
    ) -> BenchReport:
        """Time it at shapes of (batch, sequence); see `nxm_export.bench`."""
        return engine_functions.bench([self.path], shapes, rounds=rounds, threads=threads)


@overload
def load(model: str | Path, *, task: Literal["classification"], revision: str | None = None) -> Model[Prediction]: ...


@overload
def load(model: str | Path, *, task: Literal["multi-label"], revision: str | None = None) -> Model[LabelSet]: ...


@overload
def load(
    model: str | Path, *, task: Literal["regression", "reranking"], revision: str | None = None
) -> Model[Score]: ...


@overload
def load(
    model: str | Path, *, task: Literal["token-classification"], revision: str | None = None
) -> Model[TaggedText]: ...


@overload
def load(model: str | Path, *, task: Literal["question-answering"], revision: str | None = None) -> Model[Answer]: ...


@overload
def load(model: str | Path, *, task: Literal["embedding"], revision: str | None = None) -> Model[Embedding]: ...


@overload
def load(model: str | Path, *, task: str | None = None, revision: str | None = None) -> Model[AnyPrediction]: ...


def load(model: str | Path, *, task: str | None = None, revision: str | None = None) -> Model[AnyPrediction]:
    """A model to work with: a Hugging Face directory or hub id, for one of the tasks of docs/tasks.md.

    Without a `task` it is that of the model's head, which has to be in a directory here. Nothing is loaded yet but
    ``config.json``. Raises `ArtifactError` for a directory that is no model, for a file, and for a path that is not
    there; `PlanError` for an unknown task, `DataError` for a model without a head and no `task`.
    """
    from nxm_export.contract.checkpoint import read_config, task_at
    from nxm_export.contract.families import family_of

    path = Path(model)
    if path.is_dir():
        config = read_config(path)
        family_of(config, source=str(path / "config.json"))
        task = task or task_at(path, config)
    elif path.exists():
        raise ArtifactError(f"{model} is a file; give the directory of a model, or a hub id")
    elif isinstance(model, Path) or path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise ArtifactError(
            f"{model}: no such directory; give the directory of a model, or a hub id such as owner/name"
        )
    if task is None:
        raise DataError(f"{model}: its head does not say for what task it is; give one, as in task='classification'")
    return Model(str(model), task_named(task).name, revision)


@overload
def open_engine(path: str | Path, *, task: Literal["classification"]) -> EngineDirectory[Prediction]: ...


@overload
def open_engine(path: str | Path, *, task: Literal["multi-label"]) -> EngineDirectory[LabelSet]: ...


@overload
def open_engine(path: str | Path, *, task: Literal["regression", "reranking"]) -> EngineDirectory[Score]: ...


@overload
def open_engine(path: str | Path, *, task: Literal["token-classification"]) -> EngineDirectory[TaggedText]: ...


@overload
def open_engine(path: str | Path, *, task: Literal["question-answering"]) -> EngineDirectory[Answer]: ...


@overload
def open_engine(path: str | Path, *, task: Literal["embedding"]) -> EngineDirectory[Embedding]: ...


@overload
def open_engine(path: str | Path, *, task: str | None = None) -> EngineDirectory[AnyPrediction]: ...


def open_engine(path: str | Path, *, task: str | None = None) -> EngineDirectory[AnyPrediction]:
    """An engine directory that lies on this disk; with `task`, `ArtifactError` unless it is for that task."""
    engine: EngineDirectory[AnyPrediction] = EngineDirectory(path)
    if task is not None and load_spec(path).task != task_named(task).name:
        raise ArtifactError(f"{path} is an engine for {load_spec(path).task}, not for {task}")
    return engine
