"""What a GPU's context takes it gives back, on a driver that only counts."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from engines.tensorrt import cuda_driver


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
