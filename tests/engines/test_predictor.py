"""`Predictor` on an engine of every task, against the same model in PyTorch, text by text; and what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from engines.base import BuildOptions, LoadOptions
from engines.ort import backend as ort
from engines.ort.backend import build
from engines.passport import load_passport
from engines.predictor import Predictor, _words
from nxm_export.contract.tasks import TASKS
from nxm_export.data.columns import Columns
from nxm_export.data.examples import encode
from nxm_export.data.features import filled, label_array
from nxm_export.data.label_kinds import classes_of, labelled, load_labelled
from nxm_export.data.metrics import entity_counts
from nxm_export.data.predictions import Answer, Embedding, LabelSet, Prediction, Score, TaggedText
from nxm_export.data.texts import Text, read_texts
from nxm_export.errors import ArtifactError, DataError, ServeError
from nxm_export.graph.exporter import export
from tests.support import exact_engine, tiny

TEXTS = [
    "a good film",
    "the dull story with the very cold actor",
    "superb",
    "two long scene and the new plot of a film",
    "",
]
PAIRS = [(text, "the good scene") for text in TEXTS]
QUESTIONS = [
    (tiny.QUESTION, "a very good warm film"),
    (tiny.QUESTION, "the story " * 40 + "superb film"),
    ("a film", "two"),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """(model directory, engine directory) of a task, dense, made once."""
    kept: dict[str, tuple[Path, Path]] = {}

    def make(task: str) -> tuple[Path, Path]:
        if task not in kept:
            home = tmp_path_factory.mktemp(task)
            model = tiny.write_model("bert", home / "model", head=task, classes=("bad", "good"), layers=1)
            graph = export(model, home / "graph", task=task)
            (home / "engine").mkdir()
            build(graph.path, home / "engine", BuildOptions(threads=1))
            kept[task] = model, home / "engine"
        return kept[task]

    return make


def torch_outputs(model: Path, task: str, text: Text) -> dict[str, np.ndarray]:
    """The model's own outputs for one text, without padding."""
    import torch

    from nxm_export.hf.model_loading import load_task_model

    tokenizer = tiny.tokenizer()
    tokenizer.enable_truncation(tiny.POSITIONS)
    encoded = tokenizer.encode(*([text] if isinstance(text, str) else text))
    batch = {"input_ids": encoded.ids, "attention_mask": encoded.attention_mask, "token_type_ids": encoded.type_ids}
    with torch.no_grad():
        outputs = load_task_model(model, TASKS[task])(**{name: torch.tensor([row]) for name, row in batch.items()})
    return {name: getattr(outputs, name)[0].numpy() for name in TASKS[task].outputs}


@pytest.mark.parametrize("rows", [TEXTS, PAIRS], ids=["texts", "pairs"])
def test_classes_are_those_of_the_model(made: Callable[[str], tuple[Path, Path]], rows: list[Text]) -> None:
    model, engine = made("classification")
    with Predictor(engine) as predictor:
        results = predictor.predict(rows, batch=2)
    for text, result in zip(rows, results, strict=True):
        logits = torch_outputs(model, "classification", text)["logits"]
        assert isinstance(result, Prediction)
        assert result.label == ("bad", "good")[int(logits.argmax())]
        probability = np.exp(logits.max()) / np.exp(logits).sum()
        assert result.score == pytest.approx(float(probability), abs=1e-5)  # float32 sums in another order


@pytest.mark.parametrize("task", ["regression", "reranking", "multi-label", "embedding"])
def test_scores_labels_and_vectors_are_those_of_the_model(made: Callable[[str], tuple[Path, Path]], task: str) -> None:
    model, engine = made(task)
    rows: list[Text] = [*PAIRS] if task == "reranking" else [*TEXTS]
    with Predictor(engine) as predictor:
        results = predictor.predict(rows)
    for text, result in zip(rows, results, strict=True):
        output = next(iter(torch_outputs(model, task, text).values()))
        if isinstance(result, Score):
            assert result.score == pytest.approx(float(output[0]), abs=1e-5)
        elif isinstance(result, LabelSet):
            expected = {name for name, logit in zip(tiny.CLASSES[task], output, strict=True) if logit > 0}
            assert {label.label for label in result.labels} == expected
        else:
            assert isinstance(result, Embedding)
            np.testing.assert_allclose(result.vector, output, atol=1e-5)


