"""What a run is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nxm_export.contract.choices import INT4_BITS, PLACEMENT, STORAGE, WEIGHT_STORAGE, WEIGHT_STORAGES
from nxm_export.contract.plan import CompressionPlan, WeightSpec
from nxm_export.data.columns import Columns
from nxm_export.data.more_text import MoreText
from nxm_export.errors import DataError, PlanError

if TYPE_CHECKING:
    from compressors.models import ModelSource
    from compressors.settings import Settings


@dataclass(frozen=True)
class Request:
    """What to run: a model (directory or hub id), a task, its data, how to compress and how to train.

    `dev` may be None where nothing is trained, and nothing is scored then. `more_text` has no labels. `placement` None
    is ``inputs-outputs``, or ``inputs`` where weights are not quantized. `weights_stored` is that of the graphs, where
    their target can have it. `planned`: the plan comes from elsewhere, and `spec` is not used (`PlanChoice`).
    `backends` are those whose engines are built and of which the fastest is kept (see
    `nxm_export.pipeline.run_engines.run_backends`). Raises `PlanError` for a placement or residual that only quantized
    weights can have, where they are not, and for weights stored as INT4 that have more bits; `DataError` for a limit
    below 1.
    """

    model: str
    task: str
    train: str
    dev: str | None
    spec: WeightSpec
    settings: Settings
    columns: Columns = Columns()
    placement: str | None = None
    residual: str = STORAGE
    embedding: str = STORAGE
    keep_dense: Sequence[str] = ()
    revision: str | None = None
    train_limit: int | None = None
    more_text: MoreText | None = None
    weights_stored: str = WEIGHT_STORAGE
    planned: bool = False
    backends: Sequence[str] = ()

    def __post_init__(self) -> None:
        self.settings.require_dev(self.dev)
        if self.more_text is not None:
            self.settings.require_taught("--more-text")
        if self.train_limit is not None and self.train_limit < 1:
            raise DataError(f"a limit of training samples is at least 1, got {self.train_limit}; or leave it out")
        if self.weights_stored not in WEIGHT_STORAGES:
            raise PlanError(
                f"unknown weights stored {self.weights_stored!r}; choose one of {', '.join(WEIGHT_STORAGES)}"
            )
        if (
            self.weights_stored == "int4"
            and not self.planned
            and (self.spec.weight_bits is None or self.spec.weight_bits > INT4_BITS)
        ):
            bits = "none" if self.spec.weight_bits is None else self.spec.weight_bits
            raise PlanError(f"weights stored as int4 have 4 bits or fewer, and these have {bits}; give weight bits 4")
        if self.spec.weight_bits is not None or self.planned:
            return
        dropped = [f"placement {self.placement}"] if self.placement not in (None, "inputs") else []
        dropped += [f"residual {self.residual}"] if self.residual != "float" else []
        if dropped:
            raise PlanError(
                f"{' and '.join(dropped)}: activations are quantized only where weights are, and these weights are "
                "not; give weight bits, or leave that out"
            )

    @property
    def scored_on(self) -> str:
        """The dev data, where something has to be scored; raises `DataError` without."""
        if self.dev is None:
            raise DataError(f"{self.model}: dev data are missing, on which it is scored; give --dev (dev=...)")
        return self.dev

    def uniform_plan(self, source: ModelSource) -> CompressionPlan:
        """The plan that gives every matrix of a model the same `spec`, but for those that are kept dense."""
        return source.family.uniform_plan(
            source.config,
            self.spec,
            placement=self.placement or ("inputs" if self.spec.weight_bits is None else PLACEMENT),
            keep_dense=self.keep_dense,
            residual=self.residual,
            embedding=self.embedding,
        )
