"""What an engine is built and loaded on, and what is missing where it cannot be."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from engines.cusparselt.kernels import CudaKernels, Kernels
from nxm_export.errors import EngineUnavailable

LEAST_TORCH = (2, 11)
LEAST_CAPABILITY = (8, 0)
_DRIVER = "libcuda.so.1"
_INDEX = "https://download.pytorch.org/whl/cu130"
_INSTALL = f"pip install 'nxm-export[cusparselt]' --extra-index-url {_INDEX}"
# pip takes any build of torch that is there already for the one that is asked for.
_REPLACE = f"pip install --force-reinstall torch --index-url {_INDEX}"


@dataclass(frozen=True)
class Machine:
    """Kernels, and the facts that an engine's passport requires to be equal where it is loaded."""

    kernels: Kernels
    facts: Mapping[str, str]


def this_machine() -> Machine:
    """The first GPU of this machine; raises `EngineUnavailable` with the first thing that is missing."""
    missing = what_is_missing()
    if missing is not None:
        raise EngineUnavailable(
            f"no engine of cusparselt can be built or run here: {missing} (docs/cusparselt.md says what it needs)"
        )
    import torch

    return Machine(
        CudaKernels(),
        {
            "torch": torch.__version__,
            "cuda": str(torch.version.cuda),
            "cusparselt": str(torch.backends.cusparselt.version()),
            "gpu": torch.cuda.get_device_name(0),
            "compute_capability": ".".join(map(str, torch.cuda.get_device_capability(0))),
        },
    )


def what_is_missing() -> str | None:
    """The first of what an engine needs that is not here: a CUDA build of torch, its version, a GPU, its compute
    capability, cuSPARSELt. None where nothing is. torch is imported only when all else may be there."""
    try:
        installed = version("torch")
    except PackageNotFoundError:
        return f"torch is not installed: {_INSTALL}"
    if installed.endswith("+cpu"):
        return f"torch {installed} is a build without CUDA: {_REPLACE}"
    numbers = tuple(int(part) for part in re.findall(r"\d+", installed)[:2])
    if numbers < LEAST_TORCH:
        return f"torch {installed} is older than {'.'.join(map(str, LEAST_TORCH))}: {_INSTALL}"
    if not _has_driver():
        return f"there is no NVIDIA driver ({_DRIVER} is not there)"
    return _missing_of_torch(installed)


def _has_driver() -> bool:
    """By the driver's library: a container may have it without the driver's tools."""
    try:
        ctypes.CDLL(_DRIVER)
    except OSError:
        return False
    return True


def _missing_of_torch(installed: str) -> str | None:
    """What torch itself finds missing."""
    try:
        import torch
    except ImportError as error:
        return f"torch {installed} cannot be loaded ({error})"
    if torch.version.cuda is None:
        return f"torch {installed} is a build without CUDA: {_REPLACE}"
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    capability = torch.cuda.get_device_capability(0)
    if capability < LEAST_CAPABILITY:
        return (
            f"{torch.cuda.get_device_name(0)} has compute capability {capability[0]}.{capability[1]}, and sparse "
            f"tensor cores came with {LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]}"
        )
    if not torch.backends.cusparselt.is_available():
        return f"torch {installed} comes without cuSPARSELt: {_REPLACE}"
    return None
