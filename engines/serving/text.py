"""Sentences in, class names out; questions and contexts in, answers out: the optional text frontend of a served engine.

Tokens come from the same code as in training and comparison (`nxm_export.data.examples.encode`), with the tokenizer
that lies in the engine's directory. A text longer than the model's positions is cut, as it was in training, without
reading all of it (`engines.serving.long_texts`). A context is never cut: the answer could be in the part that is gone,
so one that takes more than a window is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from queue import SimpleQueue

import numpy as np

from engines.serving.long_texts import LETTERS_PER_TOKEN, encode_long, is_long
from engines.serving.protocol import TensorSpec
from nxm_export.contract.io_spec import IOSpec
from nxm_export.contract.tasks import TASKS
from nxm_export.data.answer_spans import Window, best_answer, takes_more_than_one_window
from nxm_export.data.examples import Examples, as_read, encode
from nxm_export.data.features import Features, Label, label_array, pad, tokens_of
from nxm_export.data.metrics import scored_outputs
from nxm_export.data.question_answering import answering, windows
from nxm_export.data.tokenization import Tokenizer, twin_of
from nxm_export.errors import DataError, RequestRefused, ServeError

TEXT, PAIR, LABEL, ANSWER = "text", "text_pair", "label", "answer"
THREADS = 3  # the event loop's, that of short requests and that of long ones (`engines.serving.app`)


class TextFrontend:
    """Tokenizes for one engine. May be called from several threads, `THREADS` of which never wait for each other."""

    def __init__(self, tokenizer: Tokenizer, spec: IOSpec, longest: int | None = None) -> None:
        """`longest` is the most tokens that the engine takes, where those are fewer than the model's positions."""
        # A tokenizer is not to be configured while another thread uses it.
        self._free = SimpleQueue["Tokenizer"]()
        self._free.put(tokenizer)
        for _ in range(THREADS - 1):
            self._free.put(twin_of(tokenizer))
        self._spec = spec
        self._max_length = min(spec.max_length, longest or spec.max_length)
        self._spans = TASKS[spec.task].output_kind == "span"

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What a request for text has: a text, where the task reads two a second one, and where it reads any number of
        them perhaps a second one."""
        wants = TASKS[self._spec.task].texts
        pair = TensorSpec(PAIR, "BYTES", (-1, 1), optional=wants == "any")
        return (TensorSpec(TEXT, "BYTES", (-1, 1)), *([] if wants == "one" else [pair]))

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What it gets beside the engine's outputs: the class name, where there are classes, or the answer."""
        if self._spans:
            return (TensorSpec(ANSWER, "BYTES", (-1, 1)),)
        return (TensorSpec(LABEL, "BYTES", (-1, 1)),) if names_classes(self._spec) else ()

    def tokens(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The engine's feeds (rows, longest text) for BYTES tensors (rows, 1) of `inputs`; raises `RequestRefused`
        (400)."""
        return pad(self._features(tensors), self._spec.pad_id)

    def words(self, tensors: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The `outputs` of this frontend (rows, 1) by name, for a request's BYTES tensors and the engine's outputs:
        classes by the largest logit of the first output, answers as `nxm compare` finds them, empty where there is
        none."""
        if self._spans:
            logits = scored_outputs(TASKS[self._spec.task], outputs)
            asked = [Window.unpack(label) for label in label_array(self._features(tensors))]
            found = [best_answer([row], [window]) for row, window in zip(logits, asked, strict=True)]
            answers = [answer.text([window]) for window, answer in zip(asked, found, strict=True)]
            return {ANSWER: np.array([[answer] for answer in answers], object)}
        if not self.outputs:
            return {}
        first = outputs[next(iter(self._spec.outputs))]
        return {LABEL: np.array([[self._spec.labels[i]] for i in first.argmax(axis=-1)], object)}

    def _features(self, tensors: Mapping[str, np.ndarray]) -> list[Features]:
        texts = self._decode(TEXT, tensors[TEXT])
        pairs = self._decode(PAIR, tensors[PAIR]) if PAIR in tensors else None
        if pairs is not None and len(pairs) != len(texts):
            raise RequestRefused(400, f"{TEXT} has {len(texts)} rows and {PAIR} has {len(pairs)}")
        tokenizer = self._free.get()
        try:
            return self._encoded(tokenizer, texts, pairs)
        finally:
            self._free.put(tokenizer)

    def _encoded(self, tokenizer: Tokenizer, texts: list[str], pairs: list[str] | None) -> list[Features]:
        """Tokens of the texts, as training makes them of the same ones."""
        no_labels: list[Label] = [()] * len(texts) if self._spans else [0] * len(texts)
        examples = Examples(texts, pairs, no_labels, "request", encoder=windows if self._spans else None)
        try:
            if self._spans:
                self._require_one_window(tokenizer, texts, pairs or [])
                asked = answering(examples, self._spec.no_answer_threshold)
                return encode(tokenizer, asked, self._max_length, self._spec.inputs)
            rows = [(row,) if isinstance(row, str) else row for row in as_read(texts, pairs)]
            long = {row for row, each in enumerate(rows) if is_long(each, self._max_length)}
            short = [row for row in range(len(rows)) if row not in long]
            made = encode(tokenizer, examples.subset(short), self._max_length, self._spec.inputs)
            short_features = iter(made)
            return [
                self._long(tokenizer, row, rows[row]) if row in long else next(short_features)
                for row in range(len(rows))
            ]
        except DataError as error:  # a question that leaves no room, a context without tokens
            raise RequestRefused(400, str(error)) from error
        except (RequestRefused, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of the tokenizers library is no `Exception`
            raise ServeError(f"the tokenizer failed ({type(error).__name__}: {error})") from error

    def _require_one_window(self, tokenizer: Tokenizer, questions: list[str], contexts: list[str]) -> None:
        """Raise `RequestRefused` (400) for a context that does not fit beside its question."""
        for row, (question, context) in enumerate(zip(questions, contexts, strict=True)):
            if takes_more_than_one_window(tokenizer, question, context, self._max_length):
                raise RequestRefused(
                    400,
                    f"row {row} of {PAIR} and its question take more than {self._max_length} tokens; ask about it in "
                    "parts",
                )

    def _long(self, tokenizer: Tokenizer, row: int, texts: Sequence[str]) -> Features:
        try:
            tokens = encode_long(tokenizer, texts, self._max_length)
        except ValueError as error:
            raise RequestRefused(400, f"row {row}: {error}") from error
        return {**tokens_of(tokens, self._spec.inputs), "labels": 0}

    def _decode(self, name: str, array: np.ndarray) -> list[str]:
        limit = LETTERS_PER_TOKEN * self._max_length
        texts = []
        for row, item in enumerate(array.ravel()):
            if self._spans and len(item) > limit:
                raise RequestRefused(400, f"row {row} of {name} has {len(item)} bytes; at most {limit} are served")
            try:
                texts.append(item.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise RequestRefused(400, f"row {row} of {name} is not UTF-8 (byte {error.start})") from None
        return texts


def names_classes(spec: IOSpec) -> bool:
    """True when the first output holds classes that have names, one of which is the sample's."""
    return bool(spec.labels) and next(iter(spec.outputs.values())) == ("batch", "classes")
