"""Raw outputs become typed results: against slower ways to the same answer, and every tag scheme by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from nxm_export.data.answer_spans import Window
from nxm_export.data.predictions import (
    Answer,
    Embedding,
    Entity,
    Prediction,
    Word,
    of_classes,
    of_labels,
    of_scores,
    of_spans,
    of_tags,
    of_vectors,
)

TAGS = ("O", "B-PER", "I-PER", "E-PER", "S-PER", "L-PER", "U-PER", "B-LOC", "I-LOC", "L-LOC", "U-LOC")
TEXT = "Anna Maria lives in New York"


def words_of(text: str) -> list[Word]:
    made, at = [], 0
    for number, word in enumerate(text.split(" ")):
        made.append(Word(at, at + len(word), number + 1))  # token 0 is special
        at += len(word) + 1
    return made


def entities(tags: str) -> list[tuple[str, str]]:
    """(label, text) of what `of_tags` finds in `TEXT` where its words have these tags."""
    logits = np.full((8, len(TAGS)), -9.0, np.float32)
    for position, tag in enumerate(tags.split()):
        logits[position + 1, TAGS.index(tag)] = 9.0
    return [(entity.label, entity.text) for entity in of_tags(logits, words_of(TEXT), TEXT, TAGS).entities]


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("B-PER I-PER O O B-LOC I-LOC", [("PER", "Anna Maria"), ("LOC", "New York")]),
        ("B-PER B-PER O O O O", [("PER", "Anna"), ("PER", "Maria")]),
        ("I-PER I-PER O O I-LOC O", [("PER", "Anna Maria"), ("LOC", "New")]),
        ("B-PER I-LOC O O O O", [("PER", "Anna"), ("LOC", "Maria")]),
        ("S-PER S-PER O O O O", [("PER", "Anna"), ("PER", "Maria")]),
        ("B-PER E-PER I-PER O O O", [("PER", "Anna Maria"), ("PER", "lives")]),
        ("B-PER L-PER U-PER O U-LOC L-LOC", [("PER", "Anna Maria"), ("PER", "lives"), ("LOC", "New"), ("LOC", "York")]),
        ("O O O O O O", []),
    ],
)
def test_tags_become_entities_by_their_scheme(tags: str, expected: list[tuple[str, str]]) -> None:
    assert entities(tags) == expected


def test_a_word_without_tokens_is_outside_of_entities() -> None:
    logits = np.full((3, 2), 0.0, np.float32)
    logits[1:, 1] = 9.0
    words = [Word(0, 3, 1), Word(4, 4, None), Word(4, 8, 2)]
    found = of_tags(logits, words, "New York", ("O", "I-LOC")).entities
    assert [(entity.start, entity.end) for entity in found] == [(0, 3), (4, 8)], "as in the score"


def test_an_entity_has_its_place_and_the_mean_probability_of_its_words() -> None:
    logits = np.zeros((4, 2), np.float32)
    logits[1] = [0.0, math.log(3.0)]  # probability 3/4
    logits[2] = [0.0, math.log(9.0)]  # 9/10
    logits[3] = [5.0, 0.0]
    (entity,) = of_tags(logits, words_of("New York ends"), "New York ends", ("O", "I-LOC")).entities
    assert entity.score == pytest.approx((0.75 + 0.9) / 2)
    assert entity == Entity("LOC", "New York", 0, 8, entity.score)


def test_the_class_is_the_largest_logit_with_its_softmax() -> None:
    logits = np.array([[0.0, math.log(4.0)], [1000.0, -1000.0]], np.float32)  # no overflow
    first, second = of_classes(logits, ("bad", "good"))
    assert first.label == "good"
    assert first.score == pytest.approx(0.8)
    assert (second.label, second.score) == ("bad", 1.0)
    assert first.to_dict() == {"label": "good", "score": first.score}


def test_labels_hold_above_one_half_most_probable_first() -> None:
    (result,) = of_labels(np.array([[0.1, -0.1, 2.0, 0.0]], np.float32), ("a", "b", "c", "d"))
    assert [label.label for label in result.labels] == ["c", "a"]
    assert result.labels[0].score == pytest.approx(1 / (1 + math.exp(-2)))
    assert isinstance(result.labels[0], Prediction)
    assert of_labels(np.array([[-1.0]], np.float32), ("a",))[0].labels == ()


def test_an_answer_begins_and_ends_with_a_character_of_its_own() -> None:
    # Two tokens that count the space before them, as those of DeBERTa-v3 do, and one of a space alone.
    window = Window(1, " São Paulo  now", [0, 4, 10, 11], [4, 10, 11, 15], [], offset=5)
    logits = np.zeros((5, 2), np.float32)
    logits[1, 0] = logits[3, 1] = 9.0
    answer = of_spans([logits], [window])
    assert (answer.text, answer.start, answer.end) == ("São Paulo", 6, 15)


def test_scores_and_vectors_are_what_the_head_gives() -> None:
    assert [score.score for score in of_scores(np.array([[0.5], [-2.0]], np.float32))] == [0.5, -2.0]
    source = np.array([[1.0, 2.0]], np.float32)
    (vector,) = of_vectors(source)
    source[0, 0] = 7.0
    assert isinstance(vector, Embedding)
    assert vector.to_dict() == {"vector": [1.0, 2.0]}, "and it is a copy"


def test_an_answer_is_the_best_span_of_all_windows_by_trying_every_one() -> None:
    rng = np.random.default_rng(0)
    context = "one two three four five six"
    parts = [(0, "one two three four"), (8, "three four five six")]
    for _ in range(25):
        windows, logits, candidates = [], [], []
        for offset, text in parts:
            starts = [word.start for word in words_of(text)]
            ends = [word.end for word in words_of(text)]
            windows.append(Window(2, text, starts, ends, [], offset))
            rows = rng.normal(size=(7, 2)).astype(np.float32)
            logits.append(rows)
            for first in range(4):
                for last in range(first, 4):
                    total = float(rows[2 + first, 0]) + float(rows[2 + last, 1])
                    candidates.append((total, offset + starts[first], offset + ends[last]))
        total, start, end = max(candidates)
        answer = of_spans(logits, windows)
        assert (answer.start, answer.end, answer.text) == (start, end, context[start:end])
        everywhere = [np.concatenate([rows[2:6, side] for rows in logits]).astype(np.float64) for side in (0, 1)]
        probability = math.exp(total) / (np.exp(everywhere[0]).sum() * np.exp(everywhere[1]).sum())
        assert answer.score == pytest.approx(probability, rel=1e-6)
        assert isinstance(answer, Answer)
        assert answer.found
        least = min(logits, key=lambda rows: float(rows[0].sum()))[0].astype(np.float64)
        everywhere = [np.append(numbers, one) for numbers, one in zip(everywhere, least, strict=True)]
        whole = np.exp(everywhere[0]).sum() * np.exp(everywhere[1]).sum()
        nullable = [replace(window, nullable=True, threshold=0.5) for window in windows]
        answer = of_spans(logits, nullable)
        assert answer.found == (least.sum() - total <= 0.5)
        expected = (start, end, context[start:end]) if answer.found else (None, None, "")
        assert (answer.start, answer.end, answer.text) == expected
        assert answer.score == pytest.approx(math.exp(total if answer.found else least.sum()) / whole, rel=1e-6)
