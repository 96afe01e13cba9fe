"""Extractive question answering: questions about a text, read from files, cut into windows, answered and scored.

A question with a long context becomes several samples: windows of tokens that overlap, each with the whole question.
They are one group: the answer to the question is the best span over all of its windows (`answer_spans`), and it is
scored once. What the score needs (the window's text, where its tokens lie in it, the gold answers) travels with each
sample as its label, packed into one string, so that any runtime's logits can be scored.

Exact match and F1 are those of SQuAD 1.1 (Rajpurkar et al., "SQuAD: 100,000+ Questions for Machine Comprehension of
Text", EMNLP 2016, and the evaluation script published with it): answers are compared without case, punctuation,
articles and surplus white space, and the best of the gold answers counts.

Where a file has questions without an answer, or the model was made to give none, all questions are scored as in SQuAD
2.0 (Rajpurkar et al., "Know What You Don't Know", ACL 2018, and its script).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np

from nxm_export.data.answer_spans import NO_ANSWER, Window, best_answer, context_windows, window_of
from nxm_export.data.columns import Columns, DataRow, is_integer, require_distinct, text_of
from nxm_export.data.examples import Examples, RawExamples
from nxm_export.data.features import Features, members, tokens_of
from nxm_export.data.readers import format_of, no_file, opened, read_table
from nxm_export.data.tokenization import Encoding, Tokenizer
from nxm_export.errors import DataError, notice
from nxm_export.storage.json_files import parse_json

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)

Answer = tuple[str, int]  # its text, and the character of the context at which it begins


def load_questions(source: str, columns: Columns, *, answered: bool = True) -> RawExamples:
    """Questions (texts), contexts (pairs) and gold answers (labels: tuples of `Answer`) of a file; raises `DataError`.

    The file is SQuAD's own JSON, or has a row for every question: its text, the context, and ``answers`` (``{"text":
    [...], "answer_start": [...]}``, or a list of such with one answer each) or ``answer`` and ``answer_start``. Unless
    they are wanted `answered`, none needs answers, they are not read, and labels are None.
    """
    path = Path(source)
    if not path.is_file():
        raise DataError(f"{source}: {no_file(path)}; give SQuAD's JSON, or a row for every question (docs/tasks.md)")
    rows = _squad_rows(path, answered) if format_of(path) == ".json" else None
    if rows is None:
        rows = [_question_in(row, columns, place, answered) for place, row in read_table(path)]
    if not rows:
        raise DataError(f"{path}: no questions in it; the file is empty or has only a header")
    for place, question, context, answers in rows:
        _require_answered(question, context, answers, place)
    unanswered = sum(not answers for _, _, _, answers in rows)
    if unanswered and answered:
        notice(f"{path}: {unanswered} of {len(rows)} questions have no answer; all are scored as in SQuAD 2.0")
    return RawExamples(
        [question for _, question, _, _ in rows],
        [context for _, _, context, _ in rows],
        [answers if answered else None for _, _, _, answers in rows],
        [place for place, _, _, _ in rows],
        str(path),
    )


_Question = tuple[str, str, str, tuple[Answer, ...]]  # place, question, context, answers


def _squad_rows(path: Path, answered: bool) -> list[_Question] | None:
    """The questions of SQuAD's JSON; None for a file that is JSON lines."""
    try:
        with opened(path) as stream:
            text = stream.read().decode("utf-8-sig")
        data = parse_json(text, str(path), "give SQuAD's JSON", DataError, foreign=True)
    except (ValueError, DataError):
        return None  # read as lines, which names the line
    if not isinstance(data, dict) or "data" not in data:
        return None
    questions = []
    try:
        for a, article in enumerate(data["data"]):
            for p, paragraph in enumerate(article["paragraphs"]):
                for q, entry in enumerate(paragraph["qas"]):
                    place = f"{path}: data[{a}].paragraphs[{p}].qas[{q}]"
                    answers = answers_of({**entry, "answers": entry["answers"]}, "answers", place) if answered else ()
                    texts = (text_of(entry, "question", place), text_of(paragraph, "context", place))
                    questions.append((place, *texts, answers))
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: not SQuAD's JSON ({error!r}); it has data, paragraphs (context, qas), and question and answers "
            "in each"
        ) from error
    return questions


