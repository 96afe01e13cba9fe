"""Labels of tokens: from the tokens of a data file to the pieces that a tokenizer makes of them, and back to the score.

The model reads the tokens of a sentence with one space between them (`joined`), and the first piece of a token has its
label. Of some tokens, such as a zero-width space, a tokenizer leaves no piece. No model can say anything about them, so
they are scored as if it said that they are outside of every entity. Their labels travel behind those of the pieces, as
numbers below `NO_LABEL`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

NO_LABEL = -100  # of a token that is not scored: the value that PyTorch's cross entropy ignores
OUTSIDE = "O"  # the tag of a token that belongs to no entity
_ERASED = NO_LABEL - 1  # minus (pieces with a label in front of it * _CLASSES + its class): of a token without a piece
_CLASSES = 2**20
_BIOES = {"L": "E", "U": "S"}  # what BILOU calls the last token of an entity, and the only one


class Pieces(Protocol):
    """What is read of the encoding of a text: the character ranges of its pieces, (0, 0) for special tokens."""

    @property
    def offsets(self) -> list[tuple[int, int]]:
        """Character ranges in the text."""

    @property
    def overflowing(self) -> Sequence[Pieces]:
        """The encodings of what a truncation left over."""


def joined(tokens: Sequence[str]) -> str:
    """The text of tokens: one space between them, and none for those that are nothing but white space."""
    return " ".join(token.strip() for token in tokens if token.strip())


def piece_labels(encoding: Pieces, tokens: Sequence[str], labels: Sequence[int]) -> list[int]:
    """A label for every piece of `joined` tokens: that of the token where it begins, `NO_LABEL` elsewhere; and behind
    them one for every token without a piece (`with_erased` reads them).

    Tokens that a truncation left over have none.
    """
    pieces, erased, before = [NO_LABEL] * len(encoding.offsets), list[int](), 0
    for token, piece in token_pieces(encoding, tokens):
        if piece is not None:
            pieces[piece] = labels[token]
            before += labels[token] != NO_LABEL
        elif labels[token] != NO_LABEL:
            erased.append(_ERASED - (before * _CLASSES + labels[token]))
    return pieces + erased


def token_pieces(encoding: Pieces, tokens: Sequence[str]) -> list[tuple[int, int | None]]:
    """(token, its first piece) of all `joined` tokens, in order; None for a token without a piece.

    Tokens that a truncation left over are not among them.
    """
    at = dict(_first_pieces(encoding, tokens))
    seen, cut = list(at), {token for rest in encoding.overflowing for token, _ in _first_pieces(rest, tokens)}
    first, last = (seen[0] if seen else 0, seen[-1] if seen else 0) if cut else (-1, len(tokens))
    read = [token for token in range(len(tokens)) if token in at or (token not in cut and first < token < last)]
    return [(token, at.get(token)) for token in read]


def token_ranges(tokens: Sequence[str]) -> list[tuple[int, int]]:
    """The characters of every token in the text that `joined` makes of all; the two numbers are equal for one that is
    nothing but white space."""
    ranges, at = list[tuple[int, int]](), 0
    for length in (len(token.strip()) for token in tokens):
        ranges.append((at, at + length))
        at += length + 1 if length else 0
    return ranges


def _first_pieces(encoding: Pieces, tokens: Sequence[str]) -> Iterator[tuple[int, int]]:
    """(token, its first piece) in the order of the text. Some tokenizers count the space before a token to it, so the
    first character that is no space decides."""
    text, ranges = joined(tokens), token_ranges(tokens)
    numbers = [number for number, (start, end) in enumerate(ranges) if start < end]
    begins = [ranges[number][0] for number in numbers]
    latest = -1
    for piece, (start, end) in enumerate(encoding.offsets):
        while start < end and text[start].isspace():
            start += 1
        if start >= end:
            continue
        number = numbers[bisect_right(begins, start) - 1]
        if number > latest:
            latest = number
            yield number, piece


def training_labels(labels: np.ndarray, width: int) -> np.ndarray:
    """Labels (samples, ...) as a model of `width` positions is trained by them: `NO_LABEL` for all that has none."""
    made = np.full((len(labels), width), NO_LABEL, labels.dtype)
    known = np.where(labels < NO_LABEL, NO_LABEL, labels)[:, :width]
    made[:, : known.shape[1]] = known
    return made


def erased_tokens(labels: Sequence[int]) -> int:
    """How many tokens of a sample have no piece."""
    return sum(label < NO_LABEL for label in labels)


def scored_tags(predicted: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> tuple[list[str], list[str]]:
    """(predicted tags, true tags) of all scored tokens of a sample, by class indices (sequence,) and its labels; of a
    token without a piece, `OUTSIDE` is predicted. BILOU's names become those of BIOES."""
    scored = np.flatnonzero(labels >= 0)
    ours, theirs = ([bioes(classes[i]) for i in indices[scored]] for indices in (predicted, labels))
    for label in labels[labels < NO_LABEL][::-1]:  # the last one first, so that places stay what they are
        place, index = divmod(_ERASED - int(label), _CLASSES)
        ours.insert(place, OUTSIDE)
        theirs.insert(place, bioes(classes[index]))
    return ours, theirs


def bioes(tag: str) -> str:
    """A tag with the marks of BIOES, which are other letters for those of BILOU."""
    mark, separator, name = tag.strip().partition("-")
    return f"{_BIOES.get(mark, mark)}{separator}{name}"
