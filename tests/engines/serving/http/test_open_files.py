"""File descriptors: enough for the connections, or an error before the server listens; and a log that stays short."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import shutil
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from click.testing import CliRunner

from engines.serving.http import open_files
from engines.serving.http.open_files import AcceptFailures, require_open_files
from nxm_export.cli import main
from nxm_export.errors import ServeError
from tests.support import exact_engine
from tests.support.serving_calls import eventually, log_lines
from tools.benchmarks.servers import nxm_serve
from tools.raw_http import connect, send


class Limits:
    """The limits of a process, as `resource` has them."""

    def __init__(self, soft: int, hard: int) -> None:
        self.now = (soft, hard)

    def getrlimit(self, _: int) -> tuple[int, int]:
        return self.now

    def setrlimit(self, _: int, limits: tuple[int, int]) -> None:
        self.now = limits


@pytest.mark.parametrize(
    ("soft", "hard", "raised"),
    [
        (256, 4096, True),
        (4096, 4096, False),
        (256, resource.RLIM_INFINITY, True),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, False),
    ],
)
def test_the_limit_is_raised_where_the_machine_allows_it(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, raised: bool
) -> None:
    limits = Limits(soft, hard)
    monkeypatch.setattr(resource, "getrlimit", limits.getrlimit)
    monkeypatch.setattr(resource, "setrlimit", limits.setrlimit)
    require_open_files(1000)
    assert (limits.now != (soft, hard)) is raised
    assert limits.now[1] == hard
    assert limits.now[0] == resource.RLIM_INFINITY or limits.now[0] >= 1000 + open_files.OTHERS


def test_fewer_than_the_connections_need_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", Limits(512, 1024).getrlimit)
    with pytest.raises(ServeError, match=r"may open 1024 files, and 1000 connections .* lower --max-connections"):
        require_open_files(1000)


def test_the_server_says_so_before_it_listens(engine: Path) -> None:
    result = CliRunner().invoke(main, ["serve", str(engine), "--port", "0", "--max-connections", str(10**9)])
    assert result.exit_code == 1
    assert "raise the limit (ulimit -n, LimitNOFILE=), or lower --max-connections" in result.output


def test_failures_are_a_line_in_ten_seconds_and_other_errors_keep_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    lines: list[int] = []
    others: list[dict[str, object]] = []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(open_files.log, "error", lambda _, extra: lines.append(extra["facts"]["failures"]))
    failures, loop = AcceptFailures(), asyncio.new_event_loop()
    monkeypatch.setattr(loop, "default_exception_handler", others.append)
    lost = {"message": "socket.accept() out of system resource", "exception": OSError(errno.EMFILE, "Too many")}
    another = {"message": "another", "exception": OSError(errno.EPIPE, "gone")}
    for _ in range(9000):
        failures.handle(loop, lost)
    now[0] += 10
    for context in (lost, another):
        failures.handle(loop, context)
    loop.close()
    assert lines == [1, 9000]
    assert others == [another]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="only Linux changes the limits of another process")
def test_a_server_without_descriptors_writes_little_and_recovers(engine: Path, tmp_path: Path) -> None:
    with nxm_serve(tmp_path / "log", f"exact={engine}") as server, ExitStack() as stack:
        pid = server.process.pid
        soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (len(os.listdir(f"/proc/{pid}/fd")) + 5, hard))
        held = [stack.enter_context(connect(server.port)) for _ in range(40)]
        assert eventually(lambda: any("open files" in str(line["event"]) for line in log_lines(server)))
        time.sleep(2)  # two tries of asyncio, which leave no other trace
        lines = log_lines(server)
        errors = [str(line["event"]) for line in lines if line["level"] == "error"]
        assert len(set(errors)) == len(errors)  # of connections and of the directory that is watched, each once
        assert len(lines) < 10
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))
        for connection in held:
            connection.close()
        assert eventually(lambda: send(server.port, "GET", "/v2/health/ready").status == 200)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="only Linux changes the limits of another process")
def test_a_change_that_comes_while_descriptors_are_out_is_taken_over_later_and_the_log_names_the_cause(
    engine: Path, tmp_path: Path
) -> None:
    served = Path(shutil.copytree(engine, tmp_path / "served"))
    newer = exact_engine.build(tmp_path / "newer", seed=1, parity=True)
    with nxm_serve(tmp_path / "log", f"exact={served}", "--watch-seconds", "0.2") as server:
        pid = server.process.pid
        soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, hard))
        served.rename(tmp_path / "old")
        newer.rename(served)
        time.sleep(2)
        (line,) = [line for line in log_lines(server) if line["level"] == "error"]
        assert "put off; the old engine goes on" in str(line["event"])
        assert "Too many open files" in str(line["reason"])
        assert "ulimit -n" in str(line["reason"])
        assert "build" not in str(line["reason"])
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))
        assert eventually(lambda: any(line["event"] == "reloaded" for line in log_lines(server)), 30)
        assert send(server.port, "GET", "/v2/health/ready").status == 200
