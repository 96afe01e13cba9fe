"""The tokenizers library: what is used of a tokenizer and of its encodings, and how its file is read, copied and cut.

Its own settings beside the file are those of `nxm_export.data.tokenizer_settings`.
"""

from __future__ import annotations

import contextlib
import copy
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from nxm_export.contract.io_spec import TOKENIZER_FILE
from nxm_export.data.tokenizer_settings import apply_settings, direction_of, read_tokenizer_settings
from nxm_export.errors import ArtifactError, NxmError
from nxm_export.storage.json_files import read_text

if TYPE_CHECKING:
    import tokenizers


class TokenLists(Protocol):
    """The tokens of one text, or of a pair of texts: lists with an entry for every token."""

    @property
    def ids(self) -> list[int]:
        """Numbers of the tokens."""

    @property
    def attention_mask(self) -> list[int]:
        """1 for a token, 0 for padding."""

    @property
    def type_ids(self) -> list[int]:
        """0 for tokens of the first text, 1 for those of the second."""


class Encoding(TokenLists, Protocol):
    """What `tokenizers` makes of one text, or of a pair of texts."""

    def __len__(self) -> int:
        """How many tokens there are."""

    @property
    def offsets(self) -> list[tuple[int, int]]:
        """Character ranges in the token's own text."""

    @property
    def word_ids(self) -> list[int | None]:
        """Which word of its text a token belongs to, as the tokenizer splits it; None for special tokens."""

    @property
    def sequence_ids(self) -> list[int | None]:
        """Which text a token belongs to; None for special tokens."""

    @property
    def overflowing(self) -> Sequence[Encoding]:
        """The encodings of what a truncation left over."""


class Tokenizer(Protocol):
    """What is used of a `tokenizers.Tokenizer`."""

    def num_special_tokens_to_add(self, is_pair: bool) -> int:
        """How many special tokens a text, or a pair of texts, gets."""

    def no_padding(self) -> None:
        """Make encodings as long as their texts."""

    def no_truncation(self) -> None:
        """Keep every token."""

    @property
    def truncation(self) -> Mapping[str, object] | None:
        """How it cuts, ``direction`` (left or right) among it, or None where it does not."""

    def enable_truncation(
        self, max_length: int, *, stride: int = 0, strategy: str = "longest_first", direction: str = "right"
    ) -> None:
        """Cut encodings at `max_length` tokens; what overflows shares `stride` tokens with what went before."""

    def encode(self, sequence: str, pair: str | None = None, *, add_special_tokens: bool = True) -> Encoding:
        """The encoding of a text, or of a pair of texts."""

    def encode_batch(
        self, input: Sequence[str | tuple[str, str]], *, add_special_tokens: bool = True
    ) -> Sequence[Encoding]:
        """The encodings of texts, or of pairs of texts. Other threads run meanwhile; not so with `encode`."""

    def encode_batch_fast(
        self, input: Sequence[str | tuple[str, str]], *, add_special_tokens: bool = True
    ) -> Sequence[Encoding]:
        """The same without offsets, in less than half the time."""


def load_tokenizer(directory: Path) -> Tokenizer:
    """The `tokenizers.Tokenizer` of a checkpoint, graph or engine directory, with the model's own settings in it;
    raises `ArtifactError`."""
    file = directory / TOKENIZER_FILE
    if not file.is_file():
        raise ArtifactError(f"{file} is missing; copy it from the model, or save its fast tokenizer there")
    tokenizer = parse_tokenizer(read_text(file, "copy it from the model"), file)
    apply_settings(cast("tokenizers.Tokenizer", tokenizer), read_tokenizer_settings(directory))
    return tokenizer


def parse_tokenizer(text: str, file: Path) -> Tokenizer:
    """The `tokenizers.Tokenizer` that `text`, read from `file`, holds; raises `ArtifactError`."""
    import tokenizers

    with tokenizer_failures(f"{file}: not a readable tokenizer"):
        made = cast("Tokenizer", tokenizers.Tokenizer.from_str(text))
    with tokenizer_failures(f"{file}: not a usable tokenizer"), contextlib.suppress(Exception):
        made.encode_batch(["a", ("a", "a")])  # a panic is no Exception; a vocabulary without "a" gives one
    return made


@contextlib.contextmanager
def tokenizer_failures(what: str) -> Iterator[None]:
    """Turn what the tokenizers library fails with into an `ArtifactError` that begins with `what`.

    It raises plain Exception, and what its Rust code panics with is not even one.
    """
    try:
        yield
    except NxmError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ArtifactError(f"{what} ({' '.join(str(error).split())})") from error


def twin_of(tokenizer: Tokenizer) -> Tokenizer:
    """Another tokenizer with the same settings, for another thread. Both share one vocabulary, which is nearly all of
    their memory; where that does not give the same tokenizer, it is a copy."""
    import tokenizers

    given = cast("tokenizers.Tokenizer", tokenizer)
    made = tokenizers.Tokenizer(given.model)
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if getattr(given, part) is not None:
            setattr(made, part, getattr(given, part))
    for _, token in sorted(given.get_added_tokens_decoder().items()):
        (made.add_special_tokens if token.special else made.add_tokens)([token])
    made.encode_special_tokens = given.encode_special_tokens
    if given.truncation is not None:
        made.enable_truncation(**given.truncation)
    if given.padding is not None:
        made.enable_padding(**given.padding)
    return cast("Tokenizer", made if made.to_str() == given.to_str() else copy.deepcopy(given))


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy ``tokenizer.json`` to where ``tokenizer_config.json`` is not: with what that says in it; raises
    `ArtifactError`."""

    settings = read_tokenizer_settings(source)
    if settings.cuts_left or not settings.types:
        cast("tokenizers.Tokenizer", load_tokenizer(source)).save(str(target / TOKENIZER_FILE))
    else:
        shutil.copyfile(source / TOKENIZER_FILE, target / TOKENIZER_FILE)


def cut_at(tokenizer: Tokenizer, length: int) -> None:
    """Make encodings as long as their texts, and at most `length` tokens, cut at the tokenizer's own side."""
    tokenizer.no_padding()
    tokenizer.enable_truncation(length, direction=direction_of(tokenizer))
