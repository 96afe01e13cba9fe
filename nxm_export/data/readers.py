"""Rows of data files: TSV, CSV, JSON, Parquet or CoNLL, each row with the place that a complaint about it names.

TSV is read as GLUE writes it: no quoting, a tab always separates. CSV follows the usual quoting rules. JSON is an
object a line, or one array of objects. CoNLL has several names (`TOKEN_FORMATS`); where whole texts are wanted,
``.txt`` is a text a line (`read_table`). Files are UTF-8, with or without a byte order mark, with Unix or Windows line
ends, and any of them may be packed by gzip (``.csv.gz``).
"""

from __future__ import annotations

import csv
import gzip
import io
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from nxm_export.errors import DataError
from nxm_export.storage.json_files import parse_json

TOKEN_FORMATS = (".conll", ".bio", ".iob", ".iob2", ".txt")  # a token a line, its tag in the last column
FORMATS = (".tsv", ".csv", ".jsonl", ".json", ".parquet", *TOKEN_FORMATS)
TAG = re.compile(r"O|[BIESLU]-.*\S")  # of the IOB schemes, BIOES and BILOU among them
_PACKED = ".gz"
_LONGEST_FIELD = 2**31 - 1  # characters of a CSV field; Python's own limit is 128 kB


def format_of(path: Path) -> str:
    """The suffix that says how a file is written, in lower case, without that of its packing."""
    return (path.with_suffix("") if path.suffix.lower() == _PACKED else path).suffix.lower()


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a data file, unpacked where it is packed; raises `DataError` where that cannot be."""
    try:
        with cast("BinaryIO", gzip.open(path, "rb")) if path.suffix.lower() == _PACKED else path.open("rb") as stream:
            yield stream
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be unpacked ({error}); the file is truncated, or no gzip file") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def no_file(path: Path) -> str:
    """What is at a path that is no file, for an error."""
    return "a directory, not a file" if path.is_dir() else "not a file" if path.exists() else "no such file"


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, object]]]:
    """(place, row) of a data file; the place is ``file:line``. Raises `DataError`."""
    suffix = format_of(path)
    if suffix not in FORMATS:
        raise DataError(
            f"{path}: unknown format {suffix or 'without suffix'}; use {', '.join(FORMATS)}, packed ({_PACKED}) or not"
        )
    if suffix == ".parquet":
        with opened(path) as packed:
            yield from _parquet_rows(path, packed)
        return
    with _text_of(path, newline="" if suffix == ".csv" else "\n") as stream:
        if suffix in (".jsonl", ".json"):
            yield from _json_rows(path, stream)
        elif suffix == ".tsv":
            yield from _delimited_rows(path, _tsv_lines(stream))
        elif suffix == ".csv":
            yield from _delimited_rows(path, _csv_lines(path, stream))
        else:
            yield from _conll_rows(path, stream)


@contextmanager
def _text_of(path: Path, newline: str = "\n") -> Iterator[io.TextIOWrapper]:
    """A data file as text. Lines end at \\n, as editors count them; a \\r before it belongs to the line end. Raises
    `DataError` with the line that is not UTF-8."""
    try:
        with opened(path) as packed:
            yield io.TextIOWrapper(packed, encoding="utf-8-sig", newline=newline)
    except UnicodeDecodeError as error:
        raise DataError(f"{_undecodable(path)}: not UTF-8; convert the file, for example with iconv") from error


def read_table(path: Path) -> Iterator[tuple[str, dict[str, object]]]:
    """(place, row) of a file of whole texts: as `read_rows`, but ``.txt`` is a text a line, in the column ``text``, and
    the other `TOKEN_FORMATS` are refused. Raises `DataError`."""
    suffix = format_of(path)
    if suffix == ".txt":
        yield from _text_rows(path)
        return
    if suffix in TOKEN_FORMATS:
        raise DataError(
            f"{path}: {suffix} is a token and its tag a line, for --task token-classification; name a table of texts "
            ".tsv or .csv, and texts alone .txt"
        )
    yield from read_rows(path)


def _text_rows(path: Path) -> Iterator[tuple[str, dict[str, object]]]:
    """The lines of a file of texts that hold any; a tab would be a table's."""
    with _text_of(path) as stream:
        for number, line in enumerate(stream, start=1):
            if "\t" in line:
                raise DataError(
                    f"{path}:{number}: a tab in a text; .txt is one text a line. Name a table .tsv, and a file of "
                    "tokens and tags .conll"
                )
            if line.strip():
                yield f"{path}:{number}", {"text": line.strip("\r\n")}


