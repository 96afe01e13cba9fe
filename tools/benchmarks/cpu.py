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
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from engines.devices import cpu_device
from engines.ort.backend import ENGINE_FILE
from engines.passport import companion_hashes, load_passport
from nxm_export.contract.checkpoint import open_checkpoint
from nxm_export.contract.io_spec import load_spec
from nxm_export.contract.quantizer_placement import placement_of
from nxm_export.pipeline.engine_timing import bench_text
from nxm_export.storage.hashing import file_hash
from nxm_export.storage.json_files import convert
from tools import ROOT
from tools.benchmarks.cpu_embeddings import measure_embeddings
from tools.benchmarks.cpu_engines import (
    PEERS,
    PLACEMENTS,
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
from tools.benchmarks.cpu_profile import onnxruntime_profile, openvino_profiles
from tools.benchmarks.cpu_record import EmbeddingRecord, MachineFacts, ModelFacts, Record, TextRecord
from tools.benchmarks.cpu_section import PEER, PEER_FIXED, section, summary
from tools.benchmarks.measuring import DOCUMENT, RECORDS, load_record, save_record
from tools.provenance import versions
from tools.rendering import write_section

README = ROOT / "README.md"
FILE, TOOL = RECORDS / "cpu.json", "tools/benchmarks/cpu.py"
SCHEMA = "nxm-cpu-bench/1"
LONGEST = 128
SHAPES = ((1, 32), (1, 128), (8, 32), (8, 128))
ROUNDS = {(1, 32): 500, (1, 128): 100, (8, 32): 80, (8, 128): 40}
ENGINES = by_name(
    *(Recipe(placement, runtime) for placement in (None, *PLACEMENTS) for runtime in ("ort", "openvino")),
    *(Recipe(placement, "openvino", fixed=True) for placement in (None, "products", "attention")),
)
FIXED = tuple(name for name, recipe in ENGINES.items() if recipe.fixed)
FLOAT_ORT, FLOAT_OPENVINO = Recipe(None, "ort").name, Recipe(None, "openvino").name
ORT, OPENVINO = Recipe("inputs", "ort").name, Recipe("inputs", "openvino").name
PRODUCTS, ATTENTION = Recipe("products", "openvino").name, Recipe("attention", "openvino").name
COMPARED = (ORT, OPENVINO, Recipe("inputs-outputs", "openvino").name, PRODUCTS, ATTENTION, *FIXED[1:])


def run(args: argparse.Namespace) -> None:
    """Measure and write the record.

    Long, because it is one list of measurements in their order: nothing is built while something is timed.
    """
    began = time.monotonic()
    threads = args.threads or len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(dir=args.work) as scratch, ExitStack() as stack:
        work = Path(scratch)
        if placement_of(open_checkpoint(args.checkpoint).plan) != "attention":
            raise SystemExit(
                f"{args.checkpoint} was trained without INT8 attention; compress it with --placement attention"
            )
        directories = build_all(ENGINES, Sources(args.dense, args.checkpoint), work, threads, SHAPES)
        _say("built", began)
        held = {} if args.no_compare else {name: directories[name] for name in COMPARED}
        parity = compared(args.checkpoint, held, args.data) if held else []
        _say("compared", began)
        loads = loads_of(directories, threads)
        _say("loaded each by itself", began)
        for directory in directories.values():  # the tokenizer may stop earlier than the model has positions
            replace(load_spec(directory), max_length=LONGEST).save(directory)
            replace(load_passport(directory), companions=companion_hashes(directory)).save(directory)
        peer = peers(directories[FLOAT_OPENVINO], args.data, work, threads, SHAPES)
        _say("peer made" if peer else f"no peer: {PEERS} is not set", began)
        loaded = loaded_all(ENGINES, directories, peer, threads, stack)
        also = {"all products, fixed shapes over free ones": (PRODUCTS, FIXED[1])}
        latency = [latency_of(loaded, shape, max(3, int(ROUNDS[shape] * args.scale)), also) for shape in SHAPES]
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
            for name in (FLOAT_ORT, ORT)
            for shape in SHAPES
        ]
        models = {name: directories[name] / ENGINE_FILE for name in (PRODUCTS, ATTENTION)}
        if peer is not None:
            models[PEER] = peer[0].model
        profile += openvino_profiles(models, SHAPES[0], threads)
        _say("profiled", began)
        record: Record = {
            "schema": SCHEMA,
            "date": time.strftime("%Y-%m-%d"),
            "machine": _machine(threads),
            "load_average_before": args.load_average,
            "versions": versions(("onnxruntime", "openvino", "onnx", "torch", "transformers", "numpy", "tokenizers")),
            "peer": peer[0].made_by if peer else None,
            "text_peers": embedded["peers"],
            "model": _model(args.checkpoint),
            "bytes": {name: (directory / ENGINE_FILE).stat().st_size for name, directory in directories.items()}
            | ({PEER: peer[0].bytes, PEER_FIXED: peer[1].bytes} if peer else {}),
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
