"""What is missing is said in order, the first thing first."""

from __future__ import annotations

import ctypes
import importlib.metadata
from types import SimpleNamespace

import pytest

from engines.cusparselt import machine

CPU_BUILD = "2.11.0+cpu"


def _pretend(
    monkeypatch: pytest.MonkeyPatch,
    *,
    version: str | None = "2.11.0+cu130",
    driver: bool = True,
    cuda: str | None = "13.0",
    gpu: bool = True,
    capability: tuple[int, int] = (9, 0),
    library: bool = True,
) -> None:
    import torch

    def installed(name: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(machine, "version", installed)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: _loaded(name, driver))
    monkeypatch.setenv("PATH", "")  # a container may have a driver without its tools
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA T4")
    monkeypatch.setattr(
        torch.backends, "cusparselt", SimpleNamespace(is_available=lambda: library, version=lambda: 800)
    )


def _loaded(name: str, driver: bool) -> None:
    assert name == "libcuda.so.1"
    if not driver:
        raise OSError(f"{name}: cannot open shared object file")


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"version": None, "driver": False}, "torch is not installed: pip install .nxm-export.cusparselt."),
        ({"version": CPU_BUILD, "driver": False}, "torch 2.11.0+cpu is a build without CUDA: pip install --force-"),
        ({"version": "2.10.1+cu128", "driver": False}, "torch 2.10.1+cu128 is older than 2.11"),
        ({"driver": False, "gpu": False}, "there is no NVIDIA driver"),
        ({"version": "2.12.0", "cuda": None}, "torch 2.12.0 is a build without CUDA"),
        ({"gpu": False, "library": False}, "torch finds no GPU"),
        ({"capability": (7, 5), "library": False}, "NVIDIA T4 has compute capability 7.5, .* came with 8.0"),
        ({"library": False}, "comes without cuSPARSELt"),
    ],
)
def test_the_first_thing_that_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, facts: dict[str, object], message: str
) -> None:
    import re

    _pretend(monkeypatch, **facts)  # type: ignore[arg-type]
    missing = machine.what_is_missing()
    assert missing is not None
    assert re.search(message.replace("+", r"\+"), missing)


def test_nothing_is_missing_where_all_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch)
    assert machine.what_is_missing() is None
    facts = machine.this_machine().facts
    assert facts["compute_capability"] == "9.0"
    assert facts["cusparselt"] == "800"


def test_the_kernels_of_a_gpu_ask_torch_as_its_schema_says() -> None:
    """The names of arguments, against the operators of the torch that is installed."""
    import torch

    schema = torch.ops.aten._cslt_sparse_mm.default._schema
    names = {argument.name for argument in schema.arguments}
    assert {"bias", "alpha", "out_dtype", "transpose_result", "alg_id"} <= names
    searched = {argument.name for argument in torch.ops.aten._cslt_sparse_mm_search.default._schema.arguments}
    assert {"bias", "alpha", "out_dtype", "transpose_result"} <= searched
