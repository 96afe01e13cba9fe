"""``origin.json``: which checkpoint a graph or an engine was made from, and where that lay on the machine that made it.

It lies beside the graph and beside every engine built from it, so that a comparison knows its reference. It is a hint:
what belongs together is decided by the hash of the weights, and a directory that was copied elsewhere may have lost
its origin.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nxm_export.errors import ArtifactError
from nxm_export.storage.atomic import write_atomic
from nxm_export.storage.json_files import encode, read_record

SCHEMA = "nxm-origin/1"
ORIGIN_FILE = "origin.json"


@dataclass(frozen=True)
class Origin:
    """`checkpoint` is the absolute path of the directory that was exported."""

    checkpoint: str

    def save(self, directory: Path) -> None:
        """Write ``origin.json``."""
        write_atomic(directory / ORIGIN_FILE, encode(self, SCHEMA))


def recorded_checkpoint(directory: str | Path) -> Path:
    """The checkpoint directory that a graph or engine directory was made from.

    Raises `ArtifactError` where none is recorded, or where it is no longer there.
    """
    file = Path(directory) / ORIGIN_FILE
    way_out = "name the checkpoint yourself"
    if not file.is_file():
        raise ArtifactError(f"{directory} does not record the checkpoint that it was made from; {way_out}")
    checkpoint = Path(read_record(file, Origin, schema=SCHEMA, way_out=way_out).checkpoint)
    if not checkpoint.is_dir():
        raise ArtifactError(f"{directory} was made from {checkpoint}, which is not there (any more); {way_out}")
    return checkpoint
