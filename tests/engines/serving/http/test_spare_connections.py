"""A server whose connections are all taken still answers its probes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from engines.serving.http.spare_connections import ROOM, SpareConnections
from nxm_export.storage.json_files import entry_at
from tests.support.exact_engine import feeds_of
from tests.support.serving_calls import INFER, body_of, eventually, metric
from tools.benchmarks.servers import Running, nxm_serve
from tools.raw_http import connect, read, request, send

LIMIT = 8
PROBES = ("/v2/health/live", "/v2/health/ready", "/v2/models/exact/ready", "/metrics")


@pytest.fixture(scope="module")
def server(engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    arguments = (f"exact={engine}", "--max-connections", str(LIMIT), "--read-timeout-ms", "20000")
    with nxm_serve(tmp_path_factory.mktemp("spare") / "log", *arguments) as running:
        yield running


class Connection:
    def __init__(self) -> None:
        self.gone = False

    def let_go(self) -> None:
        self.gone = True


def test_the_oldest_makes_room() -> None:
    spare, taken = SpareConnections(), [Connection() for _ in range(ROOM + 2)]
    for connection in taken:
        spare.take(connection)
    assert [connection.gone for connection in taken] == [True] * 2 + [False] * ROOM
    spare.leave(taken[2])
    spare.leave(taken[0])
    spare.take(Connection())
    assert not taken[3].gone


@pytest.mark.parametrize("used", [False, True], ids=["never used", "kept alive"])
@pytest.mark.parametrize("count", [LIMIT, LIMIT + 5 * ROOM], ids=["as many as may be", "many more"])
def test_probes_are_answered_while_idle_connections_hold_every_place(server: Running, used: bool, count: int) -> None:
    assert eventually(lambda: metric(server, "nxm_connections") <= 1)
    with ExitStack() as stack:
        for _ in range(count):
            connection = stack.enter_context(connect(server.port))
            if used:
                connection.sendall(request("GET", "/v2/health/live"))
                assert read(connection).status == 200
        began = time.monotonic()
        for path in PROBES * 3:
            answer = send(server.port, "GET", path)
            assert (answer.status, answer.headers["connection"]) == (200, "close"), path
        assert time.monotonic() - began < len(PROBES * 3)  # a second each, and in fact some milliseconds
        refused = send(server.port, "POST", INFER, body_of(feeds_of([3])))
        assert refused.status == 503
        assert f"{LIMIT} connections are open already" in str(entry_at(refused.json(), "error"))
        assert int(refused.headers["retry-after"]) >= 1
    assert eventually(lambda: send(server.port, "POST", INFER, body_of(feeds_of([3]))).status == 200)


def test_one_that_asks_nothing_is_let_go_within_seconds(server: Running) -> None:
    assert eventually(lambda: metric(server, "nxm_connections") <= 1)
    with ExitStack() as stack:
        for _ in range(LIMIT):
            stack.enter_context(connect(server.port))
        spare = stack.enter_context(connect(server.port))
        spare.settimeout(5)
        assert spare.recv(1) == b""
