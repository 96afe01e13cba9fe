"""The last step of a text ensemble that answers questions, run by Triton's Python backend: logits of start and end
(batch, sequence), with the question and the context that they are of, to answers in words (batch, 1), empty where there
is none.

The rule is that of `nxm serve` and of scoring, and its file the same: ``answer_spans.py``, which is
`nxm_export.data.answer_spans`, lies beside this one, with ``tokenizer.json`` and ``answers.json``. The logits are
passed on, see `engines.triton.config.text_configs`.
"""

from __future__ import annotations

import json
import os
from types import ModuleType

import numpy as np


class TritonPythonModel:
    """What Triton's Python backend looks for."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the tokenizer and the rule."""
        from tokenizers import Tokenizer

        here = os.path.join(args["model_repository"], args["model_version"])
        with open(os.path.join(here, "answers.json"), encoding="utf-8") as stream:
            self.settings = json.load(stream)
        self.tokenizer = Tokenizer.from_file(os.path.join(here, "tokenizer.json"))

    def execute(self, requests: list[object]) -> list[object]:
        """Answer every request by itself; a bad one gets an error of its own."""
        import triton_python_backend_utils as backend

        responses = []
        for request in requests:
            try:
                logits = {
                    name: backend.get_input_tensor_by_name(request, f"engine_{name}").as_numpy()
                    for name in self.settings["outputs"]
                }
                questions, contexts = (self._texts(backend, request, name) for name in self.settings["texts"])
                answers = self._answers(questions, contexts, np.stack(list(logits.values()), axis=-1))
                tensors = [backend.Tensor(name, array) for name, array in {"answer": answers, **logits}.items()]
                responses.append(backend.InferenceResponse(tensors))
            except ValueError as error:
                # Without a code it is a failure of the server's, status 500, which clients send again.
                refused = backend.TritonError(str(error), backend.TritonError.INVALID_ARG)
                responses.append(backend.InferenceResponse([], refused))
        return responses

    def _texts(self, backend: ModuleType, request: object, name: str) -> list[str]:
        """The texts of one input; the step before has read them, too, and refuses what is no UTF-8."""
        return [item.decode("utf-8") for item in backend.get_input_tensor_by_name(request, name).as_numpy().ravel()]

    def _answers(self, questions: list[str], contexts: list[str], logits: np.ndarray) -> np.ndarray:
        """(rows, 1) for logits (rows, sequence, 2): each context is one window, or the step before refuses it."""
        from answer_spans import best_answer, context_windows, window_of  # type: ignore[import-not-found]

        most, threshold = self.settings["max_length"], self.settings["no_answer_threshold"]
        answers = []
        for question, context, row in zip(questions, contexts, logits):  # noqa: B905 - one row each
            encoding = context_windows(self.tokenizer, question, context, most)[0]
            window = window_of(encoding, context, (), threshold)
            answers.append([best_answer([row], [window]).text([window]).encode("utf-8")])
        return np.array(answers, object)
