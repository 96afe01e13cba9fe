"""What an engine runs on here: this CPU with its instruction sets, or the GPU that its passport insists on, and which
version of its runtime."""

from __future__ import annotations

import platform
from pathlib import Path

from engines.base import BACKENDS, backend
from engines.passport import EnginePassport
from nxm_export.storage.versions import installed_versions

# By backend, the package of its runtime.
_RUNTIMES = {
    "ort": "onnxruntime",
    "openvino": "openvino",
    "trt": "tensorrt",
    "trt_rtx": "tensorrt-rtx-cu13",
    "cusparselt": "torch",
}


def running_on(passport: EnginePassport) -> str | None:
    """What an engine runs on here: this CPU with its instruction sets, or the GPU that its passport insists on; None
    where nobody knows."""
    if passport.backend not in BACKENDS:
        return None
    if backend(passport.backend).CAPABILITIES.device == "gpu":
        return passport.requires.get("gpu")
    device = cpu_device()
    name, features = device.get("name"), device.get("features")
    return f"{name} ({features})" if name and features else name


def runtime_here(passport: EnginePassport) -> str | None:
    """The package and the version of the runtime that an engine runs on here, as in ``onnxruntime 1.23.2``; None where
    nobody knows."""
    package = _RUNTIMES.get(passport.backend, "")
    installed = installed_versions().get(package)
    return None if installed is None else f"{package} {installed}"


def cpu_device() -> dict[str, str]:
    """Name and instruction sets of this CPU, as far as Linux says."""
    device = {"kind": "cpu", "machine": platform.machine(), "system": platform.platform()}
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return device
    lines = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}
    flags = set(lines.get("flags", "").split())
    features = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8")
    return device | {
        "name": lines.get("model name", "unknown"),
        "features": " ".join(flag for flag in features if flag in flags),
    }
