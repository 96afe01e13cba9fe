"""Texts of a data file, as each task reads them, whatever labels stand beside them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nxm_export.contract.tasks import TASKS
from nxm_export.data.columns import Columns
from nxm_export.data.texts import Text, read_texts, text_read
from nxm_export.errors import DataError
from tests.support import tiny

CLASSIFICATION = TASKS["classification"]


def write(file: Path, *lines: str) -> Path:
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


@pytest.mark.parametrize("task", TASKS)
def test_the_dev_data_of_every_task_has_texts(task: str, tmp_path: Path) -> None:
    _, dev = tiny.write_data(tmp_path, task)
    texts = read_texts(dev, Columns(), TASKS[task])
    assert len(texts) == tiny.DEV_SAMPLES
    pairs = TASKS[task].texts == "two"
    assert all(isinstance(text, tuple) == pairs for text in texts)


def test_labels_are_not_read(tmp_path: Path) -> None:
    file = write(tmp_path / "a.tsv", "sentence\tlabel", "good\tnowhere", "bad\t")
    assert read_texts(file, Columns(), CLASSIFICATION) == ["good", "bad"]


def test_two_columns_are_pairs_for_a_task_that_may_read_them(tmp_path: Path) -> None:
    file = write(tmp_path / "a.tsv", "sentence1\tsentence2", "a\tb", "c\td")
    expected: list[Text] = [("a", "b"), ("c", "d")]
    assert read_texts(file, Columns(), CLASSIFICATION) == expected
    assert read_texts(file, Columns(), TASKS["embedding"]) == ["a", "c"]
    empty = write(tmp_path / "b.tsv", "sentence1\tsentence2", "a\t", "c\t")
    assert read_texts(empty, Columns(), CLASSIFICATION) == ["a", "c"], "a second column that is empty is none"


def test_a_text_that_is_split_stays_so(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", json.dumps({"tokens": ["Anna", " lives\u00a0here "]}))
    (row,) = read_texts(file, Columns(), TASKS["token-classification"])
    assert row == ["Anna", " lives\u00a0here "]
    assert text_read(row) == "Anna lives\u00a0here", "one space between tokens"
    plain = write(tmp_path / "b.jsonl", json.dumps({"text": "Anna lives"}))
    assert read_texts(plain, Columns(), TASKS["token-classification"]) == ["Anna lives"]


def test_columns_can_be_named(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", "body,title", "long,short")
    assert read_texts(file, Columns("body"), CLASSIFICATION) == ["long"]
    assert read_texts(file, Columns("title", "body"), CLASSIFICATION) == [("short", "long")]


@pytest.mark.parametrize(
    ("name", "lines", "task", "message"),
    [
        ("a.tsv", ("sentence",), "classification", "no texts in it"),
        ("a.tsv", ("other", "x"), "classification", "none of the usual text columns"),
        ("a.jsonl", ('{"tokens": [1]}',), "token-classification", "a.jsonl:1: column 'tokens' holds"),
        ("a.jsonl", ('{"text": 3}',), "classification", "a.jsonl:1: column 'text' holds 3"),
        ("a.jsonl", ('{"question": "a"}',), "question-answering", "a.jsonl:1: no column 'context'"),
        ("a.xyz", ("a",), "classification", "unknown format"),
    ],
)
def test_what_is_no_text_is_refused_with_its_line(
    tmp_path: Path, name: str, lines: tuple[str, ...], task: str, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read_texts(write(tmp_path / name, *lines), Columns(), TASKS[task])


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.tsv: no such file"):
        read_texts(tmp_path / "nowhere.tsv", Columns(), CLASSIFICATION)


@pytest.mark.parametrize("answers", [None, {"text": ["nowhere"], "answer_start": [3]}, "malformed"])
def test_questions_in_json_need_no_answers_and_those_that_they_have_are_not_read(
    tmp_path: Path, answers: object
) -> None:
    row = {"question": "who?", "context": "me and you"} | ({} if answers is None else {"answers": answers})
    squad = {"data": [{"paragraphs": [{"context": row["context"], "qas": [row]}]}]}
    for number, content in enumerate(([row], squad, row)):
        file = write(tmp_path / f"{number}.json", json.dumps(content))
        assert read_texts(file, Columns(), TASKS["question-answering"]) == [("who?", "me and you")]


@pytest.mark.parametrize(
    ("name", "columns", "twice"),
    [
        ("classification", Columns(pair="sentence1"), "sentence1"),
        ("classification", Columns("sentence2", "sentence2"), "sentence2"),
        ("question-answering", Columns("sentence1", "sentence1"), "sentence1"),
    ],
)
def test_no_column_is_read_as_both_texts(tmp_path: Path, name: str, columns: Columns, twice: str) -> None:
    file = write(tmp_path / "a.csv", "sentence1,sentence2", "a,b")
    with pytest.raises(DataError, match=f"column '{twice}' cannot be two of text, second text and label"):
        read_texts(file, columns, TASKS[name])
