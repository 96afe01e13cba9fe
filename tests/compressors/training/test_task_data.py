"""Texts that are in train and in dev are named before anything is trained."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from compressors.models import load_tokenizer, resolve
from compressors.settings import Settings
from compressors.training.task_data import TaskDataRequest, read_task_data
from nxm_export.contract.tasks import TASKS
from nxm_export.errors import Notice
from tests.support import tiny


@pytest.mark.parametrize(
    ("shared", "pairs", "said"),
    [(20, False, "20 of 20 texts"), (3, False, "3 of 20 texts"), (2, False, None), (20, True, "20 of 20 texts")],
)
def test_texts_of_both_files_are_counted(tmp_path: Path, shared: int, pairs: bool, said: str | None) -> None:
    source = resolve(tiny.write_model("bert", tmp_path / "model", head="classification"))
    head = "sentence\tsentence2\tlabel\n" if pairs else "sentence\tlabel\n"
    second = "plot\t" if pairs else ""
    rows = [f"film {'good ' * i}\t{second}{i % 2}\n" for i in range(1, 41)]
    for name, part in (("train", rows[:20]), ("dev", rows[20 - shared : 40 - shared])):
        (tmp_path / f"{name}.tsv").write_text(head + "".join(part), encoding="utf-8")
    request = TaskDataRequest(TASKS["classification"], str(tmp_path / "train.tsv"), str(tmp_path / "dev.tsv"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read_task_data(source, request, load_tokenizer(source), Settings())
    notices = [
        str(entry.message) for entry in caught if entry.category is Notice and "trained on" in str(entry.message)
    ]
    assert len(notices) == (said is not None)
    assert said is None or f"dev.tsv: {said} are in " in notices[0]


def test_the_second_text_counts(tmp_path: Path) -> None:
    """The same first texts with other second ones are other samples."""
    source = resolve(tiny.write_model("bert", tmp_path / "model", head="classification"))
    for name, second in (("train", "plot"), ("dev", "story")):
        rows = [f"film {'good ' * i}\t{second}\t{i % 2}\n" for i in range(1, 21)]
        (tmp_path / f"{name}.tsv").write_text("sentence\tsentence2\tlabel\n" + "".join(rows), encoding="utf-8")
    request = TaskDataRequest(TASKS["classification"], str(tmp_path / "train.tsv"), str(tmp_path / "dev.tsv"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", Notice)
        read_task_data(source, request, load_tokenizer(source), Settings())
