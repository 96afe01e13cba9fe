"""What is done to a student before its first step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from compressors.models import load_model, resolve
from compressors.training.phases import without_dropout
from nxm_export.contract.tasks import TASKS
from tests.support import baked, tiny


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_student_in_training_has_no_noise_whatever_its_configuration_drops(family: str, tmp_path: Path) -> None:
    file = tiny.write_model(family, tmp_path / "m", head="classification") / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, **{key: 0.5 for key in config if "dropout" in key}}))
    student = load_model(resolve(tmp_path / "m"), TASKS["classification"]).train()
    feeds = {name: torch.from_numpy(array) for name, array in baked.feeds(family, 3, 9, padding=2).items()}
    noisy = [student(**feeds).logits for _ in range(2)]
    assert not torch.equal(*noisy)
    without_dropout(student)
    first, second = (student(**feeds).logits for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
