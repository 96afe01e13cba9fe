"""A capture that fails is no end of captures: torch is left as it was, and the next call is captured."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from engines.cusparselt.kernels import CudaKernels, Taken
from tests.engines.cusparselt.fake_capture import FakeCapture
from tools.gpu.cusparselt.timing import Problem, Timer


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCapture:
    return FakeCapture(monkeypatch)


def made() -> dict[str, torch.Tensor]:
    return {"": torch.ones(1)}


def test_after_a_capture_that_failed_the_next_one_succeeds_on_the_callers_stream(cuda: FakeCapture) -> None:
    kernels = CudaKernels()
    assert kernels.capture(made) is not None
    cuda.fails = True
    assert kernels.capture(made) is None
    assert (cuda.stream, cuda.recording) == (cuda.OWN, set())
    cuda.fails = False
    assert kernels.capture(made) is not None


def test_other_threads_may_work_on_the_gpu_while_one_captures(cuda: FakeCapture) -> None:
    """A server's other engine allocates meanwhile: torch's default mode would fail both."""
    import inspect

    import torch.cuda.graphs

    CudaKernels().capture(made)
    assert cuda.modes == ["thread_local"]
    assert "capture_error_mode" in inspect.signature(torch.cuda.graphs.graph).parameters


def test_a_call_that_raises_while_it_is_captured_leaves_nothing_behind(cuda: FakeCapture) -> None:
    calls: list[str] = []

    def second_time() -> dict[str, torch.Tensor]:
        calls.append(cuda.stream)
        if len(calls) == 2:
            raise RuntimeError("expected scalar type Half")
        return made()

    kernels = CudaKernels()
    assert kernels.capture(second_time) is None
    assert calls[1] == "the graph's stream"
    assert (cuda.stream, cuda.recording) == (cuda.OWN, set())
    assert kernels.capture(made) is not None


def test_the_probe_times_by_graphs_again_after_one_that_failed(
    cuda: FakeCapture, monkeypatch: pytest.MonkeyPatch
) -> None:
    problems: list[Problem] = []
    timer = Timer("cuda", 2, 3, problems)
    monkeypatch.setattr(timer, "kernel_times", lambda _: [("kernel", 8.0), ("kernel", 8.0)])
    cuda.fails = True
    assert timer.time("cusparselt", [made]).how == "profiler"
    assert (cuda.stream, cuda.recording) == (cuda.OWN, set())
    cuda.fails = False
    assert timer.time("cublas", [made]).how == "graph"
    assert [problem.at for problem in problems] == ["graph of cusparselt"]


def test_a_call_that_no_graph_holds_is_timed_all_the_same_and_says_so(
    cuda: FakeCapture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engines.cusparselt.kernels.WARM_UP_S", 0.0)
    kernels = CudaKernels()
    assert kernels.microseconds([lambda: torch.ones(1)]) == [Taken(125.0, in_graph=True)]  # a millisecond for 8 calls
    cuda.fails = True
    assert kernels.microseconds([lambda: torch.ones(1)]) == [Taken(125.0, in_graph=False)]


@pytest.mark.parametrize("milliseconds", [0.1, 1.0])
def test_what_is_timed_first_on_an_idle_gpu_is_not_slower_for_that(
    monkeypatch: pytest.MonkeyPatch, milliseconds: float
) -> None:
    """Short calls are over before the clocks are up, and long ones while the GPU gets slower: neither favours any."""
    clock = SteppedClock()
    monkeypatch.setattr("engines.cusparselt.kernels.time", clock)
    kernels = CudaKernels()
    monkeypatch.setattr(kernels, "capture", lambda call: (call, {}))
    monkeypatch.setattr(kernels, "milliseconds", clock.milliseconds)
    times = kernels.microseconds([clock.work_of(share * milliseconds) for share in (1.0, 1.0, 0.9)])
    first, second, faster = (each.microseconds for each in times)
    assert first == pytest.approx(second, rel=0.02)
    assert faster == pytest.approx(0.9 * first, rel=0.02)
    assert 1e3 * milliseconds < first < 2e3 * milliseconds, "of a GPU whose clocks are up"


class SteppedClock:
    """The time of a GPU whose clocks rise after 200 ms of work and then fall slowly, and of the host beside it."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        """Seconds."""
        return self.now

    def work_of(self, milliseconds: float) -> Callable[[], torch.Tensor]:
        """A call that takes so long at full clocks."""

        def call() -> torch.Tensor:
            slower = 4.0 if self.now < 0.2 else 1.0 + 0.5 * (self.now - 0.2)
            self.now += milliseconds * slower / 1e3
            return torch.ones(1)

        return call

    def milliseconds(self, run: Callable[[], object]) -> float:
        """What a run took."""
        began = self.now
        run()
        return 1e3 * (self.now - began)
