"""An export that takes the trace of another model is the export that it would have traced itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from nxm_export.graph import exporter
from tests.support import baked
from tests.support.shared_traces import SharedTraces


@pytest.mark.slow
@pytest.mark.parametrize(("target", "dtype"), [("cpu", "float32"), ("trt", "bfloat16")])
def test_a_shared_trace_gives_the_file_of_a_trace_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared_traces: SharedTraces, target: str, dtype: str
) -> None:
    """Of two checkpoints with other weights: the second has the first one's trace. A copy of a trace, as shared ones
    are, numbers its temporary values anew."""
    for seed in (3, 4):
        baked.write_checkpoint("bert", tmp_path / f"checkpoint-{seed}", seed=seed)
    traces = SharedTraces(shared_traces.trace)
    monkeypatch.setattr(exporter, "trace", traces)
    first, shared = (
        exporter.export(tmp_path / f"checkpoint-{seed}", tmp_path / f"{seed}", target=target, dtype=dtype)
        for seed in (3, 4)
    )
    assert len(traces.traced) == 1
    monkeypatch.setattr(exporter, "trace", lambda *arguments: shared_traces.trace(*arguments).clone())
    traced = exporter.export(tmp_path / "checkpoint-4", tmp_path / "traced", target=target, dtype=dtype)
    assert shared.path.read_bytes() == traced.path.read_bytes() != first.path.read_bytes()
