"""Texts in, typed answers out, from an engine directory alone: its tokenizer, its labels and its task.

Needs the engine's runtime and the tokenizers package, neither torch nor transformers::

    with Predictor("engine") as predictor:
        predictor.predict(["a wonderful film"])   # such as [Prediction(label='positive', score=0.98)]

A text is tokenized as in training and comparison. One that is longer than the model's input is cut where its tokenizer
cuts, and `Predictor.shortened` counts such texts; the context of a question is never cut, but read in windows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from engines.admission import admitted, require_unchanged
from engines.base import Engine, LoadOptions, Profile, backend
from engines.parallel_runs import run_batches
from engines.passport import covered_spec, covered_tokenizer, load_passport
from engines.serving.shapes import plan_buckets
from nxm_export.contract.choices import GATE, HINT, HINTS
from nxm_export.contract.io_spec import TOKENIZER_FILE, IOSpec
from nxm_export.contract.tasks import TASKS
from nxm_export.contract.token_budget import MAX_BATCH_TOKENS, THREAD_BATCH_TOKENS
from nxm_export.data.answer_spans import Window
from nxm_export.data.examples import Examples, encode
from nxm_export.data.features import Features, label_array, pad, sorted_batches, tokens_of
from nxm_export.data.metrics import scored_outputs
from nxm_export.data.predictions import (
    AnyPrediction,
    Array,
    Word,
    of_classes,
    of_labels,
    of_scores,
    of_spans,
    of_tags,
    of_vectors,
)
from nxm_export.data.question_answering import answering, windows
from nxm_export.data.texts import Text, text_read
from nxm_export.data.token_labels import token_pieces, token_ranges
from nxm_export.data.tokenization import Encoding, cut_at, tokenizer_failures
from nxm_export.errors import ArtifactError, DataError, EngineError, NxmError

BATCH = 32  # texts that run at once
_PAIR = {"question-answering": "(question, context)", "reranking": "(query, document)"}


class Predictor:
    """A loaded engine directory that answers texts. Close it, or use it as a context manager.

    `threads` are those of an engine on the CPU; by default as it was built. `hint` is what they are for: ``latency``
    runs one batch at a time on all of them, ``throughput`` as many small batches at a time as threads, which answers
    many texts sooner and one text later (CPU alone). `gate` is which ``parity.json`` the engine
    must have (one of `nxm_export.contract.choices.GATES`), `expect_sha256` the hashes of which its own, or that of all
    its contents, must be one. Raises `EngineUnavailable` where the engine cannot run here, `ArtifactError` for a
    directory that is none of ours or whose files are not those of its passport, `ParityError` for a parity that is not
    good enough for `gate`, `ServeError` for a hash that was not expected or a directory that is replaced meanwhile,
    and `DataError` for less than one thread, an unknown hint, and throughput of an engine that is not on the CPU.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        threads: int | None = None,
        hint: str = HINT,
        gate: str = GATE,
        expect_sha256: Collection[str] = (),
    ) -> None:
        if threads is not None and threads < 1:
            raise DataError(
                f"an engine runs on at least one thread, got {threads}; leave it out for those it was built with"
            )
        if hint not in HINTS:
            raise DataError(f"unknown hint {hint!r}; choose one of {', '.join(HINTS)}")
        self.directory = Path(directory)
        self.shortened = 0
        passport = admitted(self.directory, gate, expect_sha256)
        if hint == "throughput" and not backend(passport.backend).CAPABILITIES.throughput:
            raise DataError(
                f"{self.directory}: an engine of {passport.backend} runs one batch at a time; leave the hint out"
            )
        self._batch_tokens = THREAD_BATCH_TOKENS if hint == "throughput" else MAX_BATCH_TOKENS
        passport.notice_coverage(self.directory)
        self.spec: IOSpec = covered_spec(self.directory, passport)
        self._task = TASKS[self.spec.task]
        self._tokenizer = covered_tokenizer(self.directory, passport)
        self._profiles: Sequence[Profile] = passport.profiles
        self._engine: Engine = backend(passport.backend).load(self.directory, LoadOptions(threads, hint))
        try:
            require_unchanged(self.directory, passport)
        except NxmError:
            self._engine.close()
            raise

    def predict(self, texts: Iterable[Text], *, batch: int = BATCH) -> list[AnyPrediction]:
        """One result for every text, in order; its type is that of the engine's task (`nxm_export.data.predictions`).

        Pairs are tuples: a second text for classifiers of pairs, a document for a query, a context for a question.
        Where tokens have tags, a text may be the list of its tokens: they are its words then, as in training, and
        places count the characters of the tokens with one space between them.
        `batch` texts run at once, fewer where they are long (`nxm_export.contract.token_budget`), and with the hint
        ``throughput`` several such batches, of fewer tokens, at a time. Raises `DataError`
        for input that the task does not read, with its position, and
        `EngineError` for an engine whose outputs are not finite, and `ArtifactError` for one that has not as many
        classes as labels.
        """
        if isinstance(texts, str):
            raise DataError(f"predict takes a list of texts; write [{texts[:40]!r}]")
        if batch < 1:
            raise DataError(f"a batch has at least one text, got {batch}")
        rows = list(texts)
        self._require_readable(rows)
        if not rows:
            return []
        if self._task.output_kind == "span":
            return [*self._answers(rows, batch)]
        encodings = self._tokenized(rows)
        features = [tokens_of(made, self.spec.inputs) for made in encodings]
        values = self._run(features, batch)
        if self.spec.task == "token-classification":
            return [
                of_tags(value, _words(made, row), str(text_read(row)), self.spec.labels)
                for value, made, row in zip(values, encodings, rows, strict=True)
            ]
        stacked = np.stack(values)
        if self._task.output_kind == "softmax":
            return [*of_classes(stacked, self.spec.labels)]
        if self._task.output_kind == "sigmoid":
            return [*of_labels(stacked, self.spec.labels)]
        return [*of_vectors(stacked)] if self._task.output_kind == "vector" else [*of_scores(stacked)]

    def close(self) -> None:
        """Free the engine; calling it again does nothing."""
        self._engine.close()

    def __enter__(self) -> Predictor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _require_readable(self, rows: Sequence[object]) -> None:
        """Raise `DataError` unless all rows are texts, or all are pairs, as the task reads them."""
        reads, task, tagged = self._task.texts, self.spec.task, self._task.label == "tags"
        for number, row in enumerate(rows):
            split = tagged and isinstance(row, list)
            pair = isinstance(row, (tuple, list)) and not split
            parts = list(row) if isinstance(row, (tuple, list)) else [row]
            if not all(isinstance(part, str) for part in parts) or (not split and len(parts) != (2 if pair else 1)):
                several = "the list of its tokens" if tagged else "a pair of two strings"
                raise DataError(f"text {number} is {row!r}; give a string, or {several}")
            if pair and tagged:
                raise DataError(
                    f"text {number} is a pair, and {task} reads one text at a time; give strings, or lists of tokens"
                )
            if pair and reads == "one":
                raise DataError(f"text {number} is a pair, and {task} reads one text at a time; give strings")
            if not pair and reads == "two":
                raise DataError(f"text {number} is one string, and {task} reads pairs: {_PAIR[task]}")
            if pair != (isinstance(rows[0], (tuple, list)) and not tagged):
                raise DataError(f"text {number} is {'a pair' if pair else 'one string'}, unlike text 0; give one kind")
            for part in parts:
                try:
                    str(part).encode("utf-8")
                except UnicodeEncodeError as error:
                    raise DataError(f"text {number} holds half a surrogate pair, which is no text; mend it") from error

    def _tokenized(self, rows: Sequence[Text]) -> Sequence[Encoding]:
        """Tokens of every text, cut at the longest input; texts that were cut are counted."""
        longest = self._longest()
        texts = [text_read(row) if self._task.label == "tags" else row for row in rows]
        special = self._tokenizer.num_special_tokens_to_add(not isinstance(texts[0], str))
        if longest <= special:
            raise DataError(
                f"{self.directory}: its input of {longest} tokens leaves no room beside {special} special ones"
            )
        cut_at(self._tokenizer, longest)
        with self._tokenizing():
            # A second text that is empty is none, as in training.
            encodings = self._tokenizer.encode_batch(
                [text if isinstance(text, str) else (text[0], text[1]) if text[1] else text[0] for text in texts]
            )
        self.shortened += sum(bool(made.overflowing) for made in encodings)
        return encodings

    def _answers(self, rows: Sequence[Text], batch: int) -> Iterable[AnyPrediction]:
        questions, contexts = ([row[side] for row in rows] for side in (0, 1))
        empty: list[tuple[tuple[str, int], ...]] = [()] * len(questions)
        asked = Examples(questions, contexts, empty, "predict", encoder=windows)
        examples = answering(asked, self.spec.no_answer_threshold)
        with self._tokenizing():
            features = encode(self._tokenizer, examples, self._longest(), self.spec.inputs)
        values = self._run(features, batch)
        labels = label_array(features)
        for _, members in groupby(range(len(features)), key=lambda i: features[i]["group"]):
            own = list(members)
            yield of_spans([values[i] for i in own], [Window.unpack(labels[i]) for i in own])

    def _tokenizing(self) -> AbstractContextManager[None]:
        return tokenizer_failures(f"{self.directory / TOKENIZER_FILE}: it fails on these texts")

    def _longest(self) -> int:
        """Tokens of the longest input: the model's, or what the engine has profiles for."""
        return min(self.spec.max_length, max((p.maximum[1] for p in self._profiles), default=self.spec.max_length))

    def _run(self, features: Sequence[Features], batch: int) -> list[Array]:
        """What the task's metric reads, of every sample: logits (classes), (tokens, tags), (tokens, 2), or a vector."""
        results: list[Array | None] = [None] * len(features)
        batches = [*self._batches(features, batch)]

        def feeds_of(made: _Batch) -> Mapping[str, npt.NDArray[np.int64]]:
            samples = [features[i] for i in made.indices]
            return _with_rows(pad(samples, self.spec.pad_id, made.length), made.rows)

        for made, raw in run_batches(self._engine, batches, feeds_of, lambda made: made.rows * made.length):
            indices, outputs = made.indices, scored_outputs(self._task, raw)
            self._require_labelled(outputs)
            if not np.isfinite(outputs[: len(indices)]).all():
                raise EngineError(f"{self.directory}: the engine gives NaN or infinity; run `nxm compare` on it")
            for row, i in enumerate(indices):
                tokens = len(features[i]["input_ids"])
                results[i] = outputs[row, :tokens] if "sequence" in self.spec.outputs[self._first] else outputs[row]
        return [result for result in results if result is not None]

    def _require_labelled(self, outputs: Array) -> None:
        """Raise `ArtifactError` unless there is a label for every class of the outputs."""
        labels = len(self.spec.labels)
        if self._task.output_kind in ("softmax", "sigmoid") and outputs.shape[-1] != labels:
            raise ArtifactError(
                f"{self.directory}: its engine gives {outputs.shape[-1]} numbers, and its spec.json names {labels} "
                "labels; build it again from its graph"
            )

    @property
    def _first(self) -> str:
        return next(iter(self.spec.outputs))

    def _batches(self, features: Sequence[Features], batch: int) -> Iterable[_Batch]:
        """As the engine's profiles have room, or by length without any."""
        if not self._profiles:
            for indices in sorted_batches(features, batch, self._batch_tokens):
                yield _Batch(indices, len(indices), max(len(features[i]["input_ids"]) for i in indices))
            return
        least = min(profile.minimum[0] for profile in self._profiles)
        buckets = plan_buckets(self._longest(), max(batch, least), self._profiles)
        lengths = [len(sample["input_ids"]) for sample in features]
        place = [buckets.index(1, length) for length in lengths]
        for at, bucket in enumerate(buckets.buckets):
            members = [i for i, chosen in enumerate(place) if chosen == at]
            for start in range(0, len(members), bucket.most):
                indices = members[start : start + bucket.most]
                yield _Batch(indices, max(len(indices), bucket.least), bucket.length)


