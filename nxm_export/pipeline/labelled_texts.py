"""A data file is read as engines read it: by the tokenizer and labels of their directories."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nxm_export.contract.io_spec import load_spec
from nxm_export.data.columns import Columns
from nxm_export.data.examples import Examples
from nxm_export.data.features import Features
from nxm_export.data.tokenization import Tokenizer
from nxm_export.errors import ArtifactError


@dataclass(frozen=True)
class LabelledTexts:
    """The examples of a data file, and how an engine makes tokens of them. `numbered`: their labels are numbers, which
    are taken for those of its classes."""

    examples: Examples
    tokenizer: Tokenizer
    length: int
    inputs: tuple[str, ...]
    numbered: bool

    def tokens(self) -> list[Features]:
        """The samples."""
        from nxm_export.data.examples import encode

        return encode(self.tokenizer, self.examples, self.length, self.inputs, says_cuts=True)


def labelled_texts(directory: Path, data: str, columns: Columns, limit: int) -> LabelledTexts:
    """A data file, read with the tokenizer and labels of a graph or engine directory."""
    from engines.passport import PASSPORT_FILE, covered_spec, covered_tokenizer, load_passport
    from nxm_export.contract.tasks import TASKS
    from nxm_export.data.label_kinds import classes_of, labelled, load_labelled
    from nxm_export.data.question_answering import answering
    from nxm_export.data.tokenization import load_tokenizer

    passport = load_passport(directory) if (directory / PASSPORT_FILE).is_file() else None
    spec = load_spec(directory) if passport is None else covered_spec(directory, passport)
    task = TASKS[spec.task]
    raw = load_labelled(data, "dev", columns, task, spec.labels)
    classes = classes_of(raw, task, spec.labels)
    numbered = classes is not None and classes.numbered
    tokenizer = load_tokenizer(directory) if passport is None else covered_tokenizer(directory, passport)
    length = min(limit, spec.max_length)
    examples = answering(labelled(raw, task, classes), spec.no_answer_threshold)
    return LabelledTexts(examples, tokenizer, length, spec.inputs, numbered)


def shared_features(engines: Sequence[str | Path], data: str, columns: Columns) -> tuple[list[Features], bool]:
    """(the data in tokens, as all of `engines` take it; whether its labels are numbers that are taken for those of
    their classes); `ArtifactError` where their tokenizers differ."""
    directories = [Path(engine) for engine in engines]
    limit = min(load_spec(directory).max_length for directory in directories)
    read = [labelled_texts(directory, data, columns, limit) for directory in directories]
    first, *rest = [texts.tokens() for texts in read]
    for directory, features in zip(directories[1:], rest, strict=True):
        if features != first:
            raise ArtifactError(
                f"{directory} reads the data in other tokens or labels than {directories[0]}; they cannot be compared "
                "with each other: build both from one checkpoint, or compare them one by one"
            )
    return first, read[0].numbered


def features_of(directory: Path, data: str, columns: Columns) -> list[Features]:
    """A labelled data file in tokens, by the tokenizer and labels of a graph or engine directory."""
    return labelled_texts(directory, data, columns, load_spec(directory).max_length).tokens()
