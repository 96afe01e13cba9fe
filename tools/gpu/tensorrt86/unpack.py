"""Take chunks that came, say which are missing, and put together what is complete. Standard library alone.

    python3 -m tools.gpu.tensorrt86.unpack c01 c02

The order of chunks does not matter, and what came before is kept under ``--place``. Exit status 0: nothing is missing.
"""

from __future__ import annotations

import argparse
import json
import lzma
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tools.gpu.tensorrt86 import BASE, FOLDER, MANIFEST, PLACE, PYTHON310
from tools.gpu.tensorrt86.manifest import Manifest, Member, sha256_of

# The carried Python; its copies of system libraries are used only where the system has none.
LAUNCHER = """#!/bin/sh
home=$(dirname "$(realpath "$0")")
for library in "$home"/lib/*.so*; do
    name=$(basename "$library")
    if [ -e "$library" ] && ! ldconfig -p 2>/dev/null | grep -q "$name "; then
        mkdir -p "$home/lib-used"
        ln -sf "$library" "$home/lib-used/$name"
    fi
done
libraries="$home/py/lib:$home/trt/tensorrt:$home/lib-used"
export LD_LIBRARY_PATH="$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
export PYTHONHOME="$home/py" PYTHONPATH="$home/trt:$home/site${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONNOUSERSITE=1 PYTHONDONTWRITEBYTECODE=1
exec "$home/py/bin/python3.10" "$@"
"""


class Damaged(Exception):
    """A chunk or a file that is not what the manifest says."""


class Place:
    """Where chunks are kept and members are put together."""

    def __init__(self, manifest: Manifest, place: Path) -> None:
        self.manifest, self.place, self.chunks = manifest, place, place / "chunks"
        self.chunks.mkdir(parents=True, exist_ok=True)

    def receive(self, folder: Path, names: Sequence[str]) -> None:
        """Copy chunks out of the folder that they came in; raises `Damaged` for one that is not as it was sent."""
        known = {chunk.name: chunk for chunk in self.manifest.chunks}
        for name in names:
            if name not in known:
                raise Damaged(f"there is no chunk {name}; the manifest has {', '.join(known)}")
            scratch = self.chunks / f"{name}.partial"
            shutil.copyfile(folder / name / "part", scratch)
            if sha256_of(scratch) != known[name].sha256:
                raise Damaged(f"chunk {name} is not what was sent; send it again")
            scratch.replace(self.chunks / name)

    def missing(self) -> list[str]:
        """Names of chunks that did not come yet."""
        return [chunk.name for chunk in self.manifest.chunks if not (self.chunks / chunk.name).is_file()]

    def put_together(self) -> dict[str, str]:
        """Unpack every member whose chunks are here; what became of each, by name."""
        with ThreadPoolExecutor(4) as pool:
            outcomes = list(pool.map(self._unpack, self.manifest.members))
        launcher = self.place / PYTHON310.name
        launcher.write_text(LAUNCHER, encoding="utf-8")
        launcher.chmod(0o755)
        return dict(zip((member.name for member in self.manifest.members), outcomes, strict=True))

    def _unpack(self, member: Member) -> str:
        mark = self.place / f".{member.name}.complete"
        if mark.is_file():
            return "there"
        if set(self.missing()) & {chunk.name for chunk in self.manifest.chunks_of(member)}:
            return "waits for chunks"
        began = time.monotonic()
        target = self.place / "base.tar" if member.name == BASE else self.place / "trt" / "tensorrt" / member.name
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = target.with_name(f"{target.name}.partial")
        decompress(self._stream(member), scratch)
        if member.sha256 is not None and sha256_of(scratch) != member.sha256:
            raise Damaged(f"{member.name} is not NVIDIA's file")
        scratch.replace(target)
        if member.name == BASE:
            with tarfile.open(target) as archive:
                archive.extractall(self.place, filter="tar")
            target.unlink()
        mark.touch()
        return f"unpacked in {time.monotonic() - began:.1f} s"

    def _stream(self, member: Member) -> Iterator[bytes]:
        for chunk, start, end in self.manifest.spans_of(member):
            with (self.chunks / chunk.name).open("rb") as stream:
                stream.seek(start)
                left = end - start
                while left > 0:
                    block = stream.read(min(1 << 22, left))
                    left -= len(block)
                    yield block


def decompress(blocks: Iterator[bytes], out: Path) -> None:
    """Write what an xz stream holds: by ``xz``, which is faster, else by Python."""
    with out.open("wb") as stream:
        if shutil.which("xz") is None:
            unpacker = lzma.LZMADecompressor()
            for block in blocks:
                stream.write(unpacker.decompress(block))
            return
        command = ["xz", "-dc", "--memlimit-decompress=4GiB"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=stream) as child:
            assert child.stdin is not None
            for block in blocks:
                child.stdin.write(block)
            child.stdin.close()
        if child.returncode:
            raise Damaged(f"{out.name}: xz ended with {child.returncode}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python3 -m tools.gpu.tensorrt86.unpack",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("chunks", nargs="*", help="chunks that came with this transfer, such as c01")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where they and the manifest lie")
    parser.add_argument("--place", type=Path, default=PLACE)
    options = parser.parse_args(arguments)
    file = options.folder / MANIFEST.name
    if not file.is_file():
        print(f"tools.gpu.tensorrt86.unpack: {file} is missing; tools.gpu.tensorrt86.pack writes it", file=sys.stderr)
        return 1
    place = Place(Manifest.read(file), options.place)
    try:
        place.receive(options.folder, options.chunks)
        outcome = place.put_together()
    except Damaged as error:
        print(f"tools.gpu.tensorrt86.unpack: {error}", file=sys.stderr)
        return 1
    missing = place.missing()
    print(json.dumps({"missing": missing, "members": outcome}, indent=1))
    return 2 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
