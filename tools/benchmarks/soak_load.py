"""A server under load for as long as you like, with everything that goes wrong in real life happening to it meanwhile.

Clients send without pause and check every answer. Some go away in the middle of a request or of an answer, some send
garbage, some never finish. The engine directory is replaced by an equal one again and again. In the end every request
that was sent whole, and whose client stayed, must have had the right answer, and memory, threads and files must be
where they were.
"""

from __future__ import annotations

import json
import random
import shutil
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tools.benchmarks.servers import Running
from tools.raw_http import connect, read, request, send

ABORTS = 0.05  # share of requests whose client goes away
GARBAGE = 0.01
STUCK = 0.002  # share of requests that stop in the middle, until the server gives them up


@dataclass
class SoakReport:
    """What happened.

    Memory is resident, in MiB: the least in the second and in the last fifth of the time, which is when one set of
    engines is loaded (a reload holds two for a while, and what leaks stays), and the most of all. Threads and files:
    before, after.
    """

    seconds: float = 0.0
    clients: int = 0
    right: int = 0
    wrong: int = 0
    lost: list[str] = field(default_factory=list)
    statuses: dict[str, int] = field(default_factory=dict)
    aborted: int = 0
    garbage: int = 0
    stuck: int = 0
    reloads: int = 0
    memory_early: float = 0.0
    memory_late: float = 0.0
    memory_most: float = 0.0
    threads: tuple[int, int] = (0, 0)
    files: tuple[int, int] = (0, 0)

    def problems(self, memory_growth: float) -> list[str]:
        """Why this run is not good; `memory_growth` is what is allowed, in MiB."""
        problems = [f"{len(self.lost)} requests lost: {self.lost[:3]}"] if self.lost else []
        if self.wrong:
            problems.append(f"{self.wrong} wrong answers")
        if set(self.statuses) - {"200"}:
            problems.append(f"statuses other than 200: {self.statuses}")
        if self.memory_late > self.memory_early + memory_growth:
            problems.append(f"memory rose from {self.memory_early:.0f} to {self.memory_late:.0f} MiB")
        if self.threads[1] > self.threads[0] + 2:  # the loader's and the tokenizer's begin when they are first needed
            problems.append(f"threads rose from {self.threads[0]} to {self.threads[1]}")
        if self.files[1] > self.files[0] + 4:  # a connection or two may just be closing
            problems.append(f"open files rose from {self.files[0]} to {self.files[1]}")
        return problems


@dataclass(frozen=True)
class Load:
    """What clients send, and how the engine is replaced meanwhile; `right` says whether the logits of ``bodies[i]`` are
    right."""

    path: str
    bodies: Sequence[bytes]
    right: Callable[[int, npt.NDArray[np.float32]], bool]
    clients: int = 32
    reload_every: float = 5.0
    seed: int = 0


def soak(server: Running, engine: Path, load: Load, seconds: float) -> SoakReport:
    """Load the server for `seconds`; `engine` is the directory that it serves, which is replaced again and again."""
    run = _Soak(server, load)
    run.report.threads, run.report.files = (_threads(server), 0), (_files(server), 0)
    workers = [threading.Thread(target=run.client, args=(number,)) for number in range(load.clients)]
    workers.append(threading.Thread(target=_reload, args=(engine, load.reload_every, run.stop, run.count)))
    began = time.monotonic()
    for worker in workers:
        worker.start()
    memory = []
    while time.monotonic() < began + seconds:
        time.sleep(min(1.0, seconds / 50))
        memory.append(_memory(server))
    run.stop.set()
    for worker in workers:
        worker.join()
    report = run.report
    report.seconds = time.monotonic() - began
    fifth = len(memory) // 5
    report.memory_early = min(memory[fifth : 2 * fifth])
    report.memory_late = min(memory[-fifth:])
    report.memory_most = max(memory)
    settled = time.monotonic() + 30  # connections close, the last reload ends, a retired engine goes
    while time.monotonic() < settled and _threads(server) > report.threads[0] + 1:
        time.sleep(0.5)
    time.sleep(3)
    report.threads = (report.threads[0], _threads(server))
    report.files = (report.files[0], _files(server))
    return report


