"""A dense tiny model with what the search looks at it through: probe, calibration and held-out batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressors.models import ModelSource, load_model, load_tokenizer, resolve
from compressors.pruning.layerwise import SECOND_ORDER, Solver
from compressors.search.one_shot import OneShot
from compressors.search.plan_search import _batches
from compressors.search.plan_selection import Selector
from compressors.search.probe import Batches, SensitivityProbe
from compressors.search.settings import SearchSettings
from compressors.settings import Settings
from compressors.training.task_data import TaskDataRequest, read_task_data
from nxm_export.contract.plan import WeightSpec
from nxm_export.contract.tasks import task_named
from nxm_export.data.features import Features
from tests.support import tiny


@dataclass(frozen=True)
class Probed:
    source: ModelSource
    probe: SensitivityProbe
    features: list[Features]
    pad_id: int

    def batches(self, start: int, stop: int, batch_size: int = 8) -> Batches:
        return _batches(self.features[start:stop], self.pad_id, batch_size)

    def one_shot(self, batches: Batches, specs: Sequence[WeightSpec], solver: Solver = SECOND_ORDER) -> OneShot:
        """Every weight under every one of `specs`, compressed without training."""
        statistics = self.probe.statistics(batches, 99.99)
        return OneShot(self.probe, statistics, batches, dict.fromkeys(self.probe.weights, specs), solver)

    def selector(self, bfloat16: bool = False, /, **settings: Any) -> Selector:
        known, judged = self.batches(0, 24), self.batches(24, 56)
        return Selector(self.probe, self.source.config, SearchSettings(**settings), known, judged, bfloat16=bfloat16)


def probed(directory: Path, family: str = "bert", **sizes: Any) -> Probed:
    """Write a model with a random head and its data below `directory`, and open it."""
    made = tiny.write_model(family, directory / family, head="classification", **sizes)
    train, _ = tiny.write_data(directory / "data")
    source, task = resolve(made), task_named("classification")
    data = read_task_data(source, TaskDataRequest(task, str(train)), load_tokenizer(source), Settings())
    return Probed(
        source, SensitivityProbe(load_model(source, task), source.family, source.config), data.train, data.pad_id
    )
