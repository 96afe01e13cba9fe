"""What TensorRT says of its errors.

TensorRT keeps one logger a process, the first that it was given, whatever later runtimes bring. So there is one here,
and it sorts what it hears by the thread that it is said in.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engines.tensorrt.bindings import TensorRT

_said = threading.local()
_loggers: list[tuple[TensorRT, object]] = []


def forget_errors() -> None:
    """Begin a piece of work in this thread: what was said before belongs to another."""
    _said.messages = []


def said_errors() -> str:
    """What this thread's work has made TensorRT say since `forget_errors`, in one line; may be empty."""
    return " ".join(getattr(_said, "messages", []))


def logger_of(trt: TensorRT) -> object:
    """The logger of this process for one TensorRT (the module). It keeps errors for our messages, and drops warnings
    about things that the passport has checked."""
    for known, logger in _loggers:
        if known is trt:
            return logger

    class Logger(trt.ILogger):  # type: ignore[misc,name-defined]  # a class that is known at run time only
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: object, msg: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                _said.messages = [*getattr(_said, "messages", []), msg]

    _loggers.append((trt, Logger()))
    return _loggers[-1][1]
