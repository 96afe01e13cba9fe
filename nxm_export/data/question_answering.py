"""Extractive question answering: questions about a text, read from files, cut into windows, answered and scored.

A question with a long context becomes several samples: windows of tokens that overlap, each with the whole question.
They are one group: the answer to the question is the best span over all of its windows, and it is scored once. What the
score needs (the window's text, where its tokens lie in it, the gold answers) travels with each sample as its label,
packed into one string, so that any runtime's logits can be scored.

Exact match and F1 are those of SQuAD 1.1 (Rajpurkar et al., "SQuAD: 100,000+ Questions for Machine Comprehension of
Text", EMNLP 2016, and the evaluation script published with it): answers are compared without case, punctuation,
articles and surplus white space, and the best of the gold answers counts.

Where a file has questions without an answer, all of its questions are scored as in SQuAD 2.0 (Rajpurkar et al., "Know
What You Don't Know", ACL 2018, and its script): no answer is predicted where the first token, where training points
then, has in every window a higher sum of start and end logit than the best span.
"""

from __future__ import annotations

import base64
import json
import re
import string
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import numpy as np

from nxm_export.data.examples import Columns, DataRow, Examples, Features, RawExamples, members, text_of, tokens_of
from nxm_export.data.readers import format_of, opened, read_rows
from nxm_export.data.tokenization import Encoding, Tokenizer
from nxm_export.errors import DataError, notice
from nxm_export.storage.json_files import parse_json

MAX_ANSWER = 30  # tokens of the longest answer that is looked for
OVERLAP = 128  # tokens of context that two windows share; at most half of what a window holds
NO_ANSWER = 0  # where start and end point in a window without the answer: the first token, [CLS]
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)

Answer = tuple[str, int]  # its text, and the character of the context at which it begins


def load_questions(source: str, columns: Columns) -> RawExamples:
    """Questions (texts), contexts (pairs) and gold answers (labels: tuples of `Answer`) of a file; raises `DataError`.

    The file is SQuAD's own JSON, or has a row for every question: its text, the context, and ``answers`` (``{"text":
    [...], "answer_start": [...]}``, or a list of such with one answer each) or ``answer`` and ``answer_start``.
    """
    path = Path(source)
    if not path.is_file():
        raise DataError(f"{source}: no such file; give SQuAD's JSON, or a row for every question (docs/tasks.md)")
    rows = _squad_rows(path) if format_of(path) == ".json" else None
    if rows is None:
        rows = [_question_in(row, columns, place) for place, row in read_rows(path)]
    if not rows:
        raise DataError(f"{path}: no questions in it; the file is empty or has only a header")
    for place, question, context, answers in rows:
        _require_answered(question, context, answers, place)
    unanswered = sum(not answers for _, _, _, answers in rows)
    if unanswered:
        notice(f"{path}: {unanswered} of {len(rows)} questions have no answer; all are scored as in SQuAD 2.0")
    return RawExamples(
        [question for _, question, _, _ in rows],
        [context for _, _, context, _ in rows],
        [answers for _, _, _, answers in rows],
        [place for place, _, _, _ in rows],
        str(path),
    )


_Question = tuple[str, str, str, tuple[Answer, ...]]  # place, question, context, answers


def _squad_rows(path: Path) -> list[_Question] | None:
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
                    answers = answers_of({**entry, "answers": entry["answers"]}, "answers", place)
                    texts = (text_of(entry, "question", place), text_of(paragraph, "context", place))
                    questions.append((place, *texts, answers))
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: not SQuAD's JSON ({error!r}); it has data, paragraphs (context, qas), and question and answers "
            "in each"
        ) from error
    return questions


def _question_in(row: DataRow, columns: Columns, place: str) -> _Question:
    label = columns.label or ("answers" if "answers" in row else "answer")
    question, context = columns.text or "question", columns.pair or "context"
    for column, flag in ((question, "--text"), (context, "--text-pair"), (label, "--label")):
        if column not in row:
            raise DataError(f"{place}: no column {column!r}; it has {', '.join(map(str, row))}; name it with {flag}")
    return place, text_of(row, question, place), text_of(row, context, place), answers_of(row, label, place)


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
    if isinstance(value, bool) or not (text.isascii() and text.isdecimal()):
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


@dataclass(frozen=True)
class Window:
    """What it takes to score a window: its context tokens begin at position `first` and are the characters `starts` to
    `ends` of `text`, a part of the context that begins at its character `offset`; `answers` are the gold ones
    of the question. `nullable`: that there is no answer may be one."""

    first: int
    text: str
    starts: list[int]
    ends: list[int]
    answers: list[str]
    offset: int = 0
    nullable: bool = False

    def pack(self) -> str:
        """As one ASCII string."""
        return base64.b64encode(zlib.compress(json.dumps(asdict(self)).encode(), 9)).decode("ascii")

    @classmethod
    def unpack(cls, label: np.ndarray) -> Window:
        """From a row of `nxm_export.data.examples.label_array`: the bytes of the string, filled up with 0."""
        return cls(**json.loads(zlib.decompress(base64.b64decode(label.astype(np.uint8).tobytes().rstrip(b"\0")))))

    def answer(self, start: int, end: int) -> str:
        """The text of a span of positions."""
        return self.text[self.starts[start - self.first] : self.ends[end - self.first]]


