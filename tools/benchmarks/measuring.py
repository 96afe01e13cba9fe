"""What the benchmarks share: paired ratios, peak memory, processes of their own, records under results/performance."""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict, TypeVar

import numpy as np
import numpy.typing as npt

from nxm_export.data.bootstrap_intervals import bootstrap_interval
from nxm_export.storage.atomic import write_atomic
from nxm_export.storage.json_files import convert, encode, read_json
from tools import ROOT
from tools.provenance import versions

RECORDS = ROOT / "results" / "performance"
DOCUMENT = ROOT / "docs" / "performance.md"
T = TypeVar("T")


def bench_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the two options that most benchmarks take."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--render", action="store_true", help="only write the document again")
    parser.add_argument("--smoke", action="store_true", help="a tiny model: whether the bench runs; prints the section")
    return parser


class Ratio(TypedDict):
    """A ratio of times, with its 95 % interval."""

    ratio: float
    interval: list[float]


class Median(TypedDict):
    """A median of times, with its 95 % interval."""

    median: float
    interval: list[float]


class Marks(TypedDict):
    """Resident bytes of a process before it began, and at its peak."""

    before: int
    peak: int


class Circumstances(TypedDict):
    """When, on what and with which versions a record was measured."""

    date: str
    cpu: str
    features: str
    cores: int
    threads: int
    load: float
    versions: dict[str, str]


def paired_ratio(times: Sequence[float], reference: Sequence[float]) -> Ratio:
    """Median of the ratios of interleaved rounds, with its 95 % bootstrap interval over rounds."""
    ratios = np.array(times) / np.array(reference)
    return {"ratio": float(np.median(ratios)), "interval": _interval(ratios)}


def median_of(times: Sequence[float]) -> Median:
    """Median, with its 95 % bootstrap interval over rounds."""
    return {"median": float(np.median(times)), "interval": _interval(np.array(times))}


def _interval(values: npt.NDArray[np.float64]) -> list[float]:
    return list(bootstrap_interval(len(values), lambda picks: float(np.median(values[picks])), seed=0))


def fitted_exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Slope of log(values) over log(sizes) by least squares: 1 for what grows linearly."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def peak_bytes() -> int:
    """High-water mark of this process's resident memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident_bytes() -> int:
    """Resident memory of this process now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def in_child(kind: type[T], module: str, *arguments: str) -> T:
    """The JSON object that ``python -m module arguments`` prints last, which must be a `kind`.

    A process of its own has memory marks of its own. Raises `RuntimeError` with the end of its stderr when it fails.
    """
    child = subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if child.returncode:
        raise RuntimeError(f"{module} {' '.join(arguments)} failed:\n{child.stderr[-2000:]}")
    return convert(json.loads(child.stdout.splitlines()[-1]), kind, source=module, way_out="look at what it prints")


def circumstances(threads: int, packages: Sequence[str]) -> Circumstances:
    """When, on what and with which versions: the head of a record."""
    from engines.devices import cpu_device

    cpu = cpu_device()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": cpu.get("name", "unknown"),
        "features": cpu.get("features", ""),
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "load": round(os.getloadavg()[0], 2),
        "versions": versions(packages),
    }


def save_record(file: Path, record: Mapping[str, object]) -> None:
    """Write a record; raises `ValueError` that names the field for a number that is not finite."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, encode(record))


def load_record(file: Path, kind: type[T]) -> T:
    """The record in a file; raises `ArtifactError` that names file and field where it is no `kind`."""
    way_out = "restore it, or measure again"
    return convert(read_json(file, way_out), kind, source=str(file), way_out=way_out)


def where_and_when(head: Circumstances) -> str:
    """A record's head as a sentence."""
    packages = ", ".join(f"{name} {number}" for name, number in head["versions"].items())
    return (
        f"Measured {head['date']} on {head['cores']} cores ({head['cpu']}, {head['features']}), "
        f"{head['threads']} threads; "
        f"{packages}; load average at the end {head['load']:.1f}."
    )
