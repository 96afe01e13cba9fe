"""Requests to the server that serves ``exact``, and what it says: shared by the tests of `nxm serve`."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable

import numpy as np

from tests.support.infer_answers import outputs_of
from tools.benchmarks.servers import Running
from tools.raw_http import Answer, connect, request, send

INFER = "/v2/models/exact/infer"
LENGTHS = (3, 9, 21, 40)


def body_of(feeds: dict[str, np.ndarray], **more: object) -> bytes:
    """The body of a request, with the tokens as JSON; `more` are members beside ``inputs``."""
    inputs = [
        {"name": name, "datatype": "INT64", "shape": list(array.shape), "data": array.ravel().tolist()}
        for name, array in feeds.items()
    ]
    return json.dumps({"inputs": inputs, **more}).encode()


def logits(answer: Answer) -> np.ndarray:
    """The one output of an answer."""
    (output,) = outputs_of(answer).values()
    return output


def metric(server: Running, start: str) -> float:
    """The sum of the samples whose line begins so."""
    text = send(server.port, "GET", "/metrics").body.decode()
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(start))


def eventually(condition: Callable[[], bool], seconds: float = 15.0) -> bool:
    """Whether `condition` comes true within so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


def log_lines(server: Running) -> list[dict[str, object]]:
    """What the server has logged, a record a line."""
    return [json.loads(line) for line in server.log.read_text().splitlines()]


def in_background(port: int, count: int, body: bytes) -> list[socket.socket]:
    """Connections that have sent a request each and wait."""
    connections = [connect(port) for _ in range(count)]
    for connection in connections:
        connection.sendall(request("POST", INFER, body))
    return connections
