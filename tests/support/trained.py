"""Tiny models that are compressed fast, from the dense model that the fixture `prepared` makes."""

from pathlib import Path
from typing import Any

from compressors.models import resolve
from compressors.settings import Settings
from compressors.training.compress import compress
from nxm_export.contract.plan import CompressionPlan, WeightSpec
from nxm_export.contract.records.checkpoint_metrics import CompressionMetrics
from nxm_export.progress import Progress

FAST: dict[str, Any] = {
    "batch_size": 16,
    "learning_rate": 2e-3,
    "dense_learning_rate": 3e-3,
    "dense_steps": 60,
    "calibration_samples": 64,
    "precision": "fp32",
}


def plan_for(dense: Path, spec: str = "2:4+W8") -> CompressionPlan:
    source = resolve(dense)
    return source.family.uniform_plan(source.config, WeightSpec.parse(spec))


def run(
    prepared: Path,
    out: Path,
    spec: str = "2:4+W8",
    progress: Progress = lambda what, done, total: None,
    **settings: Any,
) -> CompressionMetrics:
    return compress(
        prepared / "dense",
        task="classification",
        train=str(prepared / "train.tsv"),
        dev=str(prepared / "dev.tsv"),
        plan=plan_for(prepared / "dense", spec),
        out=out,
        settings=Settings(**{**FAST, "steps": 20, **settings}),
        progress=progress,
    )
