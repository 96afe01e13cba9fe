"""Records as files of a run hold them, with numbers chosen to be told apart."""

from __future__ import annotations

from engines.passport import EnginePassport, PlanSummary
from nxm_export.contract.records.run_summary import EngineParity, RtxBuild, RunSummary, ShapeLatency, TrainingFacts
from nxm_export.contract.records.speedup import Speedup

SUMMARY = RunSummary(
    metric="accuracy",
    dev_samples=64,
    dense=0.75,
    compressed=0.5,
    difference_interval=(-0.5, 0.0),
    checkpoint=0.5,
    compression={"hw": 0.8, "packed": 0.82, "values": 0.875},
    plan={"2:4+W8": 12},
    parity={"ort-cpu-int8": EngineParity(1.0, 1e-6, True, 0.5)},
    latency_ms={"ort-cpu-int8 1x32": ShapeLatency(1, 32, 0.25)},
    speedup=(Speedup("ort-cpu-int8", "ort-cpu-fp32", 1, 32, 1.5, (1.25, 1.75)),),
    onnx_bytes={"cpu": 1000},
    trt_rtx=RtxBuild(12, 11, ("pooler",), "unknown"),
    missing={"trt_rtx-fp16-int8": "no GPU"},
    failed={},
    training=TrainingFacts(recipe="obs", qat_steps=24),
    artifacts={"checkpoint": "checkpoint", "parity ort-cpu-int8": "compare/ort-cpu-int8/parity.json"},
)

PASSPORT = EnginePassport(
    backend="ort",
    engine="model.onnx",
    engine_sha256="0" * 64,
    onnx_sha256="1" * 64,
    versions={},
    device={"name": "a CPU"},
    requires={},
    profiles=(),
    graph={"dtype": "float32"},
    plan=PlanSummary({"2:4+W8": 12}, "float", "float", {"hw": 0.8, "packed": 0.82, "values": 0.875}),
    options={},
    command=("nxm",),
    created="2026-01-01T00:00:00Z",
)
