"""Ordinary clients and their odd ways, on raw bytes and, where they are installed, with the clients themselves."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import threading
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import pytest

from engines.serving import long_texts
from engines.serving.text import TextFrontend
from nxm_export.contract.io_spec import load_spec
from nxm_export.errors import ServeError
from nxm_export.storage.json_files import as_object, entry_at
from tests.support import exact_engine
from tests.support.exact_engine import LABELS, MAX_LENGTH, expected, feeds_of
from tests.support.serving_calls import INFER, body_of, eventually, log_lines, logits, metric
from tools import ROOT
from tools.benchmarks.servers import Running, nxm_serve
from tools.raw_http import Answer, connect, read, request, send

if TYPE_CHECKING:
    from nxm_export.data.tokenization import Tokenizer

TEXT = "/v2/models/exact_text/infer"
KSERVE_CLIENT = ROOT / "tools" / "experiments" / "serving_peers" / "kserve_client.py"
ONE_TEXT = {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1, 1], "data": ["a good film"]}]}
H2C = (
    "Connection: Upgrade, HTTP2-Settings",
    "Upgrade: h2c",
    "HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA",
)
JAVA = """
import java.net.URI; import java.net.http.*;
public class Client {
  public static void main(String[] arguments) throws Exception {
    HttpClient[] clients = {
      HttpClient.newHttpClient(), HttpClient.newBuilder().version(HttpClient.Version.HTTP_1_1).build()
    };
    for (HttpClient client : clients) {
      HttpRequest request = HttpRequest.newBuilder(URI.create(arguments[0]))
        .POST(HttpRequest.BodyPublishers.ofString(arguments[1])).build();
      HttpResponse<String> response = client.send(request, HttpResponse.BodyHandlers.ofString());
      System.out.println(response.statusCode() + " " + response.body());
    }
  }
}
"""


def error_of(answer: Answer) -> str:
    return str(entry_at(answer.json(), "error"))


def read_all(connection: socket.socket, count: int) -> list[Answer]:
    """So many answers on one connection, each by its Content-Length."""
    reader, answers = connection.makefile("rb"), []
    for _ in range(count):
        status = int(reader.readline().split()[1])
        headers = dict(line.decode().lower().rstrip().split(": ", 1) for line in iter(reader.readline, b"\r\n"))
        answers.append(Answer(status, headers, reader.read(int(headers["content-length"]))))
    return answers


def test_an_upgrade_is_ignored_and_the_body_kept_however_it_is_split(ours: Running) -> None:
    feeds = feeds_of([6])
    message = request("POST", INFER, body_of(feeds), *H2C)
    head = message.index(b"\r\n\r\n") + 4
    for cuts in ([], [head], [head - 2], [head + 1], [5, head - 1, head, head + 9], list(range(0, len(message), 50))):
        with connect(ours.port) as connection:
            for start, end in zip([0, *cuts], [*cuts, len(message)], strict=True):
                connection.sendall(message[start:end])
                time.sleep(0.002)
            np.testing.assert_array_equal(logits(read(connection)), expected(feeds))
            connection.sendall(request("GET", "/v2/health/live"))
            assert read(connection).status == 200  # the connection goes on in HTTP/1.1


@pytest.mark.slow
def test_javas_default_client_gets_its_answer(ours: Running, tmp_path: Path) -> None:
    if shutil.which("java") is None:
        pytest.skip("no java here; the bytes that its client sends are tested above")
    (tmp_path / "Client.java").write_text(JAVA)
    command = ["java", str(tmp_path / "Client.java"), f"{ours.url}{TEXT}", json.dumps(ONE_TEXT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    if "Error: Could not find or load main class" in done.stderr or "no compiler" in done.stderr:
        pytest.skip(f"this java runs no source file: {done.stderr}")
    assert [line[:4] for line in done.stdout.splitlines()] == ["200 ", "200 "], done.stderr


@pytest.mark.slow
def test_curl_gets_its_answer_with_http2_asked_for(ours: Running) -> None:
    if shutil.which("curl") is None:
        pytest.skip("no curl here; the bytes that it sends are tested above")
    command = ["curl", "-sS", "--http2", "-d", json.dumps(ONE_TEXT), f"{ours.url}{TEXT}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert json.loads(done.stdout)["outputs"][0]["name"] == "label", done.stderr


@pytest.mark.slow
def test_kserves_client_gets_its_answers(ours: Running, engine: Path) -> None:
    """``python -m venv DIR; DIR/bin/pip install kserve``, which wants other versions than this project; 0.21.0 was
    tried."""
    venv = os.environ.get("NXM_KSERVE_VENV")
    if not venv:
        pytest.skip("no KServe SDK here: point NXM_KSERVE_VENV at a virtual environment with kserve in it")
    feeds = feeds_of([5, 3])
    model = {"name": "exact", "feeds": {k: v.tolist() for k, v in feeds.items()}, "texts": ["good", "bad"]}
    command = [f"{venv}/bin/python", str(KSERVE_CLIENT), ours.url, json.dumps(model)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert [found.pop(key) for key in ("live", "ready", "model ready", "nobody ready")] == [True, True, True, False]
    assert "no model is called 'nobody'; this server has exact, exact_text, '404 Not Found'" in found.pop("error")
    words = {"text": np.array([[b"good"], [b"bad"]], object)}
    tokens = TextFrontend(cast("Tokenizer", exact_engine.tokenizer()), load_spec(engine)).tokens(words)
    assert len(found) == 8
    for way, value in found.items():
        if way.startswith("labels"):
            assert value == [LABELS[i] for i in expected(tokens).argmax(axis=1)], way
        else:
            np.testing.assert_array_equal(value, expected(feeds), err_msg=way)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["exact", "exact_text"])
def test_perf_analyzer_measures_to_its_end(ours: Running, name: str, tmp_path: Path) -> None:
    """The program of ``pip install tritonclient==2.41.1`` (the last ones have none), with libb64 and CUDA's runtime
    beside it, was tried."""
    program = os.environ.get("NXM_PERF_ANALYZER")
    if not program:
        pytest.skip("no perf_analyzer here: let NXM_PERF_ANALYZER be its path")
    (tmp_path / "texts.json").write_text(json.dumps({"data": [{"text": ["good"], "text_pair": ["bad plot"]}] * 2}))
    shapes = [f"--shape={tensor}:8" for tensor in ("input_ids", "attention_mask", "token_type_ids")]
    more = ["-b", "2", "--input-data=zero", *shapes] if name == "exact" else [f"--input-data={tmp_path / 'texts.json'}"]
    measure = ["-r", "3", "-s", "9999", "--measurement-interval=500", "--concurrency-range=2"]
    command = [program, "-m", name, "-u", ours.address, "-i", "http", *measure, *more]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Concurrency: 2, throughput: " in done.stdout


@pytest.mark.parametrize("size", [10, 60_000])
@pytest.mark.parametrize(
    ("behind", "status"),
    [
        (b"GARBAGE\r\n\r\n", 400),
        (b"\x16\x03\x01\x02", 400),
        (b"GET /v2 HTTP/1.1\r\nX: " + b"a" * 40_000, 431),
        (b"POST /v2/models/exact/infer HTTP/1.1\r\nContent-Length: x\r\n\r\n", 400),
    ],
)
def test_what_follows_a_good_request_never_costs_its_answer(
    ours: Running, size: int, behind: bytes, status: int
) -> None:
    feeds = feeds_of([6])
    body = json.dumps({**json.loads(body_of(feeds)), "filling": "x" * size}).encode()
    with connect(ours.port) as connection:
        connection.sendall(request("POST", INFER, body) * 2 + behind)
        first, second, last = read_all(connection, 3)
        for answer in (first, second):
            np.testing.assert_array_equal(logits(answer), expected(feeds))
        assert (last.status, last.headers["connection"], set(as_object(last.json()))) == (status, "close", {"error"})
        assert connection.recv(1) == b""


def test_a_second_request_in_parts_is_no_larger_for_the_first_ones_body(ours: Running) -> None:
    for size in (1_000, 20_000, 33_000, 60_000):
        first = request("POST", TEXT, json.dumps({**ONE_TEXT, "filling": "y" * size}).encode())
        second = request("POST", TEXT, json.dumps(ONE_TEXT).encode())
        with connect(ours.port) as connection:
            connection.sendall(first + second[:20])
            time.sleep(0.05)
            connection.sendall(second[20:])
            assert [answer.status for answer in read_all(connection, 2)] == [200, 200]


def test_the_limit_of_a_head_is_the_same_in_one_part_and_in_many(ours: Running) -> None:
    frame = len(request("GET", "/v2/health/live", b"", "X: "))
    for size, status in ((32 << 10, 200), ((32 << 10) + 1, 431)):
        message = request("GET", "/v2/health/live", b"", "X: " + "a" * (size - frame))
        assert len(message) == size
        for part in (size, 10_000, 999):
            with connect(ours.port) as connection:
                for start in range(0, size, part):
                    connection.sendall(message[start : start + part])
                    time.sleep(0.001)
                assert read(connection).status == status


def test_a_request_with_more_rows_or_tokens_than_are_served_is_refused_at_once(ours: Running) -> None:
    rows = 1_350_000
    texts = '{"inputs":[{"name":"text","datatype":"BYTES","shape":[%d,1],"data":[%s""]}]}'
    began = time.monotonic()
    answer = send(ours.port, "POST", TEXT, (texts % (rows, '"",' * (rows - 1))).encode())
    assert (answer.status, "1350000 rows" in error_of(answer)) == (400, True)
    assert time.monotonic() - began < 8  # a quarter of a second where nothing else runs
    tokens = {"name": "input_ids", "datatype": "INT64", "shape": [1, MAX_LENGTH + 1], "data": "no matter"}
    answer = send(ours.port, "POST", INFER, json.dumps({"inputs": [tokens]}).encode())
    assert "longer than the 48" in error_of(answer)


def test_probes_are_answered_while_a_million_texts_are_refused(ours: Running) -> None:
    rows, waits = 1_350_000, list[float]()
    texts = {"name": "text", "datatype": "BYTES", "shape": [rows, 1], "data": [""] * rows}
    body = json.dumps({"inputs": [texts]}, separators=(",", ":")).encode()
    with ThreadPoolExecutor() as threads:
        refused = threads.submit(send, ours.port, "POST", TEXT, body)
        while not waits or not refused.done():
            began = time.monotonic()
            assert send(ours.port, "GET", "/v2/health/live").status == 200
            waits.append(time.monotonic() - began)
    assert refused.result().status == 400
    assert max(waits) < 1  # in fact some milliseconds


def test_a_large_body_where_hardly_one_belongs_is_refused_unread(ours: Running) -> None:
    """It was parsed on the event loop: 4 MB of small objects held everybody up for a second, and four for two."""
    refused = send(ours.port, "POST", "/v2/repository/index", b'{"ready":true,"x":[' + b"{}," * (1 << 20))
    assert refused.status == 400
    assert "must be empty or a JSON object" in error_of(refused)  # not that it is no JSON


def test_a_small_text_does_not_wait_for_a_large_one(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It waited on the event loop, and everybody with it: a probe for 1.5 s behind 4 MB of pairs."""
    frontend = TextFrontend(cast("Tokenizer", exact_engine.tokenizer()), load_spec(engine))
    began, go_on, encode_long = threading.Event(), threading.Event(), long_texts.encode_long

    def slowly(tokenizer: Tokenizer, texts: Sequence[str], max_length: int) -> long_texts.Tokens:
        began.set()
        assert go_on.wait(60)
        return encode_long(tokenizer, texts, max_length)

    monkeypatch.setattr("engines.serving.text.encode_long", slowly)
    with ThreadPoolExecutor() as threads:
        large = threads.submit(frontend.tokens, {"text": np.array([[b"good " * 2_000]], object)})
        assert began.wait(60)
        small = threads.submit(frontend.tokens, {"text": np.array([[b"good"]], object)})
        try:
            assert small.result(30)["input_ids"].shape == (1, 3)
        finally:
            go_on.set()
        assert large.result(30)["input_ids"].shape == (1, MAX_LENGTH)


