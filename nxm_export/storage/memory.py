"""Is there memory for what is going to be run? Asked before it is run: whoever exceeds it is killed without a word."""

from __future__ import annotations

from pathlib import Path

from nxm_export.errors import EngineError

GIGABYTE = 10**9
_MEMINFO = Path("/proc/meminfo")
_GROUP = Path("/sys/fs/cgroup")  # a container sees its own limit here


def available_memory() -> int | None:
    """Bytes that new work can have on this machine, or in this container where it has less; None where nobody says."""
    found = [size for size in (_of_machine(), _of_container()) if size is not None]
    return min(found, default=None)


def require_memory(needed: int, purpose: str, way_out: str) -> None:
    """Raise `EngineError` where `purpose` needs more than the `needed` bytes that are available."""
    available = available_memory()
    if available is not None and needed > available:
        raise EngineError(
            f"{purpose} needs at least {gigabytes(needed)} of memory, and {gigabytes(available)} are available here; "
            f"{way_out}"
        )


def gigabytes(size: int) -> str:
    """A size for a message."""
    return f"{size / GIGABYTE:.1f} GB"


def _of_machine() -> int | None:
    try:
        lines = _MEMINFO.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:  # no Linux
        return None
    sizes = dict(line.split(":", 1) for line in lines if ":" in line)
    words = sizes.get("MemAvailable", "").split()
    return int(words[0]) * 1024 if len(words) == 2 and words[0].isdecimal() else None


def _of_container() -> int | None:
    """What is left of a control group's limit; file pages that can be dropped at once are not in use."""
    limit, used = _number(_GROUP / "memory.max"), _number(_GROUP / "memory.current")
    if limit is None or used is None:
        return None
    try:
        statistics = (_GROUP / "memory.stat").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        statistics = []
    idle = next((line.split()[1] for line in statistics if line.startswith("inactive_file ")), "0")
    return max(0, limit - used + int(idle))


def _number(file: Path) -> int | None:
    try:
        text = file.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None  # "max" is no limit
