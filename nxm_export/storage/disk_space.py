"""Is there room for what is going to be written? Asked before hours of work, not found out in the middle of them."""

from __future__ import annotations

import shutil
from pathlib import Path

from nxm_export.errors import ArtifactError


def require_space(directory: Path, needed: int, purpose: str) -> None:
    """Raise `ArtifactError` where the disk of `directory`, which need not exist yet, has less than `needed` bytes free
    for `purpose`."""
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    try:
        free = shutil.disk_usage(existing).free
    except OSError:  # a file system that does not say: the write will
        return
    if free < needed:
        raise ArtifactError(
            f"{directory}: {purpose} needs about {_readable(needed)}, and its disk has {_readable(free)} free; free "
            "the space or choose another place"
        )


def written_in(directory: Path) -> int:
    """Bytes of all files in a directory, 0 where there is none."""
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file()) if directory.is_dir() else 0


def _readable(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
