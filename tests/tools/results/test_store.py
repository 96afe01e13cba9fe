"""The files of records: what is damaged is refused, and what is added is one line."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from nxm_export.errors import ArtifactError, NxmError
from tests.support.results_book import LABELS, Book, compressed, flipped


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (f'"predictions": "{LABELS}"', '"predictions": "01"', "other dev sentences"),
        ('"seed": 0', '"seed": 0.5', "rte.jsonl:1: seed: "),
        ('"seconds": 5.0', '"seconds": NaN', "NaN is not a JSON number"),
        ('"seconds": 5.0', '"seconds": 5.0, "colour": "red"', "unknown field colour"),
        ("nxm-result/2", "nxm-result/1", "schema nxm-result/1 is not the nxm-result/2"),
        ("}", "", "rte.jsonl:1: not valid JSON"),
    ],
)
def test_damaged_records_are_refused_by_line_and_field(book: Book, old: str, new: str, message: str) -> None:
    book.write("rte", "dense", 0, LABELS, LABELS)
    store = book.store("rte")
    text = store.file.read_text()
    assert old in text
    store.file.write_text(text.replace(old, new))
    with pytest.raises(NxmError, match=message):
        store.labelled_records()


def test_damaged_labels_are_refused(book: Book) -> None:
    book.write("rte", "dense", 0, LABELS, LABELS)
    file = book.store("rte").labels_file
    file.write_text(file.read_text().replace(LABELS, flipped(LABELS, 0)))
    with pytest.raises(ArtifactError, match="sha256"):
        book.store("rte").labels()


def test_a_new_record_is_one_new_line_at_its_place(book: Book) -> None:
    for row, seed in (("nxm-2:4+W4-slow", 0), ("obs-2:4+W4", 1), ("dense", 0)):
        book.write("rte", row, seed, LABELS, LABELS)
    before = book.store("rte").file.read_text().splitlines()
    book.write("rte", "obs-2:4+W4", 0, LABELS, LABELS, compressed=compressed(kl=0.25))
    after = book.store("rte").file.read_text().splitlines()
    assert [line for line in after if line in before] == before
    assert [(record.row, record.seed) for record in book.store("rte").records()] == [
        ("dense", 0), ("obs-2:4+W4", 0), ("obs-2:4+W4", 1), ("nxm-2:4+W4-slow", 0),
    ]  # fmt: skip
    assert len({tuple(json.loads(line)) for line in after}) == 1, "every line has the same keys"


def test_processes_that_write_at_the_same_time_lose_nothing(book: Book) -> None:
    seeds = range(12)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda seed: book.write("rte", "dense", seed, LABELS, LABELS), seeds))
    assert [record.seed for record in book.store("rte").records()] == list(seeds)
