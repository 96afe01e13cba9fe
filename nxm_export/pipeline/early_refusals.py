"""What a run would come to only behind hours of training, refused before it."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from nxm_export.contract.checkpoint import float32_bytes
from nxm_export.contract.tasks import task_named
from nxm_export.data.label_kinds import load_labelled
from nxm_export.data.more_text import read_more_text
from nxm_export.errors import Notice

if TYPE_CHECKING:
    from compressors.models import ModelSource
    from nxm_export.pipeline.plan_choice import PlanChoice
    from nxm_export.pipeline.request import Request


def require_possible(request: Request, source: ModelSource, choice: PlanChoice) -> None:
    """Raise an `NxmError`, before anything is trained, for what a run would come to only behind its training: an engine
    too large for its file, a search that can find nothing or has no labels, texts without labels that cannot be
    read."""
    from nxm_export.graph.external_data import require_one_file

    way_out = (
        "a run always has the engine of the dense model; use `nxm compress`, `nxm export --target trt` and a TensorRT "
        "backend of `nxm build`, or a smaller model"
    )
    require_one_file(float32_bytes(source.path), request.model, way_out)
    if choice.search is not None:
        from compressors.search.plan_search import require_searchable

        require_searchable(source, choice.search, request.settings)
        if not request.settings.trains:
            _require_labels(request, source)
    require_more_text(request, source)


def _require_labels(request: Request, source: ModelSource) -> None:
    """Raise `DataError` for calibration text without labels, which is enough where nothing trains: a search has a
    loss to measure."""
    task = task_named(request.task)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Notice)
        load_labelled(
            request.train, "train", request.columns, task, source.classes() if source.head_fits(task) else None
        )


def require_more_text(request: Request, source: ModelSource) -> None:
    """Raise `DataError` for texts without labels that cannot be used, where a dense model would be trained before they
    are read. What there is to be said of them is said when they are."""
    task = task_named(request.task)
    if request.more_text is None or source.head_fits(task):
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Notice)
        train = load_labelled(request.train, "train", request.columns, task)
        dev = load_labelled(request.scored_on, "dev", request.columns, task)
        read_more_text(request.more_text, request.columns, task, train, dev)
