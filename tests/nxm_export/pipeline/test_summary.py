"""What a run says of the same answer for every sample, in tasks beside classification."""

from __future__ import annotations

import numpy as np
import pytest

from nxm_export.contract.io_spec import IOSpec
from nxm_export.contract.tasks import TASKS
from nxm_export.pipeline.summary import _one_class

LABELS = (np.arange(40)[:, None] % (2, 3, 5) == 0).astype(np.float64)  # every second, third and fifth sample


@pytest.mark.parametrize("knows", [True, False])
def test_a_dense_model_of_several_labels_is_held_against_one_answer_for_all(knows: bool) -> None:
    spec = IOSpec("bert", "multi-label", ("input_ids",), dict(TASKS["multi-label"].outputs), ("a", "b", "c"), 48, 0)
    made = _one_class(spec, "micro_f1", {"logits": LABELS - 0.5 if knows else np.ones((40, 3)), "labels": LABELS})
    assert made is not None
    assert (made.what, made.label) == ("one answer", "a, b")
    right, given, true = LABELS[:, :2].sum(), 80, LABELS.sum()
    assert made.value == pytest.approx(2 * right / (given + true))
    assert made.dense_is_better is knows


@pytest.mark.parametrize("knows", [True, False])
def test_a_dense_model_that_ranks_is_held_against_equal_scores(knows: bool) -> None:
    spec = IOSpec("bert", "reranking", ("input_ids",), dict(TASKS["reranking"].outputs), ("score",), 48, 0)
    scores = LABELS[:, :1] if knows else np.zeros((40, 1))
    outputs = {"logits": scores, "labels": LABELS[:, :1], "groups": np.repeat(np.arange(10), 4)}
    made = _one_class(spec, "ndcg_at_10", outputs)
    assert made is not None
    assert (made.what, made.label, made.dense_is_better) == ("one score", "", knows)
