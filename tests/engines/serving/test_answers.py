"""A question and its context go in as text, and the answer comes back in words."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.base import backend
from engines.serving.repository import EngineSource
from engines.serving.settings import TritonOptions
from engines.serving.text import TextFrontend
from engines.triton import export_repository
from nxm_export.contract.io_spec import IOSpec
from nxm_export.data.examples import Examples, label_array, pad
from nxm_export.data.question_answering import Window, windows
from nxm_export.errors import DataError, RequestRefused, ServeError
from nxm_export.graph.exporter import export
from nxm_export.pipeline.engine_commands import build_engine
from tests.support import baked, exact_engine, tiny
from tools.benchmarks.servers import Running, nxm_serve

if TYPE_CHECKING:
    from nxm_export.data.tokenization import Tokenizer

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
SPANS = ("start_logits", "end_logits")
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


def frontend_of(longest: int) -> TextFrontend:
    outputs = dict.fromkeys(SPANS, ("batch", "sequence"))
    spec = IOSpec("bert", "question-answering", INPUTS, outputs, (), longest, 0, {})
    return TextFrontend(cast("Tokenizer", exact_engine.tokenizer()), spec)


@given(st.integers(1, 9), st.integers(1, 9))
@settings(deadline=None, max_examples=30)
def test_a_context_is_refused_exactly_where_it_would_take_two_windows(asked: int, told: int) -> None:
    question, context = " ".join(["film"] * asked), " ".join(["good"] * told)
    frontend = frontend_of(12)
    examples = Examples([question], [context], [()], "x")
    tensors = {"text": np.array([[question.encode()]], object), "text_pair": np.array([[context.encode()]], object)}
    try:
        count = len(windows(cast("Tokenizer", exact_engine.tokenizer()), examples, 12, INPUTS))
    except DataError:
        count = 0
    if count == 1:
        assert frontend.tokens(tensors)["input_ids"].shape == (1, asked + told + 3)
    else:
        message = "row 0 of text_pair and its question take more than 12 tokens" if count else "leave no room"
        with pytest.raises(RequestRefused, match=message):
            frontend.tokens(tensors)


def test_a_context_that_is_refused_was_not_cut_into_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a question that leaves room for one token it has thousands of them: one row of 33 kB took eight seconds
    and 2.4 GB, and one of 4 kB was cut on the event loop."""
    frontend = frontend_of(512)
    monkeypatch.setattr("engines.serving.text.windows", lambda *_: pytest.fail("it was cut"))
    tensors = {"text": np.array([[b"a " * 508]], object), "text_pair": np.array([[b"a " * 16_000]], object)}
    with pytest.raises(RequestRefused, match="take more than 512 tokens; ask about it in parts"):
        frontend.tokens(tensors)


def test_triton_is_handed_tokens_alone(engine: Path, tmp_path: Path) -> None:
    export_repository([EngineSource("qa", "1", engine)], tmp_path / "tokens", TritonOptions(threads=1))
    config = (tmp_path / "tokens" / "qa" / "config.pbtxt").read_text()
    for name in ("start_logits", "end_logits"):
        assert f'name: "{name}"' in config
    with pytest.raises(ServeError, match="gives no answers in words for question-answering on Triton"):
        export_repository([EngineSource("qa", "1", engine)], tmp_path / "text", TritonOptions(text=True, threads=1))
    assert not (tmp_path / "text").exists()
