"""Engines and servers that the tests of `nxm serve` and of Triton share."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from engines.base import Engine, backend
from engines.serving.repository import EngineSource
from engines.serving.settings import TritonOptions
from engines.triton import export_repository
from tests.support import exact_engine
from tools.benchmarks.servers import CannotStart, Running, nxm_serve, triton, triton_venv


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine directory whose arithmetic is exact; read it only."""
    return exact_engine.build(tmp_path_factory.mktemp("engine") / "exact", parity=True)


@pytest.fixture(scope="session")
def slow_engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, at a tenth of a second a batch or a little more, however fast this machine is."""
    home, work = tmp_path_factory.mktemp("engine"), 1100  # rows of a matrix that is squared: the work is cubic
    while True:
        made = exact_engine.build(home / f"slow-{work}", work=work)
        with backend("ort").load(made) as loaded:
            seconds = min(_seconds(loaded) for _ in range(4))
        if seconds >= 0.09:
            return made
        work = int(work * max(1.1, (0.12 / seconds) ** (1 / 3)))


def _seconds(engine: Engine) -> float:
    began = time.perf_counter()
    engine.run(exact_engine.feeds_of([5]))
    return time.perf_counter() - began


@pytest.fixture(scope="session")
def ours(engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """`nxm serve` with the exact engine as ``exact``, and its text frontend."""
    with nxm_serve(tmp_path_factory.mktemp("ours") / "log", f"exact={engine}", "--text", "--access-log") as running:
        yield running


@pytest.fixture(scope="session")
def triton_repository(engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `nxm triton --text` writes of the exact engine."""
    out = tmp_path_factory.mktemp("triton") / "repository"
    export_repository([EngineSource("exact", "1", engine)], out, TritonOptions(text=True, threads=1))
    return out


@pytest.fixture(scope="session")
def real_triton(triton_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The real Triton server on that repository, with doubles of its backends; skips where there is none."""
    venv = triton_venv()
    if isinstance(venv, str):
        pytest.skip(venv)
    try:
        with triton(triton_repository, tmp_path_factory.mktemp("triton-log") / "log", venv) as running:
            yield running
    except CannotStart as error:
        pytest.fail(f"Triton refused the generated repository: {error}")
