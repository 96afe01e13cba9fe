"""Raw HTTP for benchmarks and tests: every byte as written, no client that repairs or hides anything."""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def stays_open(self) -> bool:
        """Whether the server keeps the connection for another request."""
        return self.headers.get("connection", "").lower() != "close"

    def json(self) -> object:
        return json.loads(self.body)


def connect(port: int, timeout: float = 20.0) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def request(method: str, path: str, body: bytes = b"", *headers: str) -> bytes:
    """A whole request; a Content-Length is added unless one of `headers` frames the body."""
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", *headers]
    if body and not any(h.lower().startswith(("content-length", "transfer-encoding")) for h in headers):
        lines.append(f"Content-Length: {len(body)}")
    elif method == "POST" and not body and not any(h.lower().startswith("content-length") for h in headers):
        lines.append("Content-Length: 0")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def read(connection: socket.socket) -> Answer:
    """One answer; raises `ConnectionError` when the server closes before it is whole."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += _more(connection)
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if headers.get("transfer-encoding") == "chunked":
        while not body.endswith(b"0\r\n\r\n"):
            body += _more(connection)
    else:
        while len(body) < int(headers.get("content-length", "0")):
            body += _more(connection)
    return Answer(int(first.split(" ")[1]), headers, body)


def send(port: int, method: str, path: str, body: bytes = b"", *headers: str) -> Answer:
    """A request on a connection of its own, and its answer."""
    with connect(port) as connection:
        connection.sendall(request(method, path, body, *headers))
        return read(connection)


def _more(connection: socket.socket) -> bytes:
    data = connection.recv(1 << 16)
    if not data:
        raise ConnectionError("the server closed the connection")
    return data
