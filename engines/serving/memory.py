"""Memory that a server gives back: glibc keeps what is freed, in a heap for every thread, and counts on using it again.

Both functions do nothing where the C library is another one.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress

_M_MMAP_THRESHOLD = -3  # malloc.h
_LARGE = 1 << 20  # bytes


def map_large_blocks() -> None:
    """Let blocks of a mebibyte and more be mappings of their own from now on, which end when they are freed.

    So they are at first. But with the first that is freed, glibc raises the limit to its size, up to 32 MiB; then the
    bodies of large requests go into the heaps of the threads, and small blocks that outlive them keep them large: after
    a thousand hostile requests some 50 MiB lay there free.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE)


def return_freed() -> None:
    """Hand back what a runtime freed; every reload would leave some more behind."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
