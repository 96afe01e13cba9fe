"""Where nothing trains, text without labels gives what labelled text gives, and says nothing of answers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import nxm_export as nxm
from compressors.models import load_tokenizer, resolve
from compressors.settings import Settings
from compressors.training.compress import compress, finetune
from compressors.training.task_data import TaskDataRequest, read_task_data
from nxm_export.contract.no_answer import THRESHOLD_KEY
from nxm_export.contract.plan import WeightSpec
from nxm_export.contract.records.checkpoint_metrics import read_metrics
from nxm_export.contract.tasks import TASKS
from nxm_export.data.answer_spans import Window
from nxm_export.data.features import label_array, split_indices
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


NO_LABELS = {  # by task, what stands in a column of labels and is none of them
    "classification": "-1",
    "multi-label": "none; of these",
    "regression": "?",
    "embedding": "-",
    "reranking": "0",
}


@pytest.mark.parametrize("task", sorted(TASKS))
@pytest.mark.parametrize("labels", ["strange", "left out"])
def test_labels_are_not_read_where_nothing_learns_from_them(task: str, labels: str, tmp_path: Path) -> None:
    """Each text of the file is a sample, as the model reads it."""
    source, kind = resolve(tiny.write_model("bert", tmp_path / "model", head=task, layers=1)), TASKS[task]
    train, dev = tiny.write_data(tmp_path, task)
    tokenizer, request = load_tokenizer(source), TaskDataRequest(kind, str(train), str(dev))
    expected = read_task_data(source, request, tokenizer, SETTINGS)
    file = tmp_path / f"changed{train.suffix}"
    if train.suffix == ".jsonl":
        column = "tags" if task == "token-classification" else "answers"
        rows = [json.loads(line) for line in train.read_text().splitlines()]
        changed = [{name: value for name, value in row.items() if name != column} for row in rows]
        if labels == "strange":
            changed = [{**row, column: ["B-NONE"]} for row in changed]
        file.write_text("".join(json.dumps(row) + "\n" for row in changed))
    else:
        header, *lines = [line.split("\t") for line in train.read_text().splitlines()]
        for cells in lines:
            cells[-1] = NO_LABELS[task]
        if labels == "left out":
            for cells in (header, *lines):
                del cells[-1]
        file.write_text("".join("\t".join(cells) + "\n" for cells in (header, *lines)))
    alone = read_task_data(source, replace(request, train=str(file), texts_alone=True), tokenizer, SETTINGS)
    for part in ("input_ids", "token_type_ids", "group"):
        assert [sample.get(part) for sample in alone.train] == [sample.get(part) for sample in expected.train]
    assert alone.dev == expected.dev


def test_training_needs_tags_and_all_need_tokens(tmp_path: Path) -> None:
    source = resolve(tiny.write_model("bert", tmp_path / "model", head="token-classification", layers=1))
    train, dev = tiny.write_data(tmp_path, "token-classification")
    texts, task = without(train, "tags"), TASKS["token-classification"]
    with pytest.raises(DataError, match="none of the usual tag columns"):
        read_task_data(source, TaskDataRequest(task, str(texts), str(dev)), load_tokenizer(source), SETTINGS)
    texts.write_text('{"tokens": []}\n')
    with pytest.raises(DataError, match="no sentence has a token"):
        read_task_data(
            source, TaskDataRequest(task, str(texts), str(dev), texts_alone=True), load_tokenizer(source), SETTINGS
        )


@pytest.mark.parametrize("task", sorted(TASKS))
def test_without_dev_answers_are_compared_on_texts_that_calibration_does_not_see(task: str, tmp_path: Path) -> None:
    dense = tiny.write_model("bert", tmp_path / "dense", head=task, layers=1)
    train, _ = tiny.write_data(tmp_path, task)
    source, kind = resolve(dense), TASKS[task]
    plan = source.family.uniform_plan(source.config, WeightSpec.parse("2:4+W8"))
    with pytest.warns(match="without dev data there is no score"):
        metrics = compress(dense, task=task, train=str(train), plan=plan, out=tmp_path / "out", settings=SETTINGS)
    assert (metrics.value, metrics.interval, metrics.dense_value) == (None, None, None)
    assert not metrics.dev_labelled
    assert not metrics.secondary_metrics
    assert metrics.distance_to_dense is not None
    assert (metrics.same_answers is None) == (kind.output_kind in ("identity", "vector"))
    assert read_metrics(tmp_path / "out") == metrics
    tokenizer, whole = load_tokenizer(source), TaskDataRequest(kind, str(train))
    with pytest.warns(match="no score"):
        split = read_task_data(source, replace(whole, texts_alone=True, holds_out=True), tokenizer, SETTINGS)
    samples = read_task_data(source, whole, tokenizer, SETTINGS).train
    assert metrics.dev_samples == len(split.dev)
    assert 0 < len(split.dev) <= len(samples) / 5
    read = sorted(sample["input_ids"] for sample in (*split.train, *split.dev))
    assert read == sorted(sample["input_ids"] for sample in samples)


def test_the_distance_without_dev_is_that_to_the_same_texts_as_dev(tmp_path: Path) -> None:
    dense = tiny.write_model("bert", tmp_path / "dense", head="classification", layers=1)
    train, _ = tiny.write_data(tmp_path, "classification")
    source = resolve(dense)
    plan = source.family.uniform_plan(source.config, WeightSpec.parse("2:4+W8"))
    header, *rows = train.read_text().splitlines(keepends=True)
    picked, left = split_indices([{"input_ids": []}] * len(rows), len(rows) // 10, SETTINGS.seed)
    for name, indices in (("rest", left), ("held_out", picked)):
        (tmp_path / f"{name}.tsv").write_text(header + "".join(rows[i] for i in indices))
    rest, held_out = (str(tmp_path / f"{name}.tsv") for name in ("rest", "held_out"))
    task, out = "classification", tmp_path / "b"
    ours = compress(dense, task=task, train=str(train), plan=plan, out=tmp_path / "a", settings=SETTINGS)
    theirs = compress(dense, task=task, train=rest, dev=held_out, plan=plan, out=out, settings=SETTINGS)
    assert theirs.value is not None
    assert (ours.distance_to_dense, ours.same_answers) == (theirs.distance_to_dense, theirs.same_answers)
    for name in ("model.safetensors", "nxm_scales.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_what_cannot_do_without_dev_says_so(tmp_path: Path) -> None:
    dense = tiny.write_model("bert", tmp_path / "dense", head="classification", layers=1)
    train, _ = tiny.write_data(tmp_path, "classification")
    with pytest.raises(DataError, match=r"give --dev .* or train nothing"):
        nxm.compress(dense, train=train, out=tmp_path / "out", settings=Settings(steps=2))
    headless = tiny.write_model("bert", tmp_path / "headless", layers=1)
    with pytest.raises(DataError, match="dev data are missing"):
        nxm.compress(headless, train=train, out=tmp_path / "out", settings=SETTINGS)
    one = tmp_path / "one.tsv"
    one.write_text("sentence\nA fine film.\n")
    with pytest.raises(DataError, match="one text is too little"):
        nxm.compress(dense, train=one, out=tmp_path / "out", settings=SETTINGS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "dev.tsv", "headless", "one.tsv", "train.tsv"]
