"""Whether a question answering model may say that there is no answer, as its checkpoint and its ``spec.json`` say.

In ``config.json`` it is a key of our own, ``nxm_no_answer_threshold``: by how much the sum of both logits of the first
token must be above that of the best span (`nxm_export.data.answer_spans`). Without the key there always is an answer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from nxm_export.errors import ArtifactError

THRESHOLD_KEY = "nxm_no_answer_threshold"
THRESHOLD = 0.0  # of a model that was trained on questions without an answer, as training weighs them


def no_answer_threshold(config: Mapping[str, object], source: str) -> float | None:
    """The threshold that a ``config.json`` states, in logits; None where it states none. `ArtifactError` for another
    value than a number."""
    value = config.get(THRESHOLD_KEY)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ArtifactError(
            f"{source}: {THRESHOLD_KEY} must be a number, how far no answer must be above the best one, got {value!r}"
        )
    return float(value)
