"""CPU latency and file sizes of a base-size encoder, dense and compressed, with NNCF's INT8 model beside them.

    python -m tools.benchmarks.base_size DENSE CHECKPOINT --data dev.tsv    measure, write the record and the document
    python -m tools.benchmarks.base_size --render                           the section of docs/performance.md again

DENSE and CHECKPOINT are classifiers of one family, as `tools.results` leaves them in its ``--work``; `dev.tsv` has
labelled texts of their task. All engines of a shape are timed in one run, each round in an order that turns. NNCF's
model of DENSE takes part where NXM_PEERS_PYTHON names an interpreter with openvino and nncf; else the section says so.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from engines.ort.backend import ENGINE_FILE
from nxm_export.contract.checkpoint import open_checkpoint
from nxm_export.contract.quantizer_placement import placement_of
from nxm_export.graph.exporter import export
from tools.benchmarks.cpu_engines import (
    PEERS,
    Recipe,
    Sources,
    build_all,
    by_name,
    compared,
    latency_of,
    loaded_all,
    loads_of,
    peers,
)
from tools.benchmarks.cpu_record import LatencyRow, Load, ParityRow
from tools.benchmarks.cpu_section import (
    PEER,
    PEER_FIXED,
    aim_cells,
    latency_cells,
    load_cells,
    parity_cells,
    speedup_cells,
)
from tools.benchmarks.measuring import (
    DOCUMENT,
    RECORDS,
    Circumstances,
    bench_parser,
    circumstances,
    load_record,
    save_record,
    where_and_when,
)
from tools.benchmarks.scaling import SMOKE_SIZES, write_checkpoint
from tools.rendering import render, write_section

TOOL = "tools/benchmarks/base_size.py"
FILE = RECORDS / "base_size.json"
EXAMPLES = 200  # of the data file, on which our fastest engines are held against the checkpoint
ROUNDS = {(1, 32): 30, (1, 128): 20, (8, 32): 15, (8, 128): 11}  # by (batch, sequence)
FLOAT = Recipe(None, "openvino")


class Record(Circumstances):
    """The file ``base_size.json``. `scale` is of rounds and examples: below 1 it is a rehearsal.

    `engine_bytes` and `loads` are by engine, `bytes` of files, by what they are; `peer` has its versions, if it was
    there.
    """

    schema: str
    model: str
    plan: str
    placement: str
    scale: float
    peer: str | None
    latency: list[LatencyRow]
    loads: dict[str, Load]
    parity: list[ParityRow]
    engine_bytes: dict[str, int]
    bytes: dict[str, int]
    seconds: int


def engines_of(placement: str) -> dict[str, Recipe]:
    """FP32 engines, and those of a checkpoint of `placement`: its own graph, and, where that has INT8 attention, the
    graph of all products, in OpenVINO free and with fixed shapes; the plain graph in both runtimes."""
    own = ("products", "attention") if placement == "attention" else (placement,)
    return by_name(
        *(Recipe(graph, runtime) for graph in (None, "inputs") for runtime in ("ort", "openvino")),
        *(Recipe(graph, "openvino") for graph in own),
        *(Recipe(graph, "openvino", fixed=True) for graph in (None, *own)),
    )


def _first_examples(data: Path, count: int, out: Path) -> Path:
    """A file of the head and the first `count` lines of `data`."""
    lines = data.read_text(encoding="utf-8").splitlines(keepends=True)
    out.write_text("".join(lines[: 1 + count]), encoding="utf-8")
    return out


def measure(sources: Sources, placement: str, model: str, data: Path | None, scale: float) -> Record:
    """The record of a dense classifier and its compressed checkpoint, which has the quantizers of `placement`.

    Without `data` nothing is compared, and NNCF has nothing to calibrate on. `scale` is of rounds and examples.
    """
    began, threads, shapes = time.monotonic(), len(os.sched_getaffinity(0)), list(ROUNDS)
    plan = open_checkpoint(sources.compressed).plan
    engines = engines_of(placement)
    fixed = Recipe(placement, "openvino", fixed=True).name
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        directories = build_all(engines, sources, scratch, threads, shapes)
        sizes = _sizes(sources, scratch)
        _say("built", began)
        loads = loads_of(directories, threads)
        _say("loaded each by itself", began)
        peer = peers(directories[FLOAT.name], data, scratch, threads, shapes) if data else None
        _say("peer made" if peer else f"no peer: it takes {PEERS} and --data", began)
        also = {"fixed shapes over free ones": (Recipe(placement, "openvino").name, fixed)}
        with ExitStack() as stack:
            loaded = loaded_all(engines, directories, peer, threads, stack)
            latency = [latency_of(loaded, shape, max(3, int(ROUNDS[shape] * scale)), also) for shape in shapes]
        _say("timed", began)
        fastest = dict.fromkeys(row["ratios"]["our fastest over the best FP32"]["of"] for row in latency)
        ours = {name: directories[name] for name in fastest}
        parity = []
        if data:
            examples = _first_examples(data, max(8, int(EXAMPLES * scale)), scratch / "dev.tsv")
            parity = compared(sources.compressed, ours, examples)
        _say("compared", began)
        engine_bytes = {name: (directory / ENGINE_FILE).stat().st_size for name, directory in directories.items()}
    return {
        "schema": "nxm-bench-base-size/2",
        **circumstances(threads, ("onnxruntime", "openvino", "onnx", "torch")),
        "model": model,
        "plan": ", ".join(f"{count} x {option}" for option, count in sorted(plan.pattern_counts.items())),
        "placement": placement,
        "scale": scale,
        "peer": peer[0].made_by if peer else None,
        "latency": latency,
        "loads": loads,
        "parity": parity,
        "engine_bytes": engine_bytes | ({PEER: peer[0].bytes, PEER_FIXED: peer[1].bytes} if peer else {}),
        "bytes": sizes,
        "seconds": round(time.monotonic() - began),
    }


def _sizes(sources: Sources, work: Path) -> dict[str, int]:
    """Bytes of checkpoints and graphs; those for CPUs lie in `work` already."""
    from nxm_export.contract.packed_checkpoint import pack

    pack(sources.compressed, work / "packed.safetensors")
    export(sources.compressed, work / "trt", target="trt")
    return {
        "dense checkpoint, FP32": (sources.dense / "model.safetensors").stat().st_size,
        "graph for CPUs, FP32": _size(work / "graph-dense"),
        "graph for CPUs, compressed (INT8; embeddings FP32)": _size(work / "graph-inputs"),
        "graph for TensorRT, compressed (INT8; embeddings FP16)": _size(work / "trt"),
        "`nxm pack`, compressed (embeddings FP32)": (work / "packed.safetensors").stat().st_size,
    }


def _size(graph: Path) -> int:
    return sum(path.stat().st_size for path in graph.glob("model.onnx*"))


def _say(what: str, began: float) -> None:
    print(f"{time.monotonic() - began:6.0f} s  {what}", file=sys.stderr, flush=True)


def section(record: Record) -> str:
    """The section of a record; the text stands in ``base_size.md.j2``."""
    latency = record["latency"]
    return render(
        "benchmarks/base_size.md.j2",
        where_and_when=where_and_when(record),
        model=record["model"],
        plan=record["plan"],
        placement=record["placement"],
        seconds=record["seconds"],
        peer=record["peer"],
        peers_variable=PEERS,
        rounds=", ".join(str(row["rounds"]) for row in latency),
        shapes=[f"{row['batch']}x{row['sequence']}" for row in latency],
        latencies=latency_cells(latency, record["engine_bytes"]),
        speedups=speedup_cells(latency),
        rehearsal=record["scale"] < 1,
        aims=aim_cells(latency),
        loads=load_cells(record["loads"]),
        parity=parity_cells(record["parity"]),
        parity_of=record["parity"][0] if record["parity"] else {},
        sizes=[[name, f"{size / 1e6:.1f}"] for name, size in record["bytes"].items()],
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line."""
    parser = bench_parser(__doc__)
    parser.add_argument("dense", nargs="?", type=Path)
    parser.add_argument("checkpoint", nargs="?", type=Path)
    parser.add_argument("--data", type=Path, help="labelled texts of the task")
    parser.add_argument("--model", default="MPNet-base (all-mpnet-base-v2), classifier of MRPC")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="rounds and examples times this, to try the command out"
    )
    chosen = parser.parse_args(arguments)
    if chosen.smoke:
        with tempfile.TemporaryDirectory() as scratch:
            write_checkpoint(Path(scratch) / "tiny", *SMOKE_SIZES["small"])
            tiny = Sources(Path(scratch) / "tiny", Path(scratch) / "tiny")
            print(section(measure(tiny, "inputs", "small, random weights", None, 0.0)))
        return
    if not chosen.render and not (chosen.dense and chosen.checkpoint and chosen.data):
        parser.error("give DENSE, CHECKPOINT and --data, or --render")
    if chosen.render:
        record = load_record(FILE, Record)
    else:
        placement = placement_of(open_checkpoint(chosen.checkpoint).plan)
        sources = Sources(chosen.dense, chosen.checkpoint)
        record = measure(sources, placement, chosen.model, chosen.data, chosen.scale)
    save_record(FILE, record)
    write_section(DOCUMENT, TOOL, section(record))


if __name__ == "__main__":
    main()
