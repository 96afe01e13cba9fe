"""One contract, the real client, two servers: what works with `nxm serve` works with Triton, with the same answers.

Triton here is the real server (its core, HTTP and gRPC front ends, batcher and ensemble) on the repository that
`nxm triton` wrote; the backend that computes is a double on ONNX Runtime (`tools/benchmarks/triton_doubles`).
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from nxm_export.storage.json_files import as_object
from tests.support.exact_engine import LABELS, MAX_LENGTH, VOCABULARY, expected, feeds_of, tokenizer
from tests.support.serving_calls import eventually
from tools.benchmarks.servers import Running, triton_venv
from tools.raw_http import Answer, send

client_http = pytest.importorskip("tritonclient.http", reason="tritonclient is not installed; pip install -e '.[dev]'")
errors = pytest.importorskip("tritonclient.utils")

SERVERS = (
    pytest.param("ours", id="nxm-serve"),
    pytest.param("real_triton", id="triton-core-with-backend-double", marks=pytest.mark.slow),
)


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest) -> Running:
    running = request.getfixturevalue(request.param)
    assert isinstance(running, Running)
    return running


@pytest.fixture
def client(server: Running) -> Iterator[Any]:
    with client_http.InferenceServerClient(server.address, concurrency=8) as made:
        yield made


def token_inputs(feeds: Mapping[str, np.ndarray], *, binary: bool = True) -> list[Any]:
    inputs = []
    for name, array in feeds.items():
        inputs.append(client_http.InferInput(name, array.shape, "INT64"))
        inputs[-1].set_data_from_numpy(array, binary_data=binary)
    return inputs


def text_input(texts: list[str], *, binary: bool = True, name: str = "text") -> list[Any]:
    array = np.array([[text.encode()] for text in texts], object)
    made = client_http.InferInput(name, array.shape, "BYTES")
    made.set_data_from_numpy(array, binary_data=binary)
    return [made]


def outputs(*names: str, binary: bool = True) -> list[Any]:
    return [client_http.InferRequestedOutput(name, binary_data=binary) for name in names]


def logits_of(texts: list[str] | list[tuple[str, str]]) -> np.ndarray:
    """By the tokenizer and the formula, padded to the longest."""
    encoded = tokenizer().encode_batch(texts)
    feeds = {
        name: np.zeros((len(texts), max(len(e.ids) for e in encoded)), np.int64)
        for name in ("input_ids", "attention_mask", "token_type_ids")
    }
    for row, encoding in enumerate(encoded):
        feeds["input_ids"][row, : len(encoding.ids)] = encoding.ids
        feeds["attention_mask"][row, : len(encoding.ids)] = 1
        feeds["token_type_ids"][row, : len(encoding.ids)] = encoding.type_ids
    return expected(feeds)


def test_server_and_models_are_live_and_ready(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("exact")
    assert client.is_model_ready("exact", "1")
    assert client.is_model_ready("exact_text")
    assert not client.is_model_ready("nobody")


def test_server_metadata_names_the_extensions_that_clients_rely_on(client: Any) -> None:
    metadata = client.get_server_metadata()
    assert {"binary_tensor_data", "model_repository", "schedule_policy"} <= set(metadata["extensions"])


@pytest.mark.parametrize("version", ["", "1"])
def test_model_metadata_has_the_engines_names_types_and_shapes(client: Any, version: str) -> None:
    metadata = client.get_model_metadata("exact", version)
    assert (metadata["name"], metadata["versions"], metadata["platform"]) == ("exact", ["1"], "onnxruntime_onnx")
    names = ("input_ids", "attention_mask", "token_type_ids")
    assert metadata["inputs"] == [{"name": name, "datatype": "INT64", "shape": [-1, -1]} for name in names]
    assert metadata["outputs"] == [{"name": "logits", "datatype": "FP32", "shape": [-1, 2]}]


def test_the_text_face_takes_bytes_and_names_classes(client: Any) -> None:
    metadata = client.get_model_metadata("exact_text")
    assert {"name": "text", "datatype": "BYTES", "shape": [-1, 1]} in metadata["inputs"]
    assert {"name": "label", "datatype": "BYTES", "shape": [-1, 1]} in metadata["outputs"]


def test_the_repository_index_lists_the_models_as_ready(client: Any) -> None:
    index = {entry["name"]: entry for entry in client.get_model_repository_index()}
    for name in ("exact", "exact_text"):
        assert (index[name]["version"], index[name]["state"]) == ("1", "READY")


@pytest.mark.parametrize("binary_out", [True, False], ids=["binary-out", "json-out"])
@pytest.mark.parametrize("binary_in", [True, False], ids=["binary-in", "json-in"])
def test_logits_are_exact_in_both_encodings(client: Any, binary_in: bool, binary_out: bool) -> None:
    for seed, lengths in enumerate(([1], [5, 9, 2], [MAX_LENGTH], [7] * 32)):
        feeds = feeds_of(lengths, seed)
        result = client.infer(
            "exact", token_inputs(feeds, binary=binary_in), outputs=outputs("logits", binary=binary_out)
        )
        np.testing.assert_array_equal(result.as_numpy("logits"), expected(feeds))


def test_all_outputs_come_when_none_is_named(client: Any) -> None:
    feeds = feeds_of([4])
    np.testing.assert_array_equal(client.infer("exact", token_inputs(feeds)).as_numpy("logits"), expected(feeds))


def test_an_answer_names_model_version_and_request(client: Any) -> None:
    answer = client.infer("exact", token_inputs(feeds_of([4])), model_version="1", request_id="r-17").get_response()
    assert (answer["model_name"], answer["model_version"], answer["id"]) == ("exact", "1", "r-17")


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])
def test_texts_are_tokenized_and_classes_named(client: Any, binary: bool) -> None:
    texts = ["good film", "a very bad plot", "not good", "Größe 電影 🎬", ""]
    expected_logits = logits_of(texts)
    result = client.infer(
        "exact_text", text_input(texts, binary=binary), outputs=outputs("logits", "label", binary=binary)
    )
    np.testing.assert_array_equal(result.as_numpy("logits"), expected_logits)
    names = [item.decode() if isinstance(item, bytes) else item for item in result.as_numpy("label").ravel()]
    assert names == [LABELS[i] for i in expected_logits.argmax(-1)]


def test_a_text_that_is_too_long_is_cut_as_in_training(client: Any) -> None:
    long, cut = "good " * 60, "good " * (MAX_LENGTH - 2)
    result = client.infer("exact_text", text_input([long]))
    np.testing.assert_array_equal(result.as_numpy("logits"), logits_of([cut]))


@pytest.mark.parametrize("words", [1_000, 100_000])
def test_a_text_of_any_length_is_cut_as_in_training(client: Any, words: int) -> None:
    cut = " ".join((["good", "film", "not"] * 20)[: MAX_LENGTH - 2])
    result = client.infer("exact_text", text_input(["good film not " * words, "bad"]))
    np.testing.assert_array_equal(result.as_numpy("logits"), logits_of([cut, "bad"]))


def test_a_second_text_may_be_there_or_not(client: Any) -> None:
    first, second = ["good film", "a"], ["a very bad plot", "not good"]
    together = text_input(first) + text_input(second, name="text_pair")
    for inputs, texts in ((together, list(zip(first, second, strict=True))), (text_input(first), first)):
        result = client.infer("exact_text", inputs)
        np.testing.assert_array_equal(result.as_numpy("logits"), logits_of(texts))


def test_both_texts_of_any_length_are_cut_as_in_training(client: Any) -> None:
    """The longer one loses tokens first; of 45 for both, 23 go to the longer."""
    good, bad = [VOCABULARY.index(word) for word in ("good", "bad")]
    for sizes, kept in (
        ((5_000, 1), (44, 1)), ((3, 5_000), (3, 42)), ((9_000, 5_000), (23, 22)), ((5_000, 9_000), (22, 23)),
        ((30, 31), (22, 23)), ((31, 30), (23, 22)), ((30, 30), (22, 23)), ((20, 25), (20, 25)),
    ):  # fmt: skip
        ids = [2, *[good] * kept[0], 3, *[bad] * kept[1], 3]
        types = [0] * (kept[0] + 2) + [1] * (kept[1] + 1)
        feeds = {"input_ids": ids, "attention_mask": [1] * len(ids), "token_type_ids": types}
        pair = text_input(["good " * sizes[0]]) + text_input(["bad " * sizes[1]], name="text_pair")
        expected_logits = expected({name: np.array([values]) for name, values in feeds.items()})
        actual = client.infer("exact_text", pair).as_numpy("logits")
        np.testing.assert_array_equal(actual, expected_logits, str(sizes))


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])
def test_outputs_come_in_one_order_whatever_was_asked(client: Any, binary: bool) -> None:
    for names in (["label", "logits"], ["logits", "label"]):
        result = client.infer("exact_text", text_input(["good"]), outputs=outputs(*names, binary=binary))
        assert [output["name"] for output in result.get_response()["outputs"]] == ["label", "logits"]
    result = client.infer("exact_text", text_input(["good"]))
    assert [output["name"] for output in result.get_response()["outputs"]] == ["label", "logits"]


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_compressed_requests_are_taken(client: Any, coding: str) -> None:
    feeds = feeds_of([4, 9])
    result = client.infer("exact", token_inputs(feeds), request_compression_algorithm=coding)
    np.testing.assert_array_equal(result.as_numpy("logits"), expected(feeds))


@pytest.mark.parametrize("classes", [1, 2, 9])
def test_the_largest_values_can_be_asked_for(client: Any, classes: int) -> None:
    feeds = feeds_of([4, 9, 2])
    wanted = [client_http.InferRequestedOutput("logits", class_count=classes)]
    answered = client.infer("exact", token_inputs(feeds), outputs=wanted).as_numpy("logits").tolist()
    rows = [sorted(enumerate(row), key=lambda entry: -entry[1])[:classes] for row in expected(feeds).tolist()]
    assert answered == [[f"{value:f}:{index}".encode() for index, value in row] for row in rows]


@pytest.mark.parametrize("text", ["good", "good " * 2000], ids=["short", "long"])
def test_a_second_text_that_is_empty_is_none(client: Any, text: str) -> None:
    alone = client.infer("exact_text", text_input([text])).as_numpy("logits")
    with_nothing = text_input([text]) + text_input([""], name="text_pair")
    np.testing.assert_array_equal(client.infer("exact_text", with_nothing).as_numpy("logits"), alone)


def test_configuration_and_statistics_are_those_of_the_model(client: Any) -> None:
    config = client.get_model_config("exact")
    assert (config["name"], config["max_batch_size"], config["backend"]) == ("exact", 32, "onnxruntime")
    assert [(one["name"], one["data_type"], one["dims"]) for one in config["output"]] == [("logits", "TYPE_FP32", [2])]

    def count() -> tuple[int, int]:
        (stats,) = client.get_inference_statistics("exact")["model_stats"]
        assert stats["inference_stats"]["success"]["ns"] >= stats["inference_stats"]["compute_infer"]["ns"] > 0
        return stats["inference_count"], stats["execution_count"]

    client.infer("exact", token_inputs(feeds_of([4])))
    time.sleep(0.5)  # Triton counts a request when its answer is gone; the one before may be under way, too
    rows, runs = count()
    client.infer("exact", token_inputs(feeds_of([4, 5, 6])))
    assert eventually(lambda: count() == (rows + 3, runs + 1)), (count(), rows, runs)


def test_one_output_can_be_asked_for(client: Any) -> None:
    result = client.infer("exact_text", text_input(["good"]), outputs=outputs("label"))
    assert [output["name"] for output in result.get_response()["outputs"]] == ["label"]


def wrong_requests() -> Iterator[tuple[str, Any]]:
    good = feeds_of([4, 3])
    yield "missing-input", token_inputs({k: v for k, v in good.items() if k != "attention_mask"})
    yield "unknown-input", token_inputs({**good, "position_ids": good["input_ids"]})
    yield "wrong-name", token_inputs({("ids" if k == "input_ids" else k): v for k, v in good.items()})
    yield "wrong-rank", token_inputs({k: v.ravel() for k, v in good.items()})
    yield "too-many-rows", token_inputs(feeds_of([3] * 33))
    wrong_type = token_inputs(good)
    wrong_type[0] = client_http.InferInput("input_ids", [2, 4], "FP32")
    wrong_type[0].set_data_from_numpy(good["input_ids"].astype(np.float32))
    yield "wrong-type", wrong_type
    yield "rows-differ", token_inputs({**good, "attention_mask": good["attention_mask"][:1]})


@pytest.mark.parametrize(("case", "inputs"), list(wrong_requests()), ids=[case for case, _ in wrong_requests()])
def test_what_the_model_does_not_take_is_refused_with_400_and_a_reason(
    client: Any, case: str, inputs: list[Any]
) -> None:
    with pytest.raises(errors.InferenceServerException) as refused:
        client.infer("exact", inputs)
    assert refused.value.status() == "400"
    assert len(refused.value.message()) > 20
    test_all_outputs_come_when_none_is_named(client)


def test_a_text_that_cannot_be_read_is_refused_with_400(client: Any) -> None:
    inputs = [client_http.InferInput("text", [1, 1], "BYTES")]
    inputs[0].set_data_from_numpy(np.array([[b"a \xff film"]], object))
    with pytest.raises(errors.InferenceServerException, match=r"row 0 of text is not UTF-8 \(byte 2\)") as refused:
        client.infer("exact_text", inputs)
    assert refused.value.status() == "400"


def test_an_unknown_output_is_refused_with_400(client: Any) -> None:
    with pytest.raises(errors.InferenceServerException) as refused:
        client.infer("exact", token_inputs(feeds_of([4])), outputs=outputs("pooled"))
    assert refused.value.status() == "400"


@pytest.mark.parametrize(("model", "version"), [("nobody", ""), ("exact", "7")])
def test_an_unknown_model_or_version_is_404(client: Any, model: str, version: str) -> None:
    with pytest.raises(errors.InferenceServerException) as refused:
        client.infer(model, token_inputs(feeds_of([4])), model_version=version)
    assert refused.value.status() == "404"


def post(server: Running, body: bytes, *headers: str) -> Answer:
    return send(server.port, "POST", "/v2/models/exact/infer", body, *headers)


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (b"", ()),
        (b"{", ()),
        (b"[]", ()),
        (b'{"inputs": 3}', ()),
        (b"{}", ("Inference-Header-Content-Length: 999",)),
        (b"{}", ("Inference-Header-Content-Length: x",)),
        (
            json.dumps({"inputs": [{"name": "input_ids", "datatype": "INT64", "shape": [1, 2], "data": [1]}]}).encode(),
            (),
        ),
    ],
)
def test_a_malformed_body_is_an_error_in_json(server: Running, body: bytes, headers: tuple[str, ...]) -> None:
    answer = post(server, body, *headers)
    triton = server.grpc_port is not None
    assert answer.status == 400 or (
        triton and answer.status == 500
    )  # Triton's parser calls some of these its own fault
    assert set(as_object(answer.json())) == {"error"}


def test_many_clients_at_once_get_each_their_own_answer(server: Running) -> None:
    def ask(seed: int) -> bool:
        with client_http.InferenceServerClient(server.address) as made:
            for step in range(6):
                feeds = feeds_of([1 + (seed * 11 + step * 5) % MAX_LENGTH], seed * 100 + step)
                actual = made.infer("exact", token_inputs(feeds)).as_numpy("logits")
                if not np.array_equal(actual, expected(feeds)):
                    return False
        return True

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(ask, range(16)))


@pytest.mark.slow
def test_both_servers_give_equal_logits_and_labels_on_random_sentences(ours: Running, real_triton: Running) -> None:
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(VOCABULARY[4:], size)) for size in random.integers(1, 60, 100)]
    answers = []
    for running in (ours, real_triton):
        with client_http.InferenceServerClient(running.address) as made:
            results = [made.infer("exact_text", text_input([text])) for text in texts]
        answers.append([(r.as_numpy("logits").tolist(), r.as_numpy("label").tolist()) for r in results])
    assert answers[0] == answers[1]


_GRPC = """
import json, sys
import numpy as np
import tritonclient.grpc as grpc
feeds = {name: np.array(values, np.int64) for name, values in json.loads(sys.argv[2]).items()}
inputs = []
for name, array in feeds.items():
    inputs.append(grpc.InferInput(name, array.shape, "INT64"))
    inputs[-1].set_data_from_numpy(array)
client = grpc.InferenceServerClient(sys.argv[1])
print(json.dumps(client.infer("exact", inputs).as_numpy("logits").tolist()))
"""


@pytest.mark.slow
def test_triton_answers_grpc_with_the_same_logits(real_triton: Running) -> None:
    """`nxm serve` has no gRPC; who needs it moves to Triton. The client is the venv's: it pins an older protobuf."""
    venv = triton_venv()
    feeds = feeds_of([5, 9])
    child = subprocess.run(
        [
            f"{venv}/bin/python",
            "-c",
            _GRPC,
            f"127.0.0.1:{real_triton.grpc_port}",
            json.dumps({k: v.tolist() for k, v in feeds.items()}),
        ],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": ""},
    )
    assert child.returncode == 0, child.stderr
    np.testing.assert_array_equal(json.loads(child.stdout), expected(feeds))
