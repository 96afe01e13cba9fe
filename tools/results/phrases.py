"""SST-2's training rows are phrases of shared sentences: whole ones to judge on, and what must not be trained on then.

A text is contained in another where its words stand there in a row. Whole is what no other text of the file contains.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate

import numpy as np

_BRACKET = re.compile(r"-[lr][rsc]b-")  # as treebanks write brackets


def whole_texts(texts: Sequence[str]) -> list[str]:
    """The texts that no other one contains, each once, in the order of the file; words are what white space parts."""
    known = {_plain(text) for text in texts}
    inside: set[str] = set()
    for text in sorted(known, key=lambda text: -text.count(" ")):  # longest first: what contains it came before
        if text not in inside:
            inside.update(part for part in _parts(text) if part in known and part != text)
    return [text for text in dict.fromkeys(map(_plain, texts)) if text and text not in inside]


def held_out(texts: Sequence[str], count: int, seed: int) -> tuple[list[int], list[int]]:
    """(rows of `count` whole texts drawn by `seed`, rows that may be trained on: none of these contains them).

    Of a text that stands there several times the first row is held out.
    """
    whole = whole_texts(texts)
    drawn = np.random.default_rng(seed).permutation(len(whole))[:count]
    chosen = {whole[number] for number in drawn}
    plain = [_plain(text) for text in texts]
    first = {text: row for row, text in reversed(list(enumerate(plain)))}
    inside = {part for text in chosen for part in _parts(text)}
    return sorted(first[text] for text in chosen), [row for row, text in enumerate(plain) if text not in inside]


def unrelated(texts: Sequence[str], known: Sequence[str]) -> list[str]:
    """The texts, each once, that no one of `known` contains and that contain none of them.

    Letters and digits alone are compared, without case: sets of one origin differ in how they part words and write
    brackets. So a short word inside a longer one counts, too.
    """
    plain = list(dict.fromkeys(filter(None, map(_plain, texts))))
    bare = [_letters(text) for text in plain]
    judged = list(filter(None, map(_letters, known)))
    inside, all_ = "\n".join(judged), "\n".join(bare)
    starts = list(accumulate((len(text) + 1 for text in bare), initial=0))
    related = {row for text in judged for row in _rows_with(text, all_, starts)}
    return [plain[row] for row, text in enumerate(bare) if text and row not in related and text not in inside]


def _rows_with(part: str, all_: str, starts: Sequence[int]) -> Iterator[int]:
    """The lines of `all_`, which begin at `starts`, that contain a text."""
    at = all_.find(part)
    while at >= 0:
        row = bisect_right(starts, at) - 1
        yield row
        at = all_.find(part, starts[row + 1])


def _letters(text: str) -> str:
    return "".join(filter(str.isalnum, _BRACKET.sub("", text.lower())))


def _plain(text: str) -> str:
    return " ".join(text.split())


def _parts(text: str) -> Iterator[str]:
    """Everything that a plain text contains, itself too."""
    words = text.split(" ")
    for start in range(len(words)):
        for stop in range(start + 1, len(words) + 1):
            yield " ".join(words[start:stop])
