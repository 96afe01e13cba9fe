"""``summary.json``: what a run comes to, each number as the stage that measured it wrote it.

`nxm run` writes it, `nxm show` prints it, a report reads it. Paths in the file are relative to the run, so that a run
can be moved; in a `RunSummary` that was read they are paths from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from nxm_export.contract.choices import SPARSE_USE, SparseUse
from nxm_export.contract.records.speedup import Speedup
from nxm_export.errors import ArtifactError, EngineError, ParityError
from nxm_export.storage.json_files import encode, read_record, to_json_object
from nxm_export.storage.run_dir import RunDir

SCHEMA = "nxm-summary/1"
SUMMARY_FILE = "summary.json"
DIRECTORY = "summary"  # of the run
NO_CHOICE = "no other backend was asked for"  # why an engine was kept, where there was none to choose from


@dataclass(frozen=True)
class EngineParity:
    """One engine against its own checkpoint: the worst of its outputs, and its value of the run's metric.

    `agreement` is None where an output has no argmax; `max_abs` and `value` are None where the engine gave NaN.
    """

    agreement: float | None
    max_abs: float | None
    passed: bool
    value: float | None


@dataclass(frozen=True)
class ShapeLatency:
    """Median milliseconds of one engine at one shape (`batch`, `seq`), and the middle half of its rounds; None in
    summaries of older versions."""

    batch: int
    seq: int
    median: float
    quartiles: tuple[float, float] | None = None


@dataclass(frozen=True)
class Likeness:
    """Cosine of the compressed model's embeddings to the dense model's, over the held-out samples."""

    mean: float
    least: float


@dataclass(frozen=True)
class OneClass:
    """What needs no model: `value` is the metric where every held-out sample gets `label`, the answer by which it is
    highest, and `what` says of which kind that is; the label is empty where all are as good. `dense_gain` is the paired
    95 % interval of the dense model's minus that, None where there is none."""

    label: str
    value: float
    dense_gain: tuple[float | None, float | None]
    what: str = "one class"

    @property
    def dense_is_better(self) -> bool | None:
        """Whether the whole interval is above 0; None without one."""
        low = self.dense_gain[0]
        return None if low is None else low > 0


@dataclass(frozen=True)
class RtxBuild:
    """What the passport of the TensorRT-RTX engine records about its build (see `engines.tensorrt.rtx_backend`).

    `integer_products` of `planned_products` quantized matrix products run on integers, `float_products` do not.
    """

    planned_products: int
    integer_products: int
    float_products: tuple[str, ...]
    sparse_kernels: str
    sparse: SparseUse | bool = SPARSE_USE  # older ones have true or false
    level: int | None = None
    twin: str | None = None


@dataclass(frozen=True)
class ChosenEngine:
    """The engine that a run's numbers are about: its name, its backend, and why it was kept."""

    name: str
    backend: str
    why: str


@dataclass(frozen=True)
class TrainingFacts:
    """What compression training did; None where the recipe has no such thing."""

    recipe: str | None = None
    admm_steps: int | None = None
    qat_steps: int | None = None
    residual: float | None = None
    residual_gate_passed: bool | None = None
    mask_hash: str | None = None
    embedding_table_drop: float | None = None


@dataclass(frozen=True)
class RunSummary:
    """The numbers of one finished run.

    `dense`, `checkpoint` and `compressed` are the metric of the dense model, of the compressed checkpoint in PyTorch,
    and of the compressed engine that is `chosen`; None stands for NaN. `difference_interval` is the paired 95 %
    interval of compressed - dense, None where one sample or a NaN allows none. `compression` is by counting, `plan` the
    number of matrices by option, `latency_ms` by ``ENGINE BATCHxSEQUENCE``, `onnx_bytes` by graph. `trt_rtx` is the
    TensorRT-RTX build. `missing` says which engines were not built or not run and why, `failed` which could not be
    built or failed when they ran. `other_versions` has, by stage, the versions of packages that made what it wrote,
    where they are not those of `versions`.
    """

    metric: str
    dev_samples: int
    dense: float | None
    compressed: float | None
    difference_interval: tuple[float | None, float | None]
    checkpoint: float | None
    compression: Mapping[str, float]
    plan: Mapping[str, int]
    parity: Mapping[str, EngineParity]
    latency_ms: Mapping[str, ShapeLatency]
    speedup: tuple[Speedup, ...]
    onnx_bytes: Mapping[str, int]
    trt_rtx: RtxBuild | None
    missing: Mapping[str, str]
    failed: Mapping[str, str]
    training: TrainingFacts
    artifacts: Mapping[str, str]
    embedding: str = "float"
    chosen: ChosenEngine | None = None  # in summaries of older versions the one of ONNX Runtime
    sparse_verdicts: Mapping[str, str] = field(default_factory=dict)  # by backend: what its twins say about 2:4
    cosine_to_dense: Likeness | None = None  # of embedding models
    one_class: OneClass | None = None  # not in summaries of older versions
    versions: Mapping[str, str] = field(default_factory=dict)  # of packages, that engines were compared and timed by
    other_versions: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, object]:
        """The form of ``summary.json`` and ``--json``."""
        return {"schema": SCHEMA, **to_json_object(self)}

    def to_json(self) -> str:
        """The text of ``summary.json``."""
        return encode(self, SCHEMA)

    def require_passed(self) -> None:
        """Raise `ParityError` for an engine that differs from its checkpoint, `EngineError` for one that could not be
        built, or failed when it ran."""
        differing = [name for name, report in self.parity.items() if not report.passed]
        if differing:
            raise ParityError(
                f"parity failed for {', '.join(differing)}: see {self.artifacts[f'parity {differing[0]}']}"
            )
        for name, why in self.failed.items():
            raise EngineError(f"{name} failed: {why}")


def read_summary_file(file: Path) -> RunSummary:
    """The summary in a file, with paths as they are stored; raises `ArtifactError` with the field that is wrong."""
    return read_record(file, RunSummary, schema=SCHEMA, way_out="run the same `nxm run` again")


def read_summary(root: str | Path) -> RunSummary:
    """The summary of a finished run; raises `ArtifactError` for a directory that is no run or not finished."""
    directory = RunDir.open(root)
    file = directory.path(DIRECTORY, SUMMARY_FILE)
    if not file.is_file():
        raise ArtifactError(f"{root}: this run has no summary yet; run the same `nxm run` again to finish it")
    summary = read_summary_file(file)
    return replace(summary, artifacts={name: str(directory.root / path) for name, path in summary.artifacts.items()})
