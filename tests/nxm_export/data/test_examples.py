"""Task data: every format gives the same examples, and every malformed file is refused with its line."""

from __future__ import annotations

import gzip
import json
import random
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nxm_export.contract.tasks import TASKS
from nxm_export.data.columns import Columns
from nxm_export.data.examples import Examples, class_names, encode, load_raw, with_classes, with_scores
from nxm_export.data.features import pad, sorted_batches
from nxm_export.data.label_kinds import load_labelled
from nxm_export.data.texts import read_texts
from nxm_export.data.tokenization import load_tokenizer
from nxm_export.errors import ArtifactError, DataError, Notice
from tests.support import tiny

ROWS = [("a good film", "it said so", "1"), ('the "plot" is dull', "two words", "0"), ("fine, new", "ünï → 字", "1")]


def write(tmp_path: Path, name: str, content: str | bytes) -> str:
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return str(file)


def tsv(rows: Sequence[tuple[str, ...]], header: str = "sentence1\tsentence2\tlabel", end: str = "\n") -> str:
    return end.join([header, *("\t".join(row) for row in rows)]) + end


def csv_text(rows: Sequence[tuple[str, ...]], end: str = "\n") -> str:
    quoted = [",".join('"' + cell.replace('"', '""') + '"' for cell in row) for row in rows]
    return end.join(["sentence1,sentence2,label", *quoted]) + end


def jsonl(rows: Sequence[tuple[str, ...]]) -> str:
    return "".join(json.dumps({"sentence1": a, "sentence2": b, "label": int(c)}) + "\n" for a, b, c in rows)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("d.tsv", tsv(ROWS)),
        ("crlf.tsv", tsv(ROWS, end="\r\n")),
        ("bom.tsv", "\ufeff" + tsv(ROWS)),
        ("no-end.tsv", tsv(ROWS).rstrip("\n")),
        ("blank.tsv", tsv(ROWS).replace("\nthe", "\n\nthe")),
        ("D.TSV", tsv(ROWS)),
        ("d.csv", csv_text(ROWS)),
        ("crlf.csv", csv_text(ROWS, end="\r\n")),
        ("bom.csv", "\ufeff" + csv_text(ROWS)),
        ("quoted-header-bom.csv", "\ufeff" + csv_text(ROWS).replace("sentence1,", '"sentence1",', 1)),
        ("d.jsonl", jsonl(ROWS)),
        ("d.json", jsonl(ROWS)),
        ("bom.jsonl", "\ufeff" + jsonl(ROWS)),
        ("blank.jsonl", jsonl(ROWS).replace("\n", "\n\n")),
        ("array.json", json.dumps([json.loads(line) for line in jsonl(ROWS).splitlines()], indent=1)),
        ("array.jsonl", "\n[" + ",\n".join(jsonl(ROWS).splitlines()) + "]"),
        ("d.tsv.gz", gzip.compress(tsv(ROWS).encode(), mtime=0)),
        ("d.CSV.GZ", gzip.compress(csv_text(ROWS).encode(), mtime=0)),
        ("d.jsonl.gz", gzip.compress(jsonl(ROWS).encode(), mtime=0)),
    ],
)
def test_every_format_gives_the_same_examples(tmp_path: Path, name: str, content: str | bytes) -> None:
    raw = load_raw(write(tmp_path, name, content), "train")
    assert list(zip(raw.texts, raw.pairs or [], raw.labels, strict=True)) == ROWS


def test_parquet_gives_the_same_examples(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow", reason="reading Parquet needs pyarrow (the extra `parquet`)")
    import pyarrow.parquet as parquet

    columns = {"sentence1": [r[0] for r in ROWS], "sentence2": [r[1] for r in ROWS], "label": [int(r[2]) for r in ROWS]}
    parquet.write_table(pa.table(columns), tmp_path / "d.parquet")
    raw = load_raw(str(tmp_path / "d.parquet"), "train")
    assert list(zip(raw.texts, raw.pairs or [], raw.labels, strict=True)) == ROWS
    parquet.write_table(pa.table({**columns, "label": [1.0, None, 0.0]}), tmp_path / "null.parquet")
    with pytest.raises(DataError, match=r"null\.parquet: row 1: column 'label' is missing"):
        load_raw(str(tmp_path / "null.parquet"), "train")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "d.parquet").read_bytes()[:-40])
    with pytest.raises(DataError, match="not a readable Parquet file"):
        load_raw(str(tmp_path / "cut.parquet"), "train")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"pip install 'nxm-export\[parquet\]'"):
        load_raw(write(tmp_path, "d.parquet", b"PAR1"), "train")


