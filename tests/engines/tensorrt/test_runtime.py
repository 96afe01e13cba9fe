"""A TensorRT engine at work, with a double of its execution context; `test_rehearsal` has the whole of it."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engines.tensorrt import rtx_backend
from engines.tensorrt.cuda_driver import Device
from engines.tensorrt.messages import forget_errors, logger_of, said_errors
from engines.tensorrt.runtime import TensorRTEngine
from nxm_export.errors import EngineError


class _Profiler:
    """`trt.IProfiler`, which TensorRT tells the time of every layer."""

    report_layer_time: Any


@pytest.mark.parametrize("runs", [True, False])
def test_layers_that_did_not_run_have_no_times(runs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    context = SimpleNamespace(profiler=None)

    def execute(_: int) -> bool:
        if runs:
            context.profiler.report_layer_time("layer", 0.5)
        return runs

    context.execute_async_v3 = execute
    engine: Any = object.__new__(TensorRTEngine)
    engine._trt, engine.file = SimpleNamespace(IProfiler=_Profiler), Path("model.engine")
    engine._contexts, engine._device, engine._graph = {0: context}, None, None
    device = SimpleNamespace(stream=0, synchronize=lambda: None)
    monkeypatch.setattr("engines.tensorrt.runtime.said_errors", lambda: "an error of CUDA")
    monkeypatch.setattr(engine, "_prepare", lambda _: (device, context))
    if runs:
        assert engine.layer_times({}, 4) == {"layer": 0.5}
    else:
        with pytest.raises(EngineError, match="TensorRT failed: an error of CUDA"):
            engine.layer_times({}, 4)
    assert not engine._contexts, "one with a profiler runs layer by layer"


class TensorRTDouble:
    """The parts of TensorRT that loading asks for. As the real one, it keeps the first logger that it is given for all
    that come after, and loads nothing but what begins with ``engine``."""

    class ILogger:
        Severity = SimpleNamespace(ERROR="error", INTERNAL_ERROR="internal", WARNING="warning")

    class TensorIOMode:
        INPUT = "in"

    def __init__(self) -> None:
        self.logger: Any = None

    def Runtime(self, logger: Any) -> SimpleNamespace:  # noqa: N802  (TensorRT's name)
        self.logger = self.logger or logger
        return SimpleNamespace(deserialize_cuda_engine=self._load)

    def _load(self, data: bytes) -> SimpleNamespace | None:
        if data.startswith(b"engine"):
            kinds = {"x": data.removeprefix(b"engine ").decode() or "FLOAT"}
            return SimpleNamespace(
                num_io_tensors=1,
                get_tensor_name=lambda i: "x",
                get_tensor_mode=lambda name: "in",
                get_tensor_dtype=lambda name: SimpleNamespace(name=kinds[name]),
                get_tensor_shape=lambda name: (-1, -1),
                num_optimization_profiles=0,
            )
        self.logger.log("warning", "nothing that matters")
        self.logger.log("error", f"{data.decode()} is no engine")
        return None


class DeviceDouble:
    """A device that must be made current in a thread before anything of it is freed there."""

    def __init__(self) -> None:
        self.current: set[int] = set()
        self.stream, self.closed, self.freed = 1, False, list[int]()
        self.activate()
        DEVICES.append(self)

    def activate(self) -> None:
        self.current.add(threading.get_ident())

    def free(self, address: int) -> None:
        assert threading.get_ident() in self.current, "no context is current in this thread"
        self.freed.append(address)

    def close(self) -> None:
        self.closed = True


DEVICES: list[DeviceDouble] = []


@pytest.fixture
def doubles(monkeypatch: pytest.MonkeyPatch) -> Any:
    """TensorRT's double, with that of a device."""
    DEVICES.clear()
    monkeypatch.setattr("engines.tensorrt.runtime.Device", DeviceDouble)
    monkeypatch.setattr("engines.tensorrt.runtime.spec_of", lambda directory: None)
    return TensorRTDouble()


