"""sha256 of files and directories: what says that a file is the one that was made."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from nxm_export.errors import ArtifactError
from nxm_export.storage.unreadable import unreadable

UNHASHED = ("build.log", "timing.cache")  # side products that a rebuild may change without changing the engine


def file_hash(path: Path) -> str:
    """sha256 of a file, as hex; raises `ArtifactError` when it cannot be read."""
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest() if sys.version_info >= (3, 11) else _digest(stream)
    except OSError as error:
        raise ArtifactError(unreadable(path, error)) from error


def _digest(stream: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def joint_hash(hashes: Mapping[str, str]) -> str:
    """One sha256 for those of several files: of the lines that ``sha256sum`` prints for them, in the order of their
    names."""
    lines = "".join(f"{hashes[name]}  {name}\n" for name in sorted(hashes))
    return hashlib.sha256(lines.encode("utf-8")).hexdigest()


@dataclass(frozen=True)
class HashedFiles:
    """Files that are one thing only together, such as an ONNX file and those beside it that hold its weights: sha256 by
    path below `directory`, as they were when they were hashed."""

    directory: Path
    hashes: Mapping[str, str]

    @classmethod
    def of(cls, directory: Path, names: Sequence[str]) -> HashedFiles:
        """Hash files by their paths below `directory`; raises `ArtifactError` when one cannot be read."""
        return cls(directory, {name: file_hash(directory / name) for name in names})

    @property
    def sha256(self) -> str:
        """Of one file its own; of several their `joint_hash`."""
        if len(self.hashes) == 1:
            return next(iter(self.hashes.values()))
        return joint_hash(self.hashes)

    def require_unchanged(self) -> None:
        """Raise `ArtifactError` when one is no longer as it was."""
        for name, digest in self.hashes.items():
            if file_hash(self.directory / name) != digest:
                raise ArtifactError(
                    f"{self.directory / name} changed while it was read; do it again when it is written"
                )


def file_hashes(directory: Path) -> dict[str, str]:
    """sha256 of every file below a directory, by relative path; build logs and timing caches are left out."""
    files = sorted(file for file in directory.rglob("*") if file.is_file() and file.name not in UNHASHED)
    return {file.relative_to(directory).as_posix(): file_hash(file) for file in files}


def tree_hash(path: Path) -> str:
    """One sha256 for a file, or for a directory's names and contents; raises `ArtifactError` when it is missing."""
    if path.is_file():
        return file_hash(path)
    if not path.is_dir():
        raise ArtifactError(f"{path}: no such file or directory")
    return directory_hash(file_hashes(path))


def directory_hash(hashes: Mapping[str, str]) -> str:
    """The `tree_hash` of a directory whose files have these hashes (see `file_hashes`), in any order."""
    in_order = {name: hashes[name] for name in sorted(hashes, key=PurePosixPath)}
    return hashlib.sha256(json.dumps(in_order).encode()).hexdigest()
