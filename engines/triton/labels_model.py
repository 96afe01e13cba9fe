"""The last step of a text ensemble, run by Triton's Python backend: logits (batch, classes) to class names (batch, 1).

The logits are passed on, see `engines.triton.config.text_configs`.
"""

from __future__ import annotations

import json
import os

import numpy as np


class TritonPythonModel:
    """What Triton's Python backend looks for."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the names."""
        with open(
            os.path.join(args["model_repository"], args["model_version"], "labels.json"), encoding="utf-8"
        ) as stream:
            settings = json.load(stream)
        self.output, self.labels = settings["output"], settings["labels"]

    def execute(self, requests: list[object]) -> list[object]:
        """Name the largest logit of every row."""
        import triton_python_backend_utils as backend

        responses = []
        for request in requests:
            logits = backend.get_input_tensor_by_name(request, f"engine_{self.output}").as_numpy()
            names = np.array([[self.labels[i].encode("utf-8")] for i in logits.argmax(axis=-1)], object)
            responses.append(
                backend.InferenceResponse([backend.Tensor("label", names), backend.Tensor(self.output, logits)])
            )
        return responses