def test_quotes_in_tsv_are_text(tmp_path: Path) -> None:
    """GLUE's files have lone quotes; a CSV reader with quoting would swallow lines up to the next one."""
    content = 'sentence\tlabel\n" The film\t1\nit \'s "good\t0\n'
    assert load_raw(write(tmp_path, "d.tsv", content), "train").texts == ['" The film', "it 's \"good"]


def test_csv_fields_may_hold_commas_quotes_and_line_ends(tmp_path: Path) -> None:
    content = 'text,label\n"a, ""b""\nc",1\nplain,0\n'
    raw = load_raw(write(tmp_path, "d.csv", content), "train")
    assert raw.texts == ['a, "b"\nc', "plain"]
    assert raw.places[1].endswith("d.csv:4")  # the line of the file, not the number of the row


@given(
    st.lists(
        st.tuples(
            st.text(st.characters(exclude_characters="\t\n\r", exclude_categories=["Cs"]), min_size=1),
            st.sampled_from("01"),
        ),
        min_size=1,
    )
)
def test_any_text_survives_tsv(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]) -> None:
    file = write(tmp_path_factory.getbasetemp(), "any.tsv", tsv(rows, header="sentence\tlabel"))
    assert list(zip(*(lambda raw: (raw.texts, raw.labels))(load_raw(file, "train")), strict=True)) == rows


