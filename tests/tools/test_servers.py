"""Servers as child processes: one that ends, one that hangs, one that hangs once."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tools.benchmarks import servers

HANGS_ONCE = """
import http.server, pathlib, sys, time
port = next(part.partition("=")[2] for part in sys.argv if part.startswith("--http-port="))
seen = pathlib.Path(sys.argv[0]).with_suffix(".seen")
if not seen.exists():
    seen.touch()
    time.sleep(600)
class Ready(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(port)), Ready).serve_forever()
"""


def test_a_server_that_ends_says_what_it_printed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('no such model'); raise SystemExit(7)"]
    with (
        pytest.raises(servers.CannotStart, match=r"exited with 7:\nno such model"),
        servers.started(command, {}, servers.free_port(), tmp_path / "log"),
    ):
        pass


def test_a_server_that_hangs_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "START_SECONDS", 0.2)
    command = [
        sys.executable,
        "-c",
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)",
    ]
    with (
        pytest.raises(servers.TooSlow, match="not ready after"),
        servers.started(command, {}, servers.free_port(), tmp_path / "log"),
    ):
        pass


def test_triton_is_started_once_more_where_it_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = tmp_path / "server"
    server.write_text(f"#!{sys.executable}\n{HANGS_ONCE}", encoding="utf-8")
    server.chmod(0o755)
    monkeypatch.setattr(servers, "START_SECONDS", 2.0)
    monkeypatch.setattr(servers, "_triton_parts", lambda venv, scratch: (server, {}, tmp_path))
    monkeypatch.setattr(servers, "_site", lambda venv: tmp_path)
    with servers.triton(tmp_path, tmp_path / "log", tmp_path) as running:
        assert servers.get(running.url) == 200
