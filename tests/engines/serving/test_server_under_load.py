"""What must not lose a request: a stop, a reload and a swapped engine file while clients ask."""

from __future__ import annotations

import shutil
import signal
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from engines.passport import load_passport
from nxm_export.storage.json_files import entry_at
from tests.support import exact_engine
from tests.support.exact_engine import expected, feeds_of
from tests.support.serving_calls import INFER, LENGTHS, body_of, eventually, in_background, log_lines, logits, metric
from tools.benchmarks.servers import Running, nxm_serve
from tools.raw_http import connect, read, request, send


class ClosedLoop(threading.Thread):
    """A client that knows what it sent: an answer that does not come for a request that went out is counted as lost."""

    def __init__(self, server: Running, index: int) -> None:
        super().__init__()
        self.server, self.index = server, index
        self.answered = 0
        self.lost: list[str] = []
        self.stop = threading.Event()

    def run(self) -> None:
        length = LENGTHS[self.index % len(LENGTHS)]
        message = request("POST", INFER, body_of(feeds_of([length], length)))
        connection: socket.socket | None = None
        while not self.stop.is_set():
            if connection is None:
                try:
                    connection = connect(self.server.port)
                except ConnectionRefusedError:
                    return  # the server takes no more connections: nothing was sent, nothing is lost
            try:
                connection.sendall(message)
                answer = read(connection)
            except OSError as error:
                self.lost.append(repr(error))
                return
            if answer.status != 200:
                self.lost.append(f"status {answer.status}")
            self.answered += 1
            if not answer.stays_open:
                connection.close()
                connection = None


@pytest.mark.parametrize("repetition", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))])
def test_sigterm_in_mid_load_loses_no_request_and_exits_with_0(engine: Path, tmp_path: Path, repetition: int) -> None:
    with nxm_serve(tmp_path / "log", f"exact={engine}") as server:
        clients = [ClosedLoop(server, i) for i in range(16)]
        for client in clients:
            client.start()
        assert eventually(lambda: all(client.answered > 5 for client in clients))
        idle = connect(server.port)
        idle.sendall(request("GET", "/v2/health/live"))
        assert read(idle).status == 200
        status = server.stop()
        for client in clients:
            client.join(10)
        assert [client.lost for client in clients if client.lost] == []
        assert status == 0
        assert idle.recv(1) == b""
        idle.close()
    events = [line["event"] for line in log_lines(server)]
    assert events[-1] == "draining"
    assert "Traceback" not in server.log.read_text()


def test_a_draining_server_finishes_what_it_has_and_is_not_ready(slow_engine: Path, tmp_path: Path) -> None:
    with nxm_serve(tmp_path / "log", f"exact={slow_engine}", "--instances", "1", "--merge", "1") as server:
        feeds = feeds_of([5])
        probe = connect(server.port)
        waiting = in_background(server.port, 8, body_of(feeds))
        assert eventually(lambda: metric(server, "nxm_queue_rows") > 0)
        server.process.send_signal(signal.SIGTERM)
        assert eventually(lambda: "draining" in server.log.read_text())
        probe.sendall(request("GET", "/v2/health/ready"))
        assert read(probe).status == 503
        answers = [read(connection) for connection in waiting]
        for answer in answers:
            np.testing.assert_array_equal(logits(answer), expected(feeds))
        assert answers[-1].headers["connection"] == "close"
        assert server.process.wait(20) == 0


def test_a_changed_engine_directory_is_reloaded_under_load_without_a_lost_request(engine: Path, tmp_path: Path) -> None:
    served = shutil.copytree(engine, tmp_path / "served")
    newer = exact_engine.build(tmp_path / "newer", seed=1)
    feeds = feeds_of([12])
    with nxm_serve(tmp_path / "log", f"exact={served}", "--watch-seconds", "0.1") as server:
        np.testing.assert_array_equal(logits(send(server.port, "POST", INFER, body_of(feeds))), expected(feeds, 0))
        clients = [ClosedLoop(server, i) for i in range(8)]
        for client in clients:
            client.start()
        served.rename(tmp_path / "old")
        newer.rename(served)
        new = load_passport(served).engine_sha256

        def serving() -> object:
            return entry_at(send(server.port, "GET", "/v2/models/exact").json(), "parameters", "engine_sha256")

        assert eventually(lambda: serving() == new)
        np.testing.assert_array_equal(logits(send(server.port, "POST", INFER, body_of(feeds))), expected(feeds, 1))
        for client in clients:
            client.stop.set()
        for client in clients:
            client.join(10)
        assert [client.lost for client in clients if client.lost] == []
        assert all(client.answered for client in clients)
        assert metric(server, "nxm_reloads_total") == 1
        assert metric(server, "nxm_engine_info") == 1


def test_a_swapped_engine_file_is_noticed_and_the_verified_engine_goes_on(engine: Path, tmp_path: Path) -> None:
    served = Path(shutil.copytree(engine, tmp_path / "served"))
    evil = exact_engine.build(tmp_path / "evil", seed=1)
    feeds = feeds_of([12])
    with nxm_serve(tmp_path / "log", f"exact={served}", "--watch-seconds", "0.1") as server:
        (served / "model.onnx").unlink()
        (served / "model.onnx").symlink_to(evil / "model.onnx")
        assert eventually(lambda: metric(server, 'nxm_reloads_total{model="exact",result="refused"') == 1)
        (reason,) = [line["reason"] for line in log_lines(server) if line["event"].startswith("reload refused")]  # type: ignore[attr-defined]
        assert "leads out of its directory" in str(reason)
        np.testing.assert_array_equal(logits(send(server.port, "POST", INFER, body_of(feeds))), expected(feeds, 0))
        time.sleep(0.5)  # five looks of the watch, which leave no trace
        assert metric(server, "nxm_reloads_total") == 1  # refused once, not again and again
