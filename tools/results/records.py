"""What is kept of measurements: a line of JSON for each (row, seed), the dev labels and the dense grid of a task.

Predictions and labels are one character per dev sentence (`DIGITS`), in file order. No record holds a path of the
machine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import sha256

import numpy as np
import numpy.typing as npt

from compressors.settings import DENSE_FIELDS, START_PERCENTILE, Settings
from nxm_export.contract.records.checkpoint_metrics import MoreTextFacts, PermutationFacts
from nxm_export.contract.records.search_result import PlanScore, SampleCounts, SearchBudget, SearchCost
from nxm_export.errors import DataError

DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
Classes = npt.NDArray[np.int64]
Interval = tuple[float, float]


@dataclass(frozen=True)
class MetricValue:
    """A metric on the dev sentences, with its 95 % bootstrap interval."""

    value: float
    interval: Interval


@dataclass(frozen=True)
class Samples:
    """Sentences that were trained on, and those that were read for the numbers."""

    train: int
    dev: int


@dataclass(frozen=True)
class Machine:
    """CPU model and instruction sets, the GPU where there is one, and the threads that torch used."""

    cpu: str
    features: str
    threads: int
    gpu: str | None = None


@dataclass(frozen=True)
class Compression:
    """1 - bits / 32 of the encoder's matrices, by each counting of a plan."""

    hw: float
    packed: float
    values: float

    def by(self, counting: str) -> float:
        """The compression by the counting of this name."""
        return {"hw": self.hw, "packed": self.packed, "values": self.values}[counting]


@dataclass(frozen=True)
class Sizes:
    """Bytes of the encoder's matrices (in FP32, stored, in an INT8 engine), and of the file of ``nxm pack``."""

    fp32: int
    packed: int
    engine_sparse: int
    engine_dense: int
    file: int


@dataclass(frozen=True)
class PlanFacts:
    """How many weights have each option, and the option of every weight."""

    options: dict[str, int]
    weights: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class TrainingFacts:
    """What `nxm_export.contract.records.checkpoint_metrics.CompressionMetrics` says of the training; None where a
    recipe has none."""

    qat_steps: int
    held_out_samples: int
    outputs_in_float: dict[str, float] | None = None
    admm: str | None = None
    admm_steps: int | None = None
    residual: float | None = None
    residual_gate_passed: bool | None = None
    sr_ste_steps: int | None = None
    permutation: PermutationFacts | None = None
    embedding_table_drop: float | None = None
    embedding_table_drop_interval: Interval | None = None
    more_text: MoreTextFacts | None = None


@dataclass(frozen=True)
class SearchFacts:
    """How a searched row's plan was found."""

    method: str
    budget: SearchBudget
    best: PlanScore
    samples: SampleCounts
    cost: SearchCost


@dataclass(frozen=True, kw_only=True)
class CompressionFacts:
    """What only compressed rows have. `kl_to_dense` is the mean KL(dense || row) over dev, in nats; `kl_by_sentence` is
    that of every dev sentence, to five digits, and None in records from before it was kept."""

    recipe: str
    kl_to_dense: float | None
    training: TrainingFacts
    mask_sha256: str
    compression: Compression
    bytes: Sizes
    plan: PlanFacts
    search: SearchFacts | None = None
    kl_by_sentence: tuple[float, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Record:
    """One measurement: a row of a task with one seed.

    `weights_sha256` is of the dense model itself, `teacher_sha256` of the dense model that any other row started from.
    `seconds` are wall time of the row alone, `dev_reads` how often the dev set was read.
    """

    task: str
    row: str
    seed: int
    model: str
    data_sha256: str
    settings: dict[str, object]
    metrics: dict[str, MetricValue]
    samples: Samples
    steps: int
    epochs: float
    seconds: float
    dev_reads: int
    versions: dict[str, str]
    machine: Machine
    classes: int
    labels_sha256: str
    predictions: str
    weights_sha256: str | None = None
    teacher_sha256: str | None = None
    compressed: CompressionFacts | None = None


@dataclass(frozen=True)
class LabelledRecord:
    """A record with the labels that belong to its predictions."""

    record: Record
    labels: Classes

    @cached_property
    def predictions(self) -> Classes:
        """Class of every dev sentence, int64 (samples,)."""
        return decode_classes(self.record.predictions)

    @cached_property
    def logits(self) -> npt.NDArray[np.float64]:
        """Predictions as one-hot (samples, classes): metrics ask for the highest output only."""
        return one_hot(self.record.predictions, self.record.classes)


@dataclass(frozen=True)
class Labels:
    """The dev labels of a task, and their sha256."""

    sha256: str
    labels: str


@dataclass(frozen=True)
class GridEntry:
    """One choice for the dense model, and its score on the held-out sentences."""

    learning_rate: float
    epochs: float
    score: float
    seconds: float


@dataclass(frozen=True)
class Grid:
    """The choices that were tried for the dense model of a task, and what they were judged on."""

    model: str
    data_sha256: str
    held_out: int
    tried: tuple[GridEntry, ...] = ()

    @property
    def scores(self) -> Mapping[tuple[float, float], float]:
        """Score by (learning rate, epochs)."""
        return {(entry.learning_rate, entry.epochs): entry.score for entry in self.tried}


def encode_classes(classes: npt.NDArray[np.integer]) -> str:
    """Class indices as one character each."""
    if classes.size and int(classes.max()) >= len(DIGITS):
        raise DataError(f"more than {len(DIGITS)} classes cannot be stored")
    return "".join(DIGITS[int(index)] for index in classes)


def decode_classes(text: str) -> Classes:
    """Class indices of a string that `encode_classes` made."""
    return np.array([DIGITS.index(digit) for digit in text], np.int64)


def one_hot(text: str, classes: int) -> npt.NDArray[np.float64]:
    """Float64 (samples, classes) with 1 at each prediction."""
    return np.eye(classes)[decode_classes(text)]


def compress_part(settings: Settings) -> dict[str, object]:
    """The settings that compression reads; threads are told with the machine."""
    return {key: value for key, value in asdict(settings).items() if key not in (*DENSE_FIELDS, "threads")}


# Of compression. A record made before there was a setting was made without what it brought.
DEFAULTS: dict[str, object] = json.loads(
    json.dumps(compress_part(Settings(average=0.0, augment=0.0, output_limit=None, percentile=START_PERCENTILE)))
)


def digest(text: str) -> str:
    """sha256 of predictions or labels."""
    return sha256(text.encode()).hexdigest()
