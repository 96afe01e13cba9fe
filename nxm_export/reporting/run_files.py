"""The files of a run, read with suspicion: hashed, of a known schema and shape, or left out and said to be wrong."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nxm_export.errors import ArtifactError
from nxm_export.reporting.figures import Figure, Source
from nxm_export.reporting.shapes import SHAPES, misfit
from nxm_export.storage.hashing import file_hash
from nxm_export.storage.json_files import parse_json
from nxm_export.storage.run_dir import MANIFEST

PASSPORT = "passport.json"
# What each file must be: its schema up to the slash. Another version of it is not read; a newer nxm-export may mean other
# things by the same names.
_SCHEMAS = {"summary.json": "nxm-summary/1", PASSPORT: "nxm-passport/2", "search.json": "nxm-search/1"}
# Newer versions of these may add fields; what is known of them is shown.
_FAMILIES = {
    "parity.json": "nxm-parity",
    "bisect.json": "nxm-bisect",
    "latency.json": "nxm-bench",
    "verify.json": "nxm-verify",
}


class Files:
    """Reads files below one directory, and remembers what was wrong with them."""

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
                f"{file} is not the file that its stage wrote (its sha256 differs from the one in {MANIFEST}); run the same "
                "command again to make it anew"
            )

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

    def json(self, file: str, kind: str | None = None) -> Source | None:
        """A JSON object of the schema that its name, or the name `kind`, asks for; None where it is missing or not that."""
        text = self.text(file)
        if text is None:
            return None
        try:
            data = parse_json(text, file, "make it again", ArtifactError)
        except ArtifactError as error:
            self.doubts.append(str(error))
            return None
        name = kind or Path(file).name
        schema = data.get("schema") if isinstance(data, dict) else None
        family = str(schema).partition("/")[0]
        if not isinstance(data, dict) or schema != _SCHEMAS.get(name, schema) or family != _FAMILIES.get(name, family):
            wanted = _SCHEMAS.get(name) or _FAMILIES.get(name) or "a JSON object"
            self.doubts.append(f"{file} is of schema {schema!r}, not {wanted}: it is not shown; make it again")
            return None
        if wrong := misfit(data, SHAPES.get(name, {})):
            self.doubts.append(f"{file} is malformed at {wrong}: it is not shown; make it again")
            return None
        return Source(file, data)

    def rows(self, file: str) -> tuple[Mapping[str, str], ...]:
        """The rows of a CSV file with a header."""
        text = self.text(file)
        return () if text is None else tuple(csv.DictReader(text.splitlines()))

    def lines(self, file: str) -> tuple[Mapping[str, Any], ...]:
        """The objects of a JSON-lines file; a last line that was cut is left out."""
        found = []
        for line in (self.text(file) or "").splitlines():
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict):
                found.append(value)
        return tuple(found)

    def size(self, file: str) -> Figure | None:
        """Bytes of a file, None where it is missing."""
        path = self.root / file
        return Figure(path.stat().st_size, file) if path.is_file() else None
