"""What a builder leaves beside an engine, made up: one matrix, its kernel, and the files that prove it sparse."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from engines.passport import EnginePassport
from engines.sparsity.build_evidence import (
    LAYERS_SCHEMA,
    MEASURED_SCHEMA,
    InspectedEngine,
    InspectedProfile,
    LayerInfo,
    MeasuredLayers,
)
from engines.sparsity.engine_report import WeightFacts
from nxm_export.contract.records.matrix_facts import MatrixFacts
from nxm_export.storage.hashing import file_hash
from nxm_export.storage.json_files import encode

SPARSE_GEMM = "sm80_xmma_sparse_gemm_i8i8_i8i32_f32_tn_n_tilesize128x128x128_stage3_warpsize2x2x1_sptensor16x8x64"
DENSE_GEMM = "sm80_xmma_gemm_i8i8_i8i32_f32_tn_n_tilesize128x128x64_stage4_warpsize2x2x1_tensor16x8x32"


def fact(**changes: Any) -> MatrixFacts:
    """A matrix with everything that a sparse INT8 kernel on an A100 wants."""
    good = MatrixFacts(
        name="w", node="node", form="matmul", k=768, n=768, planned="2:4+W8", planned_sparse=True, pattern_float="2:4",
        pattern_int8="2:4", sparse_along_k=True, sparse_along_n=False, broken_groups=0, groups=147456,
        integer_weight=True, integer_input=True, scales_along_k=False, has_zero_point=False, output="int8",
        epilogue="none",
    )  # fmt: skip
    return replace(good, **changes)


def layer(
    kernel: str, name: str = "node_myl0_1", kind: str = "gemm", onnx: tuple[str, ...] = ("node",), **changes: Any
) -> LayerInfo:
    return LayerInfo(name, kind, ("Int8",), ("Int8",), ("Int8",), kernel, onnx, **changes)


FACTS = WeightFacts("trt", "8.6.0", "8.0", has_gpu=True, sparse_flag=True, facts=(fact(),))
LAYER = {
    "Name": "node_myl0_1 [profile 0]",
    "LayerType": "gemm",
    "TacticName": SPARSE_GEMM,
    "Metadata": "[ONNX Layer: node]",
}
INSPECTED = InspectedEngine((InspectedProfile(0, (8, 128), {"Layers": [LAYER]}),))
MEASURED = MeasuredLayers("ab", (8, 128), 20, {"node_myl0_1 [profile 0]": 0.5})
EVIDENCE = ("weights.json", "layers.json", "build.log")
PICKED = "[V] (Sparsity) Chose 1 layer(s) using sparse tactics: node\n"


def tie(directory: Path, **changes: Any) -> EnginePassport:
    """Write the passport of an engine directory, with the hashes of the evidence that lies there."""
    given: dict[str, Any] = {"versions": {}, "device": {}, "requires": {}, "profiles": (), "graph": {}, "options": {}}
    given |= {"onnx_sha256": "0" * 64, "plan": None, "command": (), "created": "", "companions": {}}
    given["evidence"] = {name: file_hash(directory / name) for name in EVIDENCE if (directory / name).is_file()}
    passport = EnginePassport("trt", "model.engine", file_hash(directory / "model.engine"), **(given | changes))
    passport.save(directory)
    return passport


def engine_directory(directory: Path, engine: bytes = b"an engine") -> Path:
    """What a build and `nxm inspect --measure` leave in a directory."""
    (directory / "model.engine").write_bytes(engine)
    (directory / "weights.json").write_text(encode(FACTS, "nxm-weights/1"))
    (directory / "layers.json").write_text(encode(INSPECTED, LAYERS_SCHEMA))
    (directory / "build.log").write_text(PICKED)
    tie(directory)
    measured(directory)
    return directory


def measured(directory: Path, **changes: Any) -> None:
    """Write the measurement of the engine that lies there."""
    record = replace(MEASURED, engine_sha256=file_hash(directory / "model.engine"), **changes)
    (directory / "measured.json").write_text(encode(record, MEASURED_SCHEMA))
