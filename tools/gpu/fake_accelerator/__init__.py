"""A device for torch that is no CPU to it and lives in host memory: finds tensors on the wrong device without a GPU.

``FakeTensorMode`` cannot do it: with ``device="cuda"`` it aborts on a CPU build of torch as soon as a tensor needs
gradients. `install` compiles the extension (once for each version of torch; about a minute) and makes the device
``fakegpu`` known.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sysconfig
import types
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Protocol, cast

import torch
from torch.utils.backend_registration import generate_methods_for_privateuse1_backend, rename_privateuse1_backend

from nxm_export.storage.atomic import make_directory

NAME = "fakegpu"
SOURCE = Path(__file__).with_name("fake_accelerator.cpp")
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "nxm-export" / NAME


class CannotBuild(Exception):
    """Why the extension cannot be compiled here."""


class Extension(Protocol):
    """The compiled module: events that the device saw, by name."""

    def counts(self) -> dict[str, int]: ...

    def reset(self) -> None: ...

    def listen(self, callable: Callable[[str], None] | None, /) -> None: ...


def build() -> Path:
    """Compile the extension, or find it compiled; raises `CannotBuild` with the compiler's text."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise CannotBuild("no C++ compiler (g++, or $CXX)")
    home = Path(torch.__file__).parent
    key = sha256(SOURCE.read_bytes() + torch.__version__.encode() + str(home).encode()).hexdigest()[:16]
    library = CACHE / key / f"{NAME}.so"
    if library.is_file():
        return library
    make_directory(library.parent)
    scratch = library.with_suffix(f".{os.getpid()}.partial")
    include = [home / "include", home / "include/torch/csrc/api/include", sysconfig.get_path("include")]
    command = [
        compiler,
        *("-O0", "-std=c++20", "-fPIC", "-shared"),
        *(f"-DTORCH_EXTENSION_NAME={NAME}", "-DTORCH_API_INCLUDE_EXTENSION_H"),
        *(f"-I{path}" for path in include),
        *(str(SOURCE), "-o", str(scratch)),
        *(f"-L{home / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10", "-ltorch_python", f"-Wl,-rpath,{home / 'lib'}"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CannotBuild(f"{compiler} failed:\n{done.stderr[-2000:]}")
    scratch.replace(library)
    return library


def install() -> Extension:
    """Make ``torch.device("fakegpu", 0)`` usable in this process; once."""
    spec = importlib.util.spec_from_file_location(NAME, build())
    assert spec is not None
    assert spec.loader is not None
    extension = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(extension)
    rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _device_module())  # type: ignore[no-untyped-call]
    generate_methods_for_privateuse1_backend()
    torch.__future__.set_swap_module_params_on_conversion(True)  # CUDA keeps the parameter in Module.to; so does this
    return cast(Extension, extension)


def _device_module() -> types.ModuleType:
    """What torch asks of ``torch.fakegpu``."""
    module = types.ModuleType(f"torch.{NAME}")
    answers: dict[str, object] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda *_: None,
        "synchronize": lambda *_: None,
        "manual_seed": lambda _: None,
        "manual_seed_all": lambda _: None,
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda *_: None,
        "get_amp_supported_dtype": lambda: [torch.bfloat16, torch.float16],
        "_is_in_bad_fork": lambda: False,
    }
    for name, answer in answers.items():
        setattr(module, name, answer)
    return module
