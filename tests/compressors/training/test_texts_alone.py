"""Where nothing trains, text without labels gives what labelled text gives, and says nothing of answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import nxm_export as nxm
from compressors.models import load_tokenizer, resolve
from compressors.settings import Settings
from compressors.training.compress import compress, finetune
from compressors.training.task_data import TaskDataRequest, read_task_data
from nxm_export.contract.no_answer import THRESHOLD_KEY
from nxm_export.contract.plan import WeightSpec
from nxm_export.contract.tasks import TASKS
from nxm_export.data.answer_spans import Window
from nxm_export.data.features import label_array
from nxm_export.errors import DataError
from tests.support import tiny

SETTINGS = Settings(steps=0, recipe="admm", precision="fp32", calibration_samples=64)
NONE: dict[str, list[object]] = {"text": [], "answer_start": []}


def without(train: Path, *columns: str) -> Path:
    """The rows of a JSON-lines file without some columns, in a file beside it."""
    rows = [json.loads(line) for line in train.read_text().splitlines()]
    kept = [{name: value for name, value in row.items() if name not in columns} for row in rows]
    file = train.with_name("texts.jsonl")
    file.write_text("".join(json.dumps(row) + "\n" for row in kept))
    return file


@pytest.mark.parametrize(("task", "column"), [("token-classification", "tags"), ("question-answering", "answers")])
def test_text_without_labels_gives_the_checkpoint_of_labelled_text(task: str, column: str, tmp_path: Path) -> None:
    dense = tiny.write_model("bert", tmp_path / "dense", head=task)
    train, dev = tiny.write_data(tmp_path, task)
    source = resolve(dense)
    plan = source.family.uniform_plan(source.config, WeightSpec.parse("2:4+W8"))
    for file, out in ((train, "labelled"), (without(train, column), "blank")):
        compress(dense, task=task, train=str(file), dev=str(dev), plan=plan, out=tmp_path / out, settings=SETTINGS)
    for name in ("model.safetensors", "nxm_scales.safetensors", "config.json", "metrics.json"):
        assert (tmp_path / "blank" / name).read_bytes() == (tmp_path / "labelled" / name).read_bytes(), name
    assert THRESHOLD_KEY not in json.loads((tmp_path / "blank" / "config.json").read_text())


@pytest.mark.parametrize(
    ("task", "column"),
    [("classification", "label"), ("token-classification", "tags"), ("question-answering", "answers")],
)
def test_a_run_that_trains_nothing_reads_and_estimates_text_alone(task: str, column: str, tmp_path: Path) -> None:
    dense = tiny.write_model("bert", tmp_path / "dense", head=task, layers=1)
    train, dev = tiny.write_data(tmp_path, task)
    blank = tmp_path / "texts.tsv"
    if train.suffix == ".jsonl":
        blank = without(train, column)
    else:
        blank.write_text("".join(f"{line.partition(chr(9))[0]}\n" for line in train.read_text().splitlines()))
    samples = []
    for file, out in ((train, "labelled"), (blank, "blank")):
        finetune(dense, task=task, train=str(file), dev=str(dev), out=tmp_path / out, settings=SETTINGS)
        samples.append(nxm.estimate(dense, task=task, train=file, dev=dev, settings=SETTINGS).train_samples)
    assert samples[0] == samples[1]
    for name in ("model.safetensors", "config.json", "metrics.json"):
        assert (tmp_path / "blank" / name).read_bytes() == (tmp_path / "labelled" / name).read_bytes(), name
    with pytest.raises(DataError, match=r"none of the usual|no column .answer"):
        nxm.estimate(dense, task=task, train=blank, dev=dev, settings=Settings(steps=2))


@pytest.mark.parametrize(("answers", "name"), [(False, "train.json"), (False, "train.jsonl"), (True, "train.jsonl")])
def test_blank_answers_do_not_say_that_there_may_be_none(answers: bool, name: str, tmp_path: Path) -> None:
    source = resolve(tiny.write_model("bert", tmp_path / "model", head="question-answering", layers=1))
    _, dev = tiny.write_data(tmp_path, "question-answering")
    blank: dict[str, object] = {"answers": NONE} if answers else {}
    row = {"question": "which", "context": "good film"}
    squad = {"data": [{"paragraphs": [{"context": "good film", "qas": [{"id": "1", "question": "which"}]}]}]}
    train = tmp_path / name
    train.write_text(json.dumps(squad if name == "train.json" else {**row, **blank}) + "\n")
    request = TaskDataRequest(TASKS["question-answering"], str(train), str(dev), texts_alone=True)
    data = read_task_data(source, request, load_tokenizer(source), SETTINGS)
    assert data.no_answer_threshold is None
    windows = [Window.unpack(label) for part in (data.train, data.dev) for label in label_array(part)]
    assert not any(window.nullable for window in windows)


def test_what_dev_and_the_model_say_of_no_answer_still_counts(tmp_path: Path) -> None:
    source = resolve(tiny.write_model("bert", tmp_path / "model", head="question-answering", layers=1))
    row: dict[str, object] = {"question": "which", "context": "good film"}
    for name, asked in (("train", row), ("dev", {**row, "answers": NONE})):
        rows = [asked] * 2
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train, dev = (str(tmp_path / f"{name}.jsonl") for name in ("train", "dev"))
    request = TaskDataRequest(TASKS["question-answering"], train, dev, texts_alone=True)
    with pytest.warns(match="questions have no answer"):
        data = read_task_data(source, request, load_tokenizer(source), SETTINGS)
    assert data.no_answer_threshold == 0.0


def test_tags_that_are_there_are_read_and_training_needs_labels(tmp_path: Path) -> None:
    source = resolve(tiny.write_model("bert", tmp_path / "model", head="token-classification", layers=1))
    train, dev = tiny.write_data(tmp_path, "token-classification")
    texts, task = without(train, "tags"), TASKS["token-classification"]
    train.write_text('{"tokens": ["good", "film"], "tags": ["B-NONE", "O"]}\n')
    for request, said in (
        (TaskDataRequest(task, str(train), str(dev), texts_alone=True), "'B-NONE' is none of the model's classes"),
        (TaskDataRequest(task, str(texts), str(dev)), "none of the usual tag columns"),
    ):
        with pytest.raises(DataError, match=said):
            read_task_data(source, request, load_tokenizer(source), SETTINGS)
    texts.write_text('{"tokens": []}\n')
    with pytest.raises(DataError, match="no sentence has a token"):
        read_task_data(
            source, TaskDataRequest(task, str(texts), str(dev), texts_alone=True), load_tokenizer(source), SETTINGS
        )
