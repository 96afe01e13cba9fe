"""Whole sentences among phrases, against every pair of texts compared, and what is left to train on."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nxm_export.errors import DataError
from tools.results import tasks
from tools.results.phrases import held_out, unrelated, whole_texts

TEXTS = st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=5).map(" ".join), min_size=1, max_size=12)


def contains(text: str, part: str) -> bool:
    """Word for word, the slow way."""
    words, wanted = text.split(), part.split()
    return any(words[start : start + len(wanted)] == wanted for start in range(len(words) - len(wanted) + 1))


@given(TEXTS, TEXTS)
@settings(max_examples=100, deadline=None)
def test_unrelated_is_what_neither_contains_nor_is_contained(texts: list[str], judged: list[str]) -> None:
    bare = [text.replace(" ", "") for text in judged]
    expected = [
        text
        for text in dict.fromkeys(texts)
        if not any(one in (word := text.replace(" ", "")) or word in one for one in bare)
    ]
    assert unrelated(texts, judged) == expected


def test_sets_that_part_words_and_write_brackets_in_another_way_are_seen_through() -> None:
    judged = ["It doesn't (really) work."]
    assert unrelated(["does n't -lrb- really -rrb-", "Yes , it does n't really work . So", "a film", "--"], judged) == [
        "a film"
    ]


@given(TEXTS)
@settings(max_examples=200, deadline=None)
def test_whole_is_what_no_other_text_contains(texts: list[str]) -> None:
    different = list(dict.fromkeys(texts))
    expected = [text for text in different if not any(contains(other, text) for other in different if other != text)]
    assert whole_texts(texts) == expected


@given(TEXTS, st.integers(1, 3), st.integers(0, 5))
@settings(max_examples=200, deadline=None)
def test_nothing_that_is_held_out_can_be_learned_by_heart(texts: list[str], count: int, seed: int) -> None:
    rows, rest = held_out(texts, count, seed)
    assert len(rows) == min(count, len(whole_texts(texts)))
    assert {texts[row] for row in rows} <= set(whole_texts(texts))
    inside = [any(contains(texts[row], text) for row in rows) for text in texts]
    assert rest == [row for row, is_inside in enumerate(inside) if not is_inside]
    assert held_out(texts, count, seed) == (rows, rest)


def test_words_count_and_letters_do_not() -> None:
    assert whole_texts(["art", "a party", "a  party ", "the party"]) == ["art", "a party", "the party"]


def write_phrases(place: Path, sentences: int) -> None:
    """SST-2 as shipped: sentences of three words, each with its two phrases."""
    place.mkdir()
    rows = [(f"s{number} is fine ", number % 2) for number in range(sentences)]
    rows += [(f"s{number} is ", number % 2) for number in range(sentences)]
    train = "".join(f"{text}\t{label}\n" for text, label in rows)
    (place / "train.tsv").write_text(f"sentence\tlabel\n{train}")
    (place / "dev.tsv").write_text("sentence\tlabel\nanother one\t1\n")


def test_sst_2_is_judged_on_whole_sentences_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_phrases(tmp_path / "glue", 1200)
    files = tasks.prepare(tasks.task_named("sst2"), tmp_path / "glue", tmp_path / "out")
    dev = [line.split("\t") for line in files.dev.read_text().splitlines()[1:]]
    train = [line.split("\t") for line in files.train.read_text().splitlines()[1:]]
    assert dev[0] == ["another one", "", "1"]
    assert len(dev) == 1001
    for text, _, label in dev[1:]:
        assert text.endswith(" is fine ")
        assert int(label) == int(text[1:].split()[0]) % 2
    names = {text.split()[0] for text, *_ in dev[1:]}
    assert len(train) == 400
    assert not any(text.split()[0] in names for text, *_ in train)
    said = capsys.readouterr().err
    assert "1000 whole sentences are held out (seed 0); of 2400 rows 400 are left" in said


def test_too_few_sentences_are_refused(tmp_path: Path) -> None:
    write_phrases(tmp_path / "glue", 900)
    with pytest.raises(DataError, match="900 whole sentences, and 1000 are held out"):
        tasks.prepare(tasks.task_named("sst2"), tmp_path / "glue", tmp_path / "out")
