"""Engine directories as a TensorRT build would leave them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from engines.passport import PASSPORT_FILE
from engines.serving.repository import EngineSource
from nxm_export.storage.hashing import file_hash

PROFILES = [
    {"minimum": [1, 4], "optimum": [4, 16], "maximum": [8, 32]},
    {"minimum": [1, 33], "optimum": [2, 48], "maximum": [4, 48]},
]


def plan_directory(source: Path, out: Path, capability: str, **changes: Any) -> Path:
    """What a TensorRT build would leave, with ONNX bytes where the plan would be: only the double can run it."""
    shutil.copytree(source, out)
    (out / "model.onnx").rename(out / "model.engine")
    passport = json.loads((out / PASSPORT_FILE).read_text())
    inputs = [{**binding, "dtype": "int32"} for binding in passport["bindings"]["inputs"]]
    passport |= {
        "backend": "trt",
        "engine": "model.engine",
        "engine_sha256": file_hash(out / "model.engine"),
        "device": {"kind": "gpu", "gpu": "a GPU", "compute_capability": capability},
        "requires": {"tensorrt": "10.14.1.48", "gpu": "a GPU", "compute_capability": capability},
        "profiles": PROFILES,
        "bindings": {"inputs": inputs, "outputs": passport["bindings"]["outputs"]},
        **changes,
    }
    (out / PASSPORT_FILE).write_text(json.dumps(passport))
    return out


@pytest.fixture(scope="module")
def plans(engine: Path, tmp_path_factory: pytest.TempPathFactory) -> list[EngineSource]:
    """Engines for two compute capabilities, of one name."""
    home = tmp_path_factory.mktemp("plans")
    return [
        EngineSource("planned", "1", plan_directory(engine, home / name, capability))
        for name, capability in (("sm80", "8.0"), ("sm90", "9.0"))
    ]
