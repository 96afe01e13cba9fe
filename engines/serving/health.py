"""Whether the engine of a thread still answers: asked of the engine itself, once a batch has failed.

A batch may fail for what is in it, and then the next one does not. An engine may also never answer again, as after an
error of CUDA that takes the device from the process. So behind every batch of which no request was answered the engine
runs what it answered when it was loaded. If that fails, too, no request is at fault: one such failure is enough, and no
number of bad requests is. From then on it is run again every few seconds, since nobody sends requests to a server that
is not ready.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

AGAIN_S = 5.0  # seconds between trials of an engine that fails: as often as docs/kubernetes.md asks for readiness

log = logging.getLogger("nxm.serve")


class EngineHealth:
    """Of one engine; used by its thread alone, but for `failing`, which anyone may read. `trial` runs what the engine
    answered when it was loaded, and `facts` name it in the log."""

    def __init__(self, trial: Callable[[], object], facts: Mapping[str, object]) -> None:
        self.failing = False
        self._trial, self._facts = trial, facts

    @property
    def patience(self) -> float | None:
        """Seconds to wait for a batch before the next trial; None where none is due."""
        return AGAIN_S if self.failing else None

    def answered(self) -> None:
        """A request was answered."""
        if self.failing:
            log.info("goes on; its engine answers again", extra={"facts": dict(self._facts)})
        self.failing = False

    def examine(self) -> None:
        """Nothing was answered: see whether the engine answers at all."""
        try:
            self._trial()
        except Exception as error:  # of any runtime
            if not self.failing:
                log.error(
                    "its engine fails, also at what it answered when it was loaded; not ready until it answers again",
                    extra={"facts": dict(self._facts)},
                    exc_info=error,
                )
            self.failing = True
        else:
            self.answered()
