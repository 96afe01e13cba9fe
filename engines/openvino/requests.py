"""The inference requests of a compiled model: one for every run at once."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engines.openvino.bindings import CompiledModel, Request


class RequestPool:
    """`size` requests of a model. Each belongs to one run at a time: it holds that run's inputs and outputs."""

    def __init__(self, compiled: CompiledModel, size: int) -> None:
        self._waiting: queue.SimpleQueue[Request] = queue.SimpleQueue()
        for _ in range(size):
            self._waiting.put(compiled.create_infer_request())

    @contextlib.contextmanager
    def free(self) -> Iterator[Request]:
        """A request that nobody else has; waits for one."""
        request = self._waiting.get()
        try:
            yield request
        finally:
            self._waiting.put(request)
