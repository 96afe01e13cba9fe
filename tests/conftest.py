"""The whole suite runs offline, on one thread per process, with fixed seeds; models are made on the spot (`tests/tiny.py`)."""

from __future__ import annotations

import os

# Before torch is imported, and inherited by child processes. Tiny models are slower on two threads than on one.
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")

import random
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import tiny


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sockets of this process reach this machine only; anything else is an error that names the address."""
    connect, connect_ex, sendto = socket.socket.connect, socket.socket.connect_ex, socket.socket.sendto

    def guarded(original: Callable[..., Any], where: int) -> Callable[..., Any]:
        def call(self: socket.socket, *arguments: Any) -> Any:
            _require_local(self, arguments[where])
            return original(self, *arguments)

        return call

    monkeypatch.setattr(socket.socket, "connect", guarded(connect, 0))
    monkeypatch.setattr(socket.socket, "connect_ex", guarded(connect_ex, 0))
    monkeypatch.setattr(socket.socket, "sendto", guarded(sendto, -1))


def _require_local(self: socket.socket, address: Any) -> None:
    if self.family == socket.AF_UNIX:
        return
    host = str(address[0])
    if host not in ("127.0.0.1", "::1", "localhost"):
        raise AssertionError(f"a test opened a connection to {host}: the suite runs without network")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Fixed seeds of every library's global generator, so that a test does not depend on those before it."""
    random.seed(0)
    np.random.seed(0)
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``tiny_checkpoint(family, **options)``: a compressed tiny checkpoint (see `tiny.compress_tiny`), made once a session."""
    made: dict[str, Path] = {}

    def make(family: str = "bert", **options: Any) -> Path:
        key = f"{family} {sorted(options.items())}"
        if key not in made:
            made[key] = tiny.compress_tiny(family, tmp_path_factory.mktemp(family), **options)
        return made[key]

    return make
