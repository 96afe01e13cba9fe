"""The running server: routes, limits, operations. Each test talks to `nxm serve` as a child process."""

from __future__ import annotations

import gzip
import json
import logging
import os
import shlex
import shutil
import socket
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from engines.base import BuildOptions
from engines.benchmark.http_load import InferenceRequest, ServedModel, run_round
from engines.ort import backend as ort
from engines.passport import load_passport
from engines.serving.app import OPENAPI_FILE
from engines.serving.repository import EngineSource
from engines.serving.server import _TerminalLines
from engines.serving.settings import ServerOptions
from nxm_export.cli import main
from nxm_export.cli.serving import curl_of
from nxm_export.storage.json_files import as_object, as_objects, entry_at
from tests.support import exact_engine
from tests.support.exact_engine import expected, feeds_of
from tests.support.serving_calls import INFER, LENGTHS, body_of, eventually, log_lines, logits, metric
from tools.benchmarks.servers import Running, free_port, nxm_serve
from tools.raw_http import Answer, connect, request, send


def test_paths_and_methods_that_do_not_exist_get_a_json_error(ours: Running) -> None:
    for method, path, status in (
        ("GET", "/", 404), ("GET", "/v2/", 404), ("GET", "/v3", 404), ("GET", INFER, 405), ("POST", "/metrics", 405),
        ("DELETE", "/v2/models/exact", 405), ("POST", "/v2/repository/models/exact/unload", 404),
        ("GET", "/v2/models/nobody/config", 404), ("GET", "/v2/models/exact/versions/x/ready", 404),
    ):  # fmt: skip
        answer = send(ours.port, method, path)
        assert (answer.status, set(as_object(answer.json()))) == (status, {"error"}), (method, path)


def test_the_openapi_file_describes_exactly_the_routes(ours: Running) -> None:
    served = send(ours.port, "GET", "/openapi.json").json()
    assert served == json.loads(OPENAPI_FILE.read_text())
    for path, described in as_object(entry_at(served, "paths")).items():
        operations = as_object(described)
        url = path.replace("{model}", "exact").replace("{version}", "1")
        for method in ("get", "post"):
            answer = send(ours.port, method.upper(), url)
            assert (answer.status == 405) == (method not in operations), (method, path)
            assert answer.status != 404, path
            documented = entry_at(operations, method, "responses") if method in operations else {"405": None}
            assert str(answer.status) in as_object(documented), (method, path, answer.status)


def test_every_reference_in_the_openapi_file_resolves() -> None:
    document = json.loads(OPENAPI_FILE.read_text())
    text = OPENAPI_FILE.read_text()
    names = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert names
    assert names <= set(document["components"]["schemas"])


def test_health_answers_have_the_bodies_that_kserves_client_reads(ours: Running) -> None:
    for path, body in (
        ("/v2/health/live", {"live": True}),
        ("/v2/health/ready", {"ready": True}),
        ("/v2/models/exact/ready", {"name": "exact", "ready": True}),
        ("/v2/models/exact_text/versions/1/ready", {"name": "exact_text", "ready": True}),
    ):
        answer = send(ours.port, "GET", path)
        assert (answer.status, answer.json(), answer.headers["content-type"]) == (200, body, "application/json")


