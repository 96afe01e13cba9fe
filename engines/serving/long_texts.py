"""Cuts texts that are far longer than what a model reads, before all of them is tokenized.

The tokenizer cuts a text behind the tokens that the model takes, and would read megabytes for that. A beginning of the
text with enough tokens gives the same ones, if it ends where a word does: tokenizers of this family look at one word at
a time. This file also stands alone in a Triton repository, beside the tokenizer's model; it needs nothing but Python.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

Count = Callable[[str], int]  # the tokens of a text, without special ones
_TO_LAST_WORD = re.compile(r".*\S(?=\s)", re.DOTALL)


def beginning(text: str, count: Count, tokens: int, longest: int) -> str:
    """The text, or, if it has more than `longest` characters, a beginning with the same first `tokens` tokens.

    Raises `ValueError` for more than `longest` characters without an end of a word.
    """
    return _beginning(text, count, tokens, longest)[0]


def beginnings(first: str, second: str, count: Count, tokens: int, longest: int) -> tuple[str, str]:
    """The same for two texts that share `tokens` tokens. Of the longer one more may be taken away, so that the longer
    of two beginnings is that of the longer text."""
    if max(len(first), len(second)) <= longest:
        return first, second
    sizes = [sum(made for _, made in _pieces(text, count, longest)) for text in (first, second)]
    swap = sizes[0] > sizes[1]
    shorter, longer = (second, first) if swap else (first, second)
    shorter, size = _beginning(shorter, count, tokens, longest)
    longer, _ = _beginning(longer, count, max(tokens, size + 1), longest)
    return (longer, shorter) if swap else (shorter, longer)


def _beginning(text: str, count: Count, tokens: int, longest: int) -> tuple[str, int]:
    """The beginning and about how many tokens it has."""
    made = 0
    for number, (end, more) in enumerate(_pieces(text, count, longest), start=1):
        made += more
        if made - number >= tokens:  # a piece by itself may have a token more than within its text
            return text[:end], made
    return text, made


def _pieces(text: str, count: Count, longest: int) -> Iterator[tuple[int, int]]:
    """Ends of words, at most `longest` characters apart, with the tokens between them; the last is the text's end."""
    start = 0
    while len(text) - start > longest:
        words = _TO_LAST_WORD.match(text, start, start + longest + 1)
        if words is None:
            raise ValueError(f"more than {longest} characters without an end of a word")
        yield words.end(), count(text[start : words.end()])
        start = words.end()
    yield len(text), count(text[start:])