@pytest.mark.parametrize("text", [b"good", b"good " * 2_000], ids=["short", "long"])
def test_a_second_text_that_is_empty_is_none(engine: Path, text: bytes) -> None:
    frontend = TextFrontend(cast("Tokenizer", exact_engine.tokenizer()), load_spec(engine))
    alone = frontend.tokens({"text": np.array([[text]], object)})
    beside_nothing = frontend.tokens({"text": np.array([[text]], object), "text_pair": np.array([[b""]], object)})
    for name in alone:
        np.testing.assert_array_equal(beside_nothing[name], alone[name])


def test_a_text_that_is_cut_leaves_no_note(engine: Path) -> None:
    """The log is lines of JSON, and a client is not to fill it."""
    frontend = TextFrontend(cast("Tokenizer", exact_engine.tokenizer()), load_spec(engine))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokens = frontend.tokens({"text": np.array([[b"good " * (MAX_LENGTH + 2)]], object)})
    assert tokens["input_ids"].shape == (1, MAX_LENGTH)


def test_control_characters_reach_no_log(ours: Running) -> None:
    for odd in ("%1b%5b31m", "%c2%9b31m", "%7f", "%e2%80%ae", "%00"):
        assert send(ours.port, "POST", f"/v2/models/{odd}/infer", b"{}").status == 404
    body = {"inputs": [{"name": "\x1b[2J\x9b\u202e", "datatype": "INT64"}]}
    answer = send(ours.port, "POST", INFER, json.dumps(body).encode())
    assert (answer.status, error_of(answer).isascii()) == (400, True)
    assert eventually(lambda: any("\\x1b[2J" in str(line.get("reason")) for line in log_lines(ours)))
    text = ours.log.read_bytes()
    assert b"31m" in text  # it is there, for whoever reads JSON
    assert all(byte == 10 or 32 <= byte < 127 for byte in text)