def hint_for(directory: str | Path, texts: int, batch: int = BATCH) -> str:
    """The hint that suits so many texts, `batch` of which run at once: ``throughput`` for more than one batch, where
    the engine can be loaded for it. Raises `ArtifactError` for a directory that is no engine."""
    able = backend(load_passport(Path(directory)).backend).CAPABILITIES.throughput
    return "throughput" if able and texts > batch else HINT


@dataclass(frozen=True)
class _Batch:
    """The indices of samples that run together, the rows to run and the length to pad to."""

    indices: list[int]
    rows: int
    length: int


def _with_rows(feeds: Mapping[str, npt.NDArray[np.int64]], rows: int) -> dict[str, npt.NDArray[np.int64]]:
    """`feeds` with their last row repeated up to `rows`: engines of a profile may need a least batch."""
    return {
        name: np.concatenate([array, np.repeat(array[-1:], rows - len(array), axis=0)]) if len(array) < rows else array
        for name, array in feeds.items()
    }


def _words(made: Encoding, row: Text) -> list[Word]:
    """The words of a text and their first tokens: those that it is given as, or as the tokenizer splits it."""
    if isinstance(row, list):
        ranges = token_ranges(row)
        return [Word(*ranges[number], token) for number, token in token_pieces(made, row)]
    text, words, at = str(row), list[Word](), dict[int, int]()
    for part in (made, *made.overflowing):  # a word that is cut in two is one
        for token, (number, (start, end)) in enumerate(zip(part.word_ids, part.offsets, strict=True)):
            while start < end and text[start].isspace():  # some tokenizers count the space before a word to it
                start += 1
            if number is None or start == end:
                continue
            if number in at:
                word = words[at[number]]
                words[at[number]] = Word(min(word.start, start), max(word.end, end), word.token)
            elif part is made:
                at[number] = len(words)
                words.append(Word(start, end, token))
    return words
