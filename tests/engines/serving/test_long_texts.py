"""A text that is cut before it is tokenized has the tokens that the whole text has."""

from __future__ import annotations

import random
import resource
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE, Unigram, WordPiece
from tokenizers.processors import TemplateProcessing

from engines.serving.long_texts import Count, Tokens, beginning, beginnings, encode_long, share
from nxm_export.data.tokenizer_settings import direction_of

LETTERS = "abcdef"
SPECIAL = [("[CLS]", 0), ("[SEP]", 1)]


def framed(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=SPECIAL
    )
    return tokenizer


def word_piece() -> Tokenizer:
    """As BERT's: clean-up, lower case, words and punctuation, pieces of words."""
    pieces = ["[CLS]", "[SEP]", "[UNK]", *LETTERS, *(f"##{letter}" for letter in LETTERS), "ab", "##cd", ".", "é"]
    tokenizer = Tokenizer(WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return framed(tokenizer)


def byte_level() -> Tokenizer:
    """As RoBERTa's: bytes with the space before a word, merged by pairs."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["[CLS]", "[SEP]", *alphabet])}
    merges = [("Ġ", "a"), ("a", "b"), ("Ġ", "Ġ"), ("c", "d"), ("ĠĠ", "Ġ")]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    tokenizer = Tokenizer(BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return framed(tokenizer)


def unigram() -> Tokenizer:
    """As XLM-R's and ALBERT's: one space for many, the likeliest pieces of a word."""
    pieces = [("[CLS]", 0.0), ("[SEP]", 0.0), ("<unk>", 0.0), ("▁", -3.0), ("▁a", -2.0), ("ab", -2.5), ("cde", -2.5)]
    pieces += [(letter, -4.0) for letter in LETTERS + "."]
    tokenizer = Tokenizer(Unigram(pieces, unk_id=2))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return framed(tokenizer)


TOKENIZERS = {"word-piece": word_piece(), "byte-level": byte_level(), "unigram": unigram()}


def counting(tokenizer: Tokenizer) -> Count:
    def count(text: str) -> int:
        tokenizer.no_truncation()
        return len(tokenizer.encode(text, add_special_tokens=False).ids)

    return count


words = st.text(st.sampled_from([*LETTERS, ".", "é", "\u200b"]), min_size=1, max_size=12)
spaces = st.sampled_from([" ", "  ", "\n", " \t ", "\u00a0", "   "])
texts = st.lists(st.tuples(words, spaces), max_size=120).map(lambda parts: "".join(w + s for w, s in parts))


@pytest.mark.parametrize("name", TOKENIZERS)
@given(texts, st.integers(3, 40))
@settings(max_examples=60)
def test_a_beginning_has_the_tokens_of_the_whole_text(name: str, text: str, tokens: int) -> None:
    tokenizer = TOKENIZERS[name]
    short = beginning(text, counting(tokenizer), tokens, 30)
    assert text.startswith(short)
    tokenizer.enable_truncation(tokens)
    assert tokenizer.encode(short).ids == tokenizer.encode(text).ids


@pytest.mark.parametrize("name", TOKENIZERS)
@given(texts, texts, st.integers(4, 41), st.sampled_from(["right", "left"]))
@settings(max_examples=60)
def test_tokens_are_put_together_as_by_the_library(name: str, first: str, second: str, tokens: int, side: str) -> None:
    """With special tokens in front, between and behind, and whichever text is the longer one."""
    tokenizer = TOKENIZERS[name]
    for row in ((first, second), (first,)):
        if side == "left" and max(map(len, row)) > 64 * tokens:
            continue
        tokenizer.enable_truncation(tokens, direction=side)
        whole = tokenizer.encode(*row)
        assert encode_long(tokenizer, row, tokens) == Tokens(whole.ids, whole.attention_mask, whole.type_ids)
        assert direction_of(tokenizer) == side  # which says how the next text is cut


def test_a_model_that_reads_from_the_end_does_not_read_megabytes_for_that() -> None:
    tokenizer = TOKENIZERS["word-piece"]
    tokenizer.enable_truncation(10, direction="left")
    with pytest.raises(ValueError, match="more than 640 characters, and this model reads a text from its end"):
        encode_long(tokenizer, ("a " * 321,), 10)
    tokenizer.enable_truncation(10)


@given(st.integers(0, 60), st.integers(0, 60), st.integers(1, 50))
def test_two_texts_share_the_room_as_the_library_shares_it(first: int, second: int, room: int) -> None:
    tokenizer = TOKENIZERS["word-piece"]
    tokenizer.enable_truncation(room + 3)
    sequences = [each for each in tokenizer.encode("a " * first, "b " * second).sequence_ids if each is not None]
    assert share(first, second, room) == (sequences.count(0), sequences.count(1))


@pytest.mark.parametrize("name", TOKENIZERS)
@given(texts, texts, st.integers(4, 41))
@settings(max_examples=60)
def test_two_beginnings_share_the_tokens_as_the_whole_texts_do(name: str, first: str, second: str, tokens: int) -> None:
    tokenizer = TOKENIZERS[name]
    count = counting(tokenizer)
    short = beginnings(first, second, count, tokens, 30)
    pieces = (len(first) + len(second)) // 10 + 2
    if abs(count(first) - count(second)) <= pieces and min(count(first), count(second)) > tokens // 2:
        return  # as good as equally long: which of them gets the odd token is not worth all of their tokens
    tokenizer.enable_truncation(tokens)
    assert tokenizer.encode(*short).ids == tokenizer.encode(first, second).ids


def test_a_long_pair_costs_little_time_and_space() -> None:
    """The library alone makes a combination of every two parts that it has cut away: here a quarter of a million."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    for texts in (("a " * 20_000, "b " * 20_000), ("a." * 900, "." * 2000)):
        tokens = encode_long(TOKENIZERS["word-piece"], texts, 48)
        assert len(tokens.ids) == 48
    assert time.process_time() - began < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB


def test_megabytes_are_not_read_for_a_few_tokens() -> None:
    read = 0

    def count(text: str) -> int:
        nonlocal read
        read += len(text)
        return len(text.split())

    text = "good " * 500_000
    short = beginning(text, count, 48, 3072)
    assert len(short) <= 3072
    assert read <= 3072
    assert beginning(" ".join(["", *"ab"]), count, 48, 3072) == " a b"


@pytest.mark.parametrize("text", ["a" * 101, "a " * 10 + "b" * 200, "a" + " " * 200])
def test_a_run_without_an_end_of_a_word_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="more than 100 characters without an end of a word"):
        beginning(text, len, 1000, 100)
    with pytest.raises(ValueError, match="more than 100 characters without"):
        beginnings("x", text, len, 1000, 100)


def test_time_grows_with_the_length_alone() -> None:
    rng = random.Random(0)
    text = " ".join("".join(rng.choices(LETTERS, k=rng.randint(1, 20))) for _ in range(100_000))
    pieces = list[int]()
    assert beginning(text, lambda piece: pieces.append(len(piece)) or 0, 10, 500) == text  # type: ignore[func-returns-value]
    assert sum(pieces) == len(text)
    assert max(pieces) <= 500