def _question_in(row: DataRow, columns: Columns, place: str, answered: bool) -> _Question:
    label = columns.label or ("answers" if "answers" in row else "answer")
    question, context = columns.text or "question", columns.pair or "context"
    needed = [(question, "--text-column"), (context, "--pair-column")]
    for column, flag in [*needed, *([(label, "--label-column")] if answered else [])]:
        if column not in row:
            raise DataError(f"{place}: no column {column!r}; it has {', '.join(map(str, row))}; name it with {flag}")
    require_distinct((question, context, label if answered else None), place)
    answers = answers_of(row, label, place) if answered else ()
    return place, text_of(row, question, place), text_of(row, context, place), answers


def answers_of(row: DataRow, column: str, place: str) -> tuple[Answer, ...]:
    """The gold answers of a row, as any of the usual ways has them, none where it has no answer; raises `DataError`."""
    value = row.get(column)
    if isinstance(value, str) and value.strip()[:1] in ("{", "[") and row.get("answer_start") is None:
        value = parse_json(value, f"{place}: answers {value!r}", "fix the row", DataError, foreign=True)
    if isinstance(value, str) and not value.strip():  # as a table says that there is none
        value = []
    if isinstance(value, str):
        value = [{"text": value, "answer_start": row.get("answer_start")}]
    if isinstance(value, Mapping):
        texts, starts = value.get("text"), value.get("answer_start")
        if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
            raise DataError(f"{place}: answers need two lists of one length, text and answer_start, got {value!r}")
        value = [{"text": text, "answer_start": start} for text, start in zip(texts, starts, strict=True)]
    if not isinstance(value, list) or not all(isinstance(answer, Mapping) for answer in value):
        raise DataError(f"{place}: column {column!r} holds {value!r}, which is no answer with its answer_start")
    if value and row.get("is_impossible") is True:
        raise DataError(f"{place}: is_impossible says that there is no answer, and here are answers; fix the row")
    return tuple((text_of(answer, "text", place), _start(answer.get("answer_start"), place)) for answer in value)


def _start(value: object, place: str) -> int:
    text = str(value).strip()
    if isinstance(value, bool) or text.startswith("-") or not is_integer(text):
        raise DataError(
            f"{place}: answer_start {value!r} is no character number; it says where in the context the answer begins"
        )
    return int(text)


def _require_answered(question: str, context: str, answers: Sequence[Answer], place: str) -> None:
    """Raise `DataError` unless every answer stands in the context where it says."""
    for what, text in (("question", question), ("context", context)):
        if not text.strip():
            raise DataError(f"{place}: the {what} is empty; fix the row or remove it")
    for text, start in answers:
        if not text.strip():
            raise DataError(f"{place}: an answer is empty; fix the row or remove it")
        if context[start : start + len(text)] != text:
            at = context.find(text)
            where = f"it stands at {at}" if at >= 0 else "the context does not hold it at all"
            raise DataError(f"{place}: the answer {text!r} does not stand at character {start} of the context; {where}")


def windows(
    tokenizer: Tokenizer,
    examples: Examples,
    max_length: int,
    inputs: Sequence[str],
    overlap: int | None = None,
    *,
    threshold: float | None = None,
) -> list[Features]:
    """Samples of at most `max_length` tokens for all questions: those of `inputs`, ``labels`` (a packed `Window`),
    ``span`` (start and end position of the first gold answer, `NO_ANSWER` where the window does not hold it) and
    ``group`` (the number of the question).

    `overlap` is as in `context_windows`; `threshold` says by how much no answer must beat the best one, None that there
    always is one. Raises `DataError` for a question that leaves no room, for a context without tokens, and for an
    `overlap` that leaves nothing new.
    """
    made = list[Features]()
    assert examples.pairs is not None
    for number, (question, context) in enumerate(zip(examples.texts, examples.pairs, strict=True)):
        answers = cast("tuple[Answer, ...]", examples.labels[number])
        try:
            for encoding in context_windows(tokenizer, question, context, max_length, overlap):
                window = window_of(encoding, context, [text for text, _ in answers], threshold)
                made.append(_sample(encoding, window, answers, inputs, number))
        except ValueError as error:
            place = f"{examples.source}: question {number + 1} ({question[:40]!r})"
            raise DataError(f"{place}: {error}") from error
    return made


