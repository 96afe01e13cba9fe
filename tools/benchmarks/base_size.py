"""CPU latency and file sizes of a base-size encoder, dense and compressed.

    python -m tools.benchmarks.base_size DENSE CHECKPOINT    measure, write the record and the document
    python -m tools.benchmarks.base_size --render            the section of docs/performance.md, from the record

DENSE and CHECKPOINT are classifiers of one family, as `tools.results` leaves them in its ``--work``. All engines of a
shape are timed in one run, each round in an order that turns.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TypedDict

import numpy as np

from engines.base import BuildOptions, LoadOptions, backend
from engines.benchmark.latency import feeds_for, interleaved
from nxm_export.contract.checkpoint import open_checkpoint
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
from tools.benchmarks.scaling import SMOKE_SIZES, write_checkpoint
from tools.rendering import render, write_section

TOOL = "tools/benchmarks/base_size.py"
FILE = RECORDS / "base_size.json"
SHAPES = ((1, 32), (1, 128), (8, 32), (8, 128))  # (batch, sequence)
ROUNDS = 15
REFERENCE = "FP32, ort"
ENGINES = {  # name: (which, backend)
    REFERENCE: ("dense", "ort"),
    "FP32, openvino": ("dense", "openvino"),
    "INT8 2:4, ort": ("compressed", "ort"),
    "INT8 2:4, openvino": ("compressed", "openvino"),
}


class Timed(TypedDict):
    """An engine at a shape: the median in milliseconds, and its time over the reference's."""

    engine: str
    shape: str
    ms: float
    ratio: Ratio


class Record(Circumstances):
    """The file ``base_size.json``. `bytes` are of files, by what they are."""

    schema: str
    model: str
    plan: str
    rounds: int
    times: list[Timed]
    bytes: dict[str, int]


def measure(dense: Path, checkpoint: Path, model: str, shapes: Sequence[tuple[int, int]], rounds: int) -> Record:
    """The record of a dense classifier and its compressed checkpoint."""
    threads = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as scratch:
        graphs = _exported(dense, checkpoint, Path(scratch))
        engines = {name: Path(scratch) / f"engine-{number}" for number, name in enumerate(ENGINES)}
        for name, (which, runtime) in ENGINES.items():
            engines[name].mkdir()
            backend(runtime).build(graphs[which] / "model.onnx", engines[name], BuildOptions(threads=threads))
        times = _times(engines, shapes, rounds, threads)
        sizes = _sizes(dense, checkpoint, graphs, Path(scratch))
    plan = open_checkpoint(checkpoint).plan
    assert plan is not None, f"{checkpoint} is not compressed"
    return {
        "schema": "nxm-bench-base-size/1",
        **circumstances(threads, ("onnxruntime", "openvino", "onnx", "torch")),
        "model": model,
        "plan": ", ".join(f"{count} x {option}" for option, count in sorted(plan.pattern_counts.items())),
        "rounds": rounds,
        "times": times,
        "bytes": sizes,
    }


def _exported(dense: Path, checkpoint: Path, scratch: Path) -> dict[str, Path]:
    """Graph directories: of the dense model, and of the checkpoint for both targets."""
    from nxm_export.graph.exporter import export

    for name, source, target in (
        ("dense", dense, "cpu"),
        ("compressed", checkpoint, "cpu"),
        ("trt", checkpoint, "trt"),
    ):
        export(source, scratch / name, target=target)
    return {name: scratch / name for name in ("dense", "compressed", "trt")}


def _times(engines: Mapping[str, Path], shapes: Sequence[tuple[int, int]], rounds: int, threads: int) -> list[Timed]:
    times: list[Timed] = []
    with ExitStack() as stack:
        loaded = {
            name: stack.enter_context(backend(ENGINES[name][1]).load(directory, LoadOptions(threads=threads)))
            for name, directory in engines.items()
        }
        for batch, sequence in shapes:
            timers = {
                name: engine.timer(feeds_for(engine, batch, sequence, 1000, 0)) for name, engine in loaded.items()
            }
            taken = interleaved(timers, rounds, settle=True)
            times += [
                {
                    "engine": name,
                    "shape": f"{batch}x{sequence}",
                    "ms": float(np.median(taken[name])),
                    "ratio": paired_ratio(taken[name], taken[REFERENCE]),
                }
                for name in engines
            ]
    return times


def _sizes(dense: Path, checkpoint: Path, graphs: Mapping[str, Path], scratch: Path) -> dict[str, int]:
    from nxm_export.contract.packed_checkpoint import pack

    pack(checkpoint, scratch / "packed.safetensors")
    return {
        "dense checkpoint, FP32": (dense / "model.safetensors").stat().st_size,
        "graph for CPUs, FP32": _size(graphs["dense"]),
        "graph for CPUs, compressed (INT8; embeddings FP32)": _size(graphs["compressed"]),
        "graph for TensorRT, compressed (INT8; embeddings FP16)": _size(graphs["trt"]),
        "`nxm pack`, compressed (embeddings FP32)": (scratch / "packed.safetensors").stat().st_size,
    }


def _size(graph: Path) -> int:
    return sum(path.stat().st_size for path in graph.glob("model.onnx*"))


def section(record: Record) -> str:
    """The section of a record; the text stands in ``base_size.md.j2``."""
    shapes = list(dict.fromkeys(entry["shape"] for entry in record["times"]))
    cells = {(entry["engine"], entry["shape"]): _cell(entry) for entry in record["times"]}
    return render(
        "benchmarks/base_size.md.j2",
        where_and_when=where_and_when(record),
        model=record["model"],
        plan=record["plan"],
        rounds=record["rounds"],
        shapes=shapes,
        times=[[name, *(cells[name, shape] for shape in shapes)] for name in ENGINES],
        sizes=[[name, f"{size / 1e6:.1f}"] for name, size in record["bytes"].items()],
    )


def _cell(entry: Timed) -> str:
    if entry["engine"] == REFERENCE:
        return f"{entry['ms']:.1f}"
    low, high = entry["ratio"]["interval"]
    return f"{entry['ms']:.1f} ({entry['ratio']['ratio']:.2f}, {low:.2f} to {high:.2f})"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("dense", nargs="?", type=Path)
    parser.add_argument("checkpoint", nargs="?", type=Path)
    parser.add_argument("--model", default="MPNet-base (all-mpnet-base-v2), classifier of MRPC")
    chosen = parser.parse_args(arguments)
    if chosen.smoke:
        with tempfile.TemporaryDirectory() as scratch:
            write_checkpoint(Path(scratch) / "tiny", *SMOKE_SIZES["small"])
            tiny = Path(scratch) / "tiny"
            print(section(measure(tiny, tiny, "small, random weights", SHAPES[:1], 3)))
        return
    if not chosen.render and not (chosen.dense and chosen.checkpoint):
        parser.error("give DENSE and CHECKPOINT, or --render")
    record = (
        load_record(FILE, Record)
        if chosen.render
        else measure(chosen.dense, chosen.checkpoint, chosen.model, SHAPES, ROUNDS)
    )
    save_record(FILE, record)
    write_section(DOCUMENT, TOOL, section(record))


if __name__ == "__main__":
    main()