@given(st.lists(st.tuples(st.text(st.characters(exclude_categories=["Cs"])), st.sampled_from("01")), min_size=1))
def test_any_text_survives_jsonl(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]) -> None:
    lines = [json.dumps({"text": text, "label": label}, ensure_ascii=False) for text, label in rows]
    file = write(tmp_path_factory.getbasetemp(), "any.jsonl", "\n".join(lines))
    assert load_raw(file, "train").texts == [text for text, _ in rows]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.tsv", "", "empty file, or an empty first line; the first line must name the columns"),
        ("d.csv", "", "empty file"),
        ("d.tsv", "\n\n", "empty file"),
        ("d.jsonl", "", "no examples in it; the file is empty or has only a header"),
        ("d.jsonl", "\n \n", "no examples in it"),
        ("d.tsv", "sentence\tlabel\n", "no examples in it; the file is empty or has only a header"),
        ("d.csv", "sentence,label\n", "no examples in it"),
        ("d.tsv", "sentence\tlabel\na\t1\nb\n", "d.tsv:3: 1 columns where the header has 2 (sentence, label)"),
        ("d.tsv", "sentence\tlabel\r\na\t1\r\nb\tc\t1\r\n", "d.tsv:3: 3 columns where the header has 2"),
        ("d.csv", "sentence,label\na,b,1\n", "d.csv:2: 3 columns where the header has 2"),
        ("d.csv", 'sentence,label\na,1\n"b,1\n', "d.csv:3: malformed line (unexpected end of data)"),
        ("d.csv", 'sentence,label\n"a"b,1\n', "d.csv:2: malformed line"),
        ("d.tsv", "sentence\tlabel\tlabel\na\t1\t0\n", "d.tsv:1: column 'label' is named twice"),
        (
            "d.tsv",
            "txt1\tscore1\na\t1\n",
            "none of the usual text columns (sentence1, question, question1, premise, text1, query, text",
        ),
        (
            "d.tsv",
            "sentence\tx\na\t1\n",
            "none of the usual label columns (label, labels, score, relevance) among sentence, x; "
            "name it with --label-column",
        ),
        (
            "d.tsv",
            b"sentence\tlabel\nok\t1\ncaf\xe9\t1\n",
            "d.tsv:3: not UTF-8; convert the file, for example with iconv",
        ),
        ("d.csv", b"sentence,label\nok,1\ncaf\xe9,1\n", "d.csv:3: not UTF-8"),
        ("d.jsonl", b'{"text": "caf\xe9", "label": 1}\n', "d.jsonl:1: not UTF-8"),
        ("d.tsv", "sentence\tlabel\na\t1\n".encode("utf-16"), "d.tsv:1: not UTF-8"),
        ("d.tsv", "sentence\tlabel\na\t\n", "d.tsv:2: the label is missing ('')"),
        ("d.tsv", "sentence\tlabel\na\tNaN\n", "d.tsv:2: the label is missing ('NaN')"),
        ("d.jsonl", '{"text": "a", "label": 1}\n[1]\n', "d.jsonl:2: not a JSON object; one object a line"),
        ("d.jsonl", '{"text": "a", "label": 1}\n{"text": \n', "d.jsonl:2: not valid JSON"),
        (
            "d.jsonl",
            '{"text": "a", "label": 1, "label": 0}\n',
            "d.jsonl:1: not valid JSON (key 'label' stands there twice",
        ),
        ("d.json", '[{"text": "a",\n "label": 1}', "d.json: not valid JSON"),
        ("d.json", '[{"text": "a", "label": 1}, 3]', "d.json: item 2: not a JSON object"),
        ("d.jsonl", "[" * 100_000 + "\n", "d.jsonl: not valid JSON"),
        ("d.jsonl", '{"text": "a", "label": 1}\n{"text": "b"}\n', "d.jsonl:2: column 'label' is missing in this row"),
        ("d.jsonl", '{"text": "a", "label": 1}\n{"label": 1}\n', "d.jsonl:2: column 'text' is missing in this row"),
        ("d.jsonl", '{"text": null, "label": 1}\n', "d.jsonl:1: column 'text' is missing in this row"),
        ("d.jsonl", '{"text": ["a"], "label": 1}\n', "d.jsonl:1: column 'text' holds ['a'], which is no text"),
        ("d.jsonl", '{"text": 5, "label": 1}\n', "d.jsonl:1: column 'text' holds 5, which is no text"),
        ("d.jsonl", '{"text": "\\ud800", "label": 1}\n', "d.jsonl:1: column 'text' holds half a surrogate pair"),
        ("d.jsonl", '{"text": "a", "label": {"x": 1}}\n', "d.jsonl:1: label {'x': 1} is neither a name nor a number"),
        ("d.jsonl", '{"text": "a", "label": NaN}\n', "d.jsonl:1: the label is missing (nan)"),
        ("d.txt", "sentence\tlabel\na\t1\n", "d.txt:1: a tab in a text; .txt is one text a line. Name a table .tsv"),
        ("d.txt", "a warm film\n", "none of the usual label columns (label, labels, score, relevance) among text"),
        ("d.txt", b"a\n\xff\n", "d.txt:2: not UTF-8"),
        ("d.conll", "Rome B-LOC\n", "d.conll: .conll is a token and its tag a line, for --task token-class"),
        ("d.xml", "sentence\tlabel\na\t1\n", "unknown format .xml; use .tsv, .csv, .jsonl, .json, .parquet"),
        ("d.tsv.gz", "sentence\tlabel\na\t1\n", "d.tsv.gz: cannot be unpacked (Not a gzipped file"),
        ("d.tsv.gz", gzip.compress(b"sentence\tlabel\na\t1\n", mtime=0)[:-3], "d.tsv.gz: cannot be unpacked"),
        ("data", "sentence\tlabel\na\t1\n", "unknown format without suffix"),
    ],
)
def test_a_malformed_file_is_refused_with_its_place(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    with pytest.raises(DataError) as caught:
        load_raw(write(tmp_path, name, content), "train")
    assert message in str(caught.value)


@pytest.mark.parametrize("source", ["nowhere.tsv", ".", "glue"])
def test_a_path_that_is_no_file_is_refused_with_the_choices(tmp_path: Path, source: str) -> None:
    with pytest.raises(
        DataError, match=r"(no such file|a directory, not a file); give a \.tsv.* or a GLUE task \(cola"
    ):
        load_raw(str(tmp_path / source), "train")


def test_a_glue_name_without_network_says_what_to_do() -> None:
    with pytest.raises(DataError, match=r"GLUE task 'cola' cannot be fetched from the hub .* give the file"):
        load_raw("cola", "train")


@pytest.mark.parametrize(
    ("names", "asked", "used"),
    [
        ("sentence label", Columns(), ("sentence", None)),
        ("text label", Columns(), ("text", None)),
        ("sentence1 sentence2 label", Columns(), ("sentence1", "sentence2")),
        ("question sentence label", Columns(), ("question", "sentence")),  # QNLI
        ("question1 question2 label", Columns(), ("question1", "question2")),  # QQP
        ("premise hypothesis label", Columns(), ("premise", "hypothesis")),  # MNLI
        ("text text_pair label", Columns(), ("text", "text_pair")),  # as transformers names its arguments
        ("sentence1 label", Columns(), ("sentence1", None)),
        ("body sentence2 label", Columns(text="body"), ("body", None)),
        ("sentence1 sentence2 label", Columns(text="sentence1"), ("sentence1", "sentence2")),
        ("sentence other label", Columns(pair="other"), ("sentence", "other")),
        ("a b sentence label", Columns("a", "b"), ("a", "b")),
    ],
)
def test_the_usual_columns_are_found_in_pairs(
    tmp_path: Path, names: str, asked: Columns, used: tuple[str, str | None]
) -> None:
    row = [f"in {name}" if name != "label" else "1" for name in names.split()]
    raw = load_raw(write(tmp_path, "d.tsv", "\t".join(names.split()) + "\n" + "\t".join(row) + "\n"), "dev", asked)
    assert raw.texts == [f"in {used[0]}"]
    assert raw.pairs == (None if used[1] is None else [f"in {used[1]}"])


@pytest.mark.parametrize("asked", [Columns(text="nope"), Columns(pair="nope"), Columns(label="nope")])
def test_a_column_that_is_asked_for_and_missing_is_named(tmp_path: Path, asked: Columns) -> None:
    with pytest.raises(DataError, match="no column 'nope'; it has sentence, label"):
        load_raw(write(tmp_path, "d.tsv", "sentence\tlabel\na\t1\n"), "train", asked)


@pytest.mark.parametrize("asked", [Columns(text="label"), Columns(pair="label"), Columns(label="sentence")])
def test_a_column_is_no_label_and_text_at_once(tmp_path: Path, asked: Columns) -> None:
    with pytest.raises(DataError, match="cannot be two of text, second text and label"):
        load_raw(write(tmp_path, "d.tsv", "sentence\tlabel\na\t1\n"), "train", asked)


def test_an_empty_second_column_is_no_pair(tmp_path: Path) -> None:
    """Mirrors of GLUE write single-sentence tasks with an empty sentence2."""
    raw = load_raw(write(tmp_path, "d.tsv", "sentence1\tsentence2\tlabel\na\t\t1\nb\t\t0\n"), "train")
    assert raw.pairs is None


@pytest.mark.parametrize(
    ("header", "cells", "said"),
    [
        ("text\treply\tlabel", ("a film", "the answer", "1"), "reply"),
        ("text\treply\tnotes\tlabel", ("a film", "the answer", "of one", "1"), "notes, reply"),
        ("text\tid\tlabel", ("a film", "film-3", "1"), None),
        ("text\tempty\tlabel", ("a film", "  ", "1"), None),
        ("text\tlabel", ("a film", "quite good"), None),
        ("text\ttext2\treply\tlabel", ("a film", "it is", "the answer", "1"), None),
    ],
)
def test_a_column_that_looks_like_a_second_text_and_is_not_read_is_said(
    tmp_path: Path, header: str, cells: tuple[str, ...], said: str | None
) -> None:
    file = write(tmp_path, "d.tsv", header + "\n" + 2 * ("\t".join(cells) + "\n"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_raw(file, "train")
        read_texts(file, Columns(), TASKS["classification"])
    expected = f"nothing is read from {said}, which looks like text; name it with --pair-column"
    assert [str(one.message).startswith(f"{file}: {expected}") for one in caught] == ([True, True] if said else [])


def test_no_column_is_said_to_be_unread_that_was_asked_for(tmp_path: Path) -> None:
    file = write(tmp_path, "d.tsv", "text\treply\tverdict\na film\tthe answer\tquite good\n")
    alone = write(tmp_path, "alone.tsv", "text\tverdict\na film\tquite good\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_raw(file, "train", Columns(pair="reply", label="verdict"))
        read_texts(file, Columns(pair="reply"), TASKS["classification"])
        load_raw(alone, "train", Columns(label="verdict"))
        read_texts(alone, Columns(label="verdict"), TASKS["classification"])
        read_texts(file, Columns(), TASKS["token-classification"])  # reads one text


def labels(tmp_path: Path, *texts: str) -> Any:
    return load_raw(write(tmp_path, "d.tsv", tsv([("x", label) for label in texts], header="text\tlabel")), "train")


def test_class_names_are_sorted_as_numbers_where_they_are(tmp_path: Path) -> None:
    assert class_names(labels(tmp_path, "10", "9", "-1", "pos", "neg")) == ["-1", "9", "10", "neg", "pos"]
    assert class_names(labels(tmp_path, "01", "1", "--5", "-")) == ["01", "1", "-", "--5"]


def test_a_class_is_the_same_however_its_number_is_written(tmp_path: Path) -> None:
    assert labels(tmp_path, "1", "1.0", " 1 ", "1.5").labels == ["1", "1", "1", "1.5"]


def test_one_class_only_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="only one class, '1'; a classifier needs at least two"):
        class_names(labels(tmp_path, "1", "1", "1"))


def test_scores_given_to_a_classifier_are_recognized(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is this a regression"):
        class_names(labels(tmp_path, *[f"{i / 7:.4f}" for i in range(120)]))


def test_a_label_outside_the_classes_has_its_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"d\.tsv:3: label 'maybe' is none of the model's classes \['no', 'yes'\]"):
        with_classes(labels(tmp_path, "yes", "maybe"), {"no": 0, "yes": 1})


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("bad", "is not a finite number in plain digits, such as 2.5; fix the row, or is this a classification"),
        *((text, "is not a finite number") for text in ("inf", "Infinity", "1e999", "1_0", "１０", "0x1")),
    ],
)
def test_a_score_that_is_none_has_its_line(tmp_path: Path, label: str, message: str) -> None:
    with pytest.raises(DataError, match=rf"d\.tsv:3: label '{label}' {message}"):
        with_scores(labels(tmp_path, "0.5", label))
    assert with_scores(labels(tmp_path, "0.5", "-3")).labels == [0.5, -3.0]


def test_a_split_and_a_sample_keep_every_example_once() -> None:
    examples = Examples([f"t{i}" for i in range(20)], [f"p{i}" for i in range(20)], list(range(20)), "x")
    rest, held_out = examples.split(5, seed=3)
    assert sorted([*rest.labels, *held_out.labels]) == list(range(20))
    assert len(held_out) == 5
    assert all(
        t[1:] == p[1:] == str(label) for t, p, label in zip(rest.texts, rest.pairs or [], rest.labels, strict=True)
    )
    assert examples.sample(7, seed=1).labels == sorted(examples.sample(7, seed=1).labels)
    assert examples.sample(99, seed=1) is examples


def test_tokens_and_pairs_are_what_the_tokenizer_says() -> None:
    examples = Examples(["good film", "a"], ["very long story", "bad"], [1, 0], "x")
    samples = encode(tiny.tokenizer(), examples, 6, ("input_ids", "attention_mask", "token_type_ids"))
    assert [len(sample["input_ids"]) for sample in samples] == [6, 5]  # [CLS] and two [SEP] stay, words are cut
    assert samples[1]["token_type_ids"] == [0, 0, 0, 1, 1]
    batch = pad(samples, pad_id=9)
    assert batch["input_ids"].dtype == np.int64
    assert batch["input_ids"][1, -1] == 9
    assert batch["attention_mask"].tolist() == [[1] * 6, [1] * 5 + [0]]
    assert "labels" not in batch
    assert pad(samples, 0, length=8)["input_ids"].shape == (2, 8)


@pytest.mark.parametrize(("pairs", "length"), [(None, 2), (["very long story"], 3)])
def test_a_length_with_no_room_for_text_is_refused(pairs: list[str] | None, length: int) -> None:
    """Below it, the tokenizers library would return the whole text, not truncated at all."""
    examples = Examples(["good film"], pairs, [1], "x")
    with pytest.raises(DataError, match=f"max length {length} leaves no room for text beside {length} special tokens"):
        encode(tiny.tokenizer(), examples, length, ("input_ids", "attention_mask"))
    assert len(encode(tiny.tokenizer(), examples, length + 1, ("input_ids",))[0]["input_ids"]) == length + 1


def test_batches_hold_every_sample_once_and_the_longest_first() -> None:
    lengths = random.Random(0).choices(range(1, 30), k=50)
    batches = sorted_batches([{"input_ids": [0] * n} for n in lengths], 8)
    assert sorted(i for batch in batches for i in batch) == list(range(50))
    flat = [lengths[i] for batch in batches for i in batch]
    assert flat == sorted(flat, reverse=True)


@given(st.lists(st.integers(0, 9000), max_size=40), st.integers(1, 40), st.integers(1, 20_000))
def test_no_batch_has_more_samples_or_tokens_than_allowed(lengths: list[int], size: int, tokens: int) -> None:
    batches = sorted_batches([{"input_ids": [0] * n} for n in lengths], size, tokens)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert 1 <= len(batch) <= size
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= tokens


def test_short_samples_are_batched_by_their_number_alone() -> None:
    assert [len(batch) for batch in sorted_batches([{"input_ids": [0] * 512}] * 70, 32)] == [32, 32, 6]
    assert [len(batch) for batch in sorted_batches([{"input_ids": [0] * 8192}] * 5, 32)] == [2, 2, 1]


@pytest.mark.parametrize(("content", "message"), [(None, "is missing"), ("{}", "not a readable tokenizer")])
def test_a_missing_or_foreign_tokenizer_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ArtifactError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("classification", {"text": "a", "label": "\ud800"}, "column 'label' holds half a surrogate pair"),
        ("multi-label", {"text": "a", "label": ["\ud800"]}, "column 'label' holds half a surrogate pair"),
        ("multi-label", {"text": "a", "label": "[" * 3000}, r"labels '\[+'?: not valid JSON"),
        ("multi-label", {"text": "a", "label": "[1]x"}, "not valid JSON"),
        ("token-classification", {"tokens": ["a", None], "tags": ["O", "B-X"]}, "column 'tokens' is missing"),
        ("token-classification", {"tokens": ["a", ["b"]], "tags": ["O", "B-X"]}, "neither a name nor a number"),
        (
            "question-answering",
            {"question": "a", "context": "b", "answers": [{"text": "b", "answer_start": "9" * 5000}]},
            "is no character number",
        ),
    ],
)
def test_cells_that_hold_no_label_are_refused_with_their_line(
    tmp_path: Path, task: str, row: dict[str, object], message: str
) -> None:
    file = write(tmp_path, "d.jsonl", json.dumps(row) + "\n")
    with pytest.raises(DataError, match=rf"d\.jsonl:1: .*{message}"):
        load_labelled(file, "train", Columns(), TASKS[task])


