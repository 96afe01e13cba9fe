"""What a GPU's context takes it gives back, on a driver that only counts."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from engines.tensorrt import cuda_driver
from nxm_export.errors import EngineUnavailable


class Driver:
    """Stands for the driver's library: every function succeeds, and what makes a handle makes another number."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, object]] = []
        self.handles = itertools.count(1)

    def __getattr__(self, name: str) -> Callable[..., int]:
        def function(first: object = None, *_: object) -> int:
            made = getattr(first, "_obj", None)
            if made is not None:
                made.value = next(self.handles)
            self.calls.append((name, first if made is None else made.value))
            return 0

        return function


def test_events_are_given_back_once_and_before_their_context(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    monkeypatch.setattr(cuda_driver, "_driver", lambda: driver)
    device = cuda_driver.Device()
    events = [device.event(), device.event()]
    device.close()
    device.close()
    assert len(set(events)) == 2
    given_back = [value for name, value in driver.calls if name == "cuEventDestroy_v2"]
    assert given_back == events[::-1]
    assert [name for name, _ in driver.calls[-3:]] == [
        "cuEventDestroy_v2",
        "cuStreamDestroy_v2",
        "cuDevicePrimaryCtxRelease_v2",
    ]


def test_a_driver_that_lacks_a_function_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuGraphInstantiateWithFlags is of CUDA 11.4, and TensorRT 8.6 runs on 11.0, too."""
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(cuInit=lambda *_: 0))
    with pytest.raises(EngineUnavailable, match=r"driver here is too old \(.*cu\w+.*; install one for CUDA 11\.4"):
        cuda_driver.device_memory()


@pytest.mark.parametrize("done", [True, False])
def test_a_graph_is_given_back_whether_it_can_be_run_or_not(done: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Capturing(Driver):
        def cuStreamEndCapture(self, stream: object, graph: Any) -> int:  # noqa: N802  (CUDA's name)
            graph._obj.value = 77
            return 0

        def cuGraphInstantiateWithFlags(self, ready: Any, *_: object) -> int:  # noqa: N802
            ready._obj.value = 78
            return 0

    driver = Capturing()
    monkeypatch.setattr(cuda_driver, "_driver", lambda: driver)
    assert cuda_driver.Device().captured(lambda: done) == (78 if done else None)
    (graph,) = (value for name, value in driver.calls if name == "cuGraphDestroy")
    assert getattr(graph, "value", graph) == 77
