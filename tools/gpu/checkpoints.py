"""Trained checkpoints for a GPU machine, exact to the bit, in pieces that travel.

    python -m tools.gpu.checkpoints pack runs/film/checkpoint runs/mpnet/checkpoint      here
    python3 -m tools.gpu.checkpoints unpack --out /tmp/checkpoints       there, with every piece

`pack` writes each as ``nxm pack`` does, and cuts it into the folders ``c01``, ``c02`` and so on: one of them and
``manifest.json`` travel at a time. Pieces that came stay where they are, until the machine goes. `unpack` writes the
checkpoints whose pieces are all there, names those that wait, and ends with 2 while any does.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from nxm_export.contract import packed_checkpoint
from nxm_export.errors import ArtifactError, NxmError
from nxm_export.storage.atomic import atomic_dir, make_directory
from nxm_export.storage.hashing import file_hash
from nxm_export.storage.json_files import encode, read_record
from tools.gpu.transfers import PART_MIB

SCHEMA, MANIFEST = "nxm-gpu-checkpoints/1", "manifest.json"
_AGAIN = "pack them again: python -m tools.gpu.checkpoints pack"


@dataclass(frozen=True)
class Carried:
    """A packed checkpoint: its name, its hash, and its pieces in order, as ``c01/NAME``."""

    name: str
    sha256: str
    pieces: tuple[str, ...]


@dataclass(frozen=True)
class Manifest:
    """All that travels."""

    checkpoints: tuple[Carried, ...]


def pack(checkpoints: Sequence[Path], out: Path, part_bytes: int = PART_MIB << 20) -> Manifest:
    """Write the folders of pieces, each of `part_bytes` at most, and the manifest to the new directory `out`; raises
    `ArtifactError` for what is no checkpoint, and for two of one name."""
    names = [_name_of(path) for path in checkpoints]
    for name in names:
        if names.count(name) > 1:
            raise ArtifactError(f"two checkpoints are named {name}; rename the folder of one of them, or of its run")
    with atomic_dir(out, replace_any=True) as scratch, TemporaryDirectory(dir=out.absolute().parent) as place:
        carried: list[Carried] = []
        number = room = 0
        for name, checkpoint in zip(names, checkpoints, strict=True):
            file = Path(place) / name
            pieces: list[str] = []
            packed_checkpoint.pack(checkpoint, file)
            with file.open("rb") as stream:
                left = file.stat().st_size
                while left:
                    if not room:
                        number, room = number + 1, part_bytes
                        (scratch / f"c{number:02d}").mkdir()
                    data = stream.read(min(room, left))
                    pieces.append(f"c{number:02d}/{name}")
                    (scratch / pieces[-1]).write_bytes(data)
                    room, left = room - len(data), left - len(data)
            carried.append(Carried(name, file_hash(file), tuple(pieces)))
        manifest = Manifest(tuple(carried))
        (scratch / MANIFEST).write_text(encode(manifest, SCHEMA), encoding="utf-8")
    return manifest


def unpack(folder: Path, out: Path) -> list[str]:
    """Write the checkpoints that are complete to `out`; returns the pieces that are missing. Raises `ArtifactError` for
    one that is not what was packed."""
    missing: list[str] = []
    make_directory(out)
    for carried in read_record(folder / MANIFEST, Manifest, schema=SCHEMA, way_out=_AGAIN).checkpoints:
        absent = [piece for piece in carried.pieces if not (folder / piece).is_file()]
        missing += absent
        if absent or (out / carried.name).is_dir():
            continue
        with TemporaryDirectory(dir=out) as place:
            file = Path(place) / carried.name
            with file.open("wb") as stream:
                for piece in carried.pieces:
                    with (folder / piece).open("rb") as part:
                        shutil.copyfileobj(part, stream)
            if file_hash(file) != carried.sha256:
                raise ArtifactError(f"{folder}: {carried.name} is not what was packed; send its pieces again")
            packed_checkpoint.unpack(file, out / carried.name)
    return missing


def _name_of(checkpoint: Path) -> str:
    """``film`` of ``runs/film/checkpoint``: the folder of a checkpoint often says nothing."""
    path = checkpoint.absolute()
    return path.parent.name if path.name == "checkpoint" else path.name


def _said(manifest: Manifest, out: Path) -> Iterator[str]:
    for folder in sorted(out.glob("c[0-9]*")):
        mib = sum(file.stat().st_size for file in folder.iterdir()) / 2**20
        yield f"{folder}: {mib:.1f} MiB"
    yield f"{out / MANIFEST}: {', '.join(carried.name for carried in manifest.checkpoints)}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="cut checkpoints into pieces")
    packing.add_argument("checkpoints", type=Path, nargs="+", help="directories, in the order that they travel")
    packing.add_argument("--out", type=Path, default=Path(".gpu-checkpoints"))
    unpacking = commands.add_parser("unpack", help="put together what came")
    unpacking.add_argument("--folder", type=Path, default=Path(".gpu-checkpoints"), help="where the pieces lie")
    unpacking.add_argument("--out", type=Path, required=True, help="where the checkpoints go")
    options = parser.parse_args(arguments)
    try:
        if options.command == "pack":
            print("\n".join(_said(pack(options.checkpoints, options.out), options.out)))
            return 0
        missing = unpack(options.folder, options.out)
    except NxmError as error:
        print(f"tools.gpu.checkpoints: {error}", file=sys.stderr)
        return 1
    print(f"missing: {', '.join(missing)}" if missing else f"{options.out}: all of them")
    return 2 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
