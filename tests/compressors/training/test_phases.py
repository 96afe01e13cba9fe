"""What is done to a student before its first step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from compressors.models import load_model, load_tokenizer, resolve
from compressors.settings import Settings
from compressors.training.phases import Job, without_dropout
from compressors.training.task_data import TaskDataRequest, read_task_data
from nxm_export.contract.plan import WeightSpec
from nxm_export.contract.tasks import TASKS
from nxm_export.progress import silent
from tests.support import baked, tiny


@pytest.mark.parametrize(("queries", "held_out"), [(2, 0), (9, 0), (48, 3)])
def test_few_large_groups_are_all_trained_on(queries: int, held_out: int, tmp_path: Path) -> None:
    """A twentieth of the samples is held out; a whole query of few would be far more."""
    source, task = resolve(tiny.write_model("bert", tmp_path / "m", head="reranking", layers=1)), TASKS["reranking"]
    rows = [
        f"{'good film ' * query}\tplot {'long ' * i}\t{i % 2}\n" for query in range(1, queries + 1) for i in range(8)
    ]
    (tmp_path / "train.tsv").write_text("query\tdocument\trelevance\n" + "".join(rows))
    settings = Settings(recipe="obs", steps=2)
    data = read_task_data(source, TaskDataRequest(task, str(tmp_path / "train.tsv")), load_tokenizer(source), settings)
    plan = source.family.uniform_plan(source.config, WeightSpec.parse("2:4+W8"))
    job = Job(source, data, plan, settings, tmp_path / "work", silent)
    assert (len(job.held_out), len(job.train)) == (8 * held_out, len(rows) - 8 * held_out)


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