def test_config_and_statistics_are_what_perf_analyzer_reads(ours: Running) -> None:
    """Its model parser takes names and shapes from the metadata, and strips the batch if the configuration has one."""
    config: Any = send(ours.port, "GET", "/v2/models/exact/versions/1/config").json()
    assert (config["name"], config["backend"], config["max_batch_size"]) == ("exact", "onnxruntime", 32)
    assert config["input"][0] == {"name": "input_ids", "data_type": "TYPE_INT64", "dims": [-1], "optional": False}
    assert config["output"] == [{"name": "logits", "data_type": "TYPE_FP32", "dims": [2]}]
    text: Any = send(ours.port, "GET", "/v2/models/exact_text/config").json()
    assert [(entry["data_type"], entry["dims"], entry["optional"]) for entry in text["input"]] == [
        ("TYPE_STRING", [1], False), ("TYPE_STRING", [1], True),
    ]  # fmt: skip

    def stats() -> tuple[int, int, dict[str, dict[str, int]]]:
        answer: Any = send(ours.port, "GET", "/v2/models/exact/stats").json()
        (one,) = answer["model_stats"]
        assert (one["name"], one["version"]) == ("exact", "1")
        return one["inference_count"], one["execution_count"], one["inference_stats"]

    rows, runs, before = stats()
    for lengths in ([3], [4, 5]):
        assert send(ours.port, "POST", INFER, body_of(feeds_of(lengths))).status == 200
    assert send(ours.port, "POST", INFER, b"{").status == 400
    more_rows, more_runs, after = stats()
    assert (more_rows - rows, more_runs - runs) == (3, 2)
    for what, count in (("success", 2), ("fail", 1), ("queue", 2), ("compute_infer", 2)):
        assert after[what]["count"] - before[what]["count"] == count, what
        assert after[what]["ns"] > before[what]["ns"], what
    compute = [after[f"compute_{part}"]["count"] for part in ("input", "infer", "output")]
    assert (
        len(set(compute)) == 1
    )  # or perf_analyzer ends itself: "Server side statistics compute counts must be the same"
    everything: Any = send(ours.port, "GET", "/v2/models/stats").json()
    assert [entry["name"] for entry in everything["model_stats"]] == ["exact", "exact_text"]
    assert send(ours.port, "GET", "/v2/models/exact/versions/7/stats").status == 404


def test_an_engine_of_32_bit_tokens_is_served_like_one_of_64(tmp_path: Path) -> None:
    graph, engine, feeds = exact_engine.write_graph(tmp_path / "graph"), tmp_path / "engine", feeds_of(LENGTHS)
    model = onnx.load(graph)
    for value in model.graph.input:
        value.type.tensor_type.elem_type = onnx.TensorProto.INT32
    onnx.save(model, graph)
    engine.mkdir()
    ort.build(graph, engine, BuildOptions(threads=1))
    exact_engine.write_parity(engine, passed=True)
    with nxm_serve(tmp_path / "log", f"exact={engine}", "--text") as server:
        np.testing.assert_array_equal(logits(send(server.port, "POST", INFER, body_of(feeds))), expected(feeds))
        described = as_object(send(server.port, "GET", "/v2/models/exact").json())
        assert {entry["datatype"] for entry in as_objects(described["inputs"])} == {"INT64"}
        text = {"name": "text", "datatype": "BYTES", "shape": [1, 1], "data": ["a good film"]}
        answer = send(server.port, "POST", "/v2/models/exact_text/infer", json.dumps({"inputs": [text]}).encode())
        assert answer.status == 200, answer.body


@pytest.mark.parametrize("text", [False, True])
def test_the_request_that_nxm_serve_names_is_answered(ours: Running, engine: Path, text: bool) -> None:
    """As a shell splits it; what curl would post is posted here."""
    line = curl_of(EngineSource("exact", "1", engine), ServerOptions(port=ours.port), text=text)
    program, url, flag, body = shlex.split(line)
    assert (program, flag) == ("curl", "-d")
    host, _, path = url.removeprefix("http://").partition("/")
    assert host == f"127.0.0.1:{ours.port}"
    answer = send(ours.port, "POST", f"/{path}", body.encode())
    assert answer.status == 200, answer.body


def test_a_request_id_is_kept_if_it_is_sane_and_made_up_if_not(ours: Running) -> None:
    body = body_of(feeds_of([3]))
    assert send(ours.port, "POST", INFER, body, "X-Request-Id: trace/7:a").headers["x-request-id"] == "trace/7:a"
    for bad in ("a b", "x" * 129, "a\tb", '"', "é"):
        made = send(ours.port, "POST", INFER, body, f"X-Request-Id: {bad}").headers["x-request-id"]
        assert made != bad
        assert made.count("-") == 1
    assert eventually(lambda: any(line.get("request") == "trace/7:a" for line in log_lines(ours)))


