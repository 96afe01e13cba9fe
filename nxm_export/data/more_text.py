"""Texts without labels, which the dense model alone answers in training: where they come from and how many there are.

A small training set is learned by heart. Texts of the same kind from elsewhere take that away, and cost no labels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import repeat

from nxm_export.contract.tasks import Task
from nxm_export.data.columns import Columns
from nxm_export.data.examples import Examples, RawExamples
from nxm_export.data.label_kinds import LABELS, load_unlabelled, read_by_model, unlabelled
from nxm_export.errors import DataError, notice

MORE_TEXT_SHARE = 0.5


@dataclass(frozen=True)
class MoreText:
    """Data files, or names of GLUE tasks, whose labels are not read, and which `share` of what is trained on they make
    up. Raises `DataError` for no file, and for a share that is not between 0 and 1."""

    files: tuple[str, ...]
    share: float = MORE_TEXT_SHARE

    def __post_init__(self) -> None:
        if isinstance(self.files, str) or not self.files:
            raise DataError(f"more text comes from a tuple of files, got {self.files!r}")
        if not 0 < self.share < 1:
            raise DataError(f"the share of more text must be between 0 and 1, got {self.share}")


def read_more_text(
    more: MoreText, columns: Columns, task: Task, train: RawExamples, dev: RawExamples | None
) -> Examples:
    """All texts of the files, each once, in the order of the files; their labels are NaN, or no answers.

    Texts of `dev` are left out, with a notice: what a model was trained on says little about new ones. Raises
    `DataError` where a file has pairs of texts and `train` has none, or the other way round, and where no text is left.
    """
    kind, texts = LABELS[task.label], dict[tuple[str, str], None]()
    for file in more.files:
        raw = load_unlabelled(file, columns, task)
        if not kind.separate and (raw.pairs is None) != (train.pairs is None):
            raise DataError(
                f"{train.source} and {raw.source} differ: only one of them has a second text; "
                "name the columns with --text-column and --pair-column"
            )
        texts |= dict.fromkeys(_read(raw, task))
    known = set() if dev is None else set(_read(dev, task))
    left = [text for text in texts if text not in known]
    source = ", ".join(more.files)
    if len(left) < len(texts) and dev is not None:
        notice(f"{source}: {len(texts) - len(left)} of {len(texts)} texts are in {dev.source}, too, and are left out")
    if not left:
        raise DataError(f"{source}: no text is left beside those of the dev data; leave --more-text out")
    firsts = [first for first, _ in left]
    seconds = [second for _, second in left] if any(second for _, second in left) else None
    return replace(unlabelled(firsts, seconds, source, task), groups=None)  # nothing of them is scored


def text_hash(examples: Examples) -> str:
    """sha256 over texts and second texts, in their order."""
    digest = hashlib.sha256()
    for text, pair in zip(examples.texts, examples.pairs or repeat(""), strict=False):
        digest.update(f"{len(text)} {len(pair)} {text}{pair}".encode())
    return digest.hexdigest()


def _read(raw: RawExamples, task: Task) -> Iterable[tuple[str, str]]:
    """(text, second text or nothing) of all that a model reads of a file."""
    for text in read_by_model(raw, task):
        yield (text, "") if isinstance(text, str) else text
