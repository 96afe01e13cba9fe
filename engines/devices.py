"""Which device an engine runs on here: this CPU with its instruction sets, or the GPU that its passport insists on."""

from __future__ import annotations

import platform
from pathlib import Path

from engines.base import BACKENDS, backend
from engines.passport import EnginePassport


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
