"""The whole suite runs offline, on one thread per process, with fixed seeds; models are made on the spot
(`tests/support/tiny.py`)."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import numpy as np
import pytest

from tests.offline import sitecustomize
from tests.support import tiny

if TYPE_CHECKING:
    from tests.support.shared_traces import SharedTraces

ROOT = Path(__file__).parent.parent
pytest_plugins = ("tests.support.serving_fixtures", "tests.support.tensorrt_fixtures")

# Set before torch is imported, and inherited by child processes, which import this source tree wherever they run.
os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    OMP_NUM_THREADS="1",  # tiny models are slower on two threads than on one
    PYTHONPATH=os.pathsep.join([str(ROOT / "tests" / "offline"), str(ROOT)]),
)
sitecustomize.block_network()
hypothesis.settings.register_profile("suite", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("suite")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Fixed seeds of the global generators, so that a test does not depend on those before it."""
    random.seed(0)
    np.random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``tiny_checkpoint(family, **options)``: a compressed tiny checkpoint (see `tiny.compress_tiny`), made once a
    session.

    Read it only: other tests get the same directory.
    """
    made: dict[str, Path] = {}

    def make(family: str = "bert", **options: Any) -> Path:
        key = f"{family} {sorted(options.items())}"
        if key not in made:
            made[key] = tiny.compress_tiny(family, tmp_path_factory.mktemp(family), **options)
        return made[key]

    return make


@pytest.fixture(scope="session", autouse=True)
def shared_traces() -> Iterator[SharedTraces]:
    """Exports of this process trace every architecture once (see `SharedTraces`)."""
    from nxm_export.graph import exporter
    from tests.support.shared_traces import SharedTraces

    with pytest.MonkeyPatch.context() as patch:
        traces = SharedTraces(exporter._trace)
        patch.setattr(exporter, "_trace", traces)
        yield traces


@pytest.fixture(scope="session")
def tiny_graph(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable[..., Path]) -> Callable[..., Path]:
    """``tiny_graph(family, placement)``: the graph directory of a trained tiny checkpoint, made once a session; read it
    only."""
    made: dict[tuple[str, ...], Path] = {}

    def make(family: str = "bert", placement: str = "inputs-outputs", target: str = "cpu") -> Path:
        from nxm_export.graph import exporter

        key = (family, placement, target)
        if key not in made:
            out = tmp_path_factory.mktemp("graph") / "-".join(key)
            made[key] = exporter.export(tiny_checkpoint(family), out, target=target, placement=placement).path.parent
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_engine(tmp_path_factory: pytest.TempPathFactory, tiny_graph: Callable[..., Path]) -> Callable[..., Path]:
    """``tiny_engine(backend, family, placement)``: an engine directory of a trained tiny model, made once; read it
    only."""
    made: dict[tuple[str, ...], Path] = {}

    from engines.base import cpu_backends

    def make(backend: str = "ort", family: str = "bert", placement: str = "inputs-outputs") -> Path:
        from nxm_export.pipeline.engine_commands import build_engine

        key = (backend, family, placement)
        if key not in made:
            target = "cpu" if backend in cpu_backends() else "trt"
            out = tmp_path_factory.mktemp("engine") / "-".join(key)
            build_engine(tiny_graph(family, placement, target) / "model.onnx", out, backend)
            made[key] = out
        return made[key]

    return make


@pytest.fixture(autouse=True)
def no_waiting_between_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests ask that engines are timed, not how fast they are: nobody has to wait for another's threads to sleep."""
    monkeypatch.setattr("engines.benchmark.latency.SETTLE_S", 0.0)
