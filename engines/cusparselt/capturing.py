"""CUDA graphs whose capture may fail. It imports torch alone: a probe uses it where nothing else is installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch.cuda import _POOL_HANDLE


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph, pool: _POOL_HANDLE) -> Iterator[None]:
    """`torch.cuda.graph`, which leaves torch as it was where the capture fails, too. Otherwise torch 2.11 stays on the
    graph's stream, its allocator records into `pool` for ever, and no other graph can use that pool."""
    import torch

    with torch.cuda.stream(torch.cuda.current_stream()):  # comes back from wherever the graph's stream is left
        try:
            # "thread_local": other engines of this process may go on meanwhile with what a capture forbids.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                yield
        except BaseException:
            with suppress(RuntimeError):  # it is not recorded into any more: what failed was the call alone
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
            raise
