"""Backends by name, what they promise, and the shapes that engines are built for."""

from __future__ import annotations

import inspect
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from engines.base import (
    BACKENDS,
    Backend,
    LayerTimedEngine,
    Profile,
    ProfiledBackend,
    backend,
    cpu_backends,
    module_command,
)
from engines.cusparselt import backend as cusparselt_backend
from engines.openvino import backend as openvino_backend
from engines.ort import backend as ort_backend
from engines.tensorrt import backend as tensorrt_backend
from engines.tensorrt import rtx_backend
from engines.tensorrt.runtime import TensorRTEngine
from nxm_export.errors import EngineError

if TYPE_CHECKING:  # what `backend` promises of the modules of `BACKENDS`, held by mypy
    _MODULES: tuple[Backend, ...] = (ort_backend, openvino_backend, tensorrt_backend, rtx_backend, cusparselt_backend)


class TestProtocol:
    def test_mypy_holds_every_backend_against_the_protocol(self) -> None:
        modules = (ort_backend, openvino_backend, tensorrt_backend, rtx_backend, cusparselt_backend)
        assert {module.NAME: module.__name__ for module in modules} == BACKENDS

    @pytest.mark.parametrize("name", BACKENDS)
    def test_a_module_has_the_three_functions_with_the_parameters_of_the_protocol(self, name: str) -> None:
        for function in ("build", "load", "inspect"):
            expected = list(inspect.signature(getattr(Backend, function)).parameters)[1:]  # without self
            assert list(inspect.signature(getattr(backend(name), function)).parameters) == expected

    def test_capabilities_say_where_a_backend_runs_and_what_it_times(self) -> None:
        assert cpu_backends() == ("ort", "openvino")
        for name in BACKENDS:
            capabilities = backend(name).CAPABILITIES
            on_cpu = name in cpu_backends()
            assert capabilities.threads == capabilities.runs_onnx == on_cpu
            assert capabilities.sparse_kernels == (not on_cpu)
            assert capabilities.layer_times == (name in ("trt", "trt_rtx"))
            assert capabilities.profiled_kernels == capabilities.always_sparse == (name == "cusparselt")
        assert isinstance(cusparselt_backend, ProfiledBackend)
        assert issubclass(TensorRTEngine, LayerTimedEngine)
        assert not issubclass(ort_backend.OrtEngine, LayerTimedEngine)


def test_an_unknown_backend_is_refused_with_the_list() -> None:
    with pytest.raises(EngineError, match=f"unknown backend 'cuda'; choose one of {', '.join(BACKENDS)}"):
        backend("cuda")


def test_profiles_rise() -> None:
    Profile((1, 1), (1, 8), (4, 8))
    for sizes in (((2, 1), (1, 8), (4, 8)), ((1, 1), (1, 9), (4, 8)), ((0, 1), (1, 8), (4, 8))):
        with pytest.raises(EngineError, match="profile sizes must rise from 1"):
            Profile(*sizes)


def test_a_child_process_takes_our_modules_wherever_it_is_started(tmp_path: Path) -> None:
    """A run directory has an ``engines`` folder; with a file in it, ``python -m`` from there would take that for
    ours."""
    for package in ("engines", "nxm_export"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise SystemExit('the wrong package')")
    done = subprocess.run(
        module_command("nxm_export", "--version"), cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout.startswith("nxm, version"), done.stderr
