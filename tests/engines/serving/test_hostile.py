"""Hundreds of malformed requests, generated: each gets a 4xx with a JSON error, and the server serves on."""

from __future__ import annotations

import json
import socket

import numpy as np
import pytest

from nxm_export.storage.json_files import entry_at
from tests.support.exact_engine import expected, feeds_of
from tests.support.hostile_requests import good, requests, resident_bytes
from tests.support.serving_calls import INFER
from tools.benchmarks.servers import Running
from tools.raw_http import connect, read, request, send


def test_hundreds_of_malformed_requests_are_refused_and_the_server_serves_on(ours: Running) -> None:
    generated = requests()
    assert len(generated) >= 300
    before = resident_bytes(ours.process.pid)
    wrong = []
    for what, path, body, headers in generated:
        answer = send(ours.port, "POST", path, body, *headers)
        try:
            error = answer.json()
        except ValueError:
            error = answer.body
        fine = 400 <= answer.status < 500 and isinstance(error, dict) and set(error) == {"error"}
        if not fine or "Traceback" in str(error) or len(str(error)) > 1000:
            wrong.append((what, answer.status, str(error)[:200]))
    assert wrong == []
    feeds = feeds_of([4, 4])
    answer = send(ours.port, "POST", INFER, json.dumps(good()).encode())
    data = np.array(entry_at(answer.json(), "outputs", 0, "data"))
    np.testing.assert_array_equal(data.reshape(2, 2), expected(feeds))
    # What a request declares is never allocated: the largest body here is 2.5 MB, and a few of those pass through.
    assert resident_bytes(ours.process.pid) < before + (64 << 20)
    assert not [line for line in ours.log.read_text().splitlines() if '"level": "error"' in line]


@pytest.mark.parametrize("seed", range(3))
def test_random_bytes_on_the_socket_leave_the_server_serving(ours: Running, seed: int) -> None:
    rng = np.random.default_rng(seed)
    message = bytearray(request("POST", INFER, json.dumps(good()).encode()))
    for _ in range(40):
        mutated = bytearray(message)
        for position in rng.integers(0, len(mutated), rng.integers(1, 20)):
            mutated[position] = rng.integers(0, 256)
        with connect(ours.port, 3) as connection:
            connection.sendall(bytes(mutated))
            connection.shutdown(socket.SHUT_WR)
            try:
                answer = read(connection)
            except (ConnectionError, TimeoutError):
                continue  # closed without a word: fine for what is not HTTP
            assert answer.status < 500 or answer.status in (501, 505)
    assert send(ours.port, "POST", INFER, json.dumps(good()).encode()).status == 200
