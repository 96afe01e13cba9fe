"""A server under load for as long as you like, with everything that goes wrong in real life happening to it meanwhile.

Clients send without pause and check every answer. Some go away in the middle of a request or of an answer, some send
garbage, some never finish. The engine directory is replaced by an equal one again and again. In the end every request that
was sent whole, and whose client stayed, must have had the right answer, and memory, threads and files must be where they were.
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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from engines.benchmark.http_load import exchange
from tools.benchmarks.raw_http import connect, read, request, send
from tools.benchmarks.servers import Running

ABORTS = 0.05  # share of requests whose client goes away
GARBAGE = 0.01
STUCK = 0.002  # share of requests that stop in the middle, until the server gives them up


@dataclass
class SoakReport:
    """What happened. Memory is resident, in MiB: the least in the second and in the last fifth of the time, which is when
    one set of engines is loaded (a reload holds two for a while, and what leaks stays), and the most of all."""

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
        found = [f"{len(self.lost)} requests lost: {self.lost[:3]}"] if self.lost else []
        if self.wrong:
            found.append(f"{self.wrong} wrong answers")
        if set(self.statuses) - {"200"}:
            found.append(f"statuses other than 200: {self.statuses}")
        if self.memory_late > self.memory_early + memory_growth:
            found.append(f"memory rose from {self.memory_early:.0f} to {self.memory_late:.0f} MiB")
        if self.threads[1] > self.threads[0] + 2:  # the loader's and the tokenizer's begin when they are first needed
            found.append(f"threads rose from {self.threads[0]} to {self.threads[1]}")
        if self.files[1] > self.files[0] + 4:  # a connection or two may just be closing
            found.append(f"open files rose from {self.files[0]} to {self.files[1]}")
        return found

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def soak(
    server: Running,
    engine: Path,
    path: str,
    bodies: Sequence[bytes],
    right: Callable[[int, np.ndarray], bool],
    *,
    seconds: float,
    clients: int = 32,
    reload_every: float = 5.0,
    seed: int = 0,
) -> SoakReport:
    """Run; `right` says whether the logits for ``bodies[i]`` are right. `engine` is the served directory, which is replaced."""
    report = SoakReport(clients=clients)
    lock = threading.Lock()
    stop = threading.Event()
    messages = [request("POST", path, body) for body in bodies]
    report.threads, report.files = (_threads(server), 0), (_files(server), 0)

    def count(**changes: int) -> None:
        with lock:
            for name, value in changes.items():
                setattr(report, name, getattr(report, name) + value)

    def client(number: int) -> None:
        rng = random.Random(seed * 1000 + number)
        connection: socket.socket | None = None
        while not stop.is_set():
            if connection is None:
                connection = connect(server.port)
            index = rng.randrange(len(messages))
            dice = rng.random()
            if dice < ABORTS + GARBAGE + STUCK:
                _misbehave(connection, messages[index], dice, rng, count)
                connection.close()
                connection = None
                continue
            try:
                status, body, stays = exchange(connection, messages[index])
            except OSError as error:
                with lock:
                    report.lost.append(repr(error))
                connection.close()
                connection = None
                continue
            good = status == 200 and right(index, _logits(body))
            with lock:
                report.statuses[str(status)] = report.statuses.get(str(status), 0) + 1
            count(right=int(good), wrong=int(status == 200 and not good))
            if not stays:
                connection.close()
                connection = None
        if connection is not None:
            connection.close()

    threads = [threading.Thread(target=client, args=(number,), name=f"client {number}") for number in range(clients)]
    reloader = threading.Thread(target=_reload, args=(engine, reload_every, stop, count))
    began = time.monotonic()
    for thread in (*threads, reloader):
        thread.start()
    memory = []
    while time.monotonic() < began + seconds:
        time.sleep(min(1.0, seconds / 50))
        memory.append(_memory(server))
    stop.set()
    for thread in (*threads, reloader):
        thread.join()
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


def reloads_done(server: Running) -> Counter[str]:
    """Reloads by result, from the metrics."""
    found: Counter[str] = Counter()
    for line in send(server.port, "GET", "/metrics").body.decode().splitlines():
        if line.startswith("nxm_reloads_total{"):
            result = line.split('result="')[1].split('"')[0]
            found[result] += int(float(line.rsplit(" ", 1)[1]))
    return found


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


def _logits(body: bytes) -> np.ndarray:
    (output,) = [o for o in json.loads(body)["outputs"] if o["name"] == "logits"]
    return np.array(output["data"], np.float32).reshape(output["shape"])


def _memory(server: Running) -> float:
    return int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]) * 4096 / 2**20


def _threads(server: Running) -> int:
    return len(list(Path(f"/proc/{server.process.pid}/task").iterdir()))


def _files(server: Running) -> int:
    return len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))
