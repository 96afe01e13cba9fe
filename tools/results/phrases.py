"""SST-2's training rows are phrases of shared sentences: whole ones to judge on, and what must not be trained on then.

A text is contained in another where its words stand there in a row. Whole is what no other text of the file contains.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np


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


def _plain(text: str) -> str:
    return " ".join(text.split())


def _parts(text: str) -> Iterator[str]:
    """Everything that a plain text contains, itself too."""
    words = text.split(" ")
    for start in range(len(words)):
        for stop in range(start + 1, len(words) + 1):
            yield " ".join(words[start:stop])
