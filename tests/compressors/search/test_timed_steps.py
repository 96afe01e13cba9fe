"""What a search compares its cost with: steps of the compression run, timed as that run makes them."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from compressors.models import load_model, load_tokenizer, resolve
from compressors.search.plan_search import _Runs
from compressors.search.plan_selection import Trial
from compressors.settings import Settings
from compressors.training.distillation import Student
from compressors.training.task_data import TaskDataRequest, read_task_data
from nxm_export.contract.plan import WeightSpec
from nxm_export.contract.tasks import TASKS
from tests.support import tiny


@pytest.mark.parametrize(
    ("settings", "taught"),
    [(Settings(), True), (Settings(recipe="paper"), False), (Settings(recipe="obs", distill=False), False)],
)
def test_a_step_is_timed_with_a_teacher_where_the_run_has_one(
    settings: Settings, taught: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, task = resolve(tiny.write_model("bert", tmp_path / "dense", head="classification")), TASKS["classification"]
    train, _ = tiny.write_data(tmp_path)
    data = read_task_data(source, TaskDataRequest(task, str(train)), load_tokenizer(source), settings)
    dense, teachers = load_model(source, task), list[nn.Module | None]()
    plain = Student.__init__

    def watched(self: Student, model: nn.Module, losses: object, teacher: nn.Module | None, *rest: object) -> None:
        teachers.append(teacher)
        plain(self, model, losses, teacher, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Student, "__init__", watched)
    plan = source.family.uniform_plan(source.config, WeightSpec.parse("2:4+W8"))
    runs = _Runs(source, data, dense, settings, tmp_path, lambda *_: None)
    assert runs.step_seconds(Trial("free", plan, (), 0.0, 0.0)) > 0
    assert teachers == [dense if taught else None]
