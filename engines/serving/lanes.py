"""Where the work on a request is done: on the event loop, or in one of two threads, by how much it may be.

The event loop answers everybody, so it does nothing that could take more than a millisecond. What is more goes to a
thread, and what could take long to another one: a text of a few kilobytes takes milliseconds, and one request of
megabytes a second or more, behind which it would wait otherwise.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from nxm_export.errors import RequestRefused

SHORT_BODY = 64 << 10  # bytes, inflated: tokens of so much text are made in some ten milliseconds
SHORT_ANSWER = 32 << 10  # numbers, which become text in about the same time
_T = TypeVar("_T")


class Lanes:
    """The two threads. End them with `close`."""

    def __init__(self) -> None:
        self.short = ThreadPoolExecutor(1, "short-requests")
        self.long = ThreadPoolExecutor(1, "long-requests")

    async def prepare(
        self, read: Callable[[int], _T], sent: int, limit: int, done: asyncio.Future[None]
    ) -> tuple[_T, ThreadPoolExecutor]:
        """What `read` gives of a body of `sent` bytes, and the lane that it took; raises what `done` raises when that
        ends before.

        `read` gets how many bytes the body may hold, `limit` at most, and raises `RequestRefused` (413) where it holds
        more: a compressed one that is no short work after all.
        """
        if sent <= min(SHORT_BODY, limit):
            try:
                return await _in_thread(self.short, partial(read, min(SHORT_BODY, limit)), done), self.short
            except RequestRefused as error:
                if error.status != 413 or limit <= SHORT_BODY:
                    raise
        return await _in_thread(self.long, partial(_uncollected, partial(read, limit)), done), self.long

    def of_answer(self, values: int, lane: ThreadPoolExecutor | None) -> ThreadPoolExecutor:
        """Where an answer of so many numbers is written, to a request that took `lane` (None: the event loop)."""
        return self.long if lane is self.long or values > SHORT_ANSWER else self.short

    def close(self) -> None:
        """End the threads, behind the work that they have begun."""
        self.short.shutdown(cancel_futures=True)
        self.long.shutdown(cancel_futures=True)


async def _in_thread(lane: ThreadPoolExecutor, work: Callable[[], _T], done: asyncio.Future[None]) -> _T:
    future = asyncio.get_running_loop().run_in_executor(lane, work)
    try:
        await asyncio.wait((future, done), return_when=asyncio.FIRST_COMPLETED)
        if not future.done():
            done.result()
        return future.result()
    finally:
        future.cancel()  # no work at all, if nobody waits for it and it has not begun
        del future, work  # an error holds this frame, and would hold itself through it, and the request's body


def _uncollected(work: Callable[[], _T]) -> _T:
    """What `work` gives, without garbage collection: one looks at every object of a large request, holding the
    interpreter's lock for as long, and there are no cycles in JSON. In one thread alone: the switch is everybody's."""
    with _no_collection():
        try:
            return work()
        except RequestRefused as error:  # what it refers to is let go of, before the collector sees it
            refused = RequestRefused(error.status, str(error), retry_after=error.retry_after, reason=error.reason)
    raise refused


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
