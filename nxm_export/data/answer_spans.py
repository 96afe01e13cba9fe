"""Which part of a context answers a question, or that none does: the one rule of training data, comparison, scoring,
`nxm predict`, `nxm serve` and Triton.

A question with a long context becomes several windows of tokens that overlap, each with the whole question. The answer
is the span of at most 30 context tokens with the highest sum of start and end logit, over all of its windows. Where no
answer may be one, there is none when the first token, [CLS], where training points then, has in every window a sum
that is higher by more than a threshold; so in SQuAD 2.0 (Rajpurkar et al., "Know What You Don't Know", ACL 2018).

This file also stands alone in a Triton repository, beside the models that use it; it needs nothing but numpy.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from nxm_export.data.tokenization import Encoding, Tokenizer

MAX_ANSWER = 30  # tokens of the longest answer that is looked for
OVERLAP = 128  # tokens of context that two windows share; at most half of what a window holds
NO_ANSWER = 0  # where start and end point in a window without the answer: the first token, [CLS]


@dataclass(frozen=True)
class Window:
    """What it takes to score a window: its context tokens begin at position `first` and are the characters `starts` to
    `ends` of `text`, a part of the context that begins at its character `offset`; `answers` are the gold ones
    of the question. `nullable`: that there is no answer may be one, where it beats the best span by more than
    `threshold`."""

    first: int
    text: str
    starts: list[int]
    ends: list[int]
    answers: list[str]
    offset: int = 0
    nullable: bool = False
    threshold: float = 0.0

    def pack(self) -> str:
        """As one ASCII string."""
        return base64.b64encode(zlib.compress(json.dumps(asdict(self)).encode(), 9)).decode("ascii")

    @classmethod
    def unpack(cls, label: np.ndarray) -> Window:
        """From a row of `nxm_export.data.features.label_array`: the bytes of the string, filled up with 0."""
        return cls(**json.loads(zlib.decompress(base64.b64decode(label.astype(np.uint8).tobytes().rstrip(b"\0")))))

    def answer(self, start: int, end: int) -> str:
        """The text of a span of positions."""
        return self.text[slice(*self.characters(start, end))]

    def characters(self, start: int, end: int) -> tuple[int, int]:
        """Where a span of positions begins and ends in `text`, without white space around it: some tokenizers count the
        space before a word to it."""
        low, high = self.starts[start - self.first], self.ends[end - self.first]
        inner = self.text[low:high].strip()
        begin = self.text.find(inner, low)
        return (begin, begin + len(inner)) if inner else (low, high)


@dataclass(frozen=True)
class Found:
    """The answer to a question: the positions `first` to `last` of its window number `window`, or twice `NO_ANSWER`
    where there is `none`; `total` is the sum of their logits."""

    window: int
    first: int
    last: int
    total: float
    none: bool = False

    def text(self, windows: Sequence[Window]) -> str:
        """The answer in words; empty where there is none."""
        return "" if self.none else windows[self.window].answer(self.first, self.last)


def context_windows(
    tokenizer: Tokenizer, question: str, context: str, max_length: int, overlap: int | None = None
) -> list[Encoding]:
    """The tokens of a question and its context, in windows of at most `max_length`, of which two share `overlap` tokens
    of the context: by default `OVERLAP`, but at most half of what they hold.

    Raises `ValueError` for a question that leaves no room, and for an `overlap` that leaves nothing new.
    """
    tokenizer.no_padding()
    tokenizer.no_truncation()
    special = tokenizer.num_special_tokens_to_add(True)
    length = len(tokenizer.encode(question, add_special_tokens=False).ids)
    room = max_length - special - length
    if room < 1:
        raise ValueError(
            f"its {length} tokens and {special} special ones leave no room for context in {max_length}; "
            "raise --max-length, or shorten the question"
        )
    shared = min(OVERLAP, room // 2) if overlap is None else overlap
    if not 0 <= shared < room:
        raise ValueError(
            f"windows hold {room} tokens of its context and cannot share {shared} of them; "
            "lower the overlap, or raise --max-length"
        )
    tokenizer.enable_truncation(max_length, stride=shared, strategy="only_second")
    (whole,) = tokenizer.encode_batch([(question, context)])
    return [whole, *whole.overflowing]


def takes_more_than_one_window(tokenizer: Tokenizer, question: str, context: str, max_length: int) -> bool:
    """Whether a context does not fit beside its question, which leaves room for some of it. Tokens are counted for
    that, and no window is made: beside a question that leaves room for one token, a context has one for each of its
    own."""
    tokenizer.no_padding()
    tokenizer.no_truncation()
    asked, told = map(len, tokenizer.encode_batch_fast([question, context], add_special_tokens=False))
    return 0 < max_length - tokenizer.num_special_tokens_to_add(True) - asked < told


def window_of(encoding: Encoding, context: str, answers: Sequence[str] = (), threshold: float | None = None) -> Window:
    """What it takes to find and to score an answer in one window of a context; `threshold` None: there always is one.

    Raises `ValueError` for a context without tokens.
    """
    at = [i for i, sequence in enumerate(encoding.sequence_ids) if sequence == 1]
    if not at:
        raise ValueError("its context has no tokens; fix the row or remove it")
    offsets = encoding.offsets[at[0] : at[-1] + 1]
    low, high = offsets[0][0], offsets[-1][1]
    return Window(
        at[0],
        context[low:high],
        [start - low for start, _ in offsets],
        [end - low for _, end in offsets],
        list(answers),
        low,
        threshold is not None,
        threshold or 0.0,
    )


def best_span(logits: np.ndarray, window: Window, longest: int = MAX_ANSWER) -> tuple[float, int, int]:
    """(score, start, end) of the span of context tokens with the highest sum of start and end logit (sequence, 2); at
    most `longest` tokens. A question token or padding is never part of it."""
    count = len(window.starts)
    starts, ends = logits[window.first : window.first + count].T.astype(np.float64)
    padded = np.concatenate([ends, np.full(longest - 1, -np.inf)])
    sums = starts[:, None] + np.lib.stride_tricks.sliding_window_view(padded, longest)  # (start, length - 1)
    start, more = divmod(int(sums.argmax()), longest)
    return float(sums[start, more]), window.first + start, window.first + start + more


def best_answer(logits: Sequence[np.ndarray], windows: Sequence[Window]) -> Found:
    """The answer to one question, from the logits (sequence, 2) of all of its windows."""
    spans = [best_span(rows, window) for rows, window in zip(logits, windows, strict=True)]
    best = max(range(len(spans)), key=lambda i: spans[i][0])
    total, first, last = spans[best]
    if windows[best].nullable:
        sums = [float(rows[NO_ANSWER].astype(np.float64).sum()) for rows in logits]
        least = min(range(len(sums)), key=lambda i: sums[i])
        if sums[least] - total > windows[best].threshold:
            return Found(least, NO_ANSWER, NO_ANSWER, sums[least], none=True)
    return Found(best, first, last, total)
