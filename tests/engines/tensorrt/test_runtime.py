"""A TensorRT engine at work, with a double of its execution context; `test_rehearsal` has the whole of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engines.tensorrt.runtime import TensorRTEngine
from nxm_export.errors import EngineError


class _Profiler:
    """`trt.IProfiler`, which TensorRT tells the time of every layer."""

    report_layer_time: Any


@pytest.mark.parametrize("runs", [True, False])
def test_layers_that_did_not_run_have_no_times(runs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    context = SimpleNamespace(profiler=None)

    def execute(_: int) -> bool:
        if runs:
            context.profiler.report_layer_time("layer", 0.5)
        return runs

    context.execute_async_v3 = execute
    engine: Any = object.__new__(TensorRTEngine)
    engine._trt, engine.file = SimpleNamespace(IProfiler=_Profiler), Path("model.engine")
    engine._messages, engine._contexts = ["an error of CUDA"], {}
    device = SimpleNamespace(stream=0, synchronize=lambda: None)
    monkeypatch.setattr(engine, "_prepare", lambda _: (device, context))
    if runs:
        assert engine.layer_times({}, 4) == {"layer": 0.5}
    else:
        with pytest.raises(EngineError, match="TensorRT failed: an error of CUDA"):
            engine.layer_times({}, 4)