def answering(examples: Examples, threshold: float | None) -> Examples:
    """Questions as a model answers them whose contract has this threshold for no answer; without one, examples in which
    every question has an answer stay as they are."""
    return examples if threshold is None else replace(examples, encoder=partial(windows, threshold=threshold))


def _sample(
    encoding: Encoding, window: Window, answers: Sequence[Answer], inputs: Sequence[str], number: int
) -> Features:
    offsets = encoding.offsets[window.first : window.first + len(window.starts)]
    return {
        **tokens_of(encoding, inputs),
        "labels": window.pack(),
        "span": _span(offsets, window.first, answers[0]) if answers else [NO_ANSWER, NO_ANSWER],
        "group": number,
    }


def _span(offsets: Sequence[tuple[int, int]], first: int, answer: Answer) -> list[int]:
    """Positions of an answer's first and last token, or twice `NO_ANSWER` where the window does not hold all of it."""
    begin, end = answer[1], answer[1] + len(answer[0])
    touched = [i for i, (low, high) in enumerate(offsets) if low < end and high > begin]
    if not touched or offsets[0][0] > begin or offsets[-1][1] < end:
        return [NO_ANSWER, NO_ANSWER]
    return [first + touched[0], first + touched[-1]]


def answer_scores(
    logits: np.ndarray, labels: np.ndarray, classes: Sequence[str] = (), groups: np.ndarray | None = None
) -> np.ndarray:
    """(questions, 2): exact match and F1 of every question's best span over its windows.

    Logits are (windows, sequence, 2), start and end; labels packed windows (see `Window.unpack`), groups their
    questions.
    """
    rows = []
    for unit in members(groups, len(labels)):
        windows_of = [Window.unpack(labels[i]) for i in unit]
        found = best_answer([logits[i] for i in unit], windows_of)
        predicted, answers = found.text(windows_of), windows_of[found.window].answers
        if not windows_of[found.window].nullable:
            rows.append((max(exact(predicted, gold) for gold in answers), max(f1(predicted, gold) for gold in answers)))
            continue
        golds = [gold for gold in answers if normalized(gold)] or [""]
        rows.append((max(exact(predicted, gold) for gold in golds), max(f1_or_none(predicted, gold) for gold in golds)))
    return np.array(rows, np.float64)


def context_mask(labels: np.ndarray, width: int) -> np.ndarray:
    """Boolean (windows, width): the positions that an answer may begin or end at, the first among them where there may
    be none."""
    allowed = np.zeros((len(labels), width), bool)
    for row, label in zip(allowed, labels, strict=True):
        window = Window.unpack(label)
        row[window.first : window.first + len(window.starts)] = True
        row[NO_ANSWER] = window.nullable
    return allowed


def normalized(answer: str) -> str:
    """Lower case, without punctuation and articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_PUNCTUATION)).split())


def exact(predicted: str, gold: str) -> float:
    """1 where both are the same when normalized."""
    return float(normalized(predicted) == normalized(gold))


def f1(predicted: str, gold: str) -> float:
    """F1 of the words of both, each as often as it occurs; 0 where none is common."""
    ours, theirs = normalized(predicted).split(), normalized(gold).split()
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs)) if common else 0.0


def f1_or_none(predicted: str, gold: str) -> float:
    """`f1`, but where nothing is left of one of them, 1 if nothing is of both: SQuAD 2.0's, in which that is an
    answer."""
    if normalized(predicted) and normalized(gold):
        return f1(predicted, gold)
    return float(normalized(predicted) == normalized(gold))
