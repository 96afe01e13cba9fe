"""Compressed checkpoints of tiny seeded models, one per family and preset, made without training: for TensorRT's
tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.trt_models import Checkpoints, compressed, tiny_config

if TYPE_CHECKING:
    import onnx_ir as ir


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, _trace_cached: None) -> Checkpoints:
    """``checkpoints("bert", placement="attention", ...)``: a directory; equal arguments give the same one."""
    made: dict[tuple[object, ...], Path] = {}

    def make(
        family: str = "bert", placement: str = "inputs-outputs", residual: str = "float", gelu: str = "gelu",
        positions: int = 64, keep_dense: tuple[str, ...] = (), hidden: int = 128,
    ) -> Path:  # fmt: skip
        key = (family, placement, residual, gelu, positions, keep_dense, hidden)
        if key not in made:
            made[key] = compressed(
                tmp_path_factory.mktemp("checkpoint"),
                tiny_config(family, gelu, hidden, positions=positions),
                placement,
                residual,
                keep_dense,
            )
        return made[key]

    return make


@pytest.fixture(scope="session")
def _trace_cached() -> Iterator[None]:
    """Tracing takes seconds, and graphs of one model differ only in what is done to the trace: keep and copy it."""
    import hashlib

    from nxm_export.graph import exporter

    trace = exporter._trace
    traces: dict[tuple[str, str, str, int], ir.Model] = {}

    def traced(opened: exporter._OpenedModel, dtype: str, opset: int) -> ir.Model:
        files = ((opened.path / name).read_bytes() for name in ("model.safetensors", "config.json"))
        key = (hashlib.sha256(b"".join(files)).hexdigest(), opened.task.name, dtype, opset)
        if key not in traces:
            traces[key] = trace(opened, dtype, opset)
        return traces[key].clone()

    exporter._trace = traced
    yield
    exporter._trace = trace
