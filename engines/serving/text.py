"""Sentences in, class names out: the optional text face of a served engine.

Tokens come from the same code as in training and comparison (`nxm_export.data.encode`), with the tokenizer that lies in
the engine's directory. A text longer than the model's positions is cut, as it was in training; one that is absurdly long
is refused, because the whole of it would be read before it is cut.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from engines.serving.protocol import TensorSpec
from nxm_export.data import Examples, encode, load_tokenizer, pad
from nxm_export.errors import RequestRefused
from nxm_export.families import TASKS
from nxm_export.spec import IOSpec

TEXT, PAIR, LABEL = "text", "text_pair", "label"
INPUTS = (TensorSpec(TEXT, "BYTES", (-1, 1)), TensorSpec(PAIR, "BYTES", (-1, 1), optional=True))
BYTES_PER_TOKEN = 64  # no tokenizer of this family makes tokens that long out of text that anyone would write


class TextFace:
    """Tokenizes for one engine. May be called from several threads: they take turns at the tokenizer."""

    def __init__(self, directory: Path, spec: IOSpec) -> None:
        self._tokenizer = load_tokenizer(directory)
        self._spec = spec
        self._turn = threading.Lock()  # a tokenizer is not to be configured while another thread uses it

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What a request for text gets beside the engine's outputs: the class name, where there are classes."""
        return (TensorSpec(LABEL, "BYTES", (-1, 1)),) if names_classes(self._spec) else ()

    def tokens(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The engine's feeds (rows, longest text) for BYTES tensors (rows, 1); raises `RequestRefused` (400)."""
        texts = self._decode(TEXT, tensors[TEXT])
        pairs = self._decode(PAIR, tensors[PAIR]) if PAIR in tensors else None
        wants = TASKS[self._spec.task].texts
        if wants == "one" and pairs is not None:
            raise RequestRefused(
                400, f"{self._spec.task} reads one text a row; send what is in {PAIR} as rows of {TEXT}"
            )
        if wants == "two" and pairs is None:
            raise RequestRefused(
                400, f"{self._spec.task} needs {TEXT} (the query) and {PAIR} (the document) in every row"
            )
        if pairs is not None and len(pairs) != len(texts):
            raise RequestRefused(400, f"{TEXT} has {len(texts)} rows and {PAIR} has {len(pairs)}")
        examples = Examples(texts, pairs, [0] * len(texts), "request")
        with self._turn:
            features = encode(self._tokenizer, examples, self._spec.max_length, self._spec.inputs)
        return pad(features, self._spec.pad_id)

    def labels(self, outputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """Class names (rows, 1) by the largest logit of the first output."""
        first = outputs[next(iter(self._spec.outputs))]
        return np.array([[self._spec.labels[i]] for i in first.argmax(axis=-1)], object)

    def _decode(self, name: str, array: np.ndarray) -> list[str]:
        limit = BYTES_PER_TOKEN * self._spec.max_length
        found = []
        for row, item in enumerate(array.ravel()):
            if len(item) > limit:
                raise RequestRefused(400, f"row {row} of {name} has {len(item)} bytes; at most {limit} are served")
            try:
                found.append(item.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise RequestRefused(400, f"row {row} of {name} is not UTF-8 (byte {error.start})") from None
        return found


def names_classes(spec: IOSpec) -> bool:
    """True when the first output holds classes that have names, one of which is the sample's."""
    return bool(spec.labels) and next(iter(spec.outputs.values())) == ("batch", "classes")


def text_size(tensors: Mapping[str, np.ndarray]) -> int:
    """Bytes of text in a request."""
    return sum(len(item) for array in tensors.values() for item in array.ravel())
