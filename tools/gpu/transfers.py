"""How much travels to the GPU machine at a time."""

from __future__ import annotations

from pathlib import Path

from nxm_export.errors import DataError

TRANSFER_MIB = 64
TREE_MIB = 10  # of them for this tree and a wheel
PART_MIB = TRANSFER_MIB - TREE_MIB


def require_fits(folder: Path, called: Path, way_out: str) -> float:
    """MiB of the files in `folder`; raises `DataError`, with `called` as its name, where they do not travel at once."""
    mib = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 2**20
    if mib > PART_MIB:
        raise DataError(f"{called} would have {mib:.0f} MiB, and {PART_MIB} travel at a time; {way_out}")
    return mib
