"""What a stop must not lose: handshakes and requests that have begun when SIGTERM comes."""

from __future__ import annotations

import asyncio
import signal
import socket
import struct
import termios
import time
from pathlib import Path

import pytest

from engines.serving.http import connection as connections
from engines.serving.server import _turn_away
from tools.benchmarks.servers import nxm_serve
from tools.raw_http import connect, read, request, send

SYN, PSH, ACK, RST = 0x02, 0x08, 0x10, 0x04


@pytest.mark.parametrize(
    ("flags", "passes"),
    [(SYN, False), (ACK, True), (ACK | PSH, True), (SYN | ACK, True), (RST, True), (SYN | 0xC0, False)],
    ids=["SYN", "ACK", "data", "SYN-ACK", "RST", "SYN with congestion bits"],
)
def test_only_new_connections_are_turned_away(flags: int, passes: bool) -> None:
    """The kernel runs the same program on the datagrams of a socket pair: here each is a TCP header."""
    receiver, sender = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with receiver, sender:
        receiver.setblocking(False)
        _turn_away(receiver)
        header = struct.pack("!HHIIBBHHH", 40000, 8000, 1, 1, 5 << 4, flags, 1024, 0, 0)
        sender.send(header)
        if passes:
            assert receiver.recv(64) == header
        else:
            with pytest.raises(BlockingIOError):
                receiver.recv(64)


def test_a_connection_in_the_queue_is_kept_and_a_new_one_is_not_let_in() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        early = connect(listener.getsockname()[1])
        early.sendall(b"early")
        _turn_away(listener)
        with pytest.raises(TimeoutError):
            connect(listener.getsockname()[1], timeout=0.3)
        accepted, _ = listener.accept()
        assert accepted.recv(16) == b"early"
        accepted.close()
        early.close()


def test_bytes_that_the_loop_has_not_read_are_seen() -> None:
    """What keeps a connection open whose time is over just as its request arrives."""
    ours, client = socket.socketpair()

    with ours, client:
        transport = asyncio.Transport({"socket": ours})
        assert connections._queued(transport, termios.FIONREAD) == 0
        client.sendall(b"GET / HTTP")
        assert connections._queued(transport, termios.FIONREAD) == 10
        assert ours.recv(64) == b"GET / HTTP"
        assert connections._queued(transport, termios.FIONREAD) == 0


@pytest.mark.parametrize("used", [False, True], ids=["its first request", "a later one"])
def test_a_request_that_arrives_in_two_parts_across_a_stop_is_answered(
    engine: Path, tmp_path: Path, used: bool
) -> None:
    message = request("GET", "/v2/health/live")
    with nxm_serve(tmp_path / "log", f"exact={engine}") as server:
        connection, idle = connect(server.port), connect(server.port)
        if used:
            connection.sendall(message)
            assert read(connection).status == 200
        connection.sendall(message[:20])
        assert send(server.port, "GET", "/v2/health/live").status == 200  # the server has read what came before
        server.process.send_signal(signal.SIGTERM)
        assert idle.recv(1) == b"", "an idle connection is closed once its time to begin a request is over"
        time.sleep(2 * connections._LOOK_AGAIN)  # a look at what has not arrived, which leaves no trace
        connection.sendall(message[20:])
        answer = read(connection)
        assert answer.headers["connection"] == "close"
        assert connection.recv(1) == b""
        assert server.process.wait(20) == 0
