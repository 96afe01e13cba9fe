"""Where the plan of a run comes from: its request, a file, or a search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nxm_export.contract.choices import PLACEMENT
from nxm_export.contract.plan import CompressionPlan
from nxm_export.errors import PlanError

if TYPE_CHECKING:
    from compressors.models import ModelSource
    from compressors.search.settings import SearchSettings
    from nxm_export.pipeline.request import Request


@dataclass(frozen=True)
class PlanChoice:
    """Where the plan of a run comes from, if not from its request: a plan or its `file`, or a `search` of the dense
    model."""

    file: CompressionPlan | str | Path | None = None
    search: SearchSettings | None = None

    @property
    def given(self) -> bool:
        """Whether the request's own pattern and bits are not used."""
        return self.file is not None or self.search is not None


def first_plan(request: Request, source: ModelSource, file: CompressionPlan | str | Path | None) -> CompressionPlan:
    """The plan of a file, which must fit the model, or the request's own."""
    if file is None:
        return request.uniform_plan(source)
    plan = file if isinstance(file, CompressionPlan) else CompressionPlan.load(file)
    plan.require_fits(source.family.model_type, source.family.weights(source.config))
    return plan


def search_for(request: Request, compression: float) -> SearchSettings:
    """The search of a plan that saves this share of the matrices' bits, with the places, table and seed of the
    request."""
    from compressors.search.settings import SearchSettings

    return SearchSettings(
        compression=compression,
        embedding=request.embedding,
        placement=request.placement or PLACEMENT,
        seed=request.settings.seed,
    )


def require_plan_alone(plan: object, given: Sequence[str]) -> None:
    """Raise `PlanError` where a plan, or what asks for one, comes with choices (their names) that it makes itself: it
    would win silently."""
    if plan is not None and given:
        raise PlanError(
            f"a plan says itself what every weight gets, so {', '.join(given)} would be dropped; give the plan "
            "alone, or no plan"
        )
