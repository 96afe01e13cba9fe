"""What to say about a file that cannot be read: nothing against the file where the process or the machine had no room
to open it.
"""

from __future__ import annotations

import errno
from pathlib import Path

_OPEN_FILES = frozenset({errno.EMFILE, errno.ENFILE})
NONE_LEFT = _OPEN_FILES | {errno.ENOBUFS, errno.ENOMEM}  # of descriptors or memory


def unreadable(file: str | Path, error: Exception, way_out: str = "") -> str:
    """The message for a file that `error` kept from being read: `way_out`, which is about the file, or how to get room
    where that is missing."""
    number = errno_of(error)
    if number in _OPEN_FILES:
        way_out = "too many files are open, and this one may be right: raise the limit (ulimit -n, LimitNOFILE=)"
    elif number in NONE_LEFT:
        way_out = "the machine is out of memory, and the file may be right: free some"
    reason = (error.strerror if isinstance(error, OSError) else None) or error
    return f"{file}: cannot be read ({reason})" + (f"; {way_out}" if way_out else "")


def is_without_room(error: BaseException) -> bool:
    """True when the error, or one that caused it, says that the process or the machine had no room: what it complains
    of may be right, and the same may succeed later."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, MemoryError) or errno_of(seen) in NONE_LEFT:
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def errno_of(error: BaseException) -> int | None:
    """The system's number of an error, also where a library has put it into a text (as Rust's: ``os error 24``)."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    return next((number for number in NONE_LEFT if f"(os error {number})" in str(error)), None)
