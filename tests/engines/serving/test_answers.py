"""A question and its context go in as text, and the answer comes back in words."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.base import backend
from engines.serving.repository import EngineSource
from engines.serving.settings import TritonOptions
from engines.triton import export_repository
from nxm_export.data.examples import Examples, label_array, pad
from nxm_export.data.question_answering import Window, windows
from nxm_export.errors import ServeError
from nxm_export.graph.exporter import export
from nxm_export.pipeline.engine_commands import build_engine
from tests.support import baked, tiny
from tools.benchmarks.servers import Running, nxm_serve

QUESTION = "which film"
CONTEXTS = ["a good film with two actor", "the Story  very dark", "superb"]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("answers")
    graph = export(baked.write_checkpoint("bert", home / "checkpoint", task="question-answering"), home / "graph")
    build_engine(graph.path, home / "engine", "ort")
    return home / "engine"


@pytest.fixture(scope="module")
def server(engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with nxm_serve(tmp_path_factory.mktemp("server") / "log", f"qa={engine}", "--text") as running:
        yield running


def ask(server: Running, **texts: list[str]) -> dict[str, Any]:
    inputs = [
        {"name": name, "datatype": "BYTES", "shape": [len(rows), 1], "data": rows} for name, rows in texts.items()
    ]
    request = urllib.request.Request(
        f"{server.url}/v2/models/qa_text/infer",
        json.dumps({"inputs": inputs}).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=20) as answer:
        return {output["name"]: output for output in json.load(answer)["outputs"]}


def test_the_answer_is_the_best_span_of_the_context(server: Running, engine: Path) -> None:
    """Against the engine itself on tokens made here, and all spans tried one by one."""
    answers = ask(server, text=[QUESTION] * 3, text_pair=CONTEXTS)
    examples = Examples([QUESTION] * 3, CONTEXTS, [()] * 3, "x")
    with backend("ort").load(engine) as loaded:
        samples = windows(tiny.tokenizer(), examples, tiny.POSITIONS, loaded.inputs)
        outputs = loaded.run(pad(samples, 0))
    for name, array in outputs.items():
        np.testing.assert_allclose(np.reshape(answers[name]["data"], answers[name]["shape"]), array, atol=1e-4)
    for row, (context, label) in enumerate(zip(CONTEXTS, label_array(samples), strict=True)):
        window, words = Window.unpack(label), len(context.split())
        spans = [(i, j) for i in range(words) for j in range(i, words)]
        start, end = outputs["start_logits"][row], outputs["end_logits"][row]
        i, j = max(spans, key=lambda span: start[window.first + span[0]] + end[window.first + span[1]])
        answer = answers["answer"]["data"][row]
        assert answer in context
        assert answer.split() == context.split()[i : j + 1]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"text": [QUESTION]}, "text_pair"),
        (
            {"text": [QUESTION], "text_pair": ["film " * 100]},
            "row 0 of text_pair and its question take more than 48 tokens",
        ),
        ({"text": ["film " * 60], "text_pair": ["film"]}, "leave no room for context in 48"),
        ({"text": [QUESTION], "text_pair": [" "]}, "its context has no tokens"),
    ],
)
def test_what_cannot_be_answered_is_refused(server: Running, texts: dict[str, list[str]], message: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        ask(server, **texts)
    assert refused.value.code == 400
    assert message in json.load(refused.value)["error"]


def test_triton_is_handed_tokens_alone(engine: Path, tmp_path: Path) -> None:
    export_repository([EngineSource("qa", "1", engine)], tmp_path / "tokens", TritonOptions(threads=1))
    config = (tmp_path / "tokens" / "qa" / "config.pbtxt").read_text()
    for name in ("start_logits", "end_logits"):
        assert f'name: "{name}"' in config
    with pytest.raises(ServeError, match="gives no answers in words for question-answering on Triton"):
        export_repository([EngineSource("qa", "1", engine)], tmp_path / "text", TritonOptions(text=True, threads=1))
    assert not (tmp_path / "text").exists()
