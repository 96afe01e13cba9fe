"""What storing weights of 4 bits as INT4 saves and costs: bytes, and times paired with those of INT8 storage.

    python -m tools.benchmarks.int4            measure, write results/performance/int4.json and the document
    python -m tools.benchmarks.int4 --render   the section of docs/performance.md, from the record

Weights are random, of MiniLM-L6's sizes, on a 4 bit grid, and the embedding table is INT8. Both engines of a runtime
are timed in one run, every round one after the other in an order that turns. A runtime that is not installed is left
out; engines of TensorRT-RTX are built and not run.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np

from engines.base import BuildOptions, LoadOptions, backend
from engines.benchmark.latency import feeds_for, interleaved
from nxm_export.errors import EngineUnavailable
from tools.benchmarks.measuring import (
    DOCUMENT,
    RECORDS,
    Circumstances,
    Ratio,
    bench_parser,
    circumstances,
    load_record,
    paired_ratio,
    save_record,
    where_and_when,
)
from tools.benchmarks.scaling import SIZES, SMOKE_SIZES, write_checkpoint
from tools.rendering import render, write_section

TOOL = "tools/benchmarks/int4.py"
FILE = RECORDS / "int4.json"
STORAGES = ("int8", "int4")
SHAPES = ((1, 32), (1, 128), (8, 32), (8, 128))  # (batch, sequence)
# runtime -> (target, weights): TensorRT keeps INT8 for a weight with a pattern
RUNTIMES = {"ort": ("cpu", "2:4+W4"), "openvino": ("cpu", "2:4+W4"), "trt_rtx": ("trt", "W4")}
ROUNDS, LOADS = 40, 9


class Timed(TypedDict):
    """How long INT4 takes over INT8, and the median of INT8 in milliseconds; `what` is a shape or ``load``."""

    what: str
    int8_ms: float
    ratio: Ratio


class Row(TypedDict):
    """A runtime: bytes of graphs and engine files by storage, and times, where it runs here."""

    runtime: str
    target: str
    weights: str
    graph_bytes: dict[str, int]
    engine_bytes: dict[str, int]
    times: list[Timed]


class Record(Circumstances):
    """The file ``int4.json``."""

    schema: str
    model: str
    rounds: int
    rows: list[Row]


@dataclass(frozen=True)
class _Sizes:
    """What is measured: a model's name and sizes, shapes, and how often."""

    model: str
    sizes: tuple[int, int, int, int]
    shapes: Sequence[tuple[int, int]]
    rounds: int
    loads: int


def measure(chosen: _Sizes) -> Record:
    """The record."""
    with tempfile.TemporaryDirectory() as scratch:
        rows = [row for name in RUNTIMES if (row := _measured(name, chosen, Path(scratch)))]
    return {
        "schema": "nxm-bench-int4/1",
        **circumstances(
            len(os.sched_getaffinity(0)), ("onnxruntime", "openvino", "tensorrt-rtx-cu13", "onnx", "torch")
        ),
        "model": chosen.model,
        "rounds": chosen.rounds,
        "rows": rows,
    }


def _measured(runtime: str, chosen: _Sizes, scratch: Path) -> Row | None:
    """One runtime; None where it is not installed."""
    from nxm_export.graph.exporter import export

    target, weights = RUNTIMES[runtime]
    checkpoint = scratch / f"checkpoint-{target}"
    if not checkpoint.exists():
        write_checkpoint(checkpoint, *chosen.sizes, weights=weights, embedding="int8")
    graphs = {stored: scratch / f"{target}-{stored}" for stored in STORAGES}
    engines = {stored: scratch / f"{runtime}-{stored}" for stored in STORAGES}
    for stored in STORAGES:
        if not graphs[stored].exists():
            export(checkpoint, graphs[stored], target=target, weights_stored=stored)
        engines[stored].mkdir()
        try:
            backend(runtime).build(graphs[stored] / "model.onnx", engines[stored], BuildOptions())
        except EngineUnavailable:
            return None
    files = {"trt_rtx": "model.engine"}
    return {
        "runtime": runtime,
        "target": target,
        "weights": weights,
        "graph_bytes": {stored: (graphs[stored] / "model.onnx").stat().st_size for stored in STORAGES},
        "engine_bytes": {
            stored: (engines[stored] / files.get(runtime, "model.onnx")).stat().st_size for stored in STORAGES
        },
        "times": _times(runtime, engines, chosen) if target == "cpu" else [],
    }


def _times(runtime: str, engines: dict[str, Path], chosen: _Sizes) -> list[Timed]:
    def load(directory: Path) -> Callable[[], float]:
        def timed() -> float:
            began = time.perf_counter()
            backend(runtime).load(directory, LoadOptions()).close()
            return (time.perf_counter() - began) * 1e3

        return timed

    times = [_timed("load", interleaved({stored: load(engines[stored]) for stored in STORAGES}, chosen.loads))]
    with ExitStack() as stack:
        loaded = {stored: stack.enter_context(backend(runtime).load(engines[stored])) for stored in STORAGES}
        for batch, sequence in chosen.shapes:
            timers = {
                stored: engine.timer(feeds_for(engine, batch, sequence, 1000, 0)) for stored, engine in loaded.items()
            }
            times.append(_timed(f"{batch}x{sequence}", interleaved(timers, chosen.rounds, settle=True)))
    return times


def _timed(what: str, taken: dict[str, list[float]]) -> Timed:
    return {
        "what": what,
        "int8_ms": float(np.median(taken["int8"])),
        "ratio": paired_ratio(taken["int4"], taken["int8"]),
    }


def section(record: Record) -> str:
    """The section of a record; the text stands in ``int4.md.j2``."""
    rows = record["rows"]
    timed = [row for row in rows if row["times"]]
    return render(
        "benchmarks/int4.md.j2",
        where_and_when=where_and_when(record),
        model=record["model"],
        rounds=record["rounds"],
        sizes=[_size_cells(row) for row in rows],
        whats=[entry["what"] for entry in timed[0]["times"]] if timed else [],
        times=[_time_cells(row) for row in timed],
    )


def _size_cells(row: Row) -> list[str]:
    cells = [f"{row['runtime']}, target `{row['target']}`, {row['weights']}"]
    for sizes in (row["graph_bytes"], row["engine_bytes"]):
        cells += [f"{sizes[stored] / 1e6:.2f}" for stored in STORAGES]
    return cells


def _time_cells(row: Row) -> list[str]:
    cells = [row["runtime"]]
    for entry in row["times"]:
        low, high = entry["ratio"]["interval"]
        cells.append(f"{entry['ratio']['ratio']:.2f} ({low:.2f} to {high:.2f}) of {entry['int8_ms']:.1f} ms")
    return cells


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = bench_parser(__doc__).parse_args(arguments)
    if chosen.smoke:
        print(section(measure(_Sizes("small", SMOKE_SIZES["small"], SHAPES[:1], 3, 2))))
        return
    whole = _Sizes("MiniLM-L6", SIZES["MiniLM-L6"], SHAPES, ROUNDS, LOADS)
    record = load_record(FILE, Record) if chosen.render else measure(whole)
    save_record(FILE, record)
    write_section(DOCUMENT, TOOL, section(record))


if __name__ == "__main__":
    main()
