"""Embeddings and reranking behind `nxm serve` and `nxm triton`: the right outputs, and texts in the right number."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from engines.ort import backend as ort
from engines.serving.protocol import TensorSpec, parse_infer
from engines.serving.repository import EngineSource
from engines.serving.settings import TritonOptions
from engines.serving.text import TextFrontend
from engines.triton import export_repository
from nxm_export.cli import main
from nxm_export.contract.io_spec import load_spec
from nxm_export.data.columns import Columns
from nxm_export.data.features import pad
from nxm_export.data.tokenization import load_tokenizer
from nxm_export.errors import RequestRefused, ServeError
from nxm_export.graph.exporter import export
from nxm_export.pipeline.engine_builds import build_engine
from nxm_export.pipeline.labelled_texts import features_of
from tests.support import baked, tiny
from tools.benchmarks.servers import nxm_serve

pytest.importorskip("torch", reason="torch makes the checkpoints; pip install -e '.[dev]'")
SHAPES = {
    "embedding": TensorSpec("embedding", "FP32", (-1, tiny.HIDDEN)),
    "reranking": TensorSpec("logits", "FP32", (-1, 1)),
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``built(task)``: an engine directory of a tiny model that nobody trained; made once."""
    made: dict[str, Path] = {}

    def make(task: str) -> Path:
        if task not in made:
            home = tmp_path_factory.mktemp(task)
            graph = export(baked.write_checkpoint("bert", home / "checkpoint", task=task), home / "graph").path
            build_engine(graph, home / "engine", "ort")
            made[task] = home / "engine"
        return made[task]

    return make


@pytest.mark.parametrize("task", SHAPES)
def test_a_served_text_gives_what_the_compared_tokens_give(
    task: str, built: Callable[[str], Path], tmp_path: Path
) -> None:
    """Over HTTP, against the engine run by hand on the tokens that `nxm compare` takes."""
    engine, (_, data) = built(task), tiny.write_data(tmp_path, task)
    name, columns = SHAPES[task].name, SHAPES[task].shape[1]
    rows = [line.split("\t") for line in data.read_text(encoding="utf-8").splitlines()[1:4]]
    if task == "embedding":  # the sentences of a pair are two rows
        texts = {"text": [row[i] for row in rows for i in range(2)]}
    else:
        texts = {"text": [row[0] for row in rows], "text_pair": [row[1] for row in rows]}
    count = len(texts["text"])
    with ort.load(engine) as loaded:
        expected = loaded.run(pad(features_of(engine, str(data), Columns())[:count], 0))[name]
    body = {
        "inputs": [
            {"name": key, "datatype": "BYTES", "shape": [count, 1], "data": value} for key, value in texts.items()
        ]
    }
    with nxm_serve(tmp_path / "log", f"m={engine}", "--text") as running:
        request = urllib.request.Request(f"{running.url}/v2/models/m_text/infer", json.dumps(body).encode())
        with urllib.request.urlopen(request) as answer:
            (output,) = json.load(answer)["outputs"]  # no class names: there are no classes
        with urllib.request.urlopen(f"{running.url}/v2/models/m") as answer:
            described = json.load(answer)["outputs"]
    assert described == [{"name": name, "datatype": "FP32", "shape": [-1, columns]}]
    assert (output["name"], output["datatype"], output["shape"]) == (name, "FP32", [count, columns])
    actual = np.array(output["data"]).reshape(count, columns)
    tolerance = 0.02 * np.abs(expected).max()  # a code may move in another batch shape
    np.testing.assert_allclose(actual, expected, atol=tolerance)
    assert np.abs(expected - expected[::-1]).max() > 2 * tolerance, "the texts differ, and so must what they give"


def test_bench_serve_sends_both_texts_to_models_that_read_two(built: Callable[[str], Path], tmp_path: Path) -> None:
    rows = {
        "reranking": "query\tdocument\trelevance\na film\tthe good plot\t1\na film\tvery bad\t0\n",
        "question-answering": json.dumps(
            {"question": "the good scene", "context": "a fine plot", "answers": {"text": ["fine"], "answer_start": [2]}}
        ),
    }
    with nxm_serve(tmp_path / "log", *(f"{task}={built(task)}" for task in rows), "--text") as running:
        for task, text in rows.items():
            data = tmp_path / f"{task}.{'tsv' if task == 'reranking' else 'jsonl'}"
            data.write_text(text, encoding="utf-8")
            where = ["--serve", running.url, "--name", f"{task}_text", "--data", str(data), "--json"]
            load = ["--clients", "1", "--seconds", "0.2", "--rounds", "1"]
            done = CliRunner().invoke(main, ["bench", *where, *load, "--task", task])
            assert done.exit_code == 0, done.output
            (result,) = json.loads(done.stdout)["results"]
            assert result["answered"] > 0
            assert result["errors"] == {}
        done = CliRunner().invoke(main, ["bench", *where, *load, "--task", "embedding"])
        assert done.exit_code == 1
        assert "Traceback" not in done.output


def test_the_wrong_number_of_texts_is_refused_as_the_metadata_says(built: Callable[[str], Path]) -> None:
    one, two = (TextFrontend(load_tokenizer(built(task)), load_spec(built(task))).inputs for task in SHAPES)
    assert [(spec.name, spec.optional) for spec in one] == [("text", False)]
    assert [(spec.name, spec.optional) for spec in two] == [("text", False), ("text_pair", False)]

    def body(*names: str) -> bytes:
        return json.dumps(
            {"inputs": [{"name": name, "datatype": "BYTES", "shape": [1], "data": ["a"]} for name in names]}
        ).encode()

    with pytest.raises(RequestRefused, match=r"unexpected input 'text_pair'; the model takes text$"):
        parse_infer(body("text", "text_pair"), None, one, ())
    with pytest.raises(RequestRefused, match="missing input text_pair; the model takes text, text_pair"):
        parse_infer(body("text"), None, two, ())


@pytest.mark.parametrize(("task", "dims"), [("embedding", f"{tiny.HIDDEN}"), ("reranking", "1")])
def test_triton_has_the_outputs_and_the_texts(
    task: str, dims: str, built: Callable[[str], Path], tmp_path: Path
) -> None:
    """Also where a repository holds models of one text and of two: what a search is made of."""
    pair = task == "reranking"
    sources = [EngineSource("m", "1", built(task))]
    export_repository(sources, tmp_path / "repo", TritonOptions(text=True, threads=1))
    assert {path.name for path in (tmp_path / "repo").iterdir() if path.is_dir()} == {"m", "m_tokenizer", "m_text"}
    text = (tmp_path / "repo" / "m_text" / "config.pbtxt").read_text()
    assert (f'"{SHAPES[task].name}"' in text, '"text_pair"' in text, '"label"' in text) == (True, pair, False)
    assert dims in text.split(f'"{SHAPES[task].name}"')[1].split("]")[0]
    assert "optional" not in text
    if not pair:
        with pytest.raises(ServeError, match="--pairs"):
            export_repository(sources, tmp_path / "other", TritonOptions(text=True, pair=True, threads=1))
        assert not (tmp_path / "other").exists()
