"""Data files of any format: what was written is what is read, sentence by sentence and row by row."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nxm_export.data.readers import FORMATS, TOKEN_FORMATS, no_file, read_rows, read_table
from nxm_export.errors import DataError

Row = dict[str, str]
Sentence = list[tuple[str, str]]


def rows_of(directory: Path, name: str, content: str | bytes) -> list[dict[str, object]]:
    file = directory / name
    content = content.encode("utf-8") if isinstance(content, str) else content
    file.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return [row for _, row in read_rows(file)]


def as_csv(rows: list[Row]) -> str:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def as_parquet(rows: list[Row]) -> bytes:
    pa = pytest.importorskip("pyarrow", reason="reading Parquet needs pyarrow (the extra `parquet`)")
    import pyarrow.parquet as parquet

    stream = io.BytesIO()
    parquet.write_table(pa.table({name: [row[name] for row in rows] for name in rows[0]}), stream)
    return stream.getvalue()


WRITERS: dict[str, Callable[[list[Row]], str | bytes]] = {
    "parquet": as_parquet,
    "csv": as_csv,
    "jsonl": lambda rows: "\n".join(json.dumps(row, ensure_ascii=False) for row in rows),
    "json": lambda rows: json.dumps(rows, indent=1),
    "tsv": lambda rows: "\n".join(["\t".join(rows[0]), *("\t".join(row[name] for name in rows[0]) for row in rows)]),
}
ANY = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
PLAIN = st.characters(exclude_categories=["Cs"], exclude_characters="\t\r\n\0")


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("suffix", WRITERS)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_table_of_any_format_reads_back_the_same(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, packed: str, data: st.DataObject
) -> None:
    cell = st.text(PLAIN if suffix == "tsv" else ANY, min_size=1)
    rows = data.draw(st.lists(st.fixed_dictionaries({"text": cell, "label": cell}), min_size=1, max_size=5))
    made = rows_of(tmp_path_factory.getbasetemp(), f"t.{suffix}{packed}", WRITERS[suffix](rows))
    assert made == rows


TOKEN = st.text(st.characters(exclude_categories=["Cs", "Zl", "Zp", "Zs", "Cc"]), min_size=1).filter(
    lambda token: token.strip() and not token.startswith("-DOCSTART-")
)
TAGS = st.sampled_from(["O", "B-PER", "I-PER", "B-LOC"])


@pytest.mark.parametrize("separator", [" ", "\t", " NNP x "])
@settings(max_examples=40, deadline=None)
@given(sentences=st.lists(st.lists(st.tuples(TOKEN, TAGS), min_size=1, max_size=5), min_size=1, max_size=4))
def test_sentences_read_back_the_same(
    tmp_path_factory: pytest.TempPathFactory, separator: str, sentences: list[Sentence]
) -> None:
    """Tokens that begin with # among them."""
    text = "\n\n".join("\n".join(f"{token}{separator}{tag}" for token, tag in sentence) for sentence in sentences)
    made = rows_of(tmp_path_factory.getbasetemp(), "t.conll", text.removeprefix("\ufeff"))
    assert [list(zip(row["tokens"], row["tags"], strict=True)) for row in made] == sentences  # type: ignore[call-overload]


@pytest.mark.parametrize("suffix", TOKEN_FORMATS)
def test_every_name_of_a_token_file_is_known(tmp_path: Path, suffix: str) -> None:
    assert suffix in FORMATS
    assert rows_of(tmp_path, f"t{suffix}", "Rome B-LOC\n") == [{"tokens": ["Rome"], "tags": ["B-LOC"]}]


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("10\u00a0000\tB-NUM\nEuro\tO\n", ["10\u00a0000", "Euro"]),
        ("10\u00a0000 B-NUM\nEuro O\n", ["10\u00a0000", "Euro"]),
        ("New York\tB-LOC\nis\tO\n", ["New York", "is"]),
        ("New\u3000York B-LOC\r\nis O\r\n", ["New\u3000York", "is"]),
        ("is  VBZ   O \n York\tB-LOC\t\n", ["is", "York"]),
        ("\u00a0 O\nx O\n", ["\u00a0", "x"]),
    ],
)
def test_a_token_is_whole(tmp_path: Path, text: str, tokens: list[str]) -> None:
    assert [row["tokens"] for row in rows_of(tmp_path, "t.conll", text)] == [tokens]


def test_comments_are_no_tokens_and_tokens_with_a_hash_are_no_comments(tmp_path: Path) -> None:
    text = "# sent_id = 1\n# text = # 1 in Rome\n# O\n1 O\n#Rome B-LOC\n\n#\n# newdoc\nin O\n# a remark\nRome B-LOC\n"
    assert rows_of(tmp_path, "t.conll", text) == [
        {"tokens": ["#", "1", "#Rome"], "tags": ["O", "O", "B-LOC"]},
        {"tokens": ["in", "Rome"], "tags": ["O", "B-LOC"]},
    ]
    numbers = "# id 7\n# 0\na 1\n"
    assert [row["tokens"] for row in rows_of(tmp_path, "t.conll", numbers)] == [["a"]], "0 is no tag of this file"


@pytest.mark.parametrize(("line", "message"), [("b", "'b' is a token without"), ("\tO", "is a tag without a token")])
def test_a_line_without_a_token_or_a_tag_is_named(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(DataError, match=rf"t\.conll:2: .*{message}"):
        rows_of(tmp_path, "t.conll", f"a\tO\n{line}\n")


def test_a_csv_field_may_be_longer_than_128_kilobytes(tmp_path: Path) -> None:
    long = "word " * 60_000
    assert rows_of(tmp_path, "t.csv", f'text,label\n"{long}",1\n') == [{"text": long, "label": "1"}]


def test_a_packed_file_that_is_not_utf_8_is_named_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"t\.tsv\.gz:2: not UTF-8"):
        rows_of(tmp_path, "t.tsv.gz", b"text\tlabel\ncaf\xe9\t1\n")


def test_a_text_file_of_whole_texts_is_a_text_a_line(tmp_path: Path) -> None:
    file = tmp_path / "t.txt.gz"
    file.write_bytes(gzip.compress("\ufeffa warm film\r\n\n  a cold one \u2028 and on\n".encode()))
    assert list(read_table(file)) == [
        (f"{file}:1", {"text": "a warm film"}),
        (f"{file}:3", {"text": "  a cold one \u2028 and on"}),
    ], "as editors count lines, and no other line ends than theirs"


def test_a_parquet_column_that_is_named_twice_is_refused_in_words(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow", reason="reading Parquet needs pyarrow (the extra `parquet`)")
    import pyarrow.parquet as parquet

    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array([0]), pa.array([1])], names=["text", "label", "label"])
    parquet.write_table(twice, tmp_path / "d.parquet")
    with pytest.raises(DataError, match=r"d\.parquet: column 'label' is named twice; give every column"):
        list(read_rows(tmp_path / "d.parquet"))


def test_what_is_no_file_is_called_what_it_is(tmp_path: Path) -> None:
    assert no_file(tmp_path) == "a directory, not a file"
    assert no_file(tmp_path / "nowhere") == "no such file"
    assert no_file(Path("/dev/null")) == "not a file"
