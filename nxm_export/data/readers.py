"""Rows of data files: TSV, CSV, JSON lines, Parquet or CoNLL, each row with the place that a complaint about it names.

TSV is read as GLUE writes it: no quoting, a tab always separates. CSV follows the usual quoting rules. Files are UTF-8,
with or without a byte order mark, with Unix or Windows line ends.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from nxm_export.errors import DataError

FORMATS = (".tsv", ".csv", ".jsonl", ".json", ".parquet", ".conll")


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, object]]]:
    """(place, row) of a data file; the place is ``file:line``. Raises `DataError`."""
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            yield from _parquet_rows(path)
            return
        # Lines end at \n, as editors count them; a \r before it belongs to the line end.
        with path.open(encoding="utf-8-sig", newline="" if suffix == ".csv" else "\n") as stream:
            if suffix in (".jsonl", ".json"):
                yield from _json_rows(path, stream)
            elif suffix == ".tsv":
                yield from _delimited_rows(path, _tsv_lines(stream))
            elif suffix == ".conll":
                yield from _conll_rows(path, stream)
            elif suffix == ".csv":
                yield from _delimited_rows(path, _csv_lines(path, stream))
            else:
                raise DataError(f"{path}: unknown format {suffix or 'without suffix'}; use {', '.join(FORMATS)}")
    except UnicodeDecodeError as error:
        raise DataError(f"{_undecodable(path)}: not UTF-8; convert the file, for example with iconv") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def _undecodable(path: Path) -> str:
    """``file:line`` of the first line that is not UTF-8."""
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return f"{path}:{number}"
    return str(path)


def _tsv_lines(stream: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(stream, start=1):
        yield number, line.rstrip("\r\n").split("\t") if line.rstrip("\r\n") else []


def _csv_lines(path: Path, stream: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(stream, strict=True)
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: malformed line ({error})") from error


def _delimited_rows(path: Path, lines: Iterator[tuple[int, list[str]]]) -> Iterator[tuple[str, dict[str, object]]]:
    _, first = next(lines, (0, []))
    header = [name.strip() for name in first]
    if not any(header):
        raise DataError(f"{path}: empty file, or an empty first line; the first line must name the columns")
    twice = {name for name in header if header.count(name) > 1}
    if twice:
        raise DataError(f"{path}:1: column {min(twice)!r} is named twice; give every column a name of its own")
    for number, row in lines:
        if not row:
            continue
        if len(row) != len(header):
            raise DataError(
                f"{path}:{number}: {len(row)} columns where the header has {len(header)} ({', '.join(header)})"
            )
        yield f"{path}:{number}", dict(zip(header, row, strict=True))


def _json_rows(path: Path, stream: Iterable[str]) -> Iterator[tuple[str, dict[str, object]]]:
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{number}: not JSON ({error}); one object a line") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: not a JSON object; one object a line")
        yield f"{path}:{number}", row


def _conll_rows(path: Path, stream: Iterable[str]) -> Iterator[tuple[str, dict[str, object]]]:
    """Sentences of a CoNLL file: a token a line, its tag in the last column, an empty line between sentences."""
    tokens: list[str] = []
    tags: list[str] = []
    began = 1
    for number, line in enumerate([*stream, ""], start=1):
        columns = line.split()
        if columns and columns[0] != "-DOCSTART-":
            if len(columns) < 2:
                raise DataError(f"{path}:{number}: {line.strip()!r} is a token without a tag; every line needs both")
            began = began if tokens else number
            tokens.append(columns[0])
            tags.append(columns[-1])
        elif tokens:
            yield f"{path}:{began}", {"tokens": tokens, "tags": tags}
            tokens, tags = [], []


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, object]]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise DataError(
            f"{path}: reading Parquet needs pyarrow; pip install 'nxm-export[parquet]', or convert the file to CSV"
        ) from error
    try:
        rows = parquet.read_table(path).to_pylist()
    except Exception as error:  # pyarrow raises several kinds for a damaged file
        raise DataError(f"{path}: not a readable Parquet file ({error})") from error
    for number, row in enumerate(rows):
        yield f"{path}: row {number}", row
