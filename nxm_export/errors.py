"""The error tree: everything that this project raises on purpose.

::

    NxmError
    ├── PlanError            a compression plan, pattern or budget that cannot be
    ├── DataError            training, evaluation or calibration data that cannot be used
    ├── ArtifactError        a file or directory on disk that is missing, damaged, foreign or in the way
    ├── ExportError          a checkpoint that cannot become a correct graph, or a graph that breaks a promise
    ├── EngineError          a runtime that refused to build, load or run
    │   └── EngineUnavailable    the runtime or its hardware is not on this machine
    ├── ParityError          two backends that should agree do not: a failed gate
    └── ServeError           a server that cannot start or go on
        └── RequestRefused       a request that a server answers with an error status

A message says what is wrong (with names and numbers), where, and what to do about it. Anything else that escapes from
this project is a bug and keeps its traceback.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable


class NxmError(Exception):
    """Base class of every error raised on purpose; the command line prints it as one line and exits with 1."""

    exit_code = 1


class PlanError(NxmError):
    """A compression plan, pattern or budget that is malformed or does not fit the model."""


class DataError(NxmError):
    """Training, evaluation or calibration data that is missing, malformed or unusable."""


class ArtifactError(NxmError):
    """A file or directory on disk that is missing, damaged, foreign or in the way."""


class ExportError(NxmError):
    """A checkpoint that cannot become a correct graph, or a graph that breaks what it promises."""


class EngineError(NxmError):
    """A runtime refused to build, load or run an engine."""


class EngineUnavailable(EngineError):
    """The runtime, its version or its hardware is not on this machine."""


class ParityError(NxmError):
    """A gate failed: outputs, accuracy or sparsity are not what was required."""

    exit_code = 3


class ServeError(NxmError):
    """A server that cannot start or go on."""


class RequestRefused(ServeError):
    """A request that a server answers with the HTTP `status` and this message, and `retry_after` seconds where it may
    help. `reason` is what it is counted as, where its status does not say that."""

    def __init__(self, status: int, message: str, *, retry_after: int | None = None, reason: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after
        self.reason = reason


def some(names: Iterable[str]) -> str:
    """The first few names, for a message."""
    shown = sorted(names)
    return ", ".join(shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "")


class Notice(UserWarning):
    """What somebody should know about data or a model that are used all the same; the command line prints it as one
    line on stderr."""


def notice(text: str) -> None:
    """Say `text` as a `Notice`."""
    warnings.warn(text, Notice, stacklevel=2)
