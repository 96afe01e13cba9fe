"""Labels of a data file and the classes of a head: by name, by number, by a map, and what is no label at all."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom
from seqeval.metrics import f1_score as seqeval_f1

from nxm_export.contract.tasks import TASKS
from nxm_export.data.columns import Columns
from nxm_export.data.examples import Examples, encode
from nxm_export.data.features import label_array
from nxm_export.data.label_kinds import Classes, classes_of, labelled, load_labelled
from nxm_export.data.label_order import require_label_order
from nxm_export.data.metrics import metric_named
from nxm_export.data.token_labels import NO_LABEL, joined, scored_tags, training_labels
from nxm_export.errors import DataError, Notice
from tests.support import tiny

TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")


def write(directory: Path, rows: Sequence[dict[str, Any]], name: str = "d.jsonl") -> str:
    file = directory / name
    file.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return str(file)


def read(
    file: str, task: str, head: Sequence[str] | None = None, label_map: dict[str, str] | None = None
) -> tuple[Examples, Classes]:
    raw = load_labelled(file, "train", Columns(label_map=label_map or {}), TASKS[task], head)
    classes = classes_of(raw, TASKS[task], head)
    assert classes is not None
    return labelled(raw, TASKS[task], classes), classes


def texts(*labels: Any, key: str = "label") -> list[dict[str, Any]]:
    return [{"text": f"t{i}", key: label} for i, label in enumerate(labels)]


class TestNumbers:
    @settings(max_examples=30, deadline=None)
    @given(rows=st.lists(st.lists(st.integers(0, len(TAGS) - 1), min_size=1, max_size=6), min_size=1, max_size=5))
    def test_tags_as_numbers_score_as_their_names_do(
        self, tmp_path_factory: pytest.TempPathFactory, rows: list[list[int]]
    ) -> None:
        directory = tmp_path_factory.getbasetemp()
        words = [[tiny.WORDS[i] for i, _ in enumerate(row)] for row in rows]
        numbers = [{"tokens": w, "ner_tags": row} for w, row in zip(words, rows, strict=True)]
        names = [{"tokens": w, "tags": [TAGS[i] for i in row]} for w, row in zip(words, rows, strict=True)]
        scores = []
        for data in (numbers, names):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Notice)
                examples, classes = read(write(directory, data), "token-classification", TAGS)
            labels = label_array(encode(tiny.tokenizer(), examples, 48, ("input_ids",)))
            logits = np.eye(len(TAGS))[np.maximum(labels, 0)]
            scores.append(metric_named("entity_f1", classes.names)(logits, labels))
        assert scores == [float(any(map(any, rows)))] * 2

    def test_the_mapping_is_said_and_names_win(self, tmp_path: Path) -> None:
        file = write(tmp_path, texts(0, 1, 1))
        with pytest.warns(Notice, match=r"labels are numbers, .* 0 is 'good', 1 is 'bad'"):
            examples, classes = read(file, "classification", ("good", "bad"))
        assert (examples.labels, classes.numbered, classes.names) == ([0, 1, 1], True, ("good", "bad"))
        examples, classes = read(file, "classification", ("1", "0"))
        assert (examples.labels, classes.numbered) == ([1, 0, 0], False), "numbers that are names are names"
        examples, classes = read(write(tmp_path, texts("bad", "good")), "classification", ("good", "bad"))
        assert (examples.labels, classes.numbered) == ([1, 0], False)

    def test_a_map_says_what_numbers_stand_for(self, tmp_path: Path) -> None:
        file = write(tmp_path, texts(0, 1, 1))
        examples, classes = read(file, "classification", ("good", "bad"), {"0": "bad", "1": "good"})
        assert (examples.labels, classes.numbered) == ([1, 0, 0], False)
        tags = write(tmp_path, [{"tokens": ["a", "b"], "ner_tags": [0, 1]}], "t.jsonl")
        examples, classes = read(tags, "token-classification", None, {"0": "O", "1": "B-X"})
        assert (examples.labels, classes.names) == ([[0, 1]], ("O", "B-X"))
        with pytest.raises(DataError, match="no label is 'x', as --label-map says; it has 0, 1"):
            read(file, "classification", None, {"x": "bad"})
        with pytest.raises(DataError, match="task regression has no classes that labels could stand for"):
            load_labelled(file, "train", Columns(label_map={"0": "x"}), TASKS["regression"])

    @pytest.mark.parametrize("hits", [61, 77, 78, 79, 100, 200])
    def test_fewer_hits_than_guessing_would_have_are_refused(self, hits: int) -> None:
        """Against the sum of the binomial distribution."""
        labels = np.zeros(200, int)
        logits = np.eye(2)[(np.arange(200) >= hits).astype(int)]
        if binom.cdf(hits, 200, 0.5) >= 0.001:
            require_label_order(logits, labels, ("a", "b"), "d")
            return
        with pytest.raises(DataError, match=rf"d: .* \(0=a,1=b\) they are right for {hits} of 200 .* fewer"):
            require_label_order(logits, labels, ("a", "b"), "d")

    def test_padding_is_no_hit_and_no_miss(self) -> None:
        labels = np.full((20, 10), NO_LABEL)
        labels[:, 0] = 1
        require_label_order(np.eye(2)[np.ones((20, 9), int)], labels, ("O", "B-X"), "d")
        with pytest.raises(DataError, match="0 of 20 that were looked at"):
            require_label_order(np.eye(2)[np.zeros((20, 9), int)], labels, ("O", "B-X"), "d")


class TestNoLabel:
    def test_rows_with_label_minus_one_are_left_out(self, tmp_path: Path) -> None:
        file = write(tmp_path, texts(-1, 1, 0, "-1", 1))
        with pytest.warns(Notice, match="2 of 5 rows are left out"):
            examples, classes = read(file, "classification")
        assert (examples.texts, examples.labels, classes.names) == (["t1", "t2", "t4"], [1, 0, 1], ("0", "1"))

    def test_minus_one_is_a_class_where_it_is_said(self, tmp_path: Path) -> None:
        file = write(tmp_path, texts(-1, 1, 1))
        with pytest.raises(DataError, match=r"1 of 3 labels are -1, .* --label-map=-1=NAME"):
            read(file, "classification")
        examples, classes = read(file, "classification", None, {"-1": "bad"})
        assert (examples.labels, classes.names) == ([1, 0, 0], ("1", "bad"))
        examples, classes = read(write(tmp_path, texts(-1, 0, 1)), "classification", None, {"-1": "-1"})
        assert (examples.labels, classes.names) == ([0, 1, 2], ("-1", "0", "1"))

    @pytest.mark.parametrize("task", ["classification", "multi-label"])
    def test_minus_one_is_a_class_where_the_head_has_it(self, task: str, tmp_path: Path) -> None:
        rows = texts(*((["-1"], ["1"], ["0"]) if task == "multi-label" else (-1, 1, 0)))
        examples, classes = read(write(tmp_path, rows), task, ("0", "-1", "1"))
        one_hot = [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
        assert examples.labels == (one_hot if task == "multi-label" else [1, 2, 0])
        assert not classes.numbered

    def test_tags_without_a_label_are_not_scored(self, tmp_path: Path) -> None:
        rows = [{"tokens": ["a", "the", "film"], "tags": [-100, 0, 1]}]
        with pytest.warns(Notice):
            examples, _ = read(write(tmp_path, rows), "token-classification", ("O", "B-X"))
        (sample,) = encode(tiny.tokenizer(), examples, 48, ("input_ids",))
        assert sample["labels"] == [NO_LABEL, NO_LABEL, 0, 1, NO_LABEL]

    def test_a_map_names_whole_numbers_as_the_file_writes_them(self, tmp_path: Path) -> None:
        rows = [{"sentence": "good", "label": "1.00"}, {"sentence": "bad", "label": "0"}]
        label_map = {"1.00": "positive", "0": "negative"}
        _, classes = read(write(tmp_path, rows), "classification", label_map=label_map)
        assert set(classes.names) == {"negative", "positive"}

    def test_classes_named_as_whole_numbers_with_a_point_are_meant_by_them(self, tmp_path: Path) -> None:
        """Read as 1, they were taken for the class with that index, the second."""
        head = ("1.00", "2.00", "3.00")
        for labels, expected in (
            (["1.00", "2.00", "1.00"], [0, 1, 0]),
            ([1, 2.0, "3.00"], [0, 1, 2]),
            (["3", "3"], [2, 2]),
        ):
            rows = [{"sentence": f"film {i}", "label": label} for i, label in enumerate(labels)]
            examples, classes = read(write(tmp_path, rows), "classification", head)
            assert (examples.labels, classes.numbered) == (expected, False)
        rows = [{"sentence": "film", "label": "4.00"}]
        with pytest.raises(DataError, match=r"label '4' is none of the model's classes \['1\.00', '2\.00', '3\.00'"):
            read(write(tmp_path, rows), "classification", head)

    def test_a_class_named_minus_one_with_a_point_is_a_class(self, tmp_path: Path) -> None:
        rows = [{"sentence": f"film {i}", "label": label} for i, label in enumerate(["-1.00", "1.00", "-1.00"])]
        examples, _ = read(write(tmp_path, rows), "classification", ("-1.00", "1.00"))
        assert examples.labels == [0, 1, 0]

    def test_second_texts_are_texts(self, tmp_path: Path) -> None:
        rows = [{"sentence1": "", "sentence2": "good", "label": 1}, {"sentence1": "", "sentence2": "bad", "label": 0}]
        examples, _ = read(write(tmp_path, rows), "classification")
        assert examples.pairs == ["good", "bad"]

    def test_a_column_without_any_text_is_refused(self, tmp_path: Path) -> None:
        rows = [{"sentence": " ", "review": "good", "label": 1}, {"sentence": "", "review": "bad", "label": 0}]
        with pytest.raises(DataError, match=r"d\.jsonl: every text is empty; name the column that has them"):
            read(write(tmp_path, rows), "classification")
        raw = load_labelled(write(tmp_path, rows), "train", Columns(text="review"), TASKS["classification"])
        assert raw.texts == ["good", "bad"]

    def test_a_whole_number_is_one_class_however_it_is_written(self, tmp_path: Path) -> None:
        examples, classes = read(write(tmp_path, texts("1.00", 1.0, "1.", 1, "2", "1.0.0")), "classification")
        assert (examples.labels, classes.names) == ([0, 0, 0, 0, 1, 2], ("1", "2", "1.0.0"))

    @pytest.mark.parametrize("task", ["classification", "regression"])
    def test_an_infinite_number_is_no_label(self, task: str, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"d\.jsonl:2: label inf is no finite number"):
            read(write(tmp_path, texts(1, float("inf"))), task)

    def test_minus_one_is_a_score(self, tmp_path: Path) -> None:
        raw = load_labelled(write(tmp_path, texts(-1, 0.5)), "train", Columns(), TASKS["regression"])
        assert labelled(raw, TASKS["regression"], None).labels == [-1.0, 0.5]


class TestScores:
    def test_fractions_that_are_classes_are_said(self, tmp_path: Path) -> None:
        file = write(tmp_path, texts("0.5", 1, "2.50", "0.5"))
        with pytest.warns(
            Notice, match="labels are numbers such as 0.5, and each of 3 is taken for a class of its own"
        ):
            assert read(file, "classification")[0].labels == [1, 0, 2, 1]
        with pytest.raises(DataError, match=r"label '0.5' is none .* these labels; scores are for --task regression"):
            read(file, "classification", ("0", "1"))


class TestPairs:
    def test_single_texts_are_said_before_missing_scores(self, tmp_path: Path) -> None:
        single, unscored = (tmp_path / "a.txt", write(tmp_path, [{"sentence1": "a", "sentence2": "b"}]))
        single.write_text("a film\n", encoding="utf-8")
        with pytest.raises(DataError, match="task embedding is scored on pairs of texts, and there is one text a row"):
            load_labelled(str(single), "dev", Columns(), TASKS["embedding"])
        with pytest.raises(DataError, match="none of the usual label columns"):
            load_labelled(unscored, "dev", Columns(), TASKS["embedding"])

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            (
                {"query": "a", "positives": ["b"], "negatives": []},
                "column 'query' goes with document or passage, and",
            ),
            ({"text;label": "a;1"}, r"one column, 'text;label'; .csv has commas between columns, and .tsv tabs"),
        ],
    )
    def test_columns_that_are_no_pair_are_named(self, row: dict[str, Any], message: str, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=message):
            load_labelled(write(tmp_path, [row]), "dev", Columns(), TASKS["reranking"])


class TestSeveral:
    @pytest.mark.parametrize("rows", [([1, 0, 1], [0, 0, 0], [1, 1, 0]), ("[1, 0, 1]", "[0,0,0]", "1,1,0")])
    def test_rows_of_zeros_and_ones_say_which_classes_hold(self, tmp_path: Path, rows: tuple[Any, ...]) -> None:
        file = write(tmp_path, texts(*rows, key="labels"))
        expected = [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 0.0]]
        examples, classes = read(file, "multi-label")
        assert (examples.labels, classes.names) == (expected, ("0", "1", "2"))
        with pytest.warns(Notice, match="0 is 'x', 1 is 'y', 2 is 'z'"):
            assert read(file, "multi-label", ("x", "y", "z"))[0].labels == expected
        with pytest.raises(DataError, match="rows of 3 times 0 or 1, and the model has 2 classes"):
            read(file, "multi-label", ("x", "y"))

    def test_one_semicolon_says_for_all_rows_that_commas_belong_to_names(self, tmp_path: Path) -> None:
        file = write(tmp_path, texts("sad, cold;good", "sad, cold", " good ", "", key="labels"))
        examples, classes = read(file, "multi-label")
        assert classes.names == ("good", "sad, cold")
        assert examples.labels == [[1.0, 1.0], [0.0, 1.0], [1.0, 0.0], [0.0, 0.0]]
        alone = write(tmp_path, texts("sad, cold", "good", key="labels"), "dev.jsonl")
        assert read(alone, "multi-label", classes.names)[0].labels == [[0.0, 1.0], [1.0, 0.0]], "a name of the head"
        assert read(alone, "multi-label")[1].names == ("cold", "good", "sad")

    def test_commas_between_names_in_a_file_of_semicolons_are_refused(self, tmp_path: Path) -> None:
        """They were read as such a while ago, and would make a class of every combination now."""
        cells = ("good;cold", "sad", "good,sad")
        file = write(tmp_path, texts(*cells, key="labels"))
        with pytest.raises(DataError, match=r":3: label 'good,sad' reads like several labels with ',' between them"):
            read(file, "multi-label")
        assert read(file, "multi-label", ("good", "cold", "sad", "good,sad"))[0].labels[2] == [0.0, 0.0, 0.0, 1.0]

    @pytest.mark.parametrize(
        ("cells", "message"),
        [
            (("good", "good|cold"), r"'good\|cold' reads like several labels with '\|' between them; put ; between"),
            (("good", "cold, sad|good"), r"'cold, sad\|good' reads like several labels with '\|' between them"),
            (("good", "cold good", "cold"), "'cold good' reads like several labels with ' ' between them"),
        ],
    )
    def test_other_marks_between_names_are_refused(self, cells: tuple[str, ...], message: str, tmp_path: Path) -> None:
        """They would be classes of their own: one for every combination."""
        file = write(tmp_path, texts(*cells, key="labels"))
        with pytest.raises(DataError, match=f":2: label {message}"):
            read(file, "multi-label")
        lists = write(tmp_path, texts(*([cell] for cell in cells), key="labels"), "lists.jsonl")
        assert read(lists, "multi-label")[1].names == tuple(sorted(cells)), "a list leaves no doubt"
        assert read(file, "multi-label", sorted(cells))[1].names == tuple(sorted(cells)), "nor does a head"
        other = write(tmp_path, texts(*cells, "good;cold", key="labels"), "other.jsonl")
        assert set(cells) <= set(read(other, "multi-label")[1].names), "nor does a mark that is one"

    def test_a_column_for_every_class_is_refused_with_what_to_do(self, tmp_path: Path) -> None:
        file = write(
            tmp_path, [{"text": "a", "good": 1, "cold": 0, "id": 7}, {"text": "b", "good": 0, "cold": 0, "id": 8}]
        )
        with pytest.raises(DataError, match="cold, good look like a column for every class: for --task multi-label"):
            read(file, "multi-label")

    def test_lists_of_class_numbers_are_still_names(self, tmp_path: Path) -> None:
        file = write(tmp_path, texts([0, 1], [1], [0, 2], key="labels"))
        assert read(file, "multi-label")[0].labels == [[1.0, 1.0, 0.0], [0.0, 1.0, 0.0], [1.0, 0.0, 1.0]]


class TestNames:
    def test_many_intents_with_two_texts_each_are_classes(self, tmp_path: Path) -> None:
        rows = texts(*[f"intent_{i // 2}" for i in range(300)])
        assert len(read(write(tmp_path, rows), "classification")[1].names) == 150
        assert len(read(write(tmp_path, texts(*[i // 2 for i in range(300)])), "classification")[1].names) == 150

    @pytest.mark.parametrize("labels", [[f"{i / 7:.3f}" for i in range(300)], [str(i) for i in range(150)]])
    def test_scores_are_no_classes(self, tmp_path: Path, labels: list[str]) -> None:
        with pytest.raises(DataError, match="is this a regression"):
            read(write(tmp_path, texts(*labels)), "classification")

    def test_names_of_a_head_with_space_around_them_are_found(self, tmp_path: Path) -> None:
        file = write(tmp_path, texts("bad", "good "))
        assert read(file, "classification", ("good ", " bad"))[0].labels == [1, 0]
        with pytest.raises(DataError, match="label 'good' is none of the model's classes"):
            read(file, "classification", ("good ", " good", "bad"))


@pytest.mark.parametrize("second", ["text2", "text_pair"])
def test_a_second_text_is_optional_in_a_row(second: str, tmp_path: Path) -> None:
    rows = [{"label": 1, "text": "a"}, {"text": "a film", "label": 0, second: "b"}, {"text": "the", "label": 1}]
    examples, _ = read(write(tmp_path, rows), "classification")
    assert examples.pairs == ["", "b", ""]
    samples = encode(tiny.tokenizer(), examples, 48, ("input_ids", "token_type_ids"))
    assert [sample["token_type_ids"] for sample in samples] == [[0, 0, 0], [0, 0, 0, 0, 1, 1], [0, 0, 0]]


def erasing() -> Any:
    """A tokenizer that leaves nothing of zero-width characters, as those of BERT do."""
    from tokenizers import normalizers

    made = tiny.tokenizer()
    made.normalizer = normalizers.BertNormalizer(clean_text=True, strip_accents=True, lowercase=True)
    return made


class TestErasedTokens:
    def test_they_are_scored_as_outside(self, tmp_path: Path) -> None:
        row = {"tokens": ["a", "\u200b", "\ufe0f", "film"], "tags": ["B-PER", "O", "B-LOC", "I-LOC"]}
        examples, _ = read(write(tmp_path, [row]), "token-classification", TAGS)
        with pytest.warns(Notice, match="leaves nothing of 2 of 4 tokens"):
            (sample,) = encode(erasing(), examples, 48, ("input_ids",))
        labels = label_array([sample])
        assert labels[0, :4].tolist() == [NO_LABEL, 1, 4, NO_LABEL]
        logits = np.eye(len(TAGS))[[0, 1, 4, 0]][None]
        true, predicted = ["B-PER", "O", "B-LOC", "I-LOC"], ["B-PER", "O", "O", "I-LOC"]
        expected = seqeval_f1([true], [predicted])
        assert expected == pytest.approx(0.5), "the place is found without its first token, which is another one"
        assert metric_named("entity_f1", TAGS)(logits, labels) == expected
        assert training_labels(labels, 6).tolist() == [[NO_LABEL, 1, 4, NO_LABEL, NO_LABEL, NO_LABEL]]

    @settings(max_examples=40, deadline=None)
    @given(
        sentence=st.lists(
            st.tuples(st.sampled_from(["a", "film", "\u200b", "\u00a0", "the\u200bplot"]), st.integers(0, 4)),
            min_size=1,
            max_size=9,
        ),
        predicted=st.lists(st.integers(0, 4), min_size=9, max_size=9),
    )
    def test_the_score_is_that_of_all_tokens(self, sentence: list[tuple[str, int]], predicted: list[int]) -> None:
        tokens, tags = [token for token, _ in sentence], [tag for _, tag in sentence]
        examples = Examples([joined(tokens)], None, [tags], "x", tokens=[tokens])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Notice)
            (sample,) = encode(erasing(), examples, 48, ("input_ids",))
        labels, said = label_array([sample]), iter(predicted)
        there = [0 if token in ("\u200b", "\u00a0") else next(said) for token in tokens]
        logits = np.zeros((1, len(sample["input_ids"]), 5))
        seen = iter([tag for token, tag in zip(tokens, there, strict=True) if token not in ("\u200b", "\u00a0")])
        for position in np.flatnonzero(labels[0] >= 0):
            logits[0, position, next(seen)] = 1.0
        expected = seqeval_f1([[TAGS[i] for i in tags]], [[TAGS[i] for i in there]], zero_division=0)
        assert metric_named("entity_f1", TAGS)(logits, labels) == pytest.approx(expected)

    def test_their_place_is_among_the_tokens_that_have_a_label(self) -> None:
        tokens, tags = ["a", "film", "\u200b", "plot"], [NO_LABEL, 1, 2, 2]
        with pytest.warns(Notice, match="leaves nothing of 1 of 4"):
            (sample,) = encode(
                erasing(), Examples([joined(tokens)], None, [tags], "x", tokens=[tokens]), 48, ("input_ids",)
            )
        labels = label_array([sample])
        predicted = np.array([0, 0, 1, 2, 0])  # [CLS] a film plot [SEP]
        assert scored_tags(predicted, labels[0], TAGS) == (
            ["B-PER", "O", "I-PER"],
            ["B-PER", "I-PER", "I-PER"],
        )

    def test_tokens_that_are_cut_off_are_not_scored(self) -> None:
        tokens = ["a", "\u200b", "film", "\u200b", "the", "plot"]
        examples = Examples([joined(tokens)], None, [[0, 1, 2, 3, 4, 0]], "x", tokens=[tokens])
        with pytest.warns(Notice, match="leaves nothing of 1 of 6"):
            (sample,) = encode(erasing(), examples, 4, ("input_ids",))
        labels = sample["labels"]
        assert isinstance(labels, list)
        assert labels[:4] == [NO_LABEL, 0, 2, NO_LABEL]
        assert len(labels) == 5, "the one between the two words that are left"


class TestSchemes:
    @settings(max_examples=40, deadline=None)
    @given(parts=st.lists(st.tuples(st.sampled_from([None, "PER", "LOC"]), st.integers(1, 3)), min_size=1, max_size=6))
    def test_bilou_bioes_and_bio_mark_the_same_entities(
        self, tmp_path_factory: pytest.TempPathFactory, parts: list[tuple[str | None, int]]
    ) -> None:
        def tags(begin: str, inside: str, last: str, only: str) -> list[str]:
            made: list[str] = []
            for name, length in parts:
                if name is None:
                    made += ["O"] * length
                else:
                    marks = [only] if length == 1 else [begin, *[inside] * (length - 2), last]
                    made += [f"{mark}-{name}" for mark in marks]
            return made

        bio, directory = tags("B", "I", "I", "B"), tmp_path_factory.getbasetemp()
        words = [tiny.WORDS[i] for i in range(len(bio))]
        head = ("O", *(f"{mark}-{name}" for mark in "BILU" for name in ("PER", "LOC")))
        for scheme in ("BILU", "BIES"):
            rows = [{"tokens": words, "tags": tags(*scheme)}]
            examples, _ = read(write(directory, rows), "token-classification", TAGS)
            assert examples.labels == [[TAGS.index(tag) for tag in bio]], "to a head of BIO they are BIO"
            examples, _ = read(write(directory, rows), "token-classification", head)
            labels = label_array(encode(tiny.tokenizer(), examples, 48, ("input_ids",)))
            logits = np.zeros((*labels.shape, len(head)))
            for position, tag in zip(np.flatnonzero(labels[0] >= 0), bio, strict=True):
                logits[0, position, head.index(tag)] = 1.0  # the same entities, said in BIO
            expected = float(any(name is not None for name, _ in parts))
            assert metric_named("entity_f1", head)(logits, labels) == expected


def test_sentences_without_tokens_are_left_out(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"tokens": ["a"], "tags": ["B-X"]},
        {"tokens": [], "tags": []},
        {"tokens": ["the"], "tags": ["O"]},
    ]
    examples, _ = read(write(tmp_path, rows), "token-classification")
    assert (examples.texts, examples.labels) == (["a", "the"], [[1], [0]])
    with pytest.raises(DataError, match="no sentence has a token"):
        read(write(tmp_path, rows[1:2]), "token-classification")


def test_a_token_with_spaces_has_one_tag(tmp_path: Path) -> None:
    rows = [{"tokens": ["the film", "plot"], "tags": ["B-LOC", "O"]}]
    examples, _ = read(write(tmp_path, rows), "token-classification", TAGS)
    (sample,) = encode(tiny.tokenizer(), examples, 48, ("input_ids",))
    assert sample["labels"] == [NO_LABEL, 3, NO_LABEL, 0, NO_LABEL]
