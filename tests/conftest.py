"""The whole suite runs offline, on one thread per process, with fixed seeds; models are made on the spot
(`tests/support/tiny.py`)."""

from __future__ import annotations

import fcntl
import os
import random
import re
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

# The files that take longest start first: one that came last would have one worker busy and leave the others idle.
LONGEST = (
    "nxm_export/graph/test_exporter.py",
    "nxm_export/pipeline/test_run.py",
    "tools/test_benches.py",
    "test_readme.py",
    "compressors/training/test_trainer.py",
    "compressors/search/test_plan_search.py",
    "compressors/training/test_torchrun.py",
    "end_to_end/test_long_inputs.py",
    "end_to_end/test_family_stages.py",
    "engines/tensorrt/test_rehearsal.py",
    "end_to_end/test_tasks.py",
    "engines/test_hostile_directories.py",
    "compressors/training/test_augmentation.py",
    "compressors/training/test_output_sensitivity.py",
    "engines/serving/test_hostile_traffic.py",
    "engines/serving/test_server_under_load.py",
    "engines/tensorrt/test_rtx_backend.py",
    "nxm_export/reporting/test_hub_card.py",
    "nxm_export/reporting/test_unfinished_runs.py",
    "engines/serving/test_soak.py",
    "engines/test_sample_inputs.py",
)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {ROOT / "tests" / name: at for at, name in enumerate(LONGEST)}
    if moved := [str(file) for file in place if not file.is_file()]:
        raise pytest.UsageError(f"LONGEST names what is not there: {', '.join(moved)}")
    items.sort(key=lambda item: place.get(item.path, len(place)))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Fixed seeds of the global generators, so that a test does not depend on those before it."""
    random.seed(0)
    np.random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """``made_once(name, make)``: the directory that ``make(directory)`` filled, in whichever worker came first.

    Read it only: other tests, in this process and in others, get the same directory.
    """
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "made-once"
    shared.mkdir(exist_ok=True)

    def made(name: str, make: Callable[[Path], object]) -> Path:
        directory = shared / re.sub(r"[^\w.=+:-]+", "-", name)
        with directory.with_suffix(f"{directory.suffix}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # a worker that dies lets go of it
            complete = directory.with_suffix(f"{directory.suffix}.complete")
            if not complete.exists():
                make(directory)
                complete.touch()
        return directory

    return made


@pytest.fixture(scope="session")
def tiny_checkpoint(made_once: Callable[[str, Callable[[Path], object]], Path]) -> Callable[..., Path]:
    """``tiny_checkpoint(family, **options)``: a compressed tiny checkpoint (see `tiny.compress_tiny`), made once; read
    it only."""

    def make(family: str = "bert", **options: Any) -> Path:
        name = f"trained {family} {sorted(options.items())}"
        return made_once(name, lambda out: tiny.compress_tiny(family, out, **options)) / "checkpoint"

    return make


@pytest.fixture(scope="session", autouse=True)
def shared_traces() -> Iterator[SharedTraces]:
    """Exports of this process trace every architecture once (see `SharedTraces`)."""
    from nxm_export.graph import exporter, tracing
    from tests.support.shared_traces import SharedTraces

    with pytest.MonkeyPatch.context() as patch:
        traces = SharedTraces(tracing.trace)
        patch.setattr(exporter, "trace", traces)
        yield traces


@pytest.fixture(scope="session")
def tiny_graph(
    made_once: Callable[[str, Callable[[Path], object]], Path], tiny_checkpoint: Callable[..., Path]
) -> Callable[..., Path]:
    """``tiny_graph(family, placement)``: the graph directory of a trained tiny checkpoint, made once; read it only."""

    def make(family: str = "bert", placement: str = "inputs-outputs", target: str = "cpu") -> Path:
        from nxm_export.graph import exporter

        checkpoint = tiny_checkpoint(family)
        return made_once(
            f"graph {family} {placement} {target}",
            lambda out: exporter.export(checkpoint, out, target=target, placement=placement),
        )

    return make


@pytest.fixture(scope="session")
def tiny_engine(
    made_once: Callable[[str, Callable[[Path], object]], Path], tiny_graph: Callable[..., Path]
) -> Callable[..., Path]:
    """``tiny_engine(backend, family, placement)``: an engine directory of a trained tiny model, made once; read it
    only."""
    from engines.base import cpu_backends

    def make(backend: str = "ort", family: str = "bert", placement: str = "inputs-outputs") -> Path:
        from nxm_export.pipeline.engine_builds import build_engine

        graph = tiny_graph(family, placement, "cpu" if backend in cpu_backends() else "trt")
        return made_once(
            f"engine {backend} {family} {placement}", lambda out: build_engine(graph / "model.onnx", out, backend)
        )

    return make


@pytest.fixture(autouse=True)
def no_waiting_between_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests ask that engines are timed, not how fast they are: nobody has to wait for another's threads to sleep."""
    monkeypatch.setattr("engines.benchmark.latency.SETTLE_S", 0.0)
