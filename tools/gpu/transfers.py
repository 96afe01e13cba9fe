"""How much travels to the GPU machine at a time, and files in pieces where they are larger.

Pieces are folders ``c01``, ``c02`` and so on beside ``manifest.json``: one of them and the manifest travel at a time,
and stay where they are until the machine goes.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nxm_export.errors import ArtifactError, DataError
from nxm_export.storage.hashing import file_hash
from nxm_export.storage.json_files import encode, read_record

TRANSFER_MIB = 64
TREE_MIB = 11  # of them for this tree and a wheel
PART_MIB = TRANSFER_MIB - TREE_MIB
SCHEMA, MANIFEST = "nxm-gpu-pieces/1", "manifest.json"


@dataclass(frozen=True)
class Carried:
    """A file: its name, its hash, and its pieces in order, as ``c01/NAME``."""

    name: str
    sha256: str
    pieces: tuple[str, ...]

    def missing(self, folder: Path) -> list[str]:
        """The pieces that are not in `folder`."""
        return [piece for piece in self.pieces if not (folder / piece).is_file()]

    def join(self, folder: Path, file: Path) -> None:
        """Write the new file `file` from its pieces in `folder`; raises `ArtifactError` unless it is what was cut."""
        with file.open("wb") as stream:
            for piece in self.pieces:
                with (folder / piece).open("rb") as part:
                    shutil.copyfileobj(part, stream)
        if file_hash(file) != self.sha256:
            raise ArtifactError(f"{folder}: {self.name} is not what was packed; send its pieces again")


@dataclass(frozen=True)
class Manifest:
    """All that travels."""

    files: tuple[Carried, ...]


def cut(files: Mapping[str, Path], out: Path, part_mib: float | None = None) -> Manifest:
    """Write the pieces of files, by name, and their manifest into the directory `out`; a piece has `part_mib` at most
    (`PART_MIB`)."""
    size = int((PART_MIB if part_mib is None else part_mib) * 2**20)
    carried: list[Carried] = []
    number = room = 0
    for name, file in files.items():
        pieces: list[str] = []
        with file.open("rb") as stream:
            left = file.stat().st_size
            while left:
                if not room:
                    number, room = number + 1, size
                    (out / f"c{number:02d}").mkdir()
                data = stream.read(min(room, left))
                pieces.append(f"c{number:02d}/{name}")
                (out / pieces[-1]).write_bytes(data)
                room, left = room - len(data), left - len(data)
        carried.append(Carried(name, file_hash(file), tuple(pieces)))
    manifest = Manifest(tuple(carried))
    (out / MANIFEST).write_text(encode(manifest, SCHEMA), encoding="utf-8")
    return manifest


def read_manifest(folder: Path, way_out: str) -> Manifest:
    """What `cut` wrote; raises `ArtifactError` where it is missing or is none."""
    return read_record(folder / MANIFEST, Manifest, schema=SCHEMA, way_out=way_out)


def sizes_in_words(out: Path) -> list[str]:
    """A line for each piece."""
    return [f"{folder}: {mib_of(folder):.1f} MiB" for folder in sorted(out.glob("c[0-9]*"))]


def mib_of(folder: Path) -> float:
    """MiB of the files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 2**20


def require_fits(folder: Path, called: Path, way_out: str) -> float:
    """MiB of the files in `folder`; raises `DataError`, with `called` as its name, where they do not travel at once."""
    mib = mib_of(folder)
    if mib > PART_MIB:
        raise DataError(f"{called} would have {mib:.0f} MiB, and {PART_MIB} travel at a time; {way_out}")
    return mib
