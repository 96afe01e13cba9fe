"""Servers as child processes: ours, and the real Triton server out of the nvidia-pytriton wheel."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tools import ROOT

DOUBLES = Path(__file__).parent / "triton_doubles"
ENVIRONMENT = "NXM_TRITON_VENV"  # a virtual environment made by tools/triton-venv
START_SECONDS = 60.0


class CannotStart(Exception):
    """A server that ended before it was ready; the text holds the end of its log."""


class TooSlow(CannotStart):
    """A server that still runs and is not ready in `START_SECONDS`."""


@dataclass(frozen=True)
class Running:
    """A server that is ready."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path
    grpc_port: int | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def stop(self, *, seconds: float = 40.0) -> int:
        """SIGTERM; the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def get(url: str) -> int:
    """The status of a GET, or 0 when nobody answers."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


@contextlib.contextmanager
def nxm_serve(log: Path, *arguments: str) -> Iterator[Running]:
    """`nxm serve` with these arguments, on a free port."""
    port = free_port()
    command = [sys.executable, "-m", "nxm_export", "serve", "--port", str(port), *arguments]
    with started(command, dict(os.environ), port, log) as running:
        yield running


@contextlib.contextmanager
def triton(repository: Path, log: Path, venv: Path) -> Iterator[Running]:
    """The real Triton server on a model repository, with the doubles as its onnxruntime and tensorrt backends.

    One start in continuous integration hung behind "models READY", where the next line of the log is about NVIDIA's
    library for GPU metrics; 60 starts made to find it again did not. There is no GPU here: those metrics are
    off, and a server that hangs is started once more.
    """
    server, environment, backends = _triton_parts(venv, log.parent)
    ports = {"http": free_port(), "grpc": free_port(), "metrics": free_port()}
    command = [
        str(server),
        f"--model-repository={repository}",
        f"--backend-directory={backends}",
        "--disable-auto-complete-config",
        "--exit-timeout-secs=5",
        "--allow-gpu-metrics=false",
        *(f"--{kind}-address=127.0.0.1" for kind in ports),
        *(f"--{kind}-port={port}" for kind, port in ports.items()),
    ]
    # The stub looks for packages in its working directory first, and where that is not enough, in PYTHONPATH.
    with contextlib.ExitStack() as stack:
        for attempts_left in (1, 0):
            start = started(command, environment, ports["http"], log, cwd=_site(venv), grpc_port=ports["grpc"])
            try:
                running = stack.enter_context(start)
                break
            except TooSlow:
                if not attempts_left:
                    raise
        yield running


def triton_venv() -> Path | str:
    """The virtual environment with Triton in it, or why there is none."""
    venv = Path(os.environ.get(ENVIRONMENT, ROOT / ".venv-triton"))
    if not (venv / "bin" / "python").is_file():
        return f"no Triton server here: make one with tools/triton-venv, or point {ENVIRONMENT} at one"
    if not (_site(venv) / "pytriton" / "tritonserver" / "bin" / "tritonserver").is_file():
        return f"{venv} holds no Triton server; make it again with tools/triton-venv"
    return venv


def _site(venv: Path) -> Path:
    return next((venv / "lib").glob("python3.*")) / "site-packages"


def _triton_parts(venv: Path, scratch: Path) -> tuple[Path, dict[str, str], Path]:
    """The binary, its environment, and a backend directory with the stub of this Python and the doubles."""
    site = _site(venv)
    bundle = site / "pytriton" / "tritonserver"
    version = site.parent.name.removeprefix("python")
    backends = scratch / "backends"
    if not backends.is_dir():
        shutil.copytree(bundle / "backends" / "python", backends / "python")
        stub = bundle / "python_backend_stubs" / version / "triton_python_backend_stub"
        shutil.copy(stub, backends / "python")
        for name in ("onnxruntime", "tensorrt"):
            shutil.copytree(DOUBLES, backends / name)
    # The stub must find the library of the interpreter that the packages were installed for before the system's, and
    # the wheel's own libraries after it.
    libraries = [str(sysconfig.get_config_var("LIBDIR")), str(site / "nvidia_pytriton.libs")]
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": os.pathsep.join(libraries),
        "PYTHONPATH": str(site),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return bundle / "bin" / "tritonserver", environment, backends


@contextlib.contextmanager
def started(
    command: Sequence[str],
    environment: dict[str, str],
    port: int,
    log: Path,
    *,
    cwd: Path = ROOT,
    grpc_port: int | None = None,
) -> Iterator[Running]:
    with log.open("wb") as stream:
        process = subprocess.Popen(command, env=environment, stdout=stream, stderr=stream, cwd=cwd)
    running = Running(process, port, log, grpc_port)
    try:
        deadline = time.monotonic() + START_SECONDS
        while get(f"{running.url}/v2/health/ready") != 200:
            status, late = process.poll(), time.monotonic() > deadline
            if status is not None or late:
                tail = log.read_text(encoding="utf-8", errors="replace")[-3000:]
                if status is not None:
                    raise CannotStart(f"{command[0]} exited with {status}:\n{tail}")
                process.kill()  # it may not hear a signal, either
                raise TooSlow(f"{command[0]} is not ready after {START_SECONDS:.0f} s:\n{tail}")
            time.sleep(0.05)
        yield running
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(40)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