class _Soak:
    """The clients of one run, and what they count."""

    def __init__(self, server: Running, load: Load) -> None:
        self.server, self.load = server, load
        self.messages = [request("POST", load.path, body) for body in load.bodies]
        self.report = SoakReport(clients=load.clients)
        self.stop = threading.Event()
        self._lock = threading.Lock()

    def count(self, **changes: int) -> None:
        with self._lock:
            for name, value in changes.items():
                setattr(self.report, name, getattr(self.report, name) + value)

    def client(self, number: int) -> None:
        """Send without pause until told to stop, on one connection as long as it lasts."""
        rng = random.Random(self.load.seed * 1000 + number)
        connection: socket.socket | None = None
        while not self.stop.is_set():
            connection = connection or connect(self.server.port)
            if not self._one(connection, rng):
                connection.close()
                connection = None
        if connection is not None:
            connection.close()

    def _one(self, connection: socket.socket, rng: random.Random) -> bool:
        """One request, good or bad; False when the connection is of no use after it."""
        index = rng.randrange(len(self.messages))
        dice = rng.random()
        if dice < ABORTS + GARBAGE + STUCK:
            _misbehave(connection, self.messages[index], dice, rng, self.count)
            return False
        try:
            connection.sendall(self.messages[index])
            answer = read(connection)
        except OSError as error:
            with self._lock:
                self.report.lost.append(repr(error))
            return False
        good = answer.status == 200 and self.load.right(index, _logits(answer.body))
        with self._lock:
            status = str(answer.status)
            self.report.statuses[status] = self.report.statuses.get(status, 0) + 1
        self.count(right=int(good), wrong=int(answer.status == 200 and not good))
        return answer.stays_open


def reloads_done(server: Running) -> Counter[str]:
    """Reloads by result, from the metrics."""
    reloads: Counter[str] = Counter()
    for line in send(server.port, "GET", "/metrics").body.decode().splitlines():
        if line.startswith("nxm_reloads_total{"):
            result = line.split('result="')[1].split('"')[0]
            reloads[result] += int(float(line.rsplit(" ", 1)[1]))
    return reloads


def _misbehave(
    connection: socket.socket, message: bytes, dice: float, rng: random.Random, count: Callable[..., None]
) -> None:
    try:
        if dice < ABORTS:
            connection.sendall(message[: rng.choice((rng.randrange(1, len(message)), len(message)))])
            time.sleep(rng.random() * 0.02)
            count(aborted=1)
        elif dice < ABORTS + GARBAGE:
            connection.sendall(rng.randbytes(200) + b"\r\n\r\n")
            count(garbage=1)
        else:
            connection.sendall(message[:-3])
            count(stuck=1)
            read(connection)  # 408, when the server has waited long enough
    except OSError:
        pass  # the server may close on garbage before all of it is sent


def _reload(engine: Path, every: float, stop: threading.Event, count: Callable[..., None]) -> None:
    """Replace the engine directory by a fresh copy of itself, as a build does: by rename."""
    while not stop.wait(every):
        fresh, old = engine.with_name(".fresh"), engine.with_name(".old")
        shutil.copytree(engine, fresh)
        for file in fresh.iterdir():
            file.touch()
        engine.rename(old)
        fresh.rename(engine)
        shutil.rmtree(old)
        count(reloads=1)


def _logits(body: bytes) -> npt.NDArray[np.float32]:
    (output,) = [o for o in json.loads(body)["outputs"] if o["name"] == "logits"]
    return np.array(output["data"], np.float32).reshape(output["shape"])


def _memory(server: Running) -> float:
    return int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]) * 4096 / 2**20


def _threads(server: Running) -> int:
    return len(list(Path(f"/proc/{server.process.pid}/task").iterdir()))


def _files(server: Running) -> int:
    return len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))
