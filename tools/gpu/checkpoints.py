"""Trained checkpoints for a GPU machine, exact to the bit, in pieces that travel.

    python -m tools.gpu.checkpoints pack runs/film/checkpoint runs/mpnet/checkpoint      here
    python3 -m tools.gpu.checkpoints unpack --out /tmp/checkpoints       there, with every piece

`pack` writes each as ``nxm pack`` does, and cuts it into the folders ``c01``, ``c02`` and so on: one of them and
``manifest.json`` travel at a time. Pieces that came stay where they are, until the machine goes. `unpack` writes the
checkpoints whose pieces are all there, names those that wait, and ends with 2 while any does.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from nxm_export.contract import packed_checkpoint
from nxm_export.errors import ArtifactError, NxmError
from nxm_export.storage.atomic import atomic_dir, make_directory
from tools.gpu.transfers import Manifest, cut, read_manifest, sizes_in_words

_AGAIN = "pack them again: python -m tools.gpu.checkpoints pack"


def pack(checkpoints: Sequence[Path], out: Path, part_mib: float | None = None) -> Manifest:
    """Write the pieces of checkpoints and their manifest to the new directory `out`, see `tools.gpu.transfers.cut`;
    raises `ArtifactError` for what is no checkpoint, and for two of one name."""
    names = [_name_of(path) for path in checkpoints]
    for name in names:
        if names.count(name) > 1:
            raise ArtifactError(f"two checkpoints are named {name}; rename the folder of one of them, or of its run")
    with atomic_dir(out, replace_any=True) as scratch, TemporaryDirectory(dir=out.absolute().parent) as place:
        files = {name: Path(place) / name for name in names}
        for file, checkpoint in zip(files.values(), checkpoints, strict=True):
            packed_checkpoint.pack(checkpoint, file)
        return cut(files, scratch, part_mib)


def unpack(folder: Path, out: Path) -> list[str]:
    """Write the checkpoints that are complete to `out`; returns the pieces that are missing. Raises `ArtifactError` for
    one that is not what was packed."""
    missing: list[str] = []
    make_directory(out)
    for carried in read_manifest(folder, _AGAIN).files:
        absent = carried.missing(folder)
        missing += absent
        if absent or (out / carried.name).is_dir():
            continue
        with TemporaryDirectory(dir=out) as place:
            carried.join(folder, Path(place) / carried.name)
            packed_checkpoint.unpack(Path(place) / carried.name, out / carried.name)
    return missing


def _name_of(checkpoint: Path) -> str:
    """``film`` of ``runs/film/checkpoint``: the folder of a checkpoint often says nothing."""
    path = checkpoint.absolute()
    return path.parent.name if path.name == "checkpoint" else path.name


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
            names = ", ".join(carried.name for carried in pack(options.checkpoints, options.out).files)
            print(*sizes_in_words(options.out), f"{options.out}: {names}", sep="\n")
            return 0
        missing = unpack(options.folder, options.out)
    except NxmError as error:
        print(f"tools.gpu.checkpoints: {error}", file=sys.stderr)
        return 1
    print(f"missing: {', '.join(missing)}" if missing else f"{options.out}: all of them")
    return 2 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