def test_every_word_has_the_tag_of_its_first_token(made: Callable[[str], tuple[Path, Path]]) -> None:
    model, engine = made("token-classification")
    with Predictor(engine) as predictor:
        results = predictor.predict(TEXTS)
    found = 0
    for text, result in zip(TEXTS, results, strict=True):
        assert isinstance(result, TaggedText)
        tags = torch_outputs(model, "token-classification", text)["logits"].argmax(axis=-1)
        words = text.split(" ") if text else []
        names = [tiny.CLASSES["token-classification"][tag] for tag in tags[1 : 1 + len(words)]]
        expected = [(name[2:], word) for name, word in zip(names, words, strict=True) if name != "O"]
        assert [(entity.label, entity.text) for entity in result.entities] == expected
        assert all(text[entity.start : entity.end] == entity.text for entity in result.entities)
        found += len(expected)
    assert found, "the model tags something"


def test_words_are_the_tokens_that_a_text_is_given_as(made: Callable[[str], tuple[Path, Path]]) -> None:
    model, engine = made("token-classification")
    rows: list[Text] = [["the", "superb film", " ", "bad"], [*TEXTS[1].split()], [*(["very good"] * 40)], []]
    with Predictor(engine) as predictor:
        results = predictor.predict(rows)
    found = 0
    for row, result in zip(rows, results, strict=True):
        assert isinstance(row, list)
        assert isinstance(result, TaggedText)
        text = " ".join(token for token in row if token.strip())
        tags = torch_outputs(model, "token-classification", text)["logits"].argmax(axis=-1)
        at, place, expected = 1, 0, []
        for token in filter(str.strip, row):
            name = tiny.CLASSES["token-classification"][tags[at]] if at < len(tags) - 1 else "O"
            expected += [(name[2:], token, place)] if name != "O" else []
            at, place = at + len(token.split()), place + len(token) + 1
        assert [(entity.label, entity.text, entity.start) for entity in result.entities] == expected
        found += sum(" " in token for _, token, _ in expected)
    assert found, "the model tags a token of two words"


def test_the_entities_of_a_file_are_those_that_are_scored(
    made: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    _, engine = made("token-classification")
    names = tiny.CLASSES["token-classification"]
    file = tmp_path / "dev.jsonl"
    tokens = ["the very", "good", "superb film", "dark of", "a bad", "film"]
    tags = ["O", "B-GOOD", "B-GOOD", "B-BAD", "B-BAD", "O"]
    lines = [json.dumps({"tokens": tokens[i:] + tokens[:i], "tags": tags[i:] + tags[:i]}) for i in range(len(tokens))]
    file.write_text("\n".join(lines), encoding="utf-8")
    task = TASKS["token-classification"]
    raw = load_labelled(str(file), "dev", Columns(), task, names)
    features = encode(tiny.tokenizer(), labelled(raw, task, classes_of(raw, task, names)), 48, tiny.inputs("bert"))
    with Predictor(engine) as predictor:
        results = predictor.predict(read_texts(file, Columns(), task))
        outputs = predictor._run(features, 8)
    labels = label_array(features)
    scored = entity_counts(filled(outputs, 0.0), labels, names)
    assert scored[:, 1].sum() > 0
    meant = {token: tag[2:] for token, tag in zip(tokens, tags, strict=True) if tag != "O"}
    for result, (right, predicted, true) in zip(results, scored, strict=True):
        assert isinstance(result, TaggedText)
        assert len(result.entities) == predicted
        assert sum(meant.get(entity.text) == entity.label for entity in result.entities) == right
        assert len(meant) == true


def test_an_entity_has_the_whole_of_a_word_that_is_cut() -> None:
    parts = {"[CLS]": 0, "[SEP]": 1, "[UNK]": 2, "a": 3, "##b": 4, "##c": 5}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(parts, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 1), ("[CLS]", 0))
    for length, expected in ((9, ["abc", "abc"]), (7, ["abc", "abc"]), (5, ["abc"]), (4, ["abc"])):
        tokenizer.enable_truncation(length)
        words = _words(tokenizer.encode("abc abc"), "abc abc")
        assert ["abc abc"[word.start : word.end] for word in words] == expected


