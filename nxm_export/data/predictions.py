"""What a model says about a text, as typed results: one kind for each task, made from the model's raw outputs.

==========================  =====================================================================
task                        result of one text, or of one pair of texts
==========================  =====================================================================
``classification``          `Prediction`: the label, and its probability by softmax
``multi-label``             `LabelSet`: every label whose probability by sigmoid is above 0.5
``regression, reranking``   `Score`: the number as the head gives it
``token-classification``    `TaggedText`: the entities, with their places in the text
``question-answering``      `Answer`: a part of the context, its place, and its probability
``embedding``               `Embedding`: the vector
==========================  =====================================================================

All have ``to_dict()``. Nothing here needs torch or a runtime.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nxm_export.data.answer_spans import NO_ANSWER, Window, best_answer
from nxm_export.data.token_labels import OUTSIDE, bioes
from nxm_export.storage.json_files import to_json_object

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Prediction:
    """One class: its name, and its probability in [0, 1]."""

    label: str
    score: float

    def to_dict(self) -> dict[str, object]:
        """JSON form."""
        return to_json_object(self)


@dataclass(frozen=True)
class LabelSet:
    """All labels that hold, most probable first; none is an answer, too."""

    labels: tuple[Prediction, ...]

    def to_dict(self) -> dict[str, object]:
        """JSON form."""
        return to_json_object(self)


@dataclass(frozen=True)
class Score:
    """A number as the head gives it: of a text, or of how relevant a document is to a query."""

    score: float

    def to_dict(self) -> dict[str, object]:
        """JSON form."""
        return to_json_object(self)


@dataclass(frozen=True)
class Entity:
    """The characters `start` to `end` (exclusive) of the text, `text`, are a `label`; `score` is the mean probability
    of its words' tags."""

    label: str
    text: str
    start: int
    end: int
    score: float


@dataclass(frozen=True)
class TaggedText:
    """The entities of a text, in its order."""

    entities: tuple[Entity, ...]

    def to_dict(self) -> dict[str, object]:
        """JSON form."""
        return to_json_object(self)


@dataclass(frozen=True)
class Answer:
    """The characters `start` to `end` (exclusive) of the context, `text`, answer the question; `score` is the
    probability of that start times that of that end, over the whole context.

    From a model that was made to say so, it may be that there is no answer: `text` is empty then, `start` and `end` are
    None, and `score` is the probability of that."""

    text: str
    start: int | None
    end: int | None
    score: float

    @property
    def found(self) -> bool:
        """False where there is no answer."""
        return self.start is not None

    def to_dict(self) -> dict[str, object]:
        """JSON form."""
        return to_json_object(self)


@dataclass(frozen=True, eq=False)
class Embedding:
    """The vector of a text, float32 (features,)."""

    vector: Array

    def to_dict(self) -> dict[str, object]:
        """JSON form: the vector as a list."""
        return {"vector": [float(value) for value in self.vector]}


AnyPrediction = Prediction | LabelSet | Score | TaggedText | Answer | Embedding


@dataclass(frozen=True)
class Word:
    """A word of a text: its characters `start` to `end`, and the position of its first token; None for a word of which
    the tokenizer leaves nothing."""

    start: int
    end: int
    token: int | None


def of_classes(logits: Array, labels: Sequence[str]) -> list[Prediction]:
    """The most probable class of every row of (rows, classes); of equal ones the first."""
    probabilities = _softmax(logits)
    best = probabilities.argmax(axis=-1)
    return [Prediction(labels[i], float(row[i])) for i, row in zip(best, probabilities, strict=True)]


def of_labels(logits: Array, labels: Sequence[str]) -> list[LabelSet]:
    """The labels with a logit above 0 of every row of (rows, labels), most probable first."""
    probabilities = 1.0 / (1.0 + np.exp(-logits.astype(np.float64)))
    return [
        LabelSet(tuple(Prediction(labels[i], float(row[i])) for i in np.argsort(-row, kind="stable") if values[i] > 0))
        for values, row in zip(logits, probabilities, strict=True)
    ]


def of_scores(logits: Array) -> list[Score]:
    """The number of every row of (rows, 1)."""
    return [Score(float(row[0])) for row in logits]


def of_tags(logits: Array, words: Sequence[Word], text: str, labels: Sequence[str]) -> TaggedText:
    """The entities of one text, from its tokens' logits (sequence, tags): a word has the tag of its first token, and
    one without tokens is outside of entities.

    Tags are those of the IOB schemes. ``B-`` and ``S-`` begin an entity; ``I-`` and ``E-`` go on with one of the same
    name, and begin one where there is none; ``E-`` and ``S-`` end it. BILOU's ``L-`` and ``U-`` mean ``E-`` and ``S-``.
    """
    probabilities = _softmax(logits)
    groups: list[tuple[str, list[Word], list[float]]] = []
    open_ = False
    for word in words:
        if word.token is None:
            open_ = False
            continue
        row = probabilities[word.token]
        at = int(row.argmax())
        tag = bioes(labels[at])
        mark, _, name = tag.partition("-")
        if tag == OUTSIDE:
            open_ = False
            continue
        if not (open_ and mark in ("I", "E") and groups[-1][0] == name):
            groups.append((name or tag, [], []))
        groups[-1][1].append(word)
        groups[-1][2].append(float(row[at]))
        open_ = mark in ("B", "I")
    return TaggedText(
        tuple(
            Entity(name, text[parts[0].start : parts[-1].end], parts[0].start, parts[-1].end, float(np.mean(scores)))
            for name, parts, scores in groups
        )
    )


def of_spans(logits: Sequence[Array], windows: Sequence[Window]) -> Answer:
    """The answer that comparison and scoring choose, too, from all windows of one question, each with logits
    (sequence, 2)."""
    found = best_answer(logits, windows)
    window, text = windows[found.window], found.text(windows)
    normaliser = sum(_log_sum_exp(np.concatenate(list(_allowed(logits, windows, side)))) for side in (0, 1))
    score = float(np.exp(found.total - normaliser))
    if found.none:
        return Answer("", None, None, score)
    start, end = (window.offset + place for place in window.characters(found.first, found.last))
    return Answer(text, start, end, score)


def of_vectors(vectors: Array) -> list[Embedding]:
    """The vector of every row of (rows, features)."""
    return [Embedding(row.copy()) for row in vectors]


def _allowed(logits: Sequence[Array], windows: Sequence[Window], side: int) -> Iterator[npt.NDArray[np.float64]]:
    """The logits at which an answer may begin (`side` 0) or end (1): those of the context, and, where there may be no
    answer, that of the first token of the window that is least for it."""
    for rows, window in zip(logits, windows, strict=True):
        yield rows[window.first : window.first + len(window.starts), side].astype(np.float64)
    if windows[0].nullable:
        least = min(logits, key=lambda rows: float(rows[NO_ANSWER].astype(np.float64).sum()))
        yield least[NO_ANSWER : NO_ANSWER + 1, side].astype(np.float64)


def _softmax(logits: Array) -> npt.NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    weights: npt.NDArray[np.float64] = np.exp(shifted)
    shares: npt.NDArray[np.float64] = weights / weights.sum(axis=-1, keepdims=True)
    return shares


def _log_sum_exp(values: npt.NDArray[np.float64]) -> float:
    highest = float(values.max())
    return highest + float(np.log(np.exp(values - highest).sum()))
