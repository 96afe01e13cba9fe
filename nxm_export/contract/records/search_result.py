"""``search.json``: the plans that `nxm search` found, how they did one-shot, and what the search cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from nxm_export.contract.records.latency_table import LatencySource
from nxm_export.storage.json_files import read_record, to_json_object

SEARCH_FILE = "search.json"
SEARCH_SCHEMA = "nxm-search/1"
_WAY_OUT = "search again"


@dataclass(frozen=True, kw_only=True)
class PlanScore:
    """One plan that was looked at.

    `origin` says where it came from, `predicted` what the sensitivity table expects, `joint` its mean divergence from
    the dense model one-shot (None where it was no number; a method that scores by the metric says that in `origin`).
    `hw`, `packed` and `values` are its compression by each counting, `options` how many weights have each option,
    `milliseconds` its latency by the latency table, where one was given.
    """

    origin: str
    predicted: float | None
    joint: float | None
    hw: float
    packed: float
    values: float
    options: Mapping[str, int]
    milliseconds: float | None = None

    def compression(self, counting: str) -> float:
        """The compression by one of the countings of a plan."""
        return {"hw": self.hw, "packed": self.packed, "values": self.values}[counting]


@dataclass(frozen=True, kw_only=True)
class ParetoPlan(PlanScore):
    """The best plan for a further compression that was `asked` for."""

    asked: float


@dataclass(frozen=True)
class SearchBudget:
    """What plans had to keep to: a `compression` or a number of `bytes` by a counting, and a latency limit; its
    milliseconds are from `latency_source` (None: a table by hand, or no limit)."""

    counting: str
    compression: float | None
    bytes: int | None
    latency_ms: float | None
    latency_source: LatencySource | None = None


@dataclass(frozen=True)
class HalvingRound:
    """A round of short compression runs: divergence from the dense model behind `steps` optimizer steps, by origin of
    the plan (None where it was no number)."""

    steps: int
    scores: Mapping[str, float | None]


@dataclass(frozen=True)
class SampleCounts:
    """Samples of the training data that calibrated and that judged."""

    calibration: int
    held_out: int


@dataclass(frozen=True)
class FullRun:
    """A compression run of the plan: its optimizer steps (0: nothing is trained), and the seconds that they would take
    here."""

    steps: int
    estimated_seconds: float


@dataclass(frozen=True)
class SearchCost:
    """Seconds by stage of the search (``all`` is their sum and the rest), and as a share of a full compression run.

    A search that was `resumed` has no share: the seconds before it was interrupted are not counted. Nor has one for a
    compression that trains nothing.
    """

    seconds: Mapping[str, float]
    full_run: FullRun
    resumed: bool
    share_of_full_run: float | None


@dataclass(frozen=True)
class SearchResult:
    """What a search found. `finalists` are in order, `best` is the first; `tied` has the best plan of each tie between
    weights, `pareto` the best plan for every further compression that was asked for."""

    method: str
    budget: SearchBudget
    best: PlanScore
    finalists: tuple[PlanScore, ...]
    rounds: tuple[HalvingRound, ...]
    plans_evaluated: int
    samples: SampleCounts
    seed: int
    cost: SearchCost
    pareto: tuple[ParetoPlan, ...] = ()
    tied: Mapping[str, PlanScore] = field(default_factory=dict)

    def to_dict(self) -> dict[str, object]:
        """What ``search.json`` holds."""
        return {"schema": SEARCH_SCHEMA, **to_json_object(self)}


def read_search_result(file: str | Path) -> SearchResult:
    """The result in a ``search.json``; raises `ArtifactError` that names file, field and what is wrong with it."""
    return read_record(Path(file), SearchResult, schema=SEARCH_SCHEMA, way_out=_WAY_OUT)
