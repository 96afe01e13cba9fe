"""What a balancer sees of a server that starts, and of one that was told to stop."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest

from nxm_export.storage.json_files import entry_at
from tests.support.exact_engine import expected, feeds_of
from tests.support.serving_calls import INFER, body_of, eventually, log_lines, logits, metric
from tools.benchmarks.servers import Running, free_port, get, nxm_serve
from tools.raw_http import connect, read, request, send


@contextmanager
def starting(log: Path, *arguments: str) -> Iterator[Running]:
    """`nxm serve` as soon as it listens."""
    port = free_port()
    command = [sys.executable, "-m", "nxm_export", "serve", "--port", str(port), *arguments]
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream)
    try:
        assert eventually(lambda: get(f"http://127.0.0.1:{port}/v2/health/live") == 200, 30)
        yield Running(process, port, log)
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_a_server_that_loads_lives_is_not_ready_and_answers_503(slow_engine: Path, tmp_path: Path) -> None:
    body = body_of(feeds_of([3]))
    with starting(tmp_path / "log", f"exact={slow_engine}", "--instances", "2", "--threads", "1") as server:
        began = time.monotonic()
        assert send(server.port, "GET", "/v2/health/ready").status == 503
        refused = send(server.port, "POST", INFER, body)
        assert (refused.status, "are being loaded" in str(entry_at(refused.json(), "error"))) == (503, True)
        assert int(refused.headers["retry-after"]) >= 1
        assert send(server.port, "GET", "/v2/models/exact/ready").status == 503
        assert entry_at(send(server.port, "POST", "/v2/repository/index").json(), 0, "state") == "LOADING"
        assert time.monotonic() - began < 1
        longest = 0.0
        while send(server.port, "GET", "/v2/health/ready").status != 200:
            asked = time.monotonic()
            assert send(server.port, "GET", "/v2/health/live").status == 200
            longest = max(longest, time.monotonic() - asked)
        assert longest < 1
        assert send(server.port, "POST", INFER, body).status == 200
    events = [line["event"] for line in log_lines(server)]
    assert events == ["listening", "loaded", "ready"]


@pytest.mark.slow
def test_sigterm_while_it_loads_ends_it_with_0(slow_engine: Path, tmp_path: Path) -> None:
    with starting(tmp_path / "log", *(f"m{n}={slow_engine}" for n in range(20)), "--threads", "1") as server:
        began = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - began < 20  # one of twenty is loaded, no more
    assert [line["event"] for line in log_lines(server)] == ["listening", "draining"]


def test_connections_are_taken_for_the_shutdown_delay(engine: Path, tmp_path: Path) -> None:
    feeds = feeds_of([5])
    with nxm_serve(tmp_path / "log", f"exact={engine}", "--shutdown-delay-seconds", "1") as server:
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert eventually(lambda: send(server.port, "GET", "/v2/health/ready").status == 503)
        assert send(server.port, "GET", "/v2/health/live").status == 200
        answers = 0
        while time.monotonic() - began < 0.9:
            answer = send(server.port, "POST", INFER, body_of(feeds))
            np.testing.assert_array_equal(logits(answer), expected(feeds))
            assert answer.headers["connection"] == "close"
            answers += 1
        assert answers
        assert server.process.wait(20) == 0
        assert time.monotonic() - began > 1


@pytest.mark.slow
def test_told_again_it_waits_no_longer(engine: Path, tmp_path: Path) -> None:
    with nxm_serve(tmp_path / "log", f"exact={engine}", "--shutdown-delay-seconds", "600") as server:
        server.process.send_signal(signal.SIGTERM)
        assert eventually(lambda: send(server.port, "GET", "/v2/health/ready").status == 503)
        assert server.stop() == 0


@pytest.mark.slow
def test_what_is_not_done_in_the_time_for_a_stop_is_told_so(slow_engine: Path, tmp_path: Path) -> None:
    """It got a 500 without a word, and the log a traceback."""
    options = ("--instances", "1", "--threads", "1", "--merge", "1", "--drain-seconds", "1")
    with (
        nxm_serve(tmp_path / "log", f"exact={slow_engine}", "--parity", "off", *options) as server,
        ExitStack() as stack,
    ):
        connections = [stack.enter_context(connect(server.port)) for _ in range(60)]
        for connection in connections:
            connection.sendall(request("POST", INFER, body_of(feeds_of([5]))))
        assert eventually(lambda: metric(server, "nxm_queue_rows") > 40)
        assert server.stop() == 0
        answers = [read(connection) for connection in connections]
    assert {answer.status for answer in answers} == {200, 503}
    told = {str(entry_at(answer.json(), "error")) for answer in answers if answer.status == 503}
    assert told == {"the server stops, and has no more time for this request"}
    assert "Traceback" not in server.log.read_text()
