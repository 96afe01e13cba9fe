"""One trace for all checkpoints of one architecture: tracing takes nearly all the time of an export, and weights do not
change it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir

from nxm_export.contract.encoder_family import Family
from nxm_export.contract.tasks import Task
from nxm_export.hf.model_loading import load_task_model


class SharedTraces:
    """Stands in for `exporter.trace`: the first model of an architecture is traced, the others take its trace with
    weights of their own.

    An architecture is what ``config.json`` and the files of a sentence embedding's pooling say, with the task, the
    dtype and the opset. Exports in child processes trace as ever.
    """

    def __init__(self, trace: Callable[[Path, Task, Family, str, int], ir.Model]) -> None:
        self.trace = trace
        self.traced: dict[tuple[str, ...], ir.Model] = {}

    def __call__(self, path: Path, task: Task, family: Family, dtype: str, opset: int) -> ir.Model:
        key = (_architecture(path), task.name, dtype, str(opset))
        if key not in self.traced:
            self.traced[key] = self.trace(path, task, family, dtype, opset)
            return self.traced[key].clone()
        return with_weights_of(path, task, dtype, self.traced[key].clone())


def with_weights_of(path: Path, task: Task, dtype: str, model: ir.Model) -> ir.Model:
    """`model`, a trace of a model like the one in `path`, with that one's weights."""
    for name, tensor in load_task_model(path, task, dtype=dtype).state_dict().items():
        if name in model.graph.initializers:
            model.graph.initializers[name].const_value = ir.tensor(tensor, name=name)
    return model


def _architecture(path: Path) -> str:
    digest = hashlib.sha256()
    for file in [path / "config.json", *sorted(path.glob("*_Pooling/config.json")), path / "modules.json"]:
        digest.update(file.read_bytes() if file.exists() else b"none")
    return digest.hexdigest()
