"""Questions: how they are read, cut into windows, answered and scored; and every complaint names its place."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.parity.decisions import Reading
from engines.parity.tolerance import Expectation, compare_output
from nxm_export.contract.tasks import TASKS
from nxm_export.data.answer_spans import MAX_ANSWER, NO_ANSWER, Window, best_answer, best_span
from nxm_export.data.columns import Columns
from nxm_export.data.examples import Examples, encode
from nxm_export.data.features import Features, label_array
from nxm_export.data.label_kinds import labelled, load_labelled
from nxm_export.data.metrics import metric_named
from nxm_export.data.question_answering import (
    answer_scores,
    answering,
    context_mask,
    exact,
    f1,
    normalized,
    windows,
)
from nxm_export.errors import DataError, Notice
from tests.support import tiny
from tests.support.intervals import interval

TASK = TASKS["question-answering"]
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
CONTEXT = "the film with a superb actor"


def read(file: Path, text: str, columns: Columns = Columns()) -> Examples:
    file.write_text(text, encoding="utf-8")
    return labelled(load_labelled(str(file), "train", columns, TASK), TASK, None)


def squad(answers: Any, context: str = CONTEXT, **more: Any) -> str:
    question = {"id": "1", "question": "which actor", "answers": answers, **more}
    return json.dumps(
        {"version": "1.1", "data": [{"title": "x", "paragraphs": [{"context": context, "qas": [question]}]}]}
    )


class TestFiles:
    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("a.json", squad([{"text": "superb", "answer_start": 16}])),
            (
                "a.jsonl",
                json.dumps(
                    {
                        "question": "which actor",
                        "context": CONTEXT,
                        "answers": {"text": ["superb"], "answer_start": [16]},
                    }
                ),
            ),
            (
                "a.json",
                json.dumps(
                    {"question": "which actor", "context": CONTEXT, "answers": [{"text": "superb", "answer_start": 16}]}
                ),
            ),
            (
                "a.jsonl",
                json.dumps({"question": "which actor", "context": CONTEXT, "answer": "superb", "answer_start": 16}),
            ),
            ("a.csv", f"question,context,answer,answer_start\nwhich actor,{CONTEXT},superb,16\n"),
            (
                "a.csv",
                "question,context,answers\n"
                f'which actor,{CONTEXT},"{{""text"": [""superb""], ""answer_start"": [16]}}"\n',
            ),
            ("a.tsv", f"question\tcontext\tanswer\tanswer_start\nwhich actor\t{CONTEXT}\tsuperb\t16\n"),
        ],
    )
    def test_all_ways_of_writing_a_question_mean_the_same(self, tmp_path: Path, name: str, text: str) -> None:
        questions = read(tmp_path / name, text)
        assert (questions.texts, questions.pairs, questions.labels) == (["which actor"], [CONTEXT], [(("superb", 16),)])

    def test_parquet_and_other_column_names(self, tmp_path: Path) -> None:
        parquet = pytest.importorskip("pyarrow.parquet")
        arrow = pytest.importorskip("pyarrow")
        rows = {"q": ["which actor"], "c": [CONTEXT], "a": [{"text": ["superb", "a superb"], "answer_start": [16, 14]}]}
        parquet.write_table(arrow.table(rows), tmp_path / "a.parquet")
        raw = load_labelled(str(tmp_path / "a.parquet"), "dev", Columns("q", "c", "a"), TASK)
        assert raw.labels == [(("superb", 16), ("a superb", 14))]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (
                squad([{"text": "dull", "answer_start": 16}]),
                "the answer 'dull' does not stand at character 16 .* does not hold it at all",
            ),
            (
                squad([{"text": "superb", "answer_start": 15}]),
                "'superb' does not stand at character 15 .* it stands at 16",
            ),
            (squad([{"text": "superb", "answer_start": 999}]), "it stands at 16"),
            (squad([{"text": "superb", "answer_start": -1}]), "answer_start -1 is no character number"),
            (squad([{"text": "superb"}]), "answer_start None is no character number"),
            (squad([{"text": " ", "answer_start": 3}]), "an answer is empty"),
            (
                squad([{"text": "superb", "answer_start": 16}], is_impossible=True),
                "is_impossible says that there is no",
            ),
            (squad([{"text": "superb", "answer_start": 16}], context="  "), "the context is empty"),
            ('{"data": [{"paragraphs": 3}]}', "not SQuAD's JSON"),
            ('{"data": []}', "no questions in it"),
        ],
    )
    def test_a_bad_question_is_named(self, tmp_path: Path, text: str, message: str) -> None:
        with pytest.raises(DataError, match=rf"a\.json.*{message}"):
            read(tmp_path / "a.json", text)

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"question": "q", "answers": []}, "no column 'context'; it has question, answers"),
            ({"question": "q", "context": "c"}, "no column 'answer'"),
            (
                {"question": "q", "context": "c", "answers": {"text": ["c"], "answer_start": [0, 1]}},
                "two lists of one length",
            ),
            ({"question": "q", "context": "c", "answers": "[1"}, "not valid JSON"),
            ({"question": "q", "context": "c", "answers": 3}, "which is no answer"),
            ({"question": "q", "context": "c", "answers": None}, "which is no answer"),
            ({"question": "", "context": "c", "answer": "c", "answer_start": 0}, "the question is empty"),
        ],
    )
    def test_a_bad_row_is_named_by_its_line(self, tmp_path: Path, row: dict[str, Any], message: str) -> None:
        good = {"question": "q", "context": "c", "answers": {"text": ["c"], "answer_start": [0]}}
        with pytest.raises(DataError, match=rf"a\.jsonl:2: .*{message}"):
            read(tmp_path / "a.jsonl", f"{json.dumps(good)}\n{json.dumps(row)}\n")

    def test_a_file_that_is_not_there(self) -> None:
        with pytest.raises(DataError, match="no such file"):
            load_labelled("squad", "train", Columns(), TASK)


def example(words: int, begin: int, count: int, question: str = "which film") -> Examples:
    """A context of numbered-looking words whose answer is `count` words from word `begin` on."""
    context = [tiny.WORDS[i % len(tiny.WORDS)] for i in range(words)]
    start = len(" ".join(context[:begin])) + (begin > 0)
    return Examples([question], [" ".join(context)], [((" ".join(context[begin : begin + count]), start),)], "x")


class TestWindows:
    @pytest.mark.parametrize("family", ["bert", "roberta"])
    @pytest.mark.parametrize(
        ("words", "begin", "count"), [(9, 0, 1), (30, 29, 1), (30, 9, 4), (41, 20, 3), (30, 3, 12)]
    )
    def test_windows_are_those_of_a_slow_obvious_version(self, family: str, words: int, begin: int, count: int) -> None:
        """One word is one token here, so a window is a slice of the list of words."""
        tokenizer, length, overlap = tiny.tokenizer(family), 16, 4
        (question,), (context,) = (given := example(words, begin, count)).texts, given.pairs or []
        room = length - len(question.split()) - tokenizer.num_special_tokens_to_add(True)
        samples = windows(tokenizer, given, length, INPUTS[:2], overlap)
        ids = [tokenizer.token_to_id(word) for word in context.split()]
        starts = [0]
        while starts[-1] + room < words:
            starts.append(starts[-1] + room - overlap)
        assert len(samples) == len(starts)
        for sample, at in zip(samples, starts, strict=True):
            first = len(question.split()) + (3 if family == "roberta" else 2)
            part = ids[at : at + room]
            assert sample["input_ids"][first : first + len(part)] == part
            assert len(sample["input_ids"]) == first + len(part) + 1 <= length
            window = Window.unpack(label_array([sample])[0])
            assert (window.first, window.text) == (first, " ".join(context.split()[at : at + room]))
            inside = at <= begin and begin + count <= at + len(part)
            expected = [first + begin - at, first + begin - at + count - 1] if inside else [NO_ANSWER, NO_ANSWER]
            assert sample["span"] == expected
            if inside:
                assert window.answer(*expected) == " ".join(context.split()[begin : begin + count])
            assert sample["group"] == 0

    def test_the_overlap_is_at_most_half_a_window_unless_it_is_given(self) -> None:
        room = 16 - 2 - 3
        samples = windows(tiny.tokenizer(), example(40, 0, 1), 16, INPUTS)
        texts = [Window.unpack(row).text.split() for row in label_array(samples)]
        assert texts[0][room - room // 2 :] == texts[1][: room // 2]

    @pytest.mark.parametrize("overlap", [11, 20, -1])
    def test_an_overlap_that_leaves_nothing_new_is_refused(self, overlap: int) -> None:
        with pytest.raises(DataError, match=rf"question 1 .*hold 11 tokens of its context and cannot share {overlap}"):
            windows(tiny.tokenizer(), example(40, 0, 1), 16, INPUTS, overlap)

    def test_a_question_longer_than_the_window_is_refused(self) -> None:
        with pytest.raises(DataError, match=r"x: question 1 \('film film.*leave no room for context in 16"):
            windows(tiny.tokenizer(), example(5, 0, 1, "film " * 13), 16, INPUTS)

    def test_a_context_without_tokens_is_refused(self) -> None:
        given_ = Examples(["which film"], ["\u3000"], [(("\u3000", 0),)], "x")
        with pytest.raises(DataError, match="its context has no tokens"):
            windows(tiny.tokenizer(), given_, 16, INPUTS)


def unit(text: str, answers: list[str], first: int = 3) -> np.ndarray:
    """The label of a window whose tokens are the words of `text`."""
    ends = list(itertools.accumulate(len(word) + 1 for word in text.split()))
    starts = [0, *ends[:-1]]
    window = Window(first, text, starts, [end - 1 for end in ends], answers)
    return np.asarray(label_array([{"input_ids": [], "labels": window.pack()}])[0])


class TestScores:
    @pytest.mark.parametrize(
        ("predicted", "gold", "em", "score"),
        [
            ("The Cat!", "cat", 1, 1),
            ("a cat sat", "the cat sat down", 0, 0.8),  # 2 common, of 2 and 3
            ("cat cat", "cat", 0, 2 / 3),  # each word as often as it occurs
            ("dog", "cat", 0, 0),
            ("U.S.A.", "usa", 1, 1),
            ("new  york", "New York", 1, 1),
            ("an", "the", 1, 0),  # nothing is left of either: the same, with no word in common
            ("theatre", "the atre", 0, 0),  # an article is a word
        ],
    )
    def test_exact_match_and_f1_by_hand(self, predicted: str, gold: str, em: float, score: float) -> None:
        assert exact(predicted, gold) == em
        assert f1(predicted, gold) == pytest.approx(score)

    def test_the_best_span_is_that_of_all_pairs(self) -> None:
        rng = np.random.default_rng(0)
        for count, longest in itertools.product((1, 2, 7, 40), (1, 3, MAX_ANSWER)):
            window = Window(5, "", list(range(count)), list(range(1, count + 1)), [])
            logits = rng.normal(size=(60, 2))
            pairs = [(i, j) for i in range(5, 5 + count) for j in range(i, min(i + longest, 5 + count))]
            expected = max(pairs, key=lambda pair: logits[pair[0], 0] + logits[pair[1], 1])
            assert best_span(logits, window, longest)[1:] == expected

    def test_a_question_position_or_padding_never_wins(self) -> None:
        label, logits = unit("good film", ["good film"]), np.zeros((1, 9, 2))
        logits[:, [0, 1, 2, 5, 8]] = 100.0
        logits[0, 3, 0] = logits[0, 4, 1] = 1.0
        assert answer_scores(logits, label[None]).tolist() == [[1.0, 1.0]]
        assert context_mask(label[None], 9).tolist() == [[False] * 3 + [True] * 2 + [False] * 4]

    def test_a_question_is_scored_once_by_the_best_of_its_windows_and_gold_answers(self) -> None:
        texts = ["a dull film", "superb actor", "long story"]
        packed = [unit(texts[0], ["superb"]), unit(texts[1], ["superb", "superb actor"]), unit(texts[2], ["story"])]
        labels = np.zeros((3, max(map(len, packed))), np.uint8)
        for row, label in zip(labels, packed, strict=True):
            row[: len(label)] = label
        logits = np.zeros((3, 8, 2))
        logits[0, 4] = 1.0  # dull
        logits[1, 3, 0], logits[1, 4, 1] = 2.0, 2.0  # superb actor: the higher sum
        logits[2, 3, 0], logits[2, 4, 1] = 1.0, 1.0  # long story: half of it
        groups = np.array([7, 7, 9])
        rows = answer_scores(logits, labels, (), groups)
        np.testing.assert_allclose(rows, [[1.0, 1.0], [0.0, 2 / 3]])
        assert metric_named("squad_f1", (), groups)(logits, labels) == pytest.approx(5 / 6)
        assert metric_named("exact_match", (), groups)(logits, labels) == 0.5
        six = np.concatenate([groups, groups + 10, groups + 20])
        low, high = interval("squad_f1", np.tile(logits, (3, 1, 1)), np.tile(labels, (3, 1)), groups=six)
        # Questions are drawn as wholes: six, of which all are of one half once in 64.
        assert low == pytest.approx((1 + 5 * 2 / 3) / 6)
        assert high == pytest.approx((5 + 2 / 3) / 6)


class TestNoAnswer:
    """SQuAD 2.0: that there is none is an answer."""

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("a.json", squad([], is_impossible=True)),
            ("a.jsonl", json.dumps({"question": "q", "context": "c", "answers": {"text": [], "answer_start": []}})),
            ("a.jsonl", json.dumps({"question": "q", "context": "c", "answers": []})),
            ("a.csv", "question,context,answer,answer_start\nq,c,,\n"),
            ("a.tsv", "question\tcontext\tanswers\nq\tc\t[]\n"),
        ],
    )
    def test_a_question_without_an_answer_is_read_and_said(self, tmp_path: Path, name: str, text: str) -> None:
        with pytest.warns(Notice, match=r"1 of 1 questions have no answer; all are scored as in SQuAD 2\.0"):
            examples = read(tmp_path / name, text)
        assert examples.labels == [()]
        (sample,) = encode(tiny.tokenizer(), examples, 24, INPUTS)
        assert sample["span"] == [0, 0]
        assert Window.unpack(label_array([sample])[0]).nullable

    def test_where_every_question_has_an_answer_none_is_no_answer(self, tmp_path: Path) -> None:
        examples = read(tmp_path / "a.json", squad([{"text": "superb", "answer_start": 16}]))
        (sample,) = encode(tiny.tokenizer(), examples, 24, INPUTS)
        assert not Window.unpack(label_array([sample])[0]).nullable

    @given(data=st.data())
    def test_scores_are_those_of_the_published_script(self, data: st.DataObject) -> None:
        words = st.sampled_from(["the", "cat", "sat", "a", "dog"])
        text = " ".join(data.draw(st.lists(words, min_size=1, max_size=5)))
        golds = data.draw(st.lists(st.lists(words, min_size=1, max_size=3).map(" ".join), max_size=2))
        window = Window.unpack(unit(text, golds))
        label = np.frombuffer(dataclasses.replace(window, nullable=True).pack().encode(), np.uint8)
        logits = np.array(data.draw(st.lists(st.integers(-5, 5), min_size=24, max_size=24)), float).reshape(1, 12, 2)
        score, first, last = best_span(logits[0], window)
        predicted = "" if logits[0, 0].sum() > score else window.answer(first, last)
        kept = [gold for gold in golds if normalized(gold)] or [""]
        expected = [
            max(float(normalized(predicted) == normalized(gold)) for gold in kept),
            max(squad2_f1(predicted, gold) for gold in kept),
        ]
        np.testing.assert_allclose(answer_scores(logits, label[None]), [expected])

    @given(data=st.data(), threshold=st.sampled_from([-2.0, 0.0, 0.5, 3.0]))
    def test_no_answer_must_beat_the_best_span_by_more_than_the_threshold(
        self, data: st.DataObject, threshold: float
    ) -> None:
        """Half steps, so that sums are exact and equal ones occur."""
        numbers = st.integers(-8, 8).map(lambda number: number / 2)
        count = data.draw(st.integers(1, 3))
        logits = [np.array(data.draw(st.lists(numbers, min_size=16, max_size=16))).reshape(8, 2) for _ in range(count)]
        made = [Window(2, "w x y z", [0, 2, 4, 6], [1, 3, 5, 7], ["w"], 0, True, threshold) for _ in range(count)]
        spans = [
            (rows[i, 0] + rows[j, 1], made[0].text[2 * i - 4 : 2 * j - 3])
            for rows in logits
            for i in range(2, 6)
            for j in range(i, 6)
        ]
        best = max(total for total, _ in spans)
        found = best_answer(logits, made)
        assert found.none == (min(rows[0].sum() for rows in logits) - best > threshold)
        text = found.text(made)
        assert text == "" if found.none else (best, text) in spans
        labels = label_array([{"input_ids": [], "labels": window.pack()} for window in made])
        groups = np.zeros(count, int)
        (matched, _) = answer_scores(np.stack(logits), labels, (), groups)[0]
        assert matched == (text == "w")

    def test_a_model_that_may_give_none_is_scored_so_on_any_questions(self, tmp_path: Path) -> None:
        examples = read(tmp_path / "a.json", squad([{"text": "superb", "answer_start": 16}]))
        for threshold, nullable in ((None, False), (1.5, True)):
            (sample,) = encode(tiny.tokenizer(), answering(examples, threshold), 24, INPUTS)
            window = Window.unpack(label_array([sample])[0])
            assert (window.nullable, window.threshold) == (nullable, threshold or 0.0)
            assert context_mask(label_array([sample]), 24)[0, NO_ANSWER] == nullable

    def test_no_answer_wins_only_where_it_does_in_every_window(self) -> None:
        packed: list[Features] = []
        for text in ("a dull film", "superb actor"):
            window = dataclasses.replace(Window.unpack(unit(text, [])), nullable=True)
            packed.append({"input_ids": [], "labels": window.pack()})
        logits, groups = np.zeros((2, 8, 2)), np.array([0, 0])
        logits[:, 0] = 3.0
        assert answer_scores(logits, label_array(packed), (), groups).tolist() == [[1.0, 1.0]]
        logits[1, 0], logits[1, 3] = 0.0, 0.5
        assert answer_scores(logits, label_array(packed), (), groups).tolist() == [[0.0, 0.0]]


def squad2_f1(predicted: str, gold: str) -> float:
    """As evaluate-v2.0.py computes it."""
    ours, theirs = normalized(predicted).split(), normalized(gold).split()
    common = sum((collections.Counter(ours) & collections.Counter(theirs)).values())
    if not ours or not theirs:
        return float(ours == theirs)
    if not common:
        return 0.0
    precision, recall = common / len(ours), common / len(theirs)
    return 2 * precision * recall / (precision + recall)


class TestParity:
    def test_decisions_are_positions_of_the_context(self) -> None:
        expected = np.array([[9.0, 1.0, 3.0, 2.9, 0.0], [9.0, 5.0, 1.0, 0.0, 0.0]])
        allowed = np.array([[False, True, True, True, False], [False, True, True, False, False]])
        lengths, noise = [4, 3], np.full_like(expected, 0.1)
        actual = expected.copy()
        actual[0, 0], actual[0, 3] = 8.95, 3.1  # the question token stays first everywhere, and is not asked
        expectation, reading = Expectation(expected, noise, noise), Reading("span", lengths, allowed)
        report = compare_output("start_logits", expectation, actual, reading, quantized=True)
        assert (report.agreement, report.flips, report.unexcused_flips) == (0.5, 1, 0)
        (flip,) = report.worst_flips
        assert (flip.sample, flip.position, flip.reference, flip.engine) == (0, (), 2, 3)
        assert flip.margin == pytest.approx(0.1)
        actual[1, 1], actual[1, 2] = 1.0, 5.0
        report = compare_output("start_logits", expectation, actual, reading, quantized=True)
        assert report.unexcused_flips == 1
        assert not report.passed


class TestTraining:
    @pytest.fixture(scope="class")
    def model(self, tmp_path_factory: pytest.TempPathFactory) -> Any:
        from compressors.models import load_model, resolve

        path = tiny.write_model("bert", tmp_path_factory.mktemp("spans"), head="question-answering", layers=1)
        return load_model(resolve(path), TASK).eval()

    def batch(self) -> dict[str, Any]:
        from compressors.training.trainer import collate

        examples = [example(6, 1, 2), example(9, 4, 1)]
        samples = [windows(tiny.tokenizer(), one, 24, INPUTS)[0] for one in examples]
        return collate(samples, 0)

    def test_the_loss_is_that_of_each_question_without_padding(self, model: Any) -> None:
        import torch

        batch = self.batch()
        assert batch["labels"].tolist() == [[5, 6], [8, 8]]
        with torch.no_grad():
            outputs, total = model(**batch), 0.0
        for i in range(2):
            real = batch["attention_mask"][i].bool()
            with torch.no_grad():
                alone = model(**{name: array[i : i + 1, real] for name, array in batch.items() if name != "labels"})
            for k, logits in enumerate((alone.start_logits, alone.end_logits)):
                total -= float(logits.double().log_softmax(-1)[0, batch["labels"][i, k]])
        assert float(outputs.loss) == pytest.approx(total / 4, rel=1e-5)  # float32 sums
        assert torch.equal(outputs.logits[1, :, 0], outputs.start_logits[1])

    def test_student_and_teacher_are_held_together_along_the_sequence(self, model: Any) -> None:
        """Against divergences of each row without its padding; the search's divergence is their sum."""
        import torch

        from compressors.training.output_divergence import divergence, real_logits, spans_loss

        batch = self.batch()
        with torch.no_grad():
            expected = model(**batch).logits
        actual = expected + torch.randn(expected.shape, generator=torch.Generator().manual_seed(0))
        actual = actual.masked_fill(~batch["attention_mask"].bool()[..., None], -1e4)
        total = 0.0
        for i, k in itertools.product(range(2), range(2)):
            real = batch["attention_mask"][i].bool()
            p, q = (logits.double()[i, real, k].log_softmax(-1) for logits in (expected, actual))
            total += float((p.exp() * (p - q)).sum())
        assert float(spans_loss(actual, expected)) == pytest.approx(total / 4, rel=1e-4)  # float32 sums
        first, second = (real_logits(logits, batch["attention_mask"], "span") for logits in (expected, actual))
        assert divergence(first, second, "span") == pytest.approx(total, rel=1e-6)
