"""File descriptors of a server: enough of them for the connections that it takes, checked before it listens, and a log
that stays readable when they run out all the same.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import time

from nxm_export.errors import ServeError
from nxm_export.storage.unreadable import NONE_LEFT

log = logging.getLogger("nxm.serve")
OTHERS = 64  # files that are open beside connections: engines while they are loaded, the log, the event loop's own
_EVERY = 10.0  # seconds between two lines of the log about the same trouble


def require_open_files(connections: int) -> None:
    """Raise this process's own limit of open files to what `connections` at once need, as far as the machine allows.

    Raises `ServeError` where it does not allow as many.
    """
    needed = connections + OTHERS + len(os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ())
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ServeError(
            f"this process may open {hard} files, and {connections} connections with what else is open need {needed}; "
            "raise the limit (ulimit -n, LimitNOFILE=), or lower --max-connections"
        )
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


class AcceptFailures:
    """The event loop's errors: connections that cannot be accepted are one line in ten seconds, with their number.

    asyncio calls this for every try, hundreds of times a second and with a traceback, as long as there are none left.
    """

    def __init__(self) -> None:
        self._since = float("-inf")
        self._left_out = 0

    def handle(self, loop: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
        """What `asyncio.loop.set_exception_handler` takes."""
        error = context.get("exception")
        if not isinstance(error, OSError) or error.errno not in NONE_LEFT:
            loop.default_exception_handler(context)
            return
        self._left_out += 1
        now = time.monotonic()
        if now - self._since >= _EVERY:
            facts = {"reason": error.strerror, "failures": self._left_out}
            log.error("no connection can be accepted; open files run out", extra={"facts": facts})
            self._since, self._left_out = now, 0
