"""The load client against servers that answer in every way that HTTP allows, and in some that it does not."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from click.testing import CliRunner

from engines.benchmark.http_load import (
    Client,
    InferenceRequest,
    LoadReport,
    ServedModel,
    measure,
    run_round,
    with_text,
)
from nxm_export.cli import main
from nxm_export.errors import DataError, ServeError

BODY = json.dumps({"outputs": []}).encode()
Respond = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    """Answers as its server's `respond` does, and counts requests by path and connections."""

    protocol_version = "HTTP/1.1"
    server: Server

    def setup(self) -> None:
        super().setup()
        self.server.counts["connections"] += 1

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.server.counts[self.path] += 1
        self.server.respond(self)

    def log_message(self, *_: object) -> None:
        pass

    @property
    def number(self) -> int:
        """Of this request, from 1."""
        return sum(count for key, count in self.server.counts.items() if key != "connections")


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, respond: Respond) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.respond = respond
        self.counts: Counter[str] = Counter()

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # clients hang up on broken answers

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


def chunked(handler: Handler) -> None:
    handler.send_response(200)
    handler.send_header("transfer-encoding", "chunked")
    handler.end_headers()
    for part in (BODY[:5], BODY[5:]):
        handler.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
    handler.wfile.write(b"0\r\n\r\n")


def with_length(handler: Handler, status: int = 200) -> None:
    handler.send_response(status)
    handler.send_header("content-length", str(len(BODY)))
    handler.end_headers()
    handler.wfile.write(BODY)


def closing(handler: Handler) -> None:
    """No length at all: the answer ends with the connection."""
    handler.close_connection = True
    handler.send_response(200)
    handler.send_header("connection", "close")
    handler.end_headers()
    handler.wfile.write(BODY)


def cut_off(handler: Handler) -> None:
    handler.close_connection = True
    handler.send_response(200)
    handler.send_header("content-length", str(len(BODY) + 1))
    handler.end_headers()
    handler.wfile.write(BODY)


def no_http(handler: Handler) -> None:
    handler.close_connection = True
    handler.wfile.write(b"SSH-2.0-OpenSSH\r\n")


@contextmanager
def serving(respond: Respond) -> Iterator[Server]:
    with Server(respond) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def load(server: Server, *, clients: int = 2, seconds: float = 0.2) -> LoadReport:
    served = with_text("server", server.url, "m", ["a film"])
    return measure([served], [clients], seconds=seconds, rounds=1)


@pytest.mark.parametrize("respond", [chunked, with_length, closing])
def test_every_way_to_end_an_answer_is_understood(respond: Respond) -> None:
    with serving(respond) as server:
        (result,) = load(server).results
    assert result.errors == {}
    # Every request was answered; more than are counted, as the first one asks who is there and some warm the server up.
    requests, connections = server.counts["/v2/models/m/infer"], server.counts["connections"]
    assert requests > result.answered > 0
    assert connections == (requests if respond is closing else 5)  # one to ask, two to warm up, two to measure
    assert 0 < result.p50 <= result.p99


@pytest.mark.parametrize(("respond", "error"), [(cut_off, "IncompleteRead"), (no_http, "BadStatusLine")])
def test_a_broken_answer_is_an_error_and_no_answer(respond: Respond, error: str) -> None:
    def every_second(handler: Handler) -> None:
        (with_length if handler.number % 2 else respond)(handler)

    with serving(every_second) as server:
        (result,) = load(server, clients=1).results
    assert set(result.errors) == {error}
    assert result.answered > 0


def test_a_prefix_of_the_address_is_kept_and_the_models_name_is_quoted() -> None:
    with serving(with_length) as server:
        for url, model in ((f"{server.url}/team/a/", "m"), (server.url, "a b/c")):
            with Client(served := with_text("server", url, model, ["a film"])) as client:
                assert client.send(served.requests[0]) == (200, BODY)
    assert set(server.counts) - {"connections"} == {"/team/a/v2/models/m/infer", "/v2/models/a%20b%2Fc/infer"}


def test_an_address_that_begins_with_https_is_spoken_to_in_tls() -> None:
    served = with_text("server", "https://inference.example/prefix", "m", ["a film"])
    assert (served.host, served.port, served.path) == ("inference.example", 443, "/prefix/v2/models/m/infer")
    with serving(with_length) as server, pytest.raises(ServeError, match=r"no answer from 127\.0\.0\.1:\d+ \(.*SSL"):
        measure([with_text("plain", server.url.replace("http", "https"), "m", ["a film"])], [1], seconds=0.1)


@pytest.mark.parametrize("url", ["ftp://host", "http://", "http://host:port", "http://host?x=1", "http://me@host", ""])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ServeError, match="is not a server's address"):
        with_text("server", url, "m", ["a film"])


def test_a_server_that_is_given_twice_is_refused() -> None:
    served = with_text("a", "127.0.0.1:1", "m", ["a film"])
    with pytest.raises(ServeError, match="the same server is given twice"):
        measure([served, served], [1], seconds=0.1)


def test_nothing_to_send_is_refused() -> None:
    with pytest.raises(DataError, match="no samples"):
        with_text("server", "http://host", "m", [])


def test_a_client_that_dies_is_an_error_of_the_whole_run() -> None:
    """Here of a request that cannot be sent: its body is no bytes."""
    with serving(with_length) as server:
        good = with_text("server", server.url, "m", ["a film"])
        bad = InferenceRequest({}, 7)  # type: ignore[arg-type]
        served = ServedModel(good.name, good.host, good.port, good.path, [good.requests[0], bad])
        with pytest.raises(ServeError, match="a client of the load test failed: TypeError") as raised:
            run_round(served, 2, seconds=60.0)  # the other client does not go on for a minute
    assert isinstance(raised.value.__cause__, TypeError)


def test_when_all_requests_fail_there_is_no_result(tmp_path: Path) -> None:
    """Only the first one, which asks whether anybody is there, is answered."""

    def fail(handler: Handler) -> None:
        with_length(handler, 200 if handler.number == 1 else 500)

    with (
        serving(fail) as server,
        pytest.raises(ServeError, match=r"all requests of 2 clients failed \(\d+ x HTTP 500\)"),
    ):
        load(server)
    data = tmp_path / "data.tsv"
    data.write_text("text\tlabel\ngood film\t1\na bad plot\t0\n")
    with serving(fail) as server:
        command = ["bench", "--name", "m", "--serve", server.url, "--data", str(data), "--clients", "1"]
        result = CliRunner().invoke(main, [*command, "--seconds", "0.1", "--rounds", "1"])
    assert result.exit_code == 1
    assert "all requests of 1 clients failed" in result.output
    assert "Traceback" not in result.output


def test_the_first_request_says_what_is_wrong_with_it() -> None:
    with (
        serving(lambda handler: with_length(handler, 404)) as server,
        pytest.raises(ServeError, match="the first request got status 404: "),
    ):
        load(server)
