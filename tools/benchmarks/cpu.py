"""Measure CPU engines of one checkpoint against FP32 and the strongest peer, all interleaved.

    python -m tools.benchmarks.cpu run CHECKPOINT --dense DENSE --data dev.tsv    the record and the document
    python -m tools.benchmarks.cpu embeddings --data dev.tsv                      the embeddings of a record again
    python -m tools.benchmarks.cpu render                                         the document again

The record is results/performance/cpu.json, the document a section of docs/performance.md and one of README.md.

CHECKPOINT was compressed with `--placement attention`: graphs of fewer quantizers come out of it, too. One run exports
and builds everything, holds compressed engines against their checkpoint (`nxm compare`), times all engines at fixed
shapes and over the text of the data file, profiles operators, and measures what large matrix products reach on this
machine. With NXM_PEERS_PYTHON, an interpreter with openvino and nncf, OpenVINO's own INT8 model of the dense checkpoint
takes part; with NXM_TEXT_PEERS_PYTHON, one with sentence-transformers, optimum-onnx, optimum-intel and datasets, its
INT8 backends are timed beside engines of the same model (`tools.benchmarks.cpu_embeddings`).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np

from engines.base import BuildOptions, Engine, LoadOptions, backend, spec_of
from engines.benchmark.latency import feeds_for, interleaved, paired
from engines.openvino.backend import OpenVinoEngine, compile_models, read_model
from engines.ort.backend import ENGINE_FILE
from engines.passport import Bindings, companion_hashes, cpu_device, load_passport
from nxm_export.contract.checkpoint import open_checkpoint
from nxm_export.contract.io_spec import load_spec
from nxm_export.contract.quantizer_placement import placement_of
from nxm_export.data.examples import Columns, pad
from nxm_export.graph.exporter import export
from nxm_export.pipeline.engine_commands import bench_text, build_engine, compare_engines, features_of
from nxm_export.storage.hashing import file_hash
from nxm_export.storage.json_files import convert
from tools import ROOT
from tools.benchmarks.cpu_embeddings import measure_embeddings
from tools.benchmarks.cpu_profile import onnxruntime_profile, openvino_profiles
from tools.benchmarks.cpu_record import (
    EmbeddingRecord,
    LatencyRow,
    Load,
    MachineFacts,
    ModelFacts,
    ParityRow,
    Record,
    TextRecord,
)
from tools.benchmarks.cpu_section import PEER, PEER_FIXED, section, summary
from tools.benchmarks.measuring import DOCUMENT, RECORDS, in_child, load_record, save_record
from tools.provenance import versions
from tools.rendering import write_section

README = ROOT / "README.md"
FILE, TOOL = RECORDS / "cpu.json", "tools/benchmarks/cpu.py"
SCHEMA = "nxm-cpu-bench/1"
EXPERIMENTS = ROOT / "tools" / "experiments"
PEERS = "NXM_PEERS_PYTHON"
LONGEST = 128
SHAPES = ((1, 32), (1, 128), (8, 32), (8, 128))
ROUNDS = {(1, 32): 500, (1, 128): 100, (8, 32): 80, (8, 128): 40}
# name: (checkpoint, placement, backend); `ort` and `openvino` beside "FP32" are the dense checkpoint's graph
ENGINES = {
    "FP32, ort": ("dense", None, "ort"),
    "FP32, openvino": ("dense", None, "openvino"),
    "INT8 2:4, ort": ("compressed", "inputs", "ort"),
    "INT8 2:4, openvino": ("compressed", "inputs", "openvino"),
    "INT8 2:4, outputs too, ort": ("compressed", "inputs-outputs", "ort"),
    "INT8 2:4, outputs too, openvino": ("compressed", "inputs-outputs", "openvino"),
    "INT8 2:4, all products, ort": ("compressed", "products", "ort"),
    "INT8 2:4, all products, openvino": ("compressed", "products", "openvino"),
    "INT8 2:4, attention too, ort": ("compressed", "attention", "ort"),
    "INT8 2:4, attention too, openvino": ("compressed", "attention", "openvino"),
    "FP32, openvino, fixed shapes": ("dense", None, "openvino"),
    "INT8 2:4, all products, openvino, fixed shapes": ("compressed", "products", "openvino"),
    "INT8 2:4, attention too, openvino, fixed shapes": ("compressed", "attention", "openvino"),
}
FIXED = tuple(name for name in ENGINES if name.endswith("fixed shapes"))  # built with a model for each of SHAPES
OURS = tuple(name for name, (which, _, _) in ENGINES.items() if which == "compressed")
ORT, OPENVINO, BOTH, PRODUCTS, ATTENTION = OURS[0], OURS[1], OURS[3], OURS[5], OURS[7]
COMPARED = (ORT, OPENVINO, BOTH, PRODUCTS, ATTENTION, *FIXED[1:])
CALIBRATION = 100  # sentences for NNCF, which needs some and learns nothing from more here


def run(args: argparse.Namespace) -> None:
    """Measure and write the record.

    Long, because it is one list of measurements in their order: nothing is built while something is timed.
    """
    began = time.monotonic()
    threads = args.threads or len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(dir=args.work) as scratch, ExitStack() as stack:
        work = Path(scratch)
        directories = _build(args, work, threads)
        _say("built", began)
        parity = [] if args.no_compare else _compare(args.checkpoint, directories, args.data)
        _say("compared", began)
        loads = {
            name: in_child(Load, "tools.benchmarks.cpu_load", str(directory), str(threads))
            for name, directory in directories.items()
        }
        _say("loaded each by itself", began)
        for directory in directories.values():  # the tokenizer may stop earlier than the model has positions
            replace(load_spec(directory), max_length=LONGEST).save(directory)
            replace(load_passport(directory), companions=companion_hashes(directory)).save(directory)
        loaded: dict[str, Engine] = {
            name: stack.enter_context(backend(ENGINES[name][2]).load(directory, LoadOptions(threads=threads)))
            for name, directory in directories.items()
        }
        peer = _peer(directories, args.data, work, threads)
        if peer is not None:
            loaded[PEER] = stack.enter_context(peer)
            loaded[PEER_FIXED] = stack.enter_context(Peer(peer.model, threads, peer.made_by, SHAPES))
        _say("peer made" if peer else f"no peer: {PEERS} is not set", began)
        latency = [_latency(loaded, shape, max(3, int(ROUNDS[shape] * args.scale))) for shape in SHAPES]
        _say("timed shapes", began)
        texts = bench_text(
            [directories[ORT], directories[PRODUCTS]],
            str(args.data),
            threads=threads,
            rounds=max(3, int(7 * args.scale)),
        )
        _say("timed text", began)
        embedded = _embeddings(args, work, threads)
        _say("timed embeddings", began)
        profile = [
            onnxruntime_profile(directories[name], name, shape, threads)
            for name in ("FP32, ort", ORT)
            for shape in SHAPES
        ]
        models = {name: directories[name] / ENGINE_FILE for name in (PRODUCTS, ATTENTION)}
        if peer is not None:
            models[PEER] = peer.model
        profile += openvino_profiles(models, SHAPES[0], threads)
        _say("profiled", began)
        record: Record = {
            "schema": SCHEMA,
            "date": time.strftime("%Y-%m-%d"),
            "machine": _machine(threads),
            "load_average_before": args.load_average,
            "versions": versions(("onnxruntime", "openvino", "onnx", "torch", "transformers", "numpy", "tokenizers")),
            "peer": peer.made_by if peer else None,
            "text_peers": embedded["peers"],
            "model": _model(args.checkpoint),
            "bytes": {name: (directory / ENGINE_FILE).stat().st_size for name, directory in directories.items()}
            | ({PEER: peer.bytes, PEER_FIXED: peer.bytes} if peer else {}),
            "data_sha256": file_hash(args.data),
            "parity": parity,
            "latency": latency,
            "loads": loads,
            "text": convert(texts.to_dict(), TextRecord, source="text", way_out="measure again"),
            "embeddings": embedded,
            "profile": profile,
            "seconds": round(time.monotonic() - began),
        }
    save_record(args.record, record)
    _say(f"wrote {args.record}", began)
    render(args)


def embeddings(args: argparse.Namespace) -> None:
    """Measure the embeddings of a record again."""
    record = load_record(args.record, Record)
    with tempfile.TemporaryDirectory(dir=args.work) as scratch:
        measured = _embeddings(args, Path(scratch), args.threads or len(os.sched_getaffinity(0)))
    save_record(args.record, {**record, "embeddings": measured, "text_peers": measured["peers"]})
    render(args)


def _embeddings(args: argparse.Namespace, work: Path, threads: int) -> EmbeddingRecord:
    timed = measure_embeddings(args.data, work / "embeddings", threads, max(3, int(7 * args.scale)))
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": _machine(threads),
        "commit": versions(())["commit"],
        **timed,
    }


def _build(args: argparse.Namespace, work: Path, threads: int) -> dict[str, Path]:
    """Export each graph once and build every engine from it; directories by name."""
    if placement_of(open_checkpoint(args.checkpoint).plan) != "attention":
        raise SystemExit(
            f"{args.checkpoint} was trained without INT8 attention; compress it with --placement attention"
        )
    checkpoints = {"dense": args.dense, "compressed": args.checkpoint}
    graphs: dict[tuple[str, str | None], Path] = {}
    directories = {}
    for number, (name, (which, placement, runtime)) in enumerate(ENGINES.items()):
        if (which, placement) not in graphs:
            out = work / f"graph{number}"
            graphs[which, placement] = export(checkpoints[which], out, target="cpu", placement=placement).path
        directories[name] = work / name.replace(" ", "-").replace(",", "").replace(":", "of")
        options = BuildOptions(threads=threads, shapes=SHAPES if name in FIXED else ())
        build_engine(graphs[which, placement], directories[name], runtime, options)
    return directories


def _compare(checkpoint: Path, directories: Mapping[str, Path], data: Path) -> list[ParityRow]:
    """What `nxm compare` says about our engines, with the accuracy gate of half a point."""
    engines = [directories[name] for name in COMPARED]
    reports = compare_engines(checkpoint, engines, str(data), gates=["drop<=0.5"]).reports
    return [
        {
            "engine": name,
            "passed": report.passed,
            "metric": report.metric,
            "samples": report.samples,
            "checkpoint": report.reference_value,
            "value": report.engine_value,
            "difference_interval": report.difference_interval,
            "agreement": report.outputs[0].agreement,
            "mean_abs": report.outputs[0].mean_abs,
            "mean_tolerance": report.outputs[0].mean_tolerance,
        }
        for name, report in zip(COMPARED, reports, strict=True)
    ]


class Peer(OpenVinoEngine):
    """A model that OpenVINO wrote, run with the same settings as ours, at `shapes` by models compiled for them."""

    def __init__(self, model: Path, threads: int, made_by: str, shapes: Sequence[tuple[int, int]] = ()) -> None:
        models = compile_models(model, read_model(model, model), threads, shapes)
        super().__init__(model.parent, models, spec_of(model.parent), Bindings())
        self.made_by, self.model = made_by, model
        self.bytes = sum(part.stat().st_size for part in (model, model.with_suffix(".bin")))


def _peer(directories: Mapping[str, Path], data: Path, work: Path, threads: int) -> Peer | None:
    """NNCF's INT8 model of the dense graph, calibrated on sentences of the data file (inputs alone, no labels)."""
    python = os.environ.get(PEERS)
    if not python:
        return None
    dense = directories["FP32, openvino"]
    features, pad_id = features_of(dense, str(data), Columns())[:CALIBRATION], load_spec(dense).pad_id
    arrays = {
        f"{number}/{name}": array
        for number, sample in enumerate(features)
        for name, array in pad([sample], pad_id).items()
    }
    np.savez(work / "calibration.npz", allow_pickle=False, **arrays)
    command = [python, str(EXPERIMENTS / "nncf_peer.py"), str(dense / ENGINE_FILE), str(work / "calibration.npz")]
    done = subprocess.run([*command, str(work / "peer.xml")], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{PEERS}: the peer could not be made:\n{done.stderr[-2000:]}")
    return Peer(work / "peer.xml", threads, done.stdout.strip().splitlines()[-1])


def _latency(loaded: Mapping[str, Engine], shape: tuple[int, int], rounds: int) -> LatencyRow:
    """Median milliseconds by engine, and the paired ratios that the tables need; larger is faster."""
    timers = {name: engine.timer(feeds_for(engine, *shape, 1000, 0)) for name, engine in loaded.items()}
    taken = {name: np.array(times) for name, times in interleaved(timers, rounds, settle=True).items()}
    medians = {name: float(np.median(times)) for name, times in taken.items()}
    best_float = min((name for name in taken if name.startswith("FP32")), key=medians.__getitem__)
    best = min(OURS, key=medians.__getitem__)
    peer = min((name for name in (PEER, PEER_FIXED) if name in taken), key=medians.__getitem__, default=None)
    pairs = {
        "ort over its own FP32": ("FP32, ort", ORT),
        "our fastest over the best FP32": (best_float, best),
        "all products, fixed shapes over free ones": (PRODUCTS, FIXED[1]),
        **({"our fastest over NNCF": (peer, best), "ort over NNCF": (peer, ORT)} if peer else {}),
    }
    return {
        "batch": shape[0],
        "sequence": shape[1],
        "rounds": rounds,
        "median_ms": medians,
        "quartiles_ms": {name: np.percentile(times, [25, 75]).tolist() for name, times in taken.items()},
        "ratios": {
            what: {"of": name, "against": reference, "ratio": ratio, "interval": list(interval)}
            for what, (reference, name) in pairs.items()
            for ratio, interval in [paired(taken[reference], taken[name])]
        },
    }


def _machine(threads: int) -> MachineFacts:
    facts = {**cpu_device(), "threads": threads, "cores": len(os.sched_getaffinity(0))}
    return convert(facts, MachineFacts, source="machine", way_out="measure again")


def _model(checkpoint: Path) -> ModelFacts:
    plan = open_checkpoint(checkpoint).plan
    return {"model_type": plan.model_type, "plan": plan.pattern_counts, "compression": plan.compression()}


def _say(what: str, began: float) -> None:
    print(f"{time.monotonic() - began:6.0f} s  {what}", file=sys.stderr, flush=True)


def render(args: argparse.Namespace) -> None:
    """Write the sections of a record."""
    record = load_record(args.record, Record)
    write_section(args.document, TOOL, section(record))
    write_section(args.readme, TOOL, summary(record))


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    measure = commands.add_parser("run", help="measure, and write the record and the section of docs/performance.md")
    measure.add_argument("checkpoint", type=Path, help="compressed checkpoint")
    measure.add_argument("--dense", type=Path, required=True, help="the dense checkpoint that it was made from")
    measure.add_argument("--no-compare", action="store_true", help="leave out the comparison with the checkpoint")
    measure.set_defaults(call=run)
    again = commands.add_parser("embeddings", help="measure the embeddings of a record again, and nothing else")
    again.set_defaults(call=embeddings)
    for command in (measure, again):
        command.add_argument("--data", type=Path, required=True, help="labelled sentences")
        command.add_argument("--threads", type=int, help="[default: all cores]")
        command.add_argument("--work", type=Path, help="directory for what is thrown away afterwards")
        command.add_argument("--scale", type=float, default=1.0, help="rounds times this, to try the command out")
    write = commands.add_parser("render", help="write the section of docs/performance.md again, from the record")
    write.set_defaults(call=render)
    for command in (measure, again, write):
        command.add_argument("--record", type=Path, default=FILE)
        command.add_argument("--document", type=Path, default=DOCUMENT)
        command.add_argument("--readme", type=Path, default=README, help="where the summary goes")
    args = parser.parse_args()
    args.load_average = os.getloadavg()[0]
    args.call(args)


if __name__ == "__main__":
    main()
