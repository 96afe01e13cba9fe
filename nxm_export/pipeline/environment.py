"""What this machine can build and run, for ``nxm doctor``.

A package is there where its module is: one module may come under several names of packages. Runtimes of engines are
imported, too, in processes of their own (`nxm_export.pipeline.import_trial`); torch is not, which takes seconds.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from importlib.util import find_spec

from nxm_export.errors import EngineUnavailable, NxmError
from nxm_export.pipeline.import_trial import import_problem

# The smallest extra that brings a module of somebody else's.
_EXTRAS = {
    "train": ("torch", "transformers", "accelerate", "sklearn", "scipy", "huggingface_hub"),
    "export": ("onnxscript",),
    "ort": ("onnx", "onnx_ir", "onnxruntime", "ml_dtypes"),
    "openvino": ("openvino",),
    "trt-rtx": ("tensorrt_rtx", "polygraphy"),
    "serve": ("starlette", "uvicorn", "httptools", "prometheus_client"),
    "parquet": ("pyarrow",),
    "report": ("jinja2", "markupsafe", "matplotlib"),
}
# Where the module is not called like its package.
_MODULES = {"scikit-learn": "sklearn", "tensorrt-rtx-cu13": "tensorrt_rtx"}
# What a backend needs, its runtime first, and the extra that brings it.
_PACKAGES = {
    "ort": (("onnxruntime", "onnx", "onnx-ir"), "ort"),
    "openvino": (("openvino", "onnx", "onnx-ir"), "openvino"),
    "trt_rtx": (("tensorrt-rtx-cu13", "polygraphy"), "trt-rtx"),
}
_PATIENCE = 30.0  # seconds
_NEED_311 = ("train", "export")  # as their markers in pyproject.toml say


def extra_of(module: str | None) -> str | None:
    """The extra to install for a module that is missing, None for one that no extra brings."""
    top = (module or "").partition(".")[0]
    return next((extra for extra, modules in _EXTRAS.items() if top in modules), None)


def install_advice(extra: str) -> str:
    """How to get an extra here, in a line; below Python 3.11 there is no way to some."""
    if extra in _NEED_311 and sys.version_info < (3, 11):
        here = platform.python_version()
        return (
            f"training and export need Python 3.11 or newer, and this is {here}: do that on another machine and "
            "copy the engine directory here"
        )
    return f"pip install 'nxm-export[{extra}]'"


@dataclass(frozen=True)
class MachineReport:
    """Facts about this machine, and per capability whether it works (``ready: ...``) or what to install."""

    nxm_export: str
    python: str
    system: str
    cpu: str
    integer_instructions: str
    gpu: str
    compress: str
    export: str
    backends: Mapping[str, str]
    serve: str

    def to_dict(self) -> dict[str, str]:
        """The form of ``nxm doctor --json``; a backend is ``backend NAME``."""
        return {
            "nxm-export": self.nxm_export,
            "python": self.python,
            "system": self.system,
            "cpu": self.cpu,
            "integer instructions": self.integer_instructions,
            "gpu": self.gpu,
            "compress": self.compress,
            "export": self.export,
            **{f"backend {name}": state for name, state in self.backends.items()},
            "serve": self.serve,
        }


def report() -> MachineReport:
    """What this machine is, and what it can build and run."""
    from engines.devices import cpu_device

    cpu = cpu_device()
    return MachineReport(
        nxm_export=_version("nxm-export") or "source tree",
        python=platform.python_version(),
        system=cpu["system"],
        cpu=f"{cpu.get('name', 'unknown')}, {len(os.sched_getaffinity(0))} cores",
        integer_instructions=cpu.get("features") or "none known: INT8 may be slower than FP32 here",
        gpu=_gpu(),
        compress=_needs(("torch", "transformers", "accelerate", "scikit-learn"), "train"),
        export=_needs(("torch", "transformers", "onnx", "onnxscript", "onnx-ir"), "export"),
        backends={
            "ort": _runs("ort"),
            "openvino": _runs("openvino"),
            "trt": _missing_of_trt() or "ready",
            "trt_rtx": _unusable("trt_rtx") or _ready(_PACKAGES["trt_rtx"][0]) + _rtx_note(),
            "cusparselt": _cusparselt(),
        },
        serve=_needs(("starlette", "uvicorn", "httptools", "prometheus-client"), "serve"),
    )


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def missing_for(backend: str) -> str | None:
    """What is missing before engines of a backend run here, with what to install; None where nothing is."""
    if backend == "trt":
        return _missing_of_trt()
    if backend == "cusparselt":
        from engines.cusparselt.machine import what_is_missing

        return what_is_missing()
    unusable = _unusable(backend)
    return _missing_of_rtx() if unusable is None and backend == "trt_rtx" else unusable


def _runs(backend: str) -> str:
    """Whether the packages of a backend work here, or what to do."""
    return _unusable(backend) or _ready(_PACKAGES[backend][0])


def _unusable(backend: str) -> str | None:
    """What is missing of the packages of a backend, or why its runtime cannot be loaded; None where they work."""
    packages, extra = _PACKAGES[backend]
    return _absent(packages, extra) or _broken(packages[0])


def _needs(packages: tuple[str, ...], extra: str) -> str:
    return _absent(packages, extra) or _ready(packages)


def _ready(packages: tuple[str, ...]) -> str:
    return "ready: " + ", ".join(map(_installed, packages))


def _absent(packages: tuple[str, ...], extra: str) -> str | None:
    missing = [name for name in packages if not _is_here(_module(name))]
    return f"missing {', '.join(missing)}: {install_advice(extra)}" if missing else None


def _broken(package: str) -> str | None:
    problem = import_problem(_module(package))
    return None if problem is None else f"{_installed(package)} is installed and cannot be loaded ({problem})"


def _module(package: str) -> str:
    return _MODULES.get(package, package.replace("-", "_"))


def _is_here(module: str) -> bool:
    """Whether a module could be imported; a folder of its name, as in a run directory, is no module."""
    spec = find_spec(module)
    return spec is not None and spec.origin is not None


def _installed(package: str) -> str:
    """The package that brings a module, and its version, as in ``onnxruntime-gpu 1.23.2``."""
    if (found := _version(package)) is not None:
        return f"{package} {found}"
    others = packages_distributions().get(_module(package), [])
    return f"{others[0]} {_version(others[0])}" if others else package


def _gpu() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return _gpu_of_driver()
    query = ["--query-gpu=name,compute_cap,driver_version,memory.total", "--format=csv,noheader"]
    try:
        answer = subprocess.run([tool, *query], capture_output=True, text=True, timeout=_PATIENCE, check=False)
    except subprocess.TimeoutExpired:  # a driver that hangs
        return f"nvidia-smi did not answer in {_PATIENCE:g} seconds"
    except (OSError, UnicodeDecodeError) as error:
        return f"nvidia-smi failed: {str(error)[:200]}"
    return "; ".join(answer.stdout.strip().splitlines()) or f"nvidia-smi failed: {answer.stderr.strip()[:200]}"


def _gpu_of_driver() -> str:
    """What the driver itself says: a container may have it without its tools."""
    from engines.tensorrt.cuda_driver import device_facts, device_memory

    try:
        facts, mib = device_facts(), device_memory() // 2**20
    except NxmError:
        return "no NVIDIA driver found (nvidia-smi is not there)"
    return f"{facts['gpu']}, {facts['compute_capability']}, {facts['driver']}, {mib} MiB"


def _missing_of_trt() -> str | None:
    """TensorRT comes under many distribution names and from system packages, so it is found by its module."""
    if not _is_here("tensorrt"):
        return "missing TensorRT: docs/tensorrt.md says which one fits your driver"
    if not _is_here("polygraphy"):
        return "TensorRT is here; to build, pip install 'nxm-export[trt]'"
    from engines.tensorrt.cuda_driver import device_facts

    try:  # the driver itself: nvidia-smi may be there where no GPU is
        device_facts()
    except EngineUnavailable as error:
        return f"installed, and neither builds nor runs without an NVIDIA GPU ({error})"
    return _broken("tensorrt")


def _missing_of_rtx() -> str | None:
    """What its engines need beside packages: a GPU of a kind that it runs on."""
    from engines.tensorrt.cuda_driver import device_facts
    from engines.tensorrt.rtx_backend import COMPUTE_CAPABILITIES

    try:
        capability = device_facts()["compute_capability"]
    except EngineUnavailable as error:
        return str(error)
    runs_on = [f"{major}.{minor}" for major, minor in COMPUTE_CAPABILITIES]
    if capability in runs_on:
        return None
    return f"TensorRT-RTX runs on compute capability {', '.join(runs_on)}, and this GPU has {capability}"


def _cusparselt() -> str:
    from engines.cusparselt.machine import what_is_missing

    missing = what_is_missing()
    return "ready (docs/cusparselt.md says what it has run on)" if missing is None else missing


def _rtx_note() -> str:
    return " (builds here)" if _missing_of_rtx() is not None else " (builds and runs here)"
