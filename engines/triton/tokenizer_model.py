"""The tokenizer of a text ensemble, run by Triton's Python backend from the model directory that `nxm triton` writes.

BYTES text (batch, 1) to token tensors (batch, length), padded to the next of ``lengths``: Triton's batcher merges equal
shapes only, so without buckets almost nothing would share a batch. It stands alone in the container: the `tokenizers`
package, and ``tokenizer.json``, ``text.json`` and ``long_texts.py`` (`engines.serving.long_texts`) beside it; for
questions also ``answer_spans.py`` (`nxm_export.data.answer_spans`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from nxm_export.data.tokenization import Encoding

_FIELDS = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}


class TritonPythonModel:
    """What Triton's Python backend looks for."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the tokenizer and how the engine wants its tokens."""
        from tokenizers import Tokenizer

        here = os.path.join(args["model_repository"], args["model_version"])
        with open(os.path.join(here, "text.json"), encoding="utf-8") as stream:
            self.settings = json.load(stream)
        self.tokenizer = Tokenizer.from_file(os.path.join(here, "tokenizer.json"))
        self.tokenizer.no_padding()
        self.side = (self.tokenizer.truncation or {}).get("direction", "right")  # the tokenizer's own

    def execute(self, requests: list[object]) -> list[object]:
        """Tokenize every request by itself; a bad one gets an error of its own."""
        import triton_python_backend_utils as backend

        responses = []
        for request in requests:
            try:
                # None for a second text that may be left out and is.
                given = [self._texts(backend, request, name) for name in self.settings["texts"]]
                texts = [each for each in given if each is not None]
                tensors = [backend.Tensor(name, array) for name, array in self._encode(*texts).items()]
                responses.append(backend.InferenceResponse(tensors))
            except ValueError as error:
                # Without a code it is a failure of the server's, status 500, which clients send again.
                refused = backend.TritonError(str(error), backend.TritonError.INVALID_ARG)
                responses.append(backend.InferenceResponse([], refused))
        return responses

    def _texts(self, backend: ModuleType, request: object, name: str) -> list[str] | None:
        tensor = backend.get_input_tensor_by_name(request, name)
        if tensor is None:
            return None
        texts = []
        for row, item in enumerate(tensor.as_numpy().ravel()):
            try:
                texts.append(item.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise ValueError(f"row {row} of {name} is not UTF-8 (byte {error.start})") from None
        return texts

    def _encode(self, texts: list[str], pairs: list[str] | None = None) -> dict[str, np.ndarray]:
        # A second text that is empty is none, as in training.
        rows = [(text, pair) if pair else (text,) for text, pair in zip(texts, pairs or [""] * len(texts))]  # noqa: B905
        encodings = self._questions(texts, pairs) if self.settings["answers"] and pairs else self._encodings(rows)
        longest = max(len(encoding.ids) for encoding in encodings)
        length = next(bucket for bucket in self.settings["lengths"] if bucket >= longest)
        tensors = {}
        for name, dtype in self.settings["inputs"].items():
            array = np.full((len(rows), length), self.settings["pad_id"] if name == "input_ids" else 0, dtype)
            for row, encoding in zip(array, encodings):  # noqa: B905 - one encoding a row
                values = getattr(encoding, _FIELDS[name])
                row[: len(values)] = values
            tensors[name] = array
        return tensors

    def _encodings(self, rows: Sequence[tuple[str, ...]]) -> list[Encoding]:
        """The tokens of every row, as `nxm serve` makes them."""
        from long_texts import encode_long, is_long  # type: ignore[import-not-found]

        most = self.settings["max_length"]
        short = [row if len(row) == 2 else row[0] for row in rows if not is_long(row, most)]
        self.tokenizer.enable_truncation(most, direction=self.side)
        made = iter(self.tokenizer.encode_batch(short))
        return [encode_long(self.tokenizer, row, most) if is_long(row, most) else next(made) for row in rows]

    def _questions(self, questions: list[str], contexts: list[str]) -> list[Encoding]:
        """The tokens of questions with their contexts, each in one window; raises `ValueError` where it takes more,
        since the answer could be in what would be cut."""
        from answer_spans import (  # type: ignore[import-not-found]
            context_windows,
            takes_more_than_one_window,
            window_of,
        )
        from long_texts import LETTERS_PER_TOKEN

        most, made = self.settings["max_length"], []
        for row, (question, context) in enumerate(zip(questions, contexts)):  # noqa: B905 - one context a question
            for name, text in zip(self.settings["texts"], (question, context)):  # noqa: B905
                size = len(text.encode("utf-8"))
                if size > LETTERS_PER_TOKEN * most:
                    limit = LETTERS_PER_TOKEN * most
                    raise ValueError(f"row {row} of {name} has {size} bytes; at most {limit} are served")
            if takes_more_than_one_window(self.tokenizer, question, context, most):
                pair = self.settings["texts"][1]
                raise ValueError(
                    f"row {row} of {pair} and its question take more than {most} tokens; ask about it in parts"
                )
            try:
                (encoding,) = context_windows(self.tokenizer, question, context, most)
                window_of(encoding, context)
            except ValueError as error:
                raise ValueError(f"row {row}: {error}") from error
            made.append(encoding)
        return made