def test_an_answer_stands_in_the_context_where_it_says(made: Callable[[str], tuple[Path, Path]]) -> None:
    _, engine = made("question-answering")
    with Predictor(engine) as predictor:
        results = predictor.predict(QUESTIONS)
        alone = [predictor.predict([row])[0] for row in QUESTIONS]
    for (_, context), result, again in zip(QUESTIONS, results, alone, strict=True):
        assert isinstance(result, Answer)
        assert isinstance(again, Answer)
        assert context[result.start : result.end] == result.text != "", "it was not made to give none"
        assert (again.text, again.start) == (result.text, result.start), "batches and windows change nothing"
        assert 0 < result.score <= 1


def test_a_text_that_is_cut_is_counted(made: Callable[[str], tuple[Path, Path]]) -> None:
    _, engine = made("classification")
    with Predictor(engine) as predictor:
        predictor.predict(["film " * 45, "film " * 47, "film " * 400])
        assert predictor.shortened == 2, "46 words and two special tokens fit into 48"


@pytest.mark.parametrize(
    ("task", "rows", "message"),
    [
        ("classification", "a film", "predict takes a list"),
        ("classification", ["a", 3], "text 1 is 3; give a string"),
        ("classification", ["a", ("a", "b")], "text 1 is a pair, unlike text 0"),
        ("classification", [("a", "b", "c")], "a pair of two strings"),
        ("classification", ["\ud800"], "half a surrogate"),
        ("embedding", [("a", "b")], "embedding reads one text"),
        ("token-classification", [("a", "b")], "reads one text at a time; give strings, or lists of tokens"),
        ("token-classification", [["a", 3]], r"text 0 is \['a', 3\]; give a string, or the list of its tokens"),
        ("reranking", ["a"], r"pairs: \(query, document\)"),
        ("question-answering", ["a"], r"pairs: \(question, context\)"),
        ("question-answering", [("film " * 60, "a")], "leave no room"),
    ],
)
def test_what_a_task_does_not_read_is_refused_by_position(
    made: Callable[[str], tuple[Path, Path]], task: str, rows: Any, message: str
) -> None:
    with Predictor(made(task)[1]) as predictor, pytest.raises(DataError, match=message):
        predictor.predict(rows)


def test_nothing_in_is_nothing_out(made: Callable[[str], tuple[Path, Path]]) -> None:
    with Predictor(made("classification")[1]) as predictor:
        assert predictor.predict([]) == []


@pytest.mark.parametrize("task", ["classification", "multi-label", "token-classification"])
def test_labels_that_are_not_as_many_as_the_classes_are_refused(
    made: Callable[[str], tuple[Path, Path]], tmp_path: Path, task: str
) -> None:
    shutil.copytree(made(task)[1], tmp_path / "engine")
    spec = json.loads((tmp_path / "engine" / "spec.json").read_text())
    (tmp_path / "engine" / "spec.json").write_text(json.dumps({**spec, "labels": [*spec["labels"], "more"]}))
    exact_engine.cover(tmp_path / "engine")
    with Predictor(tmp_path / "engine") as predictor, pytest.raises(ArtifactError, match="build it again"):
        predictor.predict(["a good film"])


def test_a_directory_without_a_tokenizer_is_refused(made: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    shutil.copytree(made("classification")[1], tmp_path / "engine")
    (tmp_path / "engine" / "tokenizer.json").unlink()
    with pytest.raises(ArtifactError, match=r"tokenizer\.json is missing"):
        Predictor(tmp_path / "engine")


def test_predicting_needs_neither_torch_nor_transformers(made: Callable[[str], tuple[Path, Path]]) -> None:
    code = f"""
import sys
from engines.passport import load_passport
from engines.predictor import Predictor, _words
with Predictor({str(made("classification")[1])!r}) as predictor:
    print(predictor.predict(["a good film"])[0])
assert not {{"torch", "transformers"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Prediction(label=")


def test_a_directory_that_is_replaced_while_it_is_loaded_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, newer = (exact_engine.build(tmp_path / name, seed) for seed, name in enumerate(("served", "newer")))
    load = ort.load

    def replace_and_load(path: Path, options: LoadOptions) -> ort.OrtEngine:
        directory.rename(tmp_path / "old")
        newer.rename(directory)
        return load(path, options)

    monkeypatch.setattr(ort, "load", replace_and_load)
    with pytest.raises(ServeError, match="replaced while it was loaded"):
        Predictor(directory, expect_sha256={load_passport(directory).engine_sha256})
