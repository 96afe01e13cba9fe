"""The files of a run, read with suspicion: hashed, and decoded by their own readers, or left out and said to be
wrong."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from nxm_export.errors import ArtifactError, NxmError
from nxm_export.reporting.figures import Figure, RunFile
from nxm_export.storage.hashing import file_hash
from nxm_export.storage.json_files import nonfinite_as_none, read_foreign_json
from nxm_export.storage.run_dir import MANIFEST

T = TypeVar("T")


class Files:
    """Reads files below one directory, and remembers what was wrong with them.

    `recorded` are the sha256 that the manifest has, by file; `hashes` those of the files that were read.
    """

    def __init__(self, root: Path, recorded: Mapping[str, str]) -> None:
        self.root, self.recorded = root, recorded
        self.doubts: list[str] = []
        self.hashes: dict[str, str] = {}

    def check(self, file: str) -> None:
        """Compare a file with the hash that the manifest has of it."""
        if file in self.hashes:
            return
        self.hashes[file] = file_hash(self.root / file)
        if self.recorded.get(file, self.hashes[file]) != self.hashes[file]:
            self.doubts.append(
                f"{file} is not the file that its stage wrote (its sha256 differs from the one in {MANIFEST}); run the "
                "same command again to make it anew"
            )

    def doubt(self, error: Exception) -> None:
        """Remember what a reader reports about a file, which it names by its path."""
        self.doubts.append(str(error).removeprefix(f"{self.root}/"))

    def decoded(self, file: str, read: Callable[[Path], T]) -> RunFile[T] | None:
        """A JSON file by its own reader; None where it is missing, or is not what the reader takes."""
        path = self.root / file
        if not path.is_file():
            return None
        try:
            self.check(file)
            content = read(path)  # refuses NaN, but for files of former versions, where it is None
            return RunFile(file, content, nonfinite_as_none(read_foreign_json(path, "make it again")))
        except (NxmError, OSError) as error:
            self.doubt(error)
            return None

    def text(self, file: str) -> str | None:
        """A text file, None where it is missing or cannot be read."""
        path = self.root / file
        if not path.is_file():
            return None
        try:
            self.check(file)
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError, ArtifactError) as error:
            self.doubts.append(f"{file} cannot be read ({error}); make it again")
            return None

    def rows(self, file: str) -> tuple[Mapping[str, str], ...]:
        """The rows of a CSV file with a header."""
        text = self.text(file)
        return () if text is None else tuple(csv.DictReader(text.splitlines()))

    def lines(self, file: str, read: Callable[[Path], tuple[T, ...]]) -> tuple[T, ...]:
        """The records of a JSON-lines file by its own reader; none where it is missing, or is not what the reader
        takes."""
        path = self.root / file
        if not path.is_file():
            return ()
        try:
            self.check(file)
            return read(path)
        except (NxmError, OSError) as error:
            self.doubt(error)
            return ()

    def size(self, file: str) -> Figure | None:
        """Bytes of a file, None where it is missing."""
        path = self.root / file
        return Figure(path.stat().st_size, file) if path.is_file() else None