def test_numbers_among_tokens_and_tags_are_written_as_labels_are(tmp_path: Path) -> None:
    """Parquet made by other tools has floats for whole numbers."""
    file = write(tmp_path, "d.jsonl", json.dumps({"tokens": ["a", 7], "tags": [0, 1.0]}) + "\n")
    raw = load_labelled(file, "train", Columns(), TASKS["token-classification"])
    assert (raw.tokens, raw.labels) == ([("a", "7")], [("0", "1")])


def test_a_label_with_more_digits_than_a_number_has_is_a_name(tmp_path: Path) -> None:
    assert class_names(labels(tmp_path, "9" * 5000, "2", "1")) == ["1", "2", "9" * 5000]


def test_texts_of_a_file_that_are_cut_are_said() -> None:
    examples = Examples(["a film", "the film of two good actor"], None, [0, 1], "dev.tsv")
    with warnings.catch_warnings():
        warnings.simplefilter("error", Notice)
        encode(tiny.tokenizer(), examples, 8, ("input_ids",), says_cuts=True)
        encode(tiny.tokenizer(), examples, 7, ("input_ids",))  # a request to a server
    with pytest.warns(Notice, match=r"^dev\.tsv: 1 of 2 texts are longer than 7 tokens, and cut there$"):
        encode(tiny.tokenizer(), examples, 7, ("input_ids",), says_cuts=True)