class Panic(BaseException):
    """As pyo3's PanicException: no `Exception`, so that ordinary handlers miss it."""


def test_a_panic_of_the_tokenizer_is_a_failure_like_any_other(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = exact_engine.tokenizer()
    frontend = TextFrontend(cast("Tokenizer", tokenizer), load_spec(engine))

    def panics(*_: object, **__: object) -> None:
        raise Panic("byte index 1 is not a char boundary")

    for text, function in ((b"good", "encode"), (b"good " * 2_000, "encode_long")):
        with monkeypatch.context() as patch:
            patch.setattr(f"engines.serving.text.{function}", panics)
            with pytest.raises(ServeError, match=r"the tokenizer failed \(Panic: byte index 1"):
                frontend.tokens({"text": np.array([[text]], object)})
        assert frontend.tokens({"text": np.array([[text]], object)})["input_ids"].size  # and goes on


@pytest.fixture
def failing(engine: Path, tmp_path: Path) -> Path:
    """An engine directory whose tokenizer fails for words that it does not know."""
    copy = Path(shutil.copytree(engine, tmp_path / "failing"))
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    tokenizer["model"]["unk_token"] = "[MISSING]"
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    exact_engine.cover(copy)
    return copy


def test_a_failure_of_the_tokenizer_is_an_error_in_json_and_the_server_goes_on(failing: Path, tmp_path: Path) -> None:
    with nxm_serve(tmp_path / "log", f"exact={failing}", "--text", "--parity", "off") as server:
        for text, status in (("unknown", 500), ("unknown " * 2_000, 500), ("good", 200), ("good " * 2_000, 200)):
            body = json.dumps(
                {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": [text]}]}
            ).encode()
            answer = send(server.port, "POST", TEXT, body, "X-Request-Id: it-fails")
            assert answer.status == status
            if status == 500:
                assert answer.json() == {"error": "internal error; the log has request it-fails"}
        assert metric(server, "nxm_requests_total") == 4
    errors = [line for line in server.log.read_text().splitlines() if '"level": "error"' in line]
    assert len(errors) == 2
    assert all("the tokenizer failed (Exception: WordLevel error: Missing [UNK]" in line for line in errors)


@pytest.mark.slow
def test_a_deadline_runs_from_the_first_byte(engine: Path, tmp_path: Path) -> None:
    message = request("POST", INFER, body_of(feeds_of([6])))
    with nxm_serve(tmp_path / "log", f"exact={engine}", "--timeout-ms", "700") as server:
        for part in (10, len(message) - 5):  # in its head, in its body
            with connect(server.port) as connection:
                connection.sendall(message[:part])
                time.sleep(0.9)
                connection.sendall(message[part:])
                answer = read(connection)
                assert (answer.status, "0.7 seconds" in error_of(answer)) == (504, True)
                connection.sendall(message)  # and the next one has its own
                assert read(connection).status == 200


def test_bodies_that_are_held_are_bounded_in_all(engine: Path, tmp_path: Path) -> None:
    """Hundreds of connections, each with most of a body: what is beyond 32 of the largest is refused, and only that."""
    unfinished = request("POST", INFER, b" " * 9_000)[:-1]
    with nxm_serve(tmp_path / "log", f"exact={engine}", "--max-body-mb", "0.01") as server:
        waiting = [connect(server.port) for _ in range(60)]
        for connection in waiting:
            connection.sendall(unfinished)

        def refused() -> bool:
            answer = send(server.port, "POST", INFER, b" " * 9_000)
            return answer.status == 503 and "bytes of requests are held already" in error_of(answer)

        assert eventually(refused)
        assert send(server.port, "GET", "/v2/health/ready").status == 200
        for connection in waiting:
            connection.close()
        assert eventually(lambda: send(server.port, "POST", INFER, body_of(feeds_of([6]))).status == 200)
