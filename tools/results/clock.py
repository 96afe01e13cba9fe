"""Seconds of work that is interrupted and goes on."""

from __future__ import annotations

import time
from pathlib import Path

from nxm_export.storage.atomic import write_atomic


class Clock:
    """Seconds of some `work`, which a text without white space stands for, over all the processes that did it; kept in
    a file every few seconds. What is kept of other work does not count."""

    EVERY = 5.0

    def __init__(self, file: Path, work: str) -> None:
        self.file, self.work, self.began, self.kept = file, work, time.monotonic(), 0.0
        seconds, _, known = file.read_text(encoding="utf-8").strip().partition(" ") if file.is_file() else ("0", "", "")
        self.before = float(seconds) if known in ("", work) else 0.0  # older files do not say of what

    @property
    def seconds(self) -> float:
        """Seconds so far."""
        return self.before + time.monotonic() - self.began

    def keep(self) -> None:
        """Write the seconds down, if that was not done just now."""
        if time.monotonic() - self.kept > self.EVERY:
            self.kept = time.monotonic()
            write_atomic(self.file, f"{self.seconds:.1f} {self.work}\n")

    def stop(self) -> None:
        """The work is complete."""
        self.file.unlink(missing_ok=True)