def test_metrics_count_answers_batches_and_refusals(ours: Running) -> None:
    before = {name: metric(ours, name) for name in ("nxm_requests_total", "nxm_batch_rows_sum", "nxm_rejected_total")}
    assert send(ours.port, "POST", INFER, body_of(feeds_of([3, 4]))).status == 200
    assert send(ours.port, "POST", INFER, b"{").status == 400
    assert metric(ours, "nxm_requests_total") == before["nxm_requests_total"] + 2
    assert metric(ours, "nxm_batch_rows_sum") == before["nxm_batch_rows_sum"] + 2
    assert metric(ours, "nxm_rejected_total") == before["nxm_rejected_total"] + 1
    assert metric(ours, "nxm_ready") == 1
    assert metric(ours, "nxm_queue_rows") == 0


def test_unknown_models_make_no_new_time_series(ours: Running) -> None:
    def series() -> set[str]:
        lines = send(ours.port, "GET", "/metrics").body.decode().splitlines()
        return {line.rsplit(" ", 1)[0] for line in lines if not line.startswith("#")}

    send(ours.port, "POST", "/v2/models/first/infer", b"{}")
    before = series()
    for i in range(5):
        assert send(ours.port, "POST", f"/v2/models/m{i}/infer", b"{}").status == 404
    assert series() == before


def test_a_body_beyond_the_limit_is_413_declared_chunked_or_sent(ours: Running) -> None:
    assert send(ours.port, "POST", INFER, b"", f"Content-Length: {1 << 40}").status == 413
    assert send(ours.port, "POST", INFER, b" " * (5 << 20)).status == 413
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    answer = send(ours.port, "POST", INFER, chunk * 80 + b"0\r\n\r\n", "Transfer-Encoding: chunked")
    assert answer.status == 413
    assert "larger than 4194304 bytes" in str(entry_at(answer.json(), "error"))


def test_a_chunked_body_within_the_limit_is_served(ours: Running) -> None:
    feeds = feeds_of([6])
    body = body_of(feeds)
    chunked = b"".join(b"%x\r\n%c\r\n" % (1, byte) for byte in body) + b"0\r\n\r\n"
    answer = send(ours.port, "POST", INFER, chunked, "Transfer-Encoding: chunked")
    np.testing.assert_array_equal(logits(answer), expected(feeds))


def test_a_compressed_body_is_served_within_the_limit_of_a_plain_one(ours: Running) -> None:
    feeds = feeds_of([6])
    body = body_of(feeds)
    for coding, compressed in (
        ("gzip", gzip.compress(body)),
        ("deflate", zlib.compress(body)),
        ("deflate", zlib.compress(body)[2:-4]),
        ("identity", body),
        ("", body),
    ):
        answer = send(ours.port, "POST", INFER, compressed, f"Content-Encoding: {coding}")
        np.testing.assert_array_equal(logits(answer), expected(feeds))
    bomb = gzip.compress(b" " * (64 << 20))
    assert len(bomb) < 1 << 20
    answer = send(ours.port, "POST", INFER, bomb, "Content-Encoding: gzip")
    assert (answer.status, "more than 4194304 bytes" in str(entry_at(answer.json(), "error"))) == (413, True)
    assert send(ours.port, "POST", INFER, body, "Content-Encoding: gzip").status == 400
    assert send(ours.port, "POST", INFER, body, "Content-Encoding: br").status == 415


def test_the_index_takes_an_empty_body_or_an_object(ours: Running) -> None:
    path = "/v2/repository/index"
    assert [entry["name"] for entry in as_objects(send(ours.port, "POST", path, b'{"ready": true}').json())] == [
        "exact",
        "exact_text",
    ]
    assert send(ours.port, "POST", path).status == 200
    for body in (b"[]", b'{"ready": 1}', b"{", b"\xff"):
        assert send(ours.port, "POST", path, body).status == 400


