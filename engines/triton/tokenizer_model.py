"""The tokenizer of a text ensemble, run by Triton's Python backend from the model directory that `nxm triton` writes.

BYTES text (batch, 1) to token tensors (batch, length), padded to the next of ``lengths``: Triton's batcher merges equal
shapes only, so without buckets almost nothing would share a batch. It stands alone in the container: the `tokenizers`
package, and ``tokenizer.json``, ``text.json`` and ``long_texts.py`` (`engines.serving.long_texts`) beside it.
"""

from __future__ import annotations

import json
import os
from types import ModuleType

import numpy as np

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
                texts = self._texts(backend, request, "text")
                pairs = self._texts(backend, request, "text_pair") if self.settings["pair"] else None
                tensors = [backend.Tensor(name, array) for name, array in self._encode(texts, pairs).items()]
                responses.append(backend.InferenceResponse(tensors))
            except ValueError as error:
                responses.append(backend.InferenceResponse([], backend.TritonError(str(error))))
        return responses

    def _texts(self, backend: ModuleType, request: object, name: str) -> list[str]:
        texts = []
        for row, item in enumerate(backend.get_input_tensor_by_name(request, name).as_numpy().ravel()):
            try:
                texts.append(item.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise ValueError(f"row {row} of {name} is not UTF-8 (byte {error.start})") from None
        return texts

    def _encode(self, texts: list[str], pairs: list[str] | None) -> dict[str, np.ndarray]:
        rows = self._cut(texts, pairs)
        self.tokenizer.enable_truncation(self.settings["max_length"], direction=self.side)
        encodings = self.tokenizer.encode_batch(rows)
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

    def _cut(self, texts: list[str], pairs: list[str] | None) -> list[str] | list[tuple[str, str]]:
        """The rows, far too long texts cut where that changes no token, as `nxm serve` does."""
        from long_texts import beginning, beginnings  # type: ignore[import-not-found]

        limits = (self._count, self.settings["max_length"], self.settings["longest_run"])
        if self.side == "left":
            return self._short(texts, pairs)
        self.tokenizer.no_truncation()
        if pairs is None:
            return [beginning(text, *limits) for text in texts]
        return [beginnings(text, pair, *limits) for text, pair in zip(texts, pairs)]  # noqa: B905 - the config's shape

    def _short(self, texts: list[str], pairs: list[str] | None) -> list[str] | list[tuple[str, str]]:
        """The rows; one that is far too long is refused, since the tokenizer reads texts from their ends."""
        longest = self.settings["longest_run"]
        for row, size in enumerate(max(map(len, both)) for both in zip(texts, pairs or texts)):  # noqa: B905
            if size > longest:
                raise ValueError(f"row {row} has {size} characters; at most {longest} are served")
        return texts if pairs is None else list(zip(texts, pairs))  # noqa: B905 - the config's shape

    def _count(self, text: str) -> int:
        return len(self.tokenizer.encode(text, add_special_tokens=False).ids)
