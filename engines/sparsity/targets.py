"""What `nxm doctor` is asked about, in people's words: a GPU by its name or compute capability, a version of TensorRT.

What is not understood is refused with what would be: a wrong target gives answers that look like right ones.
Compute capabilities are those of https://developer.nvidia.com/cuda-gpus and of CUDA's programming guide.
"""

from __future__ import annotations

import re

from engines.sparsity.judgement import FileProblem
from engines.sparsity.sparsity_report import SparsityTarget
from nxm_export.contract.choices import TENSORRT_VERSIONS
from nxm_export.errors import EngineError

COMPUTE_CAPABILITIES = (
    *("5.0", "5.2", "5.3", "6.0", "6.1", "6.2", "7.0", "7.2", "7.5", "8.0", "8.6", "8.7", "8.9", "9.0"),
    *("10.0", "10.1", "10.3", "11.0", "12.0", "12.1"),
)
# Bare names that several generations have, such as RTX 6000, are none.
_GPUS = {
    "6.0": ("P100",),
    "6.1": ("P4", "P40", "GTX 1060", "GTX 1070", "GTX 1080", "GTX 1080 Ti", "Titan Xp"),
    "7.0": ("V100", "Titan V"),
    "7.2": ("Xavier",),
    "7.5": (
        *("T4", "GTX 1650", "GTX 1660", "RTX 2060", "RTX 2070", "RTX 2080", "RTX 2080 Ti", "Titan RTX"),
        "RTX 8000",
    ),
    "8.0": ("A100", "A30", "A800"),
    "8.6": (
        *("A2", "A10", "A10G", "A16", "A40", "RTX 3050", "RTX 3060", "RTX 3060 Ti", "RTX 3070", "RTX 3070 Ti"),
        *("RTX 3080", "RTX 3080 Ti", "RTX 3090", "RTX 3090 Ti", "RTX A2000", "RTX A4000", "RTX A4500"),
        *("RTX A5000", "RTX A5500", "RTX A6000"),
    ),
    "8.7": ("Orin", "AGX Orin", "Orin NX", "Orin Nano"),
    "8.9": (
        *("L4", "L20", "L40", "L40S", "RTX 4050", "RTX 4060", "RTX 4060 Ti", "RTX 4070", "RTX 4070 Super"),
        *("RTX 4070 Ti", "RTX 4070 Ti Super", "RTX 4080", "RTX 4080 Super", "RTX 4090", "RTX 4090 D"),
        *("RTX 2000 Ada", "RTX 4000 Ada", "RTX 4500 Ada", "RTX 5000 Ada", "RTX 6000 Ada"),
    ),
    "9.0": ("H20", "H100", "H200", "H800", "GH200"),
    "10.0": ("B100", "B200", "GB200"),
    "10.3": ("B300", "GB300"),
    "11.0": ("Thor", "AGX Thor"),
    "12.0": (
        *("RTX 5050", "RTX 5060", "RTX 5060 Ti", "RTX 5070", "RTX 5070 Ti", "RTX 5080", "RTX 5090", "RTX 5090 D"),
        *("RTX PRO 4000", "RTX PRO 4500", "RTX PRO 5000", "RTX PRO 6000"),
    ),
    "12.1": ("GB10", "DGX Spark"),
}
_BY_NAME = {
    re.sub(r"[\s_-]+", "", name).casefold(): capability for capability, names in _GPUS.items() for name in names
}
_CAPABILITY = re.compile(r"(?:(?:sm|compute)[_ -]?)?(\d{1,2})\.?(\d)[af]?")
_MAKERS = re.compile(r"nvidia|geforce|tesla|quadro|jetson")
_BUILDS = re.compile(
    r"[ _-](?:sxm\d?|pcie|nvl|oam|\d+\s*gb|hbm\d?e?|laptop gpu|generation|blackwell|server edition)(?![a-z0-9])"
)
_RTX_RUNS_ON = ("7.5", "8.6", "8.9", "12.0", "12.1")  # its support matrix
_MAJORS = {"trt": ("7", "8", "9", "10", "11"), "trt_rtx": ("1",)}
_VERSION = re.compile(r"([1-9]\d*)(?:\.\d+){0,3}", re.ASCII)


def sparsity_target(backend: str, version: str | None, gpu: str) -> SparsityTarget:
    """The target of a judgement: `version` is by default the newest that this backend's facts are of; `gpu` a name or a
    compute capability, or several joined by commas.

    Raises `EngineError`, which names what is understood.
    """
    if backend not in _MAJORS:
        raise EngineError(
            f"{backend!r} runs no sparse kernels, so there is nothing to judge; choose one of {', '.join(_MAJORS)}"
        )
    version = version_of(backend, TENSORRT_VERSIONS[backend] if version is None else version)
    return SparsityTarget(backend, version, ", ".join(compute_capability_of(part) for part in gpu.split(",")))


def target_problems(target: SparsityTarget) -> list[FileProblem]:
    """Why nothing runs on this target, whatever the file holds."""
    others = [capability for capability in target.compute_capability.split(", ") if capability not in _RTX_RUNS_ON]
    if target.backend != "trt_rtx" or not others:
        return []
    return [
        FileProblem(
            f"TensorRT-RTX runs on compute capability {', '.join(_RTX_RUNS_ON)} (its support matrix), and not on "
            f"{', '.join(others)}; judge for --backend trt"
        )
    ]


def gpu_key(gpu: str) -> str:
    """A GPU's name as it is compared: without its maker, spaces, hyphens and case."""
    return re.sub(r"[\s_-]+", "", _MAKERS.sub("", gpu.strip().casefold()))


def compute_capability_of(gpu: str) -> str:
    """The compute capability (``8.9``) of ``8.9``, ``89``, ``sm_89``, ``L4`` or ``NVIDIA GeForce RTX 4090``."""
    text = gpu.strip().casefold()
    if match := _CAPABILITY.fullmatch(text):
        capability = f"{match[1]}.{match[2]}"
        if capability in COMPUTE_CAPABILITIES:
            return capability
    capability = _BY_NAME.get(gpu_key(_BUILDS.sub("", text)), "")
    if not capability:
        names = ", ".join(f"{capability} ({names[0]})" for capability, names in _GPUS.items())
        raise EngineError(
            f"{gpu!r} is no GPU that is known here; give its compute capability, as `nvidia-smi "
            f"--query-gpu=compute_cap --format=csv` prints it. Names and capabilities such as these are understood: "
            f"{names}, sm_80, 80"
        )
    return capability


def version_of(backend: str, version: str) -> str:
    """`version` as it was given, when a TensorRT of this backend may have it: ``8.6``, ``10``, ``10.3.0.26``."""
    text = version.strip()
    match, majors = _VERSION.fullmatch(text), _MAJORS[backend]
    if match is None or match[1] not in majors:
        name, other = ("TensorRT-RTX", "trt") if backend == "trt_rtx" else ("TensorRT", "trt_rtx")
        foreign = match is not None and match[1] in _MAJORS[other]
        hint = f"; for that one, give --backend {other}" if foreign else ""
        raise EngineError(
            f"{version!r} is no version of {name}; its versions begin with {', '.join(majors)}, such as "
            f"{TENSORRT_VERSIONS[backend]}{hint}"
        )
    return text
