"""``nxm predict``: texts as arguments and from files, every task's line, and wrong usage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from engines.base import BuildOptions
from engines.ort.backend import build
from engines.predictor import Predictor
from nxm_export.cli import main
from nxm_export.cli.predicting import line_of
from nxm_export.data.predictions import (
    Answer,
    AnyPrediction,
    Embedding,
    Entity,
    LabelSet,
    Prediction,
    Score,
    TaggedText,
)
from nxm_export.graph.exporter import export
from tests.support import tiny


def predict(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["predict", *map(str, arguments)])


@pytest.fixture(scope="module")
def engine_for(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The engine of a tiny dense model for a task, made once."""
    made: dict[str, Path] = {}

    def make(task: str) -> Path:
        if task not in made:
            home = tmp_path_factory.mktemp(task)
            graph = export(tiny.write_model("bert", home / "model", head=task, layers=1), home / "graph", task=task)
            (home / "engine").mkdir()
            build(graph.path, home / "engine", BuildOptions(threads=1))
            made[task] = home / "engine"
        return made[task]

    return make


def test_one_line_a_text_with_label_and_probability(engine_for: Callable[[str], Path]) -> None:
    engine = engine_for("classification")
    with Predictor(engine) as predictor:
        expected = predictor.predict(["a good film", "dull"])
    result = predict(engine, "a good film", "dull")
    assert result.exit_code == 0, result.output
    rows = [line.split("\t") for line in result.stdout.splitlines()]
    assert [row[2] for row in rows] == ["a good film", "dull"]
    assert [row[0] for row in rows] == [getattr(one, "label") for one in expected]  # noqa: B009


@pytest.mark.parametrize(
    ("result", "line"),
    [
        (Prediction("good", 0.98765), "good\t0.988"),
        (LabelSet((Prediction("a", 0.9), Prediction("b", 0.6))), "a 0.900, b 0.600"),
        (LabelSet(()), "no label"),
        (Score(-1.25), "-1.25"),
        (TaggedText((Entity("PER", "Anna", 0, 4, 0.9),)), "PER: Anna"),
        (TaggedText(()), "no entity"),
        (Answer("Rome", 3, 7, 0.5), "Rome\t0.500"),
        (Answer("", None, None, 0.5), "no answer\t0.500"),
        (Embedding(np.arange(8, dtype=np.float32)), "8 numbers: 0.000 1.000 2.000 ..."),
    ],
)
def test_every_kind_of_result_is_one_line_of_words(result: AnyPrediction, line: str) -> None:
    assert line_of(result) == line


def test_questions_take_their_contexts_beside_them_and_answer_as_json(engine_for: Callable[[str], Path]) -> None:
    engine = engine_for("question-answering")
    (answer,) = json.loads(predict(engine, tiny.QUESTION, "a superb film", "--json").stdout)
    assert answer["input"] == [tiny.QUESTION, "a superb film"]
    assert "a superb film"[answer["start"] : answer["end"]] == answer["text"]


@pytest.mark.parametrize("task", ["classification", "question-answering"])
def test_a_file_gives_what_its_texts_give(engine_for: Callable[[str], Path], task: str, tmp_path: Path) -> None:
    _, dev = tiny.write_data(tmp_path, task)
    answers = json.loads(predict(engine_for(task), "--data", dev, "--json").stdout)
    assert len(answers) == tiny.DEV_SAMPLES
    texts = [answer["input"] for answer in answers[:2]]
    arguments = texts if isinstance(texts[0], str) else [part for pair in texts for part in pair]
    again = json.loads(predict(engine_for(task), *arguments, "--json").stdout)
    assert [one["input"] for one in again] == texts
    assert all(again[i].keys() == answers[i].keys() for i in range(2))


def test_two_texts_at_a_time_for_a_classifier_of_pairs(engine_for: Callable[[str], Path]) -> None:
    engine = engine_for("classification")
    (answer,) = json.loads(predict(engine, "a good", "film", "--pairs", "--json").stdout)
    assert answer["input"] == ["a good", "film"]


def test_a_text_that_was_cut_is_said(engine_for: Callable[[str], Path]) -> None:
    result = predict(engine_for("classification"), "film " * 60)
    assert result.exit_code == 0
    assert "1 of 1 texts were cut at 48 tokens" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give either TEXTs, or --data"),
        (("a", "--data", "dev.tsv"), "give either TEXTs, or --data"),
        (("a", "--text-column", "x"), "name columns of --data"),
        (("a", "--pairs"), "are not pairs"),
        (("--data", "dev.tsv", "--pairs"), "--pairs is for TEXTs"),
    ],
)
def test_wrong_usage_exits_with_two(
    engine_for: Callable[[str], Path], arguments: tuple[str, ...], message: str
) -> None:
    result = predict(engine_for("classification"), *arguments)
    assert result.exit_code == 2
    assert message in result.output


def test_a_file_that_is_not_there_is_one_line(engine_for: Callable[[str], Path]) -> None:
    result = predict(engine_for("classification"), "--data", "nowhere.tsv")
    assert result.exit_code == 1
    assert result.stderr.startswith("nxm: nowhere.tsv: no such file")


def test_a_directory_that_is_no_engine_is_one_line(tmp_path: Path) -> None:
    result = predict(tmp_path, "a")
    assert result.exit_code == 1
    assert "spec.json" in result.stderr