def test_requests_on_one_connection_are_answered_in_order_even_when_pipelined(ours: Running) -> None:
    feeds = [feeds_of([n], n) for n in (3, 30, 5)]
    with connect(ours.port) as connection:
        connection.sendall(b"".join(request("POST", INFER, body_of(one)) for one in feeds))
        reader = connection.makefile("rb")
        for one in feeds:
            status = int(reader.readline().split()[1])
            headers = dict(line.decode().lower().rstrip().split(": ", 1) for line in iter(reader.readline, b"\r\n"))
            answer = Answer(status, headers, reader.read(int(headers["content-length"])))
            np.testing.assert_array_equal(logits(answer), expected(one))


def served_model(server: Running, *bodies: bytes) -> ServedModel:
    """The exact model of a server, to be sent `bodies`, or, without, four of different lengths."""
    requests = [InferenceRequest({}, body) for body in bodies or [body_of(feeds_of([n], n)) for n in LENGTHS]]
    return ServedModel("under test", "127.0.0.1", server.port, INFER, requests)


def test_several_models_and_versions_serve_side_by_side(engine: Path, tmp_path: Path) -> None:
    other = exact_engine.build(tmp_path / "other", seed=1)
    feeds = feeds_of([7])
    with nxm_serve(tmp_path / "log", f"exact={engine}", f"exact:2={other}", f"alone={other}") as server:
        for path, seed in (
            (INFER, 1),
            ("/v2/models/exact/versions/1/infer", 0),
            ("/v2/models/exact/versions/2/infer", 1),
            ("/v2/models/alone/infer", 1),
        ):
            np.testing.assert_array_equal(
                logits(send(server.port, "POST", path, body_of(feeds))), expected(feeds, seed)
            )
        assert entry_at(send(server.port, "GET", "/v2/models/exact").json(), "versions") == ["1", "2"]


@pytest.mark.parametrize(
    ("arguments", "complaint", "status"),
    [
        (["{engine}", "--host", "0.0.0.0"], "no authentication", 1),
        (["{engine}", "--host", "192.0.2.1", "--allow-remote"], "cannot be bound", 1),
        (["{engine}", "--host", "[::1]"], "no address, nor the name of one", 1),
        (["{engine}", "--host", "h" * 300], "no address, nor the name of one", 1),
        (["stats={engine}"], "/v2/models/stats is the path of all statistics", 1),
        (["{engine}", "--port", "{taken}"], "cannot be bound (Address already in use)", 1),
        (["{engine}", "--expect-sha256", "00"], "neither is among those expected", 1),
        (["{failed}"], "parity with its checkpoint failed", 3),
        (["{engine}", "--parity", "passed", "m={unchecked}"], "never checked", 3),
        (["/nowhere"], "has no passport.json", 1),
        (["{empty}"], "model.onnx is missing: the passport beside it names it", 1),
        (["{other}"], "tokenizer.json is not the one that the engine was built with", 1),
        (["a/../../b=/nowhere"], "cannot be a model's name", 1),
        (["{engine}", "--buckets", "8,0"], "are no lengths", 2),
        (["{engine}", "--buckets", "9999"], "from 1 to 48", 1),
        ([], "Missing argument", 2),
    ],
)
def test_what_cannot_be_served_is_one_line_and_an_exit_code(
    engine: Path, tmp_path: Path, arguments: list[str], complaint: str, status: int
) -> None:
    places = {"engine": engine, "taken": 0, "failed": "", "unchecked": ""}
    for name, parity in (("failed", False), ("unchecked", None)):
        places[name] = Path(shutil.copytree(engine, tmp_path / name))
        (tmp_path / name / "parity.json").unlink()
        if parity is not None:
            exact_engine.write_parity(tmp_path / name, passed=parity)
    places["empty"], places["other"] = (Path(shutil.copytree(engine, tmp_path / name)) for name in ("empty", "other"))
    (tmp_path / "empty" / "model.onnx").unlink()
    (tmp_path / "other" / "tokenizer.json").write_text("{}")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        places["taken"] = taken.getsockname()[1]
        port = [] if "--port" in arguments else ["--port", "0"]
        result = CliRunner().invoke(main, ["serve", *port, *(argument.format(**places) for argument in arguments)])
    assert result.exit_code == status, result.output
    assert complaint in result.output
    assert "Traceback" not in result.output
    assert "listening" not in result.output  # said by a server that is there for what it serves