def _undecodable(path: Path) -> str:
    """``file:line`` of the first line that is not UTF-8."""
    with opened(path) as stream:
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
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_FIELD))
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
    """The objects of JSON lines, or of one array, which may begin and end on any line."""
    lines, rows = iter(stream), 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if not rows and line.lstrip().startswith("["):
            yield from _json_array(path, "".join([line, *lines]))
            return
        rows += 1
        yield f"{path}:{number}", _json_object(line, f"{path}:{number}")


def _json_object(line: str, place: str) -> dict[str, object]:
    row = parse_json(line, place, "one object a line", DataError, foreign=True)
    if not isinstance(row, dict):
        raise DataError(f"{place}: not a JSON object; one object a line")
    return row


def _json_array(path: Path, text: str) -> Iterator[tuple[str, dict[str, object]]]:
    rows = parse_json(text, str(path), "one array of objects, or one object a line", DataError, foreign=True)
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], start=1):
        if not isinstance(row, dict):
            raise DataError(f"{path}: item {number}: not a JSON object; an array holds one object a sample")
        yield f"{path}: item {number}", row


def _conll_rows(path: Path, stream: Iterable[str]) -> Iterator[tuple[str, dict[str, object]]]:
    """Sentences of a CoNLL file: a token a line, its tag in the last column, an empty line between sentences.

    Tabs separate columns where a line has any, else spaces; no other white space does, so that a token may hold a
    no-break space, or in a file with tabs any space.
    """
    lines = list(stream)
    comments = _comments(lines)
    tokens: list[str] = []
    tags: list[str] = []
    began = 1
    for number, line in enumerate([*lines, ""], start=1):
        columns = [] if number - 1 in comments else _columns(line)
        if columns and columns[0] != "-DOCSTART-":
            if len(columns) < 2:
                raise DataError(f"{path}:{number}: {line.strip()!r} is a token without a tag; every line needs both")
            if not columns[0]:
                raise DataError(f"{path}:{number}: {line.strip()!r} is a tag without a token; every line needs both")
            began = began if tokens else number
            tokens.append(columns[0])
            tags.append(columns[-1])
        elif tokens and number - 1 not in comments:
            yield f"{path}:{began}", {"tokens": tokens, "tags": tags}
            tokens, tags = [], []


def _columns(line: str) -> list[str]:
    """The columns of a line of a CoNLL file; none where it is empty."""
    line = line.rstrip("\r\n")
    if not line.strip():
        return []
    return (
        [column.strip(" ") for column in line.rstrip("\t ").split("\t")]
        if "\t" in line
        else [column for column in line.split(" ") if column]
    )


def _comments(lines: list[str]) -> set[int]:
    """Indices of the lines that are comments: those that begin with ``#`` and have not the columns of the file's other
    lines with a tag in the last one. A token may begin with ``#``, too."""
    marked = {i: columns for i, line in enumerate(lines) if (columns := _columns(line)) and line.startswith("#")}
    if not marked:
        return set()
    others = [columns for i, line in enumerate(lines) if i not in marked and len(columns := _columns(line)) > 1]
    tags = {columns[-1] for columns in others if columns[0] != "-DOCSTART-"}
    usual = Counter(map(len, others)).most_common(1)[0][0] if others else 2
    return {
        i
        for i, columns in marked.items()
        if len(columns) != usual or not (columns[-1] in tags or TAG.fullmatch(columns[-1]))
    }


def _parquet_rows(path: Path, stream: BinaryIO) -> Iterator[tuple[str, dict[str, object]]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise DataError(
            f"{path}: reading Parquet needs pyarrow ({error}); pip install 'nxm-export[parquet]', or convert the file "
            "to CSV"
        ) from error
    source = io.BytesIO(stream.read()) if path.suffix.lower() == _PACKED else path
    try:
        names = list[str](parquet.ParquetFile(source).schema_arrow.names)
        twice = [name for name in names if names.count(name) > 1]
        rows = [] if twice else parquet.read_table(source).to_pylist()
    except Exception as error:  # pyarrow raises several kinds for a damaged file
        raise DataError(f"{path}: not a readable Parquet file ({error})") from error
    if twice:
        raise DataError(f"{path}: column {min(twice)!r} is named twice; give every column a name of its own")
    for number, row in enumerate(rows):
        yield f"{path}: row {number}", row
