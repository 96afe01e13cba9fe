"""Tokens of texts that are far longer than what a model reads, at a cost that they are worth.

The tokenizers library reads all of a text before it cuts it, and keeps what it has cut away, for a pair of texts in
every combination: ten kilobytes each take seconds and hundreds of megabytes. So a text is cut first, at an end of a
word behind enough tokens (tokenizers of this family look at one word at a time), and a pair is put together here.

This file also stands alone in a Triton repository, beside the tokenizer's model; it needs nothing but Python.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from nxm_export.data.tokenization import Encoding, Tokenizer

Count = Callable[[str], int]  # the tokens of a text, without special ones
LETTERS_PER_TOKEN = 64  # no tokenizer of this family makes tokens that long out of text that anyone would write
_PIECE = 4096  # letters that are looked at in one go, where a word ends among them
_SHORT = 2  # letters a token: pairs of up to so many are left to the tokenizers library
_TO_LAST_WORD = re.compile(r".*\S(?=\s)", re.DOTALL)


class Tokens(NamedTuple):
    """Of a text or a pair of texts, with special tokens; the names are those of `tokenizers.Encoding`."""

    ids: list[int]
    attention_mask: list[int]
    type_ids: list[int]


def is_long(texts: Sequence[str], max_length: int) -> bool:
    """Whether a text, or a pair of texts, is for `encode_long`."""
    letters = LETTERS_PER_TOKEN if len(texts) == 1 else _SHORT
    return max(map(len, texts)) > letters * max_length


def encode_long(tokenizer: Tokenizer, texts: Sequence[str], max_length: int) -> Tokens:
    """The tokens of a text, or of a pair of texts: those that the tokenizer makes of it when it is cut at `max_length`,
    at the side where this tokenizer cuts.

    Raises `ValueError` for texts with more than 64 characters a token that the model takes, unless the tokenizer cuts
    behind and there is an end of a word among so many.
    """
    longest = LETTERS_PER_TOKEN * max_length
    from_left = (tokenizer.truncation or {}).get("direction") == "left"
    if from_left and max(map(len, texts)) > longest:
        raise ValueError(f"more than {longest} characters, and this model reads a text from its end")
    tokenizer.no_truncation()
    try:
        tokens = _pair(tokenizer, texts, max_length, from_left) if len(texts) == 2 else None
        if tokens is None:
            texts = [beginning(text, _counting(tokenizer), max_length, longest) for text in texts]
    finally:
        tokenizer.enable_truncation(max_length, direction="left" if from_left else "right")
    if tokens is not None:
        return tokens
    encoding = tokenizer.encode(*texts)
    return Tokens(encoding.ids, encoding.attention_mask, encoding.type_ids)


def _pair(tokenizer: Tokenizer, texts: Sequence[str], max_length: int, from_left: bool) -> Tokens | None:
    """The tokens of a pair of texts; None where one of them has no token, since then nothing is combined."""
    longest = LETTERS_PER_TOKEN * max_length
    texts = beginnings(texts[0], texts[1], _counting(tokenizer), max_length, longest)
    left, right = tokenizer.encode_batch(texts, add_special_tokens=False)
    if not left.ids or not right.ids:
        return None
    first, second = share(len(left.ids), len(right.ids), max_length - tokenizer.num_special_tokens_to_add(True))
    frame = tokenizer.encode(texts[0][: left.offsets[0][1]], texts[1][: right.offsets[0][1]])
    if from_left:
        return _framed(frame, (left.ids[len(left.ids) - first :], right.ids[len(right.ids) - second :]))
    return _framed(frame, (left.ids[:first], right.ids[:second]))


def _counting(tokenizer: Tokenizer) -> Count:
    """Counts tokens. The function of the tokenizers library that other threads need not wait for, and the fastest."""
    return lambda text: len(tokenizer.encode_batch_fast([text], add_special_tokens=False)[0])


def share(first: int, second: int, room: int) -> tuple[int, int]:
    """How many tokens two texts of so many keep when both must fit `room`: the longer one loses first, and of an odd
    number left for two equals it gets one more. That is `longest_first` of the tokenizers library."""
    if first + second <= room:
        return first, second
    shorter = min(first, second, room)
    longer = max(shorter, room - shorter)
    if shorter + longer > room:
        shorter, longer = room // 2, room - room // 2
    return (longer, shorter) if first > second else (shorter, longer)


def beginning(text: str, count: Count, tokens: int, longest: int) -> str:
    """The text, or, if it has more than `longest` characters, a beginning with the same first `tokens` tokens.

    Raises `ValueError` for more than `longest` characters without an end of a word.
    """
    return _beginning(text, count, tokens, longest)[0]


def beginnings(first: str, second: str, count: Count, tokens: int, longest: int) -> tuple[str, str]:
    """The same for two texts that share `tokens` tokens. The longer of both has the longer beginning."""
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
    start, size = 0, min(_PIECE, longest)
    while len(text) - start > size:
        words = _to_last_word(text, start, size) or _to_last_word(text, start, longest)
        if words is None and len(text) - start <= longest:
            break
        if words is None:
            raise ValueError(f"more than {longest} characters without an end of a word")
        yield words.end(), count(text[start : words.end()])
        start = words.end()
    yield len(text), count(text[start:])


def _to_last_word(text: str, start: int, size: int) -> re.Match[str] | None:
    """The letters from `start` to the last end of a word within `size` of them."""
    return _TO_LAST_WORD.match(text, start, start + size + 1)


def _framed(frame: Encoding, texts: tuple[list[int], list[int]]) -> Tokens:
    """The tokens of two texts where those of the two texts of `frame` stand, among its special ones."""
    made = Tokens([], [], [])
    at = 0
    for part, group in groupby(frame.sequence_ids):
        size = len(list(group))
        ids = frame.ids[at : at + size] if part is None else texts[part]
        types = frame.type_ids[at : at + size]
        made.ids.extend(ids)
        made.attention_mask.extend([1] * len(ids))
        made.type_ids.extend(types if part is None else types[:1] * len(ids))
        at += size
    return made
