"""What rounding in half precision is expected to change is what it changes, of every family."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch

from engines.parity.tolerance import DTYPE_ROUNDING, MEAN_FACTOR
from engines.reference import pytorch
from engines.reference.pytorch import Perturbation
from nxm_export.contract.tasks import TASKS
from nxm_export.hf.model_loading import load_task_model
from tests.support import tiny

SAMPLES, LENGTH = 64, 23
FAST = ("bert", "modernbert", "deberta-v2")


def in_half(directory: Path, feeds: dict[str, np.ndarray]) -> np.ndarray:
    """Logits of transformers' own model in float16, which rounds behind every operator."""
    model = load_task_model(directory, TASKS["classification"]).half().eval()
    with torch.no_grad():
        logits = model(**{name: torch.from_numpy(values) for name, values in feeds.items()}).logits
    return cast("np.ndarray", logits.float().numpy())


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in tiny.FAMILIES]
)
def test_half_precision_errs_as_the_noise_says(family: str, tmp_path: Path) -> None:
    directory = tiny.write_model(family, tmp_path / "model", head="classification")
    ids = np.random.default_rng(0).integers(5, 20, (SAMPLES, LENGTH))
    with pytorch.load(directory, task="classification", exact=True) as exact:
        given = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        feeds = {name: given.get(name, np.zeros_like(ids)) for name in exact.inputs}
        expected = exact.run(feeds)["logits"]
    noise = Perturbation(DTYPE_ROUNDING["float16"], everywhere=True)
    with pytorch.load(directory, task="classification", perturbation=noise) as perturbed:
        predicted = np.abs(perturbed.run(feeds)["logits"] - expected).mean()
    measured = np.abs(in_half(directory, feeds) - expected).mean()
    # Below: a right engine would fail, since twice the noise is tolerated. Above: the tolerance would say little.
    assert predicted / MEAN_FACTOR < measured < predicted * MEAN_FACTOR, measured / predicted
