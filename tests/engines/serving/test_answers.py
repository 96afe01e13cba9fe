"""A question and its context go in as text, and the answer comes back in words."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.base import backend
from engines.predictor import Predictor
from engines.serving import long_texts
from engines.serving.repository import EngineSource
from engines.serving.settings import TritonOptions
from engines.serving.text import TextFrontend
from engines.triton import export_repository
from nxm_export.contract.io_spec import IOSpec, load_spec
from nxm_export.contract.tasks import TASKS
from nxm_export.data import answer_spans
from nxm_export.data.answer_spans import Window, best_span
from nxm_export.data.examples import Examples
from nxm_export.data.features import label_array, pad
from nxm_export.data.metrics import scored_outputs
from nxm_export.data.predictions import Answer
from nxm_export.data.question_answering import answer_scores, windows
from nxm_export.data.tokenization import load_tokenizer
from nxm_export.errors import DataError, RequestRefused
from nxm_export.graph.exporter import export
from nxm_export.pipeline.engine_builds import build_engine
from tests.support import baked, exact_engine, tiny
from tools.benchmarks.servers import Running, nxm_serve, triton, triton_venv

Model = Callable[[Mapping[str, Any]], dict[str, np.ndarray]]
if TYPE_CHECKING:
    from nxm_export.data.tokenization import Tokenizer

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
SPANS = ("start_logits", "end_logits")
QUESTION = "which film"
CONTEXTS = ["a good film with two actor", "the Story  very dark", "superb", "a dull and very long film"]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("answers")
    graph = export(baked.write_checkpoint("bert", home / "checkpoint", task="question-answering"), home / "graph")
    build_engine(graph.path, home / "engine", "ort")
    return home / "engine"


@pytest.fixture(scope="module")
def uncertain(engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with the threshold at which it answers some questions and not others."""
    home = tmp_path_factory.mktemp("uncertain")
    with backend("ort").load(engine) as loaded:
        samples = windows(tiny.tokenizer(), questions(), tiny.POSITIONS, loaded.inputs, threshold=0.0)
        logits = scored_outputs(TASKS["question-answering"], loaded.run(pad(samples, 0)))
    found = [best_span(row, Window.unpack(label))[0] for row, label in zip(logits, label_array(samples), strict=True)]
    differences = np.sort(logits[:, 0].astype(np.float64).sum(axis=-1) - np.array(found))
    config = json.loads((engine.parent / "checkpoint" / "config.json").read_text())
    checkpoint = Path(shutil.copytree(engine.parent / "checkpoint", home / "checkpoint"))
    threshold = float(differences[len(differences) // 2 - 1 : len(differences) // 2 + 1].mean())
    (checkpoint / "config.json").write_text(json.dumps({**config, "nxm_no_answer_threshold": threshold}))
    build_engine(export(checkpoint, home / "graph").path, home / "engine", "ort")
    assert load_spec(home / "engine").no_answer_threshold == threshold
    return home / "engine"


def questions() -> Examples:
    return Examples([QUESTION] * len(CONTEXTS), CONTEXTS, [()] * len(CONTEXTS), "x")


@pytest.fixture(scope="module")
def server(engine: Path, uncertain: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    log = tmp_path_factory.mktemp("server") / "log"
    with nxm_serve(log, f"qa={engine}", f"uncertain={uncertain}", "--text") as running:
        yield running


def ask(server: Running, model: str = "qa", /, **texts: list[str]) -> dict[str, Any]:
    inputs = [
        {"name": name, "datatype": "BYTES", "shape": [len(rows), 1], "data": rows} for name, rows in texts.items()
    ]
    request = urllib.request.Request(
        f"{server.url}/v2/models/{model}_text/infer",
        json.dumps({"inputs": inputs}).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=20) as answer:
        return {output["name"]: output for output in json.load(answer)["outputs"]}


def test_the_answer_is_the_best_span_of_the_context(server: Running, engine: Path) -> None:
    """Against the engine itself on tokens made here, and all spans tried one by one."""
    answers = ask(server, text=[QUESTION] * len(CONTEXTS), text_pair=CONTEXTS)
    with backend("ort").load(engine) as loaded:
        samples = windows(tiny.tokenizer(), questions(), tiny.POSITIONS, loaded.inputs)
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


def test_predict_serve_triton_and_the_score_give_no_answer_to_the_same_questions(
    server: Running, uncertain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Predictor(uncertain) as predictor:
        predicted = predictor.predict([(QUESTION, context) for context in CONTEXTS])
    texts = [answer.text for answer in predicted if isinstance(answer, Answer)]
    assert sum(text == "" for text in texts) == len(texts) // 2
    served = ask(server, "uncertain", text=[QUESTION] * len(CONTEXTS), text_pair=CONTEXTS)
    assert served["answer"]["data"] == texts
    export_repository(
        [EngineSource("qa", "1", uncertain)], tmp_path / "repo", TritonOptions(text=True, pair=True, threads=1)
    )
    logits = {name: np.reshape(served[name]["data"], served[name]["shape"]) for name in ("start_logits", "end_logits")}
    asked = {"text": [QUESTION] * len(CONTEXTS), "text_pair": CONTEXTS}
    _, words = triton_models(tmp_path / "repo", monkeypatch)
    answered = words({**asked, **{f"engine_{name}": array for name, array in logits.items()}})
    assert [row[0].decode() for row in answered["answer"]] == texts
    # and so does the score, of gold answers that are what was answered
    golds = [((text, context.find(text)),) if text else () for text, context in zip(texts, CONTEXTS, strict=True)]
    examples = Examples(questions().texts, CONTEXTS, golds, "x")
    samples = windows(tiny.tokenizer(), examples, tiny.POSITIONS, ("input_ids",), threshold=threshold_of(uncertain))
    stacked = np.stack(list(logits.values()), axis=-1)
    np.testing.assert_array_equal(answer_scores(stacked, label_array(samples)), np.ones((len(texts), 2)))


@pytest.mark.slow
def test_the_real_triton_answers_as_nxm_serve_does(server: Running, uncertain: Path, tmp_path: Path) -> None:
    client_http = pytest.importorskip("tritonclient.http")
    venv = triton_venv()
    if isinstance(venv, str):
        pytest.skip(venv)
    asked = {"text": [QUESTION] * len(CONTEXTS), "text_pair": CONTEXTS}
    export_repository(
        [EngineSource("qa", "1", uncertain)], tmp_path / "repo", TritonOptions(text=True, pair=True, threads=1)
    )
    inputs = []
    for name, texts in asked.items():
        inputs.append(client_http.InferInput(name, [len(texts), 1], "BYTES"))
        inputs[-1].set_data_from_numpy(np.array([[text.encode()] for text in texts], object))
    with (
        triton(tmp_path / "repo", tmp_path / "log", venv) as running,
        client_http.InferenceServerClient(running.address) as client,
    ):
        given = client.infer("qa_text", inputs)
        alone = client.infer("qa_text", inputs, outputs=[client_http.InferRequestedOutput("answer")])
    served = ask(server, "uncertain", **asked)
    for name in ("start_logits", "end_logits"):
        expected = np.reshape(served[name]["data"], served[name]["shape"])
        np.testing.assert_allclose(given.as_numpy(name)[:, : expected.shape[1]], expected, atol=1e-5)
    for answered in (given, alone):
        assert [row[0].decode() for row in answered.as_numpy("answer")] == served["answer"]["data"]


def threshold_of(engine: Path) -> float | None:
    return load_spec(engine).no_answer_threshold


def triton_models(repository: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Model, Model]:
    """(the tokenizer, the last step) of a repository's text ensemble, run here instead of in Triton's Python
    backend."""
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", TritonBackend)
    monkeypatch.setitem(sys.modules, "answer_spans", answer_spans)
    monkeypatch.setitem(sys.modules, "long_texts", long_texts)

    def model(name: str) -> Model:
        directory = repository / name
        for module in (answer_spans, long_texts):
            copied = directory / "1" / Path(str(module.__file__)).name
            assert not copied.is_file() or copied.read_bytes() == Path(str(module.__file__)).read_bytes()
        spec = importlib.util.spec_from_file_location(name, directory / "1" / "model.py")
        assert spec is not None
        assert spec.loader is not None
        code = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(code)
        made = code.TritonPythonModel()
        made.initialize({"model_repository": str(directory), "model_version": "1"})

        def run(tensors: Mapping[str, Any]) -> dict[str, np.ndarray]:
            arrays = {
                key: np.array([[text.encode()] for text in value], object) if isinstance(value, list) else value
                for key, value in tensors.items()
            }
            (response,) = made.execute([arrays])
            if response.error is not None:
                raise ValueError(str(response.error))
            return {tensor.name: tensor.array for tensor in response.tensors}

        return run

    return model("qa_tokenizer"), model("qa_answers")


class TritonBackend:
    """What is used of ``triton_python_backend_utils``."""

    class TritonError(ValueError):
        """What a request is refused with: by the code of what the client got wrong alone."""

        INVALID_ARG = 400

        def __init__(self, message: str, code: int) -> None:
            super().__init__(message)
            assert code == self.INVALID_ARG

    class Tensor:
        """A named array."""

        def __init__(self, name: str, array: np.ndarray) -> None:
            self.name, self.array = name, array

        def as_numpy(self) -> np.ndarray:
            return self.array

    class InferenceResponse:
        """Tensors, or an error."""

        def __init__(self, tensors: list[TritonBackend.Tensor], error: Exception | None = None) -> None:
            self.tensors, self.error = tensors, error

    @classmethod
    def get_input_tensor_by_name(cls, request: Mapping[str, np.ndarray], name: str) -> Tensor | None:
        return cls.Tensor(name, request[name]) if name in request else None


def test_triton_makes_the_tokens_of_nxm_serve_and_refuses_what_it_refuses(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_repository([EngineSource("qa", "1", engine)], tmp_path / "repo", TritonOptions(text=True, pair=True))
    tokens, _ = triton_models(tmp_path / "repo", monkeypatch)
    frontend = TextFrontend(load_tokenizer(engine), load_spec(engine))
    asked = {"text": [QUESTION] * len(CONTEXTS), "text_pair": CONTEXTS}
    given = {name: np.array([[text.encode()] for text in texts], object) for name, texts in asked.items()}
    made = tokens(asked)
    for name, array in frontend.tokens(given).items():
        np.testing.assert_array_equal(made[name][:, : array.shape[1]], array)
        assert not made[name][:, array.shape[1] :].any(), "padding"
    for question, context, message in (
        (
            QUESTION,
            "film " * 100,
            "row 0 of text_pair and its question take more than 48 tokens; ask",
        ),
        ("film " * 60, "film", "leave no room for context in 48"),
        (QUESTION, " ", "its context has no tokens"),
        (QUESTION, "", "its context has no tokens"),
        (QUESTION, "film " * 3000, "row 0 of text_pair has 15000 bytes; at most 3072 are served"),
    ):
        row = {"text": [question], "text_pair": [context]}
        with pytest.raises(ValueError, match=message):
            tokens(row)
        arrays = {name: np.array([[text.encode()] for text in texts], object) for name, texts in row.items()}
        with pytest.raises(RequestRefused, match=message):
            frontend.tokens(arrays)


def test_triton_is_handed_tokens_alone_or_with_the_answers(engine: Path, tmp_path: Path) -> None:
    export_repository([EngineSource("qa", "1", engine)], tmp_path / "tokens", TritonOptions(threads=1))
    config = (tmp_path / "tokens" / "qa" / "config.pbtxt").read_text()
    for name in ("start_logits", "end_logits"):
        assert f'name: "{name}"' in config
    export_repository([EngineSource("qa", "1", engine)], tmp_path / "text", TritonOptions(text=True))
    models = {path.name for path in (tmp_path / "text").iterdir() if path.is_dir()}
    assert models == {"qa", "qa_tokenizer", "qa_answers", "qa_text"}
    ensemble = (tmp_path / "text" / "qa_text" / "config.pbtxt").read_text()
    assert [ensemble.count(f'name: "{name}"') for name in ("start_logits", "end_logits", "answer")] == [1, 1, 1]
    assert '"text_pair"' in ensemble
    assert "optional" not in ensemble


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
