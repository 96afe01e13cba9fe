"""Connections beyond ``--max-connections``: a few are taken for one request each, which may be all but an inference.

So a full server still answers whether it lives and is ready. When the spare ones are taken, too, the oldest of them
goes: whoever holds connections cannot keep a probe out.
"""

from __future__ import annotations

from typing import Protocol

SPARE = "nxm.spare"  # the key of an ASGI scope that says why a request came on such a connection
ROOM = 32  # spare connections at once
PATIENCE = 1.0  # seconds for a request to begin on one


class Spare(Protocol):
    """A connection that can be let go."""

    def let_go(self) -> None:
        """Close it."""


class SpareConnections:
    """The spare connections of a server, in the order in which they came."""

    def __init__(self) -> None:
        self._taken: dict[Spare, None] = {}

    def take(self, connection: Spare) -> None:
        """Let a connection in; where there is no room, the oldest goes."""
        if len(self._taken) >= ROOM:
            oldest = next(iter(self._taken))
            del self._taken[oldest]
            oldest.let_go()
        self._taken[connection] = None

    def leave(self, connection: Spare) -> None:
        """Forget a connection that is closed, or that was none of these."""
        self._taken.pop(connection, None)
