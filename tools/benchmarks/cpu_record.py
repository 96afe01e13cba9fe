"""The file ``cpu.json``: what `tools.benchmarks.cpu` measured."""

from __future__ import annotations

from typing import NotRequired, TypedDict

from tools.benchmarks.measuring import Ratio


class MachineFacts(TypedDict):
    """The CPU, the threads of engines and the cores of the process."""

    kind: NotRequired[str]
    machine: NotRequired[str]
    system: NotRequired[str]
    name: NotRequired[str]
    features: NotRequired[str]
    threads: int
    cores: int


class ModelFacts(TypedDict):
    """The compressed model: its weights by option, and its compression."""

    model_type: str
    plan: dict[str, int]
    compression: float


class ParityRow(TypedDict):
    """An engine against its checkpoint."""

    engine: str
    passed: bool
    metric: str
    samples: int
    checkpoint: float | None
    value: float | None
    difference_interval: tuple[float, float] | None
    agreement: float | None
    mean_abs: float | None
    mean_tolerance: float | None


class EngineRatio(Ratio):
    """How many times as fast as `against` the engine `of` is."""

    of: str
    against: str


class LatencyRow(TypedDict):
    """Milliseconds of every engine at one shape, and ratios by what they say."""

    batch: int
    sequence: int
    rounds: int
    median_ms: dict[str, float]
    quartiles_ms: dict[str, list[float]]
    ratios: dict[str, EngineRatio]


class Load(TypedDict):
    """Seconds that loading an engine takes, and the bytes of memory that stay."""

    seconds: float
    bytes: int


class TextTimings(TypedDict):
    """One engine over the sentences of the data file, in one order."""

    name: str
    order: str
    padding: float
    sentences_per_second: float
    quartiles: tuple[float, float]
    without_tokenisation: float
    speedup: float | None
    interval: tuple[float, float] | None


class TextRecord(TypedDict):
    """All engines and orders; `seconds` has those of every round, of peers, too."""

    schema: NotRequired[str]
    sentences: int
    batch: int
    fixed: int
    runs_at_once: NotRequired[int]
    tokens: tuple[float, int]
    tokenised_per_second: float
    rounds: int
    timings: list[TextTimings]
    seconds: dict[str, list[float]]


class TimedEmbeddings(TypedDict):
    """Sentence embeddings of one model, of peers, too; `cosine` is each one's mean with the model in FP32."""

    text: TextRecord
    cosine: dict[str, float]
    peers: str | None


class EmbeddingRecord(TimedEmbeddings):
    """They can be measured again without the rest, and have a date, a machine and a commit of their own."""

    date: str
    machine: MachineFacts
    commit: str


class ProfileRow(TypedDict):
    """Milliseconds by operator, with the INT8 products a second of ONNX Runtime and what they reach alone, or the nodes
    that ran of OpenVINO."""

    engine: str
    batch: int
    sequence: int
    milliseconds: dict[str, float]
    int8_gops: NotRequired[float | None]
    int8_gops_alone: NotRequired[float | None]
    nodes: NotRequired[int]


class Record(TypedDict):
    """The file. `bytes` and `loads` are by engine."""

    schema: str
    date: NotRequired[str]
    machine: MachineFacts
    load_average_before: float
    versions: dict[str, str]
    peer: str | None
    text_peers: str | None
    model: ModelFacts
    bytes: dict[str, int]
    data_sha256: str
    parity: list[ParityRow]
    latency: list[LatencyRow]
    loads: dict[str, Load]
    text: TextRecord
    embeddings: EmbeddingRecord
    profile: list[ProfileRow]
    seconds: int
