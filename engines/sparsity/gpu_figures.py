"""Peaks of GPUs by their makers' data sheets (``gpu_figures.json``), for bounds: nothing here was measured."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from engines.sparsity.targets import gpu_key
from nxm_export.errors import EngineError
from nxm_export.storage.json_files import read_record

FIGURES_FILE = Path(__file__).with_name("gpu_figures.json")
FIGURES_SCHEMA = "nxm-gpu-figures/1"


@dataclass(frozen=True)
class GpuFigures:
    """One GPU: peaks of dense products in 10^12 operations a second (a multiplication and an addition are two), memory
    in 10^9 bytes a second, the last cache in 10^6 bytes. `also` are its names; `checked` says what was compared with
    the source."""

    name: str
    also: tuple[str, ...]
    compute_capability: str
    fp16_tflops: float
    int8_tops: float
    memory_gb_per_second: float
    cache_mb: float
    source: str
    checked: str


@dataclass(frozen=True)
class GpuFiguresFile:
    """The file ``gpu_figures.json``."""

    about: str
    gpus: tuple[GpuFigures, ...]


@cache
def all_figures() -> tuple[GpuFigures, ...]:
    """The figures of every GPU that has some here."""
    way_out = "install nxm-export again: it is part of it"
    return read_record(FIGURES_FILE, GpuFiguresFile, schema=FIGURES_SCHEMA, way_out=way_out).gpus


def figures_of(gpu: str) -> GpuFigures:
    """The figures of a GPU by its name, such as ``L4``, ``A100 40GB`` or ``NVIDIA H100 PCIe``.

    Raises `EngineError` for any other, with the names that are known: a GPU of the same generation has other peaks.
    """
    key = gpu_key(gpu)
    for figures in all_figures():
        if key in map(gpu_key, (figures.name, *figures.also)):
            return figures
    known = ", ".join(figures.name for figures in all_figures())
    raise EngineError(f"no peaks of GPU {gpu!r} are known here; name one of {known}")
