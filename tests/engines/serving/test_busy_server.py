"""A server with a short queue, a slow engine and tight limits: who is refused, who waits, who is let go."""

from __future__ import annotations

import contextlib
import re
import socket
from pathlib import Path

import pytest

from nxm_export.storage.json_files import as_object, entry_at
from tests.support.exact_engine import feeds_of
from tests.support.serving_calls import INFER, body_of, eventually, in_background, log_lines, metric
from tools.benchmarks.servers import Running, nxm_serve
from tools.raw_http import connect, read, request, send


@pytest.fixture(scope="module")
def busy(slow_engine: Path, tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """A server whose engine takes its time, with a short queue and tight limits."""
    arguments = (
        f"exact={slow_engine}", "--instances", "1", "--max-queue", "3", "--merge", "1", "--timeout-ms", "4000",
        "--max-connections", "12", "--read-timeout-ms", "700",
    )  # fmt: skip
    with nxm_serve(tmp_path_factory.mktemp("busy") / "log", *arguments) as running:
        yield running


def test_a_full_queue_answers_503_with_retry_after_and_only_that(busy: Running) -> None:
    waiting = in_background(busy.port, 10, body_of(feeds_of([3])))
    answers = [read(connection) for connection in waiting]
    for connection in waiting:
        connection.close()
    statuses = [answer.status for answer in answers]
    assert set(statuses) == {200, 503}
    assert statuses.count(200) >= 3  # as many as may wait, and one more when the engine took its first in time
    refused = next(answer for answer in answers if answer.status == 503)
    assert int(refused.headers["retry-after"]) >= 1
    assert "waiting already" in str(entry_at(refused.json(), "error"))


def test_a_deadline_of_the_request_is_504_and_the_server_goes_on(busy: Running) -> None:
    body = body_of(feeds_of([3]), parameters={"timeout": 1000})
    answer = send(busy.port, "POST", INFER, body)
    assert answer.status == 504
    # It passes while the request waits, or on a slow machine before it is even queued.
    assert re.search(r"0\.001 seconds|deadline passed", str(entry_at(answer.json(), "error")))
    assert send(busy.port, "POST", INFER, body_of(feeds_of([3]))).status == 200


def test_a_client_that_goes_away_costs_no_engine_time(busy: Running) -> None:
    assert eventually(lambda: metric(busy, "nxm_queue_rows") == 0)
    rows, gone = (
        metric(busy, "nxm_batch_rows_sum"),
        metric(busy, 'nxm_rejected_total{model="exact",reason="disconnected"'),
    )
    for connection in in_background(busy.port, 3, body_of(feeds_of([3]))):
        connection.close()
    assert eventually(lambda: metric(busy, 'nxm_rejected_total{model="exact",reason="disconnected"') == gone + 3)
    assert eventually(lambda: metric(busy, "nxm_queue_rows") == 0)
    assert send(busy.port, "POST", INFER, body_of(feeds_of([3]))).status == 200
    assert metric(busy, "nxm_batch_rows_sum") <= rows + 2  # the one that had begun, and the last


def test_half_closed_connections_are_let_go(busy: Running) -> None:
    before = metric(busy, "nxm_connections")
    for whole in (True, False):
        with connect(busy.port) as connection:
            message = request("POST", INFER, body_of(feeds_of([3])))
            connection.sendall(message if whole else message[:40])
            connection.shutdown(socket.SHUT_WR)
            connection.settimeout(10)
            while connection.recv(1 << 16):  # an answer, or nothing: but the end comes
                pass
    assert eventually(lambda: metric(busy, "nxm_connections") <= before)


def test_a_request_that_never_arrives_whole_is_408_and_an_idle_connection_is_closed(busy: Running) -> None:
    message = request("POST", INFER, body_of(feeds_of([3])))
    with connect(busy.port) as in_head, connect(busy.port) as in_body, connect(busy.port) as idle:
        in_head.sendall(message[:10])
        in_body.sendall(message[:-5])
        for connection in (in_head, in_body):
            answer = read(connection)
            assert (answer.status, answer.headers["connection"]) == (408, "close")
        assert idle.recv(1) == b""


def test_slow_loris_clients_do_not_keep_others_out_for_long(busy: Running) -> None:
    slow = [connect(busy.port) for _ in range(12)]
    for connection in slow:
        connection.sendall(b"POST /v2/models/exact/infer HTTP/1.1\r\nHost: a\r\nX-Slow: ")
    body = body_of(feeds_of([3]))
    refused = send(busy.port, "POST", INFER, body)
    assert refused.status == 503
    assert "12 connections are open already" in str(entry_at(refused.json(), "error"))

    def let_in() -> bool:  # a byte now and then does not buy more time
        for connection in slow:
            with contextlib.suppress(OSError):  # closed by then
                connection.sendall(b"a")
        return send(busy.port, "POST", INFER, body).status == 200

    assert eventually(let_in, 5)
    for connection in slow:
        connection.close()


def test_endless_headers_are_431(busy: Running) -> None:
    with connect(busy.port) as connection:
        connection.sendall(b"GET /v2 HTTP/1.1\r\nHost: a\r\nX-Large: ")
        connection.sendall(b"a" * (33 << 10))
        assert read(connection).status == 431


def test_what_is_not_http_is_400_in_json(busy: Running) -> None:
    for garbage in (b"\x16\x03\x01\x02\x00\x01\x00", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\r\n\r\n \x00\r\n"):
        with connect(busy.port) as connection:
            connection.sendall(garbage + b"\r\n\r\n")
            answer = read(connection)
            assert answer.status in (400, 505)
            assert set(as_object(answer.json())) == {"error"}


def test_the_busy_server_never_failed(busy: Running) -> None:
    """Runs after the tests above: whatever they did, nothing was an error of ours."""
    assert metric(busy, 'nxm_requests_total{code="500"') == 0
    assert [line for line in log_lines(busy) if line["level"] == "error"] == []
    assert busy.process.poll() is None
