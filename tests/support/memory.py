"""How much memory tensors take inside a block of code."""

from __future__ import annotations

from typing import Any

import torch


class PeakOfLiveBytes:
    """Largest sum of bytes that tensors held at once inside the block, beyond what was there before."""

    def __enter__(self) -> PeakOfLiveBytes:
        self._profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        self._profiler.start()
        return self

    def __exit__(self, *details: object) -> None:
        self._profiler.stop()
        events: Any = self._profiler.profiler.kineto_results.events()  # type: ignore[union-attr]  # no types of use
        memory = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
        live = peak = 0
        for _, size in memory:
            live += size
            peak = max(peak, live)
        self.peak = peak