def windows(
    tokenizer: Tokenizer,
    examples: Examples,
    max_length: int,
    inputs: Sequence[str],
    overlap: int | None = None,
    *,
    nullable: bool = False,
) -> list[Features]:
    """Samples of at most `max_length` tokens for all questions: those of `inputs`, ``labels`` (a packed `Window`),
    ``span`` (start and end position of the first gold answer, `NO_ANSWER` where the window does not hold it) and
    ``group`` (the number of the question).

    `overlap` is how many tokens of context two windows of a question share, by default `OVERLAP`, but at most half of
    what they hold. `nullable`: no answer may be the answer. Raises `DataError` for a question that leaves no room, and
    for an `overlap` that leaves nothing new.
    """
    special, made = tokenizer.num_special_tokens_to_add(True), list[Features]()
    tokenizer.no_padding()
    tokenizer.no_truncation()
    assert examples.pairs is not None
    lengths = [len(encoding.ids) for encoding in tokenizer.encode_batch(examples.texts, add_special_tokens=False)]
    for number, (question, context, length) in enumerate(zip(examples.texts, examples.pairs, lengths, strict=True)):
        place = f"{examples.source}: question {number + 1} ({question[:40]!r})"
        room = max_length - special - length
        if room < 1:
            raise DataError(
                f"{place}: its {length} tokens and {special} special ones leave no room for context in {max_length}; "
                "raise --max-length, or shorten the question"
            )
        shared = min(OVERLAP, room // 2) if overlap is None else overlap
        if not 0 <= shared < room:
            raise DataError(
                f"{place}: windows hold {room} tokens of its context and cannot share {shared} of them; "
                "lower the overlap, or raise --max-length"
            )
        tokenizer.enable_truncation(max_length, stride=shared, strategy="only_second")
        (whole,) = tokenizer.encode_batch([(question, context)])
        for encoding in (whole, *whole.overflowing):
            answers = cast("tuple[Answer, ...]", examples.labels[number])
            window = _window(encoding, context, answers, place, nullable)
            made.append(_sample(encoding, window, answers, inputs, number))
    return made


def _window(encoding: Encoding, context: str, answers: Sequence[Answer], place: str, nullable: bool) -> Window:
    at = [i for i, sequence in enumerate(encoding.sequence_ids) if sequence == 1]
    if not at:
        raise DataError(f"{place}: its context has no tokens; fix the row or remove it")
    offsets = encoding.offsets[at[0] : at[-1] + 1]
    low, high = offsets[0][0], offsets[-1][1]
    return Window(
        at[0],
        context[low:high],
        [start - low for start, _ in offsets],
        [end - low for _, end in offsets],
        [text for text, _ in answers],
        low,
        nullable,
    )


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


def best_span(logits: np.ndarray, window: Window, longest: int = MAX_ANSWER) -> tuple[float, int, int]:
    """(score, start, end) of the span of context tokens with the highest sum of start and end logit (sequence, 2); at
    most `longest` tokens. A question token or padding is never part of it."""
    count = len(window.starts)
    starts, ends = logits[window.first : window.first + count].T.astype(np.float64)
    padded = np.concatenate([ends, np.full(longest - 1, -np.inf)])
    sums = starts[:, None] + np.lib.stride_tricks.sliding_window_view(padded, longest)  # (start, length - 1)
    start, more = divmod(int(sums.argmax()), longest)
    return float(sums[start, more]), window.first + start, window.first + start + more


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
        spans = [best_span(logits[i], window) for i, window in zip(unit, windows_of, strict=True)]
        best = max(range(len(unit)), key=lambda at: spans[at][0])
        predicted, answers = windows_of[best].answer(*spans[best][1:]), windows_of[best].answers
        if not windows_of[best].nullable:
            rows.append((max(exact(predicted, gold) for gold in answers), max(f1(predicted, gold) for gold in answers)))
            continue
        if min(float(logits[i, NO_ANSWER].astype(np.float64).sum()) for i in unit) > spans[best][0]:
            predicted = ""
        golds = [gold for gold in answers if normalized(gold)] or [""]
        rows.append((max(exact(predicted, gold) for gold in golds), max(f1_or_none(predicted, gold) for gold in golds)))
    return np.array(rows, np.float64)


def context_mask(labels: np.ndarray, width: int) -> np.ndarray:
    """Boolean (windows, width): the positions that an answer may begin or end at."""
    allowed = np.zeros((len(labels), width), bool)
    for row, label in zip(allowed, labels, strict=True):
        window = Window.unpack(label)
        row[window.first : window.first + len(window.starts)] = True
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
