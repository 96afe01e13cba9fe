"""A latency table: the milliseconds of one matrix by its role and its option, and where they are from. `nxm latency`
writes it, `nxm search --latency-table` reads it; one that was written by hand has no source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nxm_export.errors import ArtifactError
from nxm_export.storage.json_files import convert, encode, parse_json, read_text, require_schema, to_json_object

LATENCY_SCHEMA = "nxm-latency/1"
_WAY_OUT = "a latency table is JSON, {role: {option: milliseconds}}, or what `nxm latency` writes"


@dataclass(frozen=True)
class LatencySource:
    """Where times are from: in words (`measured`), and what made them.

    `device` is the CPU or GPU, `threads` those of a CPU engine (None on a GPU), `batch` and `sequence` the shape in
    rows and tokens, `engines` the sha256 of each engine file, and `versions` those of what ran, the machine's included.
    `matrices` are the sizes (out, in) of a matrix by role: the table is for models with such matrices alone.
    """

    measured: str
    backend: str
    device: str
    threads: int | None
    batch: int
    sequence: int
    engines: tuple[str, ...]
    versions: Mapping[str, str]
    model_type: str
    matrices: Mapping[str, tuple[int, int]]

    def __str__(self) -> str:
        threads = "" if self.threads is None else f", {self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"{self.measured}, at {self.batch}x{self.sequence} (batch x tokens){threads}"


@dataclass(frozen=True)
class LatencyTable:
    """Milliseconds of one use of one matrix, by role and option (``2:4+W8``); `source` is None for one by hand."""

    milliseconds: Mapping[str, Mapping[str, float]]
    source: LatencySource | None = None

    def to_dict(self) -> dict[str, object]:
        """What the file holds."""
        return {"schema": LATENCY_SCHEMA, **to_json_object(self)}

    def to_text(self) -> str:
        """The text of the file."""
        return encode(self, LATENCY_SCHEMA)


def read_latencies(file: Path) -> LatencyTable:
    """The table in a JSON file, with or without its source; raises `ArtifactError` for another file."""
    value = parse_json(read_text(file, _WAY_OUT), str(file), _WAY_OUT, ArtifactError)
    if isinstance(value, dict) and "schema" in value:
        fields = require_schema(value, LATENCY_SCHEMA, str(file), ArtifactError)
        table = convert(fields, LatencyTable, source=str(file), way_out=_WAY_OUT)
    else:
        table = LatencyTable(convert(value, dict[str, dict[str, float]], source=str(file), way_out=_WAY_OUT))
    if not table.milliseconds or not all(table.milliseconds.values()):
        raise ArtifactError(f"{file}: holds no rows of numbers by option; {_WAY_OUT}")
    return table
