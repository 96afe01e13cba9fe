"""What a server of the Open Inference Protocol answered, in JSON, as arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nxm_export.storage.json_files import convert
from tools.raw_http import Answer


@dataclass(frozen=True)
class _Output:
    name: str
    shape: tuple[int, ...]
    data: list[float | str]


@dataclass(frozen=True)
class _Outputs:
    outputs: list[_Output]


def outputs_of(answer: Answer) -> dict[str, np.ndarray]:
    """The outputs by name: float32, or texts as objects."""
    body = convert(answer.json(), _Outputs, source="the answer", way_out="look at the server", foreign=True)
    arrays: dict[str, np.ndarray] = {}
    for output in body.outputs:
        is_text = any(isinstance(entry, str) for entry in output.data)
        arrays[output.name] = np.array(output.data, object if is_text else np.float32).reshape(output.shape)
    return arrays