def test_an_error_is_told_by_the_one_logger_that_a_process_has(doubles: Any) -> None:
    first = TensorRTEngine(doubles, Path("a/model.engine"), b"engine FLOAT", "build it again")
    for name in ("b", "c"):
        with pytest.raises(EngineError) as failed:
            TensorRTEngine(doubles, Path(name) / "model.engine", name.encode(), "build it again")
        reason = f"{name}/model.engine: TensorRT cannot load it: {name} is no engine; build it again"
        assert str(failed.value) == reason  # nothing of the one before
    first.close()


def test_threads_hear_of_their_own_errors_alone(doubles: Any) -> None:
    logger: Any = logger_of(doubles)
    forget_errors()
    logger.log("error", "of the main thread")
    heard: list[str] = []

    def other() -> None:
        forget_errors()
        logger.log("internal", "of another")
        heard.append(said_errors())

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert (said_errors(), heard) == ("of the main thread", ["of another"])


def test_an_engine_that_cannot_be_loaded_gives_its_device_back(doubles: Any) -> None:
    for data, message in ((b"torn", "torn is no engine"), (b"engine COMPLEX", "has no numpy type")):
        with pytest.raises(EngineError, match=message):
            TensorRTEngine(doubles, Path("model.engine"), data, "build it again")
    assert [device.closed for device in DEVICES] == [True, True]


def test_another_thread_than_the_one_that_ran_it_may_close_an_engine(doubles: Any) -> None:
    engine = TensorRTEngine(doubles, Path("model.engine"), b"engine FLOAT", "build it again")
    engine._buffers = {"x": (64, 8)}
    failures: list[BaseException] = []

    def close() -> None:
        try:
            engine.close()
        except BaseException as failure:
            failures.append(failure)

    thread = threading.Thread(target=close)
    thread.start()
    thread.join()
    assert not failures
    assert (DEVICES[0].freed, DEVICES[0].closed) == ([64], True)


def test_a_device_is_current_where_its_events_and_stream_are_given_back() -> None:
    calls: list[str] = []
    device: Any = object.__new__(Device)
    device._events, device.stream, device._context, device._device = [7], 1, 1, 0
    device._call = lambda name, *_: calls.append(name)
    device.close()
    assert calls == ["cuCtxSetCurrent", "cuEventDestroy_v2", "cuStreamDestroy_v2", "cuDevicePrimaryCtxRelease_v2"]


@pytest.mark.parametrize("final", [True, False])
def test_only_kernels_that_stay_what_they_are_go_into_a_graph(final: bool, doubles: Any) -> None:
    engine = TensorRTEngine(doubles, Path("model.engine"), b"engine FLOAT", "build it again", kernels_are_final=final)
    runs: list[str] = []

    def execute(_: int) -> bool:
        runs.append("kernels")
        return True

    device: Any = SimpleNamespace(
        stream=1, synchronize=lambda: None, captured=lambda work: 7, launch=lambda graph: runs.append(f"graph {graph}")
    )
    for _ in range(10):
        engine._enqueue(device, SimpleNamespace(execute_async_v3=execute))
    assert runs == ["kernels"] * 8 + (["graph 7"] * 2 if final else ["kernels"] * 2)


def test_the_kernels_of_tensorrt_rtx_are_not_final(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It compiles those for a shape in the background: a graph of the first runs would keep the general ones."""
    passport = SimpleNamespace(
        read_engine=lambda directory, facts: b"engine",
        device={"compute_capabilities": "8.6, 8.9"},
        rebuild_command=lambda: "nxm build",
    )
    for name, value in {
        "load_passport": lambda directory: passport,
        "_require_installed": lambda: None,
        "_facts": dict,
        "device_facts": lambda: {"compute_capability": "8.9"},
        "importlib": SimpleNamespace(import_module=lambda name: name),
        "TensorRTEngine": lambda *_, **keywords: keywords,
    }.items():
        monkeypatch.setattr(rtx_backend, name, value)
    loaded: Any = rtx_backend.load(tmp_path)
    assert loaded == {"kernels_are_final": False}
