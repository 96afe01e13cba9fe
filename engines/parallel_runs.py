"""Batches through an engine, as many at once as it was loaded for, with their outputs in order.

Memory stays that of one large batch: no more tokens are on their way at once than `MAX_BATCH_TOKENS`, or than every
thread has with a batch at work and one waiting, where that is more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from engines.base import Engine, ParallelEngine
from nxm_export.contract.token_budget import MAX_BATCH_TOKENS, THREAD_BATCH_TOKENS

Feeds = Mapping[str, np.ndarray]
Outputs = dict[str, np.ndarray]
Batch = TypeVar("Batch")


def runs_at_once(engine: Engine) -> int:
    """How many threads may call `engine` at a time."""
    return engine.runs_at_once if isinstance(engine, ParallelEngine) else 1


def run_batches(
    engine: Engine, batches: Sequence[Batch], feeds_of: Callable[[Batch], Feeds], tokens_of: Callable[[Batch], int]
) -> Iterator[tuple[Batch, Outputs]]:
    """Every batch with its outputs, in order. `feeds_of` makes a batch's inputs when its turn comes, and `tokens_of`
    says how many tokens it computes.

    The first batch in order that fails raises its error; those that have not begun are dropped, and those that have are
    waited for.
    """
    threads = min(runs_at_once(engine), len(batches))
    if threads <= 1:
        for batch in batches:
            yield batch, engine.run(feeds_of(batch))
        return
    most = max(MAX_BATCH_TOKENS, 2 * threads * THREAD_BATCH_TOKENS)
    executor = ThreadPoolExecutor(threads, "engine")
    underway: deque[tuple[Batch, int, Future[Outputs]]] = deque()
    try:
        for batch in batches:
            tokens = tokens_of(batch)
            while underway and (len(underway) >= 2 * threads or sum(held for _, held, _ in underway) + tokens > most):
                done, _, future = underway.popleft()
                yield done, future.result()
            underway.append((batch, tokens, executor.submit(lambda batch: engine.run(feeds_of(batch)), batch)))
        while underway:
            done, _, future = underway.popleft()
            yield done, future.result()
    finally:
        executor.shutdown(cancel_futures=True)