def test_a_bind_beyond_this_machine_says_that_there_is_no_authentication(engine: Path, tmp_path: Path) -> None:
    with nxm_serve(tmp_path / "log", f"exact={engine}", "--host", "0.0.0.0", "--allow-remote") as server:
        first = log_lines(server)[0]
    assert first["level"] == "warning"
    assert "no authentication" in str(first["event"])


def test_the_log_is_json_lines_that_name_the_engine(ours: Running, engine: Path) -> None:
    loaded = next(line for line in log_lines(ours) if line["event"] == "loaded")
    assert loaded["sha256"] == load_passport(engine).engine_sha256
    assert loaded["parity"] == "passed"


def test_the_load_tool_counts_answers_and_errors(ours: Running) -> None:
    good = run_round(served_model(ours), 4, 0.5)
    assert len(good.latencies) > 20
    assert not good.errors
    assert set(run_round(served_model(ours, b"{}"), 2, 0.2).errors) == {"HTTP 400"}
    gone = replace(served_model(ours), port=free_port())
    assert set(run_round(gone, 1, 0.2).errors) == {"ConnectionRefusedError"}


def test_bench_serve_loads_a_running_server(ours: Running, engine: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.tsv"
    data.write_text("text\tlabel\n" + "good film\t1\na very bad plot\t0\n" * 3)
    for arguments in (
        [str(engine), "--name", "exact"],
        ["--name", "exact_text"],
        [str(engine), "--name", "exact", "--encoding", "json"],
    ):
        command = [
            "bench",
            *arguments,
            "--serve",
            ours.url,
            "--data",
            str(data),
            "--clients",
            "2",
            "--seconds",
            "0.3",
            "--rounds",
            "1",
            "--json",
        ]
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 0, result.output
        (load,) = json.loads(result.stdout)["results"]
        assert load["answered"] > 10
        assert load["errors"] == {}
    nobody = CliRunner().invoke(
        main, ["bench", "--name", "x", "--serve", f"http://127.0.0.1:{free_port()}", "--data", str(data)]
    )
    assert nobody.exit_code == 1
    assert "is it running?" in nobody.output


def test_serving_processes_leave_nothing_behind(engine: Path, tmp_path: Path) -> None:
    with nxm_serve(tmp_path / "log", f"exact={engine}") as server:
        pid = server.process.pid
        assert server.stop() == 0
    assert not os.path.exists(f"/proc/{pid}/fd")
    assert sorted(path.name for path in engine.iterdir()) == [
        "model.onnx",
        "parity.json",
        "passport.json",
        "spec.json",
        "tokenizer.json",
    ]


def test_a_line_for_a_terminal_fits_it_and_controls_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    facts = {"model": "a\x1b[2J\n\x7f\u202e", "sha256": "0123456789ab" + "0" * 52, "lengths": [8, 16], "rows": 4096}
    record = logging.makeLogRecord(
        {"msg": "loaded", "levelno": logging.WARNING, "levelname": "WARNING", "facts": facts}
    )
    lines = _TerminalLines().format(record).splitlines()
    assert max(map(len, lines)) <= 80
    assert all(line.isascii() and line.isprintable() for line in lines)
    told = " ".join(" ".join(lines).split())
    assert (
        "warning: loaded: model a\\u001b[2J\\n\\u007f\\u202e, sha256 0123456789ab..., lengths [8, 16], rows 4096"
        in told
    )
